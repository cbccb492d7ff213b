"""A linear layer whose weight is packed once for oneDNN's matrix product: inference on CPU."""

import torch
from torch import Tensor, nn


def can_pack(linear: nn.Linear) -> bool:
    """Whether `linear` lies on a CPU whose PyTorch has oneDNN, in a dtype that oneDNN multiplies there."""
    weight = linear.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class PackedLinear(nn.Module):
    """`x W^T + b` as `nn.Linear` computes it, without gradients, up to rounding.

    PyTorch's own linear layer rearranges its weight in every call; here that is done once for each dtype met (float32,
    and bfloat16 under autocast), which makes small products a tenth to a third faster. The plain weight is kept, so
    state dicts and moves stay ordinary.

    Args:
        linear: the layer to take the weights of; `can_pack(linear)` must hold.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self._packed: dict[torch.dtype, tuple[int, Tensor, Tensor | None]] = {}

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if torch.compiler.is_compiling() or x.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
            return nn.functional.linear(x, self.weight, self.bias)
        version = self.weight._version
        packed = self._packed.get(dtype)
        if packed is None or packed[0] != version:
            weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().to(dtype))
            bias = None if self.bias is None else self.bias.detach().to(dtype)
            packed = self._packed[dtype] = (version, weight, bias)
        _, weight, bias = packed
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, bias={self.bias is not None}"
