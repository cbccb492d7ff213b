"""LINA's transformer beyond the golden files: published sizes, other image sizes, options, errors."""

import pytest
import torch
from torch.testing import assert_close

from generation.lina.attention import resize_gate
from generation.lina.embeddings import patchify
from generation.lina.official_checkpoints import from_official, to_official
from generation.lina.sampling import Plan, draw_tokens, generation_order, guidance_ramp
from generation.lina.token_denoiser import FlowSchedule
from generation.lina.transformer import LinaTransformer

SMALL = {
    "width": 32,
    "num_heads": 2,
    "context_depth": 1,
    "encoder_depth": 1,
    "decoder_depth": 2,
    "denoiser_depth": 1,
    "latent_channels": 4,
    "latent_size": (8, 8),
    "patch_size": 2,
    "text_dim": 12,
    "text_length": 6,
}


def small(**options) -> LinaTransformer:
    """A model whose every weight matters."""
    torch.manual_seed(0)
    model = LinaTransformer(**SMALL | options)
    for parameter in model.parameters():
        if not parameter.any() or (parameter == 1).all():
            torch.nn.init.normal_(parameter.data, mean=parameter.data.mean().item(), std=0.2)
    return model.eval()


def conditions(model: LinaTransformer, latent_size: tuple[int, int], known: torch.Tensor) -> torch.Tensor:
    """What the token denoiser is told about two images of random latents."""
    torch.manual_seed(1)
    grid = model.grid_of(latent_size)
    tokens = patchify(torch.randn(2, 4, *latent_size), 2)
    with torch.no_grad():
        condition = torch.tensor([0, 1]) if model.text_embed is None else [torch.randn(3, 12), torch.randn(6, 12)]
        context = model.encode_condition(model.embed_condition(condition), grid)
        return model.encode_image(tokens, context, grid, known)


KNOWN = torch.tensor([[0, 5, 2], [7, 1, 3]])


