"""A trained radiance field in a folder: config.json says what it is, model.safetensors holds its numbers."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from generation.loaded_weights import not_finite
from generation.radiance_field.cameras import Cameras, check_poses
from generation.radiance_field.renderer import Renderer
from generation.radiance_field.scene import Scene
from training_runs.atomic_files import write_atomically, write_json

CONFIG, WEIGHTS, FORMAT = "config.json", "model.safetensors", 1
RENDERER, CAMERAS = "renderer.", "cameras."  # what names of tensors begin with


def save(renderer: Renderer, folder: Path, scene: Scene) -> None:
    """Write a renderer, and the cameras of the scene's training pictures, from which paths are made, into `folder`.

    Each file is written whole or not at all; for both, write into a new folder (`write_folder_atomically`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    cameras = scene.cameras[scene.splits["train"]].to("cpu")
    views = {"c2w": cameras.c2w, "intrinsics": cameras.intrinsics, "width": cameras.width, "height": cameras.height}
    if cameras.distortion is not None:
        views["distortion"] = cameras.distortion
    tensors = {f"{RENDERER}{name}": value for name, value in renderer.state_dict().items()}
    tensors |= {f"{CAMERAS}{name}": value for name, value in views.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(folder / WEIGHTS, lambda partial: save_file(tensors, partial))
    write_json(folder / CONFIG, {"format": FORMAT, "scene": scene.name, "renderer": renderer.settings})


def load(folder: Path) -> tuple[Renderer, Cameras]:
    """The renderer of a folder, in evaluation, and the cameras it was trained with.

    Raises:
        ValueError: a file is missing, damaged or not what it should be; it is named, and so are arguments or tensors.
    """
    config, weights = folder / CONFIG, folder / WEIGHTS
    for path in (config, weights):
        if not path.is_file():
            raise ValueError(f"{str(folder)!r} is not the folder of a radiance field: it has no {path.name}")
    try:
        told = json.loads(config.read_text())
        if told["format"] != FORMAT:
            raise ValueError(f"format is {told['format']!r}; it must be {FORMAT}")
        renderer = Renderer(**told["renderer"])
    except (ValueError, KeyError, TypeError) as error:  # broken JSON and text are ValueErrors, too
        raise ValueError(f"{str(config)!r} is not the configuration of a radiance field: {error!r}") from error
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{str(weights)!r} cannot be read: {error}") from error
    views = {name.removeprefix(CAMERAS): tensors.pop(name) for name in sorted(tensors) if name.startswith(CAMERAS)}
    _check({f"{RENDERER}{name}": value for name, value in renderer.state_dict().items()}, tensors, weights)
    renderer.load_state_dict({name.removeprefix(RENDERER): value for name, value in tensors.items()})
    if (bad := not_finite(renderer)) is not None:
        raise ValueError(f"{str(weights)!r}: {RENDERER}{bad} holds NaN or infinity")
    try:
        cameras = Cameras(**views)
        check_poses(cameras.c2w, [f"{CAMERAS}c2w[{i}]" for i in range(len(cameras))])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(weights)!r}: {CAMERAS}{error}") from error
    if not len(cameras):
        raise ValueError(f"{str(weights)!r}: {CAMERAS}c2w holds no camera; there must be one at least")
    return renderer.eval(), cameras


def _check(wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], path: Path) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        ours, theirs = (tuple(state[name].shape) if name in state else "absent" for state in (wanted, found))
        if ours != theirs:
            raise ValueError(f"{str(path)!r}: {name} is {theirs}; by {CONFIG} it must be {ours}")
