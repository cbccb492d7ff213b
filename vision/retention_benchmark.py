"""Speed of windowed retention: the operation beside its PyTorch form, the models beside Swin, per FLOP."""

from collections.abc import Callable

import timm
import torch
from torch import Tensor

from kernels.interleaved_timing import ratio, time_interleaved
from kernels.window_retention import window_retention
from vision.flops import count_macs
from vision.retention_layers import manhattan_log_decays

# Maps of the first two stages at 224 pixels, in the head widths that the published sizes have there.
CORE_SHAPES = {"56x56, 6x16": (56, 6, 16), "56x56, 3x32": (56, 3, 32), "28x28, 6x32": (28, 6, 32)}
CORE_BATCH = 8
FORMS = {"softmax": {}, "sigmoid": {"activation": "sigmoid"}}
RETENTION, SWAT = "gated_swin_rmt_tiny_retention", "gated_swin_rmt_tiny_swat"
BASELINES = ("swin_tiny_patch4_window7_224", "rmt_tiny")


def core_runs(side: int, heads: int, head_dim: int, form: str) -> dict[str, Callable[[], object]]:
    """Forward and backward of one shifted block's retention: `native`, and `swin` (roll, partition, two products a
    pass, merge: the `reference` backend, whose masks and rotations are kept between calls as the kernel's are)."""
    inputs = [torch.randn(CORE_BATCH, side, side, heads, head_dim, requires_grad=True) for _ in range(3)]
    grad = torch.randn(CORE_BATCH, side, side, heads, head_dim)
    settings = {"window": (7, 7), "shift": (3, 3), **FORMS[form]}
    decays = manhattan_log_decays(heads, 2, 6)

    def run(backend: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(window_retention(*inputs, decays, **settings, backend=backend), inputs, grad)

    return {"native": lambda: run("native"), "swin": lambda: run("reference")}


def check_core() -> None:
    """Exit unless native and reference gradients are those of the float64 definition at a benchmarked shape."""
    for form, options in FORMS.items():
        settings = {"window": (7, 7), "shift": (3, 3), **options}
        inputs = [torch.randn(1, 28, 28, 6, 32, requires_grad=True) for _ in range(3)]
        grad, decays = torch.randn(1, 28, 28, 6, 32), manhattan_log_decays(6, 2, 6)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        expected = window_retention(*wide, decays, **settings, backend="reference")
        exact = [expected, *torch.autograd.grad(expected, wide, grad.double())]
        for backend in ("native", "reference"):
            output = window_retention(*inputs, decays, **settings, backend=backend)
            for actual, target in zip([output, *torch.autograd.grad(output, inputs, grad)], exact, strict=True):
                error = ((actual - target).abs().max() / target.abs().max()).item()
                if not error < 2e-5:
                    raise SystemExit(f"{form} retention on {backend} is wrong (error {error:.1e}); nothing was timed")


def measure_core(threads: int, seconds: float) -> list[dict]:
    check_core()
    torch.set_num_threads(threads)
    rows = []
    for shape, sizes in CORE_SHAPES.items():
        for form in FORMS:
            timings = time_interleaved(core_runs(*sizes, form), seconds=seconds / 2)
            rows.append(
                {
                    "map, heads": shape,
                    "scores": form,
                    "threads": threads,
                    "native_ms": 1e3 * timings["native"].median,
                    "swin_ms": 1e3 * timings["swin"].median,
                    "times faster than swin": ratio(timings["swin"], timings["native"]),
                }
            )
    return rows


def measure_models(make: Callable[[str], Callable[[], object]], batch: int, threads: int, seconds: float) -> list[dict]:
    """Rivals in turn; `make` gives the function that runs one batch of images of 224 pixels through a model."""
    torch.set_num_threads(threads)
    names = (RETENTION, SWAT, *BASELINES)
    timings = time_interleaved({name: make(name) for name in names}, seconds=seconds)
    gmacs = {name: count_macs(timm.create_model(name, device="meta"), (3, 224, 224)).total / 1e9 for name in names}
    return [
        {
            "model": name,
            "threads": threads,
            "GMACs": gmacs[name],
            "images/s": batch / timings[name].median,
            "GMACs/s": batch * gmacs[name] / timings[name].median,
            # Swin's time for as many operations, over this model's
            "per FLOP, of Swin's rate": ratio(timings[BASELINES[0]], timings[name]) * gmacs[name] / gmacs[BASELINES[0]],
            "time, of Retention's": ratio(timings[name], timings[RETENTION]),
        }
        for name in names
    ]
