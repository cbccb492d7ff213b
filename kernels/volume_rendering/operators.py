"""The native and Triton kernels as PyTorch operators, with fake kernels and gradients.

Each backend's module has the two functions called here. All outputs are in the dtype of the arithmetic.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from kernels.volume_rendering.arguments import arithmetic_dtype


def _kernels(backend: str) -> ModuleType:
    return import_module(f"kernels.volume_rendering.{backend}")


@torch.library.custom_op("gated_vision::volume_rendering", mutates_args=())
def volume_rendering(
    density: Tensor, colour: Tensor, start: Tensor, end: Tensor, offsets: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Colour (R, C) over black, opacity (R,), depth (R,), weights (S,)."""
    return _kernels(backend).forward(density, colour, start, end, offsets)


@volume_rendering.register_fake
def _(density, colour, start, end, offsets, backend):
    dtype = arithmetic_dtype(density, colour, start, end)
    rays = offsets.shape[0] - 1
    shapes = ((rays, colour.shape[1]), (rays,), (rays,), (density.shape[0],))
    return tuple(density.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.custom_op("gated_vision::volume_rendering_backward", mutates_args=())
def volume_rendering_backward(
    grad_colour: Tensor | None,
    grad_opacity: Tensor | None,
    grad_depth: Tensor | None,
    grad_weights: Tensor | None,
    weights: Tensor,
    density: Tensor,
    colour: Tensor,
    start: Tensor,
    end: Tensor,
    offsets: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of density and colour, in their dtypes."""
    gradients = (grad_colour, grad_opacity, grad_depth, grad_weights)
    return _kernels(backend).backward(gradients, weights, density, colour, start, end, offsets)


@volume_rendering_backward.register_fake
def _(grad_colour, grad_opacity, grad_depth, grad_weights, weights, density, colour, *others):
    return density.new_empty(density.shape), colour.new_empty(colour.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(output[3], *tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx, *gradients):
    if all(gradient is None for gradient in gradients):
        return (None,) * 6
    of_density, of_colour = volume_rendering_backward(*gradients, *ctx.saved_tensors, ctx.backend)
    return of_density, of_colour, None, None, None, None


volume_rendering.register_autograd(_gradients, setup_context=_save)


def _no_gradients(ctx, *gradients):
    raise NotImplementedError(
        "volume_rendering: gradients of gradients are defined by backend='torch' (and 'reference') only"
    )


volume_rendering_backward.register_autograd(_no_gradients)


@torch.library.custom_op("gated_vision::visible_samples", mutates_args=())
def visible_samples(
    density: Tensor, start: Tensor, end: Tensor, offsets: Tensor, transmittance: float, alpha: float
) -> Tensor:
    """As `kernels.volume_rendering.visible`, by the native kernel."""
    return _kernels("native").visible(density, start, end, offsets, transmittance, alpha)


@visible_samples.register_fake
def _(density, *others):
    return density.new_empty(density.shape, dtype=torch.bool)
