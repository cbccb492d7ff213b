"""The definition: roll, pad, cut into windows and mask as Swin does, then attend along rows and along columns."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.window_retention import tables
from kernels.window_retention.arguments import Settings


def window_retention(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    """Tensors of one dtype (B, H, W, heads, D or V); the rest as `kernels.window_retention.window_retention`."""
    size = query.shape[1:3]
    query, key, value = (partition(x, settings) for x in (query * settings.scale, key, value))
    if settings.rotary:
        query, key = (rotate(x, settings.window) for x in (query, key))
    # (B, down, along, heads, window height, window width, D or V)
    for axis in (1, 0):
        if axis == 0:
            query, key, value = (x.transpose(-3, -2) for x in (query, key, value))
        weights = retention_weights(query @ key.transpose(-1, -2), axis, size[axis], settings)
        value = weights @ value
    return merge(value.transpose(-3, -2), size, settings)


def partition(x: Tensor, settings: Settings) -> Tensor:
    """(B, H, W, heads, D) -> (B, windows down, windows along, heads, window height, window width, D)."""
    (height, width), (rows, columns), (down, right) = x.shape[1:3], settings.window, settings.shift
    x = x.roll((-down, -right), (1, 2))
    below, beside = tables.padded(height, rows) - height, tables.padded(width, columns) - width
    x = F.pad(x, (0, 0, 0, 0, 0, beside, 0, below))
    return x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).permute(0, 1, 3, 5, 2, 4, 6).contiguous()


def merge(x: Tensor, size: tuple[int, int], settings: Settings) -> Tensor:
    """The inverse of `partition`."""
    x = x.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)
    return x[:, : size[0], : size[1]].roll(settings.shift, (1, 2))


def rotate(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Turn the channel pairs of (..., window height, window width, D) by each token's place in its window."""
    cosine, sine = tables.rotary_table(*window, x.shape[-1], x)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), -1).flatten(-2)


def retention_weights(scores: Tensor, axis: int, length: int, settings: Settings) -> Tensor:
    """The matrix A of the pass along `axis`, of `length` on the map.

    Args:
        scores: (B, down, along, heads, lines, N, N), scaled.
        axis: 0 for the height, 1 for the width.
        length: of that axis of the map.
        settings: of the operation.
    """
    side, shift = settings.window[axis], settings.shift[axis]

    def decays() -> Tensor:
        bias = tables.by_head(settings.log_decay, 4) * tables.distances(side).abs()
        if not tables.has_mask(length, side, shift):
            return bias
        met = tables.allowed(length, side, shift)[:, None, None]  # of windows along, or
        return bias.masked_fill(~met if axis == 1 else ~met[:, None], float("-inf"))  # of windows down

    def slopes() -> Tensor:
        steps = tables.distances(side)
        return tables.by_head(settings.slopes, 4) * (steps if settings.signed_slopes else steps.abs())

    bias = tables.constant(("decays", axis, length, settings), decays, scores)
    along = tables.constant(("slopes", axis, settings), slopes, scores) if settings.slopes else None
    return normalized_weights(scores, bias, along, settings)


def normalized_weights(scores: Tensor, bias: Tensor, slopes: Tensor | None, settings: Settings) -> Tensor:
    """A from scores and two terms broadcast against them; its rows sum to one, to at most one, or freely.

    Args:
        scores: of all pairs, scaled.
        bias: log decays, -inf for pairs that may not meet.
        slopes: what slopes add to the scores; None for nothing.
        settings: of the operation.
    """
    if settings.activation == "softmax":
        return (scores + bias).softmax(-1)
    scores = scores if slopes is None else scores + slopes
    if settings.normalization == "sum":
        # Dividing sigmoids by their sum is a softmax of their logarithms, and never divides by zero.
        return (F.logsigmoid(scores) + bias).softmax(-1)
    weights = scores.sigmoid() * bias.exp()
    return weights if settings.normalization == "none" else weights / weights.sum(-1, keepdim=True).clamp(min=1)
