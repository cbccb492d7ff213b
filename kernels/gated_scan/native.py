"""Calls the CPU kernels of `native.cpp`; the signatures are those of `kernels.gated_scan.operators`."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels.gated_scan.arguments import raise_for_decay
from kernels.native import NativeTensor, library, native_tensor, readable

FORWARD, BACKWARD = 1, 2  # bits of `directions`
NO_MEMORY, BAD_DECAY = 1, 2  # outcomes; BAD_DECAY is shifted by the direction


class Problem(ctypes.Structure):
    """`struct Problem` of native.cpp."""

    _fields_ = (
        ("sizes", ctypes.c_int64 * 5),
        ("scale", ctypes.c_double),
        ("normalizer", ctypes.c_double),
        ("directions", ctypes.c_int32),
        ("query", NativeTensor),
        ("key", NativeTensor),
        ("value", NativeTensor),
        ("gate", NativeTensor * 2),
        ("initial_state", NativeTensor),
        ("output", NativeTensor),
        ("final_state", NativeTensor),
        ("grad_output", NativeTensor),
        ("grad_final_state", NativeTensor),
        ("grad_query", NativeTensor),
        ("grad_key", NativeTensor),
        ("grad_value", NativeTensor),
        ("grad_gate", NativeTensor * 2),
        ("grad_initial_state", NativeTensor),
    )


@cache
def _function(name: str):
    function = getattr(library("gated_scan/native.cpp"), name)
    function.argtypes = (ctypes.POINTER(Problem), ctypes.c_int, ctypes.c_int)
    function.restype = ctypes.c_int
    return function


def _run(
    name: str,
    directions: int,
    scale: float,
    normalizer: float,
    inputs: dict[str, Tensor | None],
    gates: tuple[Tensor | None, Tensor | None],
    outputs: dict[str, Tensor | None],
    grad_gates: tuple[Tensor | None, Tensor | None] = (None, None),
) -> int:
    """Run a kernel and return its outcome; `outputs` and `grad_gates` are contiguous and written."""
    inputs = {field: tensor if tensor is None else readable(tensor) for field, tensor in inputs.items()}
    read_gates = [None if gate is None else readable(gate) for gate in gates]
    query, value = inputs["query"], inputs["value"]
    problem = Problem(sizes=(*query.shape, value.shape[3]), scale=scale, normalizer=normalizer, directions=directions)
    for field, tensor in (inputs | outputs).items():
        setattr(problem, field, native_tensor(tensor))
    for direction in (0, 1):
        problem.gate[direction] = native_tensor(read_gates[direction])
        problem.grad_gate[direction] = native_tensor(grad_gates[direction])
    wide = any(t is not None and t.dtype == torch.float64 for t in (*inputs.values(), *read_gates))
    outcome = _function(name)(problem, wide, torch.get_num_threads())
    if outcome == NO_MEMORY:
        raise MemoryError(f"{name}: no memory for the workspace of sizes {tuple(problem.sizes)}")
    return outcome


def _writable(like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of `like`'s shape in a dtype the kernels write."""
    dtype = torch.float32 if like.dtype == torch.float16 else like.dtype
    return torch.empty(like.shape, dtype=dtype)


def bidirectional_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_forward: Tensor,
    gate_backward: Tensor,
    scale: float,
    normalizer: float,
) -> Tensor:
    if query.numel() == 0 or value.numel() == 0:
        return value.new_zeros(value.shape)
    output = _writable(value)
    inputs = {"query": query, "key": key, "value": value}
    gates = (gate_forward, gate_backward)
    outcome = _run("gated_scan_forward", FORWARD | BACKWARD, scale / 2, normalizer, inputs, gates, {"output": output})
    for name, gate, bad in zip(
        ("log_decay_forward", "log_decay_backward"), gates, (BAD_DECAY, 2 * BAD_DECAY), strict=True
    ):
        if outcome & bad:
            raise_for_decay(name, gate)
    return output.to(value.dtype)


def bidirectional_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_forward: Tensor,
    gate_backward: Tensor,
    scale: float,
    normalizer: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (query, key, value, gate_forward, gate_backward)
    if query.numel() == 0 or value.numel() == 0:
        return tuple(t.new_zeros(t.shape) for t in tensors)
    gradients = [_writable(t) for t in tensors]
    inputs = {"query": query, "key": key, "value": value, "grad_output": grad_output}
    outputs = dict(zip(("grad_query", "grad_key", "grad_value"), gradients[:3], strict=True))
    gates, grad_gates = (gate_forward, gate_backward), (gradients[3], gradients[4])
    _run("gated_scan_backward", FORWARD | BACKWARD, scale / 2, normalizer, inputs, gates, outputs, grad_gates)
    return tuple(gradient.to(t.dtype) for gradient, t in zip(gradients, tensors, strict=True))


def _one_direction(gate: Tensor | None, reverse: bool) -> tuple[Tensor | None, Tensor | None]:
    return (None, gate) if reverse else (gate, None)


def scan_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    initial_state: Tensor | None,
    scale: float,
    normalizer: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    batch, _, heads, key_dim = query.shape
    wide = any(t is not None and t.dtype == torch.float64 for t in (query, key, value, gate, initial_state))
    final_state = torch.zeros(batch, heads, key_dim, value.shape[3], dtype=torch.float64 if wide else torch.float32)
    if query.numel() == 0 or value.numel() == 0:
        if initial_state is not None:
            final_state.copy_(initial_state)
        return value.new_zeros(value.shape), final_state
    output = _writable(value)
    inputs = {"query": query, "key": key, "value": value, "initial_state": initial_state}
    outputs = {"output": output, "final_state": final_state}
    direction = BACKWARD if reverse else FORWARD
    if _run("gated_scan_forward", direction, scale, normalizer, inputs, _one_direction(gate, reverse), outputs):
        raise_for_decay("log_decay", gate)
    return output.to(value.dtype), final_state


def scan_backward(
    grad_output: Tensor,
    grad_final_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    initial_state: Tensor | None,
    scale: float,
    normalizer: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (query, key, value, gate, grad_final_state if initial_state is None else initial_state)
    if query.numel() == 0 or value.numel() == 0:
        zeros = [t.new_zeros(t.shape) for t in tensors]
        zeros[4].copy_(grad_final_state)  # without tokens the state passes through
        return tuple(zeros)
    gradients = [_writable(t) for t in tensors]
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "initial_state": initial_state,
        "grad_output": grad_output,
        "grad_final_state": grad_final_state,
    }
    names = ("grad_query", "grad_key", "grad_value", "grad_initial_state")
    outputs = dict(zip(names, (*gradients[:3], gradients[4]), strict=True))
    direction = BACKWARD if reverse else FORWARD
    grad_gates = _one_direction(gradients[3], reverse)
    _run(
        "gated_scan_backward", direction, scale, normalizer, inputs, _one_direction(gate, reverse), outputs, grad_gates
    )
    return tuple(gradient.to(t.dtype) for gradient, t in zip(gradients, tensors, strict=True))
