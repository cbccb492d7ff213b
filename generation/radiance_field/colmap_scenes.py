"""Scenes reconstructed by COLMAP: `sparse/0/cameras` and `images`, binary or text, with the pictures in a folder.

COLMAP's poses are world to camera, in OpenCV axes: x right, y down, looking along +z. The world here is turned to
(x, z, -y), as nerfstudio turns it, so that a world whose y axis points down has z up.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from generation.radiance_field.cameras import Cameras
from generation.radiance_field.lens_distortion import COEFFICIENTS
from generation.radiance_field.scene import every_eighth_held_out
from generation.radiance_field.scene_files import SceneFiles

MODELS = {
    "SIMPLE_PINHOLE": "f cx cy",
    "PINHOLE": "fx fy cx cy",
    "SIMPLE_RADIAL": "f cx cy k1",
    "RADIAL": "f cx cy k1 k2",
    "OPENCV": "fx fy cx cy k1 k2 p1 p2",
}  # what the parameters of each model are, in order; f is both focal lengths
MODEL_NAMES = (
    *MODELS,
    *("OPENCV_FISHEYE", "FULL_OPENCV", "FOV", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "THIN_PRISM_FISHEYE"),
)  # by COLMAP's number
WORLD = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]])  # of COLMAP to here


@dataclass(frozen=True)
class ColmapCamera:
    """Intrinsics by name (fx fy cx cy k1 k2 p1 p2), and the size of the pictures in pixels."""

    width: int
    height: int
    parameters: dict[str, float]


@dataclass(frozen=True)
class ColmapImage:
    """A picture: world to camera as a quaternion (w, x, y, z) and a translation."""

    name: str
    camera: int
    quaternion: tuple[float, float, float, float]
    translation: tuple[float, float, float]


def read_colmap(folder: Path, sparse: Path, images: str = "images") -> SceneFiles:
    """A reconstruction. Pictures are sorted by name; the first of every eight is held out.

    Args:
        folder: in which the folder `images` is.
        sparse: the folder of cameras.bin and images.bin, or cameras.txt and images.txt.
        images: folder of the pictures.

    Raises:
        ValueError: a file is missing, cut short or not valid, or a camera model is not supported.
    """
    binary = (sparse / "cameras.bin").exists()
    suffix = "bin" if binary else "txt"
    read_cameras, read_images = (_binary_cameras, _binary_images) if binary else (_text_cameras, _text_images)
    cameras = read_cameras(sparse / f"cameras.{suffix}")
    found = sorted(read_images(sparse / f"images.{suffix}"), key=lambda image: image.name)
    if not found:
        raise ValueError(f"{str(sparse / f'images.{suffix}')!r} has no images")
    for image in found:
        if image.camera not in cameras:
            raise ValueError(
                f"{str(sparse)!r}: image {image.name!r} is of camera {image.camera}; there are {sorted(cameras)}"
            )
    own = [cameras[image.camera] for image in found]
    return SceneFiles(
        name=folder.resolve().name,
        cameras=Cameras(
            torch.stack([_pose(image) for image in found]),
            _table(own, ("fx", "fy", "cx", "cy")),
            torch.tensor([camera.width for camera in own]),
            torch.tensor([camera.height for camera in own]),
            _table(own, COEFFICIENTS),
        ),
        names=tuple(image.name for image in found),
        paths=[folder / images / image.name for image in found],
        splits=every_eighth_held_out(len(found)),
        near=0.05,
        far=1000.0,
        orient=True,
        centre=True,
        scale=True,
        transform=WORLD,
    )


def sparse_folder(folder: Path) -> Path | None:
    """Where in a scene's folder a reconstruction lies, if one does."""
    for place in ("sparse/0", "colmap/sparse/0", "sparse", "."):
        if any((folder / place / f"cameras.{suffix}").is_file() for suffix in ("bin", "txt")):
            return folder / place
    return None


def _table(cameras: Sequence[ColmapCamera], names: Sequence[str]) -> Tensor:
    return torch.tensor([[camera.parameters.get(name, 0.0) for name in names] for camera in cameras])


def _pose(image: ColmapImage) -> Tensor:
    """Camera to world `[3, 4]`, in OpenGL axes and the world of here.

    Raises:
        ValueError: the quaternion has length 0.
    """
    quaternion = torch.tensor(image.quaternion, dtype=torch.float64)
    if not quaternion.any():
        raise ValueError(f"image {image.name!r} has a quaternion of length 0; it must be a rotation (w, x, y, z)")
    w, x, y, z = (quaternion / quaternion.norm()).tolist()
    rotation = torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )
    position = -rotation.T @ torch.tensor(image.translation, dtype=torch.float64)
    axes = rotation.T * torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)  # down to up, forward to backward
    return (WORLD[:, :3].double() @ torch.cat([axes, position[:, None]], 1)).float()


