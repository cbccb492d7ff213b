"""The native layers as PyTorch operators: fake kernels and gradients.

Gradients of gradients are not defined; use the `torch` backend for them.
"""

import torch
from torch import Tensor

from kernels.fused_layers import native


@torch.library.custom_op("gated_vision::rms_norm", mutates_args=(), device_types="cpu")
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return native.rms_norm(x, weight, eps, dtype)


@rms_norm.register_fake
def _(x, weight, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("gated_vision::rms_norm_backward", mutates_args=(), device_types="cpu")
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return native.rms_norm_backward(grad, x, weight, eps)


@rms_norm_backward.register_fake
def _(grad, x, weight, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_rms_norm(ctx, inputs, output):
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_gradients(ctx, grad):
    return *rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None, None


rms_norm.register_autograd(_rms_norm_gradients, setup_context=_save_rms_norm)


@torch.library.custom_op("gated_vision::swiglu", mutates_args=(), device_types="cpu")
def swiglu(x: Tensor) -> Tensor:
    return native.swiglu(x)


@swiglu.register_fake
def _(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("gated_vision::swiglu_backward", mutates_args=(), device_types="cpu")
def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return native.swiglu_backward(grad, x)


@swiglu_backward.register_fake
def _(grad, x):
    return x.new_empty(x.shape)


def _save_swiglu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx, grad):
    return swiglu_backward(grad, *ctx.saved_tensors)


swiglu.register_autograd(_swiglu_gradient, setup_context=_save_swiglu)


@torch.library.custom_op("gated_vision::depthwise_convolution", mutates_args=(), device_types="cpu")
def depthwise_convolution(x: Tensor, weight: Tensor, activate: bool, dtype: torch.dtype) -> Tensor:
    return native.depthwise_convolution(x, weight, activate, dtype)


@depthwise_convolution.register_fake
def _(x, weight, activate, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("gated_vision::depthwise_convolution_backward", mutates_args=(), device_types="cpu")
def depthwise_convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, activate: bool) -> tuple[Tensor, Tensor]:
    return native.depthwise_convolution_backward(grad, x, weight, activate)


@depthwise_convolution_backward.register_fake
def _(grad, x, weight, activate):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_convolution(ctx, inputs, output):
    x, weight, ctx.activate, _ = inputs
    ctx.save_for_backward(x, weight)


def _convolution_gradients(ctx, grad):
    return *depthwise_convolution_backward(grad, *ctx.saved_tensors, ctx.activate), None, None


depthwise_convolution.register_autograd(_convolution_gradients, setup_context=_save_convolution)


@torch.library.custom_op("gated_vision::gated_norm_mix", mutates_args=(), device_types="cpu")
def gated_norm_mix(
    scan: Tensor,
    local: Tensor,
    gate_logits: Tensor,
    scan_weight: Tensor,
    local_weight: Tensor,
    eps: float,
    activate: bool,
) -> Tensor:
    return native.gated_norm_mix(scan, local, gate_logits, scan_weight, local_weight, eps, activate)


@gated_norm_mix.register_fake
def _(scan, local, gate_logits, scan_weight, local_weight, eps, activate):
    return scan.new_empty(scan.shape)


@torch.library.custom_op("gated_vision::gated_norm_mix_backward", mutates_args=(), device_types="cpu")
def gated_norm_mix_backward(
    grad: Tensor,
    scan: Tensor,
    local: Tensor,
    gate_logits: Tensor,
    scan_weight: Tensor,
    local_weight: Tensor,
    eps: float,
    activate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return native.gated_norm_mix_backward(grad, scan, local, gate_logits, scan_weight, local_weight, eps, activate)


@gated_norm_mix_backward.register_fake
def _(grad, scan, local, gate_logits, scan_weight, local_weight, eps, activate):
    return tuple(t.new_empty(t.shape) for t in (scan, local, gate_logits, scan_weight, local_weight))


def _save_mix(ctx, inputs, output):
    *tensors, ctx.eps, ctx.activate = inputs
    ctx.save_for_backward(*tensors)


def _mix_gradients(ctx, grad):
    return *gated_norm_mix_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.activate), None, None


gated_norm_mix.register_autograd(_mix_gradients, setup_context=_save_mix)
