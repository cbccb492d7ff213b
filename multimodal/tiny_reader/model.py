"""The tiny reader: transformers' Qwen2.5-VL with a small convolutional network in place of its vision transformer.

All but the vision part is stock Qwen2.5-VL, so that whatever works with that model (`generate`, M-RoPE, Q-Zoom's
adapter for Qwen) works with this one, in a million parameters.
"""

import math

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from multimodal.tiny_reader.processing import CELL, END, IMAGE, MERGE, PAD, PATCH, VIDEO, WORDS

NARROWEST = 32  # channels of the first convolution


class TinyReaderConfig(Qwen2_5_VLConfig):
    """As Qwen2.5-VL's. Of `vision_config`, `hidden_size` is the convolutions' width, `depth` the number of blocks."""

    model_type = "tiny_reader"


def tiny_configuration(width: int = 96, layers: int = 4, blocks: int = 3) -> TinyReaderConfig:
    """A reader of scenes: `layers` decoder layers of `width`, heads of 32, `blocks` blocks of convolutions.

    Raises:
        ValueError: `width` is no multiple of 32.
    """
    if width < 32 or width % 32:
        raise ValueError(f"width is {width!r}; it must be a multiple of 32")
    word = WORDS.index
    return TinyReaderConfig(
        text_config={
            "vocab_size": len(WORDS),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 32,
            "initializer_range": 0.05,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": word(END),
            "pad_token_id": word(PAD),
            "tie_word_embeddings": True,
        },
        vision_config={
            "hidden_size": width,
            "out_hidden_size": width,
            "depth": blocks,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            # Of the vision transformer that stock Qwen2.5-VL has, and which is replaced.
            "num_heads": 4,
            "intermediate_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        image_token_id=word(IMAGE),
        video_token_id=word(VIDEO),
        vision_start_token_id=word("<|vision_start|>"),
        vision_end_token_id=word("<|vision_end|>"),
        tie_word_embeddings=True,
    )


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of `[B, C, H, W]`."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Neighbourhood(nn.Module):
    """A ConvNeXt block (Liu et al. 2022): depthwise 5 x 5 convolution, then two layers for each position."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, maps: Tensor) -> Tensor:
        tokens = self.norm(self.mix(maps).permute(0, 2, 3, 1))
        tokens = self.contract(nn.functional.gelu(self.expand(tokens)))
        return maps + tokens.permute(0, 3, 1, 2)


class ConvolutionalVision(nn.Module):
    """Pictures to visual tokens, one for each cell of 8 x 8 pixels.

    Each token holds what its surroundings show and where it is: Fourier features of its row and column, relative to
    the picture's height and width, go through a linear layer and are added.
    """

    def __init__(self, config: Qwen2_5_VLVisionConfig):
        super().__init__()
        if config.patch_size * config.spatial_merge_size != CELL:
            raise ValueError(
                f"patch_size is {config.patch_size}, spatial_merge_size {config.spatial_merge_size}; "
                f"their product must be {CELL}"
            )
        self.config = config
        self.spatial_merge_size = config.spatial_merge_size
        width, out = config.hidden_size, config.out_hidden_size
        half = width * 2 // 3
        self.stem = nn.Sequential(
            nn.Conv2d(config.in_channels, NARROWEST, 5, 2, 2),
            ChannelNorm(NARROWEST),
            nn.GELU(),
            nn.Conv2d(NARROWEST, half, 3, 2, 1),
            ChannelNorm(half),
            nn.GELU(),
            nn.Conv2d(half, width, 3, 2, 1),
            ChannelNorm(width),
        )
        self.blocks = nn.Sequential(*(Neighbourhood(width) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, out)
        self.place = nn.Linear(4 * 4, out, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.project.weight.dtype

    def places(self, rows: int, columns: int) -> Tensor:
        """Fourier features of the cells' centres, as `[rows, columns, 16]`."""
        device = self.project.weight.device
        octaves = math.pi * 2.0 ** torch.arange(4, device=device)

        def waves(count: int) -> Tensor:
            angles = ((torch.arange(count, device=device) + 0.5) / count)[:, None] * octaves
            return torch.cat((angles.sin(), angles.cos()), 1)

        down, across = waves(rows)[:, None].expand(-1, columns, -1), waves(columns)[None].expand(rows, -1, -1)
        return torch.cat((down, across), 2)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]`, normalised, to `[B, H / 8 * W / 8, out_hidden_size]`, row by row."""
        maps = self.blocks(self.stem(pictures)).permute(0, 2, 3, 1)
        places = self.place(self.places(*maps.shape[1:3]).to(maps.dtype))
        return (self.project(self.norm(maps)) + places).flatten(1, 2)

    def unfold(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """The image processor's patches `[n * rows * columns, 3 * 2 * 4 * 4]` to pictures `[n, 3, H, W]`.

        `rows` and `columns` count patches. Of the two frames, which are equal for a picture, the first is taken.
        """
        merge, patch = self.spatial_merge_size, self.config.patch_size
        patches = patches.view(
            -1, rows // merge, columns // merge, merge, merge, 3, self.config.temporal_patch_size, patch, patch
        )[:, :, :, :, :, :, 0]
        return patches.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, 3, rows * patch, columns * patch)

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **_) -> BaseModelOutputWithPooling:
        """Patches of any number of pictures, one after the other, to the tokens of all, `[tokens, out_hidden_size]`.

        Raises:
            ValueError: a picture has several frames; videos are not for this model.
        """
        grids = grid_thw.tolist()
        if any(frames != 1 for frames, _, _ in grids):
            raise ValueError(f"grid_thw is {grids}; the first of each must be 1, for videos cannot be read")
        tokens: list[Tensor] = []
        start = 0
        while len(tokens) < len(grids):
            first, grid = len(tokens), grids[len(tokens)]
            count = next((i for i, other in enumerate(grids[first:]) if other != grid), len(grids) - first)
            length = count * grid[1] * grid[2]
            tokens += self.encode(self.unfold(hidden_states[start : start + length], *grid[1:])).unbind()
            start += length
        together = torch.cat(tokens)
        return BaseModelOutputWithPooling(last_hidden_state=together, pooler_output=together)


class TinyReaderForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL, `model.visual` being a `ConvolutionalVision`."""

    config_class = TinyReaderConfig

    def __init__(self, config: TinyReaderConfig):
        super().__init__(config)
        self.model.visual = ConvolutionalVision(config.vision_config)
        self.post_init()


AutoConfig.register(TinyReaderConfig.model_type, TinyReaderConfig)
AutoModelForImageTextToText.register(TinyReaderConfig, TinyReaderForConditionalGeneration)
