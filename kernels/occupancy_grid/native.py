"""Calls the CPU kernel of `native.cpp`: once to find and count the samples, and again to write them."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels.native import library

NO_MEMORY = 1  # an outcome
BLOCK = 4  # cells a side of a block that is skipped if it is empty, as in native.cpp
MOST_LEVELS = 32


class Problem(ctypes.Structure):
    """`struct Problem` of native.cpp."""

    _fields_ = (
        ("rays", ctypes.c_int64),
        ("levels", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 3),
        ("blocks", ctypes.c_int64 * 3),
        ("step", ctypes.c_double),
        ("cone_angle", ctypes.c_double),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "origins", "directions", "near", "far", "jitter", "box", "occupied", "occupied_blocks", "offsets",
                "start", "end",
            )
        ),
    )  # fmt: skip


@cache
def _function():
    function = library("occupancy_grid/native.cpp").occupancy_march
    function.argtypes = (ctypes.POINTER(Problem), ctypes.c_int)
    function.restype = ctypes.c_int
    return function


def march(
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    jitter: Tensor,
    occupied: Tensor,
    box: Tensor,
    step: float,
    cone_angle: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.occupancy_grid.lattice.march`.

    Raises:
        ValueError: there are more levels than a kernel takes.
    """
    rays, (levels, *sizes) = origins.shape[0], occupied.shape
    if levels > MOST_LEVELS:
        raise ValueError(f"occupied has {levels} levels; the native backend takes up to {MOST_LEVELS}")
    blocks = [-(-size // BLOCK) for size in sizes]
    tensors = {
        "origins": origins, "directions": directions, "near": near, "far": far, "jitter": jitter, "box": box,
        "occupied": occupied,
    }  # fmt: skip
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    tensors["occupied_blocks"] = occupied.new_zeros(levels, *blocks)
    offsets = tensors["offsets"] = torch.empty(rays + 1, dtype=torch.int64)
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    problem = Problem(rays, levels, (*sizes,), (*blocks,), step, cone_angle, **pointers)
    threads = torch.get_num_threads()
    if _function()(problem, threads) == NO_MEMORY:
        raise MemoryError(f"occupancy_grid: no memory for the samples of {rays} rays")
    start, end = (origins.new_empty(int(offsets[-1])) for _ in range(2))
    if start.numel():
        problem.start, problem.end = start.data_ptr(), end.data_ptr()
        _function()(problem, threads)
    return start, end, offsets
