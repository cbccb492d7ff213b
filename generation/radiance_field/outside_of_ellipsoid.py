"""What lies behind the ellipsoid that holds a scene's foreground: a field of its own, as in Mega-NeRF and Switch-NeRF.

A ray's foreground ends where it leaves the ellipsoid. From there to infinity it has S bins, even in u = 1 - 1 / r, with
r the distance from the centre in units of the ellipsoid, at whose middles the background field is asked. Its densities
are per unit of u, and the last bin is as good as endless, so that the background is opaque: it is composited behind the
foreground by the light that this lets through.

Source: Mega-NeRF, arXiv 2112.10703, with the points of NeRF++, arXiv 2010.07492. Theirs are even bins and then finer
ones where these have weight; here there are even ones alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from generation.argument_checks import check_whole
from generation.radiance_field.contraction import Ellipsoid
from generation.radiance_field.ray_samplers import stratified_bins
from generation.radiance_field.scene import Scene
from generation.radiance_field.switch_nerf import BackgroundField
from kernels.volume_rendering import composite

ENDLESS = 1e10  # the length of a ray's last bin


class OutsideOfEllipsoid(nn.Module):
    """A `BackgroundField`, the ellipsoid outside of which it is asked, and how.

    Args:
        samples: S of the module.
        field: arguments of the field.

    Buffers: `centre` and `radius` of the ellipsoid, and `box`, the scene's.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, samples: int = 64, **field: Any) -> None:
        super().__init__()
        self.samples = check_whole("background_field.samples", samples, 1)
        try:
            self.field = BackgroundField(**field)
        except ValueError as error:
            raise ValueError(f"background_field.{error}") from error
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("radius", torch.ones(3))
        self.register_buffer("box", torch.tensor([[-1.0] * 3, [1.0] * 3]))

    @property
    def ellipsoid(self) -> Ellipsoid:
        return Ellipsoid(self.centre, self.radius)

    def place(self, scene: Scene) -> None:
        """Take the ellipsoid of a scene.

        If the scene has a range of altitudes, it is Mega-NeRF's, about all cameras, with that range downward; of any
        other, it is about all cameras and the corners of the box.

        Raises:
            ValueError: cameras have no range along an axis.
        """
        positions = scene.cameras.c2w[:, :, 3]
        if scene.altitude_range is None:
            positions = torch.cat([positions, torch.cartesian_prod(*scene.box.to(positions.dtype).T)])
        found = Ellipsoid.around(positions, scene.altitude_range)
        self.centre.copy_(found.centre)
        self.radius.copy_(found.radius)
        self.box.copy_(scene.box)

    def ends(self, origins: Tensor, directions: Tensor, near: float, far: float) -> Tensor:
        """Distances `[R]` at which the foreground of rays `[R, 3]` ends: `near` for those that it has no part of."""
        found = origins.new_full(origins.shape[:1], near)
        reached = self.ellipsoid.reached_by(origins, directions)
        leaves = self.ellipsoid.exit_distances(origins[reached], directions[reached])
        return found.masked_scatter(reached, leaves.clamp(max=far))

    def forward(
        self,
        origins: Tensor,
        directions: Tensor,
        behind: Tensor,
        jitter: Tensor | None = None,
        appearance: Tensor | int | None = None,
    ) -> Tensor:
        """Colours `[R, 3]` of the background.

        Args:
            origins, directions: `[R, 3]`.
            behind: `[3]`, the colour of rays that do not meet the ellipsoid.
            jitter: `[R]` from 0 to 1, which moves a ray's bins; None leaves them where they are.
            appearance: see `BackgroundField`; `[R]`, or one for all.
        """
        reached = self.ellipsoid.reached_by(origins, directions)
        origins, directions = origins[reached], directions[reached]
        zero, count = origins.new_zeros(len(origins)), self.samples
        moved = "none" if jitter is None else jitter[reached]
        edges = stratified_bins(zero, zero + 1, count, jitter=moved).edges
        inverse_radius = 1 - (edges[:, 1:] + edges[:, :-1]) / 2
        points, _ = self.ellipsoid.inverted_points(origins, directions, inverse_radius)
        if isinstance(appearance, Tensor):
            appearance = appearance[reached].repeat_interleave(count)
        along = directions[:, None].expand(-1, count, -1).reshape(-1, 3)
        said = self.field(points.reshape(-1, 4), along, appearance)
        start, end = edges[:, :-1], torch.cat([edges[:, 1:-1], edges.new_full((len(edges), 1), ENDLESS)], 1)
        offsets = torch.arange(0, len(edges) * count + 1, count, device=edges.device)
        made = composite(said.density, said.colour, start.reshape(-1), end.reshape(-1), offsets)
        everywhere = behind.to(made.colour.dtype).expand(len(reached), 3)
        return everywhere.index_put((reached.nonzero()[:, 0],), made.colour)
