"""`python -m vision explain`: one picture of what a gated backbone does with an image.

It shows the image with the chosen patch, the receptive field of that patch, and the decays and gates of one block; see
`vision.model_insight`, whose `look_inside` gives the numbers.
"""

import math
import sys
from itertools import takewhile
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize

from training_runs.atomic_files import write_atomically
from vision.explanation_pictures import describe_receptive_field, draw_insight
from vision.image_files import open_image
from vision.model_files import load_model
from vision.model_insight import Insight, blocks_by_stage, check_index, look_inside
from vision.predict import Classifier

_CLASSES_PRINTED = 5


def explain(
    image: str,
    model: str,
    output: str = "explain.png",
    row: int | None = None,
    column: int | None = None,
    stage: int | None = None,
    block: int | None = None,
    image_size: int | None = None,
    untrained: bool = False,
    invert: Literal["auto", "always", "never"] = "auto",
) -> Insight:
    """Draw decays, gates and the receptive field of a patch; print the picture's path and the most probable classes.

    Args:
        image: file.
        model: the model's folder, a run's folder, a .ckpt file, or a timm name of a ViG, RMT or Gated-SwinRMT model
            (with random weights if no trained ones are known).
        output: PNG to write.
        row: row of the image's pixel whose patch is looked at; the centre if None.
        column: its column; the centre if None.
        stage: index of the stage, 0 for the first (a plain ViG has but one); the last one with a map of 4 x 4 or more
            if None.
        block: index of the block in the stage; the last if None.
        image_size: pixels to which the image is resized for the model; those of its training if None.
        untrained: take random weights for a timm name, even where trained ones are known.
        invert: `auto` inverts a picture for a grey model when its background is on the wrong side of mid-grey.

    Returns:
        What was drawn.

    Raises:
        ValueError: the image, the model or the output's folder does not exist or is of the wrong kind, or a number is
            out of range.
    """
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise ValueError(f"output is {output!r}; its name must end in .png")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"output is {output!r}; its folder does not exist")
    file = Path(image)
    full = open_image(file, "L")
    backbone, trained = _load(model, untrained)
    blocks_by_stage(backbone)  # refuses other models
    if image_size is not None:
        _resize_input(backbone, image_size)
    classifier = Classifier(backbone, invert)

    rows, columns = coordinates_seen(classifier.transform, full.height, full.width)
    pixel = (
        _place("row", full.height // 2 if row is None else row, full.height, rows),
        _place("column", full.width // 2 if column is None else column, full.width, columns),
    )
    seen = classifier.read(file)
    insight = look_inside(backbone, seen, pixel, stage, block)
    values, classes = classifier.probabilities(seen[None])[0].topk(min(_CLASSES_PRINTED, len(classifier.labels)))
    best = [(classifier.labels[index], value) for value, index in zip(values.tolist(), classes.tolist(), strict=True)]

    down, along = insight.size
    patch = "patch at row {}, column {}".format(*insight.token)
    where = f"stage {insight.stage}, block {insight.block}, {patch} of {down} x {along}"
    no_gates = "" if insight.gates else ", no gates"
    what = f"{best[0][0]}, {100 * best[0][1]:.1f} %" if trained else "random weights, nothing was learned"
    title = f"{model}: {where}{no_gates}\n{file.name}: {what}"
    (top, bottom), (left, right) = _borders(rows), _borders(columns)
    extent = (left, right, bottom, top)
    figure = draw_insight(insight, _as_picture(classifier.transform, seen), title, extent)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=100))

    print(f"{output} written")
    for label, value in best:
        print(f"  {value:7.2%}  {label}")
    print(where)
    if not insight.gates:
        print(f"{type(backbone).__name__} has no gates in this block")
    print(f"receptive field: {describe_receptive_field(insight.receptive_field)}")
    return insight


