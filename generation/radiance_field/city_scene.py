"""The pictures of a `City` as a `Scene`: traced once (5 s for the default), then kept in the user's cache folder."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from generation.radiance_field import district_city
from generation.radiance_field.district_city import BOX, FAR, NEAR, SKY, City, picture
from generation.radiance_field.picture_cache import cache_folder, kept_pictures
from generation.radiance_field.scene import Scene


def load_city(city: City = City(), cache: Path | str | None = None) -> Scene:  # noqa: B008 - City is frozen
    """The city with its pictures, depths, districts and normals.

    Args:
        city: which one.
        cache: folder of the file that keeps the pictures, named by all that they depend on; None is `cache_folder()`.
            Where it cannot be written, the pictures are traced each time, and a warning says so.
    """
    folder = cache_folder() if cache is None else Path(cache)
    path = folder / f"city-{_key(city)}.safetensors"
    pictures = kept_pictures(path, "the city", lambda: _pictures(city), {"city": _description(city)})
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


def _description(city: City) -> str:
    return json.dumps(dataclasses.asdict(city), sort_keys=True)


def _key(city: City) -> str:
    """A name for the city as its parameters, and the tracer that is used, make it."""
    tracer = Path(district_city.__file__).read_bytes()
    return hashlib.sha256(_description(city).encode() + tracer).hexdigest()[:16]
