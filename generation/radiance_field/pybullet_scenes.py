"""Objects that come with PyBullet, as scenes: pictures and depths by its software renderer, from all around.

scene = load_scene("pybullet:duck_vhacd.urdf")
scene = load_scene("pybullet:random_urdfs/042/042.urdf")  # one of a thousand

PyBullet is the package of the extra `pybullet`, which has wheels for x86_64 alone.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from generation.argument_checks import check_whole
from generation.radiance_field.camera_paths import look_at
from generation.radiance_field.cameras import Cameras
from generation.radiance_field.picture_cache import cache_folder, kept_pictures
from generation.radiance_field.scene import WHITE, Scene

PREFIX = "pybullet:"
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
FIELD_OF_VIEW = 50.0  # degrees
DISTANCE = 4.2  # of the cameras, in half sides of the object, whose corners are in view from there
NEAR, FAR = DISTANCE - 2.0, DISTANCE + 2.0
LOWEST, HIGHEST = -0.3, 0.9  # sine of the cameras' elevations
MARGIN = 0.05  # of the box around what is seen, in half sides
LIGHT = (0.4, 0.3, 0.85)  # towards it


class PyBulletMissing(ImportError, ValueError):
    """PyBullet is not installed; as a `ValueError` of the source, commands say so in a line."""


@dataclass(frozen=True)
class BulletObject:
    """An object of PyBullet and the pictures that are taken of it.

    Args:
        urdf: its file, within the package `pybullet_data`.
        image_size: pixels a side.
        train_views, test_views: pictures; those for training come first.
        samples: a side, of whom the mean is a pixel; odd, so that one is its centre.

    Raises:
        ValueError: a number is out of range.
    """

    urdf: str = "duck_vhacd.urdf"
    image_size: int = 100
    train_views: int = 36
    test_views: int = 6
    samples: int = 3

    def __post_init__(self) -> None:
        check_whole("image_size", self.image_size, 1)
        check_whole("train_views", self.train_views, 1)
        check_whole("test_views", self.test_views, 0)
        if check_whole("samples", self.samples, 1) % 2 == 0:
            raise ValueError(f"samples is {self.samples}; it must be odd")

    @property
    def cameras(self) -> Cameras:
        """float64, in half sides of the object, which is at the origin: evenly around it, at heights of all kinds."""
        count, size = self.train_views + self.test_views, self.image_size
        number = torch.arange(count, dtype=torch.float64)
        height = LOWEST + (HIGHEST - LOWEST) * ((number + 0.5) * math.sqrt(2) % 1)
        across = (1 - height.square()).sqrt()
        azimuth = GOLDEN_ANGLE * number
        position = DISTANCE * torch.stack([across * azimuth.cos(), across * azimuth.sin(), height], -1)
        focal = 0.5 * size / math.tan(math.radians(FIELD_OF_VIEW) / 2)
        intrinsics = torch.tensor([focal, focal, size / 2, size / 2], dtype=torch.float64).repeat(count, 1)
        sizes = torch.full((count,), size)
        return Cameras(look_at(position, position.new_zeros(3)), intrinsics, sizes, sizes)


def load_bullet(source: BulletObject | str, cache: Path | str | None = None) -> Scene:
    """The scene of an object, with depths, on white; its largest side is 2 long, and its middle is the origin.

    Args:
        source: which one, or "pybullet:" and its `urdf`.
        cache: folder of the file that keeps the pictures; None is `cache_folder()`.

    Raises:
        PyBulletMissing: an ImportError: PyBullet is not installed.
        ValueError: there is no such object, or it cannot be loaded, or it has no extent.
    """
    source = BulletObject(source.removeprefix(PREFIX)) if isinstance(source, str) else source
    bullet, data = _packages()
    path = (data / source.urdf).resolve()
    if not path.is_relative_to(data) or path.suffix != ".urdf" or not path.is_file():
        raise ValueError(
            f"urdf is {source.urdf!r}; it must be a .urdf file in pybullet_data, "
            "like duck_vhacd.urdf, r2d2.urdf, or random_urdfs/000/000.urdf to random_urdfs/999/999.urdf"
        )
    about = json.dumps(dataclasses.asdict(source) | {"pybullet": importlib.metadata.version("pybullet")})
    key = hashlib.sha256(about.encode() + Path(__file__).read_bytes()).hexdigest()[:16]
    folder = cache_folder() if cache is None else Path(cache)
    made = kept_pictures(
        folder / f"pybullet-{key}.safetensors",
        source.urdf,
        lambda: _pictures(source, bullet, path),
        {"pybullet": about},
    )
    train, count = source.train_views, source.train_views + source.test_views
    held_out = torch.arange(train, count)
    return Scene(
        name=f"{PREFIX}{source.urdf}",
        images=made["images"],
        cameras=source.cameras.to(torch.float32),
        names=tuple(f"train/{i:03d}" if i < train else f"test/{i - train:03d}" for i in range(count)),
        splits={"train": torch.arange(train), "val": held_out, "test": held_out},
        box=made["box"],
        near=NEAR,
        far=FAR,
        background=WHITE,
        depths=made["depths"],
        transform=made["transform"],
    )


def _packages() -> tuple[ModuleType, Path]:
    """PyBullet, and the folder of its objects."""
    try:
        import pybullet
        import pybullet_data
    except ImportError as error:
        raise PyBulletMissing(
            "scenes of PyBullet's objects need the package pybullet (x86_64 alone); "
            f"pip install 'gated-vision-suite[pybullet]': {error}"
        ) from error
    return pybullet, Path(pybullet_data.getDataPath()).resolve()


def _pictures(source: BulletObject, bullet: ModuleType, path: Path) -> dict[str, Tensor]:
    """Images, depths, the box around what is seen, and the similarity from the object's world, `[3, 4]`."""
    client = bullet.connect(bullet.DIRECT)
    try:
        try:
            body = bullet.loadURDF(str(path), useFixedBase=True, physicsClientId=client)
        except bullet.error as error:
            raise ValueError(f"urdf is {source.urdf!r}; PyBullet cannot load it: {error}") from error
        links = range(-1, bullet.getNumJoints(body, physicsClientId=client))
        corners = np.array([bullet.getAABB(body, link, physicsClientId=client) for link in links])
        least, greatest = corners[:, 0].min(0), corners[:, 1].max(0)
        middle, half = torch.from_numpy((least + greatest) / 2), float((greatest - least).max() / 2)
        cameras = source.cameras
        seen = []
        if half > 0:
            seen = [_picture(source, bullet, client, pose, middle, half) for pose in cameras.c2w]
    finally:
        bullet.disconnect(client)
    if not any(depth.isfinite().any() for _, depth in seen):
        raise ValueError(f"urdf is {source.urdf!r}; nothing of it is seen")
    images, depths = (torch.stack(several) for several in zip(*seen, strict=True))
    points = []
    for index, depth in enumerate(depths):
        origins, directions = cameras.image_rays(index)
        depth /= -(directions @ cameras.c2w[index, :, 2])  # along the ray, from along the view
        met = depth.isfinite()
        points.append(origins[met] + depth[met][:, None] * directions[met])
    points = torch.cat(points)
    box = torch.stack([points.amin(0) - MARGIN, points.amax(0) + MARGIN])
    transform = torch.cat([torch.eye(3, dtype=torch.float64), -middle[:, None]], 1) / half
    return {"images": images, "depths": depths.float(), "box": box.float(), "transform": transform.float()}


