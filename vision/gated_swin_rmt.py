"""Gated-SwinRMT: Manhattan retention in shifted windows with input-dependent gates, in two variants.

Re-implemented from the abstract; inferred details are flags. Of the paper (arXiv 2604.06014) only the abstract was at
hand. It fixes: passes along the width, then the height, inside shifted windows; a decay by head and no learned position
bias; for SWAT sigmoid scores with balanced ALiBi slopes, a multiplicative decay after them, a SwiGLU gate on the values
and normalised outputs; for Retention softmax scores with an additive log decay and a sigmoid gate projected from the
block's input, between the local convolution and the output projection; windows that adapt and become global on the maps
of a 32 x 32 image. With x the normed map:

    Retention:  out = (sigmoid(x W_g) * (R(q, k, v) + conv5x5(v))) W_o
    SWAT:       v = (x W_v) * silu(x W_g);   out = (R(q, k, v) + conv5x5(v)) W_o

R is `kernels.window_retention`. Everything around it is RMT's (`vision.retention_layers`): stem, downsampling, blocks,
feed-forward, rotation, layer scales and initialisation are inferred from there, window size and shift from Swin, the
slopes from SWAT (arXiv 2502.18845, equation 4). A checkpoint of an RMT with the same depths loads with `g_proj` alone
missing; where all its stages are decomposed and every window is the whole map, open gates give its logits.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn

from kernels.fused_layers import gated_product
from vision.retention_backbone import RetentionBackbone, check_names, check_stages
from vision.retention_layers import RetentionMixer, WindowRetention, manhattan_log_decays
from vision.rmt import ALL_STAGES, checkpoint_filter_fn, retention_cfg
from vision.shipped_models import OPENMOJI, shipped_checkpoint
from vision.timm_contract import create_backbone

register_notrace_function(gated_product)
torch.fx.wrap("gated_product")

__all__ = ["GatedSwinRMT", "checkpoint_filter_fn"]

OPEN_GATE_LOGIT = 4.0  # sigmoid(4) = 0.982


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; valid are {', '.join(map(repr, choices))}")


def check_window_size(window_size: int) -> None:
    if not isinstance(window_size, int) or window_size < 1:
        raise ValueError(f"window_size is {window_size!r}; valid are whole numbers from 1 on")


def swat_slopes(heads: int) -> tuple[float, ...]:
    """2^-k for k = 1 .. heads // 2, then -2^-k for k = 1 .. the rest (SWAT, equation 4, as many of each sign)."""
    rising = heads // 2
    return (*(2.0**-k for k in range(1, rising + 1)), *(-(2.0**-k) for k in range(1, heads - rising + 1)))


