"""The `torch` backend: the closed form of the gradient in plain operations, which can be compiled and exported.

Gradients of gradients raise; the `reference` backend has them.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.spiking_neuron.arguments import Settings


class _Neurons(torch.autograd.Function):
    @staticmethod
    def forward(ctx, current: Tensor, state: Tensor, *arguments) -> tuple[Tensor, Tensor]:
        settings = Settings(*arguments)
        ctx.save_for_backward(current, state)
        ctx.arguments = arguments
        spikes = []
        for charged, fired, membrane in _steps(current, state, settings):
            spikes.append(fired.to(charged.dtype))
            state = membrane
        return torch.stack(spikes), state

    @staticmethod
    @once_differentiable  # what fires has no derivative here, so gradients of gradients would be wrong
    def backward(ctx, spike_gradients: Tensor, state_gradient: Tensor):
        current, state = ctx.saved_tensors
        settings = Settings(*ctx.arguments)
        gradients = []
        steps = list(_steps(current, state, settings))
        for (charged, fired, _), gradient in zip(reversed(steps), reversed(spike_gradients.unbind()), strict=True):
            slope = settings.slope(charged - settings.threshold)
            through_spike = gradient
            if not settings.detach_reset:
                through_spike = torch.addcmul(
                    gradient, state_gradient, settings.reset_constant + settings.reset_factor * charged
                )
            passed = torch.where(fired, 0.0, state_gradient) if settings.hard else state_gradient
            of_charged = torch.addcmul(passed, through_spike, slope)
            gradients.append(of_charged if settings.current_slope == 1 else of_charged * settings.current_slope)
            state_gradient = of_charged if settings.tau is None else of_charged * settings.membrane_slope
        return torch.stack(gradients[::-1]), state_gradient, *(None for _ in ctx.arguments)


def _steps(current: Tensor, membrane: Tensor, settings: Settings):
    """Of every step: h, whether it fires, v."""
    for x in current:
        charged = settings.charge(membrane, x)
        fired = charged >= settings.threshold
        membrane = torch.where(fired, settings.rest if settings.hard else charged - settings.threshold, charged)
        yield charged, fired, membrane


def spiking_neuron(current: Tensor, state: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Spikes and last membrane, of tensors of one dtype; the rest as `kernels.spiking_neuron.spiking_neuron`."""
    if len(current) == 0:
        return current.clone(), state
    return _Neurons.apply(current, state, *settings.as_arguments())
