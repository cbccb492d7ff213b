"""The definition: expert by expert, level by level, corner by corner, differentiated by autograd."""

from itertools import product

import torch
from torch import Tensor

from kernels.hash_encoding.grid import WORD, HashGrid, Level

FARTHEST = (-(2.0**31), 2.0**31 - 128)  # positions: what int32 holds and float32 has


def hash_encoding(points: Tensor, table: Tensor, grid: HashGrid, expert: Tensor | None, max_level: int) -> Tensor:
    """Tensors of one dtype, nothing gated; the rest as `kernels.hash_encoding.hash_encoding`."""
    features = no_features(points, table, grid)
    for index in range(grid.experts):
        chosen = torch.arange(len(points), device=points.device)
        chosen = chosen if expert is None else chosen[expert == index]
        levels = [_level(points[chosen], table, row, grid) for row in grid.rows_of(index)[:max_level]]
        if levels:
            columns = torch.arange(max_level * grid.features, device=points.device)
            features = features.index_put((chosen[:, None], columns), torch.cat(levels, 1))
    return features


def no_features(points: Tensor, table: Tensor, grid: HashGrid) -> Tensor:
    """Zeros (P, L F) whose gradients are zeros."""
    return (points[:, :1] * 0 + table[0, 0] * 0).expand(-1, grid.width)


def _level(points: Tensor, table: Tensor, level: Level, grid: HashGrid) -> Tensor:
    position = (points * level.scale + (0.5 if grid.staggered else 0.0)).clamp(*FARTHEST)
    lower = position.floor()
    weight = position - lower
    cell = lower.detach().long()
    step = 1 if grid.staggered else (weight.detach() > 0).long()  # to the ceiling
    if grid.interpolation == "smoothstep":
        weight = weight.square() * (3 - 2 * weight)
    if grid.interpolation == "nearest":
        weight = weight * 0
    features = 0
    for corner in product((0, 1), repeat=grid.dims):
        vertex = cell + step * torch.tensor(corner, device=cell.device)
        factors = torch.where(torch.tensor(corner, device=cell.device) > 0, weight, 1 - weight)
        factor = factors[:, 0]
        for d in range(1, grid.dims):
            factor = factor * factors[:, d]
        features = features + factor[:, None] * table[level.offset + slot(vertex, level)]
        if grid.interpolation == "nearest":
            break
    return features


def slot(vertex: Tensor, level: Level) -> Tensor:
    """Row, in its level, of vertices (..., D), int64."""
    terms = [vertex[..., d] * multiplier for d, multiplier in enumerate(level.multipliers)]
    index = terms[0]
    for term in terms[1:]:
        index = index ^ term if level.hashed else index + term
    return index % WORD % level.size  # the low 32 bits of wrapping 64-bit integers are those of 32-bit ones
