"""Score maps to boxes: the official numbers of Q-Zoom and SD-RPN, and what neither of them says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multimodal.q_zoom.regions import (
    Box,
    ComponentRules,
    blurred,
    cells_to_pixels,
    checked_box,
    find_regions,
    padded_square_to_pixels,
    probability_map,
    propose_boxes,
)

FOLDER = Path(__file__).parent.parent / "golden" / "qzoom"
QWEN = json.loads((FOLDER / "postprocess_qwen.json").read_text())
QWEN_MAPS = load_file(FOLDER / "postprocess_qwen.safetensors")
LLAVA = json.loads((FOLDER / "postprocess_llava.json").read_text())
LLAVA_MAPS = load_file(FOLDER / "postprocess_llava.safetensors")
CELLS = json.loads((FOLDER / "bbox_cells_to_pixels.json").read_text())


def logits(rows: int, columns: int, **on: tuple[int, int, int, int]) -> torch.Tensor:
    """A map of -9 in which the boxes `on` are 9."""
    cells = torch.full((rows, columns), -9.0)
    for left, top, right, bottom in on.values():
        cells[top:bottom, left:right] = 9.0
    return cells


@pytest.mark.parametrize("case", QWEN, ids=lambda case: f"case{case['case']}")
def test_official_regions_of_qwen(case):
    score_map = QWEN_MAPS[f"{case['case']}.score_map"]
    found = find_regions(score_map, threshold=case["conf_thresh"], sink="corner")
    torch.testing.assert_close(found.probabilities, QWEN_MAPS[f"{case['case']}.blurred"], rtol=0, atol=1e-6)
    if case["n_sub"] == 0 and case["case"] != 10:
        assert found.boxes == []
        return
    (box,) = found.boxes
    pixels = cells_to_pixels(box, case["grid_hw"], case["image_wh"], cell_pixels=case["llm_patch"])
    if case["n_sub"] == 0:  # an image of less than a patch: the official processor fails on it, the box itself is fine
        assert pixels == (0, 0, *case["image_wh"])
        return
    assert box == tuple(case["bbox_cells_xyxy"])
    assert pixels == tuple(case["bbox_px_xyxy"])


@pytest.mark.parametrize("case", CELLS, ids=lambda case: "x".join(map(str, case["image_wh"])))
def test_official_pixels_of_qwen(case):
    assert cells_to_pixels(Box(*case["cells"]), case["feat_hw"], case["image_wh"]) == tuple(case["px"])


@pytest.mark.parametrize("case", LLAVA, ids=lambda case: f"case{case['case']}")
def test_official_regions_of_llava(case):
    found = find_regions(
        LLAVA_MAPS[f"{case['case']}.score_map"],
        threshold=case["conf_thresh"],
        sink="none",
        box_mode="components",
        max_boxes=9,
    )
    assert [list(box) for box in found.boxes] == case["boxes_cells"]
    assert (1 <= len(found.boxes) <= 2) == case["used"]
    width, height = case["image_wh"]
    for box, (left, top, right, bottom) in zip(found.boxes, case["boxes_px"], strict=True):
        ours = padded_square_to_pixels(box, (24, 24), (width, height))
        assert 0 <= ours.left < ours.right <= width
        assert 0 <= ours.top < ours.bottom <= height
        if left < right:
            assert (ours.left, ours.right) == (left, right)
        if top < bottom:
            assert (ours.top, ours.bottom) == (top, bottom)


def test_a_box_in_the_padding_becomes_the_nearest_part_of_the_image():
    assert padded_square_to_pixels(Box(20, 5, 23, 10), (24, 24), (100, 400)) == (72, 83, 100, 166)
    assert padded_square_to_pixels(Box(0, 5, 2, 10), (24, 24), (10, 400)) == (0, 83, 10, 166)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (2, 9), (3, 3)], ids=str)
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_blur_of_any_map_keeps_a_constant(shape, kernel):
    torch.testing.assert_close(blurred(torch.full(shape, 0.3), kernel), torch.full(shape, 0.3))


def test_a_map_of_one_row_is_blurred_along_it():
    row = torch.rand(1, 9)
    torch.testing.assert_close(blurred(row, 3)[0], blurred(row.expand(5, 9), 3)[2])
    assert find_regions(logits(1, 9, on=(3, 0, 5, 1)), threshold=0.5).boxes == [(3, 0, 5, 1)]


def test_sinks():
    bright = torch.full((20, 20), 9.0)
    corner = probability_map(bright, sink="corner", blur_kernel=1)
    assert (corner[:5, 0] == 0).all()
    assert (corner[0, :5] == 0).all()
    assert int((corner == 0).sum()) == 9
    assert (probability_map(bright[:16, :16], sink="corner", blur_kernel=1) > 0).all()
    keep = torch.ones(20, 20, dtype=torch.bool)
    keep[7, 7] = False
    masked = probability_map(bright, sink="first_token", keep_mask=keep, blur_kernel=1)
    assert (masked == 0).nonzero().tolist() == [[7, 7]]


def test_the_strongest_components_stay_in_reading_order():
    score_map = logits(12, 12, small=(1, 1, 3, 3), large=(7, 2, 11, 6), medium=(1, 8, 4, 11))
    probabilities = score_map.sigmoid()
    boxes = [(1, 1, 3, 3), (7, 2, 11, 6), (1, 8, 4, 11)]
    for count, expected in ((1, boxes[1:2]), (2, boxes[1:]), (3, boxes), (9, boxes)):
        assert propose_boxes(probabilities, 0.5, box_mode="components", max_boxes=count) == expected
    assert propose_boxes(probabilities, 0.5) == [(1, 1, 11, 11)]


def test_equal_components_the_earlier_stays():
    probabilities = logits(4, 12, first=(1, 1, 3, 3), second=(8, 1, 10, 3)).sigmoid()
    assert propose_boxes(probabilities, 0.5, box_mode="components", max_boxes=1) == [(1, 1, 3, 3)]


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ((4, 4, 5, 5), []),
        ((4, 4, 6, 5), [(3, 3, 6, 6)]),
        ((10, 10, 12, 11), [(9, 9, 12, 12)]),
        ((0, 0, 1, 2), [(0, 0, 2, 2)]),
        ((2, 2, 4, 4), [(2, 2, 4, 4)]),
        ((0, 0, 11, 11), []),
    ],
    ids=["noise", "small", "small at the edge", "small in the corner", "as it is", "large"],
)
def test_components_follow_the_rules(on, expected):
    rules = ComponentRules(noise_cells=1, small_cells=4, large_cells=100)
    found = propose_boxes(logits(12, 12, on=on).sigmoid(), 0.5, box_mode="components", rules=rules)
    assert found == expected


@pytest.mark.parametrize(("margin", "expected"), [(0, (4, 1, 6, 3)), (1, (3, 0, 7, 4)), (2, (2, 0, 8, 5))])
def test_margin_stops_at_the_edge_of_the_map(margin, expected):
    assert propose_boxes(logits(6, 9, on=(4, 1, 6, 3)).sigmoid(), 0.5, margin_cells=margin) == [expected]


@pytest.mark.parametrize("cells", [(0, 0, 1, 1), (29, 29, 30, 30), (0, 0, 30, 30)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (3, 1000), (29, 5), (200, 200)], ids=str)
def test_pixels_are_inside_and_never_empty(cells, size):
    for convert in (cells_to_pixels, padded_square_to_pixels):
        box = convert(Box(*cells), (30, 30), size)
        assert 0 <= box.left < box.right <= size[0]
        assert 0 <= box.top < box.bottom <= size[1]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10, 20, 30, 40), (10, 20, 30, 40)),
        ((-5, -5, 30, 400), (0, 0, 30, 80)),
        ((10.2, 20.9, 10.4, 21.1), (10, 20, 11, 22)),
        (torch.tensor([1.0, 2.0, 3.0, 4.0]), (1, 2, 3, 4)),
    ],
    ids=["inside", "partly outside", "fractions", "tensor"],
)
def test_box_of_a_user(box, expected):
    assert checked_box(box, (100, 80)) == expected


@pytest.mark.parametrize(
    "box",
    [(10, 10, 10, 20), (30, 10, 20, 20), (100, 0, 120, 10), (0, -9, 9, 0), (float("nan"), 0, 1, 1), (0, 0, 1e999, 1)],
    ids=["no area", "reversed", "right of the image", "above the image", "NaN", "infinite"],
)
def test_a_box_that_is_none_names_the_size_of_the_image(box):
    with pytest.raises(ValueError, match="100 x 80"):
        checked_box(box, (100, 80))


@pytest.mark.parametrize("box", [(1, 2, 3), "abcd", None, 7], ids=str)
def test_a_box_is_four_numbers(box):
    with pytest.raises(ValueError, match="four numbers"):
        checked_box(box, (100, 80))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score_map": torch.full((4, 4), float("nan"))}, "NaN"),
        ({"score_map": torch.zeros(4)}, "score_map"),
        ({"score_map": torch.zeros(0, 4)}, "score_map"),
        ({"score_map": torch.zeros(4, 4, dtype=torch.long)}, "score_map"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"sink": "middle"}, "sink is 'middle'"),
        ({"sink": "first_token"}, "keep_mask is None"),
        ({"keep_mask": torch.ones(4, 4, dtype=torch.bool)}, "keep_mask is given"),
        ({"sink": "first_token", "keep_mask": torch.ones(3, 4, dtype=torch.bool)}, r"keep_mask .*\(3, 4\)"),
        ({"box_mode": "round"}, "box_mode is 'round'"),
        ({"max_boxes": 0}, "max_boxes is 0"),
        ({"margin_cells": -1}, "margin_cells is -1"),
        ({"blur_kernel": 2}, "blur_kernel is 2"),
        ({"blur_sigma": 0.0}, "blur_sigma is 0.0"),
        ({"rules": ComponentRules()}, "rules is given"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        find_regions(**{"score_map": torch.zeros(4, 4), "threshold": 0.5, **change})


@pytest.mark.parametrize("box", [(0, 0, 0, 2), (2, 0, 1, 2), (0, 0, 5, 2), (-1, 0, 2, 2)], ids=str)
def test_cells_outside_the_map_are_refused(box):
    for convert in (cells_to_pixels, padded_square_to_pixels):
        with pytest.raises(ValueError, match="box is"):
            convert(Box(*box), (4, 4), (100, 100))
