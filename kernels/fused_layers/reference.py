"""The layers around a gated scan by their definitions, in plain PyTorch: any dtype, differentiable, exportable."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse).to(x.dtype) * weight.to(x.dtype)


def depthwise_convolution(x: Tensor, weight: Tensor, activation: str | None) -> Tensor:
    channels = x.shape[-1]
    out = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), padding=1, groups=channels).permute(0, 2, 3, 1)
    return F.silu(out) if activation == "silu" else out


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
