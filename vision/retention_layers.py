"""The blocks that RMT and Gated-SwinRMT are made of, on channels-last maps (B, H, W, C).

    stem:       four 3x3 convolutions with batch norms, stride 4 in all
    block:      x = x + conv3x3(x);  x = x + g1 retention(layer_norm(x));  x = x + g2 ffn(layer_norm(x))
    ffn:        h = gelu(x W1);  (h + conv3x3(h)) W2
    downsample: 3x3 convolution of stride 2, batch norm

The 3x3 convolutions inside blocks are depthwise; g1, g2 are layer scales or absent. Source: RMT, arXiv 2309.11523, the
authors' classification code; parameter names are those of their checkpoints.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import register_notrace_function
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kernels.fused_layers import depthwise_convolution, gelu_depthwise_residual
from kernels.window_retention import window_retention
from vision.timm_contract import refuse_scripting

for _operation in (depthwise_convolution, gelu_depthwise_residual):
    register_notrace_function(_operation)
    torch.fx.wrap(_operation.__name__)


def manhattan_log_decays(heads: int, initial: float, span: float) -> tuple[float, ...]:
    """ln(1 - 2^(-initial - span k / heads)) of the heads k = 0 .. heads - 1: from strong to weak decay.

    Raises:
        ValueError: a decay would not lie between 0 and 1.
    """
    if initial <= 0 or span < 0:
        raise ValueError(f"init_values holds {initial} and heads_ranges {span}; valid are positive ones, and 0 or more")
    return tuple(math.log1p(-(2.0 ** (-initial - span * head / heads))) for head in range(heads))


def adaptive_window(length: int, target: int = 7) -> int:
    """The window side for a map side. The rule is inferred: the paper says only that windows adapt.

    The whole side up to `target`; `target` where it divides the side; else the divisor of the side in
    [ceil(target / 2), 2 * target) that is nearest to `target`, the larger of two; else `target`, with padding.
    """
    if length <= target:
        return length
    divisors = [side for side in range(-(-target // 2), 2 * target) if length % side == 0]
    return min(divisors, key=lambda side: (abs(side - target), -side), default=target)


def check_heads(dim: int, num_heads: int, rotary: bool = True) -> None:
    """Raise `ValueError` unless `dim` channels make `num_heads` heads, of even width if they are rotated."""
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(f"embed_dims holds {dim} and num_heads {num_heads}; the heads must divide the channels")
    if rotary and dim // num_heads % 2:
        raise ValueError(
            f"embed_dims holds {dim} and num_heads {num_heads}: heads of {dim // num_heads} channels; rotation turns "
            "channels in pairs, so their number must be even"
        )


def windows_and_shift(
    size: tuple[int, int], window_size: int | None, shifted: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The adaptive window of a map, or one on all of it if `window_size` is None, and the shift, (rows, columns) each.

    Shifted windows move by half a window along each axis that has more than one of them.
    """
    window = tuple(side if window_size is None else adaptive_window(side, window_size) for side in size)
    shift = tuple(w // 2 if shifted and w < side else 0 for w, side in zip(window, size, strict=True))
    return window, shift


@register_notrace_function
@torch.fx.wrap
def retain_in_windows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Sequence[float],
    window_size: int | None,
    shifted: bool,
    **options,
) -> Tensor:
    """`kernels.window_retention` of (B, H, W, heads, D) in the windows of `windows_and_shift`."""
    window, shift = windows_and_shift(query.shape[1:3], window_size, shifted)
    return window_retention(query, key, value, log_decay, window=window, shift=shift, **options)


