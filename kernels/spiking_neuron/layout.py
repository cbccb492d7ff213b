"""How the kernels see tensors: as (time steps, neurons), the neurons in the order in which the current holds them.

A neuron knows nothing of its neighbours. So their order is free, and a map in channels-last memory is read and written
as it lies.
"""

import torch
from torch import Tensor


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """In which dtype membranes are kept."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def new_steps(current: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory for a tensor like `current`: dense, time first, the neurons in its order."""
    return torch.empty_like(current[0].expand_as(current), dtype=dtype)


def new_state(current: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for one number a neuron, in the order of `current`."""
    return torch.empty_like(current[0], dtype=dtype)


class Neurons:
    """The order of the neurons of a tensor that `new_steps` made."""

    def __init__(self, like: Tensor) -> None:
        sizes, strides = like.shape[1:], like.stride()[1:]
        # Dimensions of size 1 have strides of no meaning.
        self._order = sorted(range(len(sizes)), key=lambda d: -strides[d] if sizes[d] > 1 else -float("inf"))

    def steps(self, tensor: Tensor) -> Tensor:
        """`tensor` (T, ...) as (T, neurons), copied where it lies in another order."""
        return tensor.permute(0, *(1 + d for d in self._order)).reshape(tensor.shape[0], tensor.shape[1:].numel())

    def state(self, tensor: Tensor) -> Tensor:
        """`tensor` (...) as (neurons,), copied where it lies in another order."""
        return tensor.permute(self._order).reshape(tensor.numel())
