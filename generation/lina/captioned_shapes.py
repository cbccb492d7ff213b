"""Captioned shapes: coloured circles, squares and triangles drawn on the fly, and prompts that training never shows.

A caption describes one object ("a red circle", "a red circle at the top left") or two of different colours ("a red
circle above a blue square", "below", "to the left of", "to the right of"): 22 words, at most 10 in a caption. Pictures
are 32 x 32 pixels, drawn from signed distances with one pixel of anti-aliasing.

15 % of the single objects with a place and of the pairs are held out, chosen by a hash that never changes. What is held
out is the picture, not the sentence: "a red circle above a blue square" goes together with "a blue square below a red
circle", and a caption without a place never shows an object at a place that is held out for it.
"""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from generation.numbered_batches import NumberedBatches

IMAGE_SIZE = 32
BACKGROUND = (0.96, 0.96, 0.96)
COLOURS = {
    "red": (0.86, 0.14, 0.16),
    "green": (0.13, 0.62, 0.25),
    "blue": (0.14, 0.31, 0.86),
    "yellow": (0.95, 0.85, 0.14),
    "purple": (0.54, 0.18, 0.70),
    "orange": (0.96, 0.50, 0.08),
}
KINDS = ("circle", "square", "triangle")
PLACES = {
    "at the top left": (9.6, 9.6),
    "at the top right": (22.4, 9.6),
    "at the bottom left": (9.6, 22.4),
    "at the bottom right": (22.4, 22.4),
    "at the center": (16.0, 16.0),
}  # centre (x, y) in pixels
PLACE_JITTER = 1.4  # pixels, either way
RELATIONS = ("above", "below", "to the left of", "to the right of")
INVERSE = {"above": "below", "below": "above", "to the left of": "to the right of", "to the right of": "to the left of"}
VOCABULARY = ("a", "an", *COLOURS, *KINDS, "above", "below", "to", "the", "left", "right", "of", "at", "top", "bottom")
VOCABULARY += ("center",)
RADIUS = (5.0, 6.4)  # pixels, least and most
HELD_OUT_FRACTION = 0.15
PLACELESS_FRACTION = 0.25  # of the captions of single objects
# Areas of the three kinds are nearly equal at one radius, so that size does not tell the kind.
SQUARE_HALF_SIDE, TRIANGLE_CIRCUMRADIUS = 0.9, 1.2  # in radii
GAP = 1.5  # pixels between two objects, at least
CENTRE = (8.2, 23.8)  # x and y of any object's centre in a pair: the largest objects then stay inside the picture

Level = Literal["single", "above", "pairs"]
LEVELS: tuple[Level, ...] = ("single", "above", "pairs")


