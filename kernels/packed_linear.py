"""A linear layer whose weight is packed once for oneDNN's matrix product: inference on CPU."""

import torch
from torch import Tensor, nn

PACKED_DTYPES = (torch.float32, torch.bfloat16)


def can_pack(linear: nn.Linear) -> bool:
    """Whether `linear` lies on a CPU whose PyTorch has oneDNN, in float32."""
    weight = linear.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class PackedLinear(nn.Module):
    """`x W^T + b` as `nn.Linear` computes it, up to rounding.

    PyTorch's own layer rearranges its weight in every call; here that is done once for each dtype met (float32, and
    bfloat16 under autocast), which makes small products a tenth to a third faster. The plain weight is kept: state
    dicts and moves stay ordinary, and what oneDNN's operator cannot do (gradients, tracing, other devices) runs on it.
    A weight changed in place is packed again, except through `.data`, which leaves no trace.

    Args:
        linear: the layer whose weight and bias are taken, without gradients.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self._packed: dict[torch.dtype, tuple[int, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        if torch.compiler.is_compiling() or wants_gradient or x.device.type != "cpu" or dtype not in PACKED_DTYPES:
            return nn.functional.linear(x, self.weight, self.bias)
        current = 0 if self.weight.is_inference() else self.weight._version
        packed = self._packed.get(dtype)
        if packed is None or packed[0] != current:
            weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().to(dtype))
            packed = self._packed[dtype] = (current, weight)
        bias = None if self.bias is None else self.bias.to(dtype)
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed[1], bias, "none", [], "")

    def _apply(self, function, recurse: bool = True) -> nn.Module:  # moves and casts make new weights
        self._packed.clear()
        return super()._apply(function, recurse)

    def __getstate__(self) -> dict:  # packed weights are opaque: copies and pickles make their own
        return self.__dict__ | {"_packed": {}}

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, bias={self.bias is not None}"
