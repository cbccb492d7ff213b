"""How clearly logits stand apart: SpecEyes' official numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multimodal.q_zoom.separability import answer_separability, log_confidence, token_separability

FOLDER = Path(__file__).parent.parent / "golden" / "qzoom"
CASES = json.loads((FOLDER / "speceyes_separability.json").read_text())
GOLDEN = load_file(FOLDER / "speceyes_separability.safetensors")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"case{case['case']}")
def test_official_scores(case):
    logits = GOLDEN[f"{case['case']}.logits"]
    torch.testing.assert_close(token_separability(logits, case["top_k"]), GOLDEN[f"{case['case']}.token_scores"])
    for aggregate in ("min", "mean", "bottom20"):
        ours = answer_separability(logits, aggregate, top_k=case["top_k"], slope=case["alpha"])
        assert float(ours) == pytest.approx(case[aggregate], abs=1e-6)
    assert float(log_confidence(logits)) == pytest.approx(case["log"], abs=1e-6)


def test_a_token_by_hand():
    logits = torch.tensor([1.0, 7.0, 3.0, -50.0])
    assert float(token_separability(logits, 3)) == pytest.approx((7 - 2) / 1)


def test_bottom_20_percent_is_between_min_and_mean():
    logits = torch.randn(15, 80)
    scores = token_separability(logits).sort().values
    expected = torch.sigmoid(0.6 * scores[:3].mean())
    torch.testing.assert_close(answer_separability(logits, "bottom20"), expected)


def test_leading_axes_and_half_precision():
    logits = torch.randn(2, 3, 90).bfloat16()
    scores = token_separability(logits)
    assert scores.shape == (2, 3)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[1], token_separability(logits[1].float()))


@pytest.mark.parametrize(
    ("logits", "arguments", "words"),
    [
        (torch.zeros(2, 40), {}, "top_k is 64.*from 3 to 40"),
        (torch.zeros(2, 40), {"top_k": 2}, "top_k is 2"),
        (torch.zeros(2, 80), {"aggregate": "max"}, "aggregate is 'max'"),
        (torch.zeros(0, 80), {}, r"\(0, 80\)"),
        (torch.zeros(80), {}, r"\(80,\)"),
        (torch.zeros(2, 80, dtype=torch.long), {}, "torch.int64"),
        (torch.full((2, 80), float("nan")), {}, "not finite"),
        (torch.full((2, 80), float("-inf")), {}, "not filtered"),
    ],
    ids=["vocabulary too small", "no spread", "aggregate", "no token", "no answer", "integers", "NaN", "filtered"],
)
def test_wrong_logits_are_named(logits, arguments, words):
    with pytest.raises(ValueError, match=words):
        answer_separability(logits, **arguments)
