"""The definition: one step after the other, differentiated by autograd, the step function by its surrogate."""

import torch
from torch import Tensor

from kernels.spiking_neuron.arguments import Settings


class _Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, charged: Tensor, settings: Settings) -> Tensor:
        ctx.save_for_backward(charged)
        ctx.settings = settings
        return (charged >= settings.threshold).to(charged.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        [charged] = ctx.saved_tensors
        return gradient * ctx.settings.slope(charged - ctx.settings.threshold), None


def spiking_neuron(current: Tensor, state: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Spikes and last membrane, of tensors of one dtype; the rest as `kernels.spiking_neuron.spiking_neuron`."""
    spikes = []
    for x in current:
        charged = settings.charge(state, x)
        spike = _Fire.apply(charged, settings)
        spikes.append(spike)
        resetting = spike.detach() if settings.detach_reset else spike
        if settings.hard:
            finite = charged.clamp(max=torch.finfo(charged.dtype).max)  # an infinite one is reset, too: 0 * inf is NaN
            state = (1 - resetting) * finite + resetting * settings.rest
        else:
            state = charged - resetting * settings.threshold
    return torch.stack(spikes) if spikes else current.clone(), state
