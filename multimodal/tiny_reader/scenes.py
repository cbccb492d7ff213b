"""Pictures whose small print can be read near by only: coloured landmarks, each with a code on a plate.

A scene is a picture of 192 x 192 pixels with up to four landmarks in a layout of 4 x 4 places. Seen at 48 x 48 pixels
(the coarse view) the landmarks' colours and shapes can be told and codes in big print can be read, but codes in small
print cannot, for which one has to look near by. All is drawn from a seed; no font, no file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

CANVAS = 192  # pixels
PLACES = 4  # rows and columns of the layout
PLACE = CANVAS // PLACES  # pixels
HELD_OUT_SEED = 1_000_000_000  # from here on seeds are for evaluation; training has lower ones

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 80, 230),
    "yellow": (245, 225, 40),
    "purple": (140, 40, 170),
    "orange": (250, 140, 20),
    "cyan": (40, 210, 220),
    "pink": (255, 120, 190),
}
BACKGROUNDS = {
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "white": (235, 235, 235),
    "brown": (110, 70, 40),
    "navy": (20, 25, 90),
    "olive": (105, 110, 30),
}
SHAPES = ("square", "triangle", "ring")
ROWS = ("top", "upper", "lower", "bottom")
COLUMNS = ("left", "midleft", "midright", "right")
KINDS = ("code", "shape", "background", "where")

LANDMARK = 18  # pixels, side
GAP = 2  # pixels between landmark and plate
MARGIN = 2  # pixels of plate around its digits
SMALL, BIG = 1.2, 3.0  # size of print, in pixels for a dot of the font
NOISE = 10.0  # standard deviation of the grain, of 255
# Five dots wide, seven high.
DIGITS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom exclusive


@dataclass(frozen=True)
class Landmark:
    colour: str
    shape: str
    code: str  # two digits
    big: bool  # whether the code is in big print
    row: int
    column: int
    box: Box  # of the coloured shape
    plate: Box

    @property
    def extent(self) -> Box:
        """The box around shape and plate."""
        (left, top, right, _), (plate_left, _, plate_right, bottom) = self.box, self.plate
        return min(left, plate_left), top, max(right, plate_right), bottom

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of `extent`, x and y in pixels."""
        left, top, right, bottom = self.extent
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Question:
    kind: str  # one of `KINDS`
    text: str
    answer: str
    landmark: int | None  # index of the landmark it asks about


