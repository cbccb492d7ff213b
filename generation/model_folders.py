"""Finds trained models by their names, or by their folders."""

from collections.abc import Mapping
from pathlib import Path

INDEX = "model_index.json"
CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"


def folder_of(model: str | Path, shipped: Mapping[str, str]) -> Path:
    """Of a shipped model, by its name, or else the path that `model` is."""
    return CHECKPOINTS / shipped[model] if model in shipped else Path(model)


def models_there(shipped: Mapping[str, str]) -> list[str]:
    """Names of the shipped models that this installation holds."""
    return [name for name, folder in shipped.items() if (CHECKPOINTS / folder / INDEX).is_file()]


def check_model(model: str | Path, shipped: Mapping[str, str]) -> Path:
    """The folder of a model; of a training run, its `pipeline`.

    Raises:
        ValueError: it holds none.
    """
    folder = folder_of(model, shipped)
    candidates = [folder, folder / "pipeline"]
    if found := next((candidate for candidate in candidates if (candidate / INDEX).is_file()), None):
        return found
    valid = " or ".join([*models_there(shipped), f"a folder with {INDEX}"])
    neither, nor = (candidate / INDEX for candidate in candidates)
    raise ValueError(f"model is {str(model)!r}; expected {valid}; neither {neither} nor {nor} is there")
