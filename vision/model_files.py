"""Trained models on disk: `model.safetensors` beside `config.json`, as timm's `local-dir:` reads them."""

import json
import os
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from training_runs.atomic_files import write_atomically

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# Of `timm.create_model`: where weights came from is no part of the model that is saved.
_LOADING_ARGUMENTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def model_description(model: nn.Module, data: Any) -> dict[str, Any]:
    """timm's `pretrained_cfg` of `model` trained on `data` (a data module): preprocessing and label names.

    It holds primitives only, so that a checkpoint that carries it loads with `weights_only=True`.
    """
    size = (data.in_chans, data.image_size, data.image_size)
    trained = {
        "architecture": model.pretrained_cfg["architecture"],
        "num_classes": data.num_classes,
        "label_names": list(data.label_names),
        "input_size": list(size),
        "mean": list(data.mean),
        "std": list(data.std),
        "crop_pct": getattr(data, "crop_fraction", 1.0),
        "interpolation": getattr(data, "interpolation", "bicubic"),
    }
    kept = {name: model.pretrained_cfg.get(name) for name in ("first_conv", "classifier", "license")}
    return kept | trained


def save_model(model: nn.Module, folder: str | os.PathLike, model_args: dict[str, Any] | None = None) -> Path:
    """Write `model` so that `timm.create_model("local-dir:<folder>", pretrained=True)` builds it again.

    Each file appears whole or not at all. Returns the folder.

    Args:
        model: a timm model whose `pretrained_cfg` describes what it was trained on.
        model_args: what else `timm.create_model` needs to build it, primitives only.
    """
    model_args = {name: value for name, value in (model_args or {}).items() if name not in _LOADING_ARGUMENTS}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = dict(model.pretrained_cfg)
    in_chans = description["input_size"][0]
    config = {
        "architecture": description.pop("architecture"),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": {"in_chans": in_chans, **model_args},
        "pretrained_cfg": description,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG, lambda path: Path(path).write_text(json.dumps(config, indent=2) + "\n"))
    return folder


def load_model(checkpoint: str | os.PathLike) -> nn.Module:
    """Build a trained classifier, in evaluation mode.

    Args:
        checkpoint: a folder that `save_model` wrote, a run's folder, the `model.safetensors` in either, a training
            checkpoint (`.ckpt`), or a timm name with pretrained weights such as `vig_nano_patch4_28.mnist5k`.

    Raises:
        ValueError: it is none of these.
    """
    path = Path(checkpoint)
    if path.suffix == ".ckpt" and path.is_file():
        return _from_training_checkpoint(path)
    folder = path.parent if path.name == WEIGHTS else path
    for candidate in (folder, folder / "model"):
        if (candidate / CONFIG).is_file() and (candidate / WEIGHTS).is_file():
            return timm.create_model(f"local-dir:{candidate}", pretrained=True).eval()
    if not path.exists() and timm.is_model(str(checkpoint)) and timm.models.is_model_pretrained(str(checkpoint)):
        return timm.create_model(str(checkpoint), pretrained=True).eval()
    raise ValueError(
        f"checkpoint is {str(checkpoint)!r}; expected a folder with {CONFIG} and {WEIGHTS}, a run's folder, "
        "a .ckpt file, or the name of a pretrained timm model"
    )


def _from_training_checkpoint(path: Path) -> nn.Module:
    from vision.classification import ImageClassification

    saved = torch.load(path, map_location="cpu", weights_only=True)
    settings = dict(saved["hyper_parameters"])
    settings["model_args"] = {**(settings["model_args"] or {}), "pretrained": False}
    module = ImageClassification(**settings)
    module.load_state_dict(saved["state_dict"])
    module.on_load_checkpoint(saved)
    return module.final_model.eval()
