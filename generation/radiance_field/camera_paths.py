"""Paths of cameras to fly along.

Which way is up in a scene is found by its cameras, as nerfstudio's "vertical" does: people hold cameras level, so that
up is at right angles to the right axes of all of them. Where these are all alike, as of a camera that only moves, it is
the mean of the cameras' own up axes, or, of cameras that look down and turn, where they look from.
"""

import math

import torch
from torch import Tensor

from generation.argument_checks import check_choice, check_whole
from generation.radiance_field.cameras import Cameras

PATHS = ("orbit", "spiral", "views")
SNAPPED = math.cos(math.radians(20))  # as near to an axis of the box, up is that axis


def camera_path(path: str, count: int, cameras: Cameras, box: Tensor, width: int, height: int) -> Cameras:
    """Cameras of a path, with the field of view of the first of the given ones.

    Args:
        path: "orbit", a level circle that looks at the middle of the scene's ground; "spiral", twice around, from high
            and far to low and near; "views", from each of the given cameras to the next, from the first to the last.
        count: cameras of the path, 1 or more.
        cameras: with which the scene was taken; radius and height of the path are the means of theirs.
        box: `[2, 3]`, of the scene; its ground is the side of it that is lowest.
        width, height: of the pictures, in pixels.

    Raises:
        ValueError: an argument is none of these, or, for "orbit" and "spiral", the cameras are where these look, or do
            not tell which way is up.
    """
    check_choice("path", path, PATHS)
    for name, value in (("count", count), ("width", width), ("height", height)):
        check_whole(name, value, 1)
    part = torch.arange(count, dtype=torch.float64) / count
    position = cameras.c2w[:, :, 3].double()
    if path == "views":
        c2w = _between(cameras.c2w.double(), torch.linspace(0, len(cameras) - 1, count, dtype=torch.float64))
    else:
        upright = _upright(cameras.c2w.double(), path)
        position = position @ upright.T
        lowest, highest = (torch.cartesian_prod(*box.double().T) @ upright.T).aminmax(dim=0)
        centre = (lowest + highest) / 2
        middle = torch.stack([centre[0], centre[1], lowest[2]])  # on the ground
        reach, rise = (position[:, :2] - middle[:2]).norm(dim=1).mean(), position[:, 2].mean() - middle[2]
        if torch.hypot(reach, rise) < 1e-6 * (box[1] - box[0]).norm():
            where = (upright.T @ middle).tolist()
            raise ValueError(f"path is {path!r}, but the cameras are in the middle of the ground, {where}")
        turn = 2 * math.pi * part * (1 if path == "orbit" else 2)
        shrink = torch.ones_like(part) if path == "orbit" else 1.2 - 0.7 * part
        offset = torch.stack([reach * shrink * turn.cos(), reach * shrink * turn.sin(), rise * shrink], -1)
        c2w = upright.T @ look_at(middle + offset, middle)
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


def _upright(c2w: Tensor, path: str) -> Tensor:
    """The rotation `[3, 3]` of the world in which z is up, by poses `[N, 3, 4]`."""
    right, up, backward = c2w[:, :, 0], c2w[:, :, 1].mean(0), c2w[:, :, 2].mean(0)
    spread, across = torch.linalg.eigh(right.T @ right / len(right))  # of the right axes, the least first
    if spread[1] > 0.05 and spread[0] < 0.2 * spread[1]:
        towards = across[:, 0] * torch.sign(across[:, 0] @ (up + backward))
    else:
        towards = up if up.norm() > 0.1 else backward
    if towards.norm() < 0.1:
        raise ValueError(f"path is {path!r}, but the cameras do not tell which way is up; use path 'views'")
    towards = towards / towards.norm()
    axis = int(towards.abs().argmax())
    if towards[axis].abs() > SNAPPED:
        towards = torch.zeros_like(towards).index_fill(0, torch.tensor(axis), float(towards[axis].sign()))
    first = torch.zeros_like(towards)
    first[(axis + 1) % 3] = 1
    first = torch.nn.functional.normalize(first - (first @ towards) * towards, dim=0)
    return torch.stack([first, torch.linalg.cross(towards, first), towards])


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
