"""Where ViG's weights are published, and how foreign checkpoints become state dicts of our models."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vision.patch_embedding import resize_position_embedding
from vision.weight_sources import published_file, unwrapped

_PUBLISHED_AT = "https://huggingface.co/hustvl/ViG/resolve/main/"
_LEGACY_HIERARCHICAL_NAMES = (
    (re.compile(r"^patch_embed\.proj\."), "patch_embed.0."),
    (re.compile(r"^patch_embed\.norm\."), "patch_embed.2."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.ln_1\."), r"\1.norm."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.self_attention\."), r"\1.op."),
    (re.compile(r"^norm\."), "classifier.norm."),
    (re.compile(r"^head\."), "classifier.head."),
)


def published_vig(name: str, sha256: str) -> dict[str, Any]:
    """Entries of a timm pretrained cfg for one of the authors' files."""
    return published_file(_PUBLISHED_AT + name, sha256)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turn a checkpoint of the authors (or of timm, DDP, torch.compile) into a state dict of `model`.

    Unwraps it (`vision.weight_sources.unwrapped`), renames the old names of ViG-H, flattens 1x1 convolutions to
    matrices and resamples the position embedding to the model's grid. Keys of the published files are our models'.

    Raises:
        ValueError: a position embedding is not for a square grid, so that its grid is not known.
    """
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    hierarchical = "classifier.norm.weight" in shapes or "layers.0.blocks.0.op.o_proj.weight" in shapes

    converted = {}
    for name, value in unwrapped(state_dict):
        if hierarchical:
            for old, new in _LEGACY_HIERARCHICAL_NAMES:
                name = old.sub(new, name)
        shape = shapes.get(name)
        if shape is not None and value.shape != shape:
            if value.dim() == 4 and len(shape) == 2 and value.shape[2:] == (1, 1):
                value = value.flatten(1)
            elif name == "pos_embed":
                side = math.isqrt(value.shape[1])
                if side * side != value.shape[1]:
                    raise ValueError(f"pos_embed has {value.shape[1]} tokens; only a square grid can be resampled")
                value = resize_position_embedding(value, (side, side), model.grid_size)
        converted[name] = value
    return converted
