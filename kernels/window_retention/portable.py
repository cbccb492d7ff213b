"""Plain PyTorch forms: what exported graphs hold, and what runs where there is no kernel.

Both passes of a window share their rotated queries and keys. In a small window one product gives the scores of all
pairs of its tokens, and each pass picks its own (`_by_shared_scores`: more arithmetic, fewer steps). In a large one
each pass forms the scores of its lines alone (the reference).
"""

import torch
from torch import Tensor

from kernels.window_retention import tables
from kernels.window_retention.arguments import Settings
from kernels.window_retention.reference import biases, merge, normalized_weights, partition, rotate
from kernels.window_retention.reference import window_retention as by_lines


def window_retention(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    """Arguments and result as in `reference.window_retention`."""
    small = settings.window[0] * settings.window[1] <= tables.LARGEST_TILE
    return (by_shared_scores if small else by_lines)(query, key, value, settings)


def by_shared_scores(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    """Output = A_height (A_width value) with both matrices over all tokens of a window, from one matrix of scores."""
    size = query.shape[1:3]
    query, key, value = (partition(x, settings) for x in (query * settings.scale, key, value))
    if settings.rotary:
        query, key = (rotate(x, settings.window) for x in (query, key))
    # (B, down, along, heads, T, D or V) with the T tokens of a window row by row
    query, key, value = (x.flatten(-3, -2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2)
    for axis in (1, 0):
        value = _weights(scores, axis, size[axis], settings) @ value
    return merge(value.unflatten(-2, settings.window), size, settings)


def _weights(scores: Tensor, axis: int, length: int, settings: Settings) -> Tensor:
    """The matrix A of the pass along `axis`, (B, down, along, heads, T, T), from all scores."""
    rows, columns = settings.window

    def steps() -> Tensor:
        places = torch.arange(settings.window[axis], dtype=torch.float64)
        lines = (places[:, None] if axis == 0 else places).expand(rows, columns).flatten()
        return lines[:, None] - lines

    def forbidden() -> Tensor:
        met = tables.allowed(length, settings.window[axis], settings.shift[axis])
        if axis == 0:
            pairs = met[:, :, None, :, None] & torch.eye(columns, dtype=torch.bool)[:, None, :]
            return ~pairs.reshape(-1, 1, 1, rows * columns, rows * columns)
        pairs = met[:, None, :, None, :] & torch.eye(rows, dtype=torch.bool)[:, None, :, None]
        return ~pairs.reshape(-1, 1, rows * columns, rows * columns)

    return normalized_weights(scores, *biases(("pairs", axis, length), steps, forbidden, 3, settings, scores), settings)
