"""Calls the CPU kernels of `native.cpp`."""

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.native import NativeTensor, library, native_tensor, readable
from kernels.window_retention import tables
from kernels.window_retention.arguments import Settings

LANE_TOKENS = 8  # of tiles.h
FORMS = (("softmax", None), ("sigmoid", "clamp"), ("sigmoid", "sum"), ("sigmoid", "none"))  # `enum Form` of passes.h
NO_MEMORY = 1  # an outcome


class Problem(ctypes.Structure):
    """`struct Problem` of native.cpp."""

    _fields_ = (
        ("sizes", ctypes.c_int64 * 4),
        ("window", ctypes.c_int64 * 2),
        ("runs", ctypes.c_int64 * 2),
        ("bounds", ctypes.POINTER(ctypes.c_int64) * 2),
        ("log_decay", ctypes.POINTER(ctypes.c_double)),
        ("slopes", ctypes.POINTER(ctypes.c_double)),
        ("form", ctypes.c_int32),
        ("signed_slopes", ctypes.c_int32),
        ("scale", ctypes.c_double),
        ("rotation", ctypes.c_void_p * 2),
        ("query", NativeTensor),
        ("key", NativeTensor),
        ("value", NativeTensor),
        ("output", NativeTensor),
        ("grad_output", NativeTensor),
        ("grad_query", NativeTensor),
        ("grad_key", NativeTensor),
        ("grad_value", NativeTensor),
    )


@cache
def _function(name: str):
    function = getattr(library("window_retention/native.cpp"), name)
    function.argtypes = (ctypes.POINTER(Problem), ctypes.c_int, ctypes.c_int)
    function.restype = ctypes.c_int
    return function


def forward(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    """Arguments and result as in `kernels.window_retention.window_retention`; the result is contiguous."""
    if value.numel() == 0:
        return value.new_zeros(value.shape)
    output = _writable(value)
    inputs = {"query": query, "key": key, "value": value}
    _run("window_retention_forward", inputs, {"output": output}, settings)
    return output.to(value.dtype)


def backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous, in their dtypes."""
    tensors = (query, key, value)
    if value.numel() == 0:
        return tuple(t.new_zeros(t.shape) for t in tensors)
    gradients = [_writable(t) for t in tensors]
    inputs = {"query": query, "key": key, "value": value, "grad_output": grad_output}
    outputs = dict(zip(("grad_query", "grad_key", "grad_value"), gradients, strict=True))
    _run("window_retention_backward", inputs, outputs, settings)
    return tuple(gradient.to(t.dtype) for gradient, t in zip(gradients, tensors, strict=True))


def _writable(like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of `like`'s shape in a dtype the kernels write."""
    dtype = torch.float32 if like.dtype == torch.float16 else like.dtype
    return torch.empty(like.shape, dtype=dtype)


def _run(name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor], settings: Settings) -> None:
    """Run a kernel; `outputs` are contiguous and written."""
    inputs = {field: readable(tensor) for field, tensor in inputs.items()}
    batch, height, width, heads, key_dim = inputs["query"].shape
    wide = any(tensor.dtype == torch.float64 for tensor in inputs.values())
    normalization = None if settings.activation == "softmax" else settings.normalization
    problem = Problem(
        sizes=(batch, heads, key_dim, inputs["value"].shape[4]),
        window=settings.window,
        log_decay=(ctypes.c_double * heads)(*settings.log_decay),
        form=FORMS.index((settings.activation, normalization)),
        signed_slopes=settings.signed_slopes,
        scale=settings.scale,
    )
    if settings.slopes:
        problem.slopes = (ctypes.c_double * heads)(*settings.slopes)
    for axis, length in enumerate((height, width)):
        bounds = _bounds(length, settings.window[axis], settings.shift[axis])
        problem.runs[axis], problem.bounds[axis] = len(bounds) - 1, bounds
    if settings.rotary and key_dim:
        rotations = [_rotation(settings.window, key_dim, turned, wide) for turned in (False, True)]
        problem.rotation = tuple(rotation.data_ptr() for rotation in rotations)
    for field, tensor in (inputs | outputs).items():
        setattr(problem, field, native_tensor(tensor))
    if _function(name)(problem, wide, torch.get_num_threads()) == NO_MEMORY:
        raise MemoryError(f"{name}: no memory for the workspace of windows {settings.window}")


@cache
def _bounds(length: int, window: int, shift: int) -> ctypes.Array:
    """Where each run begins, and where the last ends."""
    starts = [start for start, _ in tables.runs(length, window, shift)]
    return (ctypes.c_int64 * (len(starts) + 1))(*starts, length)


def _rotation(window: tuple[int, int], head_dim: int, turned: bool, wide: bool) -> Tensor:
    """Cosines and sines of a window as tiles of native.cpp: (2, rows, tiles in a row, pairs in whole fours, 8).

    If `turned`, its columns take the place of its rows.
    """
    like = torch.empty(0, dtype=torch.float64 if wide else torch.float32)

    def build() -> Tensor:
        table = torch.stack(tables.rotary_table(*window, head_dim, like))
        table = table.transpose(1, 2) if turned else table
        table = F.pad(table, (0, -table.shape[3] % 4, 0, -table.shape[2] % LANE_TOKENS))
        return table.unflatten(2, (-1, LANE_TOKENS)).transpose(3, 4).contiguous()

    return tables.constant(("rotation tiles", window, head_dim, turned), build, like)
