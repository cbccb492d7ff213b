"""Calls the CPU kernels of `native.cpp`."""

import ctypes
import math
from functools import cache

import torch
from torch import Tensor

from kernels.linear_attention.arguments import Settings
from kernels.native import NativeTensor, library, native_tensor, readable

NO_MEMORY = 1  # an outcome


class Problem(ctypes.Structure):
    """`struct Problem` of native.cpp."""

    _fields_ = (
        ("sizes", ctypes.c_int64 * 6),
        ("eps", ctypes.c_double),
        ("floor", ctypes.c_double),
        ("relu", ctypes.c_int32),
        ("divides", ctypes.c_int32),
        ("query", NativeTensor),
        ("key", NativeTensor),
        ("value", NativeTensor),
        ("key_gate", NativeTensor),
        ("value_gate", NativeTensor),
        ("state", NativeTensor),
        ("sums", NativeTensor),
        ("output", NativeTensor),
        ("grad_output", NativeTensor),
        ("grad_query", NativeTensor),
        ("grad_key", NativeTensor),
        ("grad_value", NativeTensor),
        ("grad_key_gate", NativeTensor),
        ("grad_value_gate", NativeTensor),
        ("image_sizes", ctypes.c_int64 * 4),
        ("image", NativeTensor),
        ("weight", NativeTensor),
        ("bias", NativeTensor),
    )


@cache
def _function(name: str):
    function = getattr(library("linear_attention/native.cpp"), name)
    function.argtypes = (ctypes.POINTER(Problem), ctypes.c_int, ctypes.c_int)
    function.restype = ctypes.c_int
    return function


def forward(
    query: Tensor, key: Tensor, value: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, state (B, heads, D, V) and sums (B, heads, D + V), all contiguous; arguments as in the operation."""
    batch, queries, heads, head_dim = query.shape
    value_dim = value.shape[3]
    inputs = {"query": query, "key": key, "value": value, "key_gate": key_gate, "value_gate": value_gate}
    wide = _has_float64(inputs)
    dtype = torch.float64 if wide else torch.float32
    shapes = (
        (batch, queries, heads, value_dim),
        (batch, heads, head_dim, value_dim),
        (batch, heads, head_dim + value_dim),
    )
    if 0 in (batch, queries, heads, key.shape[1], value_dim):
        output, *state = (torch.zeros(shape, dtype=dtype) for shape in shapes)
        return output.to(value.dtype), *state
    output = torch.empty(shapes[0], dtype=_written(value.dtype))
    state, sums = (torch.empty(shape, dtype=dtype) for shape in shapes[1:])
    _run("linear_attention_forward", inputs, {"output": output, "state": state, "sums": sums}, settings, wide)
    return output.to(value.dtype), state, sums


def forward_with_convolution(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor | None,
    value_gate: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    settings: Settings,
) -> Tensor:
    """Output (B, M, C), contiguous; arguments as in the operation."""
    batch, queries, heads, _ = query.shape
    output = torch.empty((batch, queries, heads, value.shape[3]), dtype=_written(value.dtype))
    if output.numel():
        inputs = {"query": query, "key": key, "value": value, "key_gate": key_gate, "value_gate": value_gate}
        if grid[0] * grid[1]:
            inputs |= {"image": x.unflatten(2, (heads, -1)), "weight": weight.flatten(1), "bias": bias}
        _run("linear_attention_forward", inputs, {"output": output}, settings, _has_float64(inputs), grid)
    return output.flatten(2).to(value.dtype)


def backward(
    grad_output: Tensor,
    state: Tensor,
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor | None,
    value_gate: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and both gates in their dtypes; an empty one of a gate that is None."""
    gates = {"key_gate": key_gate, "value_gate": value_gate}
    given = [gate for gate in gates.values() if gate is not None]
    tensors = (query, key, value, *given)
    if 0 in grad_output.shape or key.shape[1] == 0:
        gradients = [torch.zeros(t.shape, dtype=t.dtype) for t in tensors]
    else:
        batch, keys, heads, _ = key.shape
        gradients = [torch.empty(t.shape, dtype=_written(t.dtype)) for t in (query, key, value)]
        of_gates = [torch.empty((batch, heads, keys), dtype=state.dtype) for _ in given]
        inputs = {"query": query, "key": key, "value": value, **gates, "grad_output": grad_output}
        inputs |= {"state": state.contiguous(), "sums": sums.contiguous()}
        names = [f"grad_{name}" for name, gate in gates.items() if gate is not None]
        outputs = dict(zip(("grad_query", "grad_key", "grad_value", *names), (*gradients, *of_gates), strict=True))
        _run("linear_attention_backward", inputs, outputs, settings, state.dtype == torch.float64)
        gradients += [g.sum(0).sum_to_size(gate.shape) for g, gate in zip(of_gates, given, strict=True)]
    gradients = [gradient.to(t.dtype) for gradient, t in zip(gradients, tensors, strict=True)]
    of_gates = iter(gradients[3:])
    return *gradients[:3], *(state.new_empty(0) if gate is None else next(of_gates) for gate in gates.values())


def _has_float64(tensors: dict[str, Tensor | None]) -> bool:
    return any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors.values())


def _written(dtype: torch.dtype) -> torch.dtype:
    """A dtype that the kernels write."""
    return torch.float32 if dtype == torch.float16 else dtype


def _run(
    name: str,
    inputs: dict[str, Tensor | None],
    outputs: dict[str, Tensor],
    settings: Settings,
    wide: bool,
    grid: tuple[int, int] = (0, 0),
) -> None:
    """Run a kernel; `outputs` are contiguous and written."""
    batch, queries, heads, head_dim = inputs["query"].shape
    problem = Problem(
        sizes=(batch, heads, queries, inputs["key"].shape[1], head_dim, inputs["value"].shape[3]),
        eps=settings.eps,
        floor=settings.floor,
        relu=settings.feature_map == "relu",
        divides=settings.divides,
    )
    if "weight" in inputs:
        problem.image_sizes = (queries - grid[0] * grid[1], *grid, math.isqrt(inputs["weight"].shape[1]))
    for gate in ("key_gate", "value_gate"):
        if inputs[gate] is not None:
            inputs[gate] = inputs[gate].expand(heads, -1)
    read = {field: None if tensor is None else readable(tensor) for field, tensor in inputs.items()}
    for field, tensor in (read | outputs).items():
        setattr(problem, field, native_tensor(tensor))
    if _function(name)(problem, wide, torch.get_num_threads()) == NO_MEMORY:
        raise MemoryError(f"{name}: no memory for the workspace of sizes {tuple(problem.sizes)}")
