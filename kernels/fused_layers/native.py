"""Calls the CPU kernels of `native.cpp`; every function here returns new contiguous tensors."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels.native import DTYPE_CODES, library

_POINTERS = {  # how many pointers each kernel takes before its dtype codes
    "rms_norm_forward": (3, 2),
    "rms_norm_backward": (5, 2),
    "swiglu_forward": (2, 1),
    "swiglu_backward": (3, 1),
    "depthwise_convolution_forward": (3, 2),
    "depthwise_convolution_backward": (6, 2),
    "gated_norm_mix_forward": (6, 1),
    "gated_norm_mix_backward": (11, 1),
}
_PARAMETERS = {  # C types of the sizes and options between the dtype codes and the thread count
    "rms_norm": (ctypes.c_int64, ctypes.c_int64, ctypes.c_double),
    "swiglu": (ctypes.c_int64, ctypes.c_int64),
    "depthwise_convolution": (*[ctypes.c_int64] * 4, ctypes.c_int),
    "gated_norm_mix": (*[ctypes.c_int64] * 4, ctypes.c_double, ctypes.c_int),
}


@cache
def _function(name: str):
    function = getattr(library("fused_layers/native.cpp"), name)
    pointers, codes = _POINTERS[name]
    parameters = _PARAMETERS[name.rsplit("_", 1)[0]]
    function.argtypes = (*[ctypes.c_void_p] * pointers, *[ctypes.c_int] * codes, *parameters, ctypes.c_int)
    function.restype = None
    return function


def _run(name: str, tensors: tuple[Tensor, ...], dtypes: tuple[torch.dtype, ...], *parameters: int | float) -> None:
    pointers = [tensor.data_ptr() for tensor in tensors]
    _function(name)(*pointers, *[DTYPE_CODES[dtype] for dtype in dtypes], *parameters, torch.get_num_threads())


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


def _taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(_arithmetic(dtype)).reshape(-1, 9).t().contiguous()  # (9, C)


def depthwise_convolution(x: Tensor, weight: Tensor, activate: bool, dtype: torch.dtype) -> Tensor:
    read = _readable(x)
    out = torch.empty(x.shape, dtype=dtype if dtype in DTYPE_CODES else torch.float32)
    if out.numel():
        tensors = (read, _taps(weight, read.dtype), out)
        _run("depthwise_convolution_forward", tensors, (read.dtype, out.dtype), *x.shape, activate)
    return out.to(dtype)


def depthwise_convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, activate: bool) -> tuple[Tensor, Tensor]:
    grad, read = _readable(grad), _readable(x)
    taps = _taps(weight, read.dtype)
    grad_x, grad_taps = torch.empty(x.shape, dtype=read.dtype), torch.zeros_like(taps)
    if grad_x.numel():
        slopes = torch.empty(x.shape if activate else 0, dtype=taps.dtype)
        tensors = (grad, read, taps, grad_x, grad_taps, slopes)
        _run("depthwise_convolution_backward", tensors, (read.dtype, grad.dtype), *x.shape, activate)
    return grad_x.to(x.dtype), grad_taps.t().contiguous().reshape(weight.shape).to(weight.dtype)


def _mix_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype a mix is read in: float64 if any of its tensors has it, bfloat16 if all have, else float32."""
    if any(t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.bfloat16 if all(t.dtype == torch.bfloat16 for t in tensors) else torch.float32


def _evenly_spaced(gate_logits: Tensor) -> tuple[Tensor, int]:
    """`gate_logits` (B, N, H, V) with adjacent heads and evenly spaced tokens (a slice of channels has them), and the
    elements between tokens."""
    batch, tokens, heads, width = gate_logits.shape
    stride = gate_logits.stride()
    between_tokens = stride[1] if tokens > 1 else stride[0]
    even = batch == 1 or tokens == 1 or stride[0] == tokens * stride[1]
    if even and stride[3] == 1 and (heads == 1 or stride[2] == width):
        return gate_logits, between_tokens
    return gate_logits.contiguous(), heads * width


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
    gate, token_stride = _evenly_spaced(gate_logits.to(dtype))
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
    gate, token_stride = _evenly_spaced(gate_logits.to(dtype))
    weights = (_weight(scan_weight, dtype), _weight(local_weight, dtype))
    gradients = (*[torch.empty(scan.shape, dtype=dtype) for _ in range(3)], *[torch.zeros_like(w) for w in weights])
    if scan.numel():
        batch, tokens, heads, width = scan.shape
        read = [t.to(dtype).contiguous() for t in (grad, scan, local)]
        sizes = (batch * tokens, heads, width, token_stride)
        _run("gated_norm_mix_backward", (*read, gate, *weights, *gradients), (dtype,), *sizes, eps, activate)
    inputs = (scan, local, gate_logits, scan_weight, local_weight)
    return tuple(gradient.to(t.dtype) for gradient, t in zip(gradients, inputs, strict=True))
