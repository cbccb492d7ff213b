"""The native and Triton linear attentions as PyTorch operators, with fake kernels and gradients.

Each backend's module has the two functions called here. The operator returns, besides the output, what its gradient
needs: the state (B, heads, D, V) and the sums of keys and of values, (B, heads, D + V). Gradients of gradients are not
defined; use the `torch` backend for them.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from kernels.linear_attention.arguments import Settings


def _kernels(backend: str) -> ModuleType:
    return import_module(f"kernels.linear_attention.{backend}")


def sum_dtype(*tensors: Tensor | None) -> torch.dtype:
    """In which dtype features and sums are kept."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


@torch.library.custom_op("gated_vision::linear_attention", mutates_args=())
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor | None,
    value_gate: Tensor | None,
    feature_map: str | None,
    normalization: str,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = Settings(feature_map, normalization, eps)
    return _kernels(backend).forward(query, key, value, key_gate, value_gate, settings)


@linear_attention.register_fake
def _(query, key, value, key_gate, value_gate, *settings_and_backend):
    batch, queries, heads, head_dim = query.shape
    value_dim, dtype = value.shape[3], sum_dtype(query, key, value, key_gate, value_gate)
    return (
        value.new_empty((batch, queries, heads, value_dim)),
        value.new_empty((batch, heads, head_dim, value_dim), dtype=dtype),
        value.new_empty((batch, heads, head_dim + value_dim), dtype=dtype),
    )


@torch.library.custom_op("gated_vision::linear_attention_with_convolution", mutates_args=(), device_types="cpu")
def linear_attention_with_convolution(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor | None,
    value_gate: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    feature_map: str | None,
    normalization: str,
    eps: float,
) -> Tensor:
    """Native only, without a gradient."""
    settings, grid = Settings(feature_map, normalization, eps), (height, width)
    kernels = _kernels("native")
    return kernels.forward_with_convolution(query, key, value, key_gate, value_gate, x, weight, bias, grid, settings)


@linear_attention_with_convolution.register_fake
def _(query, key, value, key_gate, value_gate, x, *convolution_and_settings):
    return value.new_empty(x.shape)


@torch.library.custom_op("gated_vision::linear_attention_backward", mutates_args=())
def linear_attention_backward(
    grad_output: Tensor,
    state: Tensor,
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor | None,
    value_gate: Tensor | None,
    feature_map: str | None,
    normalization: str,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and both gates; a gate that is None has an empty one."""
    settings = Settings(feature_map, normalization, eps)
    return _kernels(backend).backward(grad_output, state, sums, query, key, value, key_gate, value_gate, settings)


@linear_attention_backward.register_fake
def _(grad_output, state, sums, query, key, value, key_gate, value_gate, *settings_and_backend):
    of_gates = (state.new_empty(0) if gate is None else gate.new_empty(gate.shape) for gate in (key_gate, value_gate))
    return *(t.new_empty(t.shape) for t in (query, key, value)), *of_gates


def _save(ctx, inputs, output):
    query, key, value, key_gate, value_gate, *ctx.settings_and_backend = inputs
    _, state, sums = output
    ctx.save_for_backward(state, sums, query, key, value, key_gate, value_gate)
    ctx.set_materialize_grads(False)  # nobody but this gradient reads state and sums


def _gradients(ctx, grad_output, grad_state, grad_sums):
    if grad_output is None:
        return (None,) * 9
    gates = ctx.saved_tensors[5:]
    *gradients, grad_key_gate, grad_value_gate = linear_attention_backward(
        grad_output, *ctx.saved_tensors, *ctx.settings_and_backend
    )
    of_gates = (
        None if gate is None else gradient
        for gate, gradient in zip(gates, (grad_key_gate, grad_value_gate), strict=True)
    )
    return *gradients, *of_gates, None, None, None, None


linear_attention.register_autograd(_gradients, setup_context=_save)
