"""Timing of rival functions on a machine that is never quiet: in turn, in one process, medians and their ratios."""

import gc
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

import kernels


@dataclass
class Timing:
    """Seconds of every round of one function."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def row(self) -> dict[str, float]:
        milliseconds = [1e3 * s for s in self.seconds]
        return {"median_ms": median(milliseconds), "min_ms": min(milliseconds), "max_ms": max(milliseconds)}


def time_interleaved(
    functions: dict[str, Callable[[], object]],
    *,
    seconds: float = 3.0,
    rounds: tuple[int, int] = (5, 200),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Run every function once a round, A B C A B C ..., and return the times of each.

    Args:
        functions: what to time, by name; each is called twice beforehand to warm up, unless there is no choice of
            rounds.
        seconds: about how long all rounds together may take.
        rounds: fewest and most rounds.
        clock: wall time, or `time.process_time`, which on a busy machine is the fairer one for a single thread.
    """
    count = rounds[0]
    if rounds[0] < rounds[1]:
        for function in functions.values():
            function()
        started = time.perf_counter()
        for function in functions.values():
            function()
        one_round = time.perf_counter() - started
        count = min(max(int(seconds / max(one_round, 1e-6)), rounds[0]), rounds[1])
    timings: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    for _ in range(count):
        for name, function in functions.items():
            started = clock()
            function()
            timings[name].append(clock() - started)
    return {name: Timing(measured) for name, measured in timings.items()}


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times longer `slow` takes: the median over rounds of the two neighbouring runs' ratio."""
    return median(s / f for s, f in zip(slow.seconds, fast.seconds, strict=True))


def machine() -> dict[str, str | int]:
    """What a reader must know beside a time."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "suite": kernels.__version__,
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "waiting threads": os.environ.get("OMP_WAIT_POLICY", "OpenMP's default"),
        "cores": torch.multiprocessing.cpu_count(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def print_table(title: str, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Print rows in aligned columns under a title; floats with three significant digits."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}")
    for index, row in enumerate(cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if index == 0:
            print("  ".join("-" * width for width in widths))
