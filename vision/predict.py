"""`python -m vision predict`: classify image files with a trained model."""

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
from jsonargparse import ArgumentParser
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from training_runs.atomic_files import write_atomically
from vision.image_files import ImageFileError, find_images, open_image
from vision.model_files import load_model


class Classifier:
    """A trained model with the preprocessing and the label names of its `pretrained_cfg`.

    Args:
        model: a timm classifier.
        invert: what to do with a grey model and a picture whose background is on the other side of mid-grey than that
            of the training images (a dark digit on white paper, for MNIST): `auto` inverts the picture then.
    """

    def __init__(self, model: nn.Module, invert: Literal["auto", "always", "never"] = "auto") -> None:
        if invert not in ("auto", "always", "never"):
            raise ValueError(f"invert is {invert!r}; valid are 'auto', 'always' and 'never'")
        self.model, self.invert = model.eval(), invert
        description = model.pretrained_cfg
        self.labels = list(description.get("label_names") or map(str, range(model.num_classes)))
        config = timm.data.resolve_data_config(pretrained_cfg=description)
        self.grey = config["input_size"][0] == 1
        self.dark_background = self.grey and config["mean"][0] < 0.5
        self.transform = timm.data.create_transform(**config, is_training=False)

    def read(self, path: Path) -> Tensor:
        """Decode and preprocess one file: (C, H, W). Raises `ImageFileError` for a bad one."""
        image = open_image(path, "L" if self.grey else "RGB")
        if self.invert == "always" or (self.invert == "auto" and self.grey and self._is_reversed(image)):
            image = ImageOps.invert(image)
        return self.transform(image)

    def _is_reversed(self, image: Image.Image) -> bool:
        levels = np.asarray(image)
        border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
        return bool((np.median(border) > 127) == self.dark_background)

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Softmax over the classes, (B, classes), of preprocessed images (B, C, H, W)."""
        return self.model(images).softmax(-1)


def classify(
    classifier: Classifier, paths: Sequence[Path], batch_size: int, progress: bool
) -> Iterator[tuple[Path, Tensor | ImageFileError]]:
    """Yield each path with its probabilities (classes,), or with the error of a bad file, in order."""
    starts = range(0, len(paths), batch_size)
    for start in tqdm(starts, "classifying", unit="batch", disable=not progress, leave=False):
        batch = paths[start : start + batch_size]
        outcomes: list[Tensor | ImageFileError] = []
        for path in batch:
            try:
                outcomes.append(classifier.read(path))
            except ImageFileError as error:
                outcomes.append(error)
        images = [outcome for outcome in outcomes if isinstance(outcome, Tensor)]
        rows = iter(classifier.probabilities(torch.stack(images)) if images else ())
        yield from zip(batch, (next(rows) if isinstance(x, Tensor) else x for x in outcomes), strict=True)


def predict(
    images: list[str],
    checkpoint: str,
    output: str | None = None,
    top: int = 5,
    batch_size: int = 64,
    invert: Literal["auto", "always", "never"] = "auto",
) -> int:
    """Classify images and print the most probable classes of each, or write a CSV of all probabilities.

    Bad files are named with their error, in the CSV's column `error` and at the end; they never stop the others.

    Args:
        images: files, or folders that are searched through.
        checkpoint: the trained model: its folder, a run's folder, a .ckpt file, or a pretrained timm name.
        output: CSV to write: path, class, probability, error, and a column of probabilities for each class.
        top: classes printed of each image, where no CSV is written.
        batch_size: images classified at a time.
        invert: `auto` inverts a picture for a grey model when its background is on the wrong side of mid-grey.

    Returns:
        The number of bad files.

    Raises:
        ValueError: the checkpoint, a path or the output's folder does not exist, or a number is below 1.
    """
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it is at least 1")
    if output and not Path(output).resolve().parent.is_dir():
        raise ValueError(f"output is {output!r}; its folder does not exist")
    paths = find_images(images)
    classifier = Classifier(load_model(checkpoint), invert)
    outcomes = classify(classifier, paths, batch_size, progress=len(paths) > 1 and sys.stderr.isatty())
    labels = classifier.labels
    bad = _write_table(labels, outcomes, Path(output)) if output else _print(labels, outcomes, top)
    for error in bad:
        print(f"cannot be used: {error}", file=sys.stderr)
    written = f", {output} written" if output else ""
    print(f"{len(paths) - len(bad)} images classified, {len(bad)} bad files{written}")
    return len(bad)


def _write_table(labels: list[str], outcomes: Iterator, output: Path) -> list[ImageFileError]:
    bad = []

    def write(path: str) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "class", "probability", "error", *labels])
            for image, outcome in outcomes:
                if isinstance(outcome, ImageFileError):
                    bad.append(outcome)
                    rows.writerow([image, "", "", outcome, *[""] * len(labels)])
                else:
                    probability, best = outcome.max(0)
                    values = [f"{value:.6f}" for value in outcome.tolist()]
                    rows.writerow([image, labels[int(best)], f"{float(probability):.6f}", "", *values])

    write_atomically(output, write)
    return bad


def _print(labels: list[str], outcomes: Iterator, top: int) -> list[ImageFileError]:
    bad = []
    for path, outcome in outcomes:
        if isinstance(outcome, ImageFileError):
            bad.append(outcome)
            continue
        print(path)
        values, classes = outcome.topk(min(top, len(labels)))
        for value, label in zip(values.tolist(), classes.tolist(), strict=True):
            print(f"  {value:7.2%}  {labels[label]}")
    return bad


def main(arguments: list[str]) -> None:
    """Parse the command line; exits with status 1 when a file was bad."""
    parser = ArgumentParser(prog="python -m vision predict", description=predict.__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="+", help="files, or folders that are searched through")
    parser.add_function_arguments(predict, skip={"images"}, as_positional=False)
    settings = parser.parse_args(arguments)
    try:
        bad = predict(**settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if bad else 0)
