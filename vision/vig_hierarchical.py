"""ViG-H: the hierarchical vision backbone of bidirectional gated linear attention, four stages at strides 4 to 32.

    image -> two stride-2 convolutions -> stage -> downsample -> ... -> stage -> LayerNorm -> mean -> Linear
    block:  x = x + op(layer_norm(x));  x = x + mlp(layer_norm(x))

Maps are (B, H, W, C) throughout (`output_fmt` is NHWC); there is no position embedding, so any image size works.
Training and evaluation compute the same function. What `vig.py` says of export and TorchScript holds here.

Source: ViG, arXiv 2405.18425, https://github.com/hustvl/ViG. Parameter names are those of the published checkpoints.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from timm.layers import DropPath, SelectAdaptivePool2d
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vision.gated_linear_attention import (
    ChannelsLastConv2d,
    GatedLinearAttention,
    GatedMLP,
)
from vision.inference_fusion import fuse_for_inference
from vision.patch_embedding import check_images
from vision.timm_contract import Pyramid, check_output_format, check_pooling, draw_linear_layers
from vision.vig import create_vig, vig_cfg
from vision.vig_checkpoints import published_vig

torch.fx.wrap("check_images")  # a single node: it looks at shapes, which a symbolic trace does not have

__all__ = ["HierarchicalViG"]


def halve(in_dim: int, out_dim: int, *, device=None, dtype=None) -> ChannelsLastConv2d:
    """3x3 convolution of stride 2: a side of L becomes ceil(L / 2)."""
    return ChannelsLastConv2d(in_dim, out_dim, 3, stride=2, padding=1, device=device, dtype=dtype)


class Block(nn.Module):
    """Pre-norm residual block of token mixer and gated MLP, (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        init_values: float | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.op = GatedLinearAttention(dim, num_heads, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = GatedMLP(dim, 32 * -(-int(8 * dim / 3) // 32), ("fc1", "fc2"), **dd)
        scaled = init_values is not None
        self.gamma1 = nn.Parameter(torch.full((dim,), init_values, **dd)) if scaled else None
        self.gamma2 = nn.Parameter(torch.full((dim,), init_values, **dd)) if scaled else None
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.op(x, self.norm)
        x = x + self.drop_path(mixed if self.gamma1 is None else mixed * self.gamma1)
        mixed = self.mlp(x, self.norm2)
        return x + self.drop_path(mixed if self.gamma2 is None else mixed * self.gamma2)


class Stage(nn.Module):
    """Blocks of one width, then the way down to the next stage (nothing after the last)."""

    def __init__(
        self,
        dim: int,
        next_dim: int | None,
        num_heads: int,
        *,
        init_values: float | None,
        drop_path: Sequence[float],
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.blocks = nn.Sequential(
            *[Block(dim, num_heads, init_values=init_values, drop_path=rate, **dd) for rate in drop_path]
        )
        self.downsample = nn.Identity()
        if next_dim is not None:
            layers = [("1", halve(dim, next_dim, **dd)), ("3", nn.LayerNorm(next_dim, **dd))]
            self.downsample = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class HierarchicalViG(Pyramid):
    """ViG-H.

    Args:
        img_size: checked only; every size works in one model.
        in_chans: image channels.
        num_classes: outputs of the head; 0 for none.
        global_pool: one of `vision.timm_contract.POOLINGS`; "" for unpooled maps.
        dims: channels of each stage, multiples of twice its heads.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        init_values: initial layer scale; no layer scale if None.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth, rising linearly from 0 at the first block to this at the last.

    Raises:
        ValueError: an argument is out of range, or the three lists differ in length.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 5, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        init_values: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        if not len(dims) == len(depths) == len(num_heads) > 0:
            raise ValueError(f"dims {dims}, depths {depths} and num_heads {num_heads} must have one entry a stage each")
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.set_input_size(img_size)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.drop_rate = drop_rate
        self.output_fmt = "NHWC"

        half = dims[0] // 2
        stem = [
            ("0", halve(in_chans, half, **dd)),
            ("2", nn.LayerNorm(half, **dd)),
            ("4", nn.GELU()),
            ("5", halve(half, dims[0], **dd)),
            ("7", nn.LayerNorm(dims[0], **dd)),
        ]
        self.patch_embed = nn.Sequential(OrderedDict(stem))
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        self.layers = nn.ModuleList(
            Stage(dim, next_dim, heads, init_values=init_values, drop_path=list(islice(rates, depth)), **dd)
            for dim, next_dim, heads, depth in zip(dims, (*dims[1:], None), num_heads, depths, strict=True)
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"layers.{i}.blocks"} for i, dim in enumerate(dims)
        ]
        self.classifier = nn.ModuleDict({"norm": nn.LayerNorm(self.num_features, **dd), "head": nn.Identity()})
        self.reset_classifier(num_classes, global_pool)
        draw_linear_layers(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        fine = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99999,)),
            (r"^classifier\.norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None), fine[-1]] if coarse else fine}

    def get_classifier(self) -> nn.Module:
        return self.classifier["head"]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; `num_classes` 0 removes it, `global_pool` "" removes the pooling."""
        stem = self.patch_embed[0].weight
        dd = {"device": stem.device, "dtype": stem.dtype}
        if global_pool is not None:
            pooled = bool(check_pooling(global_pool))
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=pooled, input_fmt="NHWC")
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.classifier["head"] = head

    def fuse(self) -> "HierarchicalViG":
        """Merge the projections of every mixer into one product, for inference only; see `fuse_for_inference`."""
        return fuse_for_inference(self)

    def embed(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) images to the first stage's (B, ceil(H / 4), ceil(W / 4), C)."""
        images = check_images(images, self.in_chans, 1)
        return self.patch_embed(images.permute(0, 2, 3, 1).contiguous())

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features that also return those of single stages, before their downsampling.

        Args:
            x: images (B, in_chans, H, W).
            indices: stages wanted: the last n if an integer, all if None.
            norm: apply the final norm to the last stage's (the others have another width).
            stop_early: do not run stages after the last one wanted.
            output_fmt: of the intermediates, NCHW or NHWC.
            intermediates_only: leave the final features out.

        Returns:
            The list of intermediates, or the final features (B, H', W', C) and that list.
        """
        check_output_format(output_fmt)
        wanted, last = feature_take_indices(len(self.layers), indices)
        x = self.embed(x)
        intermediates = []
        for i, stage in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = self.run_blocks(stage, x)
            is_final = i == len(self.layers) - 1
            if i in wanted:
                taken = self.classifier["norm"](x) if norm and is_final else x
                intermediates.append(taken.permute(0, 3, 1, 2) if output_fmt == "NCHW" else taken)
            x = stage.downsample(x)
        if intermediates_only:
            return intermediates
        return (self.classifier["norm"](x) if is_final else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one wanted, and with them (or if asked) the norm and head of their width."""
        wanted, last = feature_take_indices(len(self.layers), indices)
        shortened = last < len(self.layers) - 1
        self.layers = self.layers[: last + 1]
        self.layers[-1].downsample = nn.Identity()
        if prune_norm or shortened:
            self.classifier["norm"] = nn.Identity()
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> normed map (B, H', W', C)."""
        x = self.embed(x)
        for stage in self.layers:
            x = stage.downsample(self.run_blocks(stage, x))
        return self.classifier["norm"](x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the map, then apply dropout and (unless `pre_logits`) the head."""
        x = self.global_pool(x)
        x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.classifier["head"](x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return vig_cfg(pool_size=(7, 7), first_conv="patch_embed.0", classifier="classifier.head", **kwargs)


# Top-1 on ImageNet-1k as reported by the authors: tiny 82.8, small 83.8, base 84.2.
default_cfgs = generate_default_cfgs(
    {
        "vig_h_tiny.in1k": _cfg(
            **published_vig("vig_h_t_82p8acc.pth", "287d1b6e742edf4b6dc6a36010ad09c27e52c5c140369ffc36230b4b335c5e68")
        ),
        "vig_h_small.in1k": _cfg(
            **published_vig("vig_h_s_83p8acc.pth", "0d52501e8d6097177ba47520cc15052d694b82ecb7b7ffffab59a11dc40bbb4a")
        ),
        "vig_h_base.in1k": _cfg(
            **published_vig("vig_h_b_84p2acc.pth", "49acb31474ba5cf616414739c9410721f8e7f77b5b20ac57b84e16f28682a263")
        ),
    }
)

_ALL_STAGES = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}


@register_model
def vig_h_tiny(pretrained: bool = False, **kwargs: Any) -> HierarchicalViG:
    """ViG-H-T: 28,600,680 parameters, 4.54 GMACs."""
    model_args = {"drop_path_rate": 0.2}
    return create_vig(HierarchicalViG, "vig_h_tiny", pretrained, feature_cfg=_ALL_STAGES, **dict(model_args, **kwargs))


@register_model
def vig_h_small(pretrained: bool = False, **kwargs: Any) -> HierarchicalViG:
    """ViG-H-S: 50,051,688 parameters, 8.82 GMACs."""
    model_args = {"depths": (2, 2, 17, 2), "drop_path_rate": 0.3}
    return create_vig(HierarchicalViG, "vig_h_small", pretrained, feature_cfg=_ALL_STAGES, **dict(model_args, **kwargs))


@register_model
def vig_h_base(pretrained: bool = False, **kwargs: Any) -> HierarchicalViG:
    """ViG-H-B: 88,904,360 parameters, 15.65 GMACs."""
    model_args = {
        "dims": (128, 256, 512, 1024),
        "depths": (2, 2, 17, 2),
        "num_heads": (4, 8, 16, 32),
        "drop_path_rate": 0.6,
    }
    return create_vig(HierarchicalViG, "vig_h_base", pretrained, feature_cfg=_ALL_STAGES, **dict(model_args, **kwargs))
