"""RMT: a four-stage backbone of Manhattan retention, the baseline of Gated-SwinRMT.

A stage attends over its whole map, in one of two forms, with q, k rotated by the flat index h * width + w and
D(i, j) = ln(gamma) times a distance:

    decomposed: v = softmax(q k^T + D_row) v along every row, then softmax(q k^T + D_column) v along every column
    full:       softmax(q k^T + D_manhattan) v over all tokens
    output:     (v + conv5x5(x W_v)) W_o

The decay stands inside the softmax, as in the authors' code (their paper has it outside). Source: RMT, arXiv
2309.11523, https://github.com/qhfan/RMT (`classfication_release`); argument and parameter names are theirs.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn

from kernels.full_retention import full_retention
from kernels.window_retention import tables
from vision.retention_backbone import RetentionBackbone, check_names, check_stages
from vision.retention_layers import RetentionMixer, WindowRetention, manhattan_log_decays
from vision.timm_contract import create_backbone, imagenet_cfg
from vision.weight_sources import unwrapped

__all__ = ["RMT", "checkpoint_filter_fn"]

register_notrace_function(full_retention)
torch.fx.wrap("full_retention")


class FullRetention(nn.Module):
    """The full form as a module, in the place of `WindowRetention`."""

    def __init__(self, log_decay: Sequence[float]):
        super().__init__()
        self.log_decay = tuple(log_decay)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return full_retention(query, key, value, self.log_decay)


class Retention(RetentionMixer):
    """RMT's token mixer: (B, H, W, C) -> (B, H, W, C)."""

    def forward(self, x: Tensor, block_input: Tensor) -> Tensor:
        """The mixer of the normed map `x`; what came before the norm plays no part here."""
        return self.out_proj(self.retain(*self.project(x)))


class RMT(RetentionBackbone):
    """RMT.

    Args:
        embed_dims: channels of each stage.
        num_heads: heads of each stage; a head's channels must be even.
        init_values: decay of the strongest head of each stage is 1 - 2^-init_values.
        heads_ranges: by how much that exponent grows up to the weakest head.
        chunkwise_recurrents: whether each stage is decomposed (else full).
        backbone: what else `RetentionBackbone` takes: `depths`, `mlp_ratios`, `num_classes`, `drop_path_rate`, ...

    Raises:
        ValueError: an argument is out of range, or lists differ in length.
    """

    def __init__(
        self,
        *,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        init_values: Sequence[float] = (2, 2, 2, 2),
        heads_ranges: Sequence[float] = (4, 4, 6, 6),
        chunkwise_recurrents: Sequence[bool] = (True, True, False, False),
        device=None,
        dtype=None,
        **backbone: Any,
    ):
        check_names(RMT, backbone)
        check_stages(
            embed_dims=embed_dims,
            num_heads=num_heads,
            init_values=init_values,
            heads_ranges=heads_ranges,
            chunkwise_recurrents=chunkwise_recurrents,
        )

        def make_retention(stage: int, block: int) -> Retention:
            decays = manhattan_log_decays(num_heads[stage], init_values[stage], heads_ranges[stage])
            core = WindowRetention(decays, None, False) if chunkwise_recurrents[stage] else FullRetention(decays)
            return Retention(embed_dims[stage], num_heads[stage], core, device=device, dtype=dtype)

        super().__init__(make_retention, embed_dims=embed_dims, device=device, dtype=dtype, **backbone)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: RetentionBackbone) -> dict[str, Tensor]:
    """Turn a checkpoint of RMT's authors (or of timm, DDP, torch.compile) into a state dict of `model`.

    The constants that the authors keep as buffers, `layers.i.Relpos.angle` and `.decay`, are compared with the model's
    own and left out.

    Raises:
        ValueError: those constants are another model's, or the checkpoint has the auxiliary head of token labelling,
            whose predictions the released code adds to the classifier's.
    """
    converted = {}
    for name, value in unwrapped(state_dict):
        if name.startswith("aux_head."):
            raise ValueError(
                f"the checkpoint holds {name}: token-label models add this head to their logits, which this model does "
                "not; remove the aux_head keys to load the classifier alone"
            )
        if ".Relpos." in name:
            _check_constant(name, value, model)
        else:
            converted[name] = value
    return converted


