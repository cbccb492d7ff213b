"""The native routing as PyTorch operators, with fake kernels and the gradient of the softmax."""

import torch
from torch import Tensor

from kernels.expert_dispatch import native


@torch.library.custom_op("gated_vision::expert_choice", mutates_args=())
def expert_choice(scores: Tensor, choices: int, softmax: bool) -> tuple[Tensor, Tensor]:
    """As `kernels.expert_dispatch.places.choose`."""
    return native.choose(scores, choices, softmax)


@expert_choice.register_fake
def _(scores, choices, softmax):
    indices = scores.new_empty(choices, scores.shape[0], dtype=torch.int64)
    return scores.new_empty(scores.shape if softmax else 0), indices


def _save(ctx, inputs, output):
    _, _, ctx.softmax = inputs
    ctx.save_for_backward(output[0])


def _gradients(ctx, gradient, _):
    if not ctx.softmax:
        return None, None, None
    [probabilities] = ctx.saved_tensors
    weighted = probabilities * gradient
    return weighted - probabilities * weighted.sum(1, keepdim=True), None, None


expert_choice.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("gated_vision::expert_places", mutates_args=())
def expert_places(
    indices: Tensor, turns: Tensor | None, experts: int, limit: int, bounded_by_load: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `kernels.expert_dispatch.places.find_places`."""
    return native.find_places(indices, turns, experts, limit, bounded_by_load)


@expert_places.register_fake
def _(indices, turns, experts, limit, bounded_by_load):
    choices, tokens = indices.shape
    shapes = ((choices, tokens), (choices, tokens), (choices * tokens,), (experts + 1,), (experts,), ())
    return tuple(indices.new_empty(shape) for shape in shapes)
