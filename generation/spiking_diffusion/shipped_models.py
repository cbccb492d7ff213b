"""Finds a spiking diffusion model by its name or folder."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from generation import model_folders

if TYPE_CHECKING:
    from generation.spiking_diffusion.pipeline import SpikingDiffusionPipeline

SHIPPED = {"digits": "spiking_digits", "digits-ann": "spiking_digits_ann"}
models_there = partial(model_folders.models_there, SHIPPED)
check_model = partial(model_folders.check_model, shipped=SHIPPED)


def load_pipeline(model: str | Path) -> "SpikingDiffusionPipeline":
    """Load a pipeline.

    Raises:
        ValueError: there is none, or a file of it is missing.
    """
    # Not above: command lines ask this module for names before they load anything that takes seconds.
    from generation.spiking_diffusion.pipeline import SpikingDiffusionPipeline

    folder = check_model(model)
    try:
        return SpikingDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise ValueError(f"model is {str(model)!r}, which cannot be loaded: {error}") from error
