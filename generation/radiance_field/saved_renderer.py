"""A trained radiance field in a folder: config.json says what it is, model.safetensors holds its numbers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from generation.atomic_files import write_atomically, write_json
from generation.loaded_weights import not_finite
from generation.radiance_field.cameras import Cameras
from generation.radiance_field.renderer import Renderer
from generation.radiance_field.scene import Scene

CONFIG, WEIGHTS, FORMAT = "config.json", "model.safetensors", 1


def save(renderer: Renderer, folder: Path, scene: Scene) -> None:
    """Write a renderer, and the cameras of the scene's training pictures, from which paths are made, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    cameras = scene.cameras[scene.splits["train"]].to("cpu")
    views = {"c2w": cameras.c2w, "intrinsics": cameras.intrinsics, "width": cameras.width, "height": cameras.height}
    if cameras.distortion is not None:
        views["distortion"] = cameras.distortion
    tensors = {f"renderer.{name}": value for name, value in renderer.state_dict().items()}
    tensors |= {f"cameras.{name}": value for name, value in views.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(folder / WEIGHTS, lambda partial: save_file(tensors, partial))
    write_json(folder / CONFIG, {"format": FORMAT, "scene": scene.name, "renderer": renderer.settings})


def load(folder: Path) -> tuple[Renderer, Cameras]:
    """The renderer of a folder, in evaluation, and the cameras it was trained with.

    Raises:
        ValueError: a file is missing, damaged or not what it should be; it is named.
    """
    config, weights = folder / CONFIG, folder / WEIGHTS
    for path in (config, weights):
        if not path.is_file():
            raise ValueError(f"{str(folder)!r} is not the folder of a radiance field: it has no {path.name}")
    try:
        told = json.loads(config.read_text())
        renderer = Renderer(**told["renderer"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{str(config)!r} is not the configuration of a radiance field: {error!r}") from error
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{str(weights)!r} cannot be read: {error}") from error
    parts: dict[str, dict[str, Any]] = {"renderer": {}, "cameras": {}}
    for name, value in tensors.items():
        part, _, own = name.partition(".")
        parts.setdefault(part, {})[own] = value
    _check(renderer, parts["renderer"], weights)
    renderer.load_state_dict(parts["renderer"])
    if (bad := not_finite(renderer)) is not None:
        raise ValueError(f"{str(weights)!r}: {bad} holds NaN or infinity")
    return renderer.eval(), Cameras(**parts["cameras"])


def _check(renderer: Renderer, found: Mapping[str, torch.Tensor], path: Path) -> None:
    wanted = renderer.state_dict()
    for name in wanted.keys() | found.keys():
        ours, theirs = (None if name not in state else tuple(state[name].shape) for state in (wanted, found))
        if ours != theirs:
            raise ValueError(f"{str(path)!r}: {name} has the shape {theirs}; by config.json it is {ours}")
