"""Finds a LINA model by its name or folder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from generation.lina.pipeline import LinaPipeline

INDEX = "model_index.json"
CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
SHIPPED = {"shapes": "lina_shapes", "openmoji": "lina_openmoji"}


def folder_of(model: str | Path) -> Path:
    """Of a shipped model, by its name, or else the path that `model` is."""
    return CHECKPOINTS / SHIPPED[model] if model in SHIPPED else Path(model)


def models_there() -> list[str]:
    """Names of the shipped models that this installation holds."""
    return [name for name in SHIPPED if (folder_of(name) / INDEX).is_file()]


def check_model(model: str | Path) -> Path:
    """The folder of a model.

    Raises:
        ValueError: it holds none.
    """
    folder = folder_of(model)
    if not (folder / INDEX).is_file():
        valid = ", ".join([*models_there(), f"or a folder with {INDEX}"])
        raise ValueError(f"model is {str(model)!r}; expected {valid}")
    return folder


def load_pipeline(model: str | Path) -> "LinaPipeline":
    """Load a pipeline, in float32 and evaluation mode.

    Args:
        model: the name of a shipped model, or a folder: one that `save_pretrained` wrote or one of the authors'.

    Raises:
        ValueError: it is neither.
    """
    # Not above: command lines ask this module for names before they load anything that takes seconds.
    from torch import nn

    from generation.lina.pipeline import LinaPipeline

    folder = check_model(model)
    index = folder / INDEX
    try:
        kind = json.loads(index.read_text()).get("_class_name")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{index} is not a JSON object: {error}") from error
    if kind != LinaPipeline.__name__:
        return LinaPipeline.from_official(folder)
    pipeline = LinaPipeline.from_pretrained(folder, local_files_only=True)
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            nn.Module.float(module)  # shipped weights are float16; diffusers' own `to` warns of nothing
    return pipeline
