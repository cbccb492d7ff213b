"""What the sampler does not compute: known tokens whose sums are kept over several steps, unwanted queries.

Exact where nothing is kept, near where something is.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from generation.lina.attention import Attention, gather
from generation.lina.attention_memory import AttentionMemory, EncoderMemory
from generation.lina.sampling import Plan, draw_tokens
from generation.lina.transformer import LinaTransformer
from kernels.linear_attention import linear_attention
from kernels.packed_linear import PackedLinear

SMALL = {
    "width": 32,
    "num_heads": 2,
    "context_depth": 1,
    "encoder_depth": 2,
    "decoder_depth": 1,
    "denoiser_depth": 1,
    "latent_channels": 4,
    "latent_size": (8, 8),
    "num_classes": 10,
}


@pytest.mark.parametrize("parts", [(9,), (1, 8), (4, 3, 2)], ids=str)
def test_sums_of_parts_are_the_sums_of_all(parts):
    query, key, value = torch.randn(3, 2, 9, 3, 16)
    memory = AttentionMemory()
    for part in zip(*(x.split(parts, 1) for x in (query, key, value)), strict=True):
        read = memory.attend(*part)
    expected = linear_attention(query[:, -parts[-1] :], key, value)
    torch.testing.assert_close(read, expected, rtol=1e-5, atol=1e-6)
    assert memory.count == 9


def test_sums_keep_float64():
    query, key, value = torch.randn(3, 2, 9, 3, 16, dtype=torch.float64)
    read = AttentionMemory().attend(query, key, value)
    assert read.dtype == torch.float64
    torch.testing.assert_close(read, linear_attention(query, key, value), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_does_not_round_the_sums(dtype):
    query, key, value = torch.randn(3, 2, 9, 3, 16).to(dtype)
    expected = AttentionMemory().attend(query, key, value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = AttentionMemory().attend(query, key, value)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.fixture
def model() -> LinaTransformer:
    torch.manual_seed(0)
    return LinaTransformer(**SMALL).eval()


@pytest.fixture
def lively_model(model) -> LinaTransformer:
    """Its denoiser heeds the conditions, as an untrained one does not."""
    nn.init.normal_(model.image_decoder.head.weight, std=0.2)
    for block in model.image_decoder.blocks:
        nn.init.normal_(block.norm1.proj.weight, std=0.1)
    return model


def test_first_call_with_a_memory_is_the_call_without(model):
    tokens, context = torch.randn(2, 64, 4), torch.randn(2, 16, 32)
    known, wanted = torch.arange(10).expand(2, 10), torch.arange(20, 25).expand(2, 5)
    memory = EncoderMemory.of_depth(2)
    with torch.no_grad():
        plain = model.encode_image(tokens, context, (8, 8), known, wanted)
        kept = model.encode_image(tokens, context, (8, 8), known, wanted, memory)
        torch.testing.assert_close(kept, plain, rtol=1e-5, atol=1e-5)
        more = torch.arange(13).expand(2, 13)
        exact = model.encode_image(tokens, context, (8, 8), more, wanted)
        approximate = model.encode_image(tokens, context, (8, 8), more, wanted, memory)
    assert memory.known.shape == (2, 13, 32)
    off = (approximate - exact).norm() / exact.norm()
    without_the_new = (plain - exact).norm() / exact.norm()
    assert 0 < off < without_the_new


def draw(
    model: LinaTransformer,
    refresh_every: int,
    guidance: list[float],
    change: Callable[[int, torch.Tensor], None] = lambda step, tokens: None,
) -> torch.Tensor:
    """`change` may alter the tokens, in place, after each step; the order is the same in every call."""
    generator = torch.Generator().manual_seed(1)
    plan = Plan(
        order=torch.rand(2, 64, generator=generator).argsort(1),
        known=0,
        predictions=[4, 10, 20, 30],
        guidance=guidance,
        sigmas=[(1.0, 0.5, 0.0)] * 4,
        refresh_every=refresh_every,
    )
    contexts = torch.randn(2, 2, 16, 32, generator=generator)
    noise = torch.randn(2, 64, 4, generator=generator)
    with torch.no_grad():
        steps = draw_tokens(
            model,
            *contexts,
            torch.zeros(2, 64, 4),
            plan,
            lambda _, wanted: noise.gather(1, wanted[..., None].expand(-1, -1, 4)),
        )
        for step, drawn in enumerate(steps):
            change(step, drawn)
            tokens = drawn
        return tokens


@pytest.mark.parametrize("guidance", [[2.0] * 4, [1.0, 2.0, 3.0, 4.0]], ids=["constant", "begins late"])
def test_sampling_with_refreshed_memory_stays_near(lively_model, guidance):
    exact, kept = draw(lively_model, 1, guidance), draw(lively_model, 3, guidance)
    assert not torch.equal(exact, kept)
    assert (kept - exact).norm() / exact.norm() < 0.2


def test_changed_tokens_are_encoded_again(lively_model):
    """All tokens known before the last step are changed, to the same values: its memory is a fresh one, so exact."""
    values = torch.randn(2, 64, 4)

    def change(step: int, tokens: torch.Tensor) -> None:
        if step == 2:
            tokens.copy_(torch.where(tokens == 0, tokens, values))

    kept, exact = (draw(lively_model, refresh_every, [2.0] * 4, change) for refresh_every in (4, 1))
    torch.testing.assert_close(kept, exact, rtol=1e-4, atol=1e-4)


def test_a_memory_knows_its_tokens():
    tokens = torch.randn(2, 9, 4)
    memory = EncoderMemory.of_depth(1)
    assert memory.is_of(tokens)
    memory.seen = tokens[:, :5].clone()
    assert memory.is_of(tokens)
    assert not memory.is_of(tokens.repeat(2, 1, 1))
    tokens[1, 4, 0] += 1
    assert not memory.is_of(tokens)


def adapted(qkv: nn.Linear) -> nn.Module:
    """As adapters of low rank wrap a layer: the plain weight is there to be read, and is not all."""

    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = qkv.weight, qkv.bias
            self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 96, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight, self.bias) + self.up(self.down(x))

    return Adapter()


def hooked(qkv: nn.Linear) -> nn.Module:
    qkv.register_forward_pre_hook(lambda module, inputs: (inputs[0].tanh(),))
    return qkv


def parametrized(qkv: nn.Linear) -> nn.Module:
    return parametrizations.weight_norm(qkv)


@pytest.mark.parametrize("change", [None, PackedLinear, adapted, hooked, parametrized])
@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_wanted_tokens_are_those_of_all_whatever_qkv_is(attention, change):
    attend = Attention(32, 2, attention=attention)
    x, wanted = torch.randn(2, 9, 32), torch.tensor([[8, 0, 3], [1, 2, 7]])
    with torch.no_grad():
        plain = attend(x)
        if change is not None:
            attend.qkv = change(attend.qkv)
        expected = attend(x)
        torch.testing.assert_close(attend(x, wanted=wanted), gather(expected, wanted), rtol=1e-5, atol=1e-6)
    assert (change in (adapted, hooked)) != torch.allclose(plain, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"attention": "softmax", "gates": None, "locality": 0}, {"normalization": "subtraction"}],
    ids=["softmax", "subtraction"],
)
def test_other_attention_has_no_memory(options):
    with pytest.raises(ValueError, match="refresh_every is 3"):
        draw(LinaTransformer(**SMALL, **options).eval(), 3, [1.0] * 4)
