"""Labels for the gate (stage 3) and samples for the tuning (stage 2), from a model's answers to questions.

The published way asks the backbone at several resolutions (`label_by_resolution`). Where a region proposal is trained
already, answers with and without its region say the same with two answers a question (`label_by_region`).
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from multimodal.argument_checks import check_choice, check_whole
from multimodal.q_zoom.model import QZoom
from multimodal.q_zoom.routing_labels import Match, MultiResolutionAnswer, judge_answers, routing_labels
from multimodal.q_zoom.training.prompts import by_budget, inputs_of
from multimodal.q_zoom.training.region_labels import chunks
from multimodal.q_zoom.training.samples import ZoomSample


@dataclass(frozen=True)
class LabelledSamples:
    """Samples with labels, and how many questions were of which kind before any were left out."""

    samples: list[ZoomSample]
    kinds: Counter


@torch.no_grad()
def answers_to(
    zoom: QZoom, samples: Sequence[ZoomSample], *, gate: str = "never", batch_size: int = 16, max_new_tokens: int = 32
) -> list[str]:
    """Greedy answers in the samples' order.

    Args:
        gate: "never" for the backbone's own answers, "always" for those with a region; see `QZoom.generate`.
        batch_size: samples answered at a time.
    """
    answers = [""] * len(samples)
    for tokens, indices in by_budget(samples).items():
        for chunk in chunks(indices, batch_size):
            some = [samples[index] for index in chunk]
            inputs = inputs_of(zoom, some, tokens)
            pictures = [sample.picture() for sample in some]
            made = zoom.generate(inputs, pictures, gate=gate, max_new_tokens=max_new_tokens, do_sample=False)
            texts = zoom.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, text in zip(chunk, texts, strict=True):
                answers[index] = text.strip()
    return answers


def is_right(answer: str, truth: str, match: Match) -> bool:
    """Whether an answer counts as the true one; `match` as of `judge_answers`."""
    return judge_answers(MultiResolutionAnswer((1, 2, 3), (answer, truth, truth), truth), match).kind == "easy"


def label_by_resolution(
    zoom: QZoom,
    samples: Sequence[ZoomSample],
    resolutions: Sequence[int],
    *,
    match: Match = "exact",
    seed: int = 0,
    batch_size: int = 16,
    max_new_tokens: int = 32,
) -> LabelledSamples:
    """One labelled sample a question that teaches something, at a resolution of its own (see `routing_labels`).

    Args:
        samples: with their answers; the budgets of tokens they have are not used.
        resolutions: visual tokens, ascending, at least 3.
        match: "exact", or "substring" as published.
        batch_size: samples answered at a time.

    Raises:
        ValueError: a sample has no answer, or resolutions are not as above.
    """
    check_answers(samples)
    judge_answers(MultiResolutionAnswer(resolutions, [""] * len(resolutions), ""), match)  # before work starts
    asked = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    columns = [
        answers_to(zoom, [sample.replace(tokens=tokens) for sample in samples], **asked) for tokens in resolutions
    ]
    questions = [
        MultiResolutionAnswer(resolutions, [column[index] for column in columns], sample.answer)
        for index, sample in enumerate(samples)
    ]
    made = routing_labels(questions, match=match, seed=seed)
    labelled = [samples[one.index].replace(tokens=one.resolution, zoom=one.label) for one in made.labels]
    return LabelledSamples(labelled, made.kinds)


def label_by_region(
    zoom: QZoom,
    samples: Sequence[ZoomSample],
    *,
    match: Match = "exact",
    balanced: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    max_new_tokens: int = 32,
) -> LabelledSamples:
    """Samples to zoom for (1: wrong without a region, right with it) or not (0: right without); others are left out.

    Args:
        samples: with their answers.
        match: "exact", or "substring" as published.
        balanced: leave out what is more of one label than of the other, drawn by `seed`.
        batch_size: samples answered at a time.

    Raises:
        ValueError: a sample has no answer.
    """
    kinds = region_kinds(zoom, samples, match, batch_size, max_new_tokens)
    chosen = {
        1: [index for index, kind in enumerate(kinds) if kind == "hard"],
        0: [index for index, kind in enumerate(kinds) if kind in ("easy", "harmed")],
    }
    if balanced:
        generator, fewest = random.Random(check_whole("seed", seed, 0)), min(map(len, chosen.values()))
        chosen = {label: generator.sample(indices, fewest) for label, indices in chosen.items()}
    labels = sorted((index, label) for label, indices in chosen.items() for index in indices)
    return LabelledSamples([samples[index].replace(zoom=label) for index, label in labels], Counter(kinds))


def mine_harmed(
    zoom: QZoom,
    samples: Sequence[ZoomSample],
    *,
    match: Match = "exact",
    batch_size: int = 16,
    max_new_tokens: int = 32,
) -> LabelledSamples:
    """Samples for stage 2: those that the backbone answers right and, with a region, wrong.

    The published way has a larger model judge the answers; here they are compared by `match`.
    """
    kinds = region_kinds(zoom, samples, match, batch_size, max_new_tokens)
    mined = [sample for sample, kind in zip(samples, kinds, strict=True) if kind == "harmed"]
    return LabelledSamples(mined, Counter(kinds))


def region_kinds(
    zoom: QZoom, samples: Sequence[ZoomSample], match: Match, batch_size: int, max_new_tokens: int
) -> list[str]:
    """What a region does to each answer: "easy" (right either way), "hard" (right only with it), "harmed" (right only
    without), "wrong" (either way)."""
    check_answers(samples)
    check_choice("match", match, ("exact", "substring"))
    right = []
    for gate in ("never", "always"):
        answers = answers_to(zoom, samples, gate=gate, batch_size=batch_size, max_new_tokens=max_new_tokens)
        right.append([is_right(answer, sample.answer, match) for answer, sample in zip(answers, samples, strict=True)])
    names = {(True, True): "easy", (False, True): "hard", (True, False): "harmed", (False, False): "wrong"}
    return [names[pair] for pair in zip(*right, strict=True)]


def check_answers(samples: Sequence[ZoomSample]) -> None:
    """Raise a `ValueError` if there are no samples or one has no answer."""
    if not samples:
        raise ValueError("samples are none; there must be some to label")
    for sample in samples:
        if not sample.answer.strip():
            raise ValueError(f"sample {sample.question!r} has no answer, by which the model's would be judged")