def coordinates_seen(transform: Compose, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where the rows (h,) and columns (w,) of a model's input lie in an image of this size before `transform`.

    Whatever resizing and cropping stands before the conversion to a tensor, it is applied to images of coordinates.
    """
    before = takewhile(lambda step: not type(step).__name__.endswith("ToTensor"), transform.transforms)
    geometry = Compose(list(before))
    rows, columns = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    images = (Image.fromarray(np.broadcast_to(places, (height, width))) for places in (rows, columns))
    down, along = (np.asarray(geometry(each)) for each in images)
    return _straightened(down[:, down.shape[1] // 2], height), _straightened(along[along.shape[0] // 2], width)


def _straightened(coordinates: np.ndarray, length: int) -> Tensor:
    """Coordinates along an axis of `length` pixels, without the bends that resizing makes at the borders."""
    count = len(coordinates)
    near, far = count // 4, count - 1 - count // 4
    step = float(coordinates[far] - coordinates[near]) / (far - near) if far > near else float(length)
    centre = float(coordinates[far] + coordinates[near]) / 2
    return centre + step * (torch.arange(count) - (count - 1) / 2)


def _place(name: str, index: int, length: int, seen: Tensor) -> int:
    """The place in `seen` that is nearest to the pixel `index`."""
    check_index(name, index, length)
    first, last = _borders(seen)
    if not first - 0.5 <= index <= last + 0.5:
        valid = f"{max(math.ceil(first), 0)} .. {min(math.floor(last), length - 1)}"
        raise ValueError(f"{name} is {index}; the model's centre crop leaves {valid}")
    return int((seen - index).abs().argmin())


def _borders(seen: Tensor) -> tuple[float, float]:
    """Where the first pixel begins and the last one ends."""
    reach = float(seen[-1] - seen[0]) / (len(seen) - 1) / 2 if len(seen) > 1 else 0.5
    return float(seen[0]) - reach, float(seen[-1]) + reach


def _as_picture(transform: Compose, seen: Tensor) -> np.ndarray:
    """The input of a model (C, h, w) as a picture again, (h, w, 3) or (h, w) in 0 .. 1."""
    for step in reversed(transform.transforms):
        if isinstance(step, Normalize):
            mean, std = (torch.as_tensor(x, dtype=seen.dtype).view(-1, 1, 1) for x in (step.mean, step.std))
            seen = seen * std + mean
    picture = seen.clamp(0, 1).permute(1, 2, 0).numpy()
    return picture[..., 0] if picture.shape[-1] == 1 else picture


def _load(model: str, untrained: bool) -> tuple[nn.Module, bool]:
    """A trained model, or one with random weights, the same in each process, if `model` is a name without trained ones
    or `untrained` is set; and whether it is trained."""
    if Path(model).exists():
        if untrained:
            raise ValueError(f"model is {model!r}, a file or folder; untrained is for timm names")
        return load_model(model), True
    own = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("vision.")]
    trained = timm.is_model(model) and timm.models.is_model_pretrained(model)
    if model.partition(".")[0] not in own or not (trained or model in own):
        raise ValueError(f"model is {model!r}; valid are files, folders, {', '.join(own)} (or with a tag)")
    if trained and not untrained:
        try:
            return load_model(model), True
        except ConnectionError as error:
            raise ValueError(f"{error}; or set untrained for random weights") from error
    print(f"{model} has random weights: what is shown was not learned", file=sys.stderr)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(model), False


def _resize_input(backbone: nn.Module, image_size: int) -> None:
    if image_size < 1:
        raise ValueError(f"image_size is {image_size}; it is at least 1")
    channels = backbone.pretrained_cfg["input_size"][0]
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, "input_size": (channels, image_size, image_size)}


def main(arguments: list[str]) -> None:
    """Parse the command line; exits with status 1 when something cannot be used."""
    parser = ArgumentParser(prog="python -m vision explain", description=explain.__doc__.partition("\n")[0])
    parser.add_argument("image", help="file")
    parser.add_function_arguments(explain, skip={"image"}, as_positional=False)
    settings = parser.parse_args(arguments)
    try:
        explain(**settings)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
