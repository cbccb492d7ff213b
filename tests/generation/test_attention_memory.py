"""Encoding of known tokens with sums kept over several steps: exact where nothing is kept, near where something is."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from generation.lina.attention_memory import AttentionMemory, EncoderMemory
from generation.lina.sampling import Plan, draw_tokens
from generation.lina.transformer import LinaTransformer
from kernels.linear_attention import linear_attention

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
def test_sampling_with_refreshed_memory_stays_near(model, guidance):
    torch.nn.init.normal_(model.image_decoder.head.weight, std=0.2)
    for block in model.image_decoder.blocks:
        torch.nn.init.normal_(block.norm1.proj.weight, std=0.1)
    exact, kept = draw(model, 1, guidance), draw(model, 3, guidance)
    assert not torch.equal(exact, kept)
    assert (kept - exact).norm() / exact.norm() < 0.2


def test_changed_tokens_are_encoded_again(model):
    """What was drawn in the first step is changed after the third: the last step's memory is a fresh one, so exact."""
    torch.nn.init.normal_(model.image_decoder.head.weight, std=0.2)
    for block in model.image_decoder.blocks:
        torch.nn.init.normal_(block.norm1.proj.weight, std=0.1)
    first, before_last = [], []

    def record(step: int, tokens: torch.Tensor) -> None:
        if step == 0:
            first.append(tokens != 0)
        elif step == 2:
            before_last.append(tokens.clone())

    def replay(step: int, tokens: torch.Tensor, factor: float = 1.0) -> None:
        record(step, tokens)
        if step == 2:  # the same tokens for both, so that only the last step's encoding can differ
            tokens.copy_(before_last[0])
            tokens[first[-1]] *= factor

    kept = draw(model, 4, [2.0] * 4, partial(replay, factor=3.0))
    exact = draw(model, 1, [2.0] * 4, partial(replay, factor=3.0))
    torch.testing.assert_close(kept, exact, rtol=1e-4, atol=1e-4)
    before_last.clear()
    unchanged = draw(model, 4, [2.0] * 4, replay)
    exact = draw(model, 1, [2.0] * 4, replay)
    assert (unchanged - exact).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [{"attention": "softmax", "gates": None, "locality": 0}, {"normalization": "subtraction"}],
    ids=["softmax", "subtraction"],
)
def test_other_attention_has_no_memory(options):
    with pytest.raises(ValueError, match="refresh_every is 3"):
        draw(LinaTransformer(**SMALL, **options).eval(), 3, [1.0] * 4)
