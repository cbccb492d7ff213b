"""The native and Triton neurons as PyTorch operators, with fake kernels and gradients.

Each backend's module has the two functions called here. A state that nobody asked for is an empty tensor. Gradients of
gradients are not defined; use the `reference` backend for them.

Networks of spikes have many small maps, done sooner than `torch.library.custom_op` and its gradients are called
(0.3 ms, both passes). Registered below it, the same takes a third less.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from kernels.spiking_neuron.arguments import Settings
from kernels.spiking_neuron.layout import arithmetic_dtype, new_state, new_steps

LIBRARY = torch.library.Library("gated_vision", "FRAGMENT")


def _kernels(backend: str) -> ModuleType:
    return import_module(f"kernels.spiking_neuron.{backend}")


def _operator(function: Callable) -> torch._ops.OpOverload:
    name = function.__name__
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.gated_vision, name).default


@_operator
def spiking_neuron(
    current: Tensor,
    initial_state: Tensor | None,
    threshold: float,
    tau: float | None,
    decay_input: bool,
    reset: str,
    reset_value: float,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
    return_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Spikes and last membrane; at least one time step."""
    settings = Settings(threshold, tau, decay_input, reset, reset_value, surrogate, alpha, detach_reset)
    return _kernels(backend).forward(current, initial_state, settings, return_state)


@torch.library.register_fake("gated_vision::spiking_neuron", lib=LIBRARY)
def _(current, initial_state, *settings_and_backend):
    *_, return_state, _ = settings_and_backend
    dtype = arithmetic_dtype(current, initial_state)
    spikes = new_steps(current)
    return spikes, new_state(spikes, dtype) if return_state else current.new_empty(0, dtype=dtype)


@_operator
def spiking_neuron_backward(
    grad_spikes: Tensor | None,
    grad_state: Tensor | None,
    current: Tensor,
    initial_state: Tensor | None,
    threshold: float,
    tau: float | None,
    decay_input: bool,
    reset: str,
    reset_value: float,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of current and initial state; that of a state that is None is empty."""
    settings = Settings(threshold, tau, decay_input, reset, reset_value, surrogate, alpha, detach_reset)
    return _kernels(backend).backward(grad_spikes, grad_state, current, initial_state, settings)


@torch.library.register_fake("gated_vision::spiking_neuron_backward", lib=LIBRARY)
def _(grad_spikes, grad_state, current, initial_state, *settings_and_backend):
    of_current = new_steps(current)
    if initial_state is None:
        return of_current, current.new_empty(0)
    return of_current, new_state(of_current, initial_state.dtype)


class _Neurons(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        current, initial_state, *ctx.settings, ctx.returns_state, ctx.backend = arguments
        ctx.save_for_backward(current, initial_state)
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            return spiking_neuron(*arguments)

    @staticmethod
    def backward(ctx, grad_spikes, grad_state):
        current, initial_state = ctx.saved_tensors
        nothing = (None,) * (len(ctx.settings) + 2)
        if not ctx.returns_state:
            grad_state = None  # a traced gradient is given one of the empty tensor
        if grad_spikes is None and grad_state is None:
            return None, None, *nothing
        of_current, of_state = spiking_neuron_backward(
            grad_spikes, grad_state, current, initial_state, *ctx.settings, ctx.backend
        )
        return of_current, None if initial_state is None else of_state, *nothing


LIBRARY.impl("spiking_neuron", _Neurons.apply, "Autograd")
