"""Drawing into pictures and around them with LINA: what is kept, what is looked at, what is drawn."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from generation.lina.painting import Canvas, outpainting_canvas
from generation.lina.pipeline import LinaPipeline
from tests.generation.small_pipelines import STEPS, draw, make, seeds


@pytest.fixture
def pipeline() -> LinaPipeline:
    return make(text_dim=16, text_length=12)


def test_in_painting_keeps_what_is_not_masked(pipeline):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    mask = np.zeros((32, 32), np.uint8)
    mask[5:20, 10:15] = 255
    pictures = [picture, picture.rotate(90)]
    options = {"image": pictures, "mask_image": Image.fromarray(mask), "output_type": "pil", "return_steps": True}
    output = pipeline(["red", "blue"], **STEPS, generator=seeds(0, 1), **options)
    for drawn, steps, original in zip(output.images, output.steps, pictures, strict=True):
        for image in (drawn, *steps):
            assert np.array_equal(np.asarray(image)[mask == 0], np.asarray(original)[mask == 0])
        assert not np.array_equal(np.asarray(drawn), np.asarray(original))
    assert pipeline.num_timesteps <= 5
    # What is known matters for what is drawn, and the picture's form does not.
    array = np.asarray(picture)[None] / np.float32(255)
    single = draw(pipeline, "red", image=picture, mask_image=Image.fromarray(mask))
    as_array = draw(pipeline, "red", image=array, mask_image=mask / np.float32(255))
    as_tensor = draw(
        pipeline, "red", image=torch.from_numpy(array).permute(0, 3, 1, 2), mask_image=torch.tensor(mask > 0)
    )
    assert_close(as_array, single, atol=1e-5, rtol=0)
    assert_close(as_tensor, single, atol=1e-5, rtol=0)
    other = draw(pipeline, "red", image=picture.convert("L").convert("RGBA"), mask_image=Image.fromarray(mask))
    assert (other - single)[..., torch.from_numpy(mask > 0)].abs().max() > 1e-3


def test_what_lies_under_the_mask_does_not_matter(pipeline):
    pictures = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 3:20, 10:22] = 1
    drawn = []
    for seed in (1, 2):
        other = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        options = {"image": torch.where(mask > 0, other, pictures), "mask_image": mask, "output_type": "latent"}
        drawn.append(draw(pipeline, "red", generator=seeds(0), **options))
    assert torch.equal(*drawn)


def test_hidden_pixels_become_their_nearest_visible_ones():
    pictures = torch.arange(48.0).view(1, 3, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2:, :] = 1
    filled = Canvas(pictures, mask, torch.ones(1, 4, dtype=torch.bool)).without_the_hidden()
    assert torch.equal(filled[:, :, :2], pictures[:, :, :2])
    assert torch.equal(filled[:, :, 2:], pictures[:, :, 1:2].expand(-1, -1, 2, -1))
    assert not Canvas(pictures, torch.ones_like(mask), mask).without_the_hidden().any()


@pytest.mark.parametrize("given", [{}, {"height": 32}, {"width": 48}], ids=str)
@pytest.mark.parametrize("kind", ["pil", "list", "array", "tensor"])
def test_the_size_is_that_of_the_image(pipeline, kind, given):
    canvas, mask = outpainting_canvas(Image.new("RGB", (32, 32), (10, 200, 30)), left=16)
    arrays = np.asarray(canvas)[None] / np.float32(255), np.asarray(mask)[None, ..., None] / np.float32(255)
    image, mask_image = {
        "pil": (canvas, mask),
        "list": ((canvas,), [mask]),
        "array": arrays,
        "tensor": tuple(torch.from_numpy(array).permute(0, 3, 1, 2) for array in arrays),
    }[kind]
    drawn = draw(pipeline, "red", image=image, mask_image=mask_image, **given)
    assert drawn.shape == (1, 3, 32, 48)
    assert_close(drawn[0, :, 0, -1], torch.tensor((10, 200, 30)) / 255)


def test_a_white_mask_draws_everything(pipeline):
    white = Image.new("L", (32, 32), 255)
    drawn = [draw(pipeline, "red", image=Image.new("RGB", (32, 32), c), mask_image=white) for c in ("red", "blue")]
    assert torch.equal(*drawn)
    assert_close(drawn[0], draw(pipeline, "red"))


def test_outpainting(pipeline):
    picture = Image.new("RGB", (32, 24), (10, 200, 30))
    canvas, mask = outpainting_canvas(picture, left=16, bottom=8)
    assert canvas.size == mask.size == (48, 32)
    options = {"image": canvas, "mask_image": mask, "height": 32, "width": 48, "output_type": "pil"}
    drawn = np.asarray(draw(pipeline, "red", num_images_per_prompt=2, generator=seeds(0, 1), **options)[1])
    assert (drawn[:24, 16:] == (10, 200, 30)).all()
    assert drawn[24:].std() > 0
    for margins in ({}, {"left": -1, "right": 8}):
        with pytest.raises(ValueError, match="none may be negative and one must be above 0"):
            outpainting_canvas(picture, **margins)