class GatedRetention(RetentionMixer):
    """The Retention variant's token mixer: softmax scores, and a gate before the output projection.

    Args:
        dim: channels C.
        num_heads: heads; their width is even unless `rope` is off.
        log_decay: of each head.
        window_size: target of the adaptive windows.
        shifted: whether the windows are shifted.
        gate: "elementwise" (one gate a channel), "headwise" (one a head) or "none".
        gate_source: what the gate is projected from: "normed" (as queries are) or "residual" (before the norm).
        gate_init: "default" (as every linear layer: gates near 0.5) or "open" (0.98: nearly an ungated block).
        rope: rotate queries and keys.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        log_decay: Sequence[float],
        window_size: int,
        shifted: bool,
        *,
        gate: str = "elementwise",
        gate_source: str = "normed",
        gate_init: str = "default",
        rope: bool = True,
        device=None,
        dtype=None,
    ):
        check_choice("rope", rope, (True, False))
        check_choice("gate", gate, ("elementwise", "headwise", "none"))
        check_choice("gate_source", gate_source, ("normed", "residual"))
        check_choice("gate_init", gate_init, ("default", "open"))
        if gate == "none" and (gate_source, gate_init) != ("normed", "default"):
            raise ValueError(f"gate_source is {gate_source!r} and gate_init {gate_init!r}, but gate is 'none'")
        super().__init__(
            dim,
            num_heads,
            WindowRetention(log_decay, window_size, shifted, rotary=rope),
            rotary=rope,
            gates={"elementwise": dim, "headwise": num_heads, "none": 0}[gate],
            gate_of_input=gate_source == "normed",
            device=device,
            dtype=dtype,
        )
        self.gate, self.gate_source, self.gate_init = gate, gate_source, gate_init

    def reset_gate(self) -> None:
        """Give `g_proj` the start that `gate_init` names, after the initialisation of all linear layers."""
        if self.gate != "none" and self.gate_init == "open":
            nn.init.zeros_(self.g_proj.weight)
            nn.init.constant_(self.g_proj.bias, OPEN_GATE_LOGIT)

    def forward(self, x: Tensor, block_input: Tensor) -> Tensor:
        """The mixer of the normed map `x`; `block_input` is the map before the norm."""
        query, key, value, *logits = self.project(x)
        mixed = self.retain(query, key, value)
        if self.gate != "none":
            of_gate = logits[0] if logits else self.g_proj(block_input)
            if self.gate == "headwise":
                of_gate = of_gate.unsqueeze(-1).expand(*mixed.unflatten(-1, (self.num_heads, -1)).shape).flatten(-2)
            mixed = gated_product(mixed, of_gate, "sigmoid")
        return self.out_proj(mixed)


class SwatRetention(RetentionMixer):
    """The SWAT variant's token mixer: sigmoid scores, and a SwiGLU gate on the values.

    Args:
        dim: channels C.
        num_heads: heads; their width is even unless `rope` is off.
        log_decay: of each head.
        window_size: target of the adaptive windows.
        shifted: whether the windows are shifted.
        value_gate: gate the values.
        alibi: what the slopes multiply: "distance" |i - j|, "signed" i - j, or "none" (no slopes).
        post_decay: what decays after the sigmoid: "gamma" (RMT's decays) or "alibi" (exp(-|slope| |i - j|), and no
            slopes before it).
        swat_norm: "clamp" (divide by the sum of weights where it exceeds one), "sum", "rmsnorm" (of each head's
            output) or "none".
        rope: rotate queries and keys.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        log_decay: Sequence[float],
        window_size: int,
        shifted: bool,
        *,
        value_gate: bool = True,
        alibi: str = "distance",
        post_decay: str = "gamma",
        swat_norm: str = "clamp",
        rope: bool = True,
        device=None,
        dtype=None,
    ):
        check_choice("rope", rope, (True, False))
        check_choice("value_gate", value_gate, (True, False))
        check_choice("alibi", alibi, ("distance", "signed", "none"))
        check_choice("post_decay", post_decay, ("gamma", "alibi"))
        check_choice("swat_norm", swat_norm, ("clamp", "sum", "rmsnorm", "none"))
        if post_decay == "alibi" and alibi != "distance":
            raise ValueError(
                f"alibi is {alibi!r}, but post_decay is 'alibi': slopes act on the distance after the scores"
            )
        slopes = swat_slopes(num_heads)
        if post_decay == "alibi":
            log_decay = [-abs(slope) for slope in slopes]
        options = {
            "activation": "sigmoid",
            "slopes": None if alibi == "none" or post_decay == "alibi" else slopes,
            "signed_slopes": alibi == "signed",
            "normalization": "none" if swat_norm == "rmsnorm" else swat_norm,
            "head_norm": swat_norm == "rmsnorm",
        }
        super().__init__(
            dim,
            num_heads,
            WindowRetention(log_decay, window_size, shifted, rotary=rope, **options),
            rotary=rope,
            gates=dim if value_gate else 0,
            device=device,
            dtype=dtype,
        )
        self.value_gate = value_gate

    def forward(self, x: Tensor, block_input: Tensor) -> Tensor:
        """The mixer of the normed map `x`; what came before the norm plays no part here."""
        query, key, value, *logits = self.project(x)
        if self.value_gate:
            value = gated_product(value, logits[0], "silu")
        return self.out_proj(self.retain(query, key, value))


MIXERS = {"retention": GatedRetention, "swat": SwatRetention}


