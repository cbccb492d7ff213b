"""Positions of regions on the ruler of their image, and the order of the fused prompt: Q-Zoom's official numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multimodal.q_zoom.positions import fused_positions, region_positions, splice_plan

FOLDER = Path(__file__).parent.parent / "golden" / "qzoom"
CASES = json.loads((FOLDER / "roi_position_ids.json").read_text())
GOLDEN = load_file(FOLDER / "roi_position_ids.safetensors")


def cells(grid_thw: list[int]) -> tuple[int, int]:
    return grid_thw[1] // 2, grid_thw[2] // 2


def prompt_positions(before: int, grid: tuple[int, int], after: int) -> torch.Tensor:
    """M-RoPE positions `[3, S]` of `before` tokens of text, an image and `after` tokens more."""
    text = torch.arange(before).expand(3, -1)
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    image = torch.stack([torch.zeros_like(row), row, column]).flatten(1) + before
    return torch.cat([text, image, torch.arange(after).expand(3, -1) + before + max(grid)], dim=1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"case{case['case']}")
def test_official_positions_of_a_region(case):
    source = GOLDEN[f"{case['case']}.source_position_ids"]
    start = case["image_token_start"]
    image = source[:, start : start + case["n_source"]]
    expected = GOLDEN[f"{case['case']}.roi_position_ids.float"]
    grid, region_grid = cells(case["source_grid_thw"]), cells(case["roi_grid_thw"])
    ours = region_positions(image, grid, case["bbox_cells_xyxy"], region_grid, float(expected[0, 0]))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert torch.equal(ours[1:].round().long(), GOLDEN[f"{case['case']}.roi_position_ids.long"][1:])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"case{case['case']}")
def test_official_fused_prompt(case):
    index, start = case["case"], case["image_token_start"]
    source = GOLDEN[f"{index}.source_position_ids"]
    grid, region_grid = cells(case["source_grid_thw"]), cells(case["roi_grid_thw"])
    ours = fused_positions(source, start, grid, [region_grid], [case["bbox_cells_xyxy"]])
    torch.testing.assert_close(ours, GOLDEN[f"{index}.fused.position_ids"], rtol=0, atol=0)
    plan = splice_plan(source.shape[1], start, case["n_source"], [case["n_roi"]])
    assert torch.equal(plan.inserted, GOLDEN[f"{index}.fused.inserted_mask"])
    origin = torch.where(plan.region < 0, plan.source, plan.region + 1000)
    assert torch.equal(origin, GOLDEN[f"{index}.fused.source_index"].long())
    ids = GOLDEN[f"{index}.in.input_ids"]
    fused = plan.splice(ids, torch.full((case["n_roi"],), int(ids[start])))
    assert torch.equal(fused, GOLDEN[f"{index}.fused.input_ids"])
    assert plan.reusable == start + case["n_source"] + 1
    assert torch.equal(ours[:, : plan.reusable], source[:, : plan.reusable].float())


@pytest.mark.parametrize("region_grids", [[(2, 4)], [(3, 2), (4, 4)], [(1, 1), (2, 5), (3, 3)]], ids=str)
def test_separate_regions_are_numbered_as_transformers_numbers_images(region_grids):
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLModel

    source = prompt_positions(5, (4, 6), 7)
    ids = torch.full((source.shape[1],), 1)
    ids[5:29], ids[4], ids[29] = 9, 7, 8
    counts = [rows * columns for rows, columns in region_grids]
    plan = splice_plan(len(ids), 5, 24, counts)
    fused_ids = plan.splice(ids, torch.full((sum(counts),), 9))
    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = Qwen2_5_VLConfig(image_token_id=9)
    grids = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in [(4, 6), *region_grids]])
    types = (fused_ids == 9).int()[None]
    expected, _ = model.get_rope_index(fused_ids[None], mm_token_type_ids=types, image_grid_thw=grids)
    ours = fused_positions(source, 5, (4, 6), region_grids, [(0, 0, 1, 1)] * len(counts), "separate")
    assert ours.dtype == source.dtype
    assert torch.equal(ours, expected[:, 0])


def test_several_continuous_regions_follow_one_another():
    source = prompt_positions(3, (4, 4), 5)
    boxes, grids = [(0, 0, 2, 2), (1, 2, 4, 4)], [(2, 3), (5, 4)]
    both = fused_positions(source, 3, (4, 4), grids, boxes)
    one = fused_positions(source, 3, (4, 4), grids[:1], boxes[:1])
    assert torch.equal(both[:, : 20 + 8], one[:, : 20 + 8])  # prompt up to the image's end, then the first region
    second = both[:, 28 : 28 + 22]
    end_of_first = one[0, 27]
    assert second[:, 0].tolist() == [end_of_first + 1] * 3
    assert (second[0, 1:-1] == end_of_first + 2).all()
    assert (second[1, 1:-1].min(), second[1, 1:-1].max()) == (3 + 2, 3 + 3)
    assert (second[2, 1:-1].min(), second[2, 1:-1].max()) == (3 + 1, 3 + 3)
    assert second[:, -1].tolist() == [end_of_first + 2 + 5] * 3
    assert torch.equal(both[:, 50:], source[:, 20:] + (3 + 2) + (5 + 2))


@pytest.mark.parametrize("alignment", ["continuous", "separate"])
def test_both_alignments_shift_the_question_alike(alignment):
    source = prompt_positions(3, (4, 4), 5)
    ours = fused_positions(source, 3, (4, 4), [(2, 3), (4, 4)], [(0, 0, 2, 2), (0, 0, 4, 4)], alignment)
    assert torch.equal(ours[:, -4:], source[:, -4:] + 5 + 6)


def test_regions_without_marks():
    source = prompt_positions(3, (4, 4), 5)
    plan = splice_plan(24, 3, 16, [4, 6], marked=False)
    assert plan.source.tolist() == [*range(19), *[-1] * 10, *range(19, 24)]
    assert plan.region.tolist() == [*[-1] * 19, *range(10), *[-1] * 5]
    ours = fused_positions(source, 3, (4, 4), [(2, 2), (2, 3)], [(0, 0, 1, 1), (1, 1, 4, 4)], marked=False)
    assert ours[0, 19:29].tolist() == [7, 7, 7, 7, 9, 9, 9, 9, 9, 9]
    assert torch.equal(ours[:, 29:], source[:, 19:] + 5)


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "bare"])
def test_one_axis_counts_on(marked):
    ours = fused_positions(
        torch.arange(12)[None], 2, (2, 3), [(2, 2), (1, 3)], [(0, 0, 1, 1)] * 2, "separate", marked=marked
    )
    assert torch.equal(ours, torch.arange(12 + 7 + 4 * marked)[None])


def test_no_region_changes_nothing():
    source = prompt_positions(3, (4, 4), 5)
    assert torch.equal(fused_positions(source, 3, (4, 4), [], []), source.float())
    plan = splice_plan(24, 3, 16, [])
    assert torch.equal(plan.source, torch.arange(24))
    assert not plan.inserted.any()


def test_embeddings_and_labels_of_the_plan():
    plan = splice_plan(8, 2, 3, [2, 1])
    prompt, regions = torch.randn(8, 4), torch.randn(3, 4)
    fused = plan.splice(prompt, regions)
    expected = [*prompt[:6], prompt[1], *regions[:2], prompt[5], prompt[1], regions[2], prompt[5], *prompt[6:]]
    assert torch.equal(fused, torch.stack(expected))
    assert plan.splice_labels(torch.arange(8)).tolist() == [*range(6), *[-100] * 7, 6, 7]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alignment": "diagonal"}, "alignment is 'diagonal'"),
        ({"positions": torch.arange(24)[None]}, "1 axis"),
        ({"positions": torch.arange(24)}, "positions have the shape"),
        ({"boxes": []}, "boxes are 0"),
        ({"boxes": [(0, 0, 5, 1)]}, "box is"),
        ({"boxes": [(1, 1, 1, 2)]}, "box is"),
        ({"image_start": 0}, "image_start is 0"),
        ({"image_start": 8}, "image_start is 8"),
        ({"region_grids": [(0, 2)]}, "region_grids is"),
        ({"grid": (4.5, 4)}, "grid is"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_arguments_are_named(change, words):
    given = {
        "positions": prompt_positions(3, (4, 4), 5),
        "image_start": 3,
        "grid": (4, 4),
        "region_grids": [(2, 2)],
        "boxes": [(0, 0, 2, 2)],
    }
    with pytest.raises(ValueError, match=words):
        fused_positions(**{**given, **change})


def test_a_plan_needs_tokens():
    with pytest.raises(ValueError, match="region_tokens is 0"):
        splice_plan(24, 3, 16, [0])
