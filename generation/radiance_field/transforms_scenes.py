"""Scenes in JSON: nerfstudio's transforms.json (also instant-ngp's), and Blender's transforms_{train,val,test}.json.

Both hold camera-to-world matrices in OpenGL axes, x right, y up, looking along -z.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generation.radiance_field.cameras import Cameras
from generation.radiance_field.image_files import MILLIMETRES, measure
from generation.radiance_field.lens_distortion import COEFFICIENTS
from generation.radiance_field.scene import SPLITS, tenth_held_out
from generation.radiance_field.scene_files import SceneFiles

CAMERA_MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")  # all are cases of the first
ORIENTATIONS = {"up": True, "none": False}


def read_transforms(folder: Path) -> SceneFiles:
    """A scene in nerfstudio's format.

    Intrinsics stand at the top or in each frame: `fl_x fl_y cx cy w h k1 k2 k3 p1 p2`; or `camera_angle_x` stands in
    for the focal lengths, with the principal point in the middle. `w` and `h` are measured if they are missing.
    `mask_path` and `depth_file_path` are read; `train_filenames` and the others name the splits, and without them every
    tenth frame or so is held out. Frames are sorted by `file_path`.

    Raises:
        ValueError: something is missing or not valid; what, and in which frame, is said.
    """
    path = folder / "transforms.json"
    data = _json(path)
    frames = _frames(data, path)
    frames = sorted(frames, key=lambda frame: frame["file_path"])
    for frame in frames:
        model = frame.get("camera_model", data.get("camera_model", "OPENCV"))
        if model not in CAMERA_MODELS:
            raise ValueError(f"{_where(path, frame)}: camera_model is {model!r}; valid are {', '.join(CAMERA_MODELS)}")
    names = tuple(frame["file_path"] for frame in frames)
    paths = _image_paths(frames, path)
    override = data.get("orientation_override", "up")
    if override not in ORIENTATIONS:
        raise ValueError(
            f"{str(path)!r}: orientation_override is {override!r}; valid are {', '.join(map(repr, ORIENTATIONS))}"
        )
    applied = data.get("applied_transform")
    unit = _number(data, "depth_unit_scale_factor", str(path), MILLIMETRES)
    return SceneFiles(
        name=folder.resolve().name,
        cameras=_cameras(frames, data, paths, path),
        names=names,
        paths=paths,
        splits=_named_splits(data, names, path),
        near=0.05,
        far=1000.0,
        mask_paths=_optional_paths(frames, "mask_path", folder),
        depth_paths=_optional_paths(frames, "depth_file_path", folder),
        depth_unit=unit,
        orient=ORIENTATIONS[override],
        centre=True,
        scale=True,
        transform=None if applied is None else _matrix(applied, f"{str(path)!r}: applied_transform")[:3],
    )


def read_blender(folder: Path) -> SceneFiles:
    """A synthetic scene of NeRF: RGBA pictures, one horizontal field of view, the world of Blender as it is.

    Without transforms_val.json the test frames validate, and the other way about.

    Raises:
        ValueError: something is missing or not valid; what, and in which frame, is said.
    """
    frames, paths, splits, cameras = [], [], {}, []
    for split in SPLITS:
        path = folder / f"transforms_{split}.json"
        if split != "train" and not path.exists():
            continue
        data = _json(path)
        own = _frames(data, path)
        own_paths = _image_paths(own, path)
        cameras.append(_cameras(own, data, own_paths, path))
        splits[split] = torch.arange(len(frames), len(frames) + len(own))
        frames, paths = frames + own, paths + own_paths
    held_out = splits.get("test", splits.get("val", torch.arange(0)))
    return SceneFiles(
        name=folder.resolve().name,
        cameras=joined(cameras),
        names=tuple(frame["file_path"] for frame in frames),
        paths=paths,
        splits={"val": held_out, "test": held_out} | splits,
        near=2.0,
        far=6.0,
        box=torch.tensor([[-1.5] * 3, [1.5] * 3]),
    )


def joined(several: Sequence[Cameras]) -> Cameras:
    """The cameras one set after another."""
    distortions = [
        torch.zeros(len(own), len(COEFFICIENTS)) if own.distortion is None else own.distortion for own in several
    ]
    return Cameras(
        *(torch.cat([getattr(own, name) for own in several]) for name in ("c2w", "intrinsics", "width", "height")),
        torch.cat(distortions),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{str(path)!r} holds a {type(data).__name__}; it must be an object with 'frames'")
    return data


def _frames(data: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    frames = data.get("frames")
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"{str(path)!r} has no frames")
    for number, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise ValueError(f"{str(path)!r}: frame {number} has no 'file_path'")
    return frames


def _where(path: Path, frame: Mapping[str, Any]) -> str:
    return f"{str(path)!r}, frame {frame['file_path']!r}"


def _image_paths(frames: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """The pictures of frames of the file `path`; Blender scenes leave the suffix out.

    Raises:
        ValueError: one without suffix is there neither so nor with .png added.
    """
    paths = []
    for frame in frames:
        given = path.parent / frame["file_path"]
        if not given.suffix and not given.is_file():
            given = given.with_name(given.name + ".png")
            if not given.is_file():
                words = f"has no suffix, and there is neither that file nor, with .png added, {str(given)!r}"
                raise ValueError(f"{_where(path, frame)} {words}")
        paths.append(given)
    return paths


def _optional_paths(frames: Sequence[Mapping[str, Any]], key: str, folder: Path) -> list[Path | None] | None:
    paths = [folder / frame[key] if frame.get(key) else None for frame in frames]
    return paths if any(paths) else None


def _matrix(value: Any, what: str) -> Tensor:
    """`[3, 4]` or `[4, 4]` float32."""
    try:
        matrix = torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is no matrix of numbers: {error}") from error
    if tuple(matrix.shape) not in ((3, 4), (4, 4)):
        raise ValueError(f"{what} has shape {tuple(matrix.shape)}; it must be (4, 4) or (3, 4)")
    return matrix.float()


def _number(holder: Mapping[str, Any], key: str, where: str, missing: float | None) -> float:
    value = holder.get(key, missing)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {key} is {value!r}; it must be a finite number")
    return float(value)


def _angle(holder: Mapping[str, Any], key: str, where: str) -> float:
    """A field of view in radians."""
    angle = _number(holder, key, where, None)
    if not 0 < angle < math.pi:
        raise ValueError(f"{where}: {key} is {angle}; it must be above 0 and below pi, in radians")
    return angle


def _cameras(
    frames: Sequence[Mapping[str, Any]], data: Mapping[str, Any], paths: Sequence[Path], path: Path
) -> Cameras:
    sized = all(key in frame or key in data for frame in frames for key in "wh")
    measured = None if sized else measure(paths)
    poses, intrinsics, sizes, distortions = [], [], [], []
    for number, frame in enumerate(frames):
        holder, where = {**data, **frame}, _where(path, frame)
        if "transform_matrix" not in frame:
            raise ValueError(f"{where} has no 'transform_matrix'")
        poses.append(_matrix(frame["transform_matrix"], f"{where}: transform_matrix")[:3])
        if measured:
            holder |= {"w": int(measured.width[number]), "h": int(measured.height[number])}
        width, height = (int(_number(holder, key, where, None)) for key in "wh")
        intrinsics.append(_intrinsics(holder, width, height, where))
        sizes.append((width, height))
        distortions.append([_number(holder, name, where, 0.0) for name in COEFFICIENTS])
        if _number(holder, "k4", where, 0.0) != 0:
            raise ValueError(f"{where}: k4 is {holder['k4']}; valid is 0, for distortion has {' '.join(COEFFICIENTS)}")
    width, height = torch.tensor(sizes, dtype=torch.int64).unbind(-1)
    return Cameras(torch.stack(poses), torch.tensor(intrinsics), width, height, torch.tensor(distortions))


def _intrinsics(holder: Mapping[str, Any], width: int, height: int, where: str) -> list[float]:
    """fx fy cx cy"""
    if "fl_x" in holder:
        fx = _number(holder, "fl_x", where, None)
        fy = _number(holder, "fl_y", where, fx)
    elif "camera_angle_x" in holder:
        fx = 0.5 * width / math.tan(0.5 * _angle(holder, "camera_angle_x", where))
        fy = fx
        if "camera_angle_y" in holder:
            fy = 0.5 * height / math.tan(0.5 * _angle(holder, "camera_angle_y", where))
    else:
        raise ValueError(f"{where}: there is neither fl_x nor camera_angle_x")
    return [fx, fy, _number(holder, "cx", where, width / 2), _number(holder, "cy", where, height / 2)]


def _named_splits(data: Mapping[str, Any], names: Sequence[str], path: Path) -> dict[str, Tensor]:
    given = {split: data[f"{split}_filenames"] for split in SPLITS if f"{split}_filenames" in data}
    if not given:
        return tenth_held_out(len(names))
    numbers = {name: number for number, name in enumerate(names)}
    splits = {}
    for split, wanted in given.items():
        unknown = [name for name in wanted if name not in numbers]
        if unknown:
            raise ValueError(f"{str(path)!r}: {split}_filenames has {unknown[0]!r}, which no frame has")
        splits[split] = torch.tensor([numbers[name] for name in wanted], dtype=torch.int64)
    held_out = splits.get("test", splits.get("val", torch.arange(0)))
    return {"train": torch.arange(0), "val": held_out, "test": held_out} | splits
