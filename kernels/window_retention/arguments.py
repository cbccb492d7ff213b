"""The settings of a window retention, and the errors where they or the tensors do not fit."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = ("softmax", "sigmoid")
NORMALIZATIONS = ("clamp", "sum", "none")


@dataclass(frozen=True)
class Settings:
    """What `window_retention` takes besides its tensors; `slopes` is empty where there are none."""

    log_decay: tuple[float, ...]
    slopes: tuple[float, ...]
    window: tuple[int, int]
    shift: tuple[int, int]
    activation: str
    normalization: str
    signed_slopes: bool
    rotary: bool
    scale: float

    def as_arguments(self) -> tuple[Any, ...]:
        """The fields in order, for an operator, which takes no dataclass."""
        return astuple(self)


def as_pair(name: str, sides: tuple[int, int]) -> tuple[int, int]:
    """`sides` as two integers, or `ValueError`."""
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(isinstance(s, int | torch.SymInt) for s in sides):
        raise ValueError(f"{name} is {sides!r}; it is a pair of integers, (rows, columns)")
    return sides[0], sides[1]


def check_arguments(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> None:
    """Raise `ValueError` for what does not fit."""
    if query.dim() != 5:
        raise ValueError(f"query has shape {tuple(query.shape)}; it must be (batch, height, width, heads, head_dim)")
    if value.dim() != 5:
        raise ValueError(f"value has shape {tuple(value.shape)}; it must be (batch, height, width, heads, value_dim)")
    expected = {"query": query.shape, "key": query.shape, "value": (*query.shape[:4], value.shape[4])}
    for (name, shape), tensor in zip(expected.items(), (query, key, value), strict=True):
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; with query {tuple(query.shape)} it must be {tuple(shape)}"
            )
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} and query on {query.device}; they must be on one device")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")
    if settings.rotary and query.shape[4] % 2:
        raise ValueError(
            f"query has head_dim {query.shape[4]}; rotary turns channels in pairs: make it even, or rotary=False"
        )
    _check_options(settings, heads=query.shape[3])
    _check_windows(settings, query.shape[1:3])


def _check_options(settings: Settings, heads: int) -> None:
    for name, choices in (("activation", ACTIVATIONS), ("normalization", NORMALIZATIONS)):
        if (chosen := getattr(settings, name)) not in choices:
            raise ValueError(f"{name} is {chosen!r}; valid are {', '.join(map(repr, choices))}")
    if settings.activation == "softmax" and settings.slopes:
        raise ValueError("slopes are given with activation 'softmax'; they belong to 'sigmoid', use None")
    if len(settings.log_decay) != heads:
        raise ValueError(f"log_decay has {len(settings.log_decay)} entries; query has {heads} heads, one entry each")
    if settings.slopes and len(settings.slopes) != heads:
        raise ValueError(f"slopes has {len(settings.slopes)} entries; query has {heads} heads, one entry each")
    if torch.compiler.is_compiling():
        return
    for decay in settings.log_decay:
        if not -math.inf < decay <= 0:
            raise ValueError(f"log_decay holds {decay}; natural logarithms of decays are finite and <= 0")
    for name, numbers in (("slopes", settings.slopes), ("scale", (settings.scale,))):
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{name} is {numbers}; it must be finite")


def _check_windows(settings: Settings, size: tuple[int, int]) -> None:
    for axis, length, window, shift in zip(("rows", "columns"), size, settings.window, settings.shift, strict=True):
        if not 1 <= window <= max(length, 1):
            raise ValueError(
                f"window is {settings.window}, but the map has {length} {axis}; valid are 1 to {max(length, 1)}"
            )
        if not 0 <= shift < window:
            raise ValueError(f"shift is {settings.shift} with window {settings.window}; valid are 0 to {window - 1}")
