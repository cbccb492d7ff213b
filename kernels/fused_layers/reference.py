"""The layers around a gated scan by their definitions, in plain PyTorch: any dtype, differentiable, exportable."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse).to(x.dtype) * weight.to(x.dtype)


def depthwise_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> Tensor:
    channels, padding = x.shape[-1], weight.shape[-1] // 2
    bias = None if bias is None else bias.to(x.dtype)
    out = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), bias, padding=padding, groups=channels)
    out = out.permute(0, 2, 3, 1)
    out = F.silu(out) if activation == "silu" else out
    return out if residual is None else residual + out


def add_image_convolution(
    tokens: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int], overwrite: bool
) -> Tensor:
    before = tokens.shape[1] - grid[0] * grid[1]
    local = depthwise_convolution(x[:, before:].unflatten(1, grid), weight, bias, None, None).flatten(1, 2)
    if overwrite:
        tokens[:, before:] += local
        return tokens
    sums = tokens[:, before:] + local
    return torch.cat([tokens[:, :before], sums.to(tokens.dtype)], 1) if before else sums.to(tokens.dtype)


def gelu_depthwise_residual(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    hidden = F.gelu(x)
    return depthwise_convolution(hidden, weight, bias, hidden, None)


def gated_product(x: Tensor, logits: Tensor, kind: str) -> Tensor:
    return x * (F.silu(logits) if kind == "silu" else logits.sigmoid())


def swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def gated_norm_mix(
    scan: Tensor,
    local: Tensor,
    gate_logits: Tensor,
    scan_weight: Tensor,
    local_weight: Tensor,
    eps: float,
    activation: str | None,
) -> Tensor:
    gate = gate_logits.sigmoid()
    mixed = gate * rms_norm(scan, scan_weight, eps) + (1 - gate) * rms_norm(local, local_weight, eps)
    return F.silu(mixed) if activation == "silu" else mixed
