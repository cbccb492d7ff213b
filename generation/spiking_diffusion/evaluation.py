"""Quality of drawn images: `python -m generation evaluate-spiking` and `sweep-threshold`."""

import argparse
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from generation.spiking_diffusion.image_sets import LabelledImages, load
from generation.spiking_diffusion.pipeline import SpikingDiffusionPipeline
from generation.spiking_diffusion.quality import Judge, Quality
from generation.spiking_diffusion.sample import draw_images, picture
from generation.spiking_diffusion.shipped_models import load_pipeline
from generation.spiking_diffusion.unet import SpikingUNet2DModel
from training_runs.atomic_files import write_atomically, write_json

SHOWN = 40  # images of each model in the picture
SEED_STRIDE = 1_000_003  # between the images of two seeds


def data_of(source: str, pipeline: SpikingDiffusionPipeline) -> LabelledImages:
    """The set, in the size of the model's images.

    Raises:
        ValueError: its images have other channels, or its classes are not the model's.
    """
    config, data = pipeline.unet.config, load(source, pipeline.unet.config.sample_size)
    if data.images.shape[1] != config.in_channels or config.num_class_embeds not in (None, len(data.names)):
        raise ValueError(
            f"data is {source!r}, {data.images.shape[1]} channels and {len(data.names)} classes; the model has "
            f"{config.in_channels} and {config.num_class_embeds}"
        )
    return data


def qualities(
    judge: Judge, pipeline: SpikingDiffusionPipeline, images: int, seeds: Sequence[int], **settings: Any
) -> tuple[list[Quality], Tensor]:
    """The quality for each seed, and the images of the last, in [0, 1]."""
    classes, found = pipeline.unet.config.num_class_embeds, []
    labels = None if classes is None else torch.arange(images) % classes
    pipeline.set_progress_bar_config(disable=True)
    for seed in seeds:
        drawn = draw_images(pipeline, images, None, seed * SEED_STRIDE, **settings)
        found.append(judge.quality(2 * drawn - 1, labels))
    return found, drawn


def means(found: Sequence[Quality]) -> dict[str, Any]:
    """Means over seeds, and each seed's numbers."""
    accuracies = [quality.accuracy for quality in found if quality.accuracy is not None]
    return {
        "distance": mean(quality.distance for quality in found),
        "accuracy": mean(accuracies) if accuracies else None,
        "distances": [quality.distance for quality in found],
        "accuracies": accuracies,
    }


def evaluate(options: argparse.Namespace) -> None:
    """Of `commands.evaluate_options`."""
    pipelines = {name: load_pipeline(name) for name in options.models}
    size = next(iter(pipelines.values())).unet.config.sample_size
    for name, pipeline in pipelines.items():
        if (own := pipeline.unet.config.sample_size) != size:
            raise ValueError(f"model is {name!r}, of images of side {own}; those of {options.models[0]!r} have {size}")
        data = data_of(options.data, pipeline)
    judge, channels = Judge(data), data.images.shape[1]
    rows, shown = [], []
    print(f"{'images':32}{'steps':>6}{'Frechet':>9}{'accuracy':>10}   of each seed")

    def tell(name: str, steps: int | str, scores: dict[str, Any]) -> None:
        rows.append({"images": name, "steps": steps, **scores})
        accuracy = "" if scores["accuracy"] is None else f"{scores['accuracy']:.3f}"
        each = " ".join(f"{distance:.2f}" for distance in scores["distances"])
        print(f"{name[-31:]:32}{steps:>6}{scores['distance']:9.2f}{accuracy:>10}   {each}", flush=True)

    tell("a fifth of the real images", "", means([judge.floor()]))
    for name, pipeline in pipelines.items():
        for steps in options.steps:
            found, drawn = qualities(judge, pipeline, options.images, options.seeds, num_inference_steps=steps)
            tell(name, steps, means(found))
        shown.append(drawn[:SHOWN])
    tell("uniform noise", "", means([judge.ceiling(options.images, size, channels)]))
    report = {"data": options.data, "images": options.images, "classifier_accuracy": judge.test_accuracy, "rows": rows}
    write_json(options.output / "scores.json", report)
    magnify = max(1, 48 // size)
    drawn = picture(torch.cat(shown), columns=20, magnify=magnify)
    write_atomically(options.output / "images.png", drawn.save)
    print(f"Frechet distances are of the classifier's features, no FID; written to {options.output}")


def plot(rows: Sequence[dict[str, Any]], trained: float, best: float) -> Figure:
    """Distance and accuracy against the threshold."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    thresholds = [row["threshold"] for row in rows]
    left.plot(thresholds, [row["distance"] for row in rows], "o-", color="tab:blue")
    left.set_xlabel("threshold")
    left.set_ylabel("Frechet distance", color="tab:blue")
    left.axvline(trained, color="grey", linestyle=":", label="trained")
    left.axvline(best, color="tab:green", linestyle="--", label="picked")
    left.legend()
    if rows[0]["accuracy"] is not None:
        right = left.twinx()
        right.plot(thresholds, [row["accuracy"] for row in rows], "s-", color="tab:orange")
        right.set_ylabel("accuracy", color="tab:orange")
    return figure


def sweep(options: argparse.Namespace) -> None:
    """Of `commands.sweep_options`."""
    pipeline = load_pipeline(options.model)
    if not isinstance(pipeline.unet, SpikingUNet2DModel) or pipeline.unet.config.neuron == "silu":
        raise ValueError(f"model is {options.model!r}, which has no spiking neurons of a threshold to be changed")
    judge = Judge(data_of(options.data, pipeline))
    trained, settings = pipeline.unet.config.threshold, {"num_inference_steps": options.steps}
    rows = []
    for threshold in tqdm(sorted(set(options.thresholds) | {trained}), desc="thresholds", unit="threshold"):
        found, _ = qualities(judge, pipeline, options.images, options.seeds, threshold=threshold, **settings)
        rows.append({"threshold": threshold, **means(found)})
    best = min(rows, key=lambda row: row["distance"])["threshold"]
    ceiling = judge.ceiling(options.images, pipeline.unet.config.sample_size, pipeline.unet.config.in_channels)
    print(f"a fifth of the real images {judge.floor().distance:.2f}, uniform noise {ceiling.distance:.2f}")
    print(f"{'threshold':>9}{'Frechet':>9}{'accuracy':>10}")
    for row in rows:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        print(f"{row['threshold']:9g}{row['distance']:9.2f}{accuracy:>10}" + "  picked" * (row["threshold"] == best))
    held_out = {}
    for name, threshold in (("trained", trained), ("picked", best)):
        found, _ = qualities(judge, pipeline, options.images, [options.held_out_seed], threshold=threshold, **settings)
        held_out[name] = {"threshold": threshold, **means(found)}
        print(f"held-out seed, {name} threshold {threshold:g}: Frechet distance {found[0].distance:.2f}")
    report = {"model": str(options.model), "images": options.images, "rows": rows, "held_out": held_out}
    write_json(options.output / "sweep.json", report)
    figure = plot(rows, trained, best)
    write_atomically(options.output / "sweep.png", lambda path: figure.savefig(path, dpi=120))
    print(f"written to {options.output}")
