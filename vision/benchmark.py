"""`python -m vision benchmark`: speed and memory on CPU, ViG beside timm's DeiT and Gated-SwinRMT beside timm's Swin.

Nothing is timed before the optimised models agree with the definition. Rivals run in turn in one process and the ratio
is the median over rounds, because times on a shared machine mean little; thread counts are reported apart. For
inference the suite's models run fused (`model.fuse()`), timm's as timm builds them (fused attention). Everything is
also written as JSON.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from kernels.backend import use_backend
from kernels.interleaved_timing import Timing, machine, print_table, ratio, time_interleaved
from kernels.peak_memory import peak_memory_added
from vision.flops import count_macs
from vision.retention_benchmark import RETENTION, SWAT, measure_core, measure_models

SECTIONS = (
    *("models", "inference", "training", "precision", "memory", "profile"),
    *("retention-core", "retention-inference", "retention-training"),
)
VIG, DEIT = "vig_tiny_patch16_224", "deit_tiny_patch16_224"
# (ours, rival, image size, batch)
INFERENCE = (
    (VIG, DEIT, 224, 4),
    (VIG, DEIT, 512, 1),
    (VIG, DEIT, 1024, 1),
    (VIG, DEIT, 2048, 1),
    ("vig_small_patch16_224", "deit_base_patch16_224", 224, 4),
)
TRAINING = ((VIG, DEIT, 224, 4), (VIG, DEIT, 1024, 1))
MEMORY_SIZE = 1024
GIGA = 1e9


def build(name: str, image_size: int, *, training: bool = False) -> nn.Module:
    model = timm.create_model(name, img_size=image_size)
    if training:
        return model.train()
    return model.eval().fuse() if hasattr(model, "fuse") else model.eval()


def check_correctness() -> None:
    """Exit unless the native kernels give the definition's logits and gradients, fused and in training."""
    for name, arguments in (
        (VIG, {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2}),
        ("vig_h_tiny", {"dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 4)}),
        *(
            (name, {"embed_dims": (16, 32, 64, 64), "num_heads": (1, 2, 2, 2)})
            for name in (RETENTION, SWAT, "rmt_tiny")
        ),
    ):
        model = timm.create_model(name, drop_path_rate=0.0, **arguments).eval()
        images = torch.randn(2, 3, 512, 528)  # large enough for the values that training computes again
        parameters = list(model.double().parameters())
        with use_backend("torch"):
            expected = model(images.double())
            exact = torch.autograd.grad(expected.sum(), parameters)
        trained = model.float()(images)
        gradients = torch.autograd.grad(trained.sum(), list(model.parameters()))
        with torch.no_grad():
            pairs = [(model.eval().fuse()(images), expected), (trained, expected), *zip(gradients, exact, strict=True)]
        for i, (actual, wanted) in enumerate(pairs):
            error = ((actual - wanted).abs().max() / wanted.abs().max()).item()
            if not error < (2e-5 if i < 2 else 2e-3):  # gradients of float32 norms of near-zero scans lose digits
                raise SystemExit(f"{name} is wrong (relative error {error:.1e}); nothing was timed")


def inference(model: nn.Module, images: Tensor, threads: int, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    def run() -> None:
        torch.set_num_threads(threads)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(images)

    return run


def training_step(model: nn.Module, images: Tensor, threads: int) -> Callable[[], None]:
    """Forward, cross-entropy, backward and an AdamW step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    labels = torch.zeros(len(images), dtype=torch.long)

    def run() -> None:
        torch.set_num_threads(threads)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return run


def compare(cases: tuple, threads: tuple[int, ...], seconds: float, *, training: bool) -> list[dict]:
    rows = []
    for ours, rival, size, batch in cases:
        images = torch.randn(batch, 3, size, size)
        models = {name: build(name, size, training=training) for name in (ours, rival)}
        make = training_step if training else inference
        # A rival of half a minute a run is not run often, and at one thread count only.
        slow = size >= 2048
        counts = threads[-1:] if slow else threads
        functions = {(name, count): make(models[name], images, count) for count in counts for name in models}
        timings = time_interleaved(functions, seconds=seconds, rounds=(2 if slow else 5, 100))
        for count in counts:
            pair = timings[ours, count], timings[rival, count]
            rows.append(
                {
                    "model": ours,
                    "rival": rival,
                    "size": size,
                    "batch": batch,
                    "threads": count,
                    "model_ms": 1e3 * pair[0].median,
                    "rival_ms": 1e3 * pair[1].median,
                    "times faster": ratio(pair[1], pair[0]),
                    "thread scaling": ratio(timings[ours, counts[0]], pair[0]),
                }
            )
    return rows


def measure_precision(threads: int, seconds: float) -> list[dict]:
    """bfloat16 autocast against float32, and how time grows from 512 to 1024 pixels."""
    images = {
        "224": torch.randn(4, 3, 224, 224),
        "512": torch.randn(1, 3, 512, 512),
        "1024": torch.randn(1, 3, 1024, 1024),
    }
    models = {size: build(VIG, int(size)) for size in images}
    functions = {
        "float32 224": inference(models["224"], images["224"], threads),
        "bfloat16 224": inference(models["224"], images["224"], threads, torch.bfloat16),
        "float32 512": inference(models["512"], images["512"], threads),
        "float32 1024": inference(models["1024"], images["1024"], threads),
        "bfloat16 1024": inference(models["1024"], images["1024"], threads, torch.bfloat16),
    }
    timings = time_interleaved(functions, seconds=seconds)
    pairs = (("float32 224", "bfloat16 224"), ("float32 1024", "bfloat16 1024"), ("float32 1024", "float32 512"))
    return [
        {"model": VIG, "threads": threads, "slow": slow, "fast": fast, "ratio": ratio(timings[slow], timings[fast])}
        for slow, fast in pairs
    ]


def measure_retention(threads: int, seconds: float, *, training: bool) -> list[dict]:
    images = torch.randn(4, 3, 224, 224)
    make = training_step if training else inference

    def prepared(name: str) -> Callable[[], None]:
        return make(build(name, 224, training=training), images, threads)

    return measure_models(prepared, len(images), threads, seconds)


def peak_memory_of_training_step(name: str, fused_attention: bool) -> int:
    """Bytes that a training step at `MEMORY_SIZE` adds, at most, to a process that holds model and images."""
    model = build(name, MEMORY_SIZE, training=True)
    if not fused_attention:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
    training_step(build(name, 64, training=True), torch.randn(1, 3, 64, 64), 1)()  # what libraries allocate but once
    step = training_step(model, torch.randn(1, 3, MEMORY_SIZE, MEMORY_SIZE), torch.get_num_threads())
    return peak_memory_added(step)


def measure_memory() -> list[dict]:
    """Each peak in a process of its own, since a process's peak never falls."""
    cases = {VIG: (VIG, True), f"{DEIT}, SDPA": (DEIT, True), f"{DEIT}, attention maps": (DEIT, False)}
    peaks = {}
    for label, (name, fused) in cases.items():
        command = [
            sys.executable,
            "-m",
            "vision",
            "benchmark",
            "--peak-memory-of",
            name,
            *(["--fused"] if fused else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[label] = int(done.stdout.split()[-1])
    return [
        {"model": label, "size": MEMORY_SIZE, "peak_mib": peak / 2**20, "times ours": peak / peaks[VIG]}
        for label, peak in peaks.items()
    ]


def describe_models(threads: int, seconds: float) -> list[dict]:
    """Parameters, multiply-accumulates (the scan's included) and the latency of one 224-pixel image."""
    names = [n for n in timm.list_models("vig_*") if n.endswith("224") or n.startswith("vig_h")]
    names += timm.list_models(["rmt_*", "gated_swin_rmt_*"])
    rows = []
    for name in sorted(names):
        model = timm.create_model(name).eval()
        macs = count_macs(model, (3, 224, 224))
        parameters = sum(p.numel() for p in model.parameters())
        function = inference(model.fuse(), torch.randn(1, 3, 224, 224), threads)
        timing = time_interleaved({name: function}, seconds=seconds / 4)[name]
        rows.append(
            {
                "model": name,
                "parameters": parameters,
                "dense GMACs": macs.dense / GIGA,
                "GMACs": macs.total / GIGA,
                "latency_ms": 1e3 * timing.median,
                "GFLOP/s": 2 * macs.total / GIGA / timing.median,
            }
        )
    return rows


KINDS = {
    "scan": ("gated_vision::bidirectional_gated_scan",),
    "matrix products": ("mkldnn::_linear_pointwise", "aten::addmm", "aten::mm", "aten::bmm"),
    "norm, mix, SwiGLU": ("gated_vision::rms_norm", "gated_vision::gated_norm_mix", "gated_vision::swiglu"),
    "depthwise convolution": ("gated_vision::depthwise_convolution",),
    "patch embedding": ("aten::mkldnn_convolution", "aten::native_layer_norm", "aten::silu"),
    "copies": ("aten::copy_", "aten::clone", "aten::contiguous"),
}


def profile(size: int, batch: int) -> list[dict]:
    """Where one thread's time goes in a fused ViG-T, and the matrix products' rate beside this machine's best."""
    torch.set_num_threads(1)
    model = build(VIG, size)
    images = torch.randn(batch, 3, size, size)
    rounds = 5
    with torch.no_grad():
        model(images)
        with torch.profiler.profile() as recorded:
            for _ in range(rounds):
                model(images)
    spent = {event.key: event.self_cpu_time_total for event in recorded.key_averages()}
    total = sum(spent.values())
    rows = [
        {"size": size, "what": f"{kind}, percent", "value": 100 * sum(spent.get(name, 0) for name in names) / total}
        for kind, names in KINDS.items()
    ]
    rows.append({"size": size, "what": "other, percent", "value": 100 - sum(row["value"] for row in rows)})
    products = sum(spent.get(name, 0) for name in KINDS["matrix products"]) / rounds * 1e-6
    linear = sum(2 * m.weight.numel() for m in model.modules() if m is not model.head and _is_linear(m))
    tokens = batch * model.grid_size[0] * model.grid_size[1]
    rate = linear * tokens / products / GIGA
    rows.append({"size": size, "what": "matrix products, GFLOP/s", "value": rate})
    rows.append({"size": size, "what": "... of the best product's rate, percent", "value": 100 * rate / _best_rate()})
    return rows


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


def _best_rate() -> float:
    """GFLOP/s of a large square product on one thread."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    timing: Timing = time_interleaved({"product": partial(torch.mm, a, b)}, seconds=2)["product"]
    return 2 * 1536**3 / min(timing.seconds) / GIGA


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vision benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to run")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts")
    parser.add_argument("--seconds", type=float, default=15.0, help="about how long one pair of rivals is timed")
    parser.add_argument("--largest", type=int, default=2048, help="largest image size compared")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/vision.json"), help="JSON file")
    parser.add_argument("--peak-memory-of", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--fused", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.peak_memory_of:
        print(peak_memory_of_training_step(options.peak_memory_of, options.fused))
        return

    check_correctness()
    threads, seconds = tuple(options.threads), options.seconds
    sized = tuple(case for case in INFERENCE if case[2] <= options.largest)
    sections: dict[str, tuple[str, Callable[[], list[dict]]]] = {
        "models": ("Models (1 image of 224 pixels)", lambda: describe_models(threads[-1], seconds)),
        "inference": ("Inference, float32", lambda: compare(sized, threads, seconds, training=False)),
        "training": ("Training step, float32", lambda: compare(TRAINING, threads, seconds, training=True)),
        "precision": ("Precision and growth with size", lambda: measure_precision(threads[-1], seconds)),
        "memory": ("Peak memory of a training step, batch 1", measure_memory),
        "retention-core": (
            "Windowed retention, forward and backward, batch 8, windows of 7x7 shifted by 3",
            lambda: measure_core(threads[-1], seconds),
        ),
        "retention-inference": (
            "Gated-SwinRMT beside Swin, inference, 4 images of 224 pixels",
            lambda: measure_retention(threads[-1], seconds, training=False),
        ),
        "retention-training": (
            "Gated-SwinRMT beside Swin, training step, 4 images of 224 pixels",
            lambda: measure_retention(threads[-1], seconds, training=True),
        ),
        "profile": ("Where the time goes, one thread", lambda: [*profile(224, 4), *profile(1024, 1)]),
    }
    report = {}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for section in options.only:
        title, measure = sections[section]
        report[section] = rows = measure()
        print_table(title, tuple(rows[0]), [tuple(row.values()) for row in rows])
        options.output.write_text(json.dumps({"machine": machine(), **report}, indent=1))
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
