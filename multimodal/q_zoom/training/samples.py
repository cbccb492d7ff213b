"""Samples of Q-Zoom's training: a question about an image with what a stage learns from it, in memory and in folders.

A folder holds `samples.jsonl`, one object a line with the fields of `ZoomSample` that have a value ("image" is a path,
relative to the folder or absolute), and `maps.safetensors` with the attention of line i (from 0) as `i.grounding` and
`i.sink`.
"""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from multimodal.argument_checks import check_choice, check_whole
from multimodal.q_zoom.images import ImageLike, opened

SAMPLES_FILE, MAPS_FILE, IMAGES_FOLDER = "samples.jsonl", "maps.safetensors", "images"
MAPS = ("grounding", "sink")
GREY = (127, 127, 127)  # of padding


@dataclass(frozen=True)
class ZoomSample:
    """A question about an image.

    Args:
        image: a PIL image or the path of one.
        question: as the model is asked.
        answer: the right one; "" if it is not known.
        tokens: so many visual tokens the image is shown at; `None` for the configuration's budget. If `grounding` has
            as many cells, the image is shown on just its rows and columns.
        square: the image is shown in a grey square.
        box: left, top, right, bottom of what the question is about, in pixels of the image as it is shown, finite
            and with an area, or `None`.
        zoom: whether the gate shall open, 1 or 0; `None` if not known.
        grounding: `[rows, columns]`, attention of the answer to the image, for the region proposal's labels.
        sink: `[rows, columns]`, attention that shows sinks.

    Raises:
        ValueError: a field is not as above.
    """

    image: ImageLike
    question: str
    answer: str = ""
    tokens: int | None = None
    square: bool = False
    box: tuple[float, float, float, float] | None = None
    zoom: int | None = None
    grounding: Tensor | None = None
    sink: Tensor | None = None

    def __post_init__(self):
        if not isinstance(self.image, ImageLike):
            raise ValueError(f"image is {self.image!r}; it must be a PIL image or a path")
        if not isinstance(self.question, str) or not self.question.strip():
            raise ValueError(f"question is {self.question!r}; it must be a text that is not empty")
        if not isinstance(self.answer, str):
            raise ValueError(f"answer is {self.answer!r}; it must be a text")
        if self.tokens is not None:
            check_whole("tokens", self.tokens, 1)
        if self.box is not None and not has_area(self.box):
            raise ValueError(
                f"box of sample {self.question!r} is {self.box!r}; it must be left, top, right, bottom in pixels, four "
                "finite numbers, right beyond left and bottom below top"
            )
        check_choice("zoom", self.zoom, (None, 0, 1))
        check_choice("square", self.square, (False, True))

    def picture(self) -> Image.Image:
        """The image as the model is shown it."""
        picture = opened(self.image)
        return ImageOps.pad(picture, (max(picture.size),) * 2, color=GREY) if self.square else picture

    def grid(self) -> tuple[int, int] | None:
        """Rows and columns that the image is to be shown on, where attention of as many cells tells."""
        if self.grounding is None or self.grounding.dim() != 2 or self.grounding.numel() != self.tokens:
            return None
        return tuple(self.grounding.shape)

    def replace(self, **changes: Any) -> "ZoomSample":
        """The sample with other fields."""
        return dataclasses.replace(self, **changes)


def has_area(box: Sequence[Any]) -> bool:
    """Whether `box` is left, top, right, bottom, finite, with an area."""
    if len(box) != 4 or not all(isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x) for x in box):
        return False
    width, height = box[2] - box[0], box[3] - box[1]
    return min(width, height) > 0 and 0 < width * height < math.inf


class SampleFolder(Sequence[ZoomSample]):
    """The samples of a folder; attention is read when a sample is asked for.

    Raises:
        ValueError: there are none, or a line is not as it must be; the message names the file and the line.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / SAMPLES_FILE
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}; the folder must hold samples, see {__name__}") from error
        if not lines:
            raise ValueError(f"{path} has no line; it must have one a sample")
        self._samples = [self._parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
        maps = self.folder / MAPS_FILE
        self._maps: dict[str, Tensor] | None = None
        try:
            self._opened = safe_open(maps, "pt") if maps.is_file() else None
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{maps} cannot be read as a safetensors file: {error}") from error
        self._named = set() if self._opened is None else set(self._opened.keys())

    def __getstate__(self) -> dict[str, Any]:
        # An open file does not go to another process.
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> ZoomSample:
        if index < 0:
            index += len(self)
        sample = self._samples[index]
        if self._named and self._opened is None:
            self._opened = safe_open(self.folder / MAPS_FILE, "pt")
        found = {name: f"{index}.{name}" for name in MAPS if f"{index}.{name}" in self._named}
        return sample.replace(**{name: self._opened.get_tensor(key) for name, key in found.items()})

    def _parsed(self, line: str, place: str) -> ZoomSample:
        try:
            fields = json.loads(line)
            known = {field.name for field in dataclasses.fields(ZoomSample)} - set(MAPS)
            if not isinstance(fields, dict) or not {"image", "question"} <= set(fields) <= known:
                raise ValueError(f"it must be an object with image and question, and of {sorted(known)} no others")
            if not isinstance(fields["image"], str):
                raise ValueError(f"image is {fields['image']!r}; it must be a path")
            if fields.get("box") is not None:
                fields["box"] = tuple(fields["box"])
            return ZoomSample(**{**fields, "image": self.folder / fields["image"]})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{place}: {error}") from error


def write_samples(folder: str | Path, samples: Sequence[ZoomSample]) -> None:
    """Write samples into a new folder, whole or not at all; images that are no files are put there as PNG.

    Raises:
        ValueError: there are no samples, or the folder is there already.
    """
    folder = check_new(folder)
    if not len(samples):
        raise ValueError("samples are none; there is nothing to write")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as scratch:
        new = Path(scratch) / folder.name
        (new / IMAGES_FOLDER).mkdir(parents=True)
        maps, stored = {}, {}
        with open(new / SAMPLES_FILE, "w", encoding="utf-8") as lines:
            for index, sample in enumerate(samples):
                if isinstance(sample.image, Image.Image):
                    # Several questions about one image share its file.
                    if id(sample.image) not in stored:
                        stored[id(sample.image)] = f"{IMAGES_FOLDER}/{index}.png"
                        sample.image.save(new / stored[id(sample.image)])
                    image = stored[id(sample.image)]
                else:
                    image = str(Path(sample.image).resolve())
                values = {field.name: getattr(sample, field.name) for field in dataclasses.fields(ZoomSample)}
                maps |= {f"{index}.{name}": values.pop(name) for name in MAPS if values[name] is not None}
                fields = {name: value for name, value in values.items() if value is not None} | {"image": image}
                lines.write(json.dumps(fields, ensure_ascii=False) + "\n")
        if maps:
            # Copies, for samples may share a map, and safetensors writes no tensor twice.
            own = {
                name: cells.detach().to("cpu", torch.float32, copy=True).contiguous() for name, cells in maps.items()
            }
            save_file(own, new / MAPS_FILE)
        os.replace(new, folder)


def check_new(folder: str | Path) -> Path:
    """The folder's whole path.

    Raises:
        ValueError: it is there already.
    """
    folder = Path(folder).resolve()
    if folder.exists():
        raise ValueError(f"{folder} is there already; give a folder that is not")
    return folder
