"""Samples of rays that all have the same number of them: bins of distance, drawn evenly or where a proposal has weight.

Bins lie in a normalised coordinate, from 0 at a ray's near end to 1 at its far one, in which they are even at first:

    spacing = (s(t) - s(near)) / (s(far) - s(near))        s(t) = t, or piecewise: t / 2 if t < 1 else 1 - 1 / (2 t)

Sources: mip-NeRF 360, arXiv 2111.12077 (weights that sharpen, interlevel and distortion losses), as nerfstudio has them
at 50e0e3c7; inverse-CDF sampling also as Mega-NeRF and Switch-NeRF (b9d2aeb) have it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SPACINGS = ("linear", "piecewise")
JITTERS = ("none", "single", "each")
LEAST_SUM = 1e-5  # of weights that are divided by their sum
LEAST_WEIGHT = 1e-7  # by which the interlevel loss divides


def to_spacing(distance: Tensor, spacing: str) -> Tensor:
    """s of the mathematics."""
    if spacing == "linear":
        return distance
    near = distance < 1
    return torch.where(near, distance / 2, 1 - 1 / (2 * torch.where(near, 1, distance)))


def from_spacing(value: Tensor, spacing: str) -> Tensor:
    """The inverse of `to_spacing`."""
    if spacing == "linear":
        return value
    near = value < 0.5
    return torch.where(near, 2 * value, 1 / (2 - 2 * torch.where(near, 0.5, value)))


@dataclass(frozen=True)
class RayBins:
    """S bins of each of R rays.

    Attributes:
        edges: (R, S + 1), rising, from 0 to 1.
        near, far: (R,), the distances at 0 and 1.
        spacing: "linear" or "piecewise".
    """

    edges: Tensor
    near: Tensor
    far: Tensor
    spacing: Literal["linear", "piecewise"] = "linear"

    @property
    def distances(self) -> Tensor:
        """(R, S + 1), the edges along the rays."""
        near, far = (to_spacing(x[:, None], self.spacing) for x in (self.near, self.far))
        return from_spacing(self.edges * far + (1 - self.edges) * near, self.spacing)

    @property
    def start(self) -> Tensor:
        """(R, S), distances where the bins begin."""
        return self.distances[:, :-1]

    @property
    def end(self) -> Tensor:
        """(R, S), distances where they end."""
        return self.distances[:, 1:]

    def resampled(
        self,
        weights: Tensor,
        samples: int,
        *,
        padding: float = 0.01,
        keep_edges: bool = False,
        jitter: str | Tensor = "none",
        generator: torch.Generator | None = None,
    ) -> "RayBins":
        """New bins where these have weight, without gradient.

        Args:
            weights: (R, S), 0 at least.
            samples: how many bins there shall be.
            padding: what is added to every weight, so that no bin is forgotten.
            keep_edges: whether the old edges stay among the new ones; there are then S + 1 more bins.
            jitter: as in `stratified_bins`.
            generator: of the jitter.
        """
        count = samples + 1
        even = (torch.arange(count, dtype=self.edges.dtype, device=self.edges.device) / count).expand(
            len(self.edges), count
        )
        shift = _jitter(self.edges, count, jitter, generator)
        positions = even + (0.5 if shift is None else shift) / count
        edges = inverse_cdf(self.edges, weights, positions, padding=padding)
        if keep_edges:
            edges = torch.cat([self.edges, edges], -1).sort(-1).values
        return RayBins(edges.detach(), self.near, self.far, self.spacing)


def _jitter(like: Tensor, count: int, jitter: str | Tensor, generator: torch.Generator | None) -> Tensor | None:
    """Random numbers from 0 to 1, one a ray (R, 1) or one an edge (R, count)."""
    if isinstance(jitter, Tensor):
        if jitter.shape != like.shape[:1]:
            raise ValueError(f"jitter has shape {tuple(jitter.shape)}; it must be one number a ray, ({len(like)},)")
        return jitter[:, None].to(like.dtype)
    if jitter not in JITTERS:
        raise ValueError(f"jitter is {jitter!r}; valid are {', '.join(map(repr, JITTERS))}")
    if jitter == "none":
        return None
    shape = (len(like), 1 if jitter == "single" else count)
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


def stratified_bins(
    near: Tensor,
    far: Tensor,
    samples: int,
    *,
    spacing: str = "linear",
    jitter: str | Tensor = "none",
    generator: torch.Generator | None = None,
) -> RayBins:
    """Bins that are even in the spacing, or whose edges are moved by chance, each at most half a bin to either side.

    Args:
        near, far: (R,), near below far.
        samples: S, 1 at least.
        spacing: "linear" or "piecewise" (near to the camera even in distance, far away in its inverse).
        jitter: "none", "single" (one random number a ray moves all its edges alike), "each" (one an edge), or numbers
            from 0 to 1, (R,), one a ray in place of random ones.
        generator: of the jitter, on the device of `near`.

    Raises:
        ValueError: an argument does not fit.
    """
    if near.dim() != 1 or near.shape != far.shape:
        raise ValueError(f"near has shape {tuple(near.shape)} and far {tuple(far.shape)}; both must be (R,)")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}; valid are {', '.join(map(repr, SPACINGS))}")
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
    edges = torch.linspace(0, 1, samples + 1, dtype=near.dtype, device=near.device).expand(len(near), -1)
    shift = _jitter(near, samples + 1, jitter, generator)
    if shift is not None:
        centres = (edges[:, 1:] + edges[:, :-1]) / 2
        lower, upper = torch.cat([edges[:, :1], centres], -1), torch.cat([centres, edges[:, -1:]], -1)
        edges = lower + (upper - lower) * shift
    return RayBins(edges, near, far, spacing)


def inverse_cdf(edges: Tensor, weights: Tensor, positions: Tensor, *, padding: float) -> Tensor:
    """Where the weights of bins add up to given parts of their sum, linearly within a bin.

    nerfstudio has a padding of 0.01 and positions in the middle of even parts, as `RayBins.resampled` takes them;
    Mega-NeRF a padding of 1e-8 and positions evenly from 0 to 1, or drawn by chance.

    Args:
        edges: (R, S + 1), rising.
        weights: (R, S), 0 at least.
        positions: (R, P), from 0 to 1.
        padding: what is added to every weight. Where the sum is still 0, all bins count alike.

    Returns:
        (R, P).

    Raises:
        ValueError: the shapes do not fit.
    """
    rays, bins = weights.shape
    if edges.shape != (rays, bins + 1) or positions.shape[0] != rays:
        raise ValueError(
            f"edges has shape {tuple(edges.shape)} and positions {tuple(positions.shape)}; with weights "
            f"{tuple(weights.shape)} they must be {(rays, bins + 1)} and ({rays}, P)"
        )
    weights = weights + padding
    missing = (LEAST_SUM - weights.sum(-1, keepdim=True)).relu()
    weights = weights + missing / bins
    parts = (weights / weights.sum(-1, keepdim=True)).cumsum(-1).clamp(max=1)
    parts = torch.nn.functional.pad(parts, (1, 0))
    above = torch.searchsorted(parts, positions.contiguous(), right=True).clamp(max=bins)
    below = (above - 1).clamp(min=0)
    low, high = parts.gather(-1, below), parts.gather(-1, above)
    within = ((positions - low) / (high - low)).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    first, last = edges.gather(-1, below), edges.gather(-1, above)
    return first + within * (last - first)


def weights_of(density: Tensor, lengths: Tensor) -> Tensor:
    """(R, S), the share of a ray's light that each bin stops, of densities and lengths (R, S)."""
    thickness = density * lengths
    return -torch.expm1(-thickness) * torch.exp(thickness - thickness.cumsum(-1))


