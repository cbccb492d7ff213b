"""Answers at several resolutions to labels of the gate: the official rule, and the stricter one we use."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from multimodal.q_zoom.routing_labels import (
    MultiResolutionAnswer,
    draw_label,
    judge_answers,
    normalized_answer,
    routing_labels,
)

CASES = json.loads((Path(__file__).parent.parent / "golden" / "qzoom" / "gate_routing_labels.json").read_text())
RESOLUTIONS = (64, 128, 256, 576, 1024)


def asked(*answers: str, truth: str = "17") -> MultiResolutionAnswer:
    return MultiResolutionAnswer(RESOLUTIONS, answers, truth)


def drawn(question: MultiResolutionAnswer, match: str, times: int = 400) -> Counter:
    judgement = judge_answers(question, match)
    return Counter(draw_label(question, judgement, random.Random(seed)) for seed in range(times))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case["answers"]))
def test_official_labels(case):
    question = MultiResolutionAnswer(case["res"], case["answers"], case["gt"])
    assert (judge_answers(question, "substring").kind == "hard") == case["kept_as_hard"]
    expected = Counter()
    for outcome, count in case["label_at_res_counts_400"].items():
        label, resolution = map(int, outcome.split("@"))
        expected[None if label == -100 else (resolution, label)] += count
    counts = drawn(question, "substring")
    assert counts.keys() == expected.keys()
    for outcome, count in expected.items():
        assert abs(counts[outcome] - count) <= 50  # five standard deviations of a binomial of 400


@pytest.mark.parametrize(
    ("answers", "kind", "wrong"),
    [
        (("17", "17", "17", "17", "17"), "easy", 0),
        (("17.", "17", " 17", "17", "17"), "easy", 0),
        (("7", "17", "17", "17", "17"), "hard", 1),
        (("", "7", "1", "17", "17"), "hard", 3),
        (("17", "7", "17", "17", "17"), "not monotone", 0),
        (("17", "17", "17", "17", "7"), "unstable", 0),
        (("17", "17", "17", "7", "7"), "wrong", 0),
    ],
    ids=str,
)
def test_exact_match(answers, kind, wrong):
    judgement = judge_answers(asked(*answers))
    assert (judgement.kind, judgement.wrong) == (kind, wrong)


@pytest.mark.parametrize(
    ("answers", "outcomes"),
    [
        (("17",) * 5, {(64, 0), (128, 0), (256, 0)}),
        (("a", "17", "17", "17", "17"), {(64, 1), (128, 0), (256, 0)}),
        (("a", "b", "17", "17", "17"), {(64, 1), (128, 1), (256, 0)}),
        (("a", "b", "c", "17", "17"), {(128, 1), (256, 1), None}),
        (("17", "17", "17", "7", "7"), {None}),
    ],
    ids=str,
)
def test_what_is_drawn(answers, outcomes):
    counts = drawn(asked(*answers), "exact")
    assert counts.keys() == outcomes
    zooms = sum(count for outcome, count in counts.items() if outcome is not None and outcome[1] == 1)
    assert zooms == 0 or 340 <= zooms <= 380  # 0.9 of 400


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Bowmore.", "bowmore", True),
        ("  two\twords ", "Two words", True),
        ("$1,000", "1000", True),
        ("yes, it is", "Yes it is!", True),
        ("50%", "50", True),
        ("1.5", "15", False),
        ("-5", "5", False),
        ("12:30", "1230", False),
        (".5", "5", False),
        ("", "17", False),
        ("7", "17", False),
    ],
    ids=str,
)
def test_normalized_answers(one, other, same):
    assert (normalized_answer(one) == normalized_answer(other)) == same


def test_the_set_has_as_many_easy_questions_as_hard_ones():
    easy, hard, dropped = asked(*["17"] * 5), asked("a", "17", "17", "17", "17"), asked(*"abcde")
    questions = [easy] * 20 + [hard] * 5 + [dropped] * 4
    made = routing_labels(questions, seed=3)
    assert made.kinds == {"easy": 20, "hard": 5, "unstable": 4}
    indices = [label.index for label in made.labels]
    assert indices == sorted(indices)
    assert sum(index < 20 for index in indices) == 5
    assert indices[5:] == [20, 21, 22, 23, 24]
    assert all(label.label == 0 for label in made.labels[:5])
    assert routing_labels(questions, seed=3) == made
    assert routing_labels(questions, seed=4) != made


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (MultiResolutionAnswer((64, 128), ("a", "a"), "a"), "resolutions are"),
        (MultiResolutionAnswer((64, 64, 128), ("a",) * 3, "a"), "ascending"),
        (MultiResolutionAnswer((64, 128, 256), ("a",) * 2, "a"), "answers are 2"),
    ],
    ids=["too few", "not ascending", "answers missing"],
)
def test_wrong_questions_are_named(question, words):
    with pytest.raises(ValueError, match=words):
        judge_answers(question)
    with pytest.raises(ValueError, match="question 1"):
        routing_labels([asked(*["17"] * 5), question])
