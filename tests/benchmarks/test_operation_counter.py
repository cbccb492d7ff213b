"""The rule of the counter, and what it finds in the eager LINA in bfloat16 beside counts of the official code."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks import eager_lina, eager_lina_layers
from tests.benchmarks.operation_counter import count

X = torch.randn(4, 6)  # 96 bytes
ROW = torch.randn(1, 6)  # 24 bytes
INDEX = torch.tensor([[0], [2]])  # 16 bytes


@torch.library.custom_op("operation_counter_test::twice", mutates_args=("total",))
def twice(x: Tensor, total: Tensor) -> Tensor:
    total += x.sum()
    return x + x


@pytest.mark.parametrize(
    ("function", "operations", "size"),
    [
        pytest.param(lambda: X.t().view(3, 2, 4)[1:].unbind(0)[0].detach(), 0, 0, id="views"),
        pytest.param(lambda: (torch.empty(9), X.new_empty(2), torch.empty_like(X)), 0, 0, id="allocations"),
        pytest.param(lambda: X.contiguous().float().reshape(2, 12), 0, 0, id="conversions to the same"),
        pytest.param(lambda: X[:0].relu(), 0, 0, id="no elements"),
        pytest.param(lambda: X.t().reshape(-1), 1, 2 * 96, id="reshape that copies"),
        pytest.param(lambda: X.expand(5, 4, 6).clone(), 1, 6 * 96, id="expanded input"),
        pytest.param(lambda: X + ROW, 1, 2 * 96 + 24, id="broadcast"),
        pytest.param(lambda: X.bfloat16(), 1, 96 + 48, id="cast"),
        pytest.param(lambda: 1 / X, 2, 4 * 96, id="reciprocal"),
        pytest.param(lambda: F.linear(X, X, X[:, 0]), 1, 96 + 96 + 16 + 64, id="linear"),
        pytest.param(lambda: X.clone().add_(ROW), 2, 2 * 96 + 2 * 96 + 24, id="in place"),
        pytest.param(lambda: X.clone()[1].mul_(2), 2, 2 * 96 + 2 * 24, id="in place on a view"),
        pytest.param(lambda: torch.empty(4, 6).copy_(X), 1, 2 * 96, id="copy"),
        pytest.param(lambda: torch.mul(X, 2, out=torch.empty(4, 6)), 1, 2 * 96, id="out"),
        pytest.param(lambda: X.new_zeros(4, 6), 1, 96, id="zeros"),
        pytest.param(lambda: X.gather(0, INDEX.expand(2, 6)), 1, 2 * 48 + 16, id="gather"),
        pytest.param(lambda: X[INDEX[:, 0]], 1, 2 * 48 + 16, id="index"),
        pytest.param(lambda: X.scatter(0, INDEX.expand(2, 6), X[:2]), 1, 2 * 96 + 16 + 48, id="scatter"),
        pytest.param(
            lambda: torch.empty(99, 6).scatter_(0, INDEX.expand(2, 6), X[:2]), 1, 16 + 2 * 48, id="scatter in place"
        ),
        pytest.param(lambda: twice(X, torch.empty(1)), 1, 2 * 96 + 2 * 4, id="operation of a library"),
    ],
)
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
def test_rule(function, operations, size, inference):
    with torch.inference_mode(inference):
        counts = count(function)
    assert (counts.operations, counts.bytes) == (operations, size), str(counts)


def test_launches_of_a_library():
    assert count(lambda: twice(X, torch.zeros(1)), {"operation_counter_test::twice": 3}).operations == 3 + 1


def block(kind: str) -> eager_lina_layers.Block:
    attention = {
        "decoder": lambda: eager_lina_layers.GatedConvolutionalAttention(32, 2, (4, 4), 4),
        "encoder": lambda: eager_lina_layers.LinearAttention(32, 2),
        "softmax": lambda: eager_lina_layers.SoftmaxAttention(32, 2),
    }[kind]()
    return eager_lina_layers.Block(32, attention).bfloat16()


@pytest.mark.parametrize(
    ("kind", "batch", "operations"),
    [
        ("decoder", 2, 39),  # as counted with the official code
        ("encoder", 2, 32),
        ("softmax", 2, 10),
        ("decoder", 1, 35),  # a batch of one spares four copies of operands of products
        ("encoder", 1, 28),
        ("softmax", 1, 10),
    ],
)
def test_operations_of_a_block(kind, batch, operations):
    module, x = block(kind), torch.randn(batch, 20, 32).bfloat16()
    with torch.no_grad():
        assert count(lambda: module(x)).operations == operations


@pytest.mark.parametrize(
    ("patch_size", "operations"),
    [
        (2, 106),  # as counted with the official code
        (1, 104),  # patches of one pixel are a view
    ],
)
def test_operations_of_a_diffusion_step(patch_size, operations):
    config = eager_lina.EagerLinaConfig(
        width=32,
        heads=2,
        context_depth=1,
        image_depth=2,
        head_width=32,
        head_depth=6,
        latent_channels=4,
        latent_size=(4 * patch_size, 4 * patch_size),
        patch_size=patch_size,
    )
    model = eager_lina.EagerLina(config).bfloat16()
    noisy = torch.randn(2, 4, *config.latent_size).bfloat16()
    z, predicted = torch.randn(4, 16, 32).bfloat16(), torch.arange(3)[:, None].expand(4, 3, 1)
    sigmas = eager_lina.sample_sigmas(25)
    timestep = 1000 * sigmas[0]

    def step() -> Tensor:
        return model.diffusion_step(noisy, timestep, z, predicted, 5.0, sigmas[0], sigmas[1])

    with torch.no_grad():
        step()  # makes the table of frequencies
        assert count(step).operations == operations


def test_memory_traffic_of_the_decoder_attention():
    """The 1.4B model at 512 px, batch 1: 304 MB are on record for the official code, and 50 MB for its projections.

    The 50 cannot be had by the rule: activations and weights of two projections in bfloat16, once each, are 42.5.
    """
    width, tokens = 1536, 1280
    module = eager_lina_layers.GatedConvolutionalAttention(width, 16, (32, 32), 256).bfloat16()
    x = torch.randn(1, tokens, width).bfloat16()
    with torch.no_grad():
        counts = count(lambda: module(x))
    projections = counts.by_operation["addmm"]
    assert projections == (2, 2 * (6 * tokens * width + 4 * width * width + 4 * width))
    assert counts.operations == 28
    assert counts.bytes == pytest.approx(304e6, rel=0.15)
    assert counts.bytes - projections[1] == pytest.approx(254e6, rel=0.15)
