"""Where a scene is not empty: a grid of nested boxes that is updated by a field's density while it trains.

Every cell keeps an estimate of density times step, which falls by `decay` at each update and rises at once to what the
field says at a random point of the cell:

    estimate <- max(decay estimate, density(point) step)        of the cells that are looked at
    occupied <- estimate > min(mean of all estimates, limit)

All cells are looked at while warming up; later a part of each level drawn evenly, and a part drawn from its occupied
cells, so that what becomes empty is noticed soon and what was missed is noticed some day.

Source: the occupancy grid of Instant neural graphics primitives, arXiv 2201.05989, with the threshold of nerfacc at
57ccfa14.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from generation.argument_checks import check_real, check_whole
from kernels.occupancy_grid import Marched, march

logger = logging.getLogger("generation")


class OccupancyGrid(nn.Module):
    """The grid, its updates, and rays that march through it.

    Until the first update every cell counts as occupied. A grid without occupied cells is no error: rays get no samples
    there, a training sees its background and can go on, for later updates look at cells again; a warning says so
    whenever an update has emptied the grid.

    Args:
        resolution: cells a side, X, Y, Z.
        box: lower and upper corner of the smallest level's box, `[2, 3]`.
        levels: boxes, each twice as large as the one before, around the same centre.
        limit: the threshold of density times step; lower ones keep more cells.
        decay: of estimates at each update, 0 to 1.
        every: steps between updates.
        warmup_steps: as long as the step is lower than this, updates look at all cells.
        uniform_fraction: of each level's cells, how many an update draws from all of them,
        occupied_fraction: and how many at most from those that are occupied.

    Buffers: `estimates` `[levels, X, Y, Z]`, `occupied` of the same shape, bool, and `box` `[2, 3]`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        resolution: Sequence[int],
        box: Tensor | Sequence[Sequence[float]],
        *,
        levels: int = 1,
        limit: float = 0.01,
        decay: float = 0.95,
        every: int = 16,
        warmup_steps: int = 256,
        uniform_fraction: float = 0.25,
        occupied_fraction: float = 0.25,
    ) -> None:
        super().__init__()
        if len(resolution) != 3:
            raise ValueError(f"resolution is {tuple(resolution)}; it must be three numbers of cells, X, Y and Z")
        sizes = [check_whole(f"resolution[{axis}]", size, 1) for axis, size in enumerate(resolution)]
        box = torch.as_tensor(box, dtype=torch.get_default_dtype()).clone()
        if box.shape != (2, 3) or not box.isfinite().all() or not (box[1] > box[0]).all():
            raise ValueError(f"box is {box.tolist()}; it must be (2, 3), the upper corner above the lower one")
        self.limit = check_real("limit", limit)
        self.decay = check_real("decay", decay, 1)
        self.every = check_whole("every", every, 1)
        self.warmup_steps = check_whole("warmup_steps", warmup_steps, 0)
        self.uniform_fraction = check_real("uniform_fraction", uniform_fraction, 1)
        self.occupied_fraction = check_real("occupied_fraction", occupied_fraction, 1)
        shape = (check_whole("levels", levels, 1), *sizes)
        self.register_buffer("estimates", torch.zeros(shape))
        self.register_buffer("occupied", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("box", box)

    @property
    def occupied_share(self) -> float:
        """The part of all cells that is occupied, 0 to 1."""
        return self.occupied.float().mean().item()

    @torch.no_grad()
    def update(
        self,
        step: int,
        density_times_step: Callable[[Tensor], Tensor],
        generator: torch.Generator | None = None,
    ) -> bool:
        """Look at cells again if it is time to.

        Args:
            step: of the training, from 0.
            density_times_step: maps points `[P, 3]` to a field's density there, times a step's length, `[P]`.
            generator: of the cells and the points in them, on the grid's device.

        Returns:
            Whether it was time: the step is a multiple of `every`.

        Raises:
            ValueError: the densities are not `[P]`, or not all finite.
        """
        if step % self.every:
            return False
        cells = self._all_cells() if step < self.warmup_steps else self._drawn_cells(generator)
        points = self._points_in(cells, generator)
        found = density_times_step(points)
        if found.shape != cells.shape or not found.isfinite().all():
            what = "not all finite" if found.shape == cells.shape else f"of shape {tuple(found.shape)}"
            raise ValueError(
                f"the densities of {len(cells)} points are {what}; they must be ({len(cells)},) and finite"
            )
        estimates = self.estimates.view(-1)
        estimates[cells] = torch.maximum(estimates[cells] * self.decay, found.to(estimates.dtype))
        torch.gt(self.estimates, estimates.mean().clamp(max=self.limit), out=self.occupied)
        if not self.occupied.any():
            logger.warning("occupancy grid is empty after the update of step %d: rays get no samples", step)
        return True

    def march(
        self,
        origins: Tensor,
        directions: Tensor,
        near: Tensor | float,
        far: Tensor | float,
        *,
        step: float,
        cone_angle: float = 0.0,
        jitter: Tensor | None = None,
        backend: str | None = None,
    ) -> Marched:
        """Samples in the occupied cells; see `kernels.occupancy_grid.march`. None if no cell is occupied."""
        options = {"step": step, "cone_angle": cone_angle, "jitter": jitter, "backend": backend}
        return march(origins, directions, near, far, self.occupied, self.box, **options)

    def _all_cells(self) -> Tensor:
        return torch.arange(self.estimates.numel(), device=self.estimates.device)

    def _drawn_cells(self, generator: torch.Generator | None) -> Tensor:
        """Numbers of different cells of all levels, in order."""
        count, device = self.estimates[0].numel(), self.estimates.device
        chosen = []
        for level, occupied in enumerate(self.occupied.flatten(1)):
            evenly = round(self.uniform_fraction * count)
            chosen.append(level * count + torch.randint(count, (evenly,), generator=generator, device=device))
            candidates = occupied.nonzero()[:, 0]
            order = torch.randperm(len(candidates), generator=generator, device=device)
            most = round(self.occupied_fraction * count)
            chosen.append(level * count + candidates[order[:most]])
        return torch.cat(chosen).unique()

    def _points_in(self, cells: Tensor, generator: torch.Generator | None) -> Tensor:
        """(P, 3), one random point of each cell."""
        level, *index = torch.unravel_index(cells, self.estimates.shape)
        corner = torch.stack(index, -1).to(self.box.dtype)
        within = torch.rand(corner.shape, generator=generator, device=corner.device, dtype=corner.dtype)
        sizes = corner.new_tensor(self.estimates.shape[1:])
        centre, half = (self.box[0] + self.box[1]) / 2, (self.box[1] - self.box[0]) / 2
        scale = torch.exp2(level.to(corner.dtype))[:, None]
        return centre + ((corner + within) / sizes * 2 - 1) * scale * half
