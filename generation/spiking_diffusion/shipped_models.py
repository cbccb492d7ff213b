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
        ValueError: there is none.
    """
    # Not above: command lines ask this module for names before they load anything that takes seconds.
    from generation.spiking_diffusion.pipeline import SpikingDiffusionPipeline

    return SpikingDiffusionPipeline.from_pretrained(check_model(model), local_files_only=True)
