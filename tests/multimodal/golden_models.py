"""Tiny models of the official implementation's golden files, as stock models of transformers."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from multimodal.q_zoom import QZoom, QZoomConfig
from multimodal.q_zoom.checkpoints import is_branch, load_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "qzoom"


@dataclass(frozen=True)
class GoldenModel:
    """A stock model with its branches, and the golden tensors by name."""

    zoom: QZoom
    tensors: dict[str, Tensor]
    settings: dict[str, str]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The processor's output; pixel values are only in some files, so features are used in their place."""
        ids = self.tensors["in.input_ids"]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": self.tensors["in.pixel_values"],
            "image_grid_thw": self.tensors["in.image_grid_thw"],
            "mm_token_type_ids": (ids == self.zoom.adapter.image_token).int(),
        }


def golden_model(name: str, **changes: object) -> GoldenModel:
    """The model of a golden file; `changes` are of its `QZoomConfig`."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        settings = file.metadata()
        tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    sizes = json.loads(settings["config"])
    weights = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    model = stock_model(name, sizes, {key: value for key, value in weights.items() if not is_branch(key)})
    config = {
        "tap_layer": int(settings["twig_K"]),
        "proposal_depth": int(settings["twig_T"]),
        "gate_depth": int(settings["twig_T"]),
        "region_threshold": float(settings.get("roi_conf_thresh", settings.get("stage2_roi_conf_thresh", 0.15))),
        "sink": "first_token" if name.startswith("qwen3") else "corner",
        **changes,
    }
    zoom = QZoom.wrap(model, None, QZoomConfig(**config))
    load_weights(zoom, {key: value for key, value in weights.items() if is_branch(key)}, name)
    return GoldenModel(zoom, tensors, settings)


def stock_model(name: str, sizes: dict, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A model of transformers with the weights of an official checkpoint."""
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    special = {key: sizes.get(key, default) for key, default in zip(tokens, (151, 152, 153, 154), strict=True)}
    rope = {"rope_type": "default", "rope_theta": sizes["rope_theta"], "mrope_section": sizes["mrope_section"]}
    text = {key: sizes[key] for key in TEXT_SIZES if key in sizes}
    if name.startswith("qwen3"):
        rope["mrope_interleaved"] = True
        kind, of = Qwen3VLForConditionalGeneration, Qwen3VLConfig
    else:
        kind, of = Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig
        weights = {
            ("model." if key.startswith("visual.") else "model.language_model.") + key.removeprefix("model.")
            if not key.startswith("lm_head")
            else key: value
            for key, value in weights.items()
        }
    vision = {"out_hidden_size": sizes["hidden_size"], **sizes["vision"]}
    config = of(
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": False, "max_position_embeddings": 4096},
        vision_config=vision,
        tie_word_embeddings=False,
        **special,
    )
    model = kind(config).eval()
    model.load_state_dict(weights, strict=True)
    model.generation_config.pad_token_id = sizes.get("pad", 157)
    model.generation_config.eos_token_id = None
    return model


TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
)