class GatedSwinRMT(RetentionBackbone):
    """Gated-SwinRMT.

    The flags of the mixers (`GatedRetention`, `SwatRetention`) are this class's too; None leaves them at their
    defaults.

    Args:
        mixer: "retention" or "swat".
        embed_dims: channels of each stage.
        num_heads: heads of each stage; a head's channels must be even unless `rope` is off.
        init_values: decay of the strongest head of each stage is 1 - 2^-init_values.
        heads_ranges: by how much that exponent grows up to the weakest head.
        window_size: what `vision.retention_layers.adaptive_window` aims at.
        shifted: shift the windows of every second block of a stage by half a window.
        backbone: what else `RetentionBackbone` takes: `depths`, `mlp_ratios`, `downsample`, `num_classes`, ...

    Raises:
        ValueError: an argument is out of range, a flag belongs to the other variant, or lists differ in length.
    """

    def __init__(
        self,
        mixer: str = "retention",
        *,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        init_values: Sequence[float] = (2, 2, 2, 2),
        heads_ranges: Sequence[float] = (4, 4, 6, 6),
        window_size: int = 7,
        shifted: bool = True,
        rope: bool | None = None,
        gate: str | None = None,
        gate_source: str | None = None,
        gate_init: str | None = None,
        value_gate: bool | None = None,
        alibi: str | None = None,
        post_decay: str | None = None,
        swat_norm: str | None = None,
        device=None,
        dtype=None,
        **backbone: Any,
    ):
        check_names(GatedSwinRMT, backbone)
        check_choice("mixer", mixer, tuple(MIXERS))
        check_stages(embed_dims=embed_dims, num_heads=num_heads, init_values=init_values, heads_ranges=heads_ranges)
        check_window_size(window_size)
        check_choice("shifted", shifted, (True, False))
        given = {
            "rope": rope,
            "gate": gate,
            "gate_source": gate_source,
            "gate_init": gate_init,
            "value_gate": value_gate,
            "alibi": alibi,
            "post_decay": post_decay,
            "swat_norm": swat_norm,
        }
        flags = {name: value for name, value in given.items() if value is not None}
        taken = inspect.signature(MIXERS[mixer]).parameters
        if foreign := [name for name in flags if name not in taken]:
            valid = ", ".join(name for name in given if name in taken)
            raise ValueError(f"{', '.join(foreign)} is no flag of the {mixer} variant; valid are {valid}")

        def make_retention(stage: int, block: int) -> RetentionMixer:
            heads = num_heads[stage]
            decays = manhattan_log_decays(heads, init_values[stage], heads_ranges[stage])
            shift = shifted and block % 2 == 1
            return MIXERS[mixer](
                embed_dims[stage], heads, decays, window_size, shift, **flags, device=device, dtype=dtype
            )

        super().__init__(make_retention, embed_dims=embed_dims, device=device, dtype=dtype, **backbone)

    def init_weights(self) -> None:
        super().init_weights()
        for module in self.modules():
            if isinstance(module, GatedRetention):
                module.reset_gate()

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        window_size: int | None = None,
    ) -> None:
        """Check the sizes, as in `RetentionBackbone`, and let the windows aim at another size."""
        super().set_input_size(img_size, patch_size)
        if window_size is None:
            return
        check_window_size(window_size)
        for module in self.modules():
            if isinstance(module, WindowRetention):
                module.window_size = window_size


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return retention_cfg(paper_ids="arXiv:2604.06014", paper_name="Gated-SwinRMT", **kwargs)


SIZES = ("nano", "tiny", "small", "base", "medium")
# Trained here, on the OpenMoji categories; weights in float16.
SHIPPED = "gated_swin_rmt_nano_swat.openmoji"
default_cfgs = generate_default_cfgs(
    {
        **{f"gated_swin_rmt_{size}_{mixer}": _cfg() for size in SIZES for mixer in MIXERS},
        SHIPPED: _cfg(
            file=shipped_checkpoint(SHIPPED), input_size=(3, 48, 48), pool_size=(2, 2), crop_pct=1.0, **OPENMOJI
        ),
    }
)

