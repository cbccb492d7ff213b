"""Options of the commands of spiking diffusion, read before anything is imported that takes seconds."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from generation.argument_checks import SEEDS, check_numbers, check_whole
from generation.model_folders import INDEX
from generation.spiking_diffusion.shipped_models import check_model, models_there
from training_runs.atomic_files import prepare_output

LIMITS = {
    "images": (1, 4096),
    "steps": (1, 1000),
    "snn_timesteps": (1, 1024),
    "seed": SEEDS,
    "seeds": (0, 4000),  # times `evaluation.SEED_STRIDE` they are still seeds
    "magnify": (1, 64),
    "guidance": (0, 1e6),
    "columns": (1, 4096),
}
SETS = "digits, mnist5k, openmoji, or a folder of images (default: %(default)s)"

SAMPLE = """Draws images with a spiking diffusion model.

    python -m generation sample-spiking --label 7 --images 64 --output grid.png

writes one picture of all images, with all settings in its metadata. --threshold is threshold guidance: below the
trained one (1) neurons fire more easily."""

EVALUATE = """How good images of spiking models are, beside real images and noise.

    python -m generation evaluate-spiking digits digits-ann

draws images of all classes in turn with each model and prints the Frechet distance to the real images, of features of
a small classifier trained on four fifths of them (no FID), and the share of images in which it sees the class asked
for; and the same of the other fifth and of uniform noise. Writes scores.json and a picture of the drawn images."""

SWEEP = """Threshold guidance: quality against the threshold of the neurons.

    python -m generation sweep-threshold digits

draws images at every threshold, prints and plots quality, picks the threshold with the least Frechet distance, and
compares it with the trained one on a seed that had no part in the choice."""

ENERGY = """What drawing with a spiking model costs, beside its artificial twin.

    python -m generation energy digits --twin digits-ann

