"""Finds a radiance field by its name or folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from generation import model_folders

if TYPE_CHECKING:
    from generation.radiance_field.cameras import Cameras
    from generation.radiance_field.renderer import Renderer

SHIPPED = {"city": "city_hmohe"}
INDEX = "config.json"


def fields_there() -> list[str]:
    """Names of the shipped fields that this installation holds."""
    return [name for name, folder in SHIPPED.items() if (model_folders.CHECKPOINTS / folder / INDEX).is_file()]


def check_field(model: str | Path) -> Path:
    """The folder of a radiance field; of a training run, its `renderer`.

    Raises:
        ValueError: it holds none.
    """
    folder = model_folders.folder_of(model, SHIPPED)
    for candidate in (folder / "renderer", folder):
        if (candidate / INDEX).is_file():
            return candidate
    valid = " or ".join([*fields_there(), f"a folder with {INDEX}"])
    raise ValueError(f"model is {str(model)!r}; expected {valid}")


def load_field(model: str | Path) -> "tuple[Renderer, Cameras]":
    """A renderer, in evaluation, and the cameras it was trained with.

    Raises:
        ValueError: there is none, or a file of it is missing or damaged.
    """
    # Not above: command lines ask this module for names before they load anything that takes seconds.
    from generation.radiance_field.saved_renderer import load

    return load(check_field(model))
