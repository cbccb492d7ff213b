"""`python -m generation benchmark lina`: LINA beside an eager form of the official arithmetic and beside softmax.

Nothing is timed before our modules and the sampler give the numbers of the eager ones, of the same weights. Rivals run
in turn in one process; ratios are medians over rounds. With one thread times are of the processor, because the machine
may be busy with other things; with more, of the wall. Launches are counted by the rule of
tests/benchmarks/operation_counter.py, where our operators count as many as they are kernels on a GPU: linear attention
four (accumulation, two sums of its ranges, read-out), the convolution what its plain operations are. Everything is also
written as JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from generation.lina.benchmark_counts import attention_gmacs, count_block, count_bytes, count_diffusion
from generation.lina.benchmark_rivals import SamplingCase, attention_pair, projections, softmax_attention
from generation.lina.sampling_settings import SamplingSettings
from kernels.interleaved_timing import Timing, machine, print_table, ratio, time_interleaved
from kernels.peak_memory import peak_memory_added

SECTIONS = ("attention", "launches", "bytes", "flops", "memory", "sampling", "parts", "softmax")
ATTENTION = ((768, 12, 32), (768, 12, 64), (384, 6, 64))  # width, heads, side of the image in tokens
SMALL = {"width": 384, "heads": 6, "depth": 4, "denoiser_depth": 6, "text_dim": 2560}
SETTINGS = SamplingSettings(num_inference_steps=64, num_diffusion_steps=25, guidance_scale=5.0)
FEWER = SamplingSettings(num_inference_steps=16, num_diffusion_steps=10, guidance_scale=5.0)
MEMORY = (768, 12, 64)
FORMS = ("ours", "eager", "softmax")


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual - wanted).abs().max() / wanted.abs().max()).item()


def check_attention(width: int = 128, heads: int = 2, side: int = 8) -> None:
    """Exit unless our decoder attention gives the values and gradients of the eager one."""
    eager, ours = attention_pair(width, heads, side)
    x = torch.randn(2, side * side * 5 // 4, width, requires_grad=True)
    grad = torch.randn(x.shape)
    wanted, actual = eager(x), ours(x, (side, side))
    with torch.no_grad():
        pairs = {"values without gradients": (ours(x, (side, side)), wanted), "values": (actual, wanted)}
    names = ("qkv.weight", "proj.weight", "dw_conv.weight", "dw_conv.bias")
    gradients = [
        torch.autograd.grad(y, [x, *(dict(module.named_parameters())[name] for name in names)], grad)
        for y, module in ((actual, ours), (wanted, eager))
    ]
    pairs |= dict(zip(("gradient of x", *names), zip(*gradients, strict=True), strict=True))
    for name, pair in pairs.items():
        if not (error := relative_error(*pair)) < 2e-5:
            raise SystemExit(f"decoder attention is wrong: {name}, relative error {error:.1e}; nothing was timed")


def check_sampling(case: SamplingCase, settings: SamplingSettings) -> float:
    """The largest difference of latents from the eager ones; exit unless it is small."""
    wanted, actual = case.sample_eager(settings), case.sample(settings)
    difference = (actual - wanted).abs().max().item()
    if not difference < 1e-4:
        raise SystemExit(f"sampling is wrong: latents differ by {difference:.1e}; nothing was timed")
    return difference


def clock(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


def measure_attention(threads: int, seconds: float) -> list[dict]:
    rows = []
    for width, heads, side in ATTENTION:
        tokens = side * side * 5 // 4
        eager, ours = attention_pair(width, heads, side)
        softmax, x, mixed = softmax_attention(width, heads), *torch.randn(2, 1, tokens, width)
        functions = {
            "ours": partial(ours, x, (side, side)),
            "projections": partial(projections, ours, x, mixed),
            "eager": partial(eager, x),
            "softmax": partial(softmax, x),
        }
        with torch.inference_mode():
            timings = time_interleaved(functions, seconds=seconds, clock=clock(threads))
        rows.append(
            {
                "width": width,
                "tokens": tokens,
                "ours_ms": 1e3 * timings["ours"].median,
                "over its projections": ratio(timings["ours"], timings["projections"]),
                "faster than eager": ratio(timings["eager"], timings["ours"]),
                "faster than softmax": ratio(timings["softmax"], timings["ours"]),
            }
        )
    return rows


def measure_launches() -> list[dict]:
    rows = [{"of": "decoder block, batch 2", **count_block()}]
    return [*rows, {"of": "diffusion step, guided", **count_diffusion(), "ours, on CPU": "", "softmax": ""}]


def measure_bytes() -> list[dict]:
    rows = []
    for width, heads in ((1536, 16), (768, 12)):
        sizes = count_bytes(width, heads)
        rows.append({"width": width, **{f"{name}, MB": size for name, size in sizes.items()}})
        rows[-1]["eager over ours"] = sizes["eager"] / sizes["ours"]
    return rows


def measure_flops() -> list[dict]:
    rows = []
    for pixels, side in ((256, 16), (512, 32), (1024, 64)):
        counts = attention_gmacs(1536, 16, side)
        saved = 100 * (1 - counts["linear"] / counts["softmax"])
        rows.append({"pixels": pixels, "tokens": side * side * 5 // 4, **counts, "saved, percent": saved})
    return rows


def training_memory(form: str, threads: int) -> int:
    """Bytes that forward and backward of a decoder attention module add, at most, to this process."""
    torch.set_num_threads(threads)
    width, heads, side = MEMORY

    def run(width: int, heads: int, side: int) -> Callable[[], None]:
        eager, ours = attention_pair(width, heads, side)
        modules: dict[str, Callable[..., Any]] = {
            "ours": partial(ours, grid=(side, side)),
            "eager": eager,
            "softmax": softmax_attention(width, heads),
        }
        x = torch.randn(1, side * side * 5 // 4, width, requires_grad=True)
        grad = torch.randn(x.shape)
        return lambda: modules[form](x).backward(grad)

    run(64, 2, 8)()  # what libraries allocate but once
    return peak_memory_added(run(width, heads, side))


def measure_memory(threads: int) -> list[dict]:
    """Each peak in a process of its own, since a process's peak never falls."""
    peaks = {}
    for form in FORMS:
        command = [sys.executable, "-m", "generation", "benchmark", "lina", "--peak-memory-of", form]
        done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=True)
        peaks[form] = int(done.stdout.split()[-1])
    width, _, side = MEMORY
    return [
        {
            "form": f,
            "width": width,
            "tokens": side * side * 5 // 4,
            "peak_mib": p / 2**20,
            "ours over it": peaks["ours"] / p,
        }
        for f, p in peaks.items()
    ]


