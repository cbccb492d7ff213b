"""Options of the commands of radiance fields, read before anything is imported that takes seconds."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from generation.argument_checks import check_numbers
from generation.radiance_field.shipped_fields import check_field, fields_there
from training_runs.atomic_files import prepare_output

LIMITS = {"frames": (1, 100_000), "rate": (1, 240), "memory": (1, 1 << 20)}
LARGEST_SIDE = 16384  # pixels

RENDER = """Flies through a trained radiance field.

    python -m generation render city --path orbit --output fly.mp4

writes fly.mp4, fly-depth.mp4 and, of a mixture, fly-expert.mp4 (which expert owns which pixel), and all frames as
pictures into the folder fly/. Stopped and started again it goes on; `torchrun` shares the frames out.

Orbit and spiral go about the lowest side of the scene's box; which way is up is found by the training cameras."""


def size(text: str) -> tuple[int, int]:
    """(width, height) of a text like 320x240; even, for the encoder cuts off the last of an odd number of pixels."""
    parts = text.lower().split("x")
    valid = range(2, LARGEST_SIDE + 1, 2)
    if len(parts) != 2 or not all(part.isdecimal() and int(part) in valid for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r}; it must be WIDTHxHEIGHT, even, from 2 to {LARGEST_SIDE} pixels each"
        )
    return int(parts[0]), int(parts[1])


def render_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m generation render",
        description=RENDER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    models = f"{', '.join([*fields_there(), 'the folder of a training run or a renderer'])} (default: %(default)s)"
    add("model", nargs="?", default="city", help=models)
    add("--path", choices=("orbit", "spiral", "views"), default="orbit", help="of the camera (default: %(default)s)")
    add("--frames", type=int, default=60, help="of the flight (default: %(default)s)")
    add("--size", type=size, help="WIDTHxHEIGHT in pixels (default: the training pictures', the longer side 320)")
    add("--rate", type=int, default=24, help="frames a second (default: %(default)s)")
    add("--memory", type=int, default=512, help="MiB that activations may take, about (default: %(default)s)")
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--output", type=Path, default=Path("fly.mp4"), help="video file, ending in .mp4 (default: %(default)s)")
    options = parser.parse_args(arguments)
    check_numbers(parser, options, LIMITS)
    if options.output.suffix.lower() != ".mp4":
        parser.error(f"--output is {options.output}; it must end in .mp4")
    check_field(options.model)
    prepare_output("--output", options.output)
    prepare_output("--output", options.output.with_suffix(""), as_folder=True)
    return options
