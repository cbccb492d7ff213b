"""From a score map to the regions of the image that are worth a second look.

logits -> sigmoid -> attention sinks suppressed -> Gaussian blur -> threshold -> boxes in cells -> boxes in pixels.

Source: Q-Zoom (arXiv 2604.06912) for Qwen models, SD-RPN (arXiv 2509.16944) for LLaVA, both as their code does it;
`tests/golden/qzoom` pins the official numbers. Grids are (rows, columns), images (width, height), as PIL has it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from multimodal.argument_checks import check_choice, check_real, check_size, check_whole

SINKS = ("corner", "first_token", "none")
BOX_MODES = ("enclosing", "components")
CORNER_SINK_CELLS = 256  # a map of no more cells shows no sink in its corner
LONGEST_STRIP = 100  # times its shorter side, of an image or a box
MIN_SIDE = 28  # pixels of one cell of Qwen2.5-VL; Q-Zoom has the same number for Qwen3-VL, whose cells have 32


class Box(NamedTuple):
    """A rectangle in whole cells or pixels; `right` and `bottom` are the first column and row outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top


@dataclass(frozen=True)
class Regions:
    """The boxes found, in cells, and the blurred probabilities `[rows, columns]` they were found in."""

    boxes: list[Box]
    probabilities: Tensor


class Component(NamedTuple):
    """A connected group of cells: its box, and the sum of its probabilities."""

    box: Box
    mass: float


@dataclass(frozen=True)
class ComponentRules:
    """What connected groups of cells become (SD-RPN's numbers, made for 24 x 24 cells).

    Attributes:
        noise_cells: a group of so many cells or fewer is dropped.
        small_cells: a group of fewer cells gets a box of at least about 3 x 3.
        large_cells: a group of more cells is dropped: it says nothing. None: no limit.
    """

    noise_cells: int = 1
    small_cells: int = 4
    large_cells: int | None = 225


def find_regions(
    score_map: Tensor,
    *,
    threshold: float,
    sink: str = "corner",
    keep_mask: Tensor | None = None,
    blur_kernel: int = 3,
    blur_sigma: float = 1.0,
    box_mode: str = "enclosing",
    max_boxes: int = 1,
    margin_cells: int = 0,
    rules: ComponentRules | None = None,
) -> Regions:
    """The regions of one image that a score map proposes; none where no cell passes the threshold.

    `probability_map` and `propose_boxes` one after the other: see there for the arguments and what they raise.
    """
    probabilities = probability_map(
        score_map, sink=sink, keep_mask=keep_mask, blur_kernel=blur_kernel, blur_sigma=blur_sigma
    )
    boxes = propose_boxes(
        probabilities, threshold, box_mode=box_mode, max_boxes=max_boxes, margin_cells=margin_cells, rules=rules
    )
    return Regions(boxes, probabilities)


