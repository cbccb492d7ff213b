"""LINA's pipeline on a tiny model: seeds and batches, guidance, painting, callbacks, saving, and what it refuses."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from generation.lina.autoencoder import TinyAutoencoder
from generation.lina.painting import outpainting_canvas, save_animation
from generation.lina.pipeline import LinaPipeline
from generation.lina.text_encoder import WordTextEncoder
from tests.generation.small_pipelines import STEPS, draw, make, seeds


@pytest.fixture
def pipeline() -> LinaPipeline:
    return make(text_dim=16, text_length=12)


@pytest.fixture
def by_class() -> LinaPipeline:
    return make(num_classes=4)


def count_encodings(pipeline: LinaPipeline, monkeypatch) -> list[int]:
    """Batches that the image encoder sees from now on."""
    batches, encode = [], pipeline.transformer.encode_image
    monkeypatch.setattr(
        pipeline.transformer, "encode_image", lambda tokens, *a: batches.append(len(tokens)) or encode(tokens, *a)
    )
    return batches


@pytest.mark.parametrize("copies", [1, 2])
def test_an_image_depends_on_its_generator_alone(pipeline, copies):
    prompts = ["a red circle", "", "a blue square"]
    count = len(prompts) * copies
    options = {"negative_prompt": ["yellow", "", "green"], "num_images_per_prompt": copies}
    together = draw(pipeline, prompts, generator=seeds(*range(count)), **options)
    assert together.shape == (count, 3, 32, 32)
    for k in range(count):
        own = {"negative_prompt": options["negative_prompt"][k // copies], "generator": seeds(k)}
        assert_close(draw(pipeline, prompts[k // copies], **own)[0], together[k], atol=1e-5, rtol=0)
    assert len({image.flatten()[0].item() for image in together}) == count


def test_one_generator_for_all(pipeline):
    first = draw(pipeline, ["red", "blue"])
    assert torch.equal(first, draw(pipeline, ["red", "blue"]))
    assert not torch.equal(first, draw(pipeline, ["red", "blue"], seed=1))
    assert not torch.equal(first[0], first[1])
    assert draw(pipeline, "red", generator=None).isfinite().all()


def test_what_is_drawn_follows_prompts_and_guidance(pipeline):
    plain = draw(pipeline, "a red circle")
    assert (draw(pipeline, "a blue circle") - plain).abs().max() > 1e-3
    assert (draw(pipeline, "a red circle", "blue") - plain).abs().max() > 1e-4
    assert (draw(pipeline, "a red circle", guidance_scale=1.5) - plain).abs().max() > 1e-3
    assert (draw(pipeline, "a red circle", min_guidance_scale=1.0) - plain).abs().max() > 1e-3
    assert_close(draw(pipeline, "a red circle", negative_prompt=""), plain)
    assert_close(draw(pipeline, "a red circle", min_guidance_scale=3.0), plain)


def test_no_guidance_skips_the_unconditional_branch(pipeline, monkeypatch):
    batches = count_encodings(pipeline, monkeypatch)
    draw(pipeline, "red", "blue", guidance_scale=1)
    assert set(batches) == {1}
    batches.clear()
    draw(pipeline, "red", guidance_scale=1, min_guidance_scale=0)
    assert batches == [2, 2, 2, 2, 1]  # the ramp ends at 1
    batches.clear()
    draw(pipeline, "red", num_images_per_prompt=3)
    assert batches == [2, 6, 6, 6, 6]  # the first step is shared


def test_the_unconditional_context_is_computed_once(pipeline, monkeypatch):
    batches, encode = [], pipeline.transformer.encode_condition
    monkeypatch.setattr(
        pipeline.transformer,
        "encode_condition",
        lambda embedded, grid: batches.append(len(embedded)) or encode(embedded, grid),
    )
    draw(pipeline, ["red", "blue"], num_images_per_prompt=2)
    assert batches == [2, 1]


def test_prompt_embeds(pipeline):
    features = pipeline.encode_prompt(["a red circle", "blue"])
    drawn = draw(pipeline, ["a red circle", "blue"], "green")
    negative = pipeline.encode_prompt("green")
    options = {"prompt_embeds": features, "negative_prompt_embeds": negative}
    assert_close(draw(pipeline, **options), drawn, atol=1e-5, rtol=0)
    pipeline.text_encoder = None
    assert_close(draw(pipeline, **options), drawn, atol=1e-5, rtol=0)
    assert draw(pipeline, "").isfinite().all()
    with pytest.raises(ValueError, match="give prompt_embeds instead of prompt"):
        draw(pipeline, "red")


def test_empty_and_long_prompts_are_reported(pipeline, caplog):
    with caplog.at_level(logging.WARNING):
        empty = draw(pipeline, "", "blue", guidance_scale=1)
    assert "1 of 1 prompts are empty" in caplog.text
    assert_close(draw(pipeline, "  ", guidance_scale=1), empty)
    caplog.clear()
    draw(pipeline, "red", "")
    assert not caplog.records
    draw(pipeline, "red " * 13)
    assert "has 13 words; those after the first 12 are cut" in caplog.text
    pipeline.text_encoder = WordTextEncoder(dim=16, num_heads=2, max_length=30)
    draw(pipeline, "red " * 29)
    assert "has 29 tokens; those after the first 12 are cut" in caplog.text


def test_classes(by_class):
    drawn = draw(by_class, class_labels=[0, 3], generator=seeds(0, 1), min_guidance_scale=1.0)
    for k, label in enumerate((0, torch.tensor(3))):
        alone = draw(by_class, class_labels=label, generator=seeds(k), min_guidance_scale=1.0)
        assert_close(alone[0], drawn[k], atol=1e-5, rtol=0)
    for labels in (4, -1, 1.5, [], True, "cat", [0, 9]):
        with pytest.raises(ValueError, match=r"class_labels is .*; classes are whole numbers from 0 to 3"):
            draw(by_class, class_labels=labels)
    for arguments in ({"prompt": "red"}, {"class_labels": 0, "negative_prompt": "red"}):
        with pytest.raises(ValueError, match="this model is conditioned on classes"):
            draw(by_class, **arguments)


def test_output_types(pipeline):
    tensor = draw(pipeline, ["red", "blue"])
    assert tensor.min() >= 0
    assert tensor.max() <= 1
    array = draw(pipeline, ["red", "blue"], output_type="np")
    assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), tensor)
    pictures = draw(pipeline, ["red", "blue"], output_type="pil")
    assert np.array_equal(np.asarray(pictures[1]), (array[1] * 255).round().astype("uint8"))
    latents = draw(pipeline, ["red", "blue"], output_type="latent")
    assert latents.shape == (2, 6, 8, 8)
    with torch.no_grad():
        assert_close((pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1), tensor)
    images, steps = pipeline("red", **STEPS, return_dict=False)
    assert (len(images), steps) == (1, None)


def test_steps_callbacks_and_animation(pipeline, tmp_path):
    seen = []

    def callback(pipe, step, known, tensors):
        seen.append((step, known, tensors["tokens"].shape))
        return {}

    output = pipeline(["red", "blue"], **STEPS, generator=seeds(0, 1), return_steps=True, callback_on_step_end=callback)
    assert [known for _, known, _ in seen] == [1, 3, 7, 11, 16]
    assert seen[0] == (0, 1, (2, 16, 24))
    assert (pipeline.num_timesteps, pipeline.guidance_scale) == (5, 3.0)
    assert [len(steps) for steps in output.steps] == [5, 5]
    assert output.steps[1][-1].tobytes() == output.images[1].tobytes()
    grey = np.asarray(output.steps[0][0]) == np.asarray(128)
    assert grey.all(-1).sum() >= 15 * 64
    for name in ("drawing.gif", "drawing.webp"):
        save_animation(output.steps[0], tmp_path / name, magnify=2)
        with Image.open(tmp_path / name) as animation:
            assert (animation.n_frames, animation.size) == (5, (64, 64))
    with pytest.raises(ValueError, match=r"needed are .gif or .webp"):
        save_animation(output.steps[0], tmp_path / "drawing.png")


def test_callbacks_change_tokens_and_interrupt(pipeline):
    def zero(pipe, step, known, tensors):
        pipe.interrupt = step == 1
        return {"tokens": torch.zeros_like(tensors["tokens"])}

    options = {"generator": seeds(0)[0], **STEPS, "output_type": "latent"}
    output = pipeline("red", **options, return_steps=True, callback_on_step_end=zero)
    assert not output.images.any()
    assert len(output.steps[0]) == 2
    assert draw(pipeline, "red", output_type="latent").all()
    names = []
    assert draw(pipeline, "red", callback_on_step_end=lambda *a: a[3]).isfinite().all()
    draw(
        pipeline, "red", callback_on_step_end_tensor_inputs=[], callback_on_step_end=lambda *a: names.append(list(a[3]))
    )
    assert names == [[]] * 5


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (5, "returned 5; it must be None or a dict"),
        (lambda tokens: tokens, "it must be None or a dict with no key but 'tokens'"),
        (lambda tokens: {"latents": tokens}, "with no key but 'tokens'"),
        (
            lambda tokens: {"tokens": tokens[:, :1]},
            r"tokens of shape \(1, 1, 24\), torch.float32; .*shape \(1, 16, 24\)",
        ),
        (lambda tokens: {"tokens": tokens.long()}, "torch.int64; they must be finite floating-point numbers"),
        (lambda tokens: {"tokens": tokens.fill_(float("nan"))}, "they must be finite"),
        (lambda tokens: {"tokens": tokens.tolist()}, "returned tokens as a list; they must be"),
        (lambda tokens: {"tokens": None}, "returned tokens as a NoneType"),
    ],
    ids=["number", "tensor", "other key", "shape", "dtype", "NaN in place", "list", "None"],
)
def test_what_a_callback_returns_is_checked(pipeline, returned, words):
    def callback(pipe, step, known, tensors):
        return returned(tensors["tokens"]) if callable(returned) else returned

    with pytest.raises(ValueError, match=f"callback_on_step_end {words}|callback_on_step_end returned .*{words}"):
        draw(pipeline, "red", callback_on_step_end=callback)


def test_progress_bar(pipeline, capsys):
    pipeline.set_progress_bar_config(disable=False, desc="drawing")
    draw(pipeline, "red")
    assert "drawing: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(32, 48), (32, 16), (64, 64)])
def test_other_sizes(pipeline, size):
    height, width = size
    images = draw(pipeline, ["red", "blue"], height=height, width=width, generator=seeds(0, 1))
    assert images.shape == (2, 3, height, width)
    alone = draw(pipeline, "blue", height=height, width=width, generator=seeds(1))
    assert_close(alone[0], images[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"order": "raster"},
        {"order": "spiral", "order_strength": 0.5},
        {"spacing": "trailing"},
        {"last_diffusion_steps": 1},
        {"guidance_above": 0.5},
        {"num_inference_steps": 100},
        {"num_inference_steps": 1},
        {"fast": True},
        {"fast": True, "last_diffusion_steps": 9},
    ],
    ids=str,
)
def test_ways_to_draw(pipeline, options):
    drawn = draw(pipeline, "red", **options)
    assert drawn.isfinite().all()
    assert not torch.equal(drawn, draw(pipeline, "red"))


def test_fast_is_what_its_docstring_says(pipeline):
    options = {"num_inference_steps": 9, "num_diffusion_steps": 25}
    same = {"num_inference_steps": 3, "num_diffusion_steps": 8, "spacing": "trailing", "guidance_above": 0.25}
    assert torch.equal(draw(pipeline, "red", fast=True, **options), draw(pipeline, "red", **same))


@pytest.mark.parametrize("kind", ["text", "class"])
def test_saved_and_loaded(kind, tmp_path, caplog):
    conditioning, options = ({"text_dim": 16, "text_length": 12}, {"prompt": ["a red circle", "zebra"]})
    if kind == "class":
        conditioning, options = {"num_classes": 4}, {"class_labels": [0, 3]}
    pipeline = make(**conditioning)
    drawn = draw(pipeline, **options)
    pipeline.save_pretrained(tmp_path)
    loaded = LinaPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, **options), drawn)
    assert "accelerate" not in caplog.text
    half = LinaPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert {half.transformer.dtype, half.vae.dtype} == {torch.bfloat16}
    rounded = draw(half, **options)
    assert rounded.isfinite().all()
    assert (rounded - drawn).abs().mean() < 0.15
    assert torch.equal(draw(half, **options), rounded)


def test_moving_and_components(pipeline):
    again = LinaPipeline(**pipeline.components)
    assert again.transformer is pipeline.transformer
    pipeline.to("meta")
    assert pipeline.device.type == "meta"
    assert {parameter.device.type for parameter in pipeline.transformer.parameters()} == {"meta"}


def test_offloaded_modules_are_fetched_before_their_weights_are_used(pipeline):
    """Weights are used without `forward`, which is all that accelerate hooks into."""
    fetched = []
    for name in ("transformer", "vae"):
        module = getattr(pipeline, name)
        hook = SimpleNamespace(pre_forward=lambda module, *_, name=name: fetched.append(name))
        module._hf_hook = hook
    picture, mask = Image.new("RGB", (32, 32)), Image.new("L", (32, 32), 255)
    pipeline.transformer._hf_hook.execution_device = pipeline.vae._hf_hook.execution_device = torch.device("cpu")
    draw(pipeline, "red", image=picture, mask_image=mask, return_steps=True)
    assert fetched[:3] == ["vae", "transformer", "vae"]


PICTURE, MASK = Image.new("RGB", (32, 32)), Image.new("L", (32, 32), 255)
REFUSED = {
    "nothing": ({}, "give one of prompt, class_labels and prompt_embeds, and not 0"),
    "two": ({"prompt": "red", "prompt_embeds": [torch.zeros(1, 16)]}, "and not 2"),
    "number as prompt": ({"prompt": 3}, "prompt is 3; it must be a string or a list of strings"),
    "no prompts": ({"prompt": []}, r"prompt is \[\]"),
    "mixed prompts": ({"prompt": ["red", None]}, "it must be a string or a list of strings"),
    "class": ({"class_labels": 0}, "this model is conditioned on captions"),
    "shape of embeds": ({"prompt_embeds": [torch.zeros(2, 5)]}, r"each must be \(length, 16\)"),
    "NaN in embeds": ({"prompt_embeds": [torch.full((2, 16), float("nan"))]}, "not finite"),
    "negatives": ({"prompt": ["a", "b", "c"], "negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries"),
    "height": ({"prompt": "red", "height": 36}, "height is 36; it must be a multiple of 16 pixels"),
    "no height": ({"prompt": "red", "height": 0}, "height is 0"),
    "width": ({"prompt": "red", "width": 32.0}, "width is 32.0"),
    "bool as width": ({"prompt": "red", "width": True}, "width is True"),
    "huge": ({"prompt": "red", "height": 16 * 10**5, "width": 16 * 10**5}, "at most 65536 work"),
    **{
        f"{name}={value}": ({"prompt": "red", name: value}, f"{name} is {value}; it must be a whole number from 1 to ")
        for name in ("num_inference_steps", "num_diffusion_steps", "last_diffusion_steps", "num_images_per_prompt")
        for value in (0, -1, 10**6, True, 2.0, float("nan"))
    },
    **{
        f"{name}={value}": ({"prompt": "red", name: value}, f"{name} is '?{value}'?; it must be a ")
        for name in ("guidance_scale", "min_guidance_scale", "guidance_above", "order_strength")
        for value in (float("nan"), float("inf"), -1.0, True, "much")
    },
    "strong order": ({"prompt": "red", "order_strength": 1.1}, "must be a number from 0 to 1"),
    "order": ({"prompt": "red", "order": "snake"}, "order is 'snake'; valid are 'random', 'raster', 'spiral'"),
    "spacing": ({"prompt": "red", "spacing": "even"}, "spacing is 'even'; valid are"),
    "fast and wrong": ({"prompt": "red", "fast": True, "num_inference_steps": "8"}, "num_inference_steps is '8'"),
    "output": ({"prompt": "red", "output_type": "jpg"}, "output_type is 'jpg'; valid are 'pil'"),
    "generators": ({"prompt": ["red", "blue"], "generator": seeds(0)}, "generator is a list of 1; there are 2 images"),
    "no generator": ({"prompt": "red", "generator": 5}, "generator is 5; it must be a torch.Generator"),
    "falling guidance": (
        {"prompt": "red", "guidance_scale": 3.0, "min_guidance_scale": 4.0},
        "min_guidance_scale is 4.0; it must be a number from 0 to guidance_scale, 3.0",
    ),
    "callback": (
        {"prompt": "red", "callback_on_step_end": 5},
        "callback_on_step_end is 5; it must be callable, or None",
    ),
    **{
        f"tensor inputs {value}": (
            {"prompt": "red", "callback_on_step_end_tensor_inputs": value},
            f"callback_on_step_end_tensor_inputs is {re.escape(repr(value))}; valid are .*tokens",
        )
        for value in (["latents"], "tokens", None, 3)
    },
    "image alone": ({"prompt": "red", "image": PICTURE}, "mask_image is None; image and mask_image belong together"),
    "mask alone": ({"prompt": "red", "mask_image": MASK}, "image is None"),
    "other image size": (
        {"prompt": "red", "image": PICTURE.resize((16, 32)), "mask_image": MASK, "height": 32, "width": 32},
        r"image has 1 pictures of 32 x 16 pixels \(height x width\); needed is one, or one for each of 1, of 32 x 32",
    ),
    "odd image": (
        {"prompt": "red", "image": PICTURE.resize((32, 40)), "mask_image": MASK.resize((32, 40))},
        "height is 40, taken from image; it must be a multiple of 16 pixels, such as 32 or 48",
    ),
    "tiny image": (
        {"prompt": "red", "image": np.zeros((32, 8, 3)), "mask_image": np.ones((32, 8))},
        "width is 8, taken from image; it must be a multiple of 16 pixels, such as 16",
    ),
    "other mask size": (
        {"prompt": "red", "image": PICTURE, "mask_image": MASK.resize((8, 8))},
        "mask_image has 1 .* of 8 x 8 pix",
    ),
    "three images": ({"prompt": "red", "image": [PICTURE] * 3, "mask_image": MASK}, "image has 3 pictures"),
    "bytes": (
        {"prompt": "red", "image": np.full((32, 32, 3), 200, np.uint8), "mask_image": MASK},
        "numbers from 0 to 1",
    ),
    "black mask": (
        {"prompt": "red", "image": PICTURE, "mask_image": Image.new("L", (32, 32))},
        "mask_image is black in 1 of 1 masks; white says where to draw",
    ),
    "a black mask": (
        {"prompt": ["a", "b"], "image": PICTURE, "mask_image": [MASK, Image.new("L", (32, 32))]},
        "mask_image is black in 1 of 2 masks",
    ),
    "unequal masks": (
        {
            "prompt": ["a", "b"],
            "image": PICTURE,
            "mask_image": [MASK, outpainting_canvas(PICTURE.crop((0, 0, 16, 32)), 16)[1]],
        },
        r"mask_image asks for \[16, 8\] tokens of its pictures; the numbers must be equal",
    ),
    "NaN in mask": (
        {"prompt": "red", "image": PICTURE, "mask_image": np.full((32, 32), np.nan)},
        "mask_image holds numbers that are not finite",
    ),
    **{
        f"{name}={value!r}": (
            {"prompt": "red", "image": PICTURE, "mask_image": MASK, name: value},
            f"{name} is {re.escape(repr(value))}; it must be a PIL image, an array or a tensor, or .* of one of these",
        )
        for name in ("image", "mask_image")
        for value in ("cat.png", Path("cat.png"), 3, [], ["cat.png"])
    },
    "kinds": ({"prompt": "red", "image": [PICTURE, np.zeros((32, 32, 3))], "mask_image": MASK}, r"image is \["),
    "sizes": (
        {"prompt": ["a", "b"], "image": [PICTURE, PICTURE.resize((16, 16))], "mask_image": MASK},
        "image cannot be read as pictures of one size: ",
    ),
    "flat tensor": ({"prompt": "red", "image": torch.zeros(32, 32), "mask_image": MASK}, "image cannot be read as"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_drawn(pipeline, name, monkeypatch):
    monkeypatch.setattr(pipeline.transformer, "encode_condition", lambda *_: pytest.fail("it began"))
    arguments, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        pipeline(**arguments)


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("transformer", "video_encoder.blocks.0.attn.qkv.weight"),
        ("transformer", "text_embed.weight"),
        ("vae", "encoder.1.bias"),
        ("vae", "latents_std"),
        ("text_encoder", "embedding.weight"),
    ],
)
def test_damaged_weights_are_named(pipeline, component, name, monkeypatch):
    draw(pipeline, "red")
    getattr(pipeline, component).state_dict()[name].flatten()[0] = float("nan")
    monkeypatch.setattr(pipeline.transformer, "encode_condition", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match=f"{component}: the weights {name} are not finite"):
        draw(pipeline, "red")


def test_embeddings_that_are_too_long_are_cut_with_a_warning(pipeline, caplog):
    features = torch.randn(20, 16)
    cut = draw(pipeline, None, prompt_embeds=[features])
    assert "prompt_embeds has 20 rows; those after the first 12 are cut" in caplog.text
    assert torch.equal(cut, draw(pipeline, None, prompt_embeds=[features[:12]]))


def test_parts_that_do_not_fit():
    pipeline = make(num_classes=2)
    with pytest.raises(ValueError, match="vae has 4 latent channels; the transformer needs 6"):
        LinaPipeline(pipeline.transformer, TinyAutoencoder(latent_channels=4), pipeline.scheduler)
    encoder = WordTextEncoder(dim=8, num_heads=2)
    wrong = LinaPipeline(make(text_dim=16).transformer, pipeline.vae, pipeline.scheduler, encoder)
    with pytest.raises(ValueError, match="text_encoder gives 8 numbers a token; the transformer needs 16"):
        draw(wrong, "red")
