"""Cameras: poses, intrinsics and lens distortion; the rays of pixels, and the pixels of points.

A camera looks along its -z axis with x right and y up (OpenGL, nerfstudio, Blender). Picture coordinates have their
origin at the top left corner of the top left pixel, x right and y down, so that the centre of pixel (column, row) is at
(column + 0.5, row + 0.5).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from generation.radiance_field.lens_distortion import COEFFICIENTS, distort, undistort

POSE_TOLERANCE = 1e-3  # of an entry of RᵀR: as exact as poses with four digits are


@dataclass(frozen=True)
class Cameras:
    """N cameras.

    Attributes:
        c2w: `[N, 3, 4]`, camera to world: the camera's right, up and backward axes, and its position, as columns.
        intrinsics: `[N, 4]`, fx fy cx cy in pixels.
        width, height: `[N]` int64, in pixels.
        distortion: `[N, 5]`, k1 k2 k3 p1 p2 (see `lens_distortion`); None if there is none, as when all given are 0.

    Raises:
        ValueError: the shapes do not fit, or a size or a focal length is not positive.
    """

    c2w: Tensor
    intrinsics: Tensor
    width: Tensor
    height: Tensor
    distortion: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.c2w)
        shapes = {"c2w": (3, 4), "intrinsics": (4,), "width": (), "height": (), "distortion": (len(COEFFICIENTS),)}
        for name, of_one in shapes.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != (count, *of_one):
                raise ValueError(f"{name} has shape {tuple(value.shape)}; {count} cameras need {(count, *of_one)}")
        for name, values in (("fx", self.intrinsics[:, 0]), ("fy", self.intrinsics[:, 1])):
            _check_positive(name, values)
        if not self.intrinsics.isfinite().all():
            raise ValueError("intrinsics hold NaN or infinity; they must be finite")
        _check_positive("width", self.width)
        _check_positive("height", self.height)
        if self.distortion is not None and not self.distortion.any():
            object.__setattr__(self, "distortion", None)

    def __len__(self) -> int:
        return len(self.c2w)

    def __getitem__(self, chosen: Tensor | slice | Sequence[int]) -> "Cameras":
        """Some of the cameras."""
        distortion = None if self.distortion is None else self.distortion[chosen]
        return Cameras(self.c2w[chosen], self.intrinsics[chosen], self.width[chosen], self.height[chosen], distortion)

    @property
    def model(self) -> Literal["PINHOLE", "OPENCV"]:
        """OPENCV if a lens of any camera distorts."""
        return "PINHOLE" if self.distortion is None else "OPENCV"

    def to(self, target: torch.device | str | torch.dtype) -> "Cameras":
        """The cameras on another device, or with numbers (but the sizes) of another precision."""
        sizes = {} if isinstance(target, torch.dtype) else {n: getattr(self, n).to(target) for n in ("width", "height")}
        distortion = None if self.distortion is None else self.distortion.to(target)
        return replace(
            self, c2w=self.c2w.to(target), intrinsics=self.intrinsics.to(target), distortion=distortion, **sizes
        )

    def resized(self, width: Tensor, height: Tensor) -> "Cameras":
        """The cameras of the same pictures scaled to other sizes, each `[N]`."""
        across, down = width / self.width, height / self.height
        factors = torch.stack([across, down, across, down], -1).to(self.intrinsics.dtype)
        return replace(self, intrinsics=self.intrinsics * factors, width=width, height=height)

    def directions(self, index: Tensor | int, x: Tensor, y: Tensor) -> Tensor:
        """Unit directions `[..., 3]` in the world of the rays through the points (x, y) of pictures.

        Args:
            index: which camera, an int or `[...]`.
            x, y: `[...]` in pixels, not rounded: the first pixel's centre is at (0.5, 0.5).
        """
        fx, fy, cx, cy = self.intrinsics[index].unbind(-1)
        across, down = (x - cx) / fx, (y - cy) / fy
        if self.distortion is not None:
            across, down = undistort(across, down, self.distortion[index])
        in_camera = torch.stack([across, -down, -torch.ones_like(across)], -1)
        in_camera = in_camera / in_camera.norm(dim=-1, keepdim=True)
        return (self.c2w[index][..., :3] @ in_camera[..., None])[..., 0]  # (..., 3)

    def rays(self, index: Tensor | int, column: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Origins and unit directions, each `[..., 3]` in the world, of the rays through the centres of pixels.

        Args:
            index: which camera, an int or `[...]`.
            column, row: `[...]`, from 0.
        """
        precision = self.c2w.dtype
        directions = self.directions(index, column.to(precision) + 0.5, row.to(precision) + 0.5)
        return self.c2w[index][..., 3].expand_as(directions), directions

    def image_rays(self, index: int) -> tuple[Tensor, Tensor]:
        """`rays` of all pixels of a picture, each `[H, W, 3]`."""
        return self.rays(index, *self._pixels(index))

    def pixel_areas(self, index: int) -> Tensor:
        """`[H, W]`: the area of each pixel at distance 1, by the directions to its right and lower neighbours.

        As nerfstudio's `pixel_area`, the base of the cones of mip-NeRF.
        """
        column, row = (position.to(self.c2w.dtype) + 0.5 for position in self._pixels(index))
        here = self.directions(index, column, row)
        right, below = self.directions(index, column + 1, row), self.directions(index, column, row + 1)
        return (right - here).norm(dim=-1) * (below - here).norm(dim=-1)

    def _pixels(self, index: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(int(self.height[index]), device=self.c2w.device)
        columns = torch.arange(int(self.width[index]), device=self.c2w.device)
        row, column = torch.meshgrid(rows, columns, indexing="ij")
        return column, row

    def project(self, index: Tensor | int, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where points of the world `[..., 3]` are seen: x, y in pixels, and the depth along the view, each `[...]`.

        A point of depth 0 or less lies behind the camera, and its x and y mean nothing.
        """
        c2w = self.c2w[index]
        right, up, backward = ((points - c2w[..., 3])[..., None, :] @ c2w[..., :3])[..., 0, :].unbind(-1)
        across, down = right / -backward, up / backward
        if self.distortion is not None:
            across, down = distort(across, down, self.distortion[index])
        fx, fy, cx, cy = self.intrinsics[index].unbind(-1)
        return fx * across + cx, fy * down + cy, -backward


def _check_positive(name: str, values: Tensor) -> None:
    if not (values > 0).all():
        worst = int((~(values > 0)).nonzero()[0])
        raise ValueError(f"{name} of camera {worst} is {values[worst].item()}; it must be above 0")


def check_poses(c2w: Tensor, names: Sequence[str]) -> None:
    """See that poses `[N, 3, 4]` turn and move, and do nothing else.

    Raises:
        ValueError: one holds NaN or infinity, is not orthonormal, or is left-handed; the frame is named.
    """
    rotations = c2w[..., :3].double()
    for name, pose, rotation in zip(names, c2w, rotations, strict=True):
        if not pose.isfinite().all():
            raise ValueError(f"the pose of frame {name!r} holds {_not_finite(pose)}; it must be finite")
        off = (rotation.T @ rotation - torch.eye(3, dtype=torch.float64, device=pose.device)).abs().max().item()
        if off > POSE_TOLERANCE:
            raise ValueError(
                f"the pose of frame {name!r} is not orthonormal: RᵀR is {off:.3g} away from the identity; "
                f"at most {POSE_TOLERANCE} is allowed"
            )
        if torch.linalg.det(rotation) < 0:
            raise ValueError(
                f"the pose of frame {name!r} is left-handed (its rotation has determinant -1); "
                "it must be a rotation, with x right, y up and z backward"
            )


def _not_finite(pose: Tensor) -> str:
    return "NaN" if pose.isnan().any() else "infinity"


def orient_and_scale(
    cameras: Cameras, orient: bool = True, centre: bool = True, scale: bool = True
) -> tuple[Cameras, Tensor]:
    """The cameras in a world that is upright, centred and of size 1, as nerfstudio makes it.

    Args:
        orient: turn the mean of the cameras' up axes to +z (nerfstudio's "up").
        centre: move the mean of their positions to the origin ("poses").
        scale: make the largest absolute coordinate of a position 1.

    Returns:
        The cameras, and the similarity `[3, 4]` from the old world to the new: a point goes to
        `transform[:, :3] @ point + transform[:, 3]`, and lengths grow by `similarity_scale(transform)`.

    Raises:
        ValueError: the up axes cancel each other.
    """
    poses = cameras.c2w.double()
    rotation = torch.eye(3, dtype=torch.float64, device=poses.device)
    if orient:
        up = poses[:, :, 1].mean(0)
        if up.norm() < 1e-6:
            raise ValueError("orient is True, but the up axes of the cameras cancel each other; use orient=False")
        rotation = _rotation_to_z(up / up.norm())
    middle = poses[:, :, 3].mean(0) if centre else torch.zeros(3, dtype=torch.float64, device=poses.device)
    positions = (poses[:, :, 3] - middle) @ rotation.T
    largest = positions.abs().max().item()
    factor = 1 / largest if scale and largest > 0 else 1.0
    transform = factor * torch.cat([rotation, -(rotation @ middle)[:, None]], 1)
    moved = torch.cat([rotation @ poses[:, :, :3], factor * positions[..., None]], -1)
    precision = cameras.c2w.dtype
    return replace(cameras, c2w=moved.to(precision)), transform.to(precision)


def similarity_scale(transform: Tensor) -> float:
    """By how much a similarity `[3, 4]` makes lengths grow."""
    return float(torch.linalg.det(transform[:, :3].double())) ** (1 / 3)


def _rotation_to_z(up: Tensor) -> Tensor:
    """The smallest rotation `[3, 3]` that takes a unit vector to +z (Rodrigues)."""
    axis = torch.linalg.cross(up, up.new_tensor([0.0, 0.0, 1.0]))
    if axis.abs().sum() < 1e-6:
        axis = torch.linalg.cross(up, up.new_tensor([1.0, 0.0, 0.0]))  # no turn, or half a one: any level axis does
    x, y, z = (axis / axis.norm()).tolist()
    across = up.new_tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = up[2].clamp(-1, 1).acos()
    return torch.eye(3, dtype=up.dtype, device=up.device) + angle.sin() * across + (1 - angle.cos()) * across @ across
