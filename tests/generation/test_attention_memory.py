"""Encoding of known tokens with sums kept over several steps: exact where nothing is kept, near where something is."""

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


def draw(model: LinaTransformer, refresh_every: int, guidance: list[float]) -> torch.Tensor:
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
        return [tokens.clone() for tokens in steps][-1]


@pytest.mark.parametrize("guidance", [[2.0] * 4, [1.0, 2.0, 3.0, 4.0]], ids=["constant", "begins late"])
def test_sampling_with_refreshed_memory_stays_near(model, guidance):
    torch.nn.init.normal_(model.image_decoder.head.weight, std=0.2)
    for block in model.image_decoder.blocks:
        torch.nn.init.normal_(block.norm1.proj.weight, std=0.1)
    exact, kept = draw(model, 1, guidance), draw(model, 3, guidance)
    assert not torch.equal(exact, kept)
    assert (kept - exact).norm() / exact.norm() < 0.2


@pytest.mark.parametrize(
    "options",
    [{"attention": "softmax", "gates": None, "locality": 0}, {"normalization": "subtraction"}],
    ids=["softmax", "subtraction"],
)
def test_other_attention_has_no_memory(options):
    with pytest.raises(ValueError, match="refresh_every is 3"):
        draw(LinaTransformer(**SMALL, **options).eval(), 3, [1.0] * 4)