@dataclass(frozen=True)
class Description:
    """What a caption says: one object, with or without a place, or two and the relation of the first to the second.

    Args:
        objects: (colour, kind) of each.
        position: one of PLACES or None for one object, one of RELATIONS for two.
    """

    objects: tuple[tuple[str, str], ...]
    position: str | None

    @property
    def caption(self) -> str:
        first, *second = (f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {kind}" for colour, kind in self.objects)
        return " ".join(part for part in (first, self.position, *second) if part)

    @property
    def picture(self) -> "Description":
        """The same for captions that ask for the same picture: pairs are told with "above" or "to the left of"."""
        if self.position in ("below", "to the right of"):
            return Description(self.objects[::-1], INVERSE[self.position])
        return self


@dataclass(frozen=True)
class Shape:
    """One object: centre (x, y) and radius in pixels, from the top left corner of the picture."""

    colour: str
    kind: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A picture to draw, and its caption."""

    caption: str
    shapes: tuple[Shape, ...]


@cache
def all_descriptions(level: Level) -> tuple[Description, ...]:
    """Every caption of a level: 90 single objects with a place, 540 pairs one above the other, 1,080 pairs."""
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; valid are {', '.join(LEVELS)}")
    things = list(itertools.product(COLOURS, KINDS))
    if level == "single":
        return tuple(Description((thing,), place) for thing in things for place in PLACES)
    relations = RELATIONS if level == "pairs" else RELATIONS[:2]
    pairs = [(first, second) for first, second in itertools.product(things, things) if first[0] != second[0]]
    return tuple(Description(pair, relation) for relation in relations for pair in pairs)


@cache
def _held_out_pictures() -> frozenset[Description]:
    held_out: list[Description] = []
    for level in ("single", "pairs"):
        pictures = {description.picture for description in all_descriptions(level)}
        ordered = sorted(pictures, key=lambda picture: hashlib.sha256(picture.caption.encode()).digest())
        held_out += ordered[: round(HELD_OUT_FRACTION * len(ordered))]
    return frozenset(held_out)


def is_held_out(description: Description) -> bool:
    return description.picture in _held_out_pictures()


@cache
def _part(level: Level, held_out: bool) -> tuple[Description, ...]:
    return tuple(one for one in all_descriptions(level) if is_held_out(one) == held_out)


@cache
def _descriptions_by_caption() -> dict[str, Description]:
    placeless = [Description((thing,), None) for thing in itertools.product(COLOURS, KINDS)]
    everything = (*placeless, *all_descriptions("single"), *all_descriptions("pairs"))
    return {description.caption: description for description in everything}


def describe(caption: str) -> Description:
    """What a caption says; capitals, extra spaces and a full stop at the end do not matter.

    Raises:
        ValueError: it is not a caption of these shapes.
    """
    plain = " ".join(caption.lower().split()).rstrip(". ")
    try:
        return _descriptions_by_caption()[plain]
    except KeyError:
        raise ValueError(
            f"caption is {caption!r}; valid are 'a red circle', 'a red circle at the top left' and 'a red circle to "
            f"the left of a blue square', with the colours {', '.join(COLOURS)}, the kinds {', '.join(KINDS)}, the "
            f"places {', '.join(PLACES)}, the relations {', '.join(RELATIONS)}, and two different colours in a pair"
        ) from None


def _place_single(description: Description, draws: Sequence[float]) -> tuple[Shape, ...]:
    """The object at its place; `draws` are five or more numbers in [0, 1)."""
    x, y = PLACES[description.position]
    x, y = (centre + PLACE_JITTER * (2 * draw - 1) for centre, draw in zip((x, y), draws[:2], strict=True))
    return (Shape(*description.objects[0], x, y, _between(*RADIUS, draws[2])),)


def _place_pair(description: Description, draws: Sequence[float]) -> tuple[Shape, ...]:
    """Two objects that do not overlap, apart mainly along the relation's axis; `draws` are six numbers in [0, 1)."""
    least, most = CENTRE
    radii = [_between(*RADIUS, draw) for draw in draws[:2]]
    swapped = description.position in ("below", "to the right of")
    # A triangle reaches farthest upwards, which only matters for the lower object of a vertical pair.
    reach = radii[0] + radii[1] if description.picture.position == "to the left of" else 0.0
    if not reach:
        lower = 0 if swapped else 1
        reach = radii[1 - lower] + TRIANGLE_CIRCUMRADIUS * radii[lower]
    distance = _between(min(reach + GAP, most - least), most - least, draws[2])
    start = _between(least, most - distance, draws[3])
    aside = 0.5 * distance * (2 * draws[4] - 1)
    side = _between(least + max(-aside, 0), most - max(aside, 0), draws[5])
    centres = [(start, side), (start + distance, side + aside)]  # (along the axis, across it)
    if swapped:
        centres.reverse()
    if description.picture.position == "above":
        centres = [(across, along) for along, across in centres]
    return tuple(
        Shape(*thing, x, y, radius) for thing, (x, y), radius in zip(description.objects, centres, radii, strict=True)
    )


def _between(least: float, most: float, draw: float) -> float:
    return least + (most - least) * draw


def _scene(description: Description, draws: Sequence[float]) -> Scene:
    """`draws` are seven numbers in [0, 1): six for the objects, one that may drop the place from a caption."""
    if len(description.objects) == 2:
        return Scene(description.caption, _place_pair(description, draws))
    shapes = _place_single(description, draws)
    said = Description(description.objects, None) if draws[6] < PLACELESS_FRACTION else description
    return Scene(said.caption, shapes)


def training_scenes(generator: np.random.Generator, count: int, level_mix: Mapping[Level, float]) -> list[Scene]:
    """Scenes of which none is held out.

    Args:
        level_mix: weight of each level, such as {"single": 0.35, "pairs": 0.65}; the weights need not add up to 1.
    """
    weights = np.array([level_mix.get(level, 0.0) for level in LEVELS])
    if unknown := set(level_mix) - set(LEVELS):
        raise ValueError(f"level_mix names {', '.join(sorted(unknown))}; valid levels are {', '.join(LEVELS)}")
    if (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"level_mix is {dict(level_mix)}; weights are at least 0, and one is more")
    levels = np.searchsorted(np.cumsum(weights) / weights.sum(), generator.random(count), side="right").tolist()
    choices, draws = generator.random(count).tolist(), generator.random((count, 7)).tolist()
    parts = [_part(level, held_out=False) for level in LEVELS]
    return [
        _scene(parts[level][int(choice * len(parts[level]))], own)
        for level, choice, own in zip(levels, choices, draws, strict=True)
    ]


def held_out_prompts(level: Level, count: int = 500, seed: int = 0) -> list[Scene]:
    """Scenes of held-out prompts, each prompt as often as any other, give or take one.

    There are fewer prompts than the usual 500 (14 single objects, 76 pairs one above the other, 162 pairs), so prompts
    repeat; every repetition is another drawing, and asks a model for another sample. Single objects always have a
    place in their caption.
    """
    if count < 0:
        raise ValueError(f"count is {count}; it is at least 0")
    generator = np.random.default_rng(seed)
    prompts = _part(level, held_out=True)
    order = np.concatenate([generator.permutation(len(prompts)) for _ in range(-(-count // len(prompts)))] or [[]])
    draws = generator.random((count, 7))
    draws[:, 6] = 1.0  # no caption loses its place
    return [_scene(prompts[int(i)], own) for i, own in zip(order[:count], draws.tolist(), strict=True)]


def coverage(kind: str, x: Tensor, y: Tensor, radius: Tensor, image_size: int = IMAGE_SIZE) -> Tensor:
    """How much of each pixel a shape covers, in [0, 1], by its signed distance to the pixel's centre.

    Args:
        x, y, radius: (N,) in pixels; one shape of `kind` a picture.

    Returns:
        (N, image_size, image_size)
    """
    pixels = torch.arange(image_size, dtype=radius.dtype) + 0.5
    across, down = (pixels - x[:, None])[:, None, :], (pixels - y[:, None])[:, :, None]  # (N, 1, W) and (N, H, 1)
    radius = radius[:, None, None]
    if kind == "circle":
        distance = (across.square() + down.square()).sqrt_().sub_(radius)
    elif kind == "square":
        distance = torch.maximum(across.abs(), down.abs()).sub_(SQUARE_HALF_SIDE * radius)
    elif kind == "triangle":
        # Equilateral, centred on its centroid: one horizontal side below and, by symmetry, one slanted line.
        slanted = across.abs() * (3**0.5 / 2) - down / 2
        distance = torch.maximum(slanted, down).sub_(TRIANGLE_CIRCUMRADIUS / 2 * radius)
    else:
        raise ValueError(f"kind is {kind!r}; valid are {', '.join(KINDS)}")
    return (0.5 - distance).clamp_(0, 1)


def draw(scenes: Sequence[Scene]) -> Tensor:
    """The pictures of scenes, float32 (B, 3, 32, 32) in [-1, 1]; later shapes lie over earlier ones."""
    images = torch.tensor(BACKGROUND).mul_(2).sub_(1).view(1, 3, 1, 1).repeat(len(scenes), 1, IMAGE_SIZE, IMAGE_SIZE)
    for slot in range(max((len(scene.shapes) for scene in scenes), default=0)):
        for kind in KINDS:
            chosen = [(i, s.shapes[slot]) for i, s in enumerate(scenes) if _has(s, slot, kind)]
            if not chosen:
                continue
            rows = torch.tensor([i for i, _ in chosen])
            x, y, radius = torch.tensor([(shape.x, shape.y, shape.radius) for _, shape in chosen]).T
            colours = torch.tensor([COLOURS[shape.colour] for _, shape in chosen]).mul_(2).sub_(1)[:, :, None, None]
            under = images[rows]
            images[rows] = under.lerp_(colours, coverage(kind, x, y, radius)[:, None].expand_as(under))
    return images


def _has(scene: Scene, slot: int, kind: str) -> bool:
    return slot < len(scene.shapes) and scene.shapes[slot].kind == kind


class TrainingBatches(Dataset):
    """Whole batches, drawn when asked for: batch i depends on the seed and i alone.

    Args:
        mix_at: level mix of a batch, by its number.
        share: (rank, processes): this process takes every so-many-th image of each batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        mix_at: Callable[[int], Mapping[Level, float]],
        seed: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.length, self.batch_size, self.mix_at, self.seed, self.share = length, batch_size, mix_at, seed, share

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor | list[str]]:
        generator = np.random.default_rng([self.seed, number])
        scenes = training_scenes(generator, self.batch_size, self.mix_at(number))
        rank, processes = self.share
        return _batch(scenes[rank::processes])


class HeldOutBatches(Dataset):
    """Batches of held-out scenes; each process has its share of the scenes."""

    def __init__(self, scenes: Sequence[Scene], batch_size: int) -> None:
        self.batches = [scenes[start : start + batch_size] for start in range(0, len(scenes), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Tensor | list[str]]:
        return _batch(self.batches[number])


def _batch(scenes: Sequence[Scene]) -> dict[str, Tensor | list[str]]:
    return {"image": draw(scenes), "caption": [scene.caption for scene in scenes]}


class CaptionedShapes(NumberedBatches):
    """Batches {"image": (B, 3, 32, 32) float in [-1, 1], "caption": list of B strings}, new ones in every epoch.

    Training begins with single objects; then `level` and single objects are mixed. Validation and test are held-out
    prompts of `level`. A run gives the same batches with any number of processes or workers, and again when resumed.

    Args:
        level: `single`; `above`, pairs one above the other; or `pairs`, all four relations.
        single_images: the first so many images of the run, over all processes, show single objects only.
        single_fraction: of single objects after that, where `level` is not `single`.
        batch_size: images of an optimiser step, over all processes together.
        evaluation_batch_size: images of a batch in validation and test, per process.
        images_per_epoch: an epoch's length, since there is no end of images; rounded down to whole batches.
        evaluation_images: held-out scenes in validation and in test.
        num_workers: processes that draw; 0 draws in the main one.
        seed: of the scenes. Validation and test scenes do not depend on it, so that runs compare.
    """

    def __init__(
        self,
        level: Level = "pairs",
        single_images: int = 0,
        single_fraction: float = 0.35,
        batch_size: int = 64,
        evaluation_batch_size: int = 125,
        images_per_epoch: int = 51_200,
        evaluation_images: int = 500,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, images_per_epoch, num_workers, seed)
        if level not in LEVELS:
            raise ValueError(f"level is {level!r}; valid are {', '.join(LEVELS)}")
        if not 0 <= single_fraction <= 1:
            raise ValueError(f"single_fraction is {single_fraction}; it lies between 0 and 1")
        for name, value, least in (("single_images", single_images, 0), ("evaluation_images", evaluation_images, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}; it is at least {least}")
        self.level, self.single_images, self.single_fraction = level, single_images, single_fraction
        self.evaluation_images = evaluation_images

    def mix_at(self, number: int) -> dict[Level, float]:
        """Level mix of the run's batch `number`."""
        if self.level == "single" or number * self.batch_size < self.single_images:
            return {"single": 1.0}
        return {"single": self.single_fraction, self.level: 1 - self.single_fraction}

    def batches_of(self, length: int, share: tuple[int, int]) -> TrainingBatches:
        return TrainingBatches(length, self.batch_size, self.mix_at, self.seed, share)

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader(seed=0)

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader(seed=1)

    def _evaluation_loader(self, seed: int) -> DataLoader:
        scenes = held_out_prompts(self.level, self.evaluation_images, seed)
        batches = HeldOutBatches(
            scenes[self.trainer.global_rank :: self.trainer.world_size], self.evaluation_batch_size
        )
        return self.loader(batches, lambda: range(len(batches)))
