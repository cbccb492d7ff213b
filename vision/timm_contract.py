"""What every backbone here shares of timm's contract: the arguments' names and values, and how a model is built."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from timm.models import build_model_with_cfg
from torch import Tensor, nn

from vision.weight_sources import locate_pretrained

POOLINGS = ("", "avg", "max", "avgmax", "catavgmax")


def check_pooling(global_pool: str) -> str:
    if global_pool not in POOLINGS:
        raise ValueError(f"global_pool is {global_pool!r}; valid are {', '.join(map(repr, POOLINGS))}")
    return global_pool


def check_output_format(output_fmt: str) -> None:
    if output_fmt not in ("NCHW", "NHWC"):
        raise ValueError(f"output_fmt is {output_fmt!r}; valid are 'NCHW' and 'NHWC'")


def refuse_scripting() -> NoReturn:
    """What a module's `__prepare_scriptable__` does where `torch.jit.script` cannot follow."""
    raise NotImplementedError(
        "this model cannot be scripted: its kernels are torch.library operators chosen at run time; "
        "use torch.export.export or torch.onnx.export(..., dynamo=True)"
    )


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