def _check_constant(name: str, value: Tensor, model: RetentionBackbone) -> None:
    _, stage, _, kind = name.split(".")
    retention = model.layers[int(stage)].blocks[0].retention
    head_dim = retention.out_proj.weight.shape[0] // retention.num_heads
    expected = {
        "angle": tables.angles(head_dim).repeat_interleave(2),
        "decay": torch.tensor(retention.core.log_decay, dtype=torch.float64),
    }[kind]
    if value.shape != expected.shape or not torch.allclose(value.double(), expected, rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"{name} of the checkpoint is {value.tolist()}, the model's is {expected.tolist()}: "
            "embed_dims, num_heads, init_values or heads_ranges are not the checkpoint's"
        )


def retention_cfg(**kwargs: Any) -> dict[str, Any]:
    own = {"pool_size": (7, 7), "first_conv": "patch_embed.proj.0", "classifier": "head"}
    return imagenet_cfg(**{**own, **kwargs})


def _cfg() -> dict[str, Any]:
    return retention_cfg(
        paper_ids="arXiv:2309.11523",
        paper_name="RMT: Retentive Networks Meet Vision Transformers",
        origin_url="https://github.com/qhfan/RMT",
    )


# Top-1 on ImageNet-1k as reported by the authors: tiny 82.4, small 84.1, base 85.0, large 85.5. Their files lie on a
# service that cannot be linked: `pretrained_cfg_overlay={"file": ...}` loads one that you have.
default_cfgs = generate_default_cfgs({f"rmt_{size}": _cfg() for size in ("tiny", "small", "base", "large")})

ALL_STAGES = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}


def create_rmt(variant: str, pretrained: bool, **kwargs: Any) -> RMT:
    """Build an RMT through timm. The authors' files pickle the settings of their run as an `argparse.Namespace`, which
    holds nothing but attributes: it is allowed besides tensors."""
    with torch.serialization.safe_globals([Namespace]):
        return create_backbone(RMT, variant, pretrained, checkpoint_filter_fn, feature_cfg=ALL_STAGES, **kwargs)


@register_model
def rmt_tiny(pretrained: bool = False, **kwargs: Any) -> RMT:
    """RMT-T: 14,334,216 parameters."""
    model_args = {"drop_path_rate": 0.1}
    return create_rmt("rmt_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def rmt_small(pretrained: bool = False, **kwargs: Any) -> RMT:
    """RMT-S: 26,967,240 parameters."""
    model_args = {
        "depths": (3, 4, 18, 4),
        "mlp_ratios": (4, 4, 3, 3),
        "chunkwise_recurrents": (True, True, True, False),
        "drop_path_rate": 0.15,
    }
    return create_rmt("rmt_small", pretrained, **dict(model_args, **kwargs))


@register_model
def rmt_base(pretrained: bool = False, **kwargs: Any) -> RMT:
    """RMT-B: 54,154,896 parameters."""
    model_args = {
        "embed_dims": (80, 160, 320, 512),
        "depths": (4, 8, 25, 8),
        "num_heads": (5, 5, 10, 16),
        "heads_ranges": (5, 5, 6, 6),
        "mlp_ratios": (4, 4, 3, 3),
        "chunkwise_recurrents": (True, True, True, False),
        "layerscales": (False, False, True, True),
        "drop_path_rate": 0.4,
    }
    return create_rmt("rmt_base", pretrained, **dict(model_args, **kwargs))


@register_model
def rmt_large(pretrained: bool = False, **kwargs: Any) -> RMT:
    """RMT-L: 95,464,864 parameters."""
    model_args = {
        "embed_dims": (112, 224, 448, 640),
        "depths": (4, 8, 25, 8),
        "num_heads": (7, 7, 14, 20),
        "heads_ranges": (6, 6, 6, 6),
        "mlp_ratios": (4, 4, 3, 3),
        "chunkwise_recurrents": (True, True, True, False),
        "layerscales": (False, False, True, True),
        "drop_path_rate": 0.5,
    }
    return create_rmt("rmt_large", pretrained, **dict(model_args, **kwargs))
