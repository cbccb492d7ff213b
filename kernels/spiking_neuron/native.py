"""Calls the CPU kernels of `native.cpp`."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels.native import NativeTensor, library, native_tensor, readable
from kernels.spiking_neuron.arguments import SURROGATES, Settings
from kernels.spiking_neuron.layout import Neurons, arithmetic_dtype, new_state, new_steps

NO_MEMORY = 1  # an outcome
NO_LEAK, INPUT_DECAYS, INPUT_STAYS = range(3)


class Problem(ctypes.Structure):
    """`struct Problem` of native.cpp."""

    _fields_ = (
        ("steps", ctypes.c_int64),
        ("neurons", ctypes.c_int64),
        ("threshold", ctypes.c_double),
        ("tau", ctypes.c_double),
        ("rest", ctypes.c_double),
        ("alpha", ctypes.c_double),
        ("current_slope", ctypes.c_double),
        ("membrane_slope", ctypes.c_double),
        ("reset_constant", ctypes.c_double),
        ("reset_factor", ctypes.c_double),
        ("leak", ctypes.c_int32),
        ("hard", ctypes.c_int32),
        ("surrogate", ctypes.c_int32),
        ("current", NativeTensor),
        ("initial_state", NativeTensor),
        ("spikes", NativeTensor),
        ("last_state", NativeTensor),
        ("grad_spikes", NativeTensor),
        ("grad_last_state", NativeTensor),
        ("grad_current", NativeTensor),
        ("grad_initial_state", NativeTensor),
    )


@cache
def _function(name: str):
    function = getattr(library("spiking_neuron/native.cpp"), name)
    function.argtypes = (ctypes.POINTER(Problem), ctypes.c_int)
    function.restype = ctypes.c_int
    return function


def forward(
    current: Tensor, initial_state: Tensor | None, settings: Settings, return_state: bool
) -> tuple[Tensor, Tensor]:
    """Spikes and last membrane, an empty one if it is not asked for; arguments as in the operation."""
    dtype = arithmetic_dtype(current, initial_state)
    spikes = new_steps(current, _in_memory(current.dtype, dtype))
    state = new_state(spikes, dtype) if return_state else None
    neurons = Neurons(spikes)
    read = _read_fields(neurons, dtype, {"current": current}, {"initial_state": initial_state})
    written = _written_fields(neurons, {"spikes": spikes}, {"last_state": state})
    _run("spiking_neuron_forward", current, read | written, settings)
    return spikes.to(current.dtype), current.new_empty(0, dtype=dtype) if state is None else state


def backward(
    grad_spikes: Tensor | None,
    grad_state: Tensor | None,
    current: Tensor,
    initial_state: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Gradients of current and initial state in their dtypes; that of a state that is None is empty."""
    dtype = arithmetic_dtype(current, initial_state)
    of_current = new_steps(current, _in_memory(current.dtype, dtype))
    of_state = None if initial_state is None else new_state(of_current, dtype)
    neurons = Neurons(of_current)
    steps = {"current": current, "grad_spikes": grad_spikes}
    read = _read_fields(neurons, dtype, steps, {"initial_state": initial_state, "grad_last_state": grad_state})
    written = _written_fields(neurons, {"grad_current": of_current}, {"grad_initial_state": of_state})
    _run("spiking_neuron_backward", current, read | written, settings)
    of_state = current.new_empty(0) if initial_state is None else of_state.to(initial_state.dtype)
    return of_current.to(current.dtype), of_state


def _in_memory(dtype: torch.dtype, arithmetic: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel sees a current of `dtype`, its spikes and their gradients."""
    return torch.bfloat16 if dtype == torch.bfloat16 and arithmetic == torch.float32 else arithmetic


def _read_fields(
    neurons: Neurons, dtype: torch.dtype, steps: dict[str, Tensor | None], states: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    """Fields of a problem that a kernel reads, of (T, ...) and (...): copied where dtype or order are not its own."""
    memory = _in_memory(steps["current"].dtype, dtype)
    views = {field: readable(neurons.steps(x.to(memory))) for field, x in steps.items() if x is not None}
    return views | {field: readable(neurons.state(x.to(dtype))) for field, x in states.items() if x is not None}


def _written_fields(neurons: Neurons, steps: dict[str, Tensor], states: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Fields of a problem that a kernel writes, of `new_steps` and `new_state`: never copies."""
    views = {field: neurons.written_steps(x) for field, x in steps.items()}
    return views | {field: neurons.written_state(x) for field, x in states.items() if x is not None}


def _run(name: str, current: Tensor, fields: dict[str, Tensor], settings: Settings) -> None:
    """Run a kernel on the tensors of its problem."""
    if current.numel() == 0:
        return
    leak = NO_LEAK if settings.tau is None else INPUT_DECAYS if settings.decay_input else INPUT_STAYS
    problem = Problem(
        steps=current.shape[0],
        neurons=current.shape[1:].numel(),
        threshold=settings.threshold,
        tau=1.0 if settings.tau is None else settings.tau,
        rest=settings.rest,
        alpha=settings.alpha,
        current_slope=settings.current_slope,
        membrane_slope=settings.membrane_slope,
        reset_constant=settings.reset_constant,
        reset_factor=settings.reset_factor,
        leak=leak,
        hard=settings.hard,
        surrogate=SURROGATES.index(settings.surrogate),
        **{field: native_tensor(view) for field, view in fields.items()},
    )
    if _function(name)(problem, torch.get_num_threads()) == NO_MEMORY:
        raise MemoryError(f"{name}: no memory for the membranes of {problem.steps} steps")
