"""How features lie in memory: those of one kind side by side, and in large pages."""

import ctypes
import mmap
import sys
from functools import cache

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """In which dtype features are computed and gradients added up."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def new_features(table: Tensor, count: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory (count, width): a transposed view, so that a kind of feature lies together."""
    features = table.new_empty((width, count), dtype=dtype)
    advise_huge_pages(features)
    return features.t()


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask the system for pages of 2 MiB under fresh CPU memory: fewer faults, and random rows miss fewer translations.

    Does nothing for small tensors, under tracing, and where the system has no such advice.
    """
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.device.type != "cpu":
        return
    begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - begin) // HUGE_PAGE * HUGE_PAGE
    if length > 0 and (advise := _madvise()) is not None:
        advise(begin, length, mmap.MADV_HUGEPAGE)


@cache
def _madvise():
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
