"""Fields of one scene beside each other: variants trained by the same trainer, several seeds each.

    python -m generation compare-fields --config configs/generation/city_comparison.yaml

trains every variant with every seed (finished runs in the output folder are not repeated, and if they had other
settings nothing is), then prints a table of quality on held-out pictures, training and drawing times, and writes it as
JSON, with plots of quality over time and of the experts' loads, and a picture of which expert owns what.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from PIL import Image

from generation.finished_runs import finished, keep
from generation.radiance_field.pictures import colour_picture, expert_palette, expert_picture, to_bytes
from generation.radiance_field.scene import Scene
from generation.radiance_field.scene_rays import SceneRays
from generation.radiance_field.training import RadianceFieldTraining
from training_runs.atomic_files import prepare_output, write_atomically, write_json
from training_runs.command_line import prepare_process

MEASURES = {
    "psnr": "{:.2f}",
    "ssim": "{:.3f}",
    "cpu_seconds": "{:.1f}",
    "wall_seconds": "{:.1f}",
    "picture_seconds": "{:.3f}",
    "least_load": "{:.2f}",
}


CLOCKS = {"cpu_seconds": lambda: time.process_time(), "wall_seconds": lambda: time.perf_counter()}


def file_name(variant: str) -> str:
    """What the files of a variant are called: its name, with a hyphen for what a shell would have to be told about."""
    return re.sub(r"[^\w.+^=-]+", "-", variant).strip("-")


@dataclass
class Comparison:
    """The protocol.

    Args:
        model: arguments of `RadianceFieldTraining`, of all variants.
        data: arguments of `SceneRays`.
        variants: by name, the arguments in which a variant differs.
        seeds: of weights and rays.
        steps: of training.
        cpu_seconds: after which a training is stopped, if its steps are not done.
        judged_every: steps between two looks at the held-out pictures; they are not part of the training's time.
        reference: the variant of whom the table says how much sooner it reached another's quality.
        output: folder of the results.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps: int = 1000
    cpu_seconds: float = 1e9
    judged_every: int = 100
    reference: str | None = None
    output: Path = Path("runs/field_comparison")

    def __post_init__(self) -> None:
        if not self.variants or not self.seeds:
            raise ValueError("variants and seeds must not be empty")
        for name in ("steps", "judged_every", "cpu_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        names = [file_name(variant) for variant in self.variants]
        for variant, name in zip(self.variants, names, strict=True):
            if not name or names.count(name) > 1:
                raise ValueError(
                    f"variants has {variant!r}, whose files' name, {name!r}, is empty or another's as well"
                )
        if self.reference is not None and self.reference not in self.variants:
            raise ValueError(f"reference is {self.reference!r}; valid are {', '.join(self.variants)}")


class Judged(pl.Callback):
    """Notes quality, time and loads along the way, and stops where the time is used up."""

    def __init__(self, every: int, cpu_seconds: float) -> None:
        self.every, self.limit, self.points = every, cpu_seconds, []
        self.seconds = dict.fromkeys(CLOCKS, 0.0)  # of training, before this stretch of it

    def on_train_start(self, trainer: pl.Trainer, module: RadianceFieldTraining) -> None:
        judged_frames(module.scene)  # before the first step
        self.started = {name: clock() for name, clock in CLOCKS.items()}

    def on_train_batch_end(self, trainer: pl.Trainer, module: RadianceFieldTraining, *_: Any) -> None:
        spent = {name: self.seconds[name] + clock() - self.started[name] for name, clock in CLOCKS.items()}
        over = spent["cpu_seconds"] >= self.limit
        trainer.should_stop = trainer.should_stop or over
        if trainer.global_step % self.every and not over and trainer.global_step < trainer.max_steps:
            return
        loads = [value.item() for name, value in trainer.callback_metrics.items() if name.startswith("load/")]
        scores = judge(module)
        module.train()
        self.points.append({"step": trainer.global_step, **spent, "loads": loads, **scores})
        self.seconds, self.started = spent, {name: clock() for name, clock in CLOCKS.items()}


def judged_frames(scene: Scene) -> list[int]:
    """The frames of the test split.

    Raises:
        ValueError: there are none.
    """
    frames = scene.splits["test"].tolist()
    if not frames:
        raise ValueError(f"scene {scene.name!r} holds out no picture to judge by")
    return frames


@torch.no_grad()
def judge(module: RadianceFieldTraining) -> dict[str, float]:
    """Means over the held-out pictures, and the CPU seconds in which one is drawn.

    Raises:
        ValueError: the scene has none.
    """
    found, seconds = [], 0.0
    for frame in judged_frames(module.scene):
        started = time.process_time()
        drawn = module.draw(frame)
        seconds += time.process_time() - started
        found.append(module.scores(drawn, frame))
    scores = {name: mean(each[name].item() for each in found) for name in found[0]}
    return scores | {"picture_seconds": seconds / len(found)}


def run(comparison: Comparison, variant: str, seed: int) -> dict[str, Any]:
    """Train and judge one field."""
    pl.seed_everything(seed, verbose=False)
    module = RadianceFieldTraining(**comparison.model | comparison.variants[variant])
    judged = Judged(comparison.judged_every, comparison.cpu_seconds)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=comparison.steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[judged],
    )
    trainer.fit(module, SceneRays(**comparison.data, seed=seed))
    last = judged.points[-1]
    if seed == comparison.seeds[0]:
        show(module, comparison.output / f"{file_name(variant)}.png")
    parameters = sum(p.numel() for p in module.renderer.parameters())
    result = {"variant": variant, "seed": seed, "parameters": parameters, "steps": last["step"]}
    loads = {"least_load": min(last["loads"])} if last["loads"] else {}
    return result | {name: last[name] for name in MEASURES if name in last} | loads | {"curve": judged.points}