draws a few images with DDIM, counts what each layer does, and prints it with three models of energy: the formula of the
paper, a corrected one, and the Bit Budget. The folder gets energy.json, firing_rates.png (of each layer's input),
energy.png and raster.png (spikes of the first image). Without --twin, the twin is one that runs each of the model's
layers once, on real values."""

CONVERT = """Makes a spiking network of a trained quantised one.

    python -m generation convert-spiking runs/spiking_digits_quantized/0 --tune 120 --output runs/converted

copies the weights, puts neurons that spike for 2**bits - 1 time steps in place of the activations, lets each block
learn to repeat what the quantised block says, if asked to, prints how far the predictions are apart, and saves the
network as a pipeline."""


def parser_of(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m generation {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def models() -> str:
    return ", ".join([*models_there(), "or the folder of a model or run"])


def check_for_model(options: argparse.Namespace, model: Path) -> None:
    """What can be asked of a model, by its configuration: PyTorch is not waited for.

    Raises:
        ValueError: an option is out of range, or not for such a model.
    """
    try:
        config = json.loads((model / "unet" / "config.json").read_text())
    except (OSError, json.JSONDecodeError):
        return  # loading the model will say it
    kind, spiking = config.get("_class_name"), config.get("neuron") not in (None, "silu")
    given = {name: value for name, value in vars(options).items() if value is not None}
    if "steps" in given:
        check_whole("--steps", given["steps"], 1, config.get("num_train_timesteps", 1000))
    if (threshold := given.get("threshold")) is not None:
        if not (math.isfinite(threshold) and threshold > 0):
            raise ValueError(f"--threshold is {threshold}; it must be a finite number above 0")
        if not spiking:
            raise ValueError(f"--threshold is {threshold}; this model, a {kind}, has no neurons with a trained one")
    if (steps := given.get("snn_timesteps")) is not None:
        if config.get("neuron") == "silu":
            raise ValueError(f"--snn-timesteps is {steps}; the twin has no time steps")
        if not spiking:
            raise ValueError(f"--snn-timesteps is {steps}; of a {kind} they cannot be changed")
        check_whole("--snn-timesteps", steps, 1, config["snn_timesteps"] if config.get("tsm") else None)
    classes = config.get("num_class_embeds")
    if (label := given.get("label")) is not None:
        if not classes:
            raise ValueError(f"--label is {label}; this model knows no classes")
        check_whole("--label", label, 0, classes - 1)
    if not classes and given.get("guidance", 1) != 1:
        raise ValueError(f"--guidance is {given['guidance']}; this model knows no classes, so it must be 1")


def sample_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of("sample-spiking", SAMPLE)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="a .png file")
    add("--model", default="digits", help=f"{models()} (default: %(default)s)")
    add("--label", type=int, help="class of all images (default: all classes in turn)")
    add("--images", type=int, default=64, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of the first image; the next ones count on (default: %(default)s)")
    add("--steps", type=int, default=25, help="of DDIM (default: %(default)s)")
    add("--threshold", type=float, help="at which neurons fire (default: as trained)")
    add("--snn-timesteps", type=int, help="for which neurons spike (default: as trained)")
    add("--guidance", type=float, default=1.0, help="of the class; 1 is none (default: %(default)s)")
    add("--columns", type=int, help="of the picture (default: about the square root of --images)")
    add("--magnify", type=int, default=4, help="whole factor on the size (default: %(default)s)")
    add("--energy", action="store_true", help="also count synaptic operations and print their energy")
    options = parser.parse_args(arguments)
    check_numbers(parser, options, LIMITS)
    if options.output.suffix.lower() != ".png":
        parser.error(f"--output is {options.output}; it must end in .png")
    check_for_model(options, check_model(options.model))
    prepare_output("--output", options.output)
    return options


def evaluate_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of("evaluate-spiking", EVALUATE)
    add = parser.add_argument
    add("models", nargs="*", default=["digits", "digits-ann"], help=f"{models()} (default: digits digits-ann)")
    add("--data", default="digits", help=SETS)
    add("--images", type=int, default=400, help="of each model and seed (default: %(default)s)")
    add("--steps", type=int, nargs="+", default=[25], help="of DDIM (default: 25)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    add("--output", type=Path, default=Path("runs/spiking_scores"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    check_numbers(parser, options, LIMITS | {"images": (20, 100_000)})
    for model in options.models:
        check_model(model)
    prepare_output("--output", options.output, as_folder=True)
    return options


def sweep_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of("sweep-threshold", SWEEP)
    add = parser.add_argument
    add("model", nargs="?", default="digits", help=f"{models()} (default: %(default)s)")
    thresholds = [0.9, 0.95, 0.98, 0.99, 1.0, 1.01, 1.02, 1.05, 1.1, 1.2, 1.3, 1.4, 1.6, 2.0]
    add("--thresholds", type=float, nargs="+", default=thresholds, help=f"(default: {' '.join(map(str, thresholds))})")
    add("--data", default="digits", help=SETS)
    add("--images", type=int, default=400, help="at each threshold and seed (default: %(default)s)")
    add("--steps", type=int, default=25, help="of DDIM (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="among which the best is picked (default: 0 1)")
    add("--held-out-seed", type=int, default=1000, help="on which it is compared (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/threshold_sweep"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    check_numbers(
        parser, options, LIMITS | {"images": (20, 100_000), "held_out_seed": LIMITS["seeds"], "thresholds": (0, 1e6)}
    )
    if 0.0 in options.thresholds:
        parser.error("--thresholds holds 0; they must be above 0")
    if options.held_out_seed in options.seeds:
        parser.error(f"--held-out-seed is {options.held_out_seed}; it must not be one of --seeds")
    check_model(options.model)
    prepare_output("--output", options.output, as_folder=True)
    return options


def energy_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of("energy", ENERGY)
    add = parser.add_argument
    add("model", nargs="?", default="digits", help=f"{models()} (default: %(default)s)")
    add("--twin", help="its artificial twin (neuron: silu), a name or folder too")
    add("--output", type=Path, default=Path("runs/spiking_energy"), help="folder (default: %(default)s)")
    add("--images", type=int, default=16, help="that are drawn, of all classes in turn (default: %(default)s)")
    add("--steps", type=int, default=25, help="of DDIM (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--threshold", type=float, help="of all neurons (default: what they were trained with)")
    options = parser.parse_args(arguments)
    check_numbers(parser, options, LIMITS)
    check_for_model(options, check_model(options.model))
    if options.twin is not None:
        check_model(options.twin)
    prepare_output("--output", options.output, as_folder=True)
    return options


def convert_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of("convert-spiking", CONVERT)
    add = parser.add_argument
    add("model", help="the folder of a trained quantised model or its run")
    add("--output", type=Path, required=True, help="folder of the pipeline")
    add("--data", default="digits", help=SETS)
    add("--snn-timesteps", type=int, help="for which neurons spike (default: 2**bits - 1)")
    add("--signed", action="store_true", help="let neurons take back spikes")
    add("--tune", type=int, default=0, help="updates of each block; 0 for none (default: %(default)s)")
    add("--learning-rate", type=float, default=2e-3, help="of the updates (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the updates and of the comparison (default: %(default)s)")
    options = parser.parse_args(arguments)
    check_numbers(parser, options, LIMITS | {"tune": (0, 1_000_000), "learning_rate": (1e-12, 1.0)})
    check_model(options.model)
    prepare_output("--output", options.output, as_folder=True)
    source = check_model(options.model).resolve()
    if options.output.resolve() in (source, *source.parents):
        parser.error(f"--output is {options.output}, in which the model lies; it must be another folder")
    if any(options.output.iterdir()) and not (options.output / INDEX).is_file():
        parser.error(f"--output is {options.output}, a folder of other files; it must be new, empty, or a pipeline's")
    return options
