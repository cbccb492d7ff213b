"""What LINA's parts are worth on captioned shapes: variants trained for equal CPU time, several seeds each.

    python -m generation ablation --config configs/generation/lina_ablation.yaml

trains every variant with every seed (finished runs in the output folder are not repeated, and if they had other
settings nothing is), then prints a table of the
loss and the checker's scores on held-out prompts, and writes it as JSON and as a plot.
"""

import json
import logging
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

from generation.finished_runs import finished, keep
from generation.lina.captioned_shapes import CaptionedShapes, draw, held_out_prompts
from generation.lina.shape_scores import score
from generation.lina.training import LinaTraining
from training_runs.atomic_files import prepare_output, write_atomically, write_json
from training_runs.command_line import prepare_process

TIMED_STEPS, WARM_UP_STEPS = 30, 10
MEASURES = ("loss", "all_correct", "colour", "shape", "place")


@dataclass
class Ablation:
    """The protocol.

    Args:
        model: arguments of `LinaTraining`, of all variants.
        data: arguments of `CaptionedShapes`.
        variants: by name, what is different in `model`'s `transformer`.
        seeds: of weights, data and noise.
        cpu_seconds: of training, for each run.
        prompts: held-out prompts that are scored.
        guidance_scale: of their pictures.
        output: folder of the results.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    cpu_seconds: float = 200.0
    prompts: int = 500
    guidance_scale: float = 3.0
    output: Path = Path("runs/lina_ablation")

    def __post_init__(self) -> None:
        if not self.variants or not self.seeds:
            raise ValueError("variants and seeds must not be empty")
        if self.cpu_seconds <= 0 or self.prompts < 1:
            raise ValueError(f"cpu_seconds is {self.cpu_seconds} and prompts {self.prompts}; both must be above 0")


def trainer(steps: int, callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    """A silent trainer of so many steps."""
    return pl.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


class StepTimer(pl.Callback):
    """CPU seconds of a step, without the first ones."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == WARM_UP_STEPS:
            self.started = time.process_time()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.seconds = (time.process_time() - self.started) / (trainer.global_step - WARM_UP_STEPS)


def build(ablation: Ablation, variant: str, seed: int) -> tuple[LinaTraining, CaptionedShapes]:
    pl.seed_everything(seed, verbose=False)
    transformer = ablation.model["transformer"] | ablation.variants[variant]
    model = LinaTraining(**ablation.model | {"transformer": transformer})
    return model, CaptionedShapes(**ablation.data, seed=seed)


@torch.no_grad()
def held_out_loss(module: LinaTraining, data: CaptionedShapes, count: int = 512, repeats: int = 4) -> float:
    """The training loss of held-out scenes, with the same noise for every model."""
    scenes = held_out_prompts(data.level, count)
    batch = {"image": draw(scenes), "caption": [scene.caption for scene in scenes]}
    generator = torch.Generator().manual_seed(0)
    return mean(module.loss(batch, 0.0, generator).item() for _ in range(repeats))


def run(ablation: Ablation, variant: str, seed: int) -> dict[str, Any]:
    """Train and score one model."""
    timer = StepTimer()
    trainer(WARM_UP_STEPS + TIMED_STEPS, [timer]).fit(*build(ablation, variant, seed))
    steps = max(1, round(ablation.cpu_seconds / timer.seconds))
    module, data = build(ablation, variant, seed)
    started = time.process_time()
    trainer(steps).fit(module, data)
    seconds = time.process_time() - started
    with module.averaged():
        loss = held_out_loss(module, data)
        settings = {"guidance_scale": ablation.guidance_scale, "num_inference_steps": 16, "num_diffusion_steps": 10}
        scores = score(module.pipeline(), data.level, ablation.prompts, spacing="trailing", **settings)
    parameters = sum(p.numel() for p in module.transformer.parameters() if p.requires_grad)
    made = {"variant": variant, "seed": seed, "steps": steps, "cpu_seconds": seconds, "parameters": parameters}
    return {**made, "loss": loss, **scores}


def settings_of(ablation: Ablation, variant: str, seed: int) -> dict[str, Any]:
    """All that a run's result depends on, as JSON gives it back."""
    settings = {
        "model": ablation.model | {"transformer": ablation.model["transformer"] | ablation.variants[variant]},
        "data": ablation.data,
        "seed": seed,
        "cpu_seconds": ablation.cpu_seconds,
        "prompts": ablation.prompts,
        "guidance_scale": ablation.guidance_scale,
    }
    return json.loads(json.dumps(settings, default=str))


def result_file(ablation: Ablation, variant: str, seed: int) -> Path:
    return ablation.output / f"{variant}-{seed}.json"


def table(rows: Sequence[dict[str, Any]], variants: Sequence[str]) -> list[str]:
    """Mean and sample deviation over the seeds, a line for each variant, in Markdown."""
    columns = ("variant", "parameters", "steps", "CPU seconds", *MEASURES)
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for variant in variants:
        runs = [row for row in rows if row["variant"] == variant]
        cells = [f"{runs[0]['parameters']:,}", f"{mean(row['steps'] for row in runs):.0f}"]
        cells.append(f"{mean(row['cpu_seconds'] for row in runs):.1f}")
        for measure in MEASURES:
            values = [row[measure] for row in runs]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines


def plot(rows: Sequence[dict[str, Any]], variants: Sequence[str]) -> Figure:
    """A point for each run: its loss, and its share of pictures with all right."""
    figure = Figure(figsize=(10, 0.5 * len(variants) + 1.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, measure, title in (
        (left, "loss", "held-out loss"),
        (right, "all_correct", "all right, of held-out prompts"),
    ):
        for place, variant in enumerate(variants):
            values = [row[measure] for row in rows if row["variant"] == variant]
            axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6)
            axes.plot([mean(values)], [place], "|", color="black", markersize=18)
        axes.set_xlabel(title)
        axes.grid(axis="x", alpha=0.3)
    left.set_yticks(range(len(variants)), variants)
    left.invert_yaxis()
    return figure


def main(arguments: list[str]) -> None:
    ablation = auto_cli(Ablation, args=arguments, prog="python -m generation ablation", description=__doc__)
    prepare_process()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    runs = [(variant, seed) for seed in ablation.seeds for variant in ablation.variants]
    try:
        prepare_output("output", ablation.output, as_folder=True)
        done = {own: finished(result_file(ablation, *own), settings_of(ablation, *own)) for own in runs}
    except ValueError as error:
        sys.exit(f"error: {error}")
    for (variant, seed), result in done.items():
        if result is None:
            done[variant, seed] = result = run(ablation, variant, seed)
            keep(result_file(ablation, variant, seed), result, settings_of(ablation, variant, seed))
            print(
                f"{variant}, seed {seed}: {result['steps']} steps, loss {result['loss']:.4f}, "
                f"all correct {result['all_correct']:.3f}",
                flush=True,
            )
    rows, variants = list(done.values()), list(ablation.variants)
    write_json(ablation.output / "ablation.json", rows)
    figure = plot(rows, variants)
    write_atomically(ablation.output / "ablation.png", lambda path: figure.savefig(path, dpi=120))
    print("\n".join(table(rows, variants)))
    print(f"written to {ablation.output}")
