"""Calls the CPU kernel of `native.cpp`."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels.hash_encoding.arguments import no_such_expert, not_finite
from kernels.hash_encoding.grid import INTERPOLATIONS, HashGrid
from kernels.hash_encoding.layout import advise_huge_pages, arithmetic_dtype, new_features
from kernels.native import NativeTensor, library, native_tensor, readable

NO_MEMORY, NOT_FINITE, NO_SUCH_EXPERT = 1, 2, 3  # outcomes


class Level(ctypes.Structure):
    """`struct Level` of native.cpp."""

    _fields_ = (
        ("scale", ctypes.c_double),
        ("offset", ctypes.c_int64),
        ("multipliers", ctypes.c_uint32 * 4),
        ("size", ctypes.c_uint32),
        ("hashed", ctypes.c_int32),
    )


class Problem(ctypes.Structure):
    """`struct Problem` of native.cpp."""

    _fields_ = (
        ("points", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("levels", ctypes.c_int64),
        ("active", ctypes.c_int64),
        ("dims", ctypes.c_int32),
        ("features", ctypes.c_int32),
        ("interpolation", ctypes.c_int32),
        ("staggered", ctypes.c_int32),
        ("rows", ctypes.POINTER(Level)),
        ("points_in", NativeTensor),
        ("table", NativeTensor),
        ("gate", NativeTensor),
        ("expert", ctypes.c_void_p),
        ("output", NativeTensor),
        ("grad_output", NativeTensor),
        ("grad_table", NativeTensor),
        ("grad_points", NativeTensor),
        ("grad_gate", NativeTensor),
        ("culprit", ctypes.c_int64),
    )


@cache
def _function():
    function = library("hash_encoding/native.cpp").hash_encoding
    function.argtypes = (ctypes.POINTER(Problem), ctypes.c_int)
    function.restype = ctypes.c_int
    return function


@cache
def _rows(grid: HashGrid) -> ctypes.Array:
    levels = (Level(row.scale, row.offset, row.multipliers, row.size, row.hashed) for row in grid.rows)
    return (Level * len(grid.rows))(*levels)


def forward(
    points: Tensor, table: Tensor, expert: Tensor | None, gate: Tensor | None, grid: HashGrid, max_level: int
) -> Tensor:
    """Features; arguments as in the operation.

    Raises:
        ValueError: a point is not finite, or an expert does not exist.
    """
    memory = _in_memory(table.dtype, arithmetic_dtype(points, table, gate))
    output = new_features(table, points.shape[0], grid.width, memory)
    output[:, max_level * grid.features :].zero_()
    _run(points, table, expert, gate, grid, max_level, output=output.t())
    return output.to(table.dtype)


def backward(
    grad_output: Tensor,
    points: Tensor,
    table: Tensor,
    expert: Tensor | None,
    gate: Tensor | None,
    grid: HashGrid,
    max_level: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of points, table and gate in their dtypes; one that is not wanted is empty."""
    dtype = arithmetic_dtype(points, table, gate)
    gradients = [
        x.new_empty(x.shape, dtype=dtype) if wants else None
        for x, wants in zip((points, table, gate), wanted, strict=True)
    ]
    if wanted[1]:
        advise_huge_pages(gradients[1])
    written = dict(zip(("grad_points", "grad_table", "grad_gate"), gradients, strict=True))
    gradient = grad_output.t().to(dtype).contiguous()
    _run(points, table, expert, gate, grid, max_level, grad_output=gradient, **written)
    return tuple(
        points.new_empty(0) if gradient is None else gradient.to(x.dtype)
        for gradient, x in zip(gradients, (points, table, gate), strict=True)
    )


def _in_memory(dtype: torch.dtype, arithmetic: torch.dtype) -> torch.dtype:
    """The dtype in which the kernel sees a table of `dtype` and its features."""
    return torch.bfloat16 if dtype == torch.bfloat16 and arithmetic == torch.float32 else arithmetic


def _run(
    points: Tensor,
    table: Tensor,
    expert: Tensor | None,
    gate: Tensor | None,
    grid: HashGrid,
    max_level: int,
    **tensors: Tensor | None,
) -> None:
    dtype = arithmetic_dtype(points, table, gate)
    problem = Problem(
        points=points.shape[0],
        experts=grid.experts,
        levels=grid.levels,
        active=max_level,
        dims=grid.dims,
        features=grid.features,
        interpolation=INTERPOLATIONS.index(grid.interpolation),
        staggered=grid.staggered,
        rows=_rows(grid),
    )
    experts = None if expert is None else expert.long().contiguous()
    problem.expert = None if experts is None else experts.data_ptr()
    tensors |= {
        "points_in": readable(points.to(dtype)),
        "table": table.to(_in_memory(table.dtype, dtype)).contiguous(),
        "gate": None if gate is None else gate.to(dtype).contiguous(),
    }
    for name, tensor in tensors.items():
        setattr(problem, name, native_tensor(tensor))
    outcome = _function()(problem, torch.get_num_threads())
    if outcome == NO_MEMORY:
        raise MemoryError(f"hash_encoding: no memory for a sorted copy of {problem.points} points")
    if outcome == NOT_FINITE:
        raise not_finite(points, problem.culprit)
    if outcome == NO_SUCH_EXPERT:
        raise no_such_expert(expert, problem.culprit, grid)
