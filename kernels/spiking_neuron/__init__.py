"""Spiking neurons: each adds up its current over time, fires where its membrane reaches the threshold, and is reset.

Mathematics. Per neuron, for t = 0 .. T - 1, with current x, threshold theta, membranes h (charged) and v (reset), rest
r (the reset value of a hard reset, 0 under a soft one), and v = r or the given state at first:

    h[t] = v[t-1] + x[t]                                     integrate and fire (tau None)
    h[t] = v[t-1] + (x[t] - (v[t-1] - r)) / tau              leaky, the input decays too
    h[t] = v[t-1] - (v[t-1] - r) / tau + x[t]                leaky, the input does not
    s[t] = 1 if h[t] >= theta else 0
    v[t] = (1 - s[t]) h[t] + s[t] r                          hard reset
    v[t] = h[t] - s[t] theta                                 soft reset

Gradients. The step's derivative by u = h - theta is replaced by that of a surrogate:

    atan:         sigma'(u) = (alpha / 2) / (1 + (pi / 2 alpha u)^2)
    sigmoid:      sigma'(u) = alpha f (1 - f),  f = 1 / (1 + exp(-alpha u))
    rectangular:  sigma'(u) = 1 / alpha if |u| < alpha / 2 else 0

Given gs, the gradient of the spikes, and gv, that of the last membrane, then for t = T - 1 .. 0

    gh = (gs[t] + gv (r - h[t])) sigma'(u[t]) + gv (1 - s[t])       hard reset
    gh = (gs[t] - gv theta) sigma'(u[t]) + gv                       soft reset
    gx[t] = gh dh/dx      gv <- gh dh/dv

where the products of gv and sigma' are left out if the reset is detached; dh/dx is 1 or 1 / tau and dh/dv 1 or
1 - 1 / tau. The last gv is the gradient of the initial state. Nothing but the current and the initial state is kept:
backward computes h again, a block of neurons at a time, in the order of forward and so to the same bits. The gradients
of what is infinite are not defined. Those of gradients only the `reference` backend has; the others raise.

Sources: Spiking Diffusion Models, arXiv 2408.16467, whose code has integrate and fire, hard reset, atan with alpha 2;
surrogate gradients, arXiv 1901.09948.

Files: `reference.py` is the definition, step by step; `closed_form.py` is the `torch` backend; `native.cpp` is the CPU
kernel and `triton.py` the GPU kernel; `layout.py` is how both see a tensor; `operators.py` registers them with PyTorch.
"""

import torch
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.precision import common_dtype
from kernels.spiking_neuron import closed_form, operators, reference
from kernels.spiking_neuron.arguments import Settings, check_arguments

__all__ = ["spiking_neuron"]


def spiking_neuron(
    current: Tensor,
    *,
    threshold: float = 1.0,
    tau: float | None = None,
    decay_input: bool = True,
    reset: str = "hard",
    reset_value: float = 0.0,
    surrogate: str = "atan",
    alpha: float = 2.0,
    detach_reset: bool = False,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Spikes of neurons over all time steps of their current. Calls share nothing but the state that is passed.

    Args:
        current: (T, ...), any strides.
        threshold: where a neuron fires; equality does.
        tau: time constant of the leak, 1 (no memory) at least; None for none.
        decay_input: leaky neurons only: whether the current is divided by tau too.
        reset: "hard" (to `reset_value`) or "soft" (by the threshold).
        reset_value: hard reset only: also where the membrane starts and what it leaks to.
        surrogate: "atan", "sigmoid" or "rectangular".
        alpha: its sharpness (of "rectangular" the width).
        detach_reset: let no gradient pass through the spike that resets.
        initial_state: (...), the membrane before the first step.
        return_state: whether to return the membrane after the last step, too.
        backend: one of `kernels.backend.BACKENDS`; chosen by device if None.

    Returns:
        Spikes (T, ...), zeros and ones in the dtype of `current`; their neurons lie in memory in its order, time first.
        With `return_state` also the membrane (...) after the last step, in the dtype of the arithmetic: the widest
        among the inputs', float32 at least.

    Raises:
        ValueError: shapes, devices, dtypes or options do not fit.
        RuntimeError: the named backend cannot run here.
    """
    settings = Settings(threshold, tau, decay_input, reset, reset_value, surrogate, alpha, detach_reset)
    check_arguments(current, initial_state, settings)
    inputs = (current,) if initial_state is None else (current, initial_state)
    wide = any(tensor.dtype == torch.float64 for tensor in inputs)
    refusal = "the triton kernels take float32, bfloat16 and float16, and an input is float64" if wide else None
    backend = resolve_backend("spiking_neuron", current.device, backend, refusals={"triton": refusal})
    if backend in ("native", "triton") and len(current):
        arguments = (*settings.as_arguments(), return_state, backend)
        spikes, state = operators.spiking_neuron(current, initial_state, *arguments)
    else:
        widened, *given = common_dtype(*inputs)
        state = given[0] if given else torch.full_like(widened[:1].sum(0), settings.rest)
        form = reference if backend == "reference" else closed_form
        spikes, state = form.spiking_neuron(widened, state, settings)
        spikes = spikes.to(current.dtype)
    return (spikes, state) if return_state else spikes
