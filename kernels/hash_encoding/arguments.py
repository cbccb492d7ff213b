"""What the arguments must be, and the errors where they are not."""

import torch
from torch import Tensor

from kernels.hash_encoding.grid import HashGrid


def check_arguments(
    points: Tensor, table: Tensor, grid: HashGrid, expert: Tensor | None, gate: Tensor | None, max_level: int | None
) -> None:
    """Raise `ValueError` for what does not fit."""
    if points.dim() != 2 or points.shape[1] != grid.dims:
        raise ValueError(f"points has shape {tuple(points.shape)}; with {grid.dims} dims it must be (P, {grid.dims})")
    if table.shape != (grid.entries, grid.features):
        raise ValueError(
            f"table has shape {tuple(table.shape)}; with this grid it must be {(grid.entries, grid.features)}"
        )
    tensors = {"points": points, "table": table, "expert": expert, "gate": gate}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != points.device:
            raise ValueError(f"{name} is on {tensor.device} and points on {points.device}; they must be on one device")
        if name == "expert":
            if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                raise ValueError(f"expert has dtype {tensor.dtype}; it must be an integer tensor")
        elif not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")
        if name in ("expert", "gate") and tensor.shape != points.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be one number a point, (P,)")
    if expert is None and grid.experts > 1:
        raise ValueError(f"expert is None; a mixture of {grid.experts} grids needs one for each point")
    if max_level is not None and not 0 <= max_level <= grid.levels:
        raise ValueError(f"max_level is {max_level}; it must be 0 to {grid.levels}, or None for all levels")


def check_values(points: Tensor, expert: Tensor | None, grid: HashGrid) -> None:
    """Raise `ValueError` for the first point that is not finite, or expert that does not exist."""
    finite = points.isfinite().all(1)
    if not finite.all():
        raise not_finite(points, int(finite.int().argmin()))
    if expert is not None and expert.numel():
        wrong = (expert < 0) | (expert >= grid.experts)
        if wrong.any():
            raise no_such_expert(expert, int(wrong.int().argmax()), grid)


def not_finite(points: Tensor, row: int) -> ValueError:
    return ValueError(f"points[{row}] is {points[row].tolist()}; points must be finite")


def no_such_expert(expert: Tensor, row: int, grid: HashGrid) -> ValueError:
    return ValueError(f"expert[{row}] is {expert[row].item()}; with {grid.experts} it must be 0 to {grid.experts - 1}")
