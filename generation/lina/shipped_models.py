"""Finds a LINA model by its name or folder."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from generation import model_folders

if TYPE_CHECKING:
    from generation.lina.pipeline import LinaPipeline

SHIPPED = {"shapes": "lina_shapes", "openmoji": "lina_openmoji"}
folder_of = partial(model_folders.folder_of, shipped=SHIPPED)
models_there = partial(model_folders.models_there, SHIPPED)
check_model = partial(model_folders.check_model, shipped=SHIPPED)


def load_pipeline(model: str | Path) -> "LinaPipeline":
    """Load a pipeline, in float32 and evaluation mode.

    Args:
        model: the name of a shipped model, or a folder: one that `save_pretrained` wrote, of a run, or one of the
            authors'.

    Raises:
        ValueError: it is neither.
    """
    # Not above: command lines ask this module for names before they load anything that takes seconds.
    from torch import nn

    from generation.lina.pipeline import LinaPipeline

    folder = check_model(model)
    index = folder / model_folders.INDEX
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