def time_images(samplers: dict[str, tuple[Callable[..., Any], SamplingSettings]], threads: int) -> dict[str, Timing]:
    """Two rounds of whole images. Each sampler first draws one in two single steps (the second knows tokens), because
    what a first call costs would weigh in the mean of two."""
    for sample, settings in samplers.values():
        sample(replace(settings, num_inference_steps=2, num_diffusion_steps=1))
    functions = {name: partial(sample, settings) for name, (sample, settings) in samplers.items()}
    return time_interleaved(functions, rounds=(2, 2), clock=clock(threads))


def measure_sampling(case: SamplingCase, threads: int) -> list[dict]:
    """A whole image: with the official settings, with those of `fast=True`, and with sums kept over four steps too."""
    fast = SETTINGS.faster()
    kept = replace(fast, refresh_every=4)
    samplers = {
        "eager": (case.sample_eager, SETTINGS),
        "ours": (case.sample, SETTINGS),
        "ours, fast": (case.sample, fast),
        "ours, fast, sums kept": (case.sample, kept),
    }
    timings = time_images(samplers, threads)
    return [
        {
            "sampler": name,
            "steps": settings.num_inference_steps,
            "diffusion": settings.num_diffusion_steps,
            "seconds": timings[name].median,
            "faster than eager": ratio(timings["eager"], timings[name]),
        }
        for name, (_, settings) in samplers.items()
    ]


class Stopwatch:
    """Time spent in modules, by the name of their part, and in all."""

    def __init__(self, now: Callable[[], float]):
        self.now, self.spent, self.started = now, Counter(), {}
        self.handles: list[Any] = []

    def start(self, part: str) -> None:
        self.started[part] = self.now()

    def stop(self, part: str) -> None:
        if part in self.started:
            self.spent[part] += self.now() - self.started.pop(part)

    def watch(self, module: nn.Module, part: str) -> None:
        self.handles.append(module.register_forward_pre_hook(lambda *_: self.start(part)))
        self.handles.append(module.register_forward_hook(lambda *_: self.stop(part)))

    def finish(self) -> None:
        for handle in self.handles:
            handle.remove()


