"""Calls the CPU kernels of `native.cpp` and `convolution.cpp`; every function here returns new contiguous tensors."""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from kernels.native import DTYPE_CODES, NativeTensor, library

_ARGUMENTS = {  # of each kernel, in this order: maps, pointers, dtype codes; then its parameters and the thread count
    "rms_norm_forward": (0, 3, 2),
    "rms_norm_backward": (0, 5, 2),
    "swiglu_forward": (0, 2, 1),
    "swiglu_backward": (0, 3, 1),
    "gated_product_forward": (3, 0, 0),
    "gated_product_backward": (5, 0, 0),
    "gated_norm_mix_forward": (0, 6, 1),
    "gated_norm_mix_backward": (0, 11, 1),
    "depthwise_convolution_forward": (3, 2, 0),
    "depthwise_convolution_backward": (3, 4, 0),
    "gelu_depthwise_residual_forward": (2, 2, 0),
    "gelu_depthwise_residual_backward": (3, 3, 0),
}
_CONVOLUTIONS = ("depthwise_convolution", "gelu_depthwise_residual")  # their maps are (B, H, W, C)
_PARAMETERS = {  # C types of the sizes and options
    "rms_norm": (ctypes.c_int64, ctypes.c_int64, ctypes.c_double),
    "swiglu": (ctypes.c_int64, ctypes.c_int64),
    "gated_product": (ctypes.c_int64, ctypes.c_int64, ctypes.c_int),
    "gated_norm_mix": (*[ctypes.c_int64] * 4, ctypes.c_double, ctypes.c_int),
    "depthwise_convolution": (*[ctypes.c_int64] * 5, ctypes.c_int, ctypes.c_int),
    "gelu_depthwise_residual": (ctypes.c_int64,) * 5,
}


@cache
def _function(name: str):
    layer = name.rsplit("_", 1)[0]
    source = "convolution" if layer in _CONVOLUTIONS else "native"
    function = getattr(library(f"fused_layers/{source}.cpp"), name)
    maps, pointers, codes = _ARGUMENTS[name]
    tensors = (*[NativeTensor] * maps, *[ctypes.c_void_p] * pointers, *[ctypes.c_int] * codes)
    function.argtypes = (*tensors, *_PARAMETERS[layer], ctypes.c_int)
    function.restype = None
    return function


def _run(
    name: str,
    tensors: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
    *parameters: int | float,
    maps: Sequence[Tensor | None] = (),
) -> None:
    """Call a kernel.

    Args:
        name: of the kernel.
        tensors: contiguous ones whose dtypes the kernel knows from `dtypes`.
        dtypes: passed as codes.
        parameters: sizes and options.
        maps: tensors (..., C) passed with their dtypes; where their rows are evenly spaced they are not copied.
    """
    space = _evenly_spaced_images if name.startswith(_CONVOLUTIONS) else _evenly_spaced
    spaced = [(None, 0) if tensor is None else space(tensor) for tensor in maps]
    described = [_description(*tensor_and_strides) for tensor_and_strides in spaced]
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    codes = [DTYPE_CODES[dtype] for dtype in dtypes]
    _function(name)(*described, *pointers, *codes, *parameters, torch.get_num_threads())


def _description(tensor: Tensor | None, *strides: int) -> NativeTensor:
    if tensor is None:
        return NativeTensor()
    return NativeTensor(tensor.data_ptr(), strides, DTYPE_CODES[tensor.dtype])


def _spacing(tensor: Tensor) -> int | None:
    """The elements between the rows of `tensor` (..., C), None where these are not evenly spaced or channels are not
    adjacent."""
    *sizes, width = tensor.shape
    *strides, between_channels = tensor.stride()
    between_rows = expected = None
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if between_rows is None:
            between_rows = stride
        elif stride != expected:
            return None
        expected = stride * size
    if between_channels != 1 and width > 1:
        return None
    return width if between_rows is None else between_rows


def _evenly_spaced(tensor: Tensor) -> tuple[Tensor, int]:
    """`tensor` (..., C) with adjacent channels and evenly spaced rows (a slice of channels has them), copied only where
    it has not, and the elements between rows."""
    spacing = _spacing(tensor)
    return (tensor.contiguous(), tensor.shape[-1]) if spacing is None else (tensor, spacing)


def _evenly_spaced_images(tensor: Tensor) -> tuple[Tensor, int, int]:
    """`tensor` (B, H, W, C), each image of which is evenly spaced (the end of a sequence of tokens is), copied only
    where it is not, and the elements between pixels and between images."""
    spacing = _spacing(tensor[0]) if len(tensor) else None
    if spacing is None:
        tensor, spacing = tensor.contiguous(), tensor.shape[-1]
    return tensor, spacing, tensor.stride(0)


