"""The Triton kernels of spiking neurons; `triton.py` launches them and explains the algorithm.

Legend: N is a block of neurons; a comment gives a tile's shape. Tensors of steps are (T, neurons) with adjacent neurons
and any stride of the steps; states are contiguous, and None where they are not given or not wanted.
"""

import triton
import triton.language as tl


@triton.jit
def _load(tensor, step, stride, places, inside):
    """[N] of one step, as float32."""
    return tl.load(tensor + tl.cast(step, tl.int64) * stride + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(tensor, step, stride, places, inside, x):
    tl.store(tensor + tl.cast(step, tl.int64) * stride + places, x.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _load_state(state, places, inside, otherwise, BLOCK: tl.constexpr):
    if state is None:
        loaded = tl.zeros([BLOCK], tl.float32) + otherwise
    else:
        loaded = tl.load(state + places, mask=inside, other=0.0)
    return loaded


@triton.jit
def _charge(v, x, tau, rest, LEAK: tl.constexpr):
    if LEAK == "none":
        h = v + x
    elif LEAK == "with input":
        h = v + tl.div_rn(x - (v - rest), tl.zeros_like(v) + tau)
    else:
        h = v - tl.div_rn(v - rest, tl.zeros_like(v) + tau) + x
    return h


@triton.jit
def _reset(h, fired, threshold, rest, HARD: tl.constexpr):
    return tl.where(fired, rest if HARD else h - threshold, h)


@triton.jit
def _slope(u, alpha, SURROGATE: tl.constexpr):
    if SURROGATE == "atan":
        turned = 1.5707963267948966 * alpha * u
        slope = 0.5 * alpha / (1.0 + turned * turned)
    elif SURROGATE == "sigmoid":
        e = tl.exp(-tl.abs(alpha * u))
        slope = alpha * e / ((1.0 + e) * (1.0 + e))
    else:
        slope = tl.where(tl.abs(u) < 0.5 * alpha, 1.0 / alpha, 0.0)
    return slope


@triton.jit
def spiking_forward_kernel(
    current, current_stride, spikes, spikes_stride, initial_state, last_state, steps, neurons, threshold, tau, rest,
    LEAK: tl.constexpr, HARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All steps of a block of neurons."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [N]
    inside = places < neurons
    v = _load_state(initial_state, places, inside, rest, BLOCK)  # [N]
    for step in range(0, steps):
        h = _charge(v, _load(current, step, current_stride, places, inside), tau, rest, LEAK)
        fired = h >= threshold
        _store(spikes, step, spikes_stride, places, inside, tl.where(fired, 1.0, 0.0))
        v = _reset(h, fired, threshold, rest, HARD)
    if last_state is not None:
        tl.store(last_state + places, v, mask=inside)


@triton.jit
def spiking_backward_kernel(
    current, current_stride, spike_gradients, spike_gradients_stride, current_gradients, current_gradients_stride,
    charged, charged_stride, initial_state, last_state_gradient, initial_state_gradient, steps, neurons, threshold, tau,
    rest, alpha, current_slope, membrane_slope, reset_constant, reset_factor,
    LEAK: tl.constexpr, HARD: tl.constexpr, SURROGATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All steps of a block of neurons twice: forward for the charged membranes, which it writes, and back.

    `charged` may be the memory of the current's gradients.
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [N]
    inside = places < neurons
    v = _load_state(initial_state, places, inside, rest, BLOCK)  # [N]
    for step in range(0, steps):
        h = _charge(v, _load(current, step, current_stride, places, inside), tau, rest, LEAK)
        _store(charged, step, charged_stride, places, inside, h)
        v = _reset(h, h >= threshold, threshold, rest, HARD)
    tl.debug_barrier()  # a thread may read back what another wrote
    gradient = _load_state(last_state_gradient, places, inside, 0.0, BLOCK)  # [N], of v
    for back in range(0, steps):
        step = steps - 1 - back
        h = _load(charged, step, charged_stride, places, inside)
        through_spike = gradient * (reset_constant + reset_factor * h)
        if spike_gradients is not None:
            through_spike += _load(spike_gradients, step, spike_gradients_stride, places, inside)
        passed = tl.where(h >= threshold, 0.0, gradient) if HARD else gradient
        of_charged = through_spike * _slope(h - threshold, alpha, SURROGATE) + passed
        _store(current_gradients, step, current_gradients_stride, places, inside, of_charged * current_slope)
        gradient = of_charged * membrane_slope
    if initial_state_gradient is not None:
        tl.store(initial_state_gradient + places, gradient, mask=inside)
