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
        ("reset_slopes", ctypes.c_double * 2),
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
    state = new_state(current, dtype) if return_state else None
    steps = {"current": current, "spikes": spikes}
    _run("spiking_neuron_forward", steps, {"initial_state": initial_state, "last_state": state}, dtype, settings)
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
    of_state = None if initial_state is None else new_state(current, dtype)
    steps = {"current": current, "grad_spikes": grad_spikes, "grad_current": of_current}
    states = {"initial_state": initial_state, "grad_last_state": grad_state, "grad_initial_state": of_state}
    _run("spiking_neuron_backward", steps, states, dtype, settings)
    of_state = current.new_empty(0) if initial_state is None else of_state.to(initial_state.dtype)
    return of_current.to(current.dtype), of_state


def _in_memory(dtype: torch.dtype, arithmetic: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel sees a current of `dtype`, its spikes and their gradients."""
    return torch.bfloat16 if dtype == torch.bfloat16 and arithmetic == torch.float32 else arithmetic


def _run(
    name: str,
    steps: dict[str, Tensor | None],
    states: dict[str, Tensor | None],
    dtype: torch.dtype,
    settings: Settings,
) -> None:
    """Run a kernel on tensors (T, ...) and (...); those it writes are of `new_steps` and `new_state`."""
    current = steps["current"]
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
        reset_slopes=settings.reset_slopes,
        leak=leak,
        hard=settings.hard,
        surrogate=SURROGATES.index(settings.surrogate),
    )
    neurons = Neurons(next(reversed(steps.values())))
    memory = _in_memory(current.dtype, dtype)
    views = {field: readable(neurons.steps(x.to(memory))) for field, x in steps.items() if x is not None}
    views |= {field: readable(neurons.state(x.to(dtype))) for field, x in states.items() if x is not None}
    for field, view in views.items():
        setattr(problem, field, native_tensor(view))
    if _function(name)(problem, torch.get_num_threads()) == NO_MEMORY:
        raise MemoryError(f"{name}: no memory for the membranes of {problem.steps} steps")
