"""What the gated scan's arguments must be, and the errors where they are not."""

import math
from typing import NoReturn

import torch
from torch import Tensor


def check_arguments(
    query: Tensor, key: Tensor, value: Tensor, decays: dict[str, Tensor], scale: float | None, normalizer: float | None
) -> float:
    """Raise `ValueError` for arguments that do not fit; return the scale to use."""
    if query.dim() != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}; it must be (batch, tokens, heads, key_dim)")
    if value.dim() != 4:
        raise ValueError(f"value has shape {tuple(value.shape)}; it must be (batch, tokens, heads, value_dim)")
    check_tensor("query", query, tuple(query.shape), query)
    check_tensor("key", key, tuple(query.shape), query)
    check_tensor("value", value, (*query.shape[:3], value.shape[3]), query)
    for name, decay in decays.items():
        check_tensor(name, decay, tuple(query.shape), query)
    if normalizer is not None and not 0 < normalizer < math.inf:
        raise ValueError(f"logit_normalizer is {normalizer}; it must be positive (ViG uses 16), or None for log decays")
    if scale is not None and not torch.compiler.is_compiling() and scale != scale:
        raise ValueError("scale is NaN; it must be a number, or None for key_dim ** -0.5")
    return float(max(query.shape[3], 1)) ** -0.5 if scale is None else float(scale)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], query: Tensor) -> None:
    """Raise `ValueError` unless `tensor` has this shape, a floating-point dtype, and the device of `query`."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with query {tuple(query.shape)} it must be {shape}")
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device} and query on {query.device}; they must be on one device")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")


def check_decays(decays: dict[str, Tensor]) -> None:
    """Raise `ValueError` if a log decay is positive or NaN; a GPU waits for the answer. Traces are not checked."""
    if torch.compiler.is_compiling():
        return
    for name, decay in decays.items():
        if decay.numel() and not bool((decay.detach() <= 0).all()):
            raise_for_decay(name, decay)


def raise_for_decay(name: str, decay: Tensor) -> NoReturn:
    """Raise the `ValueError` for a tensor that holds a positive or NaN log decay."""
    held = "NaN" if bool(decay.isnan().any()) else f"{decay.max().item():g}"
    raise ValueError(f"{name} holds {held}; log decays must be <= 0 and not NaN")
