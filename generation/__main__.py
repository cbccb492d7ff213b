"""The command line of image generation.

    python -m generation sample "a red circle above a blue square" --output out.png    draw pictures of captions (LINA)
    python -m generation fit --config configs/generation/lina_shapes.yaml              train a model
    python -m generation validate --config configs/generation/lina_shapes.yaml         its losses on validation data
    python -m generation evaluate shapes                                               score a model with the checker
    python -m generation evaluate-openmoji                                             what a model of OpenMoji draws
    python -m generation ablation --config configs/generation/lina_ablation.yaml       what its parts are worth
    python -m generation sample-spiking --label 7 --output grid.png                    draw images (spiking diffusion)
    python -m generation evaluate-spiking digits digits-ann                            their quality
    python -m generation sweep-threshold digits                                        quality by the neurons' threshold
    python -m generation energy digits --twin digits-ann                               what neurons do, and its energy
    python -m generation convert-spiking runs/quantized/0 --output runs/converted      quantised to spiking
    python -m generation render city --path orbit --output fly.mp4                     fly through a radiance field
    python -m generation compare-fields --config configs/generation/city_comparison.yaml
                                                                                       radiance fields side by side
    python -m generation benchmark lina                                                speed of the models

Each takes --help.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from generation.argument_checks import check_numbers
from generation.lina.sample import LIMITS
from generation.lina.shipped_models import check_model, models_there
from generation.radiance_field import commands as radiance
from generation.spiking_diffusion import commands as spiking
from training_runs.atomic_files import prepare_output

HOME_OF = {
    "fit": "generation.training",
    "validate": "generation.training",
    "sample": "generation.lina.sample",
    "evaluate": "generation.lina.shape_scores",
    "evaluate-openmoji": "generation.lina.openmoji_scores",
    "ablation": "generation.lina.ablation",
    "sample-spiking": "generation.spiking_diffusion.sample",
    "render": "generation.radiance_field.render",
    "compare-fields": "generation.radiance_field.comparison",
    "evaluate-spiking": "generation.spiking_diffusion.evaluation:evaluate",
    "sweep-threshold": "generation.spiking_diffusion.evaluation:sweep",
    "energy": "generation.spiking_diffusion.energy_report",
    "convert-spiking": "generation.spiking_diffusion.conversion",
    "benchmark": "generation.benchmark",
}
INTERRUPTED = 130  # exit code, as of shells
COUNTS = {"prompts": (1, 100_000), "pictures": (1, 100_000)}

EVALUATE = """How well a model draws what captions say: the checker's scores of held-out prompts.

    python -m generation evaluate shapes --prompts 500 --guidance 1 3 --steps 16 8 4

prints a table of all combinations and writes it as JSON."""

EVALUATE_OPENMOJI = """What a model of OpenMoji draws, beside what it was trained on and what was held out.

    python -m generation evaluate-openmoji openmoji --output runs/openmoji_scores

draws the held-out captions and as many training captions as asked for, saves both as grids, and prints the Frechet
distance of EfficientNet-Lite0 features (no FID) beside the training set's own split halves, and how near the pictures
are to their nearest training pictures.

All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0."""


def evaluation_parser(command: str, description: str, model: str) -> argparse.ArgumentParser:
    """With what both evaluations take."""
    parser = argparse.ArgumentParser(
        prog=f"python -m generation {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models = ", ".join([*models_there(), "or the folder of a model"])
    parser.add_argument("model", nargs="?", default=model, help=f"{models} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    return parser


def checked(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with numbers in range, a model that is there, and outputs that can be written."""
    options = parser.parse_args(arguments)
    check_numbers(parser, options, LIMITS | COUNTS)
    grid = getattr(options, "grid", None)
    if grid is not None and grid.suffix.lower() != ".png":
        parser.error(f"--grid is {grid}; it must end in .png")
    check_model(options.model)
    prepare_output("--output", options.output, as_folder=parser.prog.endswith("openmoji"))
    if grid is not None:
        prepare_output("--grid", grid)
    return options


def evaluate_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = evaluation_parser("evaluate", EVALUATE, "shapes")
    add = parser.add_argument
    add("--prompts", type=int, default=500, help="held-out prompts of each level (default: %(default)s)")
    levels, default = ("single", "above", "pairs"), ["single", "pairs"]
    add("--levels", nargs="+", choices=levels, default=default, help="of captions (default: single pairs)")
    add("--guidance", type=float, nargs="+", default=[1.0, 3.0], help="1 is none (default: 1 3)")
    add("--steps", type=int, nargs="+", default=[16, 8, 4], help="of autoregression (default: 16 8 4)")
    add("--diffusion-steps", type=int, nargs="+", default=[10], help="in which a token is drawn (default: 10)")
    add("--fast", action="store_true", help="also each setting with fast=True")
    add("--output", type=Path, default=Path("runs/lina_scores.json"), help="JSON file (default: %(default)s)")
    add("--grid", type=Path, help="also draw 24 captions of the last level as this .png picture")
    return checked(parser, arguments)


def evaluate_openmoji_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = evaluation_parser("evaluate-openmoji", EVALUATE_OPENMOJI, "openmoji")
    add = parser.add_argument
    add("--guidance", type=float, default=3.0, help="1 is none (default: %(default)s)")
    add("--steps", type=int, default=36, help="of autoregression (default: %(default)s)")
    add("--diffusion-steps", type=int, default=10, help="in which a token is drawn (default: %(default)s)")
    pictures = "of training captions, for the Frechet distance (default: %(default)s)"
    add("--pictures", type=int, default=1000, help=pictures)
    output = "folder of grids and JSON (default: %(default)s)"
    add("--output", type=Path, default=Path("runs/openmoji_scores"), help=output)
    return checked(parser, arguments)


# Read here and not in their homes, which import for seconds what --help and errors need not wait for.
OPTIONS_OF: dict[str, Callable[[Sequence[str]], argparse.Namespace]] = {
    "evaluate": evaluate_options,
    "evaluate-openmoji": evaluate_openmoji_options,
    "sample-spiking": spiking.sample_options,
    "evaluate-spiking": spiking.evaluate_options,
    "sweep-threshold": spiking.sweep_options,
    "energy": spiking.energy_options,
    "convert-spiking": spiking.convert_options,
    "render": radiance.render_options,
}


def main(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command not in HOME_OF:
        sys.exit(f"unknown command {command!r}; valid are {', '.join(HOME_OF)}")
    try:
        run(command, arguments)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning makes an exit of the interrupt.
        interrupt = stop if isinstance(stop, KeyboardInterrupt) else stop.__context__
        if not isinstance(interrupt, KeyboardInterrupt):
            raise
        print("; ".join(["stopped", *map(str, interrupt.args)]), file=sys.stderr)
        sys.exit(INTERRUPTED)


def run(command: str, arguments: list[str]) -> None:
    """Do what `arguments`, of which `command` is the first, say."""
    home, _, function = HOME_OF[command].partition(":")
    try:
        if command in OPTIONS_OF:
            options = OPTIONS_OF[command](arguments[1:])
        else:
            options = arguments if home == "generation.training" else arguments[1:]
        getattr(import_module(home), function or "main")(options)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
