"""A linear layer whose weight is packed once for oneDNN's matrix product: inference on CPU."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Activations that the product applies on its way out, by the operator's names: (attribute, algorithm).
ACTIVATIONS = {F.gelu: ("gelu", "none"), F.silu: ("swish", "")}
PACKED_DTYPES = (torch.float32, torch.bfloat16)


# What `nn.Module` calls around `forward`, of one module.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_plain(linear: nn.Module) -> bool:
    """Whether calling `linear` is no more than the product with its weight: a subclass, a parametrised or wrapped
    layer, one with hooks and one whose own `forward` was replaced may do anything else."""
    hooked = any(getattr(linear, name) for name in _HOOKS)
    return type(linear) in (nn.Linear, PackedLinear) and not hooked and "forward" not in linear.__dict__


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

    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """`activation` of the layer's output, if it is not None; `ACTIVATIONS` cost no pass of their own."""
        autocast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        if torch.compiler.is_compiling() or wants_gradient or x.device.type != "cpu" or dtype not in PACKED_DTYPES:
            y = F.linear(x, self.weight, self.bias)
            return y if activation is None else activation(y)
        current = 0 if self.weight.is_inference() else self.weight._version
        packed = self._packed.get(dtype)
        if packed is None or packed[0] != current:
            weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().to(dtype))
            packed = self._packed[dtype] = (current, weight)
        bias = None if self.bias is None else self.bias.to(dtype)
        attribute, algorithm = ACTIVATIONS.get(activation, ("none", ""))
        y = torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed[1], bias, attribute, [], algorithm)
        return y if activation is None or activation in ACTIVATIONS else activation(y)

    def _apply(self, function, recurse: bool = True) -> nn.Module:  # moves and casts make new weights
        self._packed.clear()
        return super()._apply(function, recurse)

    def __getstate__(self) -> dict:  # packed weights are opaque: copies and pickles make their own
        return self.__dict__ | {"_packed": {}}

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, bias={self.bias is not None}"


def packed_twin(module: nn.Module) -> nn.Module:
    """`module` for a while of inference: the same parameters, buffers and hooks, but its plain linear layers packed.

    `module` itself stays as it is, so that it can be trained on; a twin made anew never lags behind. It is `module`
    where nothing in it can be packed. The packed weights are copies: they take as much memory as the plain ones. A
    linear layer with hooks or a `forward` of its own (see `is_plain`) is taken as it is.
    """
    if type(module) is nn.Linear:
        return PackedLinear(module) if is_plain(module) and can_pack(module) else module
    children = {name: None if child is None else packed_twin(child) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    twin = copy.copy(module)
    twin._modules = children
    return twin


def activated_linear(linear: nn.Module, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """`activation(linear(x))`, in one pass where `linear` is packed and the activation one of `ACTIVATIONS`."""
    return linear(x, activation) if type(linear) is PackedLinear else activation(linear(x))
