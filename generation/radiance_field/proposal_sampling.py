"""Proposal sampling: small density fields say where along a ray samples are worth taking, and learn it of the field.

A ray has even bins at first. A proposal, a small hash grid, says how dense each bin's middle is; the next bins lie
where its weights are, and after the last proposal they are the samples of the field. The proposals learn by the
interlevel loss alone, which asks that their weights bound those of the field from above.

Sources: mip-NeRF 360, arXiv 2111.12077, and nerfacto (arXiv 2302.04264), whose sizes the defaults are. Where nerfacto
updates its proposals more rarely after a while, they learn in every step here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.argument_checks import check_choice, check_real, check_whole
from generation.radiance_field.contraction import SceneSpace
from generation.radiance_field.heads import Perceptron, check_signed, density_of
from generation.radiance_field.ray_samplers import (
    SPACINGS,
    RayBins,
    annealed,
    distortion_loss,
    interlevel_loss,
    stratified_bins,
    weights_of,
)
from generation.radiance_field.single_grid import GridTable, checked_grid
from kernels.hash_encoding import HashGrid
from kernels.occupancy_grid import Marched
from kernels.occupancy_grid.arguments import check_values

GOLDEN_RATIO = 0.6180339887498949  # its multiples are the most evenly spread shifts of one number


class Spans(NamedTuple):
    """Where R rays may have samples.

    Attributes:
        near, far: `[R]`.
        hit: bool `[R]`, whether there is anything between.
    """

    near: Tensor
    far: Tensor
    hit: Tensor


class Proposed(NamedTuple):
    """Samples of R rays, of which H have some, S each.

    Attributes:
        samples: H S of them, packed.
        bins: of the H rays, in which the samples are.
        proposals: edges `[H, P + 1]` and weights `[H, P]` of each proposal.
    """

    samples: Marched
    bins: RayBins
    proposals: list[tuple[Tensor, Tensor]]

    def losses(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The interlevel and the distortion loss, each the sum over rays of what it is of one.

        Args:
            weights: `[H S]`, of the samples.
        """
        edges = self.bins.edges
        weights = weights.reshape(edges[:, 1:].shape)
        if not len(edges):  # a mean over none is none; gradients are there, and 0
            return sum(learnt.sum() for _, learnt in self.proposals), weights.sum()
        interlevel = interlevel_loss(edges, weights, self.proposals)
        return interlevel * len(edges), distortion_loss(edges, weights) * len(edges)


class DensityGrid(nn.Module):
    """Densities by a hash grid and a perceptron of one hidden layer.

    Args:
        grid: its configuration.
        hidden_width: of the perceptron.
        table_bound: the table begins uniform, within it of zero.
        density_bias: added before the exponential.
    """

    def __init__(self, grid: HashGrid, hidden_width: int, table_bound: float, density_bias: float) -> None:
        super().__init__()
        self.grid = GridTable(grid, table_bound)
        self.base = Perceptron([grid.width, hidden_width, 1])
        self.density_bias = density_bias

    def forward(self, points: Tensor) -> Tensor:
        """`[N]` of points `[N, 3]` in the unit cube."""
        return density_of(self.base(self.grid(points))[:, 0], "truncated_exp", self.density_bias)


