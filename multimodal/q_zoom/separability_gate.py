"""A gate without training: answer first, and look closer where the answer's tokens do not stand out (SpecEyes)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from PIL.Image import Image
from torch import Tensor

from multimodal.q_zoom.generation import continue_by_generate
from multimodal.q_zoom.generation_options import GenerationOptions
from multimodal.q_zoom.prefill import read_on
from multimodal.q_zoom.prompt import Prompt
from multimodal.q_zoom.regions import Box
from multimodal.q_zoom.separability import answer_separability

if TYPE_CHECKING:
    from multimodal.q_zoom.model import QZoom, ZoomInfo

ALTERNATIVES = 64  # logits a token is compared with, as many as there are if fewer


def answer_twice(
    zoom: "QZoom",
    inputs: Mapping[str, Tensor],
    prompts: Sequence[Prompt],
    pictures: Sequence[Image],
    boxes: Sequence[Sequence[Box]],
    thresholds: tuple[float, float],
    options: GenerationOptions,
) -> tuple[Tensor, list["ZoomInfo"]]:
    """Sequences and what was done, a row each; arguments as of `QZoom.generate`.

    What the first layers made of a prompt serves both answers.

    Raises:
        ValueError: options ask for several answers, a stream, or more than sequences.
    """
    check_options(options)
    ids = inputs["input_ids"]
    taps = [zoom.read_to_tap(prompt) for prompt in prompts]
    first = continue_by_generate(
        zoom.adapter,
        [read_on(zoom.adapter, tap, exact=zoom.config.exact) for tap in taps],
        ids,
        options.with_settings(return_dict_in_generate=True, output_logits=True),
    )
    answers = first.sequences[:, ids.shape[1] :]
    infos, again = [], []
    for row, (tap, picture, chosen) in enumerate(zip(taps, pictures, boxes, strict=True)):
        length = answer_length(answers[row], options.ends)
        logits = torch.stack([step[row] for step in first.logits[:length]])
        score = float(answer_separability(logits, top_k=min(ALTERNATIVES, logits.shape[-1])))
        if score < thresholds[0] or chosen:
            read, info = zoom.open(tap, picture, chosen, thresholds[1], None if chosen else score)
            again.append((row, read))
        else:
            info = zoom.closed(tap.prompt, picture, score)
        infos.append(info)
    if again:
        rows = [row for row, _ in again]
        second = continue_by_generate(zoom.adapter, [read for _, read in again], ids[rows], options)
        answers = replaced(answers, rows, second[:, ids.shape[1] :], options.padding)
    return torch.cat((ids, answers), dim=1), infos


def check_options(options: GenerationOptions) -> None:
    """Raise a `ValueError` for options of `generate` that have no meaning for two answers in a row."""
    if options.copies > 1:
        config = options.config
        given = f"num_beams is {config.num_beams} and num_return_sequences {config.num_return_sequences}"
        raise ValueError(f"{given}; with gate='separability' both must be 1")
    if options.others.get("streamer") is not None or options.config.return_dict_in_generate:
        raise ValueError(
            "gate='separability' answers twice and returns sequences: no streamer, no return_dict_in_generate"
        )


def answer_length(tokens: Tensor, ends: set[int]) -> int:
    """Tokens `[N]` before the first that ends the answer, at least one."""
    for index, token in enumerate(tokens.tolist()):
        if token in ends:
            return max(1, index)
    return len(tokens)


def replaced(answers: Tensor, rows: Sequence[int], others: Tensor, padding: int) -> Tensor:
    """`answers` `[B, N]` with some rows of other ones `[R, M]`, padded on the right to one length."""
    length = max(answers.shape[1], others.shape[1])
    joined = answers.new_full((len(answers), length), padding)
    joined[:, : answers.shape[1]] = answers
    joined[list(rows)] = padding
    joined[list(rows), : others.shape[1]] = others
    return joined
