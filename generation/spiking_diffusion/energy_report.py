"""`python -m generation energy`: what drawing with a spiking diffusion model costs, beside its artificial twin."""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from generation.spiking_diffusion.energy import ACCUMULATE_PJ, MAC_PJ, EnergyReport, totals
from generation.spiking_diffusion.pipeline import SpikingDiffusionPipeline, ddim_scheduler
from generation.spiking_diffusion.shipped_models import load_pipeline
from training_runs.atomic_files import write_atomically, write_json

# That say which layers a network has.
LAYER_SETTINGS = ("_class_name", "sample_size", "in_channels", "out_channels", "channels", "channel_multipliers")
LAYER_SETTINGS += ("layers_per_block", "official", "num_class_embeds")
SHOWN_LAYERS, SHOWN_NEURONS, SHOWN_STEPS = 4, 64, 8  # of the raster


def load(name: str, model: str, spiking: bool) -> SpikingDiffusionPipeline:
    """A model's pipeline, with DDIM.

    Raises:
        ValueError: its neurons do not spike and should, or do and should not.
    """
    pipeline = load_pipeline(model)
    pipeline.scheduler = ddim_scheduler(pipeline.unet.config.num_train_timesteps)
    pipeline.set_progress_bar_config(disable=True)
    if any(getattr(neuron, "spiking", True) for neuron in pipeline.unet.neurons().values()) != spiking:
        needed = "a model with spiking neurons" if spiking else "an artificial twin, with neuron='silu'"
        raise ValueError(f"{name} is {model!r}; it must be {needed}")
    return pipeline


def measure(
    pipeline: SpikingDiffusionPipeline, images: int, steps: int, seed: int = 0, threshold: float | None = None
) -> EnergyReport:
    """Draw images, of all classes in turn if the model knows any, and count."""
    classes = pipeline.unet.config.num_class_embeds
    labels = [image % classes for image in range(images)] if classes else None
    return pipeline(
        batch_size=images,
        class_labels=labels,
        num_inference_steps=steps,
        generator=torch.Generator(pipeline.device).manual_seed(seed),
        threshold=threshold,
        output_type="pt",
        collect_energy=True,
    ).energy


def evenly(count: int, most: int) -> list[int]:
    """Up to `most` of the whole numbers from 0 to `count - 1`, rising, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, most)).round().long().tolist()


def check_twin(name: str, twin: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless a network with the configuration `twin` has the layers of one with `config`."""

    def layers(given: Mapping[str, Any]) -> dict[str, Any]:
        told = {setting: given.get(setting) for setting in LAYER_SETTINGS}
        told["out_channels"] = told["out_channels"] or told["in_channels"]
        return told | {"channel_multipliers": tuple(told["channel_multipliers"])}

    theirs, ours = layers(twin), layers(config)
    if differing := [f"{key} {theirs[key]} instead of {ours[key]}" for key in ours if theirs[key] != ours[key]]:
        raise ValueError(f"--twin is {name!r}, which is no twin of the model: it has {', '.join(differing)}")


@contextmanager
def recorded_spikes(unet: torch.nn.Module, call: int) -> Iterator[dict[str, Tensor]]:
    """By the names of a few layers of neurons, the first image's spikes `[T, C, H, W]` in one call of the network.

    Args:
        unet: has `neurons()` and `config.snn_timesteps`.
        call: in which spikes are recorded, from 0.
    """
    neurons = {name: neuron for name, neuron in unet.neurons().items() if "time" not in name}
    spikes: dict[str, Tensor] = {}
    calls = dict.fromkeys(neurons, 0)

    def record(name: str, output: Tensor) -> None:
        if calls[name] == call:
            spikes[name] = (output.unflatten(0, (unet.config.snn_timesteps, -1))[:, 0] != 0).cpu()
        calls[name] += 1

    chosen = [list(neurons)[index] for index in evenly(len(neurons), SHOWN_LAYERS)]
    handles = [
        neurons[name].register_forward_hook(lambda *given, name=name: record(name, given[-1])) for name in chosen
    ]
    try:
        yield spikes
    finally:
        for handle in handles:
            handle.remove()


