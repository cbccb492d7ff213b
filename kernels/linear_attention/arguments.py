"""The settings of a linear attention, and the errors where they or the tensors do not fit."""

import math
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS = ("relu", None)
NORMALIZATIONS = ("division", "subtraction")


@dataclass(frozen=True)
class Settings:
    """What `linear_attention` takes besides its tensors."""

    feature_map: str | None
    normalization: str
    eps: float

    def as_arguments(self) -> tuple[Any, ...]:
        """The fields in order, for an operator, which takes no dataclass."""
        return astuple(self)

    @property
    def divides(self) -> bool:
        return self.normalization == "division"

    @property
    def floor(self) -> float:
        """What relu's features are raised by."""
        return self.eps if self.divides else 0.0

    def features(self, x: Tensor) -> Tensor:
        """phi of the operation."""
        if self.feature_map is None:
            return x
        return F.relu(x) + self.eps if self.divides else F.relu(x)


def check_arguments(
    query: Tensor, key: Tensor, value: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, settings: Settings
) -> None:
    """Raise `ValueError` for what does not fit."""
    for name, tensor, form in (
        ("query", query, "(batch, queries, heads, head_dim)"),
        ("key", key, "(batch, keys, heads, head_dim)"),
        ("value", value, "(batch, keys, heads, value_dim)"),
    ):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {form}")
    batch, _, heads, head_dim = query.shape
    tokens = key.shape[1]
    _check_shape("key", key, (batch, tokens, heads, head_dim), f"query {tuple(query.shape)}")
    _check_shape("value", value, (batch, tokens, heads, value.shape[3]), f"key {tuple(key.shape)}")
    tensors = {"query": query, "key": key, "value": value}
    for name, gate in (("key_gate", key_gate), ("value_gate", value_gate)):
        if gate is None:
            continue
        if gate.dim() != 2 or gate.shape[0] not in (1, heads) or gate.shape[1] != tokens:
            raise ValueError(
                f"{name} has shape {tuple(gate.shape)}; with key {tuple(key.shape)} it must be "
                f"(heads, keys) = ({heads}, {tokens}), or (1, {tokens}) for all heads"
            )
        tensors[name] = gate
    _check_kinds(tensors, query)
    _check_options(settings)


def check_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int], query: Tensor, value: Tensor
) -> None:
    """Raise `ValueError` for what does not fit `query` and `value`, which `check_arguments` has passed."""
    batch, queries, heads, _ = query.shape
    channels = heads * value.shape[3]
    beside = f"query {tuple(query.shape)} and value {tuple(value.shape)}"
    _check_shape("x", x, (batch, queries, channels), beside)
    if len(grid) != 2 or min(grid) < 0 or grid[0] * grid[1] > queries:
        raise ValueError(f"grid is {grid}; it must be (rows, columns) of at most {queries} pixels, one for each query")
    size = weight.shape[-1] if weight.dim() else 0
    if size % 2 == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (channels, 1, K, K) with K odd")
    _check_shape("weight", weight, (channels, 1, size, size), beside)
    tensors = {"x": x, "weight": weight}
    if bias is not None:
        _check_shape("bias", bias, (channels,), beside)
        tensors["bias"] = bias
    _check_kinds(tensors, query)


def _check_kinds(tensors: dict[str, Tensor], query: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} and query on {query.device}; they must be on one device")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], beside: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with {beside} it must be {shape}")


def _check_options(settings: Settings) -> None:
    for name, choices in (("feature_map", FEATURE_MAPS), ("normalization", NORMALIZATIONS)):
        if (chosen := getattr(settings, name)) not in choices:
            raise ValueError(f"{name} is {chosen!r}; valid are {', '.join(map(repr, choices))}")
    if torch.compiler.is_compiling():
        return
    if not 0 < settings.eps < math.inf:
        raise ValueError(f"eps is {settings.eps}; it must be positive and finite")
