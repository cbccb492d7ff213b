"""Weights that are loaded: how, whether they are numbers, and where they begin in memory."""

from diffusers.utils import is_accelerate_available
from torch import nn

ALIGNMENT = 64  # bytes, of PyTorch's allocator


def quiet_loading() -> dict[str, bool]:
    """Options of diffusers' `from_pretrained` to which it falls back without accelerate, but not silently."""
    return {} if is_accelerate_available() else {"low_cpu_mem_usage": False}


def not_finite(module: nn.Module) -> str | None:
    """The name of a parameter or buffer that holds NaN or infinity, None if none does."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors = {
        name: tensor.detach() for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()
    }
    # One number is looked at, so that a GPU is waited for once.
    if nn.utils.get_total_norm(tensors.values(), norm_type=float("inf")).isfinite():
        return None
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def align(module: nn.Module) -> None:
    """Copy weights that lie in a mapped file, at any byte, to where they would lie in a new model.

    The last bits of matrix products depend on it on CPU, and a model that is loaded shall draw what it drew when it was
    saved.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
