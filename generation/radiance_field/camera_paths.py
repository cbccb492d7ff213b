"""Paths of cameras to fly along."""

import math

import torch
from torch import Tensor

from generation.argument_checks import check_choice, check_whole
from generation.radiance_field.cameras import Cameras

PATHS = ("orbit", "spiral", "views")


def camera_path(path: str, count: int, cameras: Cameras, box: Tensor, width: int, height: int) -> Cameras:
    """Cameras of a path, with the field of view of the first of the given ones.

    Args:
        path: "orbit", a level circle that looks at the middle of the scene's ground; "spiral", twice around, from high
            and far to low and near; "views", from each of the given cameras to the next, from the first to the last.
        count: cameras of the path, 1 or more.
        cameras: with which the scene was taken; radius and height of the path are the means of theirs.
        box: `[2, 3]`, of the scene, z upward.
        width, height: of the pictures, in pixels.

    Raises:
        ValueError: an argument is none of these, or the cameras are where "orbit" and "spiral" look.
    """
    check_choice("path", path, PATHS)
    for name, value in (("count", count), ("width", width), ("height", height)):
        check_whole(name, value, 1)
    part = torch.arange(count, dtype=torch.float64) / count
    position = cameras.c2w[:, :, 3].double()
    if path == "views":
        c2w = _between(cameras.c2w.double(), torch.linspace(0, len(cameras) - 1, count, dtype=torch.float64))
    else:
        centre = (box[0] + box[1]).double() / 2
        middle = torch.stack([centre[0], centre[1], box[0, 2].double()])  # on the ground
        reach, rise = (position[:, :2] - middle[:2]).norm(dim=1).mean(), position[:, 2].mean() - middle[2]
        if torch.hypot(reach, rise) < 1e-6 * (box[1] - box[0]).norm():
            raise ValueError(f"path is {path!r}, but the cameras are in the middle of the ground, {middle.tolist()}")
        turn = 2 * math.pi * part * (1 if path == "orbit" else 2)
        shrink = torch.ones_like(part) if path == "orbit" else 1.2 - 0.7 * part
        offset = torch.stack([reach * shrink * turn.cos(), reach * shrink * turn.sin(), rise * shrink], -1)
        c2w = look_at(middle + offset, middle)
    scale = min(width / cameras.width[0], height / cameras.height[0])
    fx, fy = (cameras.intrinsics[0, :2] * scale).tolist()
    intrinsics = torch.tensor([fx, fy, width / 2, height / 2]).repeat(count, 1)
    sizes = (torch.full((count,), size) for size in (width, height))
    return Cameras(c2w.to(cameras.c2w.dtype), intrinsics.to(cameras.intrinsics.dtype), *sizes)


def look_at(position: Tensor, target: Tensor) -> Tensor:
    """Poses `[N, 3, 4]` at `[N, 3]` that look at `[3]`, z upward in their pictures (y, if they look along z)."""
    backward = torch.nn.functional.normalize(position - target, dim=-1)
    along_z = backward[:, :2].norm(dim=-1, keepdim=True) < 1e-6
    up = torch.where(along_z, backward.new_tensor([0.0, 1.0, 0.0]), backward.new_tensor([0.0, 0.0, 1.0]))
    right = torch.nn.functional.normalize(torch.linalg.cross(up, backward), dim=-1)
    return torch.stack([right, torch.linalg.cross(backward, right), backward, position], -1)


def _between(c2w: Tensor, place: Tensor) -> Tensor:
    """Poses `[N, 3, 4]` at places `[N]` between the numbers of `c2w`: straight lines, axes orthonormal."""
    first = place.floor().long().clamp(max=max(len(c2w) - 2, 0))
    second = (first + 1).clamp(max=len(c2w) - 1)
    part = (place - first)[:, None, None]
    mixed = torch.lerp(c2w[first], c2w[second], part)
    left, _, right = torch.linalg.svd(mixed[:, :, :3])  # the nearest rotation
    flip = torch.ones(len(mixed), 3, dtype=mixed.dtype)
    flip[:, 2] = torch.linalg.det(left @ right)
    return torch.cat([(left * flip[:, None]) @ right, mixed[:, :, 3:]], -1)
