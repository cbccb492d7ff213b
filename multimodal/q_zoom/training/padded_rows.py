"""Several prompts read at once for training, padded on the right, which causal attention needs no mask for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from multimodal.q_zoom.adapters import BackboneAdapter
from multimodal.q_zoom.heads import RegionProposal, ZoomGate
from multimodal.q_zoom.layers import Rotary, causal_mask
from multimodal.q_zoom.positions import IGNORED_LABEL
from multimodal.q_zoom.prompt import Prompt


@dataclass(frozen=True)
class TapRow:
    """What the branches read of one prompt.

    Args:
        hidden: `[S, C]` at the tap.
        positions: `[A, S]` of A rotary axes.
        image_start: index of the image's first token.
        grid: rows and columns of the image.
    """

    hidden: Tensor
    positions: Tensor
    image_start: int
    grid: tuple[int, int]


def read_rows(adapter: BackboneAdapter, prompts: Sequence[Prompt], depth: int, *, checkpointed: bool = False) -> Tensor:
    """Hidden states `[B, S, C]` after the first `depth` decoder layers, of prompts padded on the right.

    Args:
        checkpointed: keep no activations inside of layers; the backward pass computes them again.
    """
    hidden = pad_sequence([prompt.embeddings[0] for prompt in prompts], batch_first=True)
    visual = pad_sequence([prompt.visual for prompt in prompts], batch_first=True)
    rotary = padded_rotary(adapter, hidden, [prompt.positions[:, 0] for prompt in prompts])
    mask = causal_mask(adapter.decoder, hidden)
    levels = [torch.cat(level) for level in zip(*(prompt.deepstack for prompt in prompts), strict=True)]
    for index, layer in enumerate(adapter.decoder.layers[:depth]):

        def run(states: Tensor, layer: nn.Module = layer) -> Tensor:
            return layer(states, attention_mask=mask, position_embeddings=rotary, position_ids=None)

        hidden = checkpoint(run, hidden, use_reentrant=False) if checkpointed else run(hidden)
        if index < len(levels):
            hidden = hidden.clone()
            hidden[visual] += levels[index].to(hidden)
    return hidden


def padded_rotary(adapter: BackboneAdapter, hidden: Tensor, positions: Sequence[Tensor]) -> Rotary:
    """Cosines and sines `[B, S, D]` of positions `[A, S_i]`, padded on the right."""
    whole = not any(row.is_floating_point() for row in positions)  # those of regions are not
    dtype = torch.long if whole else torch.float32
    together = pad_sequence([row.to(dtype).mT for row in positions], batch_first=True)
    return adapter.rotary(hidden, together.permute(2, 0, 1))


def tap_rows(adapter: BackboneAdapter, prompts: Sequence[Prompt], depth: int) -> list[TapRow]:
    """Prompts read by the first `depth` layers, which are those both branches read from; no gradient goes through."""
    with torch.no_grad():
        hidden = read_rows(adapter, prompts, depth)
    return [
        TapRow(states[: prompt.length].clone(), prompt.positions[:, 0], prompt.image_start, prompt.grid)
        for states, prompt in zip(hidden, prompts, strict=True)
    ]


def score_maps(adapter: BackboneAdapter, proposal: RegionProposal, rows: Sequence[TapRow]) -> list[Tensor]:
    """Logits of every image's cells, `[rows, columns]` each."""
    hidden, rotary, query = _together(adapter, rows)
    counts = [row.grid[0] * row.grid[1] for row in rows]
    image = torch.stack(
        [
            row.image_start + torch.arange(max(counts), device=hidden.device).clamp(max=count - 1)
            for row, count in zip(rows, counts, strict=True)
        ]
    )
    scores = proposal(hidden, rotary, image, query, mask=causal_mask(adapter.decoder, hidden))
    return [score[:count].view(row.grid) for score, row, count in zip(scores, rows, counts, strict=True)]


def gate_logits(adapter: BackboneAdapter, gate: ZoomGate, rows: Sequence[TapRow]) -> Tensor:
    """The gate's logits, `[B]`."""
    hidden, rotary, query = _together(adapter, rows)
    return gate(hidden, rotary, query, mask=causal_mask(adapter.decoder, hidden))


def _together(adapter: BackboneAdapter, rows: Sequence[TapRow]) -> tuple[Tensor, Rotary, Tensor]:
    """Hidden states, their rotary parts, and the index of every prompt's last token, `[B]`."""
    hidden = pad_sequence([row.hidden for row in rows], batch_first=True)
    query = torch.tensor([len(row.hidden) - 1 for row in rows], device=hidden.device)
    return hidden, padded_rotary(adapter, hidden, [row.positions for row in rows]), query


def with_answer(adapter: BackboneAdapter, prompt: Prompt, answer: Tensor) -> tuple[Prompt, Tensor]:
    """A prompt followed by its answer, and the labels `[S']` of next-token prediction: the answer's ids, else -100.

    Args:
        answer: `[N]`, ids of the answer with what ends it.
    """
    count = len(answer)
    answer = answer.to(prompt.input_ids)
    next_positions = prompt.positions.max() + 1 + torch.arange(count, device=prompt.positions.device)
    extended = Prompt(
        torch.cat((prompt.input_ids, answer)),
        torch.cat((prompt.embeddings, adapter.model.get_input_embeddings()(answer)[None].to(prompt.embeddings)), 1),
        torch.cat((prompt.positions, next_positions.expand(len(prompt.positions), 1, -1).to(prompt.positions)), -1),
        prompt.image_start,
        prompt.grid,
        torch.cat((prompt.visual, prompt.visual.new_zeros(count))),
        prompt.deepstack,
    )
    return extended, torch.cat((torch.full_like(prompt.input_ids, IGNORED_LABEL), answer))


def answer_loss(
    adapter: BackboneAdapter, prompts: Sequence[Prompt], labels: Sequence[Tensor], *, checkpointed: bool = False
) -> Tensor:
    """Cross-entropy of next-token prediction: the mean over all labelled tokens of the batch.

    Args:
        labels: `[S]` of each prompt: ids, or -100 where nothing is to be predicted.

    Raises:
        ValueError: no token is labelled.
    """
    decoder = adapter.decoder
    hidden = read_rows(adapter, prompts, len(decoder.layers), checkpointed=checkpointed)
    target = pad_sequence(list(labels), batch_first=True, padding_value=IGNORED_LABEL)[:, 1:]
    labelled = target != IGNORED_LABEL
    if not labelled.any():
        raise ValueError("labels name no token to predict; every prompt must be followed by its answer")
    logits = decoder.head(decoder.norm(hidden[:, :-1][labelled]))
    return F.cross_entropy(logits.float(), target[labelled])
