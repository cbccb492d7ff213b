"""Multiply-accumulate operations of a model, scans and retentions included.

Dense operations come from torch's FLOP counter. The mixing of tokens is counted by formula, whichever way a backend
computes it. A gated scan costs 3 K V for each token, head and direction (decay of the K x V state, outer product,
readout); a window retention D + V for each pair of tokens that meet and each head (score, weighted sum). Published
counts of plain ViG are 20 to 25 % lower because the counter used for them does not see the MLP's second projection.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kernels.window_retention.tables import runs
from vision.gated_linear_attention import BidirectionalGatedScan
from vision.retention_layers import WindowRetention, windows_and_shift
from vision.rmt import FullRetention


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward pass: convolutions and matrix products, and the mixing of tokens."""

    dense: int
    mixing: int

    @property
    def total(self) -> int:
        return self.dense + self.mixing


def scan_macs(module: BidirectionalGatedScan, query: Tensor, key: Tensor, value: Tensor, *gates: Tensor) -> int:
    directions = 2
    return directions * 3 * query.numel() * value.shape[-1]


def window_macs(module: WindowRetention, query: Tensor, key: Tensor, value: Tensor) -> int:
    batch, *size, heads, head_dim = query.shape
    window, shift = windows_and_shift(tuple(size), module.window_size, module.shifted)
    met = [sum((stop - start) ** 2 for start, stop in runs(*axis)) for axis in zip(size, window, shift, strict=True)]
    pairs = size[0] * met[1] + size[1] * met[0]
    return batch * heads * pairs * (head_dim + value.shape[-1])


def full_macs(module: FullRetention, query: Tensor, key: Tensor, value: Tensor) -> int:
    batch, height, width, heads, head_dim = query.shape
    return batch * heads * (height * width) ** 2 * (head_dim + value.shape[-1])


MIXING = {BidirectionalGatedScan: scan_macs, WindowRetention: window_macs, FullRetention: full_macs}


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> Macs:
    """Count the multiply-accumulates of `model` on one image.

    Nothing is computed: a copy of the model runs on the meta device.

    Args:
        model: any image model.
        input_size: channels, height, width.
    """
    twin = copy.deepcopy(model).to("meta").eval()
    for module in twin.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # timm's fused attention, whose products the counter does not see
    mixing = 0

    def counted(module: nn.Module):
        def forward(query: Tensor, key: Tensor, value: Tensor, *gates: Tensor) -> Tensor:
            nonlocal mixing
            mixing += MIXING[type(module)](module, query, key, value, *gates)
            return torch.empty_like(value)

        return forward

    for module in twin.modules():
        if type(module) in MIXING:
            module.forward = counted(module)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        twin(torch.zeros(1, *input_size, device="meta"))
    return Macs(dense=counter.get_total_flops() // 2, mixing=mixing)
