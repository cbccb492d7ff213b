"""Attention to maps to labels to a loss: the official numbers of Q-Zoom and SD-RPN."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from multimodal.q_zoom.pseudo_labels import (
    LLAVA_RULES,
    POINTING_HEADS,
    LabelRules,
    attention_map,
    content_mask,
    pseudo_labels,
    region_loss,
)

FOLDER = Path(__file__).parent.parent / "golden" / "qzoom"
QWEN = json.loads((FOLDER / "pseudo_labels_qwen.json").read_text())
QWEN_MAPS = load_file(FOLDER / "pseudo_labels_qwen.safetensors")
LLAVA = json.loads((FOLDER / "pseudo_labels_llava.json").read_text())
LLAVA_MAPS = load_file(FOLDER / "pseudo_labels_llava.safetensors")
RECORDS = load_file(FOLDER / "attention_to_maps.safetensors")


def recorded() -> list[dict[int, torch.Tensor]]:
    return [{layer: RECORDS[f"attn.layer{layer}.step{step}"] for layer in (1, 2, 4)} for step in range(4)]


def check_counts(case, made):
    assert int((made.labels == 1).sum()) == case["num_fg"]
    assert int((made.labels == 0).sum()) == case["num_bg"]
    top, left, bottom, right = case["fg_bbox_rowcol_inclusive"]
    assert made.box == (left, top, right + 1, bottom + 1)


@pytest.mark.parametrize("case", QWEN, ids=lambda case: f"case{case['case']}")
def test_official_labels_of_qwen(case):
    grounding, sink, labels = (
        QWEN_MAPS[f"{case['case']}.{name}"] for name in ("grounding_attn", "sink_attn", "labels")
    )
    rules = LabelRules(
        sink_threshold=case["sink_thresh"],
        region_share=case["binary_coff"],
        background_share=case["bg_coff"],
        most_area=case["max_ratio_limit"],
        presmoothing=case["use_smoothing"],
        blur_kernel=case["pseudo_blur_kernel_size"],
    )
    content = content_mask(case["original_image_size"], grounding.shape[0]) if case["mask_known_bg"] else None
    made = pseudo_labels(grounding, sink, rules, content=content)
    assert torch.equal(made.labels, labels)
    check_counts(case, made)
    assert made.ignored == (case["num_fg"] == 0)
    if content is not None:
        is_sink = (sink >= case["sink_thresh"]) | ~content
        assert torch.equal(is_sink.flatten(), QWEN_MAPS[f"{case['case']}.sink_token_mask"])


@pytest.mark.parametrize("case", LLAVA, ids=lambda case: f"case{case['case']}")
def test_official_labels_of_llava(case):
    maps = (LLAVA_MAPS[f"{case['case']}.{name}"].unflatten(0, (24, 24)) for name in ("grounding_attn", "sink_attn"))
    assert (case["sink_thresh"], case["binary_coff"], case["bg_coff"]) == (1e-3, 0.2, 0.1)  # what LLAVA_RULES are
    made = pseudo_labels(*maps, LLAVA_RULES)
    assert torch.equal(made.labels.flatten(), LLAVA_MAPS[f"{case['case']}.labels"])
    check_counts(case, made)


def test_official_maps_of_recorded_attention():
    with safe_open(FOLDER / "attention_to_maps.safetensors", "pt") as file:
        settings = {name: json.loads(file.metadata()[name]) for name in ("required_heads", "sink_heads", "grid_hw")}
    for name, heads in (("grounding_map", settings["required_heads"]), ("sink_map", settings["sink_heads"])):
        chosen = {int(layer): numbers for layer, numbers in heads.items()}
        ours = attention_map(recorded(), RECORDS["visual_mask"][0], settings["grid_hw"], chosen)
        torch.testing.assert_close(ours, RECORDS[name], rtol=2e-3, atol=0)  # the official code averages in float16


def test_all_heads_of_a_layer_and_none():
    visual = RECORDS["visual_mask"][0]
    all_heads = attention_map(recorded(), visual, (2, 3), {1: None})
    torch.testing.assert_close(all_heads, attention_map(recorded(), visual, (2, 3), {1: [0, 1, 2, 3]}))
    assert torch.equal(attention_map(recorded(), visual, (2, 3), {}), torch.zeros(2, 3))


def test_attention_of_generate_itself():
    as_tuples = [tuple(step.get(layer, torch.zeros(0)) for layer in range(5)) for step in recorded()]
    visual = RECORDS["visual_mask"][0]
    expected = attention_map(recorded(), visual, (2, 3), {2: [0, 3], 4: [1]})
    assert torch.equal(attention_map(as_tuples, visual, (2, 3), {2: [0, 3], 4: [1]}), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attentions": recorded()[:1]}, "attentions have 1 steps"),
        ({"heads": {3: [0]}}, "layer 3"),
        ({"heads": {2: [4]}}, "heads 0 to 3"),
        ({"heads": {2: []}}, "heads of layer 2"),
        ({"grid": (2, 2)}, "2 x 2 image tokens"),
        ({"visual": torch.ones(6, dtype=torch.long)}, "visual is torch.int64"),
        ({"visual": torch.ones(99, dtype=torch.bool), "grid": (9, 11)}, "99 keys"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_attention_is_named(change, words):
    given = {"attentions": recorded(), "visual": RECORDS["visual_mask"][0], "grid": (2, 3), "heads": {2: [0]}}
    with pytest.raises(ValueError, match=words):
        attention_map(**{**given, **change})


def test_pointing_heads_are_of_layers_the_backbones_have():
    depths = {"qwen2_5_vl_3b": 36, "qwen2_5_vl_7b": 28, "qwen3_vl_4b": 36, "qwen3_vl_8b": 36}
    depths |= {"llava_1_5_7b": 32, "llava_1_5_13b": 40}
    assert depths.keys() == POINTING_HEADS.keys()
    for name, modes in POINTING_HEADS.items():
        assert all(layer < depths[name] for heads in modes.values() for layer in (*heads.grounding, *heads.sink))


@pytest.mark.parametrize(
    ("size", "side", "box"),
    [
        ((100, 100), 6, (0, 0, 6, 6)),
        ((100, 50), 6, (0, 1, 6, 5)),
        ((50, 100), 8, (2, 0, 6, 8)),
        ((900, 1), 8, (0, 3, 8, 5)),
    ],
    ids=str,
)
def test_content_of_a_padded_square(size, side, box):
    left, top, right, bottom = box
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[top:bottom, left:right] = True
    assert torch.equal(content_mask(size, side), expected)


def test_rules_of_small_maps():
    """On 6 x 6 cells the box of one cell and its neighbours is a quarter of the map, that of two a half."""
    grounding = torch.full((6, 6), 1e-3)
    grounding[2, 2] = grounding[4, 4] = 1.0
    none = torch.zeros(6, 6)
    assert pseudo_labels(grounding, none, LabelRules(most_area=0.5)).ignored
    made = pseudo_labels(grounding, none, LabelRules(most_area=0.75))
    assert made.box == (1, 1, 6, 6)
    assert (made.labels == 1).nonzero().tolist() == [[2, 2], [4, 4]]
    assert int((made.labels == 0).sum()) == 11
    sink = none.clone()
    sink[4, 4] = 1.0
    assert pseudo_labels(grounding, sink).box == (1, 1, 4, 4)
    assert pseudo_labels(grounding * 1e-3, none, LabelRules(most_area=1.0)).ignored
    assert pseudo_labels(none, none).box is None
    assert pseudo_labels(none, none).ignored


@pytest.mark.parametrize("share", ["region_share", "background_share", "most_area"])
def test_rules_are_checked(share):
    with pytest.raises(ValueError, match=f"{share} is 1.5"):
        replace(LLAVA_RULES, **{share: 1.5})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sink": torch.zeros(3, 4)}, "sink has the shape"),
        ({"grounding": torch.full((4, 4), float("nan"))}, "grounding must be finite"),
        ({"grounding": torch.full((4, 4), -1.0)}, "grounding must be finite and not negative"),
        ({"content": torch.ones(4, 4)}, "content is torch.float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_maps_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        pseudo_labels(**{"grounding": torch.ones(4, 4), "sink": torch.zeros(4, 4), **change})


def test_loss_is_the_mean_over_labelled_cells_of_the_batch():
    maps = [torch.randn(5, 7), torch.randn(6, 6)]
    labels = [torch.randint(0, 2, (5, 7)), torch.full((6, 6), -100)]
    labels[1][:2] = 1
    scores, targets = (
        torch.cat([maps[0].flatten(), maps[1][:2].flatten()]),
        torch.cat([labels[0].flatten(), torch.ones(12)]),
    )
    expected = -(targets * F.logsigmoid(scores) + (1 - targets) * F.logsigmoid(-scores)).mean()
    torch.testing.assert_close(region_loss(maps, labels), expected)


def test_loss_resizes_the_scores_to_the_labels():
    score_map, labels = torch.randn(5, 7), torch.randint(0, 2, (7, 10))
    resized = F.interpolate(score_map[None, None], size=(7, 10), mode="bilinear")[0, 0]
    torch.testing.assert_close(region_loss([score_map], [labels]), region_loss([resized], [labels]))


def test_loss_without_labels_is_zero_and_so_are_its_gradients():
    score_map = torch.randn(5, 7, requires_grad=True)
    loss = region_loss([score_map], [torch.full((5, 7), -100)])
    loss.backward()
    assert loss == 0
    assert torch.equal(score_map.grad, torch.zeros(5, 7))


def test_labels_of_the_loss_are_checked():
    with pytest.raises(ValueError, match=r"labels hold \[2\]"):
        region_loss([torch.zeros(2, 2)], [torch.full((2, 2), 2)])
    with pytest.raises(ValueError, match="score_maps are 1 and labels 0"):
        region_loss([torch.zeros(2, 2)], [])
