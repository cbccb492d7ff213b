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
    """Uninitialised memory for a tensor like `current`: dense, time first, the neurons in its order.

    Raises:
        ValueError: there is no time step.
    """
    if current.shape[0] == 0:
        raise ValueError(f"current has shape {tuple(current.shape)}; the kernels take one time step at least")
    return torch.empty_like(current[0].expand_as(current), dtype=dtype)


def new_state(output: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for one number a neuron, in the order of `output`, which `new_steps` made.

    The order is taken from there: of an input whose strides are 0, PyTorch chooses one anew with every call.
    """
    return torch.empty_like(output[0], dtype=dtype)


class Neurons:
    """The order of the neurons of an output, which `new_steps` made."""

    def __init__(self, output: Tensor) -> None:
        sizes, strides = output.shape[1:], output.stride()[1:]
        # Dimensions of size 1 have strides of no meaning.
        self._order = sorted(range(len(sizes)), key=lambda d: -strides[d] if sizes[d] > 1 else -float("inf"))

    def steps(self, tensor: Tensor) -> Tensor:
        """`tensor` (T, ...) as (T, neurons), copied where it lies in another order."""
        return self._ordered_steps(tensor).reshape(tensor.shape[0], tensor.shape[1:].numel())

    def state(self, tensor: Tensor) -> Tensor:
        """`tensor` (...) as (neurons,), copied where it lies in another order."""
        return tensor.permute(self._order).reshape(tensor.numel())

    def written_steps(self, output: Tensor) -> Tensor:
        """`output` (T, ...) as (T, neurons) in the same memory; an error where it lies in another order."""
        return self._ordered_steps(output).view(output.shape[0], output.shape[1:].numel())

    def written_state(self, output: Tensor) -> Tensor:
        """`output` (...) as (neurons,) in the same memory; an error where it lies in another order."""
        return output.permute(self._order).view(output.numel())

    def _ordered_steps(self, tensor: Tensor) -> Tensor:
        return tensor.permute(0, *(1 + d for d in self._order))
