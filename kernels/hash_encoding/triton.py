"""Hash encodings on GPUs: one program a level of a block of points, level after level, so that few tables are read at a
time; rows of constants are looked up for each point of a mixture, and nothing is sorted.

Features of a row are read together. The table's gradient is added up by atomics in float32: in no fixed order, so that
its last bits vary from run to run; everything else is the same every time. The gradients of points and gates are
another kernel, one program for all levels of a block, which runs only where they are wanted. What is not a number
reaches no row of the table but a valid one: see the package.

Precision: float32, positions by one fused operation as in tiny-cuda-nn.

Floor, a prediction and not a measurement: nothing here has been timed or has run on a GPU. A point reads 2^D sectors of
32 bytes a level: 2^18 points, 16 levels in three dimensions: 1.07 GB, 0.36 ms at the 3.0 TB/s of an H100 where nothing
stays in its 50 MB of L2, in which a level of 2^19 rows (4 MB) does; backward twice that.
"""

from functools import cache

import torch
import triton
from torch import Tensor

from kernels.gpu.triton import launch
from kernels.hash_encoding.grid import WORD, HashGrid
from kernels.hash_encoding.layout import new_features
from kernels.hash_encoding.triton_kernels import (
    hash_forward_kernel,
    hash_point_gradient_kernel,
    hash_table_gradient_kernel,
)

# Points of a program, one a thread; tests/kernels/test_triton_compilation.py sees that no register is spilled.
BLOCK, WARPS = 128, 4


def forward(
    points: Tensor, table: Tensor, expert: Tensor | None, gate: Tensor | None, grid: HashGrid, max_level: int
) -> Tensor:
    """Features; arguments as in the operation, none float64."""
    output = new_features(table, points.shape[0], grid.width)
    output[:, max_level * grid.features :].zero_()
    arguments = (table.contiguous(), points, *points.stride(), output.t(), *_of_points(expert, gate))
    _run(hash_forward_kernel, points, grid, max_level, arguments)
    return output


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
    of_points, of_table, of_gate = wanted
    gradient = grad_output.t().contiguous()
    inputs = (gradient, points, *points.stride())
    others = _of_points(expert, gate)
    results = [
        torch.zeros(x.shape, dtype=torch.float32, device=x.device) if wants else None
        for x, wants in zip((points, table, gate), wanted, strict=True)
    ]
    if of_table:
        _run(hash_table_gradient_kernel, points, grid, max_level, (*inputs, results[1], *others))
    if (of_points or of_gate) and max_level:
        arguments = (*inputs, table.contiguous(), results[0], results[2], *others)
        _run(hash_point_gradient_kernel, points, grid, 1, arguments, max_level)
    return tuple(
        points.new_empty(0) if result is None else result.to(x.dtype)
        for result, x in zip(results, (points, table, gate), strict=True)
    )


def _of_points(expert: Tensor | None, gate: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return tuple(None if x is None else x.contiguous() for x in (expert, gate))


@cache
def _constants(grid: HashGrid, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each level of each expert: eight integers (multipliers, size, hashed), scale, first row."""
    integers = []
    for row in grid.rows:
        multipliers = (*row.multipliers, 0, 0)[:4]
        words = (*multipliers, row.size, row.hashed, 0, 0)
        integers.append([word - WORD if word >= WORD // 2 else int(word) for word in words])
    scales, offsets = [row.scale for row in grid.rows], [row.offset for row in grid.rows]
    return (
        torch.tensor(integers, dtype=torch.int32, device=device),
        torch.tensor(scales, dtype=torch.float32, device=device),
        torch.tensor(offsets, dtype=torch.int64, device=device),
    )


def _run(
    kernel: triton.JITFunction, points: Tensor, grid: HashGrid, passes: int, arguments: tuple, *numbers: int
) -> None:
    """Run `passes` programs of `kernel` for each block of points."""
    count = points.shape[0]
    if count == 0 or passes == 0:
        return
    tensors = (*arguments, *_constants(grid, points.device))
    constants = {
        "DIMS": grid.dims,
        "FEATURES": grid.features,
        "STAGGERED": grid.staggered,
        "INTERPOLATION": grid.interpolation,
        "BLOCK": BLOCK,
        "num_warps": WARPS,
    }
    programs = passes * triton.cdiv(count, BLOCK)
    launch(points, kernel, programs, *tensors, count, grid.levels, grid.experts, *numbers, **constants)
