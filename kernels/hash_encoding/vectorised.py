"""The `torch` backend: all levels and corners of all points at once, in plain operations that can be exported."""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.hash_encoding.grid import WORD, HashGrid
from kernels.hash_encoding.reference import FARTHEST, no_features


def hash_encoding(points: Tensor, table: Tensor, grid: HashGrid, expert: Tensor | None, max_level: int) -> Tensor:
    """Tensors of one dtype, nothing gated; the rest as `kernels.hash_encoding.hash_encoding`.

    Legend: P points, K levels below `max_level`, C corners.
    """
    if max_level == 0:
        return no_features(points, table, grid)
    nearest = grid.interpolation == "nearest"
    rows = [row for index in range(grid.experts) for row in grid.rows_of(index)[:max_level]]

    def of_levels(values: list, dtype: torch.dtype) -> Tensor:  # (K, ...), of an expert for each point (P, K, ...)
        column = torch.tensor(values, dtype=dtype, device=points.device)
        column = column.reshape(grid.experts, max_level, *column.shape[1:])
        return column[0] if expert is None else column[expert.long()]

    scale = of_levels([row.scale for row in rows], points.dtype)
    multipliers = of_levels([row.multipliers for row in rows], torch.int64)  # (..., K, D)
    size, offset = (of_levels([row[i] for row in rows], torch.int64) for i in (3, 2))
    hashed = of_levels([row.hashed for row in rows], torch.bool)

    position = points[:, None, :] * scale[..., None] + (0.5 if grid.staggered else 0.0)
    position = position.clamp(*FARTHEST)  # (P, K, D)
    lower = position.floor()
    weight = position - lower
    cell = lower.detach().long()
    step = torch.ones_like(cell) if grid.staggered else (weight.detach() > 0).long()  # to the ceiling
    if grid.interpolation == "smoothstep":
        weight = weight.square() * (3 - 2 * weight)
    elif nearest:
        weight = weight * 0

    below, above = cell * multipliers, (cell + step) * multipliers  # (P, K, D)
    ends = [((below[..., d], 1 - weight[..., d]), (above[..., d], weight[..., d])) for d in range(grid.dims)]
    places, factors = [], []  # (P, K), of each corner
    for corner in product(*([lower] if nearest else [lower, upper] for lower, upper in ends)):
        (mixed, factor), *others = corner
        summed = mixed
        for term, share in others:
            mixed, summed, factor = mixed ^ term, summed + term, factor * share
        places.append(torch.where(hashed, mixed, summed).bitwise_and(WORD - 1) % size + offset)
        factors.append(factor)
    index = torch.stack(places, -1)
    entries = table.index_select(0, index.flatten()).view(*index.shape, grid.features)  # (P, K, C, F)
    features = (torch.stack(factors, -1)[..., None] * entries).sum(2).flatten(1)
    return F.pad(features, (0, grid.width - max_level * grid.features))
