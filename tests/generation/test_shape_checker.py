"""The checker is right on pictures drawn from captions, and tells wrong pictures for the right reason."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from generation.lina.captioned_shapes import Scene, Shape, describe, draw, held_out_prompts, training_scenes
from generation.lina.shape_checker import check

PAIR = "a red square above a blue circle"


@pytest.fixture(scope="module")
def drawn():
    scenes = training_scenes(np.random.default_rng(1), 500, {"single": 0.4, "pairs": 0.6})
    scenes += held_out_prompts("single", 200, seed=1) + held_out_prompts("pairs", 300, seed=1)
    return draw(scenes), [scene.caption for scene in scenes]


def test_ground_truth(drawn):
    scores = check(*drawn)
    assert len(scores.all_correct) == 1000
    assert scores.summary() == {"all_correct": 1, "colour": 1, "shape": 1, "place": 1, "relation": 1}


@pytest.mark.parametrize("disturb", ["blur", "noise", "pale"])
def test_disturbed_ground_truth(drawn, disturb):
    images, captions = drawn[0][::4], drawn[1][::4]
    if disturb == "blur":
        kernel = torch.tensor([0.25, 0.5, 0.25])
        images = F.conv2d(
            F.pad(images, (1, 1, 1, 1), "replicate"), torch.outer(kernel, kernel).expand(3, 1, 3, 3), groups=3
        )
    elif disturb == "noise":
        images = images + 0.1 * torch.randn_like(images)
    else:
        images = 0.85 * images + 0.12
    summary = check(images, captions).summary()
    assert summary["place"] == summary["relation"] == 1
    assert min(summary["colour"], summary["shape"]) >= 0.99


def picture(*shapes):
    return draw([Scene("", shapes)])


def verdict(image, caption=PAIR):
    scores = check(image, [caption])
    return [scores.colour.item(), scores.shape.item(), scores.position.item()]


RED, BLUE = Shape("red", "square", 16, 8, 5.5), Shape("blue", "circle", 16, 23, 5.5)


def test_verdicts_of_a_pair():
    assert verdict(picture(RED, BLUE)) == [True, True, True]
    assert verdict(picture(RED, Shape("blue", "square", 16, 23, 5.5))) == [True, False, True]
    assert verdict(picture(Shape("red", "square", 16, 23, 5.5), Shape("blue", "circle", 16, 8, 5.5))) == [
        True,
        True,
        False,
    ]
    assert verdict(picture(Shape("red", "square", 8, 12, 5), Shape("blue", "circle", 24, 17, 5))) == [True, True, False]


@pytest.mark.parametrize(
    "shapes",
    [
        (RED,),
        (RED, Shape("green", "circle", 16, 23, 5.5)),
        (RED, BLUE, Shape("green", "circle", 5, 16, 4)),
        (RED, BLUE, Shape("blue", "circle", 27, 10, 4)),
        (),
    ],
    ids=["missing", "other-colour", "third-colour", "two-pieces", "empty"],
)
def test_wrong_colours(shapes):
    assert verdict(picture(*shapes))[0] is False


def test_pixels_of_no_known_colour_are_foreign():
    image = picture(RED, BLUE)
    image[:, :, :6, :6] = -1  # black
    assert verdict(image)[0] is False


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_flat_pictures_are_wrong(value):
    assert verdict(torch.full((1, 3, 32, 32), value))[0] is False


def test_a_blob_has_no_shape():
    """A line of the right colour has the area of a square, and is none."""
    image = picture(BLUE)
    image[:, :, 5:8, 2:30] = picture(RED)[:, :, 8:9, 16:17]
    assert verdict(image) == [True, False, True]


@pytest.mark.parametrize("place", ["at the top left", "at the bottom right", "at the center", None])
def test_verdicts_of_a_single_object(place):
    caption = f"a red square {place}" if place else "a red square"
    assert verdict(picture(Shape("red", "square", 9, 10, 6)), caption) == [
        True,
        True,
        place in ("at the top left", None),
    ]
    assert describe(caption).position == place


def test_summary_has_only_what_captions_name():
    scores = check(picture(RED), ["a red square"])
    assert set(scores.summary()) == {"all_correct", "colour", "shape"}
    assert len(scores.place) == len(scores.relation) == 0
    assert check(torch.zeros(0, 3, 32, 32), []).summary() == {}


def test_images_may_be_half_precise(drawn):
    images, captions = drawn
    assert check(images[:50].bfloat16(), captions[:50]).all_correct.all()


@pytest.mark.parametrize(
    ("images", "captions", "words"),
    [
        (torch.zeros(1, 3, 16, 16), ["a red circle"], "images are torch.float32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["a red circle"], "images are torch.uint8"),
        (torch.zeros(2, 3, 32, 32), ["a red circle"], "captions are 1, but there are 2"),
        (torch.full((1, 3, 32, 32), float("nan")), ["a red circle"], "NaN"),
        (torch.zeros(1, 3, 32, 32), ["a cat"], "caption is 'a cat'"),
    ],
)
def test_inputs_are_checked(images, captions, words):
    with pytest.raises(ValueError, match=words):
        check(images, captions)
