"""The native and Triton scans as PyTorch operators: fake kernels, gradients, autocast.

`logit_normalizer` 0 means that the gates are log decays already. Each backend's module has the four functions called
here, with these signatures. Gradients of gradients are not defined; use the `torch` backend for them.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor


def _kernels(backend: str) -> ModuleType:
    return import_module(f"kernels.gated_scan.{backend}")


def _state_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


@torch.library.custom_op("gated_vision::bidirectional_gated_scan", mutates_args=())
def bidirectional_gated_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_forward: Tensor,
    gate_backward: Tensor,
    scale: float,
    logit_normalizer: float,
    backend: str,
) -> Tensor:
    function = _kernels(backend).bidirectional_forward
    return function(query, key, value, gate_forward, gate_backward, scale, logit_normalizer)


@bidirectional_gated_scan.register_fake
def _(query, key, value, gate_forward, gate_backward, scale, logit_normalizer, backend):
    return value.new_empty(value.shape)


@torch.library.custom_op("gated_vision::bidirectional_gated_scan_backward", mutates_args=())
def bidirectional_gated_scan_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_forward: Tensor,
    gate_backward: Tensor,
    scale: float,
    logit_normalizer: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    function = _kernels(backend).bidirectional_backward
    return function(grad_output, query, key, value, gate_forward, gate_backward, scale, logit_normalizer)


@bidirectional_gated_scan_backward.register_fake
def _(grad_output, query, key, value, gate_forward, gate_backward, scale, logit_normalizer, backend):
    return tuple(t.new_empty(t.shape) for t in (query, key, value, gate_forward, gate_backward))


def _save_bidirectional(ctx, inputs, output):
    *tensors, ctx.scale, ctx.logit_normalizer, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _bidirectional_gradients(ctx, grad_output):
    gradients = bidirectional_gated_scan_backward(
        grad_output, *ctx.saved_tensors, ctx.scale, ctx.logit_normalizer, ctx.backend
    )
    return *gradients, None, None, None


bidirectional_gated_scan.register_autograd(_bidirectional_gradients, setup_context=_save_bidirectional)


@torch.library.custom_op("gated_vision::gated_scan", mutates_args=())
def gated_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    initial_state: Tensor | None,
    scale: float,
    logit_normalizer: float,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _kernels(backend).scan_forward(query, key, value, gate, initial_state, scale, logit_normalizer, reverse)


@gated_scan.register_fake
def _(query, key, value, gate, initial_state, scale, logit_normalizer, reverse, backend):
    batch, _, heads, key_dim = query.shape
    state_dtype = _state_dtype(query, key, value, gate, initial_state)
    return value.new_empty(value.shape), value.new_empty((batch, heads, key_dim, value.shape[3]), dtype=state_dtype)


@torch.library.custom_op("gated_vision::gated_scan_backward", mutates_args=())
def gated_scan_backward(
    grad_output: Tensor,
    grad_final_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    initial_state: Tensor | None,
    scale: float,
    logit_normalizer: float,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    function = _kernels(backend).scan_backward
    tensors = (grad_output, grad_final_state, query, key, value, gate, initial_state)
    return function(*tensors, scale, logit_normalizer, reverse)


@gated_scan_backward.register_fake
def _(grad_output, grad_final_state, query, key, value, gate, initial_state, scale, logit_normalizer, reverse, backend):
    state = grad_final_state if initial_state is None else initial_state
    return tuple(t.new_empty(t.shape) for t in (query, key, value, gate, state))


def _save_scan(ctx, inputs, output):
    *tensors, ctx.scale, ctx.logit_normalizer, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _scan_gradients(ctx, grad_output, grad_final_state):
    *gradients, grad_initial_state = gated_scan_backward(
        grad_output, grad_final_state, *ctx.saved_tensors, ctx.scale, ctx.logit_normalizer, ctx.reverse, ctx.backend
    )
    if ctx.saved_tensors[-1] is None:
        grad_initial_state = None
    return *gradients, grad_initial_state, None, None, None, None


gated_scan.register_autograd(_scan_gradients, setup_context=_save_scan)
