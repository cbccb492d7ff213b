"""Calls the CPU kernels of `native.cpp`; every function here returns new contiguous tensors."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels.native import DTYPE_CODES, library, native_tensor


@cache
def _function(name: str):
    function = getattr(library("fused_layers/native.cpp"), name)
    function.restype = None
    return function


def _call(name: str, *arguments) -> None:
    """Call a kernel: tensors by description, ints as 64-bit sizes, bools as flags, floats as doubles, tuples as arrays."""
    converted = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            converted.append(ctypes.byref(native_tensor(argument)))
        elif isinstance(argument, bool):
            converted.append(ctypes.c_int(argument))
        elif isinstance(argument, int):
            converted.append(ctypes.c_int64(argument))
        elif isinstance(argument, float):
            converted.append(ctypes.c_double(argument))
        elif isinstance(argument, tuple):
            converted.append((ctypes.c_int64 * len(argument))(*argument))
        else:
            converted.append(argument)
    _function(name)(*converted, ctypes.c_int(torch.get_num_threads()))


def _storable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in DTYPE_CODES else tensor.float()


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` as a matrix of its last dimension, without a copy where its rows are evenly spaced."""
    tensor = _storable(tensor)
    if tensor.dim() == 2 and tensor.stride(1) == 1:
        return tensor
    return tensor.contiguous().view(-1, tensor.shape[-1])


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    rows = _rows(x)
    weight = weight.to(_arithmetic(rows.dtype)).contiguous()
    out = torch.empty(x.shape, dtype=dtype)
    if out.numel():
        _call("rms_norm_forward", rows, _pointer(weight), _rows(out), *rows.shape, eps)
    return out


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    wide = weight.to(_arithmetic(rows.dtype)).contiguous()
    grad_x, grad_weight = torch.empty(x.shape, dtype=rows.dtype), torch.zeros_like(wide)
    if grad_x.numel():
        tensors = (_rows(grad), rows, _pointer(wide), _rows(grad_x), _pointer(grad_weight))
        _call("rms_norm_backward", *tensors, *rows.shape, eps)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def swiglu(x: Tensor) -> Tensor:
    rows = _rows(x)
    out = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=rows.dtype)
    if out.numel():
        _call("swiglu_forward", rows, _rows(out), len(rows), out.shape[-1])
    return out.to(x.dtype)


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    rows = _rows(x)
    grad_x = torch.empty(x.shape, dtype=rows.dtype)
    if grad_x.numel():
        _call("swiglu_backward", _rows(grad), rows, _rows(grad_x), len(rows), x.shape[-1] // 2)
    return grad_x.to(x.dtype)


def _taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(_arithmetic(dtype)).reshape(-1, 9).t().contiguous()  # (9, C)


def depthwise_convolution(x: Tensor, weight: Tensor, activate: bool, dtype: torch.dtype) -> Tensor:
    maps = _storable(x).contiguous()
    taps = _taps(weight, maps.dtype)
    out = torch.empty(x.shape, dtype=dtype)
    if out.numel():
        _call("depthwise_convolution_forward", maps, _pointer(taps), out, tuple(x.shape), activate)
    return out


def depthwise_convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, activate: bool) -> tuple[Tensor, Tensor]:
    maps = _storable(x).contiguous()
    grad = _storable(grad).contiguous()
    taps = _taps(weight, maps.dtype)
    grad_x, grad_taps = torch.empty(x.shape, dtype=maps.dtype), torch.zeros_like(taps)
    if grad_x.numel():
        slopes = torch.empty(x.shape if activate else 0, dtype=taps.dtype)
        tensors = (grad, maps, _pointer(taps), grad_x, _pointer(grad_taps), _pointer(slopes))
        _call("depthwise_convolution_backward", *tensors, tuple(x.shape), activate)
    return grad_x.to(x.dtype), grad_taps.t().reshape(weight.shape).to(weight.dtype)


def _heads(*tensors: Tensor) -> list[Tensor]:
    """(B, N, H, V) tensors in one dtype, the last dimension contiguous."""
    dtype = torch.bfloat16 if all(t.dtype == torch.bfloat16 for t in tensors) else torch.float32
    if any(t.dtype == torch.float64 for t in tensors):
        dtype = torch.float64
    tensors = [t.to(dtype) for t in tensors]
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def gated_norm_mix(
    scan: Tensor, local: Tensor, gate_logits: Tensor, scan_weight: Tensor, local_weight: Tensor, eps: float, activate: bool
) -> Tensor:
    heads = _heads(scan, local, gate_logits)
    weights = [w.to(_arithmetic(heads[0].dtype)).contiguous() for w in (scan_weight, local_weight)]
    out = torch.empty(scan.shape, dtype=heads[0].dtype)
    if out.numel():
        _call("gated_norm_mix_forward", *heads, *map(_pointer, weights), out, tuple(scan.shape), eps, activate)
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
    heads = _heads(grad, scan, local, gate_logits)
    weights = [w.to(_arithmetic(heads[0].dtype)).contiguous() for w in (scan_weight, local_weight)]
    gradients = [torch.empty(scan.shape, dtype=heads[0].dtype) for _ in range(3)]
    grad_weights = [torch.zeros_like(w) for w in weights]
    if scan.numel():
        pointers = [*map(_pointer, weights)], [*map(_pointer, grad_weights)]
        _call(
            "gated_norm_mix_backward", *heads, *pointers[0], *gradients, *pointers[1], tuple(scan.shape), eps, activate
        )
    inputs = (scan, local, gate_logits, scan_weight, local_weight)
    return tuple(g.to(t.dtype) for g, t in zip((*gradients, *grad_weights), inputs, strict=True))
