"""What a Q-Zoom is made of and when it zooms: depths of the two branches, thresholds, budgets of visual tokens."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from multimodal.argument_checks import check_choice, check_real, check_size, check_whole

Sink = Literal["corner", "first_token", "none"]
BoxMode = Literal["enclosing", "components"]
Alignment = Literal["continuous", "separate"]

CONFIGURATION_FILE = "q_zoom.json"


@dataclass(frozen=True)
class QZoomConfig:
    """Settings of Q-Zoom (arXiv 2604.06912; SD-RPN, arXiv 2509.16944).

    A *cell* is what one visual token of the language model covers: 28 pixels a side in Qwen2.5-VL, 32 in Qwen3-VL.

    Args:
        tap_layer: how many decoder layers run before the branches read the hidden states (the paper's B).
        proposal_depth: layers of the region proposal; of the last only the norm, query and key are used. At least 1.
        gate_depth: layers of the gate. At least 1.
        share_first_layer: one first layer for both branches: saves a layer's time and weights.
        proposal_rotary: rotate the query and keys of the region proposal's last layer (LLaVA's does not).
        proposal_norm: a norm of its own before that layer (LLaVA's has one).
        gate_threshold: zoom where the gate's probability is at least this, in [0, 1].
        region_threshold: cells whose blurred probability is above this belong to the region, in [0, 1].
        separability_threshold: of `gate="separability"`: zoom where the answer's score is below this, in [0, 1].
        sink: which cells never count: "corner" (Qwen2.5-VL: parts of the first row and column of maps above 256
            cells), "first_token" (Qwen3-VL: cells the first token points at) or "none".
        box_mode: "enclosing" is one box around all cells of the region, "components" one for each connected part.
        max_boxes: most boxes of "components".
        margin_cells: cells added around every box.
        least_region_pixels: shorter sides of a box in the source image grow to this.
        alignment: "continuous" puts the region's tokens on the rows and columns of the source image and one step
            later in time; "separate" treats the region as a second image.
        coarse_tokens: least and most visual tokens of the whole image.
        region_tokens: least and most visual tokens of a region.
        max_visual_tokens: most visual tokens of the image and its regions together; `None` for no limit.
        exact: run the decoder's last layer for all tokens of a prompt, so that the scores of answers without a closer
            look are the stock model's bit for bit. Otherwise it runs for the last token alone, which is faster and the
            same up to rounding.

    Raises:
        ValueError: a setting outside its range.
    """

    tap_layer: int
    proposal_depth: int = 3
    gate_depth: int = 3
    share_first_layer: bool = False
    proposal_rotary: bool = True
    proposal_norm: bool = False
    gate_threshold: float = 0.05
    region_threshold: float = 0.15
    separability_threshold: float = 0.98
    sink: Sink = "corner"
    box_mode: BoxMode = "enclosing"
    max_boxes: int = 1
    margin_cells: int = 0
    least_region_pixels: int = 28
    alignment: Alignment = "continuous"
    coarse_tokens: tuple[int, int] = (256, 576)
    region_tokens: tuple[int, int] = (256, 576)
    max_visual_tokens: int | None = None
    exact: bool = False

    def __post_init__(self):
        for name, least in LEAST.items():
            check_whole(name, getattr(self, name), least)
        for name in ("gate_threshold", "region_threshold", "separability_threshold"):
            check_real(name, getattr(self, name), 0, 1)
        for name, kinds in (("sink", Sink), ("box_mode", BoxMode), ("alignment", Alignment)):
            check_choice(name, getattr(self, name), get_args(kinds))
        for name in ("coarse_tokens", "region_tokens"):
            object.__setattr__(self, name, checked_budget(name, getattr(self, name)))
        if self.max_visual_tokens is not None:
            check_whole("max_visual_tokens", self.max_visual_tokens, 2)

    def save(self, path: Path) -> None:
        """Write the settings into a JSON file."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        path.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "QZoomConfig":
        """The settings saved in `folder`.

        Raises:
            ValueError: there are none, or not all of them are known or valid.
        """
        path = Path(folder) / CONFIGURATION_FILE
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} holds no settings of a Q-Zoom: {error}") from error
        return cls.from_settings(settings, path)

    @classmethod
    def from_settings(cls, settings: Any, source: object) -> "QZoomConfig":
        """The configuration of a dictionary read from `source`, which errors name."""
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(settings, dict) or not set(settings) <= known or "tap_layer" not in settings:
            unknown = sorted(set(settings) - known) if isinstance(settings, dict) else type(settings).__name__
            raise ValueError(f"{source} must hold settings of QZoomConfig, tap_layer among them; unknown: {unknown}")
        return cls(**settings)


LEAST = {
    "tap_layer": 1,
    "proposal_depth": 1,
    "gate_depth": 1,
    "max_boxes": 1,
    "margin_cells": 0,
    "least_region_pixels": 1,
}


def checked_budget(name: str, value: Any) -> tuple[int, int]:
    """`value` as least and most numbers of visual tokens.

    Raises:
        ValueError: it is no pair of whole numbers, at least 1, the first not above the second.
    """
    pair = check_size(name, value)
    if pair[0] > pair[1]:
        raise ValueError(f"{name} is {value!r}; the least number of visual tokens comes first, then the most")
    return pair


PRESETS = {
    "qwen2_5_vl_3b": QZoomConfig(tap_layer=24),
    "qwen2_5_vl_7b": QZoomConfig(tap_layer=18),
    "qwen3_vl_4b": QZoomConfig(tap_layer=24, sink="first_token", gate_threshold=0.1),
    "llava_1_5": QZoomConfig(
        tap_layer=15,
        proposal_rotary=False,
        proposal_norm=True,
        sink="none",
        box_mode="components",
        max_boxes=2,
        alignment="separate",
        coarse_tokens=(576, 576),
        region_tokens=(576, 576),
    ),
}
"""Settings of the published models by name. Thresholds are those of documents at 576 tokens; each task has its own."""