def _readable(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype in DTYPE_CODES else tensor.float()).contiguous()


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(_arithmetic(dtype)).contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    read = _readable(x)
    out = torch.empty(x.shape, dtype=dtype if dtype in DTYPE_CODES else torch.float32)
    if out.numel():
        width = x.shape[-1]
        tensors = (read, _weight(weight, read.dtype), out)
        _run("rms_norm_forward", tensors, (read.dtype, out.dtype), out.numel() // width, width, eps)
    return out.to(dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    grad, read = _readable(grad), _readable(x)
    wide = _weight(weight, read.dtype)
    grad_x, grad_weight = torch.empty(x.shape, dtype=read.dtype), torch.zeros_like(wide)
    if grad_x.numel():
        width = x.shape[-1]
        tensors = (grad, read, wide, grad_x, grad_weight)
        _run("rms_norm_backward", tensors, (read.dtype, grad.dtype), x.numel() // width, width, eps)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def swiglu(x: Tensor) -> Tensor:
    read = _readable(x)
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=read.dtype)
    if out.numel():
        _run("swiglu_forward", (read, out), (read.dtype,), out.numel() // width, width)
    return out.to(x.dtype)


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    read = _readable(x)
    grad = grad.to(read.dtype).contiguous()
    grad_x = torch.empty(x.shape, dtype=read.dtype)
    if grad_x.numel():
        width = x.shape[-1] // 2
        _run("swiglu_backward", (grad, read, grad_x), (read.dtype,), grad.numel() // width, width)
    return grad_x.to(x.dtype)


def _in_memory_of(arithmetic: torch.dtype, tensor: Tensor) -> Tensor:
    """`tensor` in a dtype from which a kernel of that arithmetic reads."""
    if arithmetic == torch.float64:
        return tensor.double()
    return tensor if tensor.dtype in (torch.float32, torch.bfloat16) else tensor.float()


def gated_product(x: Tensor, logits: Tensor, silu: bool) -> Tensor:
    wide = _arithmetic(torch.promote_types(x.dtype, logits.dtype))
    read, gate = (_in_memory_of(wide, tensor) for tensor in (x, logits))
    out = torch.empty(x.shape, dtype=read.dtype)
    if out.numel():
        width = x.shape[-1]
        _run("gated_product_forward", (), (), out.numel() // width, width, silu, maps=(read, gate, out))
    return out.to(x.dtype)


def gated_product_backward(grad: Tensor, x: Tensor, logits: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    wide = _arithmetic(torch.promote_types(x.dtype, logits.dtype))
    read, gate = (_in_memory_of(wide, tensor) for tensor in (x, logits))
    grad_x, grad_logits = (torch.empty(x.shape, dtype=tensor.dtype) for tensor in (read, gate))
    if grad_x.numel():
        width = x.shape[-1]
        maps = (grad.to(read.dtype), read, gate, grad_x, grad_logits)
        _run("gated_product_backward", (), (), grad_x.numel() // width, width, silu, maps=maps)
    return grad_x.to(x.dtype), grad_logits.to(logits.dtype)


def depthwise_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    add_input: bool,
    activate: bool,
    dtype: torch.dtype,
) -> Tensor:
    wide = _arithmetic(dtype)
    out = torch.empty(x.shape, dtype=dtype if dtype in DTYPE_CODES else torch.float32)
    if out.numel():
        read = _in_memory_of(wide, x)
        added = None if residual is None else _in_memory_of(wide, residual)
        weights = (_weight(weight, wide), None if bias is None else _weight(bias, wide))
        sizes = (*x.shape, weight.shape[-1])
        _run("depthwise_convolution_forward", weights, (), *sizes, activate, add_input, maps=(read, added, out))
    return out.to(dtype)


def depthwise_convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, add_input: bool, activate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (zeros like the weight's where there is none)."""
    wide = _arithmetic(x.dtype)
    read = _in_memory_of(wide, x)
    weights = (_weight(weight, wide), None if bias is None else _weight(bias, wide))
    grad_x, grad_weight = torch.empty(x.shape, dtype=read.dtype), torch.zeros_like(weights[0])
    grad_bias = torch.zeros(weight.shape[0], dtype=wide)
    if grad_x.numel():
        tensors = (*weights, grad_weight, grad_bias)
        maps = (_in_memory_of(wide, grad), read, grad_x)
        sizes = (*x.shape, weight.shape[-1])
        _run("depthwise_convolution_backward", tensors, (), *sizes, activate, add_input, maps=maps)
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias_dtype)


def _may_overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the first to the last byte of both share any; addresses tell it even where storages differ."""
    if not a.numel() or not b.numel():
        return False
    begins, ends = [], []
    for tensor in (a, b):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        begins.append(tensor.data_ptr())
        ends.append(tensor.data_ptr() + (last + 1) * tensor.element_size())
    return max(begins) < min(ends)


def add_image_convolution(
    tokens: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, grid: Sequence[int], out: Tensor
) -> None:
    """Into `out`, which may be `tokens` and then keeps what comes before the image; `x` may share its memory."""
    before = tokens.shape[1] - grid[0] * grid[1]
    if out is not tokens:
        out[:, :before] = tokens[:, :before]
    image, given, target = (tensor[:, before:].unflatten(1, tuple(grid)) for tensor in (x, tokens, out))
    if not target.numel():
        return
    wide = _arithmetic(torch.promote_types(x.dtype, tokens.dtype))
    weights = (_weight(weight, wide), None if bias is None else _weight(bias, wide))
    # The kernel writes pixels without gaps between them.
    in_place = _in_memory_of(wide, target) is target and _spacing(target[0]) == target.shape[-1]
    written = target if in_place else torch.empty(target.shape, dtype=wide)
    read = _in_memory_of(wide, image)
    if in_place and _may_overlap(read, written):
        # Rows would be overwritten before the window of their neighbours has seen them.
        read = read.clone(memory_format=torch.contiguous_format)
    maps = (read, _in_memory_of(wide, given), written)
    _run("depthwise_convolution_forward", weights, (), *image.shape, weight.shape[-1], False, False, maps=maps)
    if not in_place:
        target.copy_(written)


def add_image_convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, grid: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (zeros like the weight's where there is none)."""
    wide = _arithmetic(x.dtype)
    read = _in_memory_of(wide, x)
    before = x.shape[1] - grid[0] * grid[1]
    grad_x, grad_weight = torch.empty(x.shape, dtype=read.dtype), torch.zeros(weight.shape, dtype=wide)
    grad_x[:, :before] = 0
    grad_bias = torch.zeros(weight.shape[0], dtype=wide)
    maps = [tensor[:, before:].unflatten(1, tuple(grid)) for tensor in (_in_memory_of(wide, grad), read, grad_x)]
    if maps[0].numel():
        tensors = (_weight(weight, wide), None, grad_weight, grad_bias)
        sizes = (*maps[0].shape, weight.shape[-1])
        _run("depthwise_convolution_backward", tensors, (), *sizes, False, False, maps=maps)
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias_dtype)


def gelu_depthwise_residual(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    wide = _arithmetic(dtype)
    out = torch.empty(x.shape, dtype=dtype if dtype in DTYPE_CODES else torch.float32)
    if out.numel():
        weights = (_weight(weight, wide), None if bias is None else _weight(bias, wide))
        maps = (_in_memory_of(wide, x), out)
        _run("gelu_depthwise_residual_forward", weights, (), *x.shape, weight.shape[-1], maps=maps)
    return out.to(dtype)


def gelu_depthwise_residual_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and, in the dtype of the weight, bias."""
    wide = _arithmetic(x.dtype)
    read, taps = _in_memory_of(wide, x), _weight(weight, wide)
    grad_x, grad_weight = torch.empty(x.shape, dtype=read.dtype), torch.zeros_like(taps)
    grad_bias = torch.zeros(weight.shape[0], dtype=wide)
    if grad_x.numel():
        tensors, maps = (taps, grad_weight, grad_bias), (_in_memory_of(wide, grad), read, grad_x)
        _run("gelu_depthwise_residual_backward", tensors, (), *x.shape, weight.shape[-1], maps=maps)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _mix_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype a mix is read in: float64 if any of its tensors has it, bfloat16 if all have, else float32."""
    if any(t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.bfloat16 if all(t.dtype == torch.bfloat16 for t in tensors) else torch.float32


def gated_norm_mix(
    scan: Tensor,
    local: Tensor,
    gate_logits: Tensor,
    scan_weight: Tensor,
    local_weight: Tensor,
    eps: float,
    activate: bool,
) -> Tensor:
    dtype = _mix_dtype(scan, local, gate_logits)
    gate, token_stride = _evenly_spaced(gate_logits.to(dtype).flatten(2))
    out = torch.empty(scan.shape, dtype=dtype)
    if out.numel():
        batch, tokens, heads, width = scan.shape
        weights = (_weight(scan_weight, dtype), _weight(local_weight, dtype))
        tensors = (scan.to(dtype).contiguous(), local.to(dtype).contiguous(), gate, *weights, out)
        _run("gated_norm_mix_forward", tensors, (dtype,), batch * tokens, heads, width, token_stride, eps, activate)
    return out.to(scan.dtype)


def gated_norm_mix_backward(
    grad: Tensor,
    scan: Tensor,
    local: Tensor,
    gate_logits: Tensor,
    scan_weight: Tensor,
    local_weight: Tensor,
    eps: float,
    activate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _mix_dtype(scan, local, gate_logits)
    gate, token_stride = _evenly_spaced(gate_logits.to(dtype).flatten(2))
    weights = (_weight(scan_weight, dtype), _weight(local_weight, dtype))
    gradients = (*[torch.empty(scan.shape, dtype=dtype) for _ in range(3)], *[torch.zeros_like(w) for w in weights])
    if scan.numel():
        batch, tokens, heads, width = scan.shape
        read = [t.to(dtype).contiguous() for t in (grad, scan, local)]
        sizes = (batch * tokens, heads, width, token_stride)
        _run("gated_norm_mix_backward", (*read, gate, *weights, *gradients), (dtype,), *sizes, eps, activate)
    inputs = (scan, local, gate_logits, scan_weight, local_weight)
    return tuple(gradient.to(t.dtype) for gradient, t in zip(gradients, inputs, strict=True))
