"""Which experts are best, and which row each choice gets: the `torch` backend."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Rows of choices, all int64."""

    locations: Tensor  # (k, N) how many choices of the same expert come earlier
    positions: Tensor  # (k, N) row of each choice
    order: Tensor  # (k N) choice j N + n of each row
    starts: Tensor  # (E + 1) first row of each expert, then of the dropped choices
    loads: Tensor  # (E)
    capacity: Tensor  # ()


def capacity_rule(choices: int, tokens: int, experts: int, factor: float) -> tuple[int, bool]:
    """A number of choices, and whether the capacity is the largest load where that is less."""
    if factor == 0:
        return choices * tokens, True
    return choices * int(abs(factor) * math.ceil(tokens / experts)), factor < 0


def choose(scores: Tensor, choices: int, softmax: bool) -> tuple[Tensor, Tensor]:
    """Probabilities (N, E), empty without `softmax`, and indices (k, N) of the largest scores, best first."""
    refuse_what_has_no_order(scores)
    if choices == 1:
        indices = scores.argmax(1)[None] if len(scores) else scores.new_empty(1, 0, dtype=torch.int64)
    else:
        indices = scores.sort(dim=1, descending=True, stable=True).indices[:, :choices].t().contiguous()
    return scores.softmax(1) if softmax else scores.new_empty(0), indices


def refuse_what_has_no_order(scores: Tensor) -> None:
    """Raise `ValueError` for rows without a finite largest score."""
    if torch.compiler.is_compiling() or len(scores) == 0:
        return
    if not scores.detach().amax(1).isfinite().all():
        raise ValueError("scores have a row with a NaN, +inf or no finite number; such a row has no best expert")


def find_places(
    indices: Tensor, turns: Tensor | None, experts: int, limit: int, bounded_by_load: bool
) -> tuple[Tensor, ...]:
    """The fields of `Places`.

    Args:
        indices: (k, N).
        turns: (N), the tokens in the order in which they are counted; None for their own.
        experts: E.
        limit: the capacity.
        bounded_by_load: whether the capacity is the largest load where that is less.
    """
    choices, tokens = indices.shape
    total = choices * tokens
    counted = torch.arange(total, device=indices.device)
    if turns is not None:
        counted = counted.view(choices, tokens)[:, turns].flatten()
    flat = indices.flatten()
    narrow = torch.uint8 if experts <= 256 else torch.int64  # of bytes the sort takes a quarter of the time
    found, ranks = flat[counted].to(narrow).sort(stable=True)
    sorted_choices, found = counted[ranks], found.long()
    ladder = torch.arange(total, device=indices.device)
    loads = torch.zeros(experts, dtype=torch.int64, device=indices.device).index_add_(0, flat, torch.ones_like(flat))
    locations = torch.empty_like(flat).index_copy_(0, sorted_choices, ladder - (loads.cumsum(0) - loads)[found])
    capacity = torch.full((), limit, device=indices.device)
    if bounded_by_load:
        capacity = torch.minimum(capacity, loads.amax())
    kept = torch.minimum(loads, capacity)
    starts = torch.cat([torch.zeros_like(kept[:1]), kept.cumsum(0)])
    dropped = loads - kept
    tails = starts[-1] + dropped.cumsum(0) - dropped - capacity
    positions = locations + torch.where(locations < capacity, starts[:-1][flat], tails[flat])
    order = torch.empty_like(flat).index_copy_(0, positions, ladder)
    return locations.view(indices.shape), positions.view(indices.shape), order, starts, loads, capacity
