"""Finds a radiance field by its name or folder."""

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from generation import model_folders

if TYPE_CHECKING:
    from generation.radiance_field.cameras import Cameras
    from generation.radiance_field.renderer import Renderer

SHIPPED = {"city": "city_hmohe"}
INDEX, CHECKPOINT = "config.json", Path("checkpoints/last.ckpt")


def fields_there() -> list[str]:
    """Names of the shipped fields that this installation holds."""
    return [name for name, folder in SHIPPED.items() if (model_folders.CHECKPOINTS / folder / INDEX).is_file()]


def check_field(model: str | Path) -> Path:
    """The folder of a radiance field; of a training run, its `renderer`.

    Raises:
        ValueError: it holds none; of a run that was stopped, it is said where it stopped.
    """
    folder = model_folders.folder_of(model, SHIPPED)
    for candidate in (folder / "renderer", folder):
        if (candidate / INDEX).is_file():
            return candidate
    if (checkpoint := folder / CHECKPOINT).is_file():
        raise ValueError(
            f"model is {str(model)!r}; this run was stopped{_where(checkpoint)} and left no renderer; finish it with "
            "`fit` as before and --ckpt_path last: it goes on in a new folder, beside this one"
        )
    valid = " or ".join([*fields_there(), f"a folder with {INDEX}"])
    raise ValueError(f"model is {str(model)!r}; expected {valid}")


def _where(checkpoint: Path) -> str:
    """At which step a run was stopped, in words; nothing if the file does not say."""
    import torch

    try:
        return f" at step {torch.load(checkpoint, map_location='cpu', weights_only=True, mmap=True)['global_step']}"
    except (OSError, RuntimeError, UnpicklingError, EOFError, KeyError, TypeError, ValueError):
        return ""


def load_field(model: str | Path) -> "tuple[Renderer, Cameras]":
    """A renderer, in evaluation, and the cameras it was trained with.

    Raises:
        ValueError: there is none, or a file of it is missing or damaged.
    """
    # Not above: command lines ask this module for names before they load anything that takes seconds.
    from generation.radiance_field.saved_renderer import load

    return load(check_field(model))