# Tiny, small and base follow RMT with even depths, so that plain and shifted windows pair up; medium lies midway
# between RMT's base and large, where the abstract's 77 to 79 million parameters are. Nano is ours.
_NANO = {
    "embed_dims": (32, 64, 128, 256),
    "depths": (2, 2, 4, 2),
    "num_heads": (2, 2, 4, 8),
    "projection": 512,
    "drop_path_rate": 0.0,
}
_TINY = {"drop_path_rate": 0.1}
_SMALL = {"depths": (4, 4, 18, 4), "mlp_ratios": (4, 4, 3, 3), "drop_path_rate": 0.15}
_BASE = {
    "embed_dims": (80, 160, 320, 512),
    "depths": (4, 8, 24, 8),
    "num_heads": (5, 5, 10, 16),
    "heads_ranges": (5, 5, 6, 6),
    "mlp_ratios": (4, 4, 3, 3),
    "layerscales": (False, False, True, True),
    "drop_path_rate": 0.4,
}
_MEDIUM = {
    **_BASE,
    "embed_dims": (96, 192, 384, 576),
    "num_heads": (6, 6, 12, 18),
    "heads_ranges": (6, 6, 6, 6),
    "drop_path_rate": 0.3,
}


def _create(size: str, mixer: str, pretrained: bool, **kwargs: Any) -> GatedSwinRMT:
    return create_backbone(
        GatedSwinRMT,
        f"gated_swin_rmt_{size}_{mixer}",
        pretrained,
        checkpoint_filter_fn,
        feature_cfg=ALL_STAGES,
        mixer=mixer,
        **kwargs,
    )


@register_model
def gated_swin_rmt_nano_retention(pretrained: bool = False, **kwargs: Any) -> GatedSwinRMT:
    """A size for small images, ours: 3,422,264 parameters at 1000 classes."""
    return _create("nano", "retention", pretrained, **dict(_NANO, **kwargs))


@register_model
def gated_swin_rmt_nano_swat(pretrained: bool = False, **kwargs: Any) -> GatedSwinRMT:
    """A size for small images, ours: 3,422,264 parameters at 1000 classes."""
    return _create("nano", "swat", pretrained, **dict(_NANO, **kwargs))


@register_model
def gated_swin_rmt_tiny_retention(pretrained: bool = False, **kwargs: Any) -> GatedSwinRMT:
    """Gated-SwinRMT-T: 15,427,208 parameters."""
    return _create("tiny", "retention", pretrained, **dict(_TINY, **kwargs))


@register_model
def gated_swin_rmt_tiny_swat(pretrained: bool = False, **kwargs: Any) -> GatedSwinRMT:
    """Gated-SwinRMT-T: 15,427,208 parameters."""
    return _create("tiny", "swat", pretrained, **dict(_TINY, **kwargs))


@register_model
def gated_swin_rmt_small_retention(pretrained: bool = False, **kwargs: Any) -> GatedSwinRMT:
    """Gated-SwinRMT-S: 29,339,656 parameters."""
    return _create("small", "retention", pretrained, **dict(_SMALL, **kwargs))


@register_model
def gated_swin_rmt_small_swat(pretrained: bool = False, **kwargs: Any) -> GatedSwinRMT:
    """Gated-SwinRMT-S: 29,339,656 parameters."""
    return _create("small", "swat", pretrained, **dict(_SMALL, **kwargs))


@register_model
def gated_swin_rmt_base_retention(pretrained: bool = False, **kwargs: Any) -> GatedSwinRMT:
    """Gated-SwinRMT-B: 57,903,824 parameters."""
    return _create("base", "retention", pretrained, **dict(_BASE, **kwargs))


@register_model
def gated_swin_rmt_base_swat(pretrained: bool = False, **kwargs: Any) -> GatedSwinRMT:
    """Gated-SwinRMT-B: 57,903,824 parameters."""
    return _create("base", "swat", pretrained, **dict(_BASE, **kwargs))


@register_model
def gated_swin_rmt_medium_retention(pretrained: bool = False, **kwargs: Any) -> GatedSwinRMT:
    """Gated-SwinRMT-M, the abstract's size: 78,319,064 parameters."""
    return _create("medium", "retention", pretrained, **dict(_MEDIUM, **kwargs))


@register_model
def gated_swin_rmt_medium_swat(pretrained: bool = False, **kwargs: Any) -> GatedSwinRMT:
    """Gated-SwinRMT-M, the abstract's size: 78,319,064 parameters."""
    return _create("medium", "swat", pretrained, **dict(_MEDIUM, **kwargs))