def annealed(weights: Tensor, step: int, *, steps: int = 1000, slope: float = 10.0) -> Tensor:
    """Weights of a proposal to a power that rises from 0, where all bins count alike, to 1 over the first `steps`."""
    fraction = min(max(step / steps, 0.0), 1.0)
    return weights ** (slope * fraction / ((slope - 1) * fraction + 1))


def interlevel_loss(edges: Tensor, weights: Tensor, proposals: list[tuple[Tensor, Tensor]]) -> Tensor:
    """How far the proposals' histograms fail to bound the final one from above; its gradient reaches them alone.

    The sum over proposals of the mean over final bins of max(0, w - bound)^2 / (w + 1e-7), where the bound of a bin is
    the weight of all the proposal's bins that it touches.

    Args:
        edges: (R, S + 1), of the final bins, normalised.
        weights: (R, S), their weights.
        proposals: edges and weights of each, of any number of bins.
    """
    edges, weights = edges.detach(), weights.detach()
    loss = weights.new_zeros(())
    for outer_edges, outer_weights in proposals:
        last = outer_weights.shape[-1] - 1
        outer_edges = outer_edges.detach().contiguous()
        sums = torch.nn.functional.pad(outer_weights.cumsum(-1), (1, 0))
        low = torch.searchsorted(outer_edges[:, :-1].contiguous(), edges[:, :-1].contiguous(), right=True) - 1
        high = torch.searchsorted(outer_edges[:, 1:].contiguous(), edges[:, 1:].contiguous(), right=True)
        bound = sums[:, 1:].gather(-1, high.clamp(0, last)) - sums[:, :-1].gather(-1, low.clamp(0, last))
        loss = loss + ((weights - bound).clamp(min=0).square() / (weights + LEAST_WEIGHT)).mean()
    return loss


def distortion_loss(edges: Tensor, weights: Tensor) -> Tensor:
    """How far the weights of rays are spread: sum_ij w_i w_j |m_i - m_j| + 1/3 sum_i w_i^2 d_i, the mean over rays.

    m are the mid points and d the lengths of the bins. Bins are in order, so that the double sum takes no longer than
    two running ones.

    Args:
        edges: (R, S + 1), rising, normalised.
        weights: (R, S).
    """
    middle, length = (edges[:, 1:] + edges[:, :-1]) / 2, edges.diff(dim=-1)
    weighted = weights * middle
    before = weights.cumsum(-1) - weights
    weighted_before = weighted.cumsum(-1) - weighted
    between = 2 * (weights * (middle * before - weighted_before)).sum(-1)
    return (between + (weights.square() * length).sum(-1) / 3).mean()
