"""Mega-NeRF's folders, in which Switch-NeRF's Building, Rubble, Residence, Sci-Art and Campus come.

The axes of the world are DRB: x down, y right, z backward; the cameras' are those of OpenGL. Positions are
(position - origin) / pose_scale_factor. The pictures are undistorted already; `distortion` there is not read.
"""

import logging
import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generation.radiance_field.cameras import Cameras
from generation.radiance_field.scene_files import SceneFiles

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".JPG", ".png", ".PNG")
ALTITUDES = {
    "building": (8.0, 50.0),
    "rubble": (11.0, 38.0),
    "residence": (30.0, 118.0),
    "sci-art": (-14.0, 70.0),
    "campus": (3.0, 132.0),
    "quad": (-55.0, 10.0),
}  # metres downward, of the released scenes


def read_mega_nerf(folder: Path, altitude_range: tuple[float, float] | None = None) -> SceneFiles:
    """A scene of train/ and val/, each with metadata/*.pt and rgbs/*, beside coordinates.pt and mappings.txt.

    Frames of val/ come twice, with one appearance: in "train" only their left half counts, in "val" and "test" only
    their right half, so that an appearance can be learnt for them. Frames are numbered by the name of their metadata.

    Args:
        altitude_range: metres downward of the highest and the lowest point of interest, between which the box lies, so
            that rays are clipped at both; None is that of the released scene after which the folder is called. Of
            another folder nothing is known then, and a warning says so.

    Raises:
        ValueError: a file is missing, or is not what it should be.
    """
    coordinates = _load(folder / "coordinates.pt", ("origin_drb", "pose_scale_factor"))
    origin = _numbers(coordinates["origin_drb"], (3,), folder / "coordinates.pt", "origin_drb")
    metres = float(_numbers(coordinates["pose_scale_factor"], (), folder / "coordinates.pt", "pose_scale_factor"))
    if not metres > 0:
        raise ValueError(f"{str(folder / 'coordinates.pt')!r}: pose_scale_factor is {metres}; it must be above 0")
    own = {split: sorted((folder / split / "metadata").glob("*.pt")) for split in ("train", "val")}
    if not own["train"]:
        raise ValueError(f"{str(folder / 'train' / 'metadata')!r} has no metadata (*.pt)")
    by_name = sorted([*own["train"], *own["val"]], key=lambda path: path.name)
    appearance = {path.name: number for number, path in enumerate(by_name)}
    metadata = [*by_name, *own["val"]]
    in_val = set(own["val"])
    names = _names(folder / "mappings.txt", appearance)
    cameras = _cameras(metadata)
    if altitude_range is None:
        known = [scene for scene in ALTITUDES if folder.resolve().name.lower().startswith(scene)]
        altitude_range = ALTITUDES[known[0]] if known else None
        if not known:
            logger.warning(
                "altitude_range is not given, and %r is called after no released scene (%s): the box is a cube around "
                "the cameras, most of it empty. Give (highest, lowest) in metres downward, where the ground is.",
                folder.resolve().name,
                ", ".join(ALTITUDES),
            )
    altitudes = None
    if altitude_range is not None:
        highest, lowest = altitude_range
        if not (math.isfinite(highest) and math.isfinite(lowest) and highest < lowest):
            raise ValueError(f"altitude_range is {altitude_range}; it must be (highest, lowest) in metres downward")
        altitudes = tuple((metre - float(origin[0])) / metres for metre in (highest, lowest))
    held_out = torch.arange(len(by_name), len(metadata))
    return SceneFiles(
        name=folder.resolve().name,
        cameras=cameras,
        names=tuple(names[path.name] for path in metadata),
        paths=[_picture(path) for path in metadata],
        splits={"train": torch.arange(len(by_name)), "val": held_out, "test": held_out},
        near=1 / metres,
        far=2.0,
        halves=[("left" if path in in_val else "") for path in by_name] + ["right"] * len(own["val"]),
        transform=torch.cat([torch.eye(3), -origin[:, None]], 1) / metres,
        box=_box(cameras, altitudes),
        appearance_ids=torch.tensor([appearance[path.name] for path in metadata]),
        altitude_range=altitudes,
    )


def _box(cameras: Cameras, altitudes: tuple[float, float] | None) -> Tensor | None:
    """Below and above the cameras, from the upper to the lower altitude; None if these are not known."""
    if altitudes is None:
        return None
    positions = cameras.c2w[:, :, 3]
    box = torch.stack([positions.amin(0), positions.amax(0)])
    box[:, 0] = torch.tensor(altitudes)
    return box


def _load(path: Path, keys: Sequence[str]) -> Mapping[str, Any]:
    """The dictionary in a .pt file, in which nothing but tensors and plain values is let in."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} is damaged, or holds more than tensors, numbers and text; it is not unpickled"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    missing = [key for key in keys if not isinstance(data, dict) or key not in data]
    if missing:
        raise ValueError(f"{str(path)!r} has no {missing[0]!r}; it must be a dictionary of {', '.join(keys)}")
    return data


def _numbers(value: Any, shape: tuple[int, ...], path: Path, name: str) -> Tensor:
    try:
        numbers = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{str(path)!r}: {name} are no numbers: {error}") from error
    if tuple(numbers.shape) != shape:
        raise ValueError(f"{str(path)!r}: {name} has shape {tuple(numbers.shape)}; it must be {shape}")
    return numbers


def _cameras(metadata: Sequence[Path]) -> Cameras:
    loaded = [(path, _load(path, ("W", "H", "c2w", "intrinsics"))) for path in metadata]
    sizes = [[int(_numbers(data[key], (), path, key)) for key in "WH"] for path, data in loaded]
    width, height = torch.tensor(sizes).unbind(-1)
    return Cameras(
        torch.stack([_numbers(data["c2w"], (3, 4), path, "c2w") for path, data in loaded]),
        torch.stack([_numbers(data["intrinsics"], (4,), path, "intrinsics") for path, data in loaded]),
        width,
        height,
    )


def _picture(metadata: Path) -> Path:
    """The picture of a frame; where there is none, a path that says which names it could have."""
    stem = metadata.parent.parent / "rgbs" / metadata.stem
    candidates = [stem.with_name(stem.name + suffix) for suffix in SUFFIXES]
    nowhere = stem.with_name(f"{stem.name}.{{{','.join(suffix[1:] for suffix in SUFFIXES)}}}")
    return next((path for path in candidates if path.is_file()), nowhere)


def _names(mappings: Path, metadata: Mapping[str, int]) -> dict[str, str]:
    """The name of the photograph behind each metadata file, by mappings.txt; its own where that says nothing."""
    names = {name: name for name in metadata}
    if not mappings.exists():
        return names
    for number, line in enumerate(mappings.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        photograph, _, name = line.strip().rpartition(",")
        if name not in metadata:
            raise ValueError(f"{str(mappings)!r}, line {number} is {line!r}; expected: photograph,metadata that exists")
        names[name] = photograph
    return names