def _picture(
    source: BulletObject, bullet: ModuleType, client: int, pose: Tensor, middle: Tensor, half: float
) -> tuple[Tensor, Tensor]:
    """uint8 `[H, W, 3]`, and float64 `[H, W]` depths along the view in half sides; inf where nothing is.

    Args:
        pose: `[3, 4]`, in half sides from the middle.
    """
    c2w = torch.eye(4, dtype=torch.float64)
    c2w[:3, :3], c2w[:3, 3] = pose[:, :3], pose[:, 3] * half + middle
    near, far, side = NEAR * half, FAR * half, source.image_size * source.samples
    reach = near * math.tan(math.radians(FIELD_OF_VIEW) / 2)
    # The renderer's samples are at the left lower corners of what they stand for: half a sample is added.
    least, most = (end * reach + reach / side for end in (-1, 1))
    options: dict[str, Any] = {"shadow": 0, "lightDirection": LIGHT, "lightSpecularCoeff": 0.0}
    _, _, colour, buffer, body = bullet.getCameraImage(
        side,
        side,
        torch.linalg.inv(c2w).T.flatten().tolist(),  # by columns, as in OpenGL
        bullet.computeProjectionMatrix(least, most, least, most, near, far),
        renderer=bullet.ER_TINY_RENDERER,
        physicsClientId=client,
        **options,
    )
    blocks = (source.image_size, source.samples, source.image_size, source.samples)
    met = torch.from_numpy(np.reshape(body, (side, side)) >= 0)
    colour = torch.from_numpy(np.reshape(colour, (side, side, 4))[..., :3].astype(np.float64))
    colour = torch.where(met[..., None], colour, 255.0).reshape(*blocks, 3).mean((1, 3))
    buffer = torch.from_numpy(np.reshape(buffer, (side, side)).astype(np.float64))
    depth = far * near / (far - (far - near) * buffer) / half
    centre = source.samples // 2
    depth = depth.masked_fill(~met, torch.inf)[centre :: source.samples, centre :: source.samples]
    return colour.round().to(torch.uint8), depth