def plot_rates(report: EnergyReport) -> Figure:
    """A bar for each spike-driven layer, as high as the rate of its input."""
    driven = [layer for layer in report.layers if layer.spike_driven]
    figure = Figure(figsize=(max(6, 0.3 * len(driven) + 1), 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(driven)), [layer.activity for layer in driven], color="tab:blue")
    axes.axhline(report.rate, color="black", linewidth=1, label=f"mean by MACs, {report.rate:.3f}")
    axes.set_xticks(range(len(driven)), [layer.name for layer in driven], rotation=90, fontsize=7)
    axes.set_ylabel("firing rate of the input")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def plot_energy(report: EnergyReport, twin: EnergyReport) -> Figure:
    """The network and its twin by the paper's formula and corrected, the latter in accumulates and multiplications."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    names = ("paper's formula", "corrected", "ANN twin,\npaper's formula", "ANN twin,\ncorrected")
    axes.bar([0, 2], [report.paper_pj / 1e6, twin.paper_pj / 1e6], color="tab:gray", label="by the formula")
    below = [0.0, 0.0]
    for label, count, price, colour in (
        ("accumulates", "accumulates", ACCUMULATE_PJ, "tab:blue"),
        ("multiplications", "multiplications", MAC_PJ, "tab:orange"),
    ):
        heights = [price * measured.total(count) / 1e6 for measured in (report, twin)]
        axes.bar([1, 3], heights, bottom=below, color=colour, label=label)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_xticks(range(4), names)
    axes.set_ylabel("uJ for one image and call\n(arithmetic only, 45 nm)")
    axes.legend()
    return figure


def plot_raster(spikes: dict[str, Tensor]) -> Figure:
    """A row for each layer: some of its neurons over time, then in each step the share of channels that fire."""
    steps = max(len(layer) for layer in spikes.values())
    times = evenly(steps, SHOWN_STEPS)
    figure = Figure(figsize=(3.5 + 1.5 * len(times), 1.9 * len(spikes)), layout="constrained")
    ratios = [2, *[1] * len(times)]
    rows = figure.subplots(len(spikes), len(ratios), squeeze=False, width_ratios=ratios)
    for (raster, *maps), (name, layer) in zip(rows, spikes.items(), strict=True):
        neurons = layer.flatten(1)
        shown = neurons[:, evenly(neurons.shape[1], SHOWN_NEURONS)].T
        raster.imshow(shown, aspect="auto", cmap="binary", vmin=0, vmax=1, interpolation="nearest")
        raster.set_ylabel(name, fontsize=7)
        raster.set_xticks(times)
        raster.set_yticks([])
        for time, axes in zip(times, maps, strict=True):
            axes.imshow(layer[time].float().mean(0), cmap="magma", vmin=0, vmax=1)
            axes.set_title(f"step {time}", fontsize=7)
            axes.set_axis_off()
    rows[0][0].set_title("neurons over time", fontsize=7)
    rows[-1][0].set_xlabel("time step", fontsize=7)
    return figure


def write(folder: Path, report: EnergyReport, twin: EnergyReport, spikes: dict[str, Tensor], settings: Any) -> None:
    """The JSON and the three pictures, each whole or not at all."""
    numbers = {"settings": settings, "model": report.as_dict(), "twin": twin.as_dict()}
    write_json(folder / "energy.json", numbers)
    figures = {"firing_rates": plot_rates(report), "energy": plot_energy(report, twin), "raster": plot_raster(spikes)}
    for name, figure in figures.items():
        write_atomically(folder / f"{name}.png", lambda partial, figure=figure: figure.savefig(partial, dpi=120))


def main(options: argparse.Namespace) -> None:
    """Of `commands.energy_options`."""
    pipeline = load("model", options.model, spiking=True)
    twin_pipeline = load("--twin", options.twin, spiking=False) if options.twin else None
    if twin_pipeline:
        check_twin(options.twin, twin_pipeline.unet.config, pipeline.unet.config)
    with recorded_spikes(pipeline.unet, options.steps // 2) as spikes:
        report = measure(pipeline, options.images, options.steps, options.seed, options.threshold)
    # What an artificial network does is the same for all data.
    twin = measure(twin_pipeline, 1, 1) if twin_pipeline else report.as_artificial()
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    write(options.output, report, twin, spikes, settings)
    print(f"{report.table()}\n\n{totals(report, twin)}")
    print(f"A generated image takes {options.steps} calls.\nwritten to {options.output}")
