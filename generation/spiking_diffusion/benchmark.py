"""`python -m generation benchmark spiking`: spiking neurons beside the usual PyTorch loop, and their share of training.

The loop goes through the time steps one by one and leaves its gradient to autograd, with one function for the spike:
what libraries of spiking networks do in plain PyTorch. Nothing is timed before spikes agree to the bit and gradients to
1e-5. Rivals run in turn in one process; ratios are medians over rounds. The floor is the time in which the same bytes
are copied: 8 for each neuron and step forward, 8 more backward (the kernels read the current there, too). Memory is
the allocator's as it comes, which gives much of it back to the system and pays for it in page faults, and then kept, as
`python -m generation fit` has it.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from generation.argument_checks import check_numbers
from generation.spiking_diffusion.energy import EnergyMeter
from generation.spiking_diffusion.unet import SpikingUNet2DModel
from kernels.interleaved_timing import machine, print_table, ratio, time_interleaved
from kernels.native.memory import keep_freed_memory
from kernels.spiking_neuron import spiking_neuron
from training_runs.atomic_files import prepare_output, write_json

SHAPES = ((4, 64, 64, 16, 16), (4, 64, 32, 8, 8))
SMALL = {"sample_size": 8, "in_channels": 1, "channels": 16, "channel_multipliers": (1, 2), "layers_per_block": 1}
BATCH, PROFILED_STEPS = 64, 10


class LoopSpike(torch.autograd.Function):
    """1 where the membrane is at or above the threshold; the derivative of an arcus tangens for a gradient."""

    @staticmethod
    def forward(context, above: Tensor) -> Tensor:
        context.save_for_backward(above)
        return (above >= 0).to(above.dtype)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        (above,) = context.saved_tensors
        return gradient / (1 + (math.pi * above) ** 2)


def loop(current: Tensor) -> Tensor:
    """Integrate and fire with hard reset, threshold 1, step by step."""
    membrane, spikes = torch.zeros_like(current[0]), []
    for step in current:
        membrane = membrane + step
        spike = LoopSpike.apply(membrane - 1.0)
        membrane = (1 - spike) * membrane
        spikes.append(spike)
    return torch.stack(spikes)


def check(shape: tuple[int, ...]) -> None:
    """Exit unless ours gives the loop's spikes and gradients."""
    current, gradient = torch.randn(shape, requires_grad=True), torch.randn(shape)
    wanted, actual = loop(current), spiking_neuron(current)
    slopes = [torch.autograd.grad(spikes, current, gradient)[0] for spikes in (wanted, actual)]
    if not torch.equal(wanted, actual) or not torch.allclose(*slopes, rtol=1e-5, atol=1e-5):
        sys.exit("spikes or gradients are not those of the loop")


def both(neuron: Callable[[Tensor], Tensor], current: Tensor, gradient: Tensor) -> None:
    torch.autograd.grad(neuron(current), current, gradient)


def copy(tensor: Tensor, targets: Sequence[Tensor]) -> None:
    for target in targets:
        target.copy_(tensor)


def measure_neurons(seconds: float, clock: Callable[[], float]) -> list[dict]:
    rows = []
    for shape in SHAPES:
        current, gradient = torch.randn(shape, requires_grad=True), torch.randn(shape)
        values = current.detach()
        targets = [torch.empty(shape), torch.empty(shape)]  # a copied number is 8 bytes
        forward = {
            "ours": partial(spiking_neuron, values),
            "loop": partial(loop, values),
            "floor": partial(copy, values, targets[:1]),
        }
        training = {
            "ours": partial(both, spiking_neuron, current, gradient),
            "loop": partial(both, loop, current, gradient),
            "floor": partial(copy, values, targets),
        }
        for name, rivals in (("forward", forward), ("forward and backward", training)):
            timings = time_interleaved(rivals, seconds=seconds, clock=clock)
            rows.append(
                {
                    "shape": "x".join(map(str, shape)),
                    "of": name,
                    "ours_ms": 1e3 * timings["ours"].median,
                    "loop_ms": 1e3 * timings["loop"].median,
                    "faster than the loop": ratio(timings["loop"], timings["ours"]),
                    "over the floor": ratio(timings["ours"], timings["floor"]),
                }
            )
    return rows


def measure_training(seconds: float, clock: Callable[[], float]) -> list[dict]:
    """A training step of the small network: who takes its time, and its artificial twin's."""
    steps = {}
    for name, options in {"spiking, T = 4": {}, "ANN twin": {"neuron": "silu", "snn_timesteps": 1}}.items():
        unet = SpikingUNet2DModel(**SMALL, **options).train().to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
        sample, timestep = torch.randn(BATCH, 1, 8, 8), torch.randint(1000, (BATCH,))

        def step(unet=unet, optimizer=optimizer, sample=sample, timestep=timestep) -> None:
            optimizer.zero_grad()
            (unet(sample, timestep).sample - sample).square().mean().backward()
            optimizer.step()

        steps[name] = step
    timings = time_interleaved(steps, seconds=seconds, clock=clock)
    rows = []
    for name, step in steps.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(PROFILED_STEPS):
                step()
        events = profile.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        neurons = sum(event.self_cpu_time_total for event in events if "spiking_neuron" in event.key)
        row = {"network": name, "step_ms": 1e3 * timings[name].median, "percent in neurons": 100 * neurons / total}
        rows.append(row)
    return rows


def measure_stem() -> list[dict]:
    """How often layers run in one call of the network."""
    unet = SpikingUNet2DModel(**SMALL).eval()
    with torch.no_grad(), EnergyMeter(unet) as meter:
        unet(torch.randn(1, 1, 8, 8), 0)
    return [{"layer": layer.name, "runs": layer.runs} for layer in meter.report().layers if "stem" in layer.name]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m generation benchmark spiking",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=2, help="threads (default: %(default)s)")
    seconds = "about how long the rounds of a row take (default: %(default)s)"
    parser.add_argument("--seconds", type=float, default=5.0, help=seconds)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/spiking.json"), help="JSON file")
    options = parser.parse_args(arguments)
    check_numbers(parser, options, {"threads": (1, 4096), "seconds": (0, 1e6)})
    prepare_output("--output", options.output)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    # The machine may be busy with other things: one thread is timed by the processor's clock.
    clock = time.process_time if options.threads == 1 else time.perf_counter
    for shape in SHAPES:
        check(shape)
    print(f"correct: spikes are the loop's to the bit; {options.threads} thread(s)")
    report = {"machine": machine(), "threads": options.threads}
    title = "Integrate-and-fire neurons, float32"
    sections = {
        "neurons": (title, lambda: measure_neurons(options.seconds, clock)),
        "neurons, memory kept": (f"{title}, freed memory kept", lambda: measure_neurons(options.seconds, clock)),
        "training": (f"A training step, batch {BATCH}, float32", lambda: measure_training(options.seconds, clock)),
        "stem": ("How often the stem's convolution runs for T = 4", measure_stem),
    }
    for name, (title, measure) in sections.items():
        if name == "neurons, memory kept":
            keep_freed_memory()  # as `fit` does, for good
        report[name] = rows = measure()
        print_table(title, tuple(rows[0]), [tuple(row.values()) for row in rows])
        sys.stdout.flush()
    write_json(options.output, report)
    print(f"\nwritten to {options.output}")
