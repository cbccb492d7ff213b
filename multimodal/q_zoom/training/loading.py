"""A Q-Zoom to train: a backbone by name or folder, with new branches or trained ones."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor

import multimodal
import multimodal.tiny_reader.model  # transformers knows the tiny reader from here on
from multimodal.q_zoom.checkpoints import branches_expected
from multimodal.q_zoom.configuration import PRESETS, QZoomConfig
from multimodal.q_zoom.model import QZoom

SHIPPED = Path(multimodal.__file__).parent / "checkpoints"


def load_zoom(
    backbone: str, heads: str | None = None, settings: dict[str, Any] | str | None = None, **options: Any
) -> QZoom:
    """A Q-Zoom whose branches are to be trained.

    Args:
        backbone: folder or hub name of a model of transformers, or the name of a folder of `multimodal/checkpoints`.
        heads: folder of trained branches to go on from; "backbone" for those among the backbone's weights; `None` for
            new ones, copies of the backbone's layers.
        settings: of `QZoomConfig`, or the name of a preset; `None` for those saved with the branches.
        options: of the model's `from_pretrained`.

    Raises:
        ValueError: settings are missing, unknown or do not fit, or the branches do not.
    """
    base = str(SHIPPED / backbone) if (SHIPPED / backbone / "config.json").is_file() else backbone
    if isinstance(settings, str):
        if settings not in PRESETS:
            raise ValueError(f"settings is {settings!r}; presets are {', '.join(PRESETS)}")
        config = PRESETS[settings]
    else:
        config = None if settings is None else QZoomConfig.from_settings(settings, "settings")
    if heads is not None:
        return QZoom.from_pretrained(base, None if heads == "backbone" else heads, config, **options)
    if config is None:
        raise ValueError(f"settings is None; new branches need them, of QZoomConfig or one of {', '.join(PRESETS)}")
    with branches_expected():
        model = AutoModelForImageTextToText.from_pretrained(base, **options)
    return QZoom.wrap(model, AutoProcessor.from_pretrained(base), config)