@pytest.mark.parametrize(
    ("size", "image_size", "text", "total", "trainable"),
    [
        ("0.4B", 256, False, 363_190_288, 362_349_328),
        ("0.6B", 256, False, 644_685_840, 643_302_416),
        ("1.5B", 256, False, 1_448_243_216, 1_445_381_648),
        ("1.4B", 256, True, 1_450_639_376, 1_447_777_808),
        ("1.4B", 512, True, 1_451_130_896, 1_448_269_328),
        ("1.5B", 1024, True, 1_453_096_976, 1_450_235_408),
    ],
)
def test_published_sizes(size, image_size, text, total, trainable):
    with torch.device("meta"):
        model = LinaTransformer.of_size(size, image_size, text_conditional=text)
    frozen = [p for module in (model.video_pos_embed, model.video_encoder.patch_embed) for p in module.parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == trainable
    assert len(model.state_dict()) == 723 or not text


@pytest.mark.parametrize("size", [(16, 16), (8, 16), (12, 4)])
def test_resized_is_what_another_size_gives_on_the_fly(size):
    model = small()
    expected = conditions(model, size, KNOWN)
    assert expected.isfinite().all()
    model.resize(size)
    assert model.latent_size == size == tuple(model.config.latent_size)
    assert_close(conditions(model, size, KNOWN), expected)
    assert model.image_encoder.blocks[-1].attn.key_gate.shape == (2, size[0] * size[1] // 4 * 5 // 4)
    assert LinaTransformer(**SMALL | {"latent_size": size}).load_state_dict(model.state_dict())


def test_reset_gates():
    model = small()
    model.resize((16, 16), "reset")
    attention = model.image_encoder.blocks[-1].attn
    assert_close(attention.key_gate, torch.ones(2, 80))
    assert attention.value_gate.requires_grad


def test_interpolated_gates_keep_prefix_and_halves_apart():
    gate = torch.cat([torch.tensor([7.0, 8.0]), torch.full((4,), 2.0), torch.full((16,), 3.0)])[None]
    resized = resize_gate(gate, (4, 4), (8, 4))
    assert_close(resized, torch.cat([torch.tensor([7.0, 8.0]), torch.full((8,), 2.0), torch.full((32,), 3.0)])[None])


OPTIONS = {
    "softmax": {"attention": "softmax", "gates": None},
    "subtraction": {"normalization": "subtraction"},
    "shared gates": {"gates": "shared"},
    "plain": {"gates": None, "locality": 0},
    "small kernel": {"locality": 3},
    "text prefix": {"text_prefix": True},
    "value bank": {"value_bank": 5},
    "rotary": {"rotary": True, "width": 64},
    "classes": {"text_dim": None, "num_classes": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    """With each, every trainable parameter learns, known tokens matter, and unknown ones do not."""
    model = small(**OPTIONS[name])
    tokens = torch.randn(2, 16, 16)
    schedule = FlowSchedule()
    draw = model.draw(tokens, schedule, repeat=2, least_masked=0.5, generator=torch.Generator().manual_seed(2))
    assert draw.known.shape[1] > 0
    condition = torch.tensor([0, 2]) if model.text_embed is None else [torch.randn(2, 12), torch.randn(9, 12)]
    loss = model.train()(tokens, condition, draw, schedule)
    loss.backward()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.any(), key
    model.eval()
    grid = (4, 4)
    with torch.no_grad():
        context = model.encode_condition(model.embed_condition(condition), grid)
        before = model.encode_image(tokens, context, grid, KNOWN)
        hidden = tokens.clone()
        hidden[:, 9:] += 1
        assert torch.equal(model.encode_image(hidden, context, grid, KNOWN), before)
        hidden[0, 5] += 1
        after = model.encode_image(hidden, context, grid, KNOWN)
        assert (after[0] - before[0]).abs().max() > 1e-4
        assert_close(after[1], before[1])
        wanted = torch.tensor([[15, 0], [3, 9]])
        chosen = before.gather(1, wanted[..., None].expand(-1, -1, before.shape[2]))
        assert_close(model.encode_image(tokens, context, grid, KNOWN, wanted), chosen, atol=1e-5, rtol=1e-5)


def test_the_text_prefix_reaches_the_image_encoder():
    assert small(text_prefix=True).image_encoder.blocks[-1].attn.key_gate.shape == (2, 6 + 4 + 16)


@pytest.mark.parametrize("name", ["softmax", "shared gates", "plain", "classes"])
def test_official_state_dict_and_back(name):
    state_dict = small(**OPTIONS[name]).state_dict()
    official = to_official(state_dict)
    assert not any("_gate" in key for key in official)
    returned = from_official(official)
    assert returned.keys() == state_dict.keys()
    assert all(torch.equal(returned[key], tensor) for key, tensor in state_dict.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": "soft"}, "attention is 'soft'; valid are 'linear', 'softmax'"),
        ({"normalization": None}, "normalization is None"),
        ({"gates": "both"}, "gates is 'both'"),
        ({"attention": "softmax"}, "gates is 'per_head'; softmax attention takes None"),
        ({"width": 30}, "width is 30; it must divide by 4"),
        ({"width": 0}, "width is 0; it is at least 1"),
        ({"num_heads": 3}, "num_heads, 3"),
        ({"locality": 4}, "locality is 4; it is odd"),
        ({"latent_size": (8, 6)}, r"latent_size is \(8, 6\); rows and columns must be multiples of 4"),
        ({"latent_size": (8,)}, "latent_size"),
        ({"text_dim": None}, "text_dim is None and num_classes is None"),
        ({"num_classes": 3}, "give one of them"),
    ],
)
def test_arguments_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        LinaTransformer(**SMALL | options)


def test_other_errors():
    with pytest.raises(ValueError, match=r"size is '2B'; valid are 0.4B"):
        LinaTransformer.of_size("2B")
    with pytest.raises(ValueError, match="gates is 'keep'; valid are 'interpolate', 'reset'"):
        small().resize((16, 16), "keep")
    with pytest.raises(ValueError, match=r"latent_size is \(10, 16\)"):
        small().resize((10, 16))


def test_saved_and_loaded(tmp_path):
    model = small(gates="key", value_bank=3)
    model.save_pretrained(tmp_path)
    loaded = LinaTransformer.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert_close(conditions(loaded, (8, 8), KNOWN), conditions(model, (8, 8), KNOWN))


def test_images_of_one_prompt_share_their_first_step():
    """Drawn with the work shared or not, the tokens are the same."""
    model = small()
    grid, images = (4, 4), 3
    order = generation_order(grid, "random", 1.0, torch.rand(2 * images, 16))
    sigmas = tuple(FlowSchedule().sampling_sigmas(3).tolist())
    plan = Plan(order, 0, [2, 5, 9], guidance_ramp(3.0, 3, 1.5), [sigmas] * 3)
    noise = [torch.randn(2 * images, count, 16) for count in plan.predictions]
    with torch.no_grad():
        prompts = model.encode_condition(model.embed_condition([torch.randn(3, 12), torch.randn(6, 12)]), grid)
        nothing = model.encode_condition(model.embed_condition(model.unconditional(1)), grid)
        contexts = prompts.repeat_interleave(images, 0), nothing.expand(2 * images, -1, -1)
        blank = torch.zeros(2 * images, 16, 16)
        shared, alone = (
            [step.clone() for step in draw_tokens(model, *contexts, blank, plan, lambda i, _: noise[i], **options)]
            for options in ({"images_per_prompt": images}, {})
        )
    for one, other in zip(shared, alone, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert len({tuple(tokens.flatten().tolist()) for tokens in shared[-1]}) == 2 * images


@pytest.mark.parametrize("kind", ["raster", "spiral"])
def test_strict_orders(kind):
    order = generation_order((4, 6), kind, 1.0, torch.rand(2, 24))
    assert torch.equal(order[0], order[1])
    assert order.sort(1).values.equal(torch.arange(24).expand(2, -1))
    if kind == "raster":
        assert order[0].equal(torch.arange(24))
    else:
        assert set(order[0, :2].tolist()) == {8, 9} or set(order[0, :4].tolist()) == {8, 9, 14, 15}


def test_a_strength_of_zero_is_random():
    uniform = torch.rand(2, 16)
    assert torch.equal(generation_order((4, 4), "raster", 0.0, uniform), uniform.argsort(1))
