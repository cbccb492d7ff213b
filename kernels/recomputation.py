"""Cheap values that backward computes again instead of keeping them: less memory for a training step."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx._symbolic_trace import is_fx_symbolic_tracing


def can_recompute() -> bool:
    """Whether a later backward pass would keep values: gradients are on and nothing is being traced."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_fx_symbolic_tracing()


def linear_of(
    function: Callable[..., Tensor] | nn.Module, tensors: tuple[Tensor, ...], linear: Callable[[Tensor], Tensor]
) -> Tensor:
    """`linear(function(*tensors))`, where backward computes `function` again instead of keeping its result.

    For cheap functions (a norm, a gated unit) whose result nothing but the linear layer needs. Values and gradients
    are those of the plain expression, which also runs wherever recomputing has no use or no meaning: without
    gradients, in traces, where a hook watches, and where `linear` is not a plain `nn.Linear` (packed, quantised,
    wrapped by an adapter).

    Args:
        function: of `tensors` and, if it is a module, of its parameters alone.
        tensors: its arguments.
        linear: the layer.
    """
    watched = [module for module in (function, linear) if isinstance(module, nn.Module)]
    plain = (
        type(linear) is not nn.Linear
        or not can_recompute()
        or any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in watched)
    )
    if plain:
        return linear(function(*tensors))
    if not isinstance(function, nn.Module):
        return _LinearOf.apply(function, linear.weight, linear.bias, *tensors)
    parameters = dict(function.named_parameters())

    def with_parameters(*leaves: Tensor) -> Tensor:
        inputs, given = leaves[: len(tensors)], leaves[len(tensors) :]
        return torch.func.functional_call(function, dict(zip(parameters, given, strict=True)), inputs)

    return _LinearOf.apply(with_parameters, linear.weight, linear.bias, *tensors, *parameters.values())


class _LinearOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function: Callable[..., Tensor], weight: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(weight, *tensors)
        ctx.has_bias = bias is not None
        device = weight.device.type
        enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        ctx.autocast = torch.autocast(device, torch.get_autocast_dtype(device)) if enabled else nullcontext()
        return F.linear(function(*tensors), weight, bias)

    @staticmethod
    @once_differentiable  # gradients of gradients raise instead of being wrong
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        with torch.enable_grad(), ctx.autocast:
            leaves = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
            source = ctx.function(*leaves)
        rows = source.detach().flatten(0, -2).to(grad.dtype)
        grad_rows = grad.flatten(0, -2)
        grad_weight = (grad_rows.t() @ rows).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = grad_rows.sum(0).to(weight.dtype) if ctx.has_bias and ctx.needs_input_grad[2] else None
        wanted = [x for x in leaves if x.requires_grad]
        gradients = iter(())
        if wanted:
            grad_source = (grad_rows @ weight.to(grad.dtype)).view(source.shape).to(source.dtype)
            gradients = iter(torch.autograd.grad(source, wanted, grad_source))
        return None, grad_weight, grad_bias, *[next(gradients) if x.requires_grad else None for x in leaves]