def measure_parts(case: SamplingCase, threads: int, settings: SamplingSettings = SETTINGS) -> list[dict]:
    """Where the time of one image goes, in both forms."""
    watches = {"eager": Stopwatch(clock(threads)), "ours": Stopwatch(clock(threads))}
    for name, model in (("eager", case.eager), ("ours", case.ours)):
        watch = watches[name]
        watch.watch(model.video_encoder, "context")
        for i, block in enumerate(model.image_encoder.blocks):
            watch.watch(block, "encoder half" if i < SMALL["depth"] else "decoder half")
    eager, ours = watches["eager"], watches["ours"]
    # The eager loop is watched as a whole; ours begins with the projection of the conditions and ends with the step.
    denoise = case.eager.denoise

    def watched_denoise(*arguments: Any) -> torch.Tensor:
        eager.start("denoiser")
        result = denoise(*arguments)
        eager.stop("denoiser")
        return result

    case.eager.denoise = watched_denoise
    projection = case.ours.image_decoder.time_cond_embed.condition_proj
    ours.handles.append(projection.register_forward_pre_hook(lambda *_: ours.start("denoiser")))
    for watch, sample in (
        (eager, partial(case.sample_eager, settings)),
        (ours, partial(case.sample, settings, after_step=lambda: ours.stop("denoiser"))),
    ):
        watch.start("all")
        sample()
        watch.stop("all")
        watch.finish()
        watch.spent["rest"] = 2 * watch.spent["all"] - watch.spent.total()
    case.eager.denoise = denoise
    return [
        {
            "part": part,
            "eager, seconds": eager.spent[part],
            "ours, seconds": ours.spent[part],
            "ours, percent": 100 * ours.spent[part] / ours.spent["all"],
            "times faster": eager.spent[part] / max(ours.spent[part], 1e-9),
        }
        for part in ("context", "encoder half", "decoder half", "denoiser", "rest", "all")
    ]


def measure_softmax(threads: int) -> list[dict]:
    """An image of 1,024 tokens, linear beside softmax; with few steps, since full ones take minutes on a CPU."""
    case = SamplingCase(32, **SMALL)
    twin = case.softmax_twin()
    samplers = {"linear": (case.sample, FEWER), "softmax": (partial(case.sample, model=twin), FEWER)}
    timings = time_images(samplers, threads)
    return [
        {
            "model": name,
            "tokens": 1024,
            "steps": FEWER.num_inference_steps,
            "diffusion": FEWER.num_diffusion_steps,
            "seconds": timings[name].median,
            "softmax over it": ratio(timings["softmax"], timings[name]),
        }
        for name in samplers
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m generation benchmark lina",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to run")
    parser.add_argument("--threads", type=int, default=1, help="threads")
    parser.add_argument("--seconds", type=float, default=15.0, help="about how long the rounds of an attention take")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/lina.json"), help="JSON file")
    parser.add_argument("--peak-memory-of", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.peak_memory_of:
        print(training_memory(options.peak_memory_of, options.threads))
        return

    threads = options.threads
    torch.set_num_threads(threads)
    check_attention()
    case = SamplingCase(16, **SMALL)
    difference = check_sampling(case, replace(SETTINGS, num_inference_steps=4))
    print(f"correct: latents of the eager sampler and ours differ by {difference:.1e} at most; {threads} thread(s)")
    sections: dict[str, tuple[str, Callable[[], list[dict]]]] = {
        "attention": ("Decoder attention, float32, batch 1", lambda: measure_attention(threads, options.seconds)),
        "launches": ("Launches, bfloat16, C = 1536", measure_launches),
        "bytes": ("Memory traffic of a decoder attention, bfloat16, batch 1, 1,280 tokens", measure_bytes),
        "flops": ("GMACs of an attention module, C = 1536", measure_flops),
        "memory": ("Peak memory of attention, forward and backward, float32", lambda: measure_memory(threads)),
        "sampling": ("An image of 256 tokens, guided, float32", lambda: measure_sampling(case, threads)),
        "parts": ("What bounds it", lambda: measure_parts(case, threads)),
        "softmax": ("An image of 1,024 tokens, guided, float32", lambda: measure_softmax(threads)),
    }
    report = {}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for section in options.only:
        title, measure = sections[section]
        report[section] = rows = measure()
        print_table(title, tuple(rows[0]), [tuple(row.values()) for row in rows])
        sys.stdout.flush()
        options.output.write_text(json.dumps({"machine": machine(), "threads": threads, **report}, indent=1))
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
