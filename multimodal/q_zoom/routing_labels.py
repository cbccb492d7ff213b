"""Labels for the gate: at which resolutions the backbone answers a question right, and where it needs more.

A question is asked at several resolutions. Where the small ones fail and the large ones agree on the right answer, the
gate learns to zoom at the small ones (1); where all succeed, it learns not to (0). Source: Q-Zoom (arXiv 2604.06912),
stage 3, as its code does it with `match="substring"`; the default here compares whole answers.
"""

import random
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from multimodal.argument_checks import check_choice, check_whole

MATCHES = ("exact", "substring")
CONSENSUS = 2  # so many of the highest resolutions must agree, and serve as no training sample
ZOOM_SHARE = 0.9  # of the hard questions' samples
HIGHEST_WRONG = 2  # from so many of the highest resolutions with a wrong answer those samples are drawn

Match = Literal["exact", "substring"]
Kind = Literal["easy", "hard", "unstable", "wrong", "not monotone"]


@dataclass(frozen=True)
class MultiResolutionAnswer:
    """The answers of a backbone to one question, at ascending resolutions (visual tokens), and the right one."""

    resolutions: Sequence[int]
    answers: Sequence[str]
    truth: str


@dataclass(frozen=True)
class Judgement:
    """What the answers to a question show.

    Attributes:
        kind: "easy": right at every resolution. "hard": wrong at the lowest, right at all higher ones. The others
            teach nothing: "unstable": the two highest resolutions disagree; "wrong": they agree on a wrong answer;
            "not monotone": wrong at a higher resolution than one that is right.
        wrong: how many of the lowest resolutions are wrong, for "hard"; 0 otherwise.
    """

    kind: Kind
    wrong: int = 0

    @property
    def teaches(self) -> bool:
        return self.kind in ("easy", "hard")


@dataclass(frozen=True)
class RoutingLabel:
    """Of the question number `index`: at `resolution` visual tokens the gate shall zoom (1) or not (0)."""

    index: int
    resolution: int
    label: int


@dataclass(frozen=True)
class RoutingLabels:
    """The training set of the gate, and how many questions were of which kind before easy ones were left out."""

    labels: list[RoutingLabel]
    kinds: Counter


def normalized_answer(answer: str) -> str:
    """`answer` in lower case, with single spaces, without punctuation except inside and before numbers.

    "Bowmore." is "bowmore" and "$1,000" is "1000", but "1.5" is not "15" and "-5" is not "5".
    """
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", str(answer).lower())
    marks = re.escape(string.punctuation)
    kept = r"(?<=\d)[.,:/\-](?=\d)|(?<![\w.])-(?=\.?\d)|(?<!\d)\.(?=\d)"
    text = re.sub(rf"({kept})|[{marks}]", lambda match: match[1] or "", text)
    return " ".join(text.split())


def judge_answers(asked: MultiResolutionAnswer, match: Match = "exact") -> Judgement:
    """What the answers to a question show about the resolution it needs.

    Args:
        match: "exact": answers are the same after `normalized_answer`. "substring": as in the official code, one
            contains the other after removal of all punctuation: "7" is "17", and an empty answer is any.

    Raises:
        ValueError: there are fewer than 3 resolutions, they do not ascend, or there are not as many answers.
    """
    check_choice("match", match, MATCHES)
    resolutions = [check_whole("resolutions", resolution, 1) for resolution in asked.resolutions]
    if len(resolutions) <= CONSENSUS or any(low >= high for low, high in pairwise(resolutions)):
        raise ValueError(f"resolutions are {resolutions}; they must be at least {CONSENSUS + 1}, ascending")
    if len(asked.answers) != len(resolutions):
        raise ValueError(
            f"answers are {len(asked.answers)}; there must be one for each of {len(resolutions)} resolutions"
        )
    if match == "exact":
        answers, truth = [normalized_answer(answer) for answer in asked.answers], normalized_answer(asked.truth)
    else:
        removed = str.maketrans("", "", string.punctuation)
        answers = [str(answer).lower().strip().translate(removed) for answer in asked.answers]
        truth = str(asked.truth).lower().strip()
    target = answers[-1]
    if any(answer != target for answer in answers[-CONSENSUS:]):
        return Judgement("unstable")
    if not _same(target, truth, match):
        return Judgement("wrong")
    right = [_same(answer, target, match) for answer in answers]
    wrong = right.count(False)
    if wrong == 0:
        return Judgement("easy")
    if any(right[:wrong]):
        return Judgement("not monotone")
    return Judgement("hard", wrong)


def draw_label(asked: MultiResolutionAnswer, judgement: Judgement, generator: random.Random) -> tuple[int, int] | None:
    """A resolution and the label there, drawn for a question; None where it teaches nothing.

    Easy: any resolution but the two highest, label 0. Hard: with probability 0.9 one of the two highest resolutions
    with a wrong answer, label 1; otherwise one with a right answer below the two highest, label 0, or none.
    """
    if not judgement.teaches:
        return None
    if judgement.kind == "hard" and generator.random() < ZOOM_SHARE:
        least, end, label = max(0, judgement.wrong - HIGHEST_WRONG), judgement.wrong, 1
    else:
        least, end, label = judgement.wrong, len(asked.resolutions) - CONSENSUS, 0
    if least >= end:
        return None
    return asked.resolutions[generator.randrange(least, end)], label


def routing_labels(asked: Sequence[MultiResolutionAnswer], *, match: Match = "exact", seed: int = 0) -> RoutingLabels:
    """The gate's training set: all hard questions and as many easy ones, one resolution of each, in their order.

    The same questions and seed give the same labels.

    Raises:
        ValueError: as `judge_answers` does, naming the question.
    """
    generator = random.Random(check_whole("seed", seed, 0))
    judgements = []
    for index, question in enumerate(asked):
        try:
            judgements.append(judge_answers(question, match))
        except ValueError as error:
            raise ValueError(f"question {index}: {error}") from None
    easy = [index for index, judgement in enumerate(judgements) if judgement.kind == "easy"]
    hard = [index for index, judgement in enumerate(judgements) if judgement.kind == "hard"]
    chosen = sorted([*hard, *generator.sample(easy, min(len(easy), len(hard)))])
    labels = []
    for index in chosen:
        drawn = draw_label(asked[index], judgements[index], generator)
        if drawn is not None:
            labels.append(RoutingLabel(index, *drawn))
    return RoutingLabels(labels, Counter(judgement.kind for judgement in judgements))


def _same(one: str, other: str, match: Match) -> bool:
    return one == other if match == "exact" else one in other or other in one
