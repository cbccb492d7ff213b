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


@torch.library.custom_op("gated_vision::gated_product", mutates_args=(), device_types="cpu")
def gated_product(x: Tensor, logits: Tensor, silu: bool) -> Tensor:
    return native.gated_product(x, logits, silu)


@gated_product.register_fake
def _(x, logits, silu):
    return x.new_empty(x.shape)


@torch.library.custom_op("gated_vision::gated_product_backward", mutates_args=(), device_types="cpu")
def gated_product_backward(grad: Tensor, x: Tensor, logits: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    return native.gated_product_backward(grad, x, logits, silu)


@gated_product_backward.register_fake
def _(grad, x, logits, silu):
    return x.new_empty(x.shape), logits.new_empty(logits.shape)


def _save_product(ctx, inputs, output):
    x, logits, ctx.silu = inputs
    ctx.save_for_backward(x, logits)


def _product_gradients(ctx, grad):
    return *gated_product_backward(grad, *ctx.saved_tensors, ctx.silu), None


gated_product.register_autograd(_product_gradients, setup_context=_save_product)


# `add_input` stands for a residual that is x itself: backward then adds its gradient in the same pass.
@torch.library.custom_op("gated_vision::depthwise_convolution", mutates_args=(), device_types="cpu")
def depthwise_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    add_input: bool,
    activate: bool,
    dtype: torch.dtype,
) -> Tensor:
    return native.depthwise_convolution(x, weight, bias, residual, add_input, activate, dtype)


@depthwise_convolution.register_fake
def _(x, weight, bias, residual, add_input, activate, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("gated_vision::depthwise_convolution_backward", mutates_args=(), device_types="cpu")
def depthwise_convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, add_input: bool, activate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return native.depthwise_convolution_backward(grad, x, weight, bias, add_input, activate)


@depthwise_convolution_backward.register_fake
def _(grad, x, weight, bias, add_input, activate):
    like_bias = weight if bias is None else bias
    return x.new_empty(x.shape), weight.new_empty(weight.shape), like_bias.new_empty(weight.shape[:1])


def _save_convolution(ctx, inputs, output):
    x, weight, bias, residual, ctx.add_input, ctx.activate, _ = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, weight, bias)


def _convolution_gradients(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    gradients = depthwise_convolution_backward(grad, x, weight, bias, ctx.add_input, ctx.activate)
    grad_bias = None if bias is None else gradients[2]
    grad_residual = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
    return *gradients[:2], grad_bias, grad_residual, None, None, None


depthwise_convolution.register_autograd(_convolution_gradients, setup_context=_save_convolution)


@torch.library.custom_op("gated_vision::add_image_convolution", mutates_args=(), device_types="cpu")
def add_image_convolution(
    tokens: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int
) -> Tensor:
    out = torch.empty(tokens.shape, dtype=tokens.dtype)
    native.add_image_convolution(tokens, x, weight, bias, (height, width), out)
    return out


@add_image_convolution.register_fake
def _(tokens, x, weight, bias, height, width):
    return tokens.new_empty(tokens.shape)


@torch.library.custom_op("gated_vision::add_image_convolution_", mutates_args=("tokens",), device_types="cpu")
def add_image_convolution_(
    tokens: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int
) -> None:
    """The same into `tokens`, without gradients."""
    native.add_image_convolution(tokens, x, weight, bias, (height, width), tokens)


@torch.library.custom_op("gated_vision::add_image_convolution_backward", mutates_args=(), device_types="cpu")
def add_image_convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    return native.add_image_convolution_backward(grad, x, weight, bias, (height, width))


@add_image_convolution_backward.register_fake
def _(grad, x, weight, bias, height, width):
    like_bias = weight if bias is None else bias
    return x.new_empty(x.shape), weight.new_empty(weight.shape), like_bias.new_empty(weight.shape[:1])


def _save_image_convolution(ctx, inputs, output):
    _, x, weight, bias, *ctx.grid = inputs
    ctx.save_for_backward(x, weight, bias)


def _image_convolution_gradients(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    gradients = add_image_convolution_backward(grad, x, weight, bias, *ctx.grid)
    return grad, *gradients[:2], None if bias is None else gradients[2], None, None


add_image_convolution.register_autograd(_image_convolution_gradients, setup_context=_save_image_convolution)


@torch.library.custom_op("gated_vision::gelu_depthwise_residual", mutates_args=(), device_types="cpu")
def gelu_depthwise_residual(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return native.gelu_depthwise_residual(x, weight, bias, dtype)


@gelu_depthwise_residual.register_fake
def _(x, weight, bias, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("gated_vision::gelu_depthwise_residual_backward", mutates_args=(), device_types="cpu")
def gelu_depthwise_residual_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return native.gelu_depthwise_residual_backward(grad, x, weight)


@gelu_depthwise_residual_backward.register_fake
def _(grad, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def _save_gelu_residual(ctx, inputs, output):
    x, weight, bias, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _gelu_residual_gradients(ctx, grad):
    grad_x, grad_weight, grad_bias = gelu_depthwise_residual_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weight, None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype), None


gelu_depthwise_residual.register_autograd(_gelu_residual_gradients, setup_context=_save_gelu_residual)


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
