"""`python -m generation sample-spiking`: one picture of many images."""

import argparse
import json
import math
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torchvision.utils import make_grid

import kernels
from generation.spiking_diffusion.pipeline import SpikingDiffusionPipeline
from generation.spiking_diffusion.shipped_models import load_pipeline
from training_runs.atomic_files import write_atomically

MOST_AT_ONCE, MOST_ACTIVATIONS = 256, 2**24  # images, and numbers of the first layer's activations


def draw_images(
    pipeline: SpikingDiffusionPipeline, count: int, label: int | None, seed: int, **settings: Any
) -> Tensor:
    """`[count, C, S, S]` images in [0, 1]; image i depends on seed + i and the settings alone, up to rounding.

    Args:
        label: class of all; None for all classes in turn, of a model that knows classes.
        seed: of the first image.
        settings: further arguments of the pipeline.
    """
    config, images = pipeline.unet.config, []
    classes, steps = config.num_class_embeds, settings.get("snn_timesteps") or config.snn_timesteps or 1
    activations = steps * config.channels * config.sample_size**2
    batch = min(MOST_AT_ONCE, max(1, MOST_ACTIVATIONS // activations))
    for start in range(0, count, batch):
        numbers = range(start, min(start + batch, count))
        labels = None
        if classes or label is not None:
            labels = [number % classes if label is None else label for number in numbers]
        generators = [torch.Generator().manual_seed(seed + number) for number in numbers]
        images.append(pipeline(len(numbers), labels, generator=generators, output_type="pt", **settings).images.float())
    return torch.cat(images)


def picture(images: Tensor, columns: int | None = None, magnify: int = 1) -> Image.Image:
    """Images `[N, C, S, S]` in [0, 1] side by side, every pixel a square of `magnify` pixels."""
    columns = columns or math.ceil(len(images) ** 0.5)
    grid = make_grid(images.clamp(0, 1), columns, padding=1, pad_value=0.5)
    grid = grid.repeat_interleave(magnify, 1).repeat_interleave(magnify, 2)
    return Image.fromarray((grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def main(options: argparse.Namespace) -> None:
    """Of `commands.sample_options`."""
    pipeline = load_pipeline(options.model)
    settings = {
        "num_inference_steps": options.steps,
        "threshold": options.threshold,
        "snn_timesteps": options.snn_timesteps,
        "guidance_scale": options.guidance,
    }
    if options.energy:
        from generation.spiking_diffusion.energy import EnergyMeter, totals

        with EnergyMeter(pipeline.unet, 1 if options.guidance == 1 else 2) as meter:
            images = draw_images(pipeline, options.images, options.label, options.seed, **settings)
        print(f"{totals(meter.report())}\nA generated image takes {options.steps} calls.")
    else:
        images = draw_images(pipeline, options.images, options.label, options.seed, **settings)
    metadata = PngImagePlugin.PngInfo()
    told = {"model": str(options.model), "label": options.label, "seed": options.seed, "images": options.images}
    metadata.add_text("settings", json.dumps(told | settings))
    metadata.add_text("software", f"gated-vision-suite {kernels.__version__}")
    drawn = picture(images, options.columns, options.magnify)
    write_atomically(options.output, lambda path: drawn.save(path, pnginfo=metadata))
    print(f"written to {options.output}")
