"""`python -m kernels.benchmark`: the gated scan's backends beside each other and beside softmax attention, on CPU.

Nothing is timed before the backends agree. Rivals run in turn in one process; one thread and several are reported
apart. The table is also written as JSON.
"""

import argparse
import json
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning barriers falsify times where anything else runs

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import bidirectional_gated_scan
from kernels.interleaved_timing import machine, print_table, ratio, time_interleaved

SHAPES = {"B8 H3 N196 K32 V64": (8, 3, 196, 32, 64), "B1 H3 N4096 K32 V64": (1, 3, 4096, 32, 64)}
HIERARCHICAL = {"B8 H3 N3136 K16 V32": (8, 3, 3136, 16, 32)}


def make_inputs(batch: int, heads: int, tokens: int, key_dim: int, value_dim: int) -> list[Tensor]:
    query, key = (torch.randn(batch, tokens, heads, key_dim) for _ in range(2))
    decays = [F.logsigmoid(torch.randn(batch, tokens, heads, key_dim)) / 16 for _ in range(2)]
    return [query, key, torch.randn(batch, tokens, heads, value_dim), *decays]


def check_backends(threads: tuple[int, ...]) -> None:
    """Exit unless every CPU backend matches the float64 definition, outputs and gradients, at every thread count.

    The shapes are those that are timed, with fewer tokens where heads are few, so that work is divided alike.
    """
    names = ("output", "query", "key", "value", "forward decay", "backward decay")

    def results(inputs: list[Tensor], grad: Tensor, backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        output = bidirectional_gated_scan(*leaves, backend=backend)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))]

    for batch, heads, tokens, key_dim, value_dim in ((8, 3, 196, 32, 64), (1, 3, 530, 32, 64), (8, 3, 130, 16, 32)):
        inputs = make_inputs(batch, heads, tokens, key_dim, value_dim)
        grad = torch.randn_like(inputs[2])
        exact = results(inputs, grad, "reference", torch.float64)
        for backend, count in product(("native", "torch"), threads):
            torch.set_num_threads(count)
            for name, actual, expected in zip(names, results(inputs, grad, backend, torch.float32), exact, strict=True):
                error = ((actual - expected).abs().max() / expected.abs().max()).item()
                if not error < (2e-6 if name == "output" else 1e-5):
                    raise SystemExit(f"backend {backend} is wrong ({name}: error {error:.1e}); nothing was timed")


def forward(inputs: list[Tensor], backend: str) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            bidirectional_gated_scan(*inputs, backend=backend)

    return run


def forward_and_backward(inputs: list[Tensor], backend: str) -> Callable[[], object]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    grad = torch.randn_like(inputs[2])
    return lambda: torch.autograd.grad(bidirectional_gated_scan(*leaves, backend=backend), leaves, grad)


def softmax_attention(inputs: list[Tensor]) -> Callable[[], object]:
    """SDPA with queries, keys and values all as wide as the scan's values."""
    query, key, value = (torch.randn_like(inputs[2]).transpose(1, 2) for _ in range(3))

    def run() -> None:
        with torch.no_grad():
            F.scaled_dot_product_attention(query, key, value)

    return run


def measure(threads: tuple[int, ...], seconds: float) -> list[dict]:
    rows = []
    for shape_name, shape in (SHAPES | HIERARCHICAL).items():
        inputs = make_inputs(*shape)
        cases = {"forward": {"native": forward(inputs, "native"), "torch": forward(inputs, "torch")}}
        if shape_name in SHAPES:
            cases["forward"] |= {"recurrence": forward(inputs, "reference"), "SDPA": softmax_attention(inputs)}
        cases["forward+backward"] = {backend: forward_and_backward(inputs, backend) for backend in ("native", "torch")}
        for case, rivals in cases.items():
            # The same functions at every thread count, so that thread scaling is interleaved too.
            functions = {}
            for count in threads:
                for rival, function in rivals.items():
                    functions[rival, count] = _with_threads(count, function)
            timings = time_interleaved(functions, seconds=seconds)
            for (rival, count), timing in timings.items():
                row = {"shape": shape_name, "case": case, "backend": rival, "threads": count, **timing.row()}
                row["times native"] = ratio(timing, timings["native", count])
                row["scaling"] = ratio(timings[rival, threads[0]], timing)
                rows.append(row)
    return rows


def _with_threads(count: int, function: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        torch.set_num_threads(count)
        function()

    return run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.benchmark", description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts, the first is the base")
    parser.add_argument("--seconds", type=float, default=6.0, help="about how long one group of rivals is timed")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/kernels.json"), help="JSON file")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    check_backends(tuple(options.threads))
    rows = measure(tuple(options.threads), options.seconds)
    columns = ("shape", "case", "backend", "threads", "median_ms", "min_ms", "max_ms", "times native", "scaling")
    print_table(
        "Bidirectional gated scan on CPU, float32 (times native: how much longer; scaling: gain by threads)",
        columns,
        [tuple(row[column] for column in columns) for row in rows],
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
