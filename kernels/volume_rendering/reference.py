"""The definition: one ray after the other, differentiated by autograd."""

from itertools import pairwise

import torch
from torch import Tensor


def _transmittance_and_alpha(density: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """T and alpha of the samples of one ray."""
    optical = density * (end - start)
    before = torch.cat([optical.new_zeros(1), optical.cumsum(0)[:-1]])[: len(optical)]
    return torch.exp(-before), -torch.expm1(-optical)


def composite(
    density: Tensor, colour: Tensor, start: Tensor, end: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Colour over black, opacity, depth and weights, of tensors of one dtype; the rest as in the package."""
    colours, opacities, depths, weights = [colour[:0]], [density[:0]], [density[:0]], [density[:0]]
    bounds = offsets.tolist()
    for first, last in pairwise(bounds):
        samples = slice(first, last)
        transmittance, alpha = _transmittance_and_alpha(density[samples], start[samples], end[samples])
        w = transmittance * alpha
        weights.append(w)
        colours.append((w[:, None] * colour[samples]).sum(0, keepdim=True))
        opacities.append(w.sum(0, keepdim=True))
        depths.append((w * (start[samples] + end[samples]) / 2).sum(0, keepdim=True))
    return torch.cat(colours), torch.cat(opacities), torch.cat(depths), torch.cat(weights)


def visible(density: Tensor, start: Tensor, end: Tensor, offsets: Tensor, least: float, least_alpha: float) -> Tensor:
    """As `kernels.volume_rendering.visible`, of tensors of one dtype."""
    found = [torch.zeros(0, dtype=torch.bool, device=density.device)]
    bounds = offsets.tolist()
    for first, last in pairwise(bounds):
        samples = slice(first, last)
        transmittance, alpha = _transmittance_and_alpha(density[samples], start[samples], end[samples])
        found.append((transmittance >= least) & (alpha >= least_alpha))
    return torch.cat(found)
