"""Draws pictures of captions with LINA.

    python -m generation sample "a red circle above a blue square" --output out.png --seed 7 --images 4
    python -m generation sample --prompts captions.txt --output pictures --images 2
    torchrun --nproc-per-node 2 -m generation sample --prompts captions.txt --output pictures

An output that ends in .png is one picture, of all images side by side; any other is a folder with a file for each
image, named by the number of the prompt, its words and the seed. Those that are there already are not drawn again;
one of another prompt or with other settings is an error. Every file holds the prompt, the seed, all settings (with
--fast, the numbers that it leads to) and the suite's version in its metadata: the image with seed s is the same alone
and among others.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, PngImagePlugin
from tqdm import tqdm

import kernels
from generation.argument_checks import SEEDS, check_numbers
from generation.lina.shipped_models import check_model, load_pipeline, models_there
from training_runs.atomic_files import prepare_output, write_atomically

if TYPE_CHECKING:  # torch and diffusers take seconds to import, which --help and errors need not wait for
    import torch

    from generation.lina.sampling_settings import SamplingSettings

SMALL_SIDE, SHOWN_SIDE = 128, 256  # pixels: smaller pictures are magnified about to the latter
OTHER_PICTURES = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
ANIMATIONS = (".gif", ".webp")
# As in `sampling_settings` and `pipeline`, which cannot be imported before the arguments are read.
DEFAULT_STEPS, DEFAULT_DIFFUSION_STEPS, DEFAULT_GUIDANCE = 64, 25, 5.0
LIMITS = {
    "steps": (1, 10_000),
    "diffusion_steps": (1, 10_000),
    "guidance": (0, math.inf),
    "images": (1, math.inf),
    "batch": (1, 4096),
    "magnify": (1, math.inf),
    "height": (1, math.inf),
    "width": (1, math.inf),
    "seed": SEEDS,
}


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
    models = ", ".join([*models_there(), "or the folder of a model"])
    parser.add_argument("--model", default="shapes", help=f"{models} (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1, help="images of each prompt (default: %(default)s)")
    seed = "of the first image of each prompt; the next ones count on (default: %(default)s)"
    parser.add_argument("--seed", type=int, default=0, help=seed)
    parser.add_argument("--negative", help="what guidance leads away from (default: nothing in particular)")
    steps = "steps of autoregression; those beyond the number of tokens are skipped (default: %(default)s)"
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help=steps)
    diffusion = "steps in which a token is drawn (default: %(default)s)"
    parser.add_argument("--diffusion-steps", type=int, default=DEFAULT_DIFFUSION_STEPS, help=diffusion)
    parser.add_argument("--guidance", type=float, default=DEFAULT_GUIDANCE, help="1 is none (default: %(default)s)")
    orders = ("random", "raster", "spiral")
    parser.add_argument("--order", choices=orders, default="random", help="of the tokens (default: %(default)s)")
    fast = "a quarter of --steps and at most 8 diffusion steps, at some loss of quality"
    parser.add_argument("--fast", action="store_true", help=fast)
    own_size = "in pixels, before magnification (default: the model's own)"
    parser.add_argument("--height", type=int, help=own_size)
    parser.add_argument("--width", type=int, help=own_size)
    parser.add_argument("--batch", type=int, default=16, help="images drawn at once (default: %(default)s)")
    magnify = f"whole factor on the size (default: what brings pictures below {SMALL_SIDE} to about {SHOWN_SIDE})"
    parser.add_argument("--magnify", type=int, help=magnify)
    animation = "also write the steps of the first image as .gif or .webp, if that image is drawn"
    parser.add_argument("--animation", type=Path, help=animation)
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    options = parser.parse_args(arguments)
    check_numbers(parser, options, LIMITS)
    if options.output.suffix.lower() in OTHER_PICTURES:
        parser.error(f"--output is {options.output}; a picture must end in .png, anything else is a folder")
    if options.animation is not None and options.animation.suffix.lower() not in ANIMATIONS:
        parser.error(f"--animation is {options.animation}; it must end in {' or '.join(ANIMATIONS)}")
    if options.prompts is not None and is_picture(options.output):
        parser.error(f"--output is {options.output}; with --prompts it must be a folder")
    if options.prompts is not None and not options.prompts.is_file():
        parser.error(f"--prompts is {options.prompts}; there is no such file")
    return options


def is_picture(output: Path) -> bool:
    """Whether all images are to be one picture."""
    return output.suffix.lower() == ".png"


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


def process_number() -> int:
    """Of this process among those that torchrun started."""
    return int(os.environ.get("RANK", 0))


def own_share(jobs: Sequence[Job]) -> Sequence[Job]:
    """The jobs of this process among those that torchrun started."""
    return jobs[process_number() :: int(os.environ.get("WORLD_SIZE", 1))]


def settings_of(options: argparse.Namespace) -> "SamplingSettings":
    """All numbers that images are drawn with."""
    from generation.lina.sampling_settings import SamplingSettings

    settings = SamplingSettings(
        num_inference_steps=options.steps,
        num_diffusion_steps=options.diffusion_steps,
        guidance_scale=options.guidance,
        order=options.order,
    )
    return settings.faster() if options.fast else settings


def draw(
    pipeline: Any, jobs: Sequence[Job], options: argparse.Namespace, settings: dict[str, Any], animated: Job | None
) -> Iterator[tuple[Job, Image.Image]]:
    """Pictures of the jobs, batch by batch; the steps of `animated`, if it is the first of them, are written."""
    import torch

    from generation.lina.painting import save_animation

    for start in range(0, len(jobs), options.batch):
        batch = jobs[start : start + options.batch]
        output = pipeline(
            [job.prompt for job in batch],
            negative_prompt=options.negative,
            generator=[torch.Generator().manual_seed(job.seed) for job in batch],
            return_steps=batch[0] == animated,
            **settings,
        )
        if output.steps is not None:
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
    write_atomically(path, lambda partial: picture.save(partial, "PNG", pnginfo=information))


def beside_each_other(pictures: Sequence[Image.Image]) -> Image.Image:
    """One picture of all, in a row."""
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    return sheet


def is_drawn(job: Job, options: argparse.Namespace) -> bool:
    """Whether the picture of a job is there already, whole.

    Raises:
        ValueError: it is, but of another model or prompt, or with other settings.
    """
    if not job.path.exists():
        return False
    try:
        with Image.open(job.path) as picture:
            picture.load()
            noted = dict(picture.text)
    except OSError:
        return False  # damaged: drawn again
    found = {"model": noted.get("model"), "prompt": noted.get("prompt"), **json.loads(noted.get("settings", "{}"))}
    wanted = {
        "model": options.model,
        "prompt": job.prompt,
        **asdict(settings_of(options)),
        "negative": options.negative,
    }
    wanted |= {name: size for name in ("height", "width") if (size := getattr(options, name)) is not None}
    if other := {name: found.get(name) for name, value in wanted.items() if found.get(name) != value}:
        raise ValueError(
            f"--output holds {job.path.name}, drawn with {other}; choose another folder, or remove the picture"
        )
    return True


def waiting_jobs(options: argparse.Namespace, jobs: Sequence[Job]) -> Sequence[Job]:
    """What this process has to draw; says what it has not."""
    if is_picture(options.output):
        return jobs if process_number() == 0 else []
    own = own_share(jobs)
    waiting = [job for job in own if not is_drawn(job, options)]
    if len(waiting) < len(own):
        print(f"{len(own) - len(waiting)} of {len(own)} pictures are there already")
    if options.animation is not None and process_number() == 0 and jobs[0] not in waiting:
        print(f"no animation was written: {jobs[0].path}, which it would show, is there already")
    return waiting


def device_of(options: argparse.Namespace) -> "torch.device":
    """What to draw on.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if options.device is None:
        return torch.device("cuda" if gpus else "cpu")
    try:
        torch.zeros(1, device=options.device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # as the kind of device has it
        valid = ", ".join(["cpu", *gpus])
        raise ValueError(f"--device is {options.device!r}; valid here are {valid}") from error
    return torch.device(options.device)


def draw_all(options: argparse.Namespace, all_jobs: Sequence[Job], jobs: Sequence[Job]) -> None:
    """Draw and save `jobs`; a `KeyboardInterrupt` says how many of them are finished."""
    from kernels.native import build_ahead

    device = device_of(options)
    if device.type == "cpu":
        build_ahead("native/probe.cpp", "linear_attention/native.cpp")
    from diffusers.utils import logging as diffusers_logging

    settings = settings_of(options)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    pipeline = load_pipeline(options.model)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    height, width = pipeline._check_size(options.height, options.width)
    settings = asdict(settings) | {"height": height, "width": width}
    noted = settings | {"fast": options.fast, "negative": options.negative}
    metadata = {"model": options.model, "settings": noted, "version": kernels.__version__}
    pictures = []
    animated = all_jobs[0] if options.animation is not None else None
    drawing = draw(pipeline, jobs, options, settings, animated)
    finished = 0
    try:
        with tqdm(drawing, total=len(jobs), unit="image") as progress:
            for job, picture in progress:
                factor = magnification(picture, options)
                noted["magnify"] = factor
                picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
                if is_picture(options.output):
                    pictures.append(picture)
                else:
                    save(picture, job.path, {"prompt": job.prompt, "seed": job.seed, **metadata})
                    finished += 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{finished} picture{' is' if finished == 1 else 's are'} finished") from None
    if pictures:
        seeds = [job.seed for job in jobs]
        seed = seeds[0] if len(seeds) == 1 else seeds
        save(beside_each_other(pictures), options.output, {"prompt": jobs[0].prompt, "seed": seed, **metadata})


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    try:
        check_model(options.model)
        all_jobs = jobs_of(options)
        prepare_output("--output", options.output, as_folder=not is_picture(options.output))
        if options.animation is not None:
            prepare_output("--animation", options.animation)
        jobs = waiting_jobs(options, all_jobs)
        if not jobs:
            return
        draw_all(options, all_jobs, jobs)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if is_picture(options.output):
        print(f"wrote {options.output}")
    else:
        print(f"wrote {len(jobs)} picture{'s' * (len(jobs) > 1)} into {options.output}")