def show(module: RadianceFieldTraining, path: Path) -> None:
    """The first held-out picture: real, drawn, and which expert owns what."""
    frame = judged_frames(module.scene)[0]
    drawn = module.draw(frame)
    pictures = [to_bytes(module.photograph(frame).cpu()), colour_picture(drawn)]
    if (experts := expert_picture(drawn)) is not None:
        pictures.append(experts)
    image = Image.fromarray(torch.cat([torch.from_numpy(p) for p in pictures], 1).numpy())
    image = image.resize((3 * image.width, 3 * image.height), Image.Resampling.NEAREST)
    write_atomically(path, image.save)


def settings_of(comparison: Comparison, variant: str, seed: int) -> dict[str, Any]:
    """All that a run's result depends on, as JSON gives it back."""
    settings = {
        "model": comparison.model | comparison.variants[variant],
        "data": comparison.data,
        "seed": seed,
        "steps": comparison.steps,
        "cpu_seconds": comparison.cpu_seconds,
        "judged_every": comparison.judged_every,
    }
    return json.loads(json.dumps(settings, default=str))


def seconds_until(rows: Sequence[dict[str, Any]], psnr: float) -> float | None:
    """Mean CPU seconds of training after which runs had reached a quality; None if one never did."""
    reached = [next((p["cpu_seconds"] for p in row["curve"] if p["psnr"] >= psnr), None) for row in rows]
    return None if None in reached else mean(reached)


def table(rows: Sequence[dict[str, Any]], comparison: Comparison) -> list[str]:
    """Mean and sample deviation over the seeds, a line for each variant, in Markdown."""
    columns = ["variant", "parameters", "steps", *MEASURES]
    if comparison.reference is not None:
        columns.append(f"{comparison.reference} was as good after")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    of = {variant: [row for row in rows if row["variant"] == variant] for variant in comparison.variants}
    for variant, runs in of.items():
        cells = [variant, f"{runs[0]['parameters']:,}", f"{mean(row['steps'] for row in runs):.0f}"]
        for name, form in MEASURES.items():
            values = [row[name] for row in runs if name in row]
            spread = f" ± {stdev(values):.2f}" if name == "psnr" and len(values) > 1 else ""
            cells.append(form.format(mean(values)) + spread if values else "")
        if comparison.reference is not None:
            needed = seconds_until(of[comparison.reference], mean(row["psnr"] for row in runs))
            own = mean(row["cpu_seconds"] for row in runs)
            cells.append(
                "" if needed is None or variant == comparison.reference else f"{needed:.1f} s, {own / needed:.1f}x"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot_quality(rows: Sequence[dict[str, Any]], variants: Sequence[str]) -> Figure:
    """PSNR over CPU seconds of training, a line for each run."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for place, variant in enumerate(variants):
        for row in (row for row in rows if row["variant"] == variant):
            seconds, psnr = zip(*((p["cpu_seconds"], p["psnr"]) for p in row["curve"]), strict=True)
            label = variant if row["seed"] == rows[0]["seed"] else None
            axes.plot(seconds, psnr, color=f"C{place}", alpha=0.8, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("CPU seconds of training")
    axes.set_ylabel("PSNR of held-out pictures, dB")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def plot_loads(rows: Sequence[dict[str, Any]]) -> Figure | None:
    """Shares of the experts over the steps of the first seed, a panel for each mixture."""
    mixtures = [row for row in rows if row["seed"] == rows[0]["seed"] and row["curve"][0]["loads"]]
    if not mixtures:
        return None
    figure = Figure(figsize=(3 * len(mixtures), 2.6), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(mixtures), squeeze=False)[0], mixtures, strict=True):
        loads = torch.tensor([point["loads"] for point in row["curve"]]).T.numpy()
        axes.stackplot([point["step"] for point in row["curve"]], loads, colors=expert_palette(len(loads)))
        axes.set_title(row["variant"], fontsize=9)
        axes.set_xlabel("step")
    return figure


def main(arguments: list[str]) -> None:
    comparison = auto_cli(Comparison, args=arguments, prog="python -m generation compare-fields", description=__doc__)
    prepare_process()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    runs = [(variant, seed) for seed in comparison.seeds for variant in comparison.variants]
    files = {own: comparison.output / f"{file_name(own[0])}-{own[1]}.json" for own in runs}
    try:
        prepare_output("output", comparison.output, as_folder=True)
        done = {own: finished(files[own], settings_of(comparison, *own)) for own in runs}
    except ValueError as error:
        sys.exit(f"error: {error}")
    for own, result in done.items():
        if result is None:
            done[own] = result = run(comparison, *own)
            keep(files[own], result, settings_of(comparison, *own))
            spent = f"{result['cpu_seconds']:.1f} CPU s, {result['wall_seconds']:.1f} s by the clock"
            print(f"{own[0]}, seed {own[1]}: {result['psnr']:.2f} dB, {result['steps']} steps in {spent}", flush=True)
    rows = list(done.values())
    write_json(comparison.output / "comparison.json", rows)
    figures = {"quality.png": plot_quality(rows, list(comparison.variants)), "loads.png": plot_loads(rows)}
    for name, figure in figures.items():
        if figure is not None:
            write_atomically(comparison.output / name, lambda path, figure=figure: figure.savefig(path, dpi=120))
    print("\n".join(table(rows, comparison)))
    print(f"written to {comparison.output}")
