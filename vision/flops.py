"""Multiply-accumulate operations of a model, scans included.

Dense operations come from torch's FLOP counter. A gated scan costs 3 K V for each token, head and direction (decay of
the K x V state, outer product, readout), whichever way a backend computes it. Published counts of plain ViG are 20 to
25 % lower because the counter used for them does not see the MLP's second projection.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vision.gated_linear_attention import BidirectionalGatedScan


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward pass: convolutions and matrix products, and gated scans."""

    dense: int
    scan: int

    @property
    def total(self) -> int:
        return self.dense + self.scan


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> Macs:
    """Count the multiply-accumulates of `model` on one image.

    Nothing is computed: a copy of the model runs on the meta device.

    Args:
        model: any image model.
        input_size: channels, height, width.
    """
    twin = copy.deepcopy(model).to("meta").eval()
    scan = 0

    def count_scan(query: Tensor, key: Tensor, value: Tensor, *gates: Tensor) -> Tensor:
        nonlocal scan
        directions = 2
        scan += directions * 3 * query.numel() * value.shape[-1]
        return torch.empty_like(value)

    for module in twin.modules():
        if isinstance(module, BidirectionalGatedScan):
            module.forward = count_scan
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        twin(torch.zeros(1, *input_size, device="meta"))
    return Macs(dense=counter.get_total_flops() // 2, scan=scan)