def _camera(model: str, width: int, height: int, values: Sequence[float], where: str) -> ColmapCamera:
    if model not in MODELS:
        raise ValueError(
            f"{where} is of model {model}; valid are {', '.join(MODELS)}: undistort the pictures with COLMAP first"
        )
    places = MODELS[model].split()
    if len(values) != len(places):
        raise ValueError(f"{where} has {len(values)} parameters; {model} has {len(places)}: {MODELS[model]}")
    parameters = dict(zip(places, values, strict=True))
    if "f" in parameters:
        parameters["fx"] = parameters["fy"] = parameters.pop("f")
    return ColmapCamera(width, height, parameters)


class _Bytes:
    """A binary file, read from its beginning on; one that is cut short is a `ValueError`."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0
        try:
            self.data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error}") from error

    def skip(self, count: int) -> int:
        """Pass `count` bytes, and say where they begin."""
        start, self.offset = self.offset, self.offset + count
        if self.offset > len(self.data):
            raise ValueError(
                f"{str(self.path)!r} is cut short: it has {len(self.data)} bytes, and goes on to {self.offset} at least"
            )
        return start

    def take(self, kinds: str) -> tuple:
        layout = struct.Struct(f"<{kinds}")
        return layout.unpack_from(self.data, self.skip(layout.size))

    def text(self) -> str:
        """Up to a zero byte."""
        end = self.data.find(b"\0", self.offset)
        start = self.skip((end if end >= 0 else len(self.data)) + 1 - self.offset)
        return self.data[start : self.offset - 1].decode("utf-8", errors="replace")

    def check_end(self) -> None:
        if self.offset != len(self.data):
            raise ValueError(
                f"{str(self.path)!r} has {len(self.data)} bytes; what it declares ends after {self.offset}"
            )


def _binary_cameras(path: Path) -> dict[int, ColmapCamera]:
    data, cameras = _Bytes(path), {}
    for _ in range(data.take("Q")[0]):
        number, model, width, height = data.take("iiQQ")
        where = f"{str(path)!r}: camera {number}"
        if not 0 <= model < len(MODEL_NAMES):
            raise ValueError(
                f"{where} is of model number {model}, but COLMAP has no such model: {str(path)!r} is damaged, "
                "or not COLMAP's"
            )
        name = MODEL_NAMES[model]
        values = data.take(f"{len(MODELS.get(name, '').split())}d")
        cameras[number] = _camera(name, width, height, values, where)
    data.check_end()
    return cameras


def _binary_images(path: Path) -> list[ColmapImage]:
    data, images = _Bytes(path), []
    for _ in range(data.take("Q")[0]):
        _, *pose, camera = data.take("i7di")
        name = data.text()
        data.skip(24 * data.take("Q")[0])  # the points seen: x, y and a point's number
        images.append(ColmapImage(name, camera, tuple(pose[:4]), tuple(pose[4:])))
    data.check_end()
    return images


def _lines(path: Path) -> list[tuple[int, str]]:
    """(number from 1, text) of the lines that are no comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if not line.startswith("#")]


def _text_cameras(path: Path) -> dict[int, ColmapCamera]:
    cameras = {}
    for number, line in _lines(path):
        if not line:
            continue
        where = f"{str(path)!r}, line {number}"
        try:
            own, model, width, height, *values = line.split()
            fields = int(own), int(width), int(height), [float(value) for value in values]
        except ValueError as error:
            raise ValueError(f"{where} is {line!r}; expected: id model width height parameters") from error
        cameras[fields[0]] = _camera(model, fields[1], fields[2], fields[3], f"{where}: camera {own}")
    return cameras


def _text_images(path: Path) -> list[ColmapImage]:
    lines = _lines(path)
    while lines and not lines[-1][1]:
        lines.pop()
    images = []
    for place, (number, line) in enumerate(lines):
        if place % 2:  # each second line has the points seen, and may be empty
            if not _holds_points(line):
                raise ValueError(
                    f"{str(path)!r}, line {number} is {line[:80]!r}; it must hold the points of {images[-1].name!r}, "
                    "or be empty: each picture has two lines"
                )
            continue
        try:
            _, *pose, camera, name = line.split(maxsplit=9)
            values = [float(value) for value in pose]
            images.append(ColmapImage(name, int(camera), tuple(values[:4]), tuple(values[4:])))
            if len(values) != 7:
                raise ValueError(f"{len(values)} numbers of a pose")
        except ValueError as error:
            raise ValueError(
                f"{str(path)!r}, line {number} is {line[:80]!r}; expected: id qw qx qy qz tx ty tz camera name"
            ) from error
    return images


def _holds_points(line: str) -> bool:
    """Whether a line is x, y and the number of a point, any number of times: the last is a whole number, unlike the
    name of a picture."""
    parts = line.split()
    return not parts or (len(parts) % 3 == 0 and parts[-1].lstrip("-").isdecimal())
