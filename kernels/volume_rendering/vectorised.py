"""The `torch` backend: all rays at once, in plain operations, with the closed form of the gradient.

Sums within rays are differences of one running sum in float64. An optical depth beyond that of float64's smallest
number is as opaque as any larger one, and is cut there, so that no ray takes more than a few digits of float64 from
those after it. The closed form of the gradient can itself be differentiated.
"""

import torch
from torch import Tensor

OPAQUE = 750.0  # exp(-750) is 0 in float64


def _ray_of_samples(offsets: Tensor, samples: int) -> Tensor:
    rays = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(rays, offsets.diff(), output_size=samples)


def _running_sum(x: Tensor) -> Tensor:
    """(S + 1,): sums of the first 0 to S numbers, in float64; NaN counts 0, so that it stays in its ray."""
    return torch.nn.functional.pad(x.double().nan_to_num(0.0, torch.inf, -torch.inf).cumsum(0), (1, 0))


def _optical_depths(density: Tensor, start: Tensor, end: Tensor, offsets: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
    """Of each sample its own and that of all before it in its ray."""
    own = (density * (end - start)).clamp(max=OPAQUE)
    sums = _running_sum(own)
    return own, (sums[:-1] - sums[offsets[ray]]).to(own.dtype)


class _Rays(torch.autograd.Function):
    @staticmethod
    def forward(ctx, density: Tensor, colour: Tensor, start: Tensor, end: Tensor, offsets: Tensor):
        ctx.save_for_backward(density, colour, start, end, offsets)
        ray = _ray_of_samples(offsets, density.shape[0])
        own, before = _optical_depths(density, start, end, offsets, ray)
        weights = torch.exp(-before) * -torch.expm1(-own)
        sums = (weights[:, None] * colour, weights, weights * (start + end) / 2)
        rays = offsets.shape[0] - 1
        return *(x.new_zeros(rays, *x.shape[1:]).index_add(0, ray, x) for x in sums), weights

    @staticmethod
    def backward(ctx, of_colour: Tensor, of_opacity: Tensor, of_depth: Tensor, of_weights: Tensor):
        density, colour, start, end, offsets = ctx.saved_tensors
        ray = _ray_of_samples(offsets, density.shape[0])
        own, before = _optical_depths(density, start, end, offsets, ray)
        weights = torch.exp(-before) * -torch.expm1(-own)
        upstream = of_colour[ray]
        of_weight = (upstream * colour).sum(1) + of_opacity[ray] + of_depth[ray] * (start + end) / 2 + of_weights
        sums = _running_sum(weights * of_weight)
        behind = (sums[offsets[ray + 1]] - sums[1:]).to(weights.dtype)
        of_optical = torch.exp(-(before + own)) * of_weight - behind
        return of_optical * (end - start), weights[:, None] * upstream, None, None, None


def composite(
    density: Tensor, colour: Tensor, start: Tensor, end: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Colour over black, opacity, depth and weights, of tensors of one dtype; the rest as in the package."""
    return _Rays.apply(density, colour, start, end, offsets)


def visible(density: Tensor, start: Tensor, end: Tensor, offsets: Tensor, least: float, least_alpha: float) -> Tensor:
    """As `kernels.volume_rendering.visible`, of tensors of one dtype."""
    own, before = _optical_depths(density, start, end, offsets, _ray_of_samples(offsets, density.shape[0]))
    return (torch.exp(-before) >= least) & (-torch.expm1(-own) >= least_alpha)
