"""The four-stage backbone that RMT and Gated-SwinRMT share: everything but their retention.

    image -> stem -> stage -> downsample -> ... -> stage -> Linear, batch norm, SiLU -> mean -> Linear

Maps are (B, H, W, C) from the stem to the pooling (`output_fmt` is NHWC), at strides 4, 8, 16 and 32; any image size
works in one model. What `vig.py` says of export and TorchScript holds here.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import register_notrace_function
from timm.models._features import feature_take_indices
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from vision.inference_fusion import fuse_for_inference
from vision.retention_layers import ConvolutionStem, Downsample, RetentionBlock
from vision.timm_contract import Pyramid, check_output_format, check_pooling, draw_linear_layers

DOWNSAMPLE = {"conv": Downsample, "merge": PatchMerging}


def check_stages(**lists: Sequence) -> None:
    """Raise `ValueError` unless all are lists that have one entry a stage."""
    for name, entries in lists.items():
        if not isinstance(entries, Sequence) or not entries:
            raise ValueError(f"{name} is {entries!r}; it must be a list with one entry a stage")
    if len({len(entries) for entries in lists.values()}) != 1:
        given = ", ".join(f"{name} {tuple(entries)}" for name, entries in lists.items())
        raise ValueError(f"{given}: each must have one entry a stage")


def check_names(model: type, arguments: Iterable[str]) -> None:
    """Raise `ValueError` for an argument that neither `model` nor the backbone takes."""
    taken = {**inspect.signature(model).parameters, **inspect.signature(RetentionBackbone).parameters}
    if unknown := [name for name in arguments if name not in taken]:
        valid = ", ".join(sorted(taken.keys() - {"make_retention", "backbone"}))
        raise ValueError(f"{', '.join(unknown)} is no argument of {model.__name__}; valid are {valid}")


def check_range(name: str, value: float, least: float, most: float = math.inf) -> None:
    """Raise `ValueError` unless `value` lies in the range."""
    if not least <= value <= most:
        raise ValueError(f"{name} is or holds {value}; valid are {least} to {most}")


@register_notrace_function
@torch.fx.wrap
def checked_images(images: Tensor, in_chans: int, stride_of_statistics: int) -> Tensor:
    """Return `images`, or raise `ValueError` for a shape that the model cannot take.

    Args:
        images: (B, in_chans, H, W).
        in_chans: channels that the model takes.
        stride_of_statistics: of the last map of which a batch norm takes statistics in training; 0 for none.
    """
    if images.dim() != 4 or images.shape[1] != in_chans or 0 in images.shape[2:]:
        raise ValueError(f"images have shape {tuple(images.shape)}; the model takes (batch, {in_chans}, height, width)")
    if images.shape[0] == 1 and max(images.shape[2:]) <= stride_of_statistics:
        raise ValueError(
            f"images have shape {tuple(images.shape)}: the last map would be one pixel, of which batch norm cannot "
            f"take statistics in training; use two images or more, images larger than {stride_of_statistics} pixels, "
            "or model.eval()"
        )
    return images


class Stage(nn.Module):
    """Blocks of one width, then the way down to the next stage (nothing after the last)."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class RetentionBackbone(Pyramid):
    """A backbone of retention blocks.

    Args:
        make_retention: called with the index of the stage and of the block in it, gives the block's retention.
        embed_dims: channels of each stage.
        img_size: checked only; every size works in one model.
        in_chans: image channels.
        num_classes: outputs of the head; 0 for none.
        global_pool: one of `vision.timm_contract.POOLINGS`; "" for unpooled maps.
        depths: blocks of each stage.
        mlp_ratios: of each stage.
        layerscales: whether each stage has layer scales.
        layer_init_values: where they start.
        projection: channels of the last map, before the pooling.
        downsample: "conv" (3x3 convolution, batch norm) or "merge" (Swin's patch merging).
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth, rising linearly from 0 at the first block to this at the last.

    Raises:
        ValueError: an argument is out of range, or lists differ in length.
    """

    def __init__(
        self,
        make_retention: Callable[[int, int], nn.Module],
        *,
        embed_dims: Sequence[int],
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 8, 2),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        layerscales: Sequence[bool] = (False, False, False, False),
        layer_init_values: float = 1e-6,
        projection: int = 1024,
        downsample: str = "conv",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        check_stages(embed_dims=embed_dims, depths=depths, mlp_ratios=mlp_ratios, layerscales=layerscales)
        if downsample not in DOWNSAMPLE:
            raise ValueError(f"downsample is {downsample!r}; valid are {', '.join(map(repr, DOWNSAMPLE))}")
        for dim, depth, ratio in zip(embed_dims, depths, mlp_ratios, strict=True):
            check_range("embed_dims", dim, 2)
            check_range("depths", depth, 1)
            check_range("mlp_ratios", ratio, 1 / dim)
        check_range("projection", projection, 1)
        check_range("drop_path_rate", drop_path_rate, 0, 1)
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.set_input_size(img_size)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = projection
        self.drop_rate = drop_rate
        self.output_fmt = "NHWC"

        self.patch_embed = ConvolutionStem(in_chans, embed_dims[0], **dd)
        rates = (drop_path_rate * i / max(sum(depths) - 1, 1) for i in count())
        down = DOWNSAMPLE[downsample]
        stages = []
        for i, (dim, next_dim, depth) in enumerate(zip(embed_dims, (*embed_dims[1:], None), depths, strict=True)):
            scale = layer_init_values if layerscales[i] else None
            blocks = [
                RetentionBlock(dim, make_retention(i, j), mlp_ratios[i], layer_scale=scale, drop_path=next(rates), **dd)
                for j in range(depth)
            ]
            stages.append(Stage(blocks, nn.Identity() if next_dim is None else down(dim, next_dim, **dd)))
        self.layers = nn.ModuleList(stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"layers.{i}.blocks"} for i, dim in enumerate(embed_dims)
        ]
        self.proj = nn.Linear(embed_dims[-1], projection, **dd)
        self.norm = nn.BatchNorm2d(projection, **dd)
        self.swish = nn.SiLU()
        self.head = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every linear layer anew, as the authors' code does over all other initialisations."""
        draw_linear_layers(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        fine = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99999,)),
            (r"^proj|^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None), fine[-1]] if coarse else fine}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; `num_classes` 0 removes it, `global_pool` "" removes the pooling."""
        stem = self.patch_embed.proj[0].weight
        if global_pool is not None:
            pooled = bool(check_pooling(global_pool))
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=pooled, input_fmt="NHWC")
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        dd = {"device": stem.device, "dtype": stem.dtype}
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def fuse(self) -> "RetentionBackbone":
        """Merge projections and fold batch norms, for inference only; see `fuse_for_inference`."""
        self.eval()
        if isinstance(self.norm, nn.BatchNorm2d):
            self.proj, self.norm = fuse_linear_bn_eval(self.proj, self.norm), nn.Identity()
        return fuse_for_inference(self)

    def stride_of_statistics(self) -> int:
        """Stride of the last map if a batch norm takes statistics of it in this mode, else 0."""
        norms = [self.norm, *(module for stage in self.layers[-2:-1] for module in stage.downsample.modules())]
        trains = any(isinstance(norm, nn.BatchNorm2d) and norm.training for norm in norms)
        return 4 * 2 ** (len(self.layers) - 1) if trains else 0

    def project(self, x: Tensor) -> Tensor:
        """The last stage's map (B, H, W, C) to the map that is pooled, (B, H, W, projection)."""
        x = self.norm(self.proj(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.swish(x)

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
            norm: without effect: the only norm after the stages belongs to the projection, of another width.
            stop_early: do not run stages after the last one wanted.
            output_fmt: of the intermediates, NCHW or NHWC.
            intermediates_only: leave the final features out.

        Returns:
            The list of intermediates, or the final features (B, H', W', projection) and that list; where `stop_early`
            left stages out, the last one's map takes the place of the final features.
        """
        check_output_format(output_fmt)
        wanted, last = feature_take_indices(len(self.layers), indices)
        x = self.patch_embed(checked_images(x, self.in_chans, self.stride_of_statistics()))
        intermediates = []
        for i, stage in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = self.run_blocks(stage, x)
            is_final = i == len(self.layers) - 1
            if i in wanted:
                intermediates.append(x.permute(0, 3, 1, 2) if output_fmt == "NCHW" else x)
            x = stage.downsample(x)
        if intermediates_only:
            return intermediates
        return (self.project(x) if is_final else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one wanted and, with them or if asked, projection and norm, and the head.

        The head goes with the projection, whose width it has.
        """
        wanted, last = feature_take_indices(len(self.layers), indices)
        shortened = last < len(self.layers) - 1
        self.layers = self.layers[: last + 1]
        self.layers[-1].downsample = nn.Identity()
        if prune_norm or shortened:
            self.proj, self.norm, self.swish = nn.Identity(), nn.Identity(), nn.Identity()
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or prune_norm or shortened:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> map (B, H', W', projection)."""
        x = self.patch_embed(checked_images(x, self.in_chans, self.stride_of_statistics()))
        for stage in self.layers:
            x = stage.downsample(self.run_blocks(stage, x))
        return self.project(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the map, then apply dropout and (unless `pre_logits`) the head."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