class WindowRetention(nn.Module):
    """The retention itself as a module of its own, so that hooks and FLOP counters can tell it from the projections.

    Args:
        log_decay: of each head.
        window_size: target of `adaptive_window`; None for one window on the whole map.
        shifted: whether the windows are shifted.
        head_norm: divide each head's output by its root mean square.
        options: `activation`, `slopes`, ... of `kernels.window_retention`.
    """

    def __init__(
        self,
        log_decay: Sequence[float],
        window_size: int | None,
        shifted: bool,
        *,
        head_norm: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.log_decay, self.window_size, self.shifted = tuple(log_decay), window_size, shifted
        self.head_norm, self.options = head_norm, options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, H, W, heads, D), (B, H, W, heads, D), (B, H, W, heads, V) -> (B, H, W, heads, V)."""
        mixed = retain_in_windows(query, key, value, self.log_decay, self.window_size, self.shifted, **self.options)
        return F.rms_norm(mixed, value.shape[-1:], eps=1e-6) if self.head_norm else mixed

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, shifted={self.shifted}, {self.options}"


class LocalConvolution(nn.Module):
    """Depthwise convolution of (B, H, W, C) with bias and zero padding, plus `residual`."""

    def __init__(self, dim: int, kernel_size: int, *, device=None, dtype=None):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=padding, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return depthwise_convolution(x, self.conv.weight, self.conv.bias, residual=residual)


class RetentionMixer(nn.Module):
    """What the token mixers share: projections, heads, local convolution of the values.

    Args:
        dim: channels C.
        num_heads: heads; their width is even if `rotary`.
        core: maps query, key, value of (B, H, W, heads, D) to the mixed values.
        rotary: whether `core` rotates queries and keys.
        gates: outputs of `g_proj`; 0 for no such projection.
        gate_of_input: whether `g_proj` is of the same map as the queries.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        core: nn.Module,
        *,
        rotary: bool = True,
        gates: int = 0,
        gate_of_input: bool = True,
        device=None,
        dtype=None,
    ):
        check_heads(dim, num_heads, rotary)
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, **dd)
        self.k_proj = nn.Linear(dim, dim, **dd)
        self.v_proj = nn.Linear(dim, dim, **dd)
        if gates:
            self.g_proj = nn.Linear(dim, gates, **dd)
        self.lepe = LocalConvolution(dim, 5, **dd)
        self.out_proj = nn.Linear(dim, dim, **dd)
        self.core = core
        names = ("q_proj", "k_proj", "v_proj", *(("g_proj",) if gates and gate_of_input else ()))
        self.projections = {name: getattr(self, name).out_features for name in names}
        self.fused_proj: nn.Linear | None = None

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys, values and, where they are of the same map, gates of (B, H, W, C)."""
        if self.fused_proj is None:
            return [getattr(self, name)(x) for name in self.projections]
        return self.fused_proj(x).split(list(self.projections.values()), -1)

    def retain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mixed values plus the local convolution of the values, (B, H, W, C)."""
        heads = (self.num_heads, -1)
        mixed = self.core(query.unflatten(-1, heads), key.unflatten(-1, heads), value.unflatten(-1, heads))
        return self.lepe(value, residual=mixed.flatten(-2))

    def __prepare_scriptable__(self) -> nn.Module:
        refuse_scripting()

    @torch.no_grad()
    def fuse(self) -> None:
        """Compute all projections of one map in one matrix product, for inference."""
        if self.fused_proj is not None:
            return
        layers = [getattr(self, name) for name in self.projections]
        weight = torch.cat([layer.weight for layer in layers])
        fused = nn.Linear(*weight.shape[::-1], device=weight.device, dtype=weight.dtype)
        fused.weight.copy_(weight)
        fused.bias.copy_(torch.cat([layer.bias for layer in layers]))
        self.fused_proj = fused
        for name in self.projections:
            delattr(self, name)


class FeedForward(nn.Module):
    """(B, H, W, C) -> (B, H, W, C) through `hidden` channels."""

    def __init__(self, dim: int, hidden: int, *, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = LocalConvolution(hidden, 3, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        convolution = self.dwconv.conv  # its weights alone: the activation, it and the residual are one pass
        return self.fc2(gelu_depthwise_residual(self.fc1(x), convolution.weight, convolution.bias))


class RetentionBlock(nn.Module):
    """(B, H, W, C) -> (B, H, W, C).

    Args:
        dim: channels.
        retention: called with the normed map and the block's input.
        mlp_ratio: hidden channels of the feed-forward, in multiples of `dim`.
        layer_scale: initial layer scale; None for none.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        retention: nn.Module,
        mlp_ratio: float,
        *,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.retention_layer_norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.retention = retention
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.ffn = FeedForward(dim, int(dim * mlp_ratio), **dd)
        self.pos = LocalConvolution(dim, 3, **dd)
        scaled = layer_scale is not None
        self.gamma_1 = nn.Parameter(torch.full((1, 1, 1, dim), layer_scale, **dd)) if scaled else None
        self.gamma_2 = nn.Parameter(torch.full((1, 1, 1, dim), layer_scale, **dd)) if scaled else None
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos(x, residual=x)
        mixed = self.retention(self.retention_layer_norm(x), x)
        x = x + self.drop_path(mixed if self.gamma_1 is None else mixed * self.gamma_1)
        mixed = self.ffn(self.final_layer_norm(x))
        return x + self.drop_path(mixed if self.gamma_2 is None else mixed * self.gamma_2)


class ConvolutionStem(nn.Module):
    """Images (B, in_chans, H, W) to maps (B, ceil(H / 4), ceil(W / 4), dim)."""

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        widths = (in_chans, dim // 2, dim // 2, dim, dim)
        layers: list[nn.Module] = []
        for before, after, stride in zip(widths[:-1], widths[1:], (2, 1, 2, 1), strict=True):
            layers += [nn.Conv2d(before, after, 3, stride, 1, **dd), nn.BatchNorm2d(after, **dd), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the batch norms into the convolutions, for inference."""
        for i, layer in enumerate(self.proj):
            if isinstance(layer, nn.BatchNorm2d):
                self.proj[i - 1], self.proj[i] = fuse_conv_bn_eval(self.proj[i - 1], layer), nn.Identity()


class Downsample(nn.Module):
    """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C')."""

    def __init__(self, dim: int, out_dim: int, *, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, 2, 1, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the batch norm into the convolution, for inference."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.reduction, self.norm = fuse_conv_bn_eval(self.reduction, self.norm), nn.Identity()