def probability_map(
    score_map: Tensor,
    *,
    sink: str = "corner",
    keep_mask: Tensor | None = None,
    blur_kernel: int = 3,
    blur_sigma: float = 1.0,
) -> Tensor:
    """Blurred probabilities `[rows, columns]` in float32, from 0 to 1, of the logits `score_map` of the same shape.

    Args:
        sink: which cells count as attention sinks, and get probability 0 before the blur. "corner" (Qwen2.5-VL): in
            maps of more than 256 cells the upper quarter of the first column and the left quarter of the first row.
            "first_token" (Qwen3-VL): those that `keep_mask` does not keep. "none": no cell.
        keep_mask: `[rows, columns]`, True where a cell is no sink; for `sink="first_token"` alone.
        blur_kernel, blur_sigma: of the Gaussian, in cells; the kernel is odd, 1 blurs nothing.

    Raises:
        ValueError: the map is not two-dimensional, is empty or holds NaN, or another argument is not as above.
    """
    check_choice("sink", sink, SINKS)
    _check_map("score_map", score_map)
    probabilities = score_map.detach().float().sigmoid()
    rows, columns = probabilities.shape
    if (keep_mask is not None) != (sink == "first_token"):
        given = "given" if keep_mask is not None else "None"
        raise ValueError(f"keep_mask is {given} and sink is {sink!r}; the one belongs to sink='first_token'")
    if keep_mask is not None:
        if keep_mask.shape != score_map.shape or keep_mask.dtype != torch.bool:
            raise ValueError(
                f"keep_mask is {keep_mask.dtype} of shape {tuple(keep_mask.shape)}; "
                f"it must be torch.bool of the score map's shape {tuple(score_map.shape)}"
            )
        probabilities = probabilities * keep_mask.to(probabilities.device)
    elif sink == "corner" and rows * columns > CORNER_SINK_CELLS:
        probabilities[: max(1, rows // 4), 0] = 0
        probabilities[0, : max(1, columns // 4)] = 0
    return blurred(probabilities, blur_kernel, blur_sigma)


def blurred(cells: Tensor, kernel: int, sigma: float = 1.0) -> Tensor:
    """`cells`, `[rows, columns]`, under a Gaussian of `kernel` x `kernel` cells whose weights sum to 1.

    The map is mirrored beyond its edges (without repeating the edge). An axis too short for that, of no more than
    `kernel // 2` cells, repeats its edge cells instead: a map of one row is blurred along the row and no more.

    Raises:
        ValueError: `kernel` is not odd and positive, or `sigma` not positive.
    """
    if check_whole("blur_kernel", kernel, 1) % 2 == 0:
        raise ValueError(f"blur_kernel is {kernel}; it must be odd")
    if check_real("blur_sigma", sigma) == 0:
        raise ValueError(f"blur_sigma is {sigma}; it must be positive")
    rows, columns = cells.shape
    reach = kernel // 2
    above = reach if rows <= reach else 0
    before = reach if columns <= reach else 0
    padded = F.pad(cells[None, None], (before, before, above, above), mode="replicate")
    padded = gaussian_blur(padded, [kernel, kernel], [float(sigma), float(sigma)])
    return padded[0, 0, above : above + rows, before : before + columns]


def propose_boxes(
    probabilities: Tensor,
    threshold: float,
    *,
    box_mode: str = "enclosing",
    max_boxes: int = 1,
    margin_cells: int = 0,
    rules: ComponentRules | None = None,
) -> list[Box]:
    """Boxes in cells around what is more probable than `threshold` in the map `[rows, columns]`; may be none.

    Args:
        box_mode: "enclosing": one tight box around all such cells (Q-Zoom). "components": one for each 8-connected
            group of them, under `rules` (SD-RPN), in the order of their first cells read row by row.
        max_boxes: of more components the most probable stay: those of the greatest sum of probabilities, of equal ones
            the earlier. SD-RPN rather zooms nowhere if there are more than two: ask for many boxes and count.
        margin_cells: grow every box by so many cells on each side, as far as the map goes.

    Raises:
        ValueError: the map is not two-dimensional, is empty or holds NaN, or another argument is not as above.
    """
    check_choice("box_mode", box_mode, BOX_MODES)
    check_real("threshold", threshold, 0.0, 1.0)
    check_whole("max_boxes", max_boxes, 1)
    check_whole("margin_cells", margin_cells, 0)
    _check_map("probabilities", probabilities)
    if rules is not None and box_mode != "components":
        raise ValueError(f"rules is given and box_mode is {box_mode!r}; rules belong to box_mode='components'")
    above = probabilities > threshold
    if not above.any():
        return []
    rows, columns = above.shape
    if box_mode == "enclosing":
        boxes = [_tight_box(above.cpu().numpy())]
    else:
        found = _components(
            probabilities.detach().cpu().double().numpy(), above.cpu().numpy(), rules or ComponentRules()
        )
        by_mass = sorted(range(len(found)), key=lambda index: -found[index].mass)  # stable: of equals the earlier first
        boxes = [found[index].box for index in sorted(by_mass[:max_boxes])]
    return [
        Box(
            max(0, box.left - margin_cells),
            max(0, box.top - margin_cells),
            min(columns, box.right + margin_cells),
            min(rows, box.bottom + margin_cells),
        )
        for box in boxes
    ]


def cells_to_pixels(
    box: Sequence[int],
    grid: tuple[int, int],
    image_size: tuple[int, int],
    min_side: int = MIN_SIDE,
    *,
    cell_pixels: int = 28,
) -> Box:
    """The pixels of an image of `image_size` (width, height) that the cells `box` of a map of `grid` stand for.

    The map covers the whole image (Qwen's processors stretch it). A side of less than `min_side` pixels grows to that
    around its middle, slides back inside, and is cut where the image itself is smaller. As in the official code this is
    float32 by way of a canvas of `cell_pixels` a cell, truncated at the end: other orders round some edges differently.

    Raises:
        ValueError: the box is empty or not inside the map, or a size is not positive.
    """
    rows, columns = _check_cells(box, grid)
    left, top, right, bottom = box
    width, height = check_size("image_size", image_size)
    check_whole("cell_pixels", cell_pixels, 1)
    check_whole("min_side", min_side, 1)
    left, right = _scaled_side(left, right, width, columns, cell_pixels, min_side)
    top, bottom = _scaled_side(top, bottom, height, rows, cell_pixels, min_side)
    return Box(left, top, right, bottom)


def padded_square_to_pixels(
    box: Sequence[int],
    grid: tuple[int, int],
    image_size: tuple[int, int],
    min_side: int = MIN_SIDE,
    *,
    square_pixels: int = 336,
) -> Box:
    """As `cells_to_pixels`, for a map over an image that was padded to a square around its middle (LLaVA).

    Cells that lie wholly in the padding have no pixels, and the official code then crops nothing; here an empty side
    becomes the `min_side` pixels of the image nearest to it.

    Raises:
        ValueError: the box is empty or not inside the map, or a size is not positive.
    """
    rows, columns = _check_cells(box, grid)
    left, top, right, bottom = box
    width, height = check_size("image_size", image_size)
    check_whole("square_pixels", square_pixels, 1)
    check_whole("min_side", min_side, 1)
    ratio = min(square_pixels / width, square_pixels / height)
    sides = []
    for start, end, cells, size in ((left, right, columns, width), (top, bottom, rows, height)):
        edges = torch.tensor([start, end], dtype=torch.float32) * (square_pixels / cells)
        edges = (edges - (square_pixels - int(size * ratio)) / 2) / ratio
        first, last = edges.clamp(0, size).long().tolist()
        sides.append((first, last) if first < last else _widened(first, last, size, min_side))
    (left, right), (top, bottom) = sides
    return Box(left, top, right, bottom)


def checked_box(box: Sequence[float], image_size: tuple[int, int]) -> Box:
    """The whole pixels that a user's box (left, top, right, bottom) touches in an image of `image_size`.

    What lies outside the image is cut off. `image_size` is (width, height).

    Raises:
        ValueError: the box is not four finite numbers, is reversed, has no area, or lies wholly outside the image.
    """
    width, height = check_size("image_size", image_size)
    try:
        left, top, right, bottom = (float(edge) for edge in box)
    except (TypeError, ValueError):
        raise ValueError(f"box is {box!r}; it must be four numbers: left, top, right, bottom") from None
    valid = f"the image is {width} x {height} pixels (width x height)"
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise ValueError(f"box is {box!r}; its four numbers must be finite, and {valid}")
    if right <= left or bottom <= top:
        raise ValueError(f"box is {box!r}; right must be beyond left and bottom below top, and {valid}")
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise ValueError(f"box is {box!r} and lies outside the image; {valid}")
    return Box(
        max(0, math.floor(left)), max(0, math.floor(top)), min(width, math.ceil(right)), min(height, math.ceil(bottom))
    )


def widened_box(box: Box, image_size: tuple[int, int], least: int) -> Box:
    """`box` with sides of at least `least` pixels, and of a hundredth of the longer side, as far as the image has them.

    Processors cannot take strips that are much longer.
    """
    width, height = image_size
    least = max(least, math.ceil(max(box.width, box.height) / LONGEST_STRIP))
    left, right = _widened(box.left, box.right, width, least)
    top, bottom = _widened(box.top, box.bottom, height, least)
    return Box(left, top, right, bottom)


def cells_touched(box: Box, grid: tuple[int, int], image_size: tuple[int, int]) -> Box:
    """The cells of a map of `grid` over a whole image of `image_size` (width, height) that a box of pixels touches."""
    (rows, columns), (width, height) = grid, image_size
    left, top = math.floor(box[0] * columns / width), math.floor(box[1] * rows / height)
    right, bottom = math.ceil(box[2] * columns / width), math.ceil(box[3] * rows / height)
    return Box(left, top, min(max(right, left + 1), columns), min(max(bottom, top + 1), rows))


def _check_map(name: str, cells: Tensor) -> None:
    if cells.dim() != 2 or cells.numel() == 0 or not cells.is_floating_point():
        raise ValueError(
            f"{name} is {cells.dtype} of shape {tuple(cells.shape)}; it must be [rows, columns] of floating point"
        )
    if cells.isnan().any():
        raise ValueError(f"{name} holds {int(cells.isnan().sum())} NaN in {cells.numel()} cells; it must hold none")


def _check_cells(box: Sequence[int], grid: tuple[int, int]) -> tuple[int, int]:
    rows, columns = check_size("grid", grid)
    left, top, right, bottom = box
    if not (0 <= left < right <= columns and 0 <= top < bottom <= rows):
        raise ValueError(
            f"box is {tuple(box)}; it must be (left, top, right, bottom) with an area, inside {rows} rows and "
            f"{columns} columns of cells"
        )
    return rows, columns


def _tight_box(mask: np.ndarray) -> Box:
    (rows,) = mask.any(axis=1).nonzero()
    (columns,) = mask.any(axis=0).nonzero()
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _components(probabilities: np.ndarray, above: np.ndarray, rules: ComponentRules) -> list[Component]:
    count, label_map = cv2.connectedComponents(above.astype(np.uint8), connectivity=8)
    masks = sorted((label_map == label for label in range(1, count)), key=lambda mask: int(mask.argmax()))
    found = []
    for mask in masks:
        cells = int(mask.sum())
        if cells <= rules.noise_cells or (rules.large_cells is not None and cells > rules.large_cells):
            continue
        box = _tight_box(mask)
        if cells < rules.small_cells:
            rows, columns = mask.shape
            left, right = _grown(box.left, box.right, columns)
            top, bottom = _grown(box.top, box.bottom, rows)
            box = Box(left, top, right, bottom)
        found.append(Component(box, float(probabilities[mask].sum())))
    return found


def _grown(start: int, end: int, cells: int) -> tuple[int, int]:
    """A side of at least three cells around that from `start` to `end`, as far as the map goes.

    SD-RPN cuts it one cell short of the map's end, and so may lose the very cells it starts from; this does not.
    """
    middle, half = (start + end) / 2, max(3, end - start + 1) / 2
    return max(0, int(middle - half)), min(cells, int(middle + half))


def _scaled_side(start: int, end: int, pixels: int, cells: int, cell_pixels: int, min_side: int) -> tuple[int, int]:
    edges = torch.tensor([start, end], dtype=torch.float32) * float(cell_pixels) * (pixels / (cells * cell_pixels))
    first, last = edges.unbind()
    missing = (min_side - (last - first)).clamp(min=0)
    first, last = first - missing / 2, last + missing / 2
    inwards = -first.clamp(max=0)
    first, last = first + inwards, last + inwards
    inwards = (last - pixels).clamp(min=0)
    first, last = (edge.clamp(0, pixels) for edge in (first - inwards, last - inwards))
    return _widened(int(first), int(last), pixels, 1)


def _widened(start: int, end: int, pixels: int, least: int) -> tuple[int, int]:
    """A side of at least `least` pixels around that from `start` to `end`, inside `pixels` if they are as many."""
    least = min(least, pixels)
    if end - start >= least:
        return start, end
    start = min(max(0, (start + end - least) // 2), pixels - least)
    return start, start + least
