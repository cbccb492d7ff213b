"""Draws pictures of captions with LINA.

    python -m generation sample "a red circle above a blue square" --output out.png --seed 7 --images 4
    python -m generation sample --prompts captions.txt --output pictures --images 2
    torchrun --nproc-per-node 2 -m generation sample --prompts captions.txt --output pictures

An output that ends in .png is one picture, of all images side by side; any other is a folder with a file for each
image, and those that are there already are not drawn again. Every file holds the prompt, the seed and the settings in
its metadata: the image with seed s is the same alone and among others.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image, PngImagePlugin
from tqdm import tqdm

SMALL_SIDE, SHOWN_SIDE = 128, 256  # pixels: smaller pictures are magnified about to the latter


@dataclass(frozen=True)
class Job:
    """One image to be drawn."""

    prompt: str
    seed: int
    path: Path


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m generation sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("prompt", nargs="?", help='what to draw; "" for anything')
    what.add_argument("--prompts", type=Path, help="text file with a prompt in each line")
    parser.add_argument("--output", type=Path, required=True, help="a .png file, or a folder")
    parser.add_argument("--model", default="shapes", help="shapes, openmoji, or the folder of a model")
    parser.add_argument("--images", type=int, default=1, help="images of each prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the first image of each prompt; the next ones count on")
    parser.add_argument("--negative", help="what guidance leads away from")
    parser.add_argument("--steps", type=int, help="steps of autoregression")
    parser.add_argument("--diffusion-steps", type=int, help="steps in which a token is drawn")
    parser.add_argument("--guidance", type=float, help="1 is none")
    parser.add_argument("--order", choices=("random", "raster", "spiral"), default="random", help="of the tokens")
    parser.add_argument("--fast", action="store_true", help="fewer steps, at some loss of quality")
    parser.add_argument("--height", type=int, help="in pixels, before magnification")
    parser.add_argument("--width", type=int, help="in pixels, before magnification")
    parser.add_argument("--batch", type=int, default=16, help="images drawn at once")
    parser.add_argument("--magnify", type=int, help="whole factor on the size; small pictures are shown at about 256")
    parser.add_argument("--animation", type=Path, help="also write the steps of the first image as .gif or .webp")
    parser.add_argument("--device", help="cpu, cuda, ...; a GPU if there is one")
    options = parser.parse_args(arguments)
    for name in ("images", "batch", "steps", "diffusion_steps", "magnify"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed is {options.seed}; it must be from 0 to 2^63 - 1")
    if options.prompts is not None and options.output.suffix == ".png":
        parser.error(f"--output is {options.output}; with --prompts it must be a folder")
    if options.prompts is not None and not options.prompts.is_file():
        parser.error(f"--prompts is {options.prompts}; there is no such file")
    return options


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """All images that are asked for, in order."""
    if options.prompts is None:
        prompts = [options.prompt]
    else:
        lines = options.prompts.read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompts {options.prompts} holds no prompts")
    jobs = []
    for number, prompt in enumerate(prompts):
        name = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "anything"
        for seed in range(options.seed, options.seed + options.images):
            jobs.append(Job(prompt, seed, options.output / f"{number:05d}-{name}-{seed}.png"))
    return jobs


def own_share(jobs: Sequence[Job]) -> Sequence[Job]:
    """The jobs of this process among those that torchrun started."""
    return jobs[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the pipeline is called with, without the prompts; what was not asked for is left to it."""
    settings = {
        "num_inference_steps": options.steps,
        "num_diffusion_steps": options.diffusion_steps,
        "guidance_scale": options.guidance,
        "height": options.height,
        "width": options.width,
        "order": options.order,
        "fast": options.fast or None,
    }
    return {name: value for name, value in settings.items() if value is not None}


def draw(pipeline: Any, jobs: Sequence[Job], options: argparse.Namespace) -> Iterator[tuple[Job, Image.Image]]:
    """Pictures of the jobs, batch by batch."""
    settings = settings_of(options)
    for start in range(0, len(jobs), options.batch):
        batch = jobs[start : start + options.batch]
        output = pipeline(
            [job.prompt for job in batch],
            negative_prompt=options.negative,
            generator=[torch.Generator().manual_seed(job.seed) for job in batch],
            return_steps=options.animation is not None and start == 0,
            **settings,
        )
        if output.steps is not None:
            from generation.lina.pipeline import save_animation

            save_animation(output.steps[0], options.animation, magnify=magnification(output.images[0], options))
        yield from zip(batch, output.images, strict=True)


def magnification(picture: Image.Image, options: argparse.Namespace) -> int:
    """The factor asked for; without one, of small pictures, what brings them to about `SHOWN_SIDE` pixels."""
    if options.magnify is not None:
        return options.magnify
    side = max(picture.size)
    return max(1, SHOWN_SIDE // side) if side < SMALL_SIDE else 1


def save(picture: Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    """Write a PNG with `metadata`, whole or not at all."""
    information = PngImagePlugin.PngInfo()
    for name, value in metadata.items():
        information.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            picture.save(file, "PNG", pnginfo=information)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def beside_each_other(pictures: Sequence[Image.Image]) -> Image.Image:
    """One picture of all, in a row."""
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    return sheet


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    as_file = options.output.suffix == ".png"
    folder = options.output.parent if as_file else options.output
    try:
        jobs = jobs_of(options)
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    if not as_file:
        jobs = own_share(jobs)
        waiting = [job for job in jobs if not job.path.exists()]
        if len(waiting) < len(jobs):
            print(f"{len(jobs) - len(waiting)} of {len(jobs)} pictures are there already")
        jobs = waiting
    if not jobs:
        return
    from generation.lina.shipped_models import load_pipeline

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        pipeline = load_pipeline(options.model)
        pipeline.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        pipeline.set_progress_bar_config(disable=True)
        metadata = {"model": options.model, "settings": settings_of(options) | {"negative": options.negative}}
        pictures = []
        for job, picture in tqdm(draw(pipeline, jobs, options), total=len(jobs), unit="image"):
            factor = magnification(picture, options)
            picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
            if as_file:
                pictures.append(picture)
            else:
                save(picture, job.path, {"prompt": job.prompt, "seed": job.seed, **metadata})
        if as_file:
            seeds = [job.seed for job in jobs]
            seed = seeds[0] if len(seeds) == 1 else seeds
            save(beside_each_other(pictures), options.output, {"prompt": jobs[0].prompt, "seed": seed, **metadata})
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.output}")
