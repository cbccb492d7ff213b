"""Scenes as the model is shown them while it learns, whole at 48 x 48 pixels or a region near by, and what is where.

Boxes are `(left, top, right, bottom)`, the latter two exclusive, in cells of the coarse view: 32 pixels of the scene,
which one visual token covers there.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from multimodal.tiny_reader.processing import CELL
from multimodal.tiny_reader.scenes import BACKGROUNDS, CANVAS, COLOURS, SHAPES, Box, Landmark, Scene

GRID = 6  # rows and columns of visual tokens of the whole scene in the coarse view
COARSE_CELL = CANVAS // GRID  # pixels of the scene
WHOLE: Box = (0, 0, GRID, GRID)
REGION_CELLS = 64  # visual tokens of a region, about
READABLE = 0.45  # small print is shown at this part of its size, or it is not asked for
ABSENT, UNASKED = -1, -100  # labels: nothing is there; it is not learnt here
LABELS = ("colour", "shape", "tens", "units", "row", "column")


def resized(pixels: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """A picture `[H, W, 3]` at the size of a grid of visual tokens, `[3, rows * 8, columns * 8]`, both uint8."""
    picture = Image.fromarray(pixels).resize((grid[1] * CELL, grid[0] * CELL), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def coarse_view(scene: Scene) -> Tensor:
    """The whole scene, `[3, 48, 48]` of uint8."""
    return resized(scene.pixels, (GRID, GRID))


def region_grid(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of visual tokens, about 64, of a region of so many rows and columns of cells."""
    pixels = REGION_CELLS * CELL**2
    height, width = smart_resize(rows * COARSE_CELL, columns * COARSE_CELL, CELL, pixels, pixels)
    return height // CELL, width // CELL


def region_view(scene: Scene, box: Box) -> Tensor:
    """The region in a box, `[3, H, W]` of uint8 for a grid of `region_grid`."""
    left, top, right, bottom = (edge * COARSE_CELL for edge in box)
    return resized(scene.pixels[top:bottom, left:right], region_grid(box[3] - box[1], box[2] - box[0]))


def normalised(pictures: Tensor) -> Tensor:
    """Pictures `[B, 3, H, W]` of uint8 as the image processor gives them to the model, from -1 to 1."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def cell_of(landmark: Landmark) -> tuple[int, int]:
    """Column and row of the coarse view's cell that the landmark's centre lies in."""
    x, y = landmark.centre
    return int(x // COARSE_CELL), int(y // COARSE_CELL)


def box_around(landmark: Landmark) -> Box:
    """The landmark's cell and its neighbours: what a proposal of that one cell is blurred to."""
    column, row = cell_of(landmark)
    return max(0, column - 1), max(0, row - 1), min(GRID, column + 2), min(GRID, row + 2)


def box_with(random: np.random.Generator, landmark: Landmark, rows: int, columns: int) -> Box:
    """A box of so many rows and columns that holds the landmark's cell, more often than not in its middle."""
    centred = random.random() < 0.6
    starts = []
    for middle, cell, length in zip(landmark.centre, cell_of(landmark), (columns, rows), strict=True):
        least, most = max(0, cell - length + 1), min(cell, GRID - length)
        start = round(middle / COARSE_CELL - length / 2) if centred else int(random.integers(least, most + 1))
        starts.append(min(max(start, least), most))
    left, top = starts
    return left, top, left + columns, top + rows


def cell_labels(scenes: Sequence[Scene], boxes: Sequence[Box], grid: tuple[int, int]) -> dict[str, Tensor]:
    """What the cells of views show, `[B, rows * columns]` a label.

    A landmark is named in one cell, that of its centre: its colour, shape and, where they can be read, its digits, and
    in a whole scene its place. All else is `ABSENT`; what is cut off by the view's edge is not asked for.

    Args:
        boxes: a scene's view each, `WHOLE` or a region, of equal size.
        grid: rows and columns of visual tokens of all views.
    """
    rows, columns = grid
    labels = {name: torch.full((len(scenes), rows, columns), ABSENT) for name in LABELS}
    for index, (scene, (left, top, right, bottom)) in enumerate(zip(scenes, boxes, strict=True)):
        across, down = columns / (COARSE_CELL * (right - left)), rows / (COARSE_CELL * (bottom - top))
        whole = (left, top, right, bottom) == WHOLE
        if not whole:
            for name in ("row", "column"):
                labels[name][index] = UNASKED
        for landmark in scene.landmarks:
            x, y = landmark.centre
            column, row = (x - left * COARSE_CELL) * across, (y - top * COARSE_CELL) * down
            if not (0 <= column < columns and 0 <= row < rows):
                continue
            edges = [edge / COARSE_CELL for edge in landmark.extent]
            inside = edges[0] >= left and edges[1] >= top and edges[2] <= right and edges[3] <= bottom
            readable = landmark.big or across * CELL >= READABLE
            values = {
                "colour": list(COLOURS).index(landmark.colour) if inside else UNASKED,
                "shape": SHAPES.index(landmark.shape) if inside else UNASKED,
                "tens": int(landmark.code[0]) if inside and readable else UNASKED,
                "units": int(landmark.code[1]) if inside and readable else UNASKED,
                "row": landmark.row if whole else UNASKED,
                "column": landmark.column if whole else UNASKED,
            }
            for name, value in values.items():
                labels[name][index, int(row), int(column)] = value
    return {name: values.flatten(1) for name, values in labels.items()}


def background_labels(scenes: Sequence[Scene]) -> Tensor:
    """Indices into `BACKGROUNDS`, `[B]`."""
    return torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes])