class ProposalSampler(nn.Module):
    """Samples where small density fields propose them; all rays that meet the scene have as many.

    Args:
        samples: bins at which each proposal is asked, from the first.
        final_samples: of a ray, at which the field is asked.
        resolutions: (coarsest, finest) of each proposal's grid.
        levels, features, log2_table_size: of the grids: see `kernels.hash_encoding.HashGrid`.
        hidden_width: of the perceptrons.
        table_bound: see `DensityGrid`.
        density_bias: see `DensityGrid`.
        spacing: in which the first bins are even, "piecewise" (distance to 1, its inverse beyond) or "linear".
        padding: added to every weight, so that no bin is forgotten.
        anneal_steps: of training, over which the weights become sharp; 0 has them sharp at once.

    Raises:
        ValueError: an argument is none of these; its name begins with "proposal.".
    """

    def __init__(
        self,
        *,
        samples: Sequence[int] = (256, 96),
        final_samples: int = 48,
        resolutions: Sequence[Sequence[float]] = ((16, 128), (16, 256)),
        levels: int = 5,
        features: int = 2,
        log2_table_size: int = 17,
        hidden_width: int = 16,
        table_bound: float = 1e-4,
        density_bias: float = -1.0,
        spacing: str = "piecewise",
        padding: float = 0.01,
        anneal_steps: int = 1000,
    ) -> None:
        super().__init__()
        if len(samples) != len(resolutions) or not len(samples):
            raise ValueError(
                f"proposal.samples is {samples!r} and proposal.resolutions {resolutions!r}; "
                "they must have an entry for each proposal, of whom there is one at least"
            )
        self.samples = [check_whole("proposal.samples", count, 1) for count in samples]
        self.final_samples = check_whole("proposal.final_samples", final_samples, 1)
        check_whole("proposal.hidden_width", hidden_width, 1)
        check_real("proposal.table_bound", table_bound)
        check_signed("proposal.density_bias", density_bias)
        self.spacing = check_choice("proposal.spacing", spacing, SPACINGS)
        self.padding = check_real("proposal.padding", padding)
        self.anneal_steps = check_whole("proposal.anneal_steps", anneal_steps, 0)
        self.grids = nn.ModuleList()
        for pair in resolutions:
            grid = checked_grid("proposal.", pair, "proposal.", levels, features, log2_table_size)
            if grid.experts > 1:
                raise ValueError(f"proposal.resolutions is {resolutions!r}; it must be a list of (coarsest, finest)")
            self.grids.append(DensityGrid(grid, hidden_width, table_bound, density_bias))

    @property
    def most_samples(self) -> int:
        """Of a ray, at once."""
        return max(*self.samples, self.final_samples)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by how they are trained: "grids" and "heads"."""
        tables = [parameter for proposal in self.grids for parameter in proposal.grid.parameters()]
        return {"grids": tables, "heads": [p for proposal in self.grids for p in proposal.base.parameters()]}

    @torch.no_grad()
    def spans(
        self, origins: Tensor, directions: Tensor, near: Tensor | float, far: Tensor | float, space: SceneSpace
    ) -> Spans:
        """From near to far, within the box of a space that is not contracted.

        Args:
            origins, directions: `[R, 3]`.
            near, far: distances, one or `[R]`.
            space: of the field.

        Raises:
            ValueError: on CPU, a number is not finite; the rays are no floating-point numbers.
        """
        if not (origins.is_floating_point() and directions.is_floating_point()):
            wrong, tensor = ("directions", directions) if origins.is_floating_point() else ("origins", origins)
            raise ValueError(f"{wrong} has dtype {tensor.dtype}; it must be a floating-point tensor")
        nothing = origins.new_zeros(len(origins))
        near, far = nothing + near, nothing + far
        check_values(origins, directions, near, far, space.box, nothing)
        if space.contraction == "none":
            first, last = through_box(origins, directions, space.box.to(origins.dtype))
            near, far = torch.maximum(near, first), torch.minimum(far, last)
        return Spans(near, far, (far > near) & directions.any(1))

    def offsets(self, spans: Spans) -> Tensor:
        """int64 `[R + 1]`, of the samples that rays will have, as of `Marched`."""
        return F.pad((spans.hit.long() * self.final_samples).cumsum(0), (1, 0))

    def forward(
        self,
        origins: Tensor,
        directions: Tensor,
        spans: Spans,
        space: SceneSpace,
        jitter: Tensor | None = None,
        step: int | None = None,
    ) -> Proposed:
        """Samples of rays `[R, 3]`; gradients of the proposals' weights, none of where the samples are.

        Args:
            spans: of these rays.
            space: of the field.
            jitter: `[R]` from 0 to 1, which moves a ray's bins; None leaves them where they are.
            step: of the training, of which weights are not sharp at first; None for evaluation.
        """
        offsets, hit = self.offsets(spans), spans.hit
        origins, directions = origins[hit], directions[hit]
        near, far, jitter = spans.near[hit], spans.far[hit], None if jitter is None else jitter[hit]
        # One number a ray shifts all its bins, each time by another part: resumed and shared trainings take the same.
        shifts = ["none" if jitter is None else (jitter + n * GOLDEN_RATIO) % 1 for n in range(len(self.grids) + 1)]
        bins = stratified_bins(near, far, self.samples[0], spacing=self.spacing, jitter=shifts[0])
        proposals = []
        for number, proposal in enumerate(self.grids, 1):
            distances = bins.distances
            middle = (distances[:, 1:] + distances[:, :-1]) / 2
            points = torch.addcmul(origins[:, None], directions[:, None], middle[..., None]).reshape(-1, 3)
            density = proposal(space(points)).reshape(middle.shape)
            learnt = weights_of(density, distances.diff(dim=-1))
            proposals.append((bins.edges, learnt))
            sharp = step is None or step >= self.anneal_steps
            weights = learnt.detach() if sharp else annealed(learnt.detach(), step, steps=self.anneal_steps)
            wanted = [*self.samples, self.final_samples][number]
            bins = bins.resampled(weights, wanted, padding=self.padding, jitter=shifts[number])
        distances = bins.distances
        samples = Marched(distances[:, :-1].reshape(-1), distances[:, 1:].reshape(-1), offsets)
        return Proposed(samples, bins, proposals)


def through_box(origins: Tensor, directions: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """Distances `[R]` at which rays enter and leave a box `[2, 3]`; the second is the lesser of rays that miss it."""
    planes = (box[:, None] - origins) / directions  # (2, R, 3)
    level = directions == 0
    between = torch.where((origins >= box[0]) & (origins <= box[1]), torch.inf, -torch.inf)
    first = torch.where(level, -between, planes.amin(0)).amax(1)
    last = torch.where(level, between, planes.amax(0)).amin(1)
    return first, last
