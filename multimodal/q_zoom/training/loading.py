"""A Q-Zoom to train: a backbone by name or folder, with new branches or trained ones."""

from pathlib import Path
from typing import Any

from transformers import AutoProcessor

import multimodal
import multimodal.tiny_reader.model  # transformers knows the tiny reader from here on
from multimodal.q_zoom.adapters import BackboneAdapter, adapter_of
from multimodal.q_zoom.checkpoints import load_base
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
    config = configuration_of(settings)
    if heads is not None:
        return QZoom.from_pretrained(path_of(backbone), None if heads == "backbone" else heads, config, **options)
    if config is None:
        raise ValueError(f"settings is None; new branches need them, of QZoomConfig or one of {', '.join(PRESETS)}")
    base = path_of(backbone)
    return QZoom.wrap(load_base(base, options), AutoProcessor.from_pretrained(base), config)


def load_to_answer(backbone: str, settings: dict[str, Any] | str | None = None, **options: Any) -> QZoom:
    """A Q-Zoom whose backbone is to answer alone: its branches are new, and never asked.

    Args:
        backbone, options: see `load_zoom`.
        settings: as of `load_zoom`; `None` for the least that fits the backbone (see `least_settings`).

    Raises:
        ValueError: settings are unknown or do not fit.
    """
    config, base = configuration_of(settings), path_of(backbone)
    model, processor = load_base(base, options), AutoProcessor.from_pretrained(base)
    return QZoom.wrap(model, processor, config or least_settings(adapter_of(model, processor)))


def least_settings(adapter: BackboneAdapter) -> QZoomConfig:
    """Settings that a backbone can have, with branches of one layer as early as it allows."""
    budgets = {}
    if adapter.fixed_tokens is not None:
        budgets = dict.fromkeys(("coarse_tokens", "region_tokens"), (adapter.fixed_tokens,) * 2)
    return QZoomConfig(
        max(1, adapter.deepstack_levels), proposal_depth=1, gate_depth=1, alignment=adapter.alignments[0], **budgets
    )


def configuration_of(settings: dict[str, Any] | str | None) -> QZoomConfig | None:
    """The configuration of settings, or of the preset that they name; `None` for `None`.

    Raises:
        ValueError: settings are unknown.
    """
    if isinstance(settings, str):
        if settings not in PRESETS:
            raise ValueError(f"settings is {settings!r}; presets are {', '.join(PRESETS)}")
        return PRESETS[settings]
    return None if settings is None else QZoomConfig.from_settings(settings, "settings")


def path_of(backbone: str) -> str:
    """Where a backbone is: in the folder of shipped ones if it is one of them."""
    shipped = SHIPPED / backbone
    return str(shipped) if (shipped / "config.json").is_file() else backbone
