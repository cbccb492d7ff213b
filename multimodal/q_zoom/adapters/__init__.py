"""Backbones by their `model_type`: which adapter reads them, and why others cannot be read."""

from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from multimodal.q_zoom.adapters.llava import LlavaAdapter
from multimodal.q_zoom.adapters.protocol import BackboneAdapter, UnsupportedBackbone
from multimodal.q_zoom.adapters.qwen import QwenAdapter

__all__ = ["BackboneAdapter", "UnsupportedBackbone", "adapter_of", "register_adapter"]

_ADAPTERS: dict[str, Callable[[PreTrainedModel, Any], BackboneAdapter]] = {
    "qwen2_vl": QwenAdapter,
    "qwen2_5_vl": QwenAdapter,
    "qwen3_vl": QwenAdapter,
    "tiny_reader": QwenAdapter,
    "llava": LlavaAdapter,
}
CROSS_ATTENTION = "the image is read by cross-attention, so no token of the prompt stands for a place in it"
RESAMPLER = "its resampler leaves visual tokens that stand for no place in the image"
_REASONS = {
    "mllama": CROSS_ATTENTION,
    "idefics": CROSS_ATTENTION,
    "blip-2": RESAMPLER,
    "instructblip": RESAMPLER,
    "idefics2": RESAMPLER,
    "kosmos-2": RESAMPLER,
}


def register_adapter(model_type: str, adapter: Callable[[PreTrainedModel, Any], BackboneAdapter]) -> None:
    """Let Q-Zoom read models of `model_type` by `adapter(model, processor)`."""
    _ADAPTERS[model_type] = adapter


def adapter_of(model: PreTrainedModel, processor: Any) -> BackboneAdapter:
    """The adapter of a model.

    Raises:
        UnsupportedBackbone: there is none, or it could not be exact.
    """
    config = model.config
    reason = reason_against(config)
    if reason is not None:
        raise UnsupportedBackbone(f"Q-Zoom cannot be put around {config.model_type!r}: {reason}")
    return _ADAPTERS[config.model_type](model, processor)


def reason_against(config: PretrainedConfig) -> str | None:
    """Why models of `config` are not supported, or `None`."""
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, whose encoder reads the whole image before the question"
    if config.model_type in _REASONS:
        return _REASONS[config.model_type]
    text = config.get_text_config()
    others = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention"})
    if others or (getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)):
        kinds = ", ".join(others) or "sliding windows"
        return f"its decoder has layers of {kinds}, whose caches cannot be cut back to a part of the prompt exactly"
    if config.model_type not in _ADAPTERS:
        return f"no adapter is known (there are {', '.join(sorted(_ADAPTERS))}); register_adapter adds one"
    return None
