"""A small instance of each backbone, for tests of what they all promise."""

import timm
import torch
from torch import nn

import vision  # noqa: F401  registers the models

RETENTION = {
    "embed_dims": (16, 32, 32, 64),
    "depths": (2, 2, 1, 1),
    "num_heads": (1, 2, 2, 4),
    "projection": 48,
}
SMALL = {
    "vig": ("vig_tiny_patch16_224", {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2}),
    "vig_h": ("vig_h_tiny", {"dims": (16, 32, 32, 64), "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 2)}),
    "rmt": ("rmt_tiny", RETENTION),
    "retention": ("gated_swin_rmt_nano_retention", RETENTION),
    "swat": ("gated_swin_rmt_nano_swat", RETENTION),
}
LAYER_SCALED = {
    "vig": {"init_values": 0.1},
    "vig_h": {"init_values": 0.1},
    **{name: {"layerscales": (True,) * 4, "layer_init_values": 0.1} for name in ("rmt", "retention", "swat")},
}


def create(family: str, *, seed: int = 0, **kwargs) -> nn.Module:
    """The small model of `family`, without stochastic depth unless asked for."""
    name, args = SMALL[family]
    torch.manual_seed(seed)
    return timm.create_model(name, **{"drop_path_rate": 0.0, **args, **kwargs})


def draw_unit_gain(model: nn.Module) -> nn.Module:
    """Draw parameters and statistics anew, so that every branch, bias and norm shows in the output."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model
