"""What every backbone here shares of timm's contract: the arguments' names and values, and how a model is built."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq
from torch import Tensor, nn

from vision.inference_fusion import refuse_training_when_fused
from vision.weight_sources import locate_pretrained

POOLINGS = ("", "avg", "max", "avgmax", "catavgmax")


def as_pair(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} is {size}; it must be a positive integer or a (height, width) pair of them")
    return pair


def check_pooling(global_pool: str) -> str:
    if global_pool not in POOLINGS:
        raise ValueError(f"global_pool is {global_pool!r}; valid are {', '.join(map(repr, POOLINGS))}")
    return global_pool


def check_output_format(output_fmt: str) -> None:
    if output_fmt not in ("NCHW", "NHWC"):
        raise ValueError(f"output_fmt is {output_fmt!r}; valid are 'NCHW' and 'NHWC'")


def imagenet_cfg(**kwargs: Any) -> dict[str, Any]:
    """A timm pretrained cfg with ImageNet's classes and preprocessing, and what else is given."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        **kwargs,
    }


def refuse_scripting() -> NoReturn:
    """What a module's `__prepare_scriptable__` does where `torch.jit.script` cannot follow."""
    raise NotImplementedError(
        "this model cannot be scripted: its kernels are torch.library operators chosen at run time; "
        "use torch.export.export or torch.onnx.export(..., dynamo=True)"
    )


def draw_linear_layers(model: nn.Module) -> None:
    """Draw the weights of every linear layer from a truncated normal distribution of width 0.02; biases are zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Pyramid(nn.Module):
    """What the hierarchical backbones share: stages with `blocks`, a stem of stride 4, nothing sized by the image."""

    grad_checkpointing = False
    fused = False

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Nothing depends on the image size, so it is only checked.

        Raises:
            ValueError: an image size below 1, or a patch size, which the stem's strides fix at 4.
        """
        if img_size is not None:
            as_pair("img_size", img_size)
        if patch_size is not None and as_pair("patch_size", patch_size) != (4, 4):
            raise ValueError(f"patch_size is {patch_size}; the stem's strides make it 4")

    def no_weight_decay(self) -> set[str]:
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def run_blocks(self, stage: nn.Module, x: Tensor) -> Tensor:
        """The blocks of a stage, without what follows them."""
        if self.grad_checkpointing:
            return checkpoint_seq(stage.blocks, x)
        return stage.blocks(x)

    def train(self, mode: bool = True) -> "Pyramid":
        refuse_training_when_fused(self, mode)
        return super().train(mode)


def create_backbone(
    model_class: type[nn.Module],
    variant: str,
    pretrained: bool,
    checkpoint_filter_fn: Callable[[Mapping[str, Any], nn.Module], dict[str, Tensor]],
    feature_cfg: dict[str, Any],
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict | None = None,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model through timm; weights are located and verified first."""
    if pretrained:
        pretrained_cfg_overlay = locate_pretrained(variant, pretrained_cfg, pretrained_cfg_overlay, cache_dir)
    return build_model_with_cfg(
        model_class,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(feature_cfg),
        **kwargs,
    )
