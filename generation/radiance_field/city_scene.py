"""The pictures of a `City` as a `Scene`: traced once (5 s for the default), then kept in the user's cache folder."""

import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from generation.atomic_files import write_atomically
from generation.radiance_field import district_city
from generation.radiance_field.district_city import BOX, FAR, NEAR, SKY, City, picture
from generation.radiance_field.scene import Scene

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/gated-vision-suite`, where compiled kernels are too."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gated-vision-suite"


def load_city(city: City = City(), cache: Path | str | None = None) -> Scene:  # noqa: B008 - City is frozen
    """The city with its pictures, depths, districts and normals.

    Args:
        city: which one.
        cache: folder of the file that keeps the pictures, named by all that they depend on; None is `cache_folder()`.
            Where it cannot be written, the pictures are traced each time, and that is said.
    """
    folder = cache_folder() if cache is None else Path(cache)
    path = folder / f"city-{_key(city)}.safetensors"
    pictures = _kept(path)
    if pictures is None:
        pictures = _pictures(city)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda partial: save_file(pictures, partial, {"city": _description(city)}))
        except OSError as error:
            logger.warning("The pictures of the city cannot be kept in %s, and are traced each time: %s", folder, error)
    train, count = city.train_views, city.train_views + city.test_views
    held_out = torch.arange(train, count)
    return Scene(
        name="city",
        cameras=city.cameras.to(torch.float32),
        names=tuple(f"train/{i:03d}" if i < train else f"test/{i - train:03d}" for i in range(count)),
        splits={"train": torch.arange(train), "val": held_out, "test": held_out},
        box=torch.tensor(BOX),
        near=NEAR,
        far=FAR,
        background=SKY,
        **pictures,
    )


def _pictures(city: City) -> dict[str, Tensor]:
    columns = zip(*(picture(city, city.cameras, i) for i in range(len(city.cameras))), strict=True)
    names = ("images", "depths", "districts", "normals")
    return {name: torch.stack(several).contiguous() for name, several in zip(names, columns, strict=True)}


def _kept(path: Path) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged, and is traced again: %s", path, error)
        return None


def _description(city: City) -> str:
    return json.dumps(dataclasses.asdict(city), sort_keys=True)


def _key(city: City) -> str:
    """A name for the city as its parameters, and the tracer that is used, make it."""
    tracer = Path(district_city.__file__).read_bytes()
    return hashlib.sha256(_description(city).encode() + tracer).hexdigest()[:16]