@dataclass(frozen=True)
class Scene:
    seed: int
    background: str
    landmarks: tuple[Landmark, ...]
    pixels: np.ndarray  # [192, 192, 3] of uint8

    def picture(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    def questions(self) -> tuple[Question, ...]:
        """All questions that the scene answers. An answer about a landmark begins with the landmark's colour."""
        asked = [Question("background", "What is the background?", self.background, None)]
        for index, landmark in enumerate(self.landmarks):
            colour = landmark.colour
            place = f"{ROWS[landmark.row]} {COLUMNS[landmark.column]}"
            asked.append(Question("code", f"What is the code at {colour}?", f"{colour} {landmark.code}", index))
            asked.append(Question("shape", f"What shape is {colour}?", f"{colour} {landmark.shape}", index))
            asked.append(Question("where", f"Where is {colour}?", f"{colour} {place}", index))
        return tuple(asked)


@cache
def digit_mask(digit: int, dot: float) -> np.ndarray:
    """Coverage from 0 to 1 of a digit in print of `dot` pixels a dot, as `[height, width]`."""
    dots = np.array([[255 * int(d) for d in row] for row in DIGITS[digit].split()], dtype=np.uint8)
    fine = Image.fromarray(dots.repeat(20, axis=0).repeat(20, axis=1))
    width, height = round(5 * dot), round(7 * dot)
    return np.asarray(fine.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255


@cache
def shape_mask(shape: str, side: int) -> np.ndarray:
    """Coverage from 0 to 1 of a shape, as `[side, side]`."""
    fine = 8
    y, x = (np.mgrid[: side * fine, : side * fine] + 0.5) / (side * fine) * 2 - 1  # from -1 to 1
    if shape == "square":
        inside = np.ones_like(x, dtype=bool)
    elif shape == "triangle":
        inside = np.abs(x) <= (y + 1) / 2
    else:
        radius = np.hypot(x, y)
        inside = (radius <= 1) & (radius >= 0.5)
    return inside.reshape(side, fine, side, fine).mean((1, 3)).astype(np.float32)


@cache
def grain() -> np.ndarray:
    """Noise of which scenes cut their own piece, `[512, 512, 3]`, mean 0."""
    return np.random.default_rng(0).normal(0, NOISE, (512, 512, 3)).astype(np.float32)


def code_size(big: bool) -> tuple[int, int]:
    """Width and height of a plate in pixels."""
    dot = BIG if big else SMALL
    return 2 * round(5 * dot) + round(1.5 * dot) + 2 * MARGIN, round(7 * dot) + 2 * MARGIN


def paint(canvas: np.ndarray, mask: np.ndarray, left: int, top: int, colour: Sequence[int]) -> None:
    height, width = mask.shape
    part = canvas[top : top + height, left : left + width]
    part += mask[..., None] * (np.asarray(colour, dtype=np.float32) - part)


def paint_plate(canvas: np.ndarray, landmark: Landmark) -> None:
    left, top, right, bottom = landmark.plate
    canvas[top:bottom, left:right] = 60
    canvas[top + 1 : bottom - 1, left + 1 : right - 1] = 245
    dot = BIG if landmark.big else SMALL
    first, second = (digit_mask(int(digit), dot) for digit in landmark.code)
    paint(canvas, first, left + MARGIN, top + MARGIN, (10, 10, 10))
    paint(canvas, second, right - MARGIN - second.shape[1], top + MARGIN, (10, 10, 10))


def place_landmark(random: np.random.Generator, colour: str, place: int, big: bool) -> Landmark:
    row, column = divmod(place, PLACES)
    plate_width, plate_height = code_size(big)
    width, height = max(LANDMARK, plate_width), LANDMARK + GAP + plate_height
    left = column * PLACE + int(random.integers(PLACE - width + 1))
    top = row * PLACE + int(random.integers(PLACE - height + 1))
    box_left, plate_left = left + (width - LANDMARK) // 2, left + (width - plate_width) // 2
    plate_top = top + LANDMARK + GAP
    return Landmark(
        colour=colour,
        shape=SHAPES[random.integers(len(SHAPES))],
        code=f"{random.integers(100):02d}",
        big=big,
        row=row,
        column=column,
        box=(box_left, top, box_left + LANDMARK, top + LANDMARK),
        plate=(plate_left, plate_top, plate_left + plate_width, plate_top + plate_height),
    )


def draw_scene(seed: int, landmarks: int | None = None, big_print: float = 0.3) -> Scene:
    """The scene of a seed.

    Args:
        seed: at least 0; from `HELD_OUT_SEED` on never trained with.
        landmarks: how many, from 1 to 4; without it that is drawn as well.
        big_print: probability of a code to be in big print.

    Raises:
        ValueError: an argument is out of range.
    """
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed is {seed!r}; it must be a whole number of at least 0")
    if landmarks is not None and landmarks not in range(1, 5):
        raise ValueError(f"landmarks is {landmarks!r}; it must be a whole number from 1 to 4")
    if not 0 <= big_print <= 1:
        raise ValueError(f"big_print is {big_print!r}; it must be a number from 0 to 1")
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 5)) if landmarks is None else landmarks
    background = list(BACKGROUNDS)[random.integers(len(BACKGROUNDS))]
    colours = random.permutation(list(COLOURS))[:count]
    places = random.permutation(PLACES * PLACES)[:count]
    there = tuple(
        place_landmark(random, str(colour), int(place), bool(random.random() < big_print))
        for colour, place in zip(colours, places, strict=True)
    )
    canvas = np.empty((CANVAS, CANVAS, 3), dtype=np.float32)
    canvas[:] = BACKGROUNDS[background]
    for landmark in there:
        paint(canvas, shape_mask(landmark.shape, LANDMARK), landmark.box[0], landmark.box[1], COLOURS[landmark.colour])
        paint_plate(canvas, landmark)
    y, x = random.integers(grain().shape[0] - CANVAS, size=2)
    canvas += grain()[y : y + CANVAS, x : x + CANVAS]
    pixels = canvas.round().clip(0, 255).astype(np.uint8)
    return Scene(seed, background, there, pixels)
