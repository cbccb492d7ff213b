"""The errors where the arguments of routing and dispatch do not fit."""

import math

import torch
from torch import Tensor


def check_scores(scores: Tensor, experts_per_token: int, noise: float | None, softmax: bool) -> None:
    """Raise `ValueError` for what `route` cannot rank; logits are looked at where they are read anyway."""
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}; it must be (tokens, experts), with an expert at least"
        )
    if not scores.is_floating_point():
        raise ValueError(f"scores have dtype {scores.dtype}; it must be a floating-point tensor")
    if not 1 <= experts_per_token <= scores.shape[1]:
        raise ValueError(
            f"experts_per_token is {experts_per_token}; with {scores.shape[1]} experts it must be 1 to that"
        )
    if noise is not None and not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise}; it must be 0 at least and finite, or None")
    if not softmax and not torch.compiler.is_compiling() and (scores < 0).any():
        raise ValueError("scores have a negative number; without softmax they are weights, 0 at least")


def check_capacity_factor(capacity_factor: float) -> None:
    """Raise `ValueError` for a factor that gives no capacity."""
    if not -math.inf < capacity_factor < math.inf:
        raise ValueError(f"capacity_factor is {capacity_factor}; it must be finite, and 0 to drop nothing")


def check_indices(expert_index: Tensor, experts: int, gates: Tensor | None, priority: Tensor | None) -> None:
    """Raise `ValueError` for what `assign` cannot count."""
    if expert_index.dim() not in (1, 2) or (expert_index.dim() == 2 and expert_index.shape[0] == 0):
        raise ValueError(
            f"expert_index has shape {tuple(expert_index.shape)}; it must be (tokens) or (choices, tokens)"
        )
    if expert_index.is_floating_point() or expert_index.is_complex() or expert_index.dtype == torch.bool:
        raise ValueError(f"expert_index has dtype {expert_index.dtype}; it must be an integer tensor")
    if experts < 1:
        raise ValueError(f"experts is {experts}; it must be 1 at least")
    given = (("gates", gates, expert_index.shape), ("priority", priority, expert_index.shape[-1:]))
    for name, tensor, shape in given:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; with this expert_index it must be {tuple(shape)}"
            )
        if tensor is not None and tensor.device != expert_index.device:
            raise ValueError(f"{name} is on {tensor.device} and expert_index on {expert_index.device}; use one device")
    if priority is not None and not torch.compiler.is_compiling() and priority.isnan().any():
        raise ValueError("priority has a NaN; every token needs a rank")
    if torch.compiler.is_compiling() or expert_index.numel() == 0:
        return
    low, high = (int(x) for x in expert_index.aminmax())
    if low < 0 or high >= experts:
        raise ValueError(
            f"expert_index holds {low if low < 0 else high}; with {experts} experts it must be 0 to {experts - 1}"
        )


def check_tokens(tokens: Tensor, indices: Tensor) -> None:
    """Raise `ValueError` for tokens that are not those of the routing."""
    if tokens.dim() != 2 or tokens.shape[0] != indices.shape[1]:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; with this routing it must be ({indices.shape[1]}, channels)"
        )
    if tokens.device != indices.device:
        raise ValueError(
            f"tokens are on {tokens.device} and the routing on {indices.device}; they must be on one device"
        )


def check_combination(expert_output: Tensor, gates: Tensor | None, indices: Tensor) -> None:
    """Raise `ValueError` for outputs or gates that are not those of the routing."""
    if expert_output.dim() != 2 or expert_output.shape[0] != indices.numel():
        raise ValueError(
            f"expert_output has shape {tuple(expert_output.shape)}; with this routing it must be "
            f"({indices.numel()}, channels)"
        )
    if not expert_output.is_floating_point():
        raise ValueError(f"expert_output has dtype {expert_output.dtype}; it must be a floating-point tensor")
    if gates is not None and gates.shape != indices.shape:
        raise ValueError(f"gates have shape {tuple(gates.shape)}; with this routing it must be {tuple(indices.shape)}")
    for name, tensor in (("expert_output is", expert_output), ("gates are", gates)):
        if tensor is not None and tensor.device != indices.device:
            raise ValueError(
                f"{name} on {tensor.device} and the routing on {indices.device}; they must be on one device"
            )


def check_grouped(rows: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> None:
    """Raise `ValueError` for what `grouped_linear` cannot multiply."""
    if rows.dim() != 2 or weight.dim() != 3 or rows.shape[1] != weight.shape[1]:
        raise ValueError(
            f"rows have shape {tuple(rows.shape)} and weight {tuple(weight.shape)}; "
            "they must be (rows, in) and (experts, in, out)"
        )
    experts, _, width = weight.shape
    if bias is not None and bias.shape != (experts, width):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; with this weight it must be {(experts, width)}")
    if starts.shape != (experts + 1,) or starts.dtype != torch.int64:
        raise ValueError(
            f"starts has shape {tuple(starts.shape)} and dtype {starts.dtype}; with {experts} experts it must be "
            f"({experts + 1},) and torch.int64"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.device, tensor.dtype) != (rows.device, rows.dtype):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} and rows {rows.dtype} on {rows.device}; use one of each"
            )
