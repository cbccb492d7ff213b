"""Spiking neurons on GPUs: one program a block of neurons, which takes all time steps with its membranes in registers.

Forward reads currents and writes spikes once. Backward takes the steps twice: forward again, to write every charged
membrane, and then back, to read them. Where the gradient of the current is float32 they lie in its memory, each until
its gradient takes its place; what a program writes it reads back soon, from the cache. Nothing is summed over neurons,
so the bits are the same every time.

Precision: float32, divisions by tau rounded correctly, and nothing is multiplied on the way to a spike: spikes are
those of the definition on CPU to the bit. (PyTorch's own division by a number on a GPU multiplies by its reciprocal.)

Floor, a prediction and not a measurement: nothing here has been timed or has run on a GPU. Of s bytes an element, 2 s
bytes forward for each step of a neuron, and 3 s backward (and 8 more to and from the cache). 4 steps of 64 maps of
64 x 16 x 16 in float32, 4.2 million: 34 and 50 MB, 11 and 17 us at the 3.0 TB/s of an H100.
"""

import torch
import triton
from torch import Tensor

from kernels.gpu.triton import launch
from kernels.spiking_neuron.arguments import Settings
from kernels.spiking_neuron.layout import Neurons, new_state, new_steps
from kernels.spiking_neuron.triton_kernels import spiking_backward_kernel, spiking_forward_kernel

# Neurons of a program, four a thread; tests/kernels/test_triton_compilation.py sees that no register is spilled.
BLOCK, WARPS = 512, 4


def forward(
    current: Tensor, initial_state: Tensor | None, settings: Settings, return_state: bool
) -> tuple[Tensor, Tensor]:
    """Spikes and last membrane, an empty one if it is not asked for; arguments as in the operation, none float64."""
    spikes = new_steps(current)
    state = new_state(spikes, torch.float32) if return_state else None
    neurons = Neurons(spikes)
    tensors = (
        *_with_stride(_read_steps(neurons, current)),
        *_with_stride(neurons.written_steps(spikes)),
        _read_state(neurons, initial_state),
        None if state is None else neurons.written_state(state),
    )
    _run(spiking_forward_kernel, current, tensors, (), settings)
    return spikes, current.new_empty(0, dtype=torch.float32) if state is None else state


def backward(
    grad_spikes: Tensor | None,
    grad_state: Tensor | None,
    current: Tensor,
    initial_state: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Gradients of current and initial state in their dtypes; that of a state that is None is empty."""
    of_current = new_steps(current)
    of_state = None if initial_state is None else new_state(of_current, torch.float32)
    neurons = Neurons(of_current)
    narrow = current.dtype != torch.float32
    gradients = neurons.written_steps(of_current)
    charged = gradients.new_empty(gradients.shape, dtype=torch.float32) if narrow else gradients
    tensors = (
        *_with_stride(_read_steps(neurons, current)),
        *(_with_stride(_read_steps(neurons, grad_spikes)) if grad_spikes is not None else (None, 0)),
        *_with_stride(gradients),
        *_with_stride(charged),
        _read_state(neurons, initial_state),
        _read_state(neurons, grad_state),
        None if of_state is None else neurons.written_state(of_state),
    )
    slopes = (settings.current_slope, settings.membrane_slope, settings.reset_constant, settings.reset_factor)
    numbers = (settings.alpha, *slopes)
    _run(spiking_backward_kernel, current, tensors, numbers, settings, SURROGATE=settings.surrogate)
    return of_current, current.new_empty(0) if initial_state is None else of_state.to(initial_state.dtype)


def _with_stride(steps: Tensor) -> tuple[Tensor, int]:
    """(T, neurons), and the elements between steps."""
    return steps, steps.stride(0)


def _read_steps(neurons: Neurons, tensor: Tensor) -> Tensor:
    """(T, neurons) with adjacent neurons."""
    steps = neurons.steps(tensor)
    return steps if steps.stride(1) == 1 or steps.shape[1] <= 1 else steps.contiguous()


def _read_state(neurons: Neurons, state: Tensor | None) -> Tensor | None:
    return None if state is None else neurons.state(state).float().contiguous()


def _run(
    kernel: triton.JITFunction, current: Tensor, tensors: tuple, numbers: tuple, settings: Settings, **constants
) -> None:
    """Run one program of `kernel` for each block of neurons."""
    if current.numel() == 0:
        return
    steps, neurons = current.shape[0], current.shape[1:].numel()
    leak = "none" if settings.tau is None else "with input" if settings.decay_input else "without input"
    tau = 1.0 if settings.tau is None else settings.tau
    numbers = (steps, neurons, settings.threshold, tau, settings.rest, *numbers)
    constants |= {"LEAK": leak, "HARD": settings.hard, "BLOCK": BLOCK, "num_warps": WARPS}
    launch(current, kernel, triton.cdiv(neurons, BLOCK), *tensors, *numbers, **constants)
