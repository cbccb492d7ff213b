"""Small stock models of transformers with random weights and processors, one of each family Q-Zoom takes."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from multimodal.q_zoom import QZoom, QZoomConfig
from multimodal.tiny_reader.processing import CHAT, build_tokenizer

LAYERS, WIDTH, HEADS = 6, 64, 4
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def text_sizes(vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        **more,
    }


def qwen(family: str) -> tuple[PreTrainedModel, Any]:
    """A model of the Qwen family with cells of 16 pixels."""
    tokenizer = build_tokenizer()
    sizes = {"depth": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()}
    sections = {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}
    image = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size={"shortest_edge": 4096, "longest_edge": 16384})
    if family == "qwen3_vl":
        kind, of, processor, video = (
            Qwen3VLForConditionalGeneration,
            Qwen3VLConfig,
            Qwen3VLProcessor,
            Qwen3VLVideoProcessor,
        )
        sections["rope_parameters"]["mrope_interleaved"] = True
        sections["head_dim"] = 16
        sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": WIDTH}
        sizes |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    elif family == "qwen2_5_vl":
        kind, of = Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig
        processor, video = Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
        sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": WIDTH}
        sizes |= {"window_size": 64, "fullatt_block_indexes": [1]}
    else:
        kind, of = Qwen2VLForConditionalGeneration, Qwen2VLConfig
        processor, video = Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
        sizes |= {"embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2}
    config = of(
        text_config=text_sizes(len(tokenizer), **sections),
        vision_config=sizes,
        tie_word_embeddings=False,
        **ids,
    )
    made = processor(
        image_processor=image,
        tokenizer=tokenizer,
        video_processor=video(patch_size=8, merge_size=2),
        chat_template=CHAT,
    )
    return kind(config), made


def llava() -> tuple[PreTrainedModel, Any]:
    """LLaVA with images of 6 x 6 tokens of 8 pixels."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=8
    )
    text = LlamaConfig(**text_sizes(len(tokenizer), rope_parameters=ROPE))
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        image_seq_length=36,
    )
    image = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    processor = LlavaProcessor(
        image_processor=image,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>"),
    )
    return LlavaForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {
    "qwen2_vl": lambda: qwen("qwen2_vl"),
    "qwen2_5_vl": lambda: qwen("qwen2_5_vl"),
    "qwen3_vl": lambda: qwen("qwen3_vl"),
    "llava": llava,
}


def random_zoom(family: str, **changes: Any) -> QZoom:
    """A Q-Zoom around a random model whose answers depend on what it sees; `changes` are of its `QZoomConfig`."""
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.eos_token_id = None
    settings = {
        "tap_layer": 3,
        "proposal_depth": 2,
        "gate_depth": 2,
        "gate_threshold": 0.5,
        "region_threshold": 0.2,
        "coarse_tokens": (16, 64),
        "region_tokens": (16, 36),
        "least_region_pixels": 16,
    }
    if family == "llava":
        settings |= {"alignment": "separate", "proposal_rotary": False, "proposal_norm": True, "sink": "none"}
    if family == "qwen3_vl":
        settings |= {"sink": "first_token"}
    return QZoom.wrap(model.eval(), processor, QZoomConfig(**settings | changes))
