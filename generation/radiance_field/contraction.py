"""From a scene's world to the unit cube of a hash grid, and the split of unbounded scenes into inside and outside."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from generation.argument_checks import check_choice

CONTRACTIONS = ("none", "l2", "l_inf")


def contract(points: Tensor, norm: str) -> Tensor:
    """All of space into a ball (norm "l2") or cube ("l_inf") of radius 2: x where |x| <= 1, else (2 - 1 / |x|) x / |x|.

    Args:
        points: `[..., 3]`.
        norm: "l2", as in mip-NeRF 360 (arXiv 2111.12077), or "l_inf", as nerfstudio has it for grids.

    Raises:
        ValueError: there is no such norm.
    """
    check_choice("norm", norm, CONTRACTIONS[1:])
    size = points.norm(dim=-1, keepdim=True) if norm == "l2" else points.abs().amax(-1, keepdim=True)
    outside = size.clamp(min=1)  # within, it is 1 and its factor 1, so that no branch divides by 0
    return points * ((2 - 1 / outside) / outside)


class SceneSpace(nn.Module):
    """Maps points of the world to the unit cube.

    With "none", (x - least corner) / longest side: axes keep their proportions, and points outside of the box come to
    lie outside of the cube. With "l2" or "l_inf", the box's centre and half of its longest side make it the unit of
    `contract`, and the result y becomes (y + 2) / 4: all of space lies in the cube, the box in its middle half.

    Args:
        box: least and greatest corner, `[2][3]` or six numbers in a row.
        contraction: "none", "l2" or "l_inf".

    Raises:
        ValueError: the box is none, or there is no such contraction.
    """

    def __init__(self, box: Any = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), contraction: str = "none"):
        super().__init__()
        self.contraction = check_choice("contraction", contraction, CONTRACTIONS)
        self.register_buffer("box", check_box(box))

    def forward(self, points: Tensor) -> Tensor:
        """`[N, 3]` of `[N, 3]`.

        Raises:
            ValueError: points have another shape.
        """
        if self.contraction != "none":
            return contract(self.centred(points), self.contraction) * 0.25 + 0.5
        check_points(points, 3)
        least, greatest = self.box.to(points.dtype)
        return (points - least) * (1 / (greatest - least).max())

    def centred(self, points: Tensor) -> Tensor:
        """`[N, 3]` of `[N, 3]`: 0 in the box's centre, 1 half of its longest side from there; nothing is contracted.

        Raises:
            ValueError: points have another shape.
        """
        check_points(points, 3)
        least, greatest = self.box.to(points.dtype)
        return (points - (least + greatest) / 2) * (2 / (greatest - least).max())

    def extra_repr(self) -> str:
        return f"box={self.box.tolist()}, contraction={self.contraction!r}"


def check_points(points: Tensor, dims: int) -> None:
    """Raise `ValueError` for what is not `[N, dims]`."""
    if points.dim() != 2 or points.shape[1] != dims:
        raise ValueError(f"points have shape {tuple(points.shape)}; it must be (N, {dims})")


def check_box(box: Any) -> Tensor:
    """`[2, 3]` of a box.

    Raises:
        ValueError: it is none, or has no volume.
    """
    try:
        corners = torch.as_tensor(box, dtype=torch.float32).clone().reshape(2, 3)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"box is {box!r}; it must be two corners of three numbers") from error
    if not corners.isfinite().all() or not (corners[0] < corners[1]).all():
        raise ValueError(
            f"box is {corners.tolist()}; it must be a least and a greatest corner, finite, each axis apart"
        )
    return corners


@dataclass(frozen=True)
class Ellipsoid:
    """Where the foreground of a scene ends, as in Mega-NeRF and Switch-NeRF.

    Attributes:
        centre, radius: `[3]`.

    Raises:
        ValueError: these are none.
    """

    centre: Tensor
    radius: Tensor

    def __post_init__(self) -> None:
        for name in ("centre", "radius"):
            value = getattr(self, name)
            if value.shape != (3,) or not value.isfinite().all():
                raise ValueError(f"{name} is {value.tolist()}; it must be three finite numbers")
        if not (self.radius > 0).all():
            raise ValueError(f"radius is {self.radius.tolist()}; it must be positive")

    @classmethod
    def around(
        cls, positions: Tensor, altitude_range: Sequence[float] | None = None, margin: float = 1.1
    ) -> "Ellipsoid":
        """The ellipsoid about cameras: half their range along each axis, grown until it holds them, then by `margin`.

        Args:
            positions: `[N, 3]` of cameras.
            altitude_range: of the first coordinate, in place of that of the cameras, which are moved into it.
            margin: a factor, positive.

        Raises:
            ValueError: there is no range along an axis, or an argument is not as described.
        """
        if positions.dim() != 2 or positions.shape[1] != 3 or len(positions) == 0:
            raise ValueError(f"positions have shape {tuple(positions.shape)}; it must be (N, 3), N at least 1")
        if not margin > 0:
            raise ValueError(f"margin is {margin!r}; it must be positive")
        if altitude_range is not None:
            least, greatest = altitude_range
            moved = positions[:, 0].clamp(least, greatest)
            ends = positions.new_tensor([[least], [greatest]]).repeat_interleave(len(positions), 0)
            others = positions[:, 1:].repeat(2, 1)
            positions = torch.cat([torch.cat([moved[:, None], positions[:, 1:]], 1), torch.cat([ends, others], 1)])
        least, greatest = positions.amin(0), positions.amax(0)
        centre, radius = (least + greatest) / 2, (greatest - least) / 2
        if not (radius > 0).all():
            raise ValueError(f"positions have the ranges {(2 * radius).tolist()} along the axes; none may be 0")
        farthest = ((positions - centre) / radius).norm(dim=1).max()
        return cls(centre, radius * farthest * margin)

    @property
    def box(self) -> Tensor:
        """`[2, 3]`, the least box around it."""
        return torch.stack([self.centre - self.radius, self.centre + self.radius])

    def _approach(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where rays come nearest to the centre, of the unit ball: distance, point, and length of a direction there."""
        origins, directions = (origins - self.centre) / self.radius, directions / self.radius
        length = directions.norm(dim=-1, keepdim=True)
        distance = -(origins * directions).sum(-1, keepdim=True) / length.square()
        return distance, origins + distance * directions, length

    def reached_by(self, origins: Tensor, directions: Tensor) -> Tensor:
        """bool `[R]`, which rays begin in the ellipsoid or meet it ahead; one without direction does not."""
        distance, nearest, length = self._approach(origins, directions)
        within = 1 - nearest.square().sum(-1, keepdim=True)
        return ((within > 0) & (distance + within.clamp(min=0).sqrt() / length > 0))[:, 0]

    def _nearest(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`_approach` of rays whose lines all meet the ellipsoid."""
        distance, nearest, length = self._approach(origins, directions)
        missed = (nearest.square().sum(-1) >= 1).flatten()
        if missed.any():
            raise ValueError(
                f"{int(missed.sum())} of {missed.numel()} rays miss the ellipsoid, the first is ray "
                f"{int(missed.int().argmax())}; it must hold all cameras"
            )
        return distance, nearest, length

    def exit_distances(self, origins: Tensor, directions: Tensor) -> Tensor:
        """Distances `[R]`, in lengths of their directions, at which rays leave.

        Args:
            origins, directions: `[R, 3]`.

        Raises:
            ValueError: a ray's line misses the ellipsoid.
        """
        distance, nearest, length = self._nearest(origins, directions)
        return (distance + (1 - nearest.square().sum(-1, keepdim=True)).sqrt() / length)[:, 0]

    def inverted_points(self, origins: Tensor, directions: Tensor, inverse_radius: Tensor) -> tuple[Tensor, Tensor]:
        """Points of rays outside, as NeRF++ (arXiv 2010.07492) gives them to a network.

        In units of the ellipsoid, the point of the ray at the distance r from the centre is a unit vector u times r.

        Args:
            origins, directions: `[R, 3]`.
            inverse_radius: `[R, S]`, 1 / r: from 1, at the ellipsoid, to 0, infinitely far.

        Returns:
            `[R, S, 4]` of u and 1 / r, and `[R, S]` the distances along the rays, in lengths of their directions.

        Raises:
            ValueError: a ray's line misses the ellipsoid, or shapes do not fit.
        """
        if inverse_radius.dim() != 2 or len(inverse_radius) != len(origins):
            raise ValueError(f"inverse_radius has shape {tuple(inverse_radius.shape)}; it must be ({len(origins)}, S)")
        distance, nearest, length = self._nearest(origins, directions)
        ahead = (directions / self.radius / length)[:, None]  # (R, 1, 3)
        # With 1 / r as a factor, nothing is infinite at 0, where u is the direction.
        along = (1 - inverse_radius.square() * nearest.square().sum(-1, keepdim=True)).sqrt()  # (R, S)
        unit = inverse_radius[..., None] * nearest[:, None] + along[..., None] * ahead
        return torch.cat([unit, inverse_radius[..., None]], -1), distance + along / (inverse_radius * length)
