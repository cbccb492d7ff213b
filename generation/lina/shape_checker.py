"""Says whether a picture of captioned shapes shows what its caption asks for; knows nothing of the model.

A pixel that is partly covered lies between the background and the object's colour, so colours are told apart by the
nearest *line* from the background: the nearest colour alone takes the pale edge of an orange circle for yellow. The
distance along the line is how much of the pixel is covered.

- colour: each colour of the caption has 25 pixels or more, 80 % or more of them in one piece, and no other colour
  (nor pixels of no known colour) has more than 30.
- shape: each piece is compared with circle, square and triangle of its own area and centre, drawn anew; the kind that
  overlaps most must be the caption's, and by 75 % or more (intersection over union).
- position: of one object, its centre lies in the right quadrant, or in the middle; of two, the centres are more than 4
  pixels apart along the relation's axis, in the right order, and less along the other axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from generation.lina.captioned_shapes import (
    BACKGROUND,
    COLOURS,
    IMAGE_SIZE,
    KINDS,
    SQUARE_HALF_SIDE,
    TRIANGLE_CIRCUMRADIUS,
    coverage,
    describe,
)

COVERED = 0.5  # of a pixel, from which on it counts
UNKNOWN_DISTANCE = 0.3  # from every colour's line, in RGB of 0 to 1: further away is no known colour
LEAST_PIXELS, MOST_FOREIGN_PIXELS = 25, 30
LEAST_IN_ONE_PIECE = 0.8
LEAST_OVERLAP = 0.75
LEAST_DISTANCE = 4.0  # pixels between the centres of a pair, along the relation's axis
MIDDLE = (12.8, 19.2)  # pixels: the bounds of "at the center" in x and y
AREA_OF_RADIUS = {
    "circle": np.pi,
    "square": 4 * SQUARE_HALF_SIDE**2,
    "triangle": 3 * 3**0.5 / 4 * TRIANGLE_CIRCUMRADIUS**2,
}  # in squared radii
UNKNOWN = len(COLOURS)


@dataclass(frozen=True)
class Scores:
    """Per image, bool (B,). `position` is the place of a single object or the relation of a pair.

    Args:
        position: true where the caption names no position: see `positioned`.
        positioned: whether the caption names a position.
        pair: whether the caption names two objects.
    """

    colour: Tensor
    shape: Tensor
    position: Tensor
    positioned: Tensor
    pair: Tensor

    @property
    def all_correct(self) -> Tensor:
        return self.colour & self.shape & self.position

    @property
    def place(self) -> Tensor:
        """Of the single objects whose caption names a place, in order: fewer than B."""
        return self.position[self.positioned & ~self.pair]

    @property
    def relation(self) -> Tensor:
        """Of the pairs, in order: fewer than B."""
        return self.position[self.pair]

    def summary(self) -> dict[str, float]:
        """Means; place and relation only where a caption names one."""
        named = {name: getattr(self, name) for name in ("all_correct", "colour", "shape", "place", "relation")}
        return {name: values.float().mean().item() for name, values in named.items() if len(values)}


@torch.no_grad()
def check(images: Tensor, captions: Sequence[str]) -> Scores:
    """Compare pictures with their captions.

    Args:
        images: (B, 3, 32, 32), floating point in [-1, 1]; values outside are clamped.
        captions: B captions of `captioned_shapes`.

    Raises:
        ValueError: the shapes or numbers do not fit, an image is not finite, or a caption is not one of these shapes'.
    """
    if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE) or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}; they must be floating point (B, 3, 32, 32) in [-1, 1]"
        )
    if len(captions) != len(images):
        raise ValueError(f"captions are {len(captions)}, but there are {len(images)} images")
    if not images.isfinite().all():
        raise ValueError("images hold NaN or infinity")
    descriptions = [describe(caption) for caption in captions]
    names, covered = segment(images.detach().float().cpu().clamp(-1, 1))
    colour, pieces = [], []
    for own_names, own_covered, description in zip(names.numpy(), covered.numpy(), descriptions, strict=True):
        right, own_pieces = _check_colours(own_names, own_covered, [name for name, _ in description.objects])
        colour.append(right)
        pieces += own_pieces
    kinds, centres = _kinds_and_centres(torch.from_numpy(np.array(pieces, np.float32)).view(-1, IMAGE_SIZE, IMAGE_SIZE))
    shape, position = [], []
    for description in descriptions:
        count = len(description.objects)
        shape.append(kinds[:count] == [kind for _, kind in description.objects])
        position.append(None not in centres[:count] and _position_right(centres[:count], description.position))
        kinds, centres = kinds[count:], centres[count:]
    colour, shape, position = (torch.tensor(found, dtype=torch.bool) for found in (colour, shape, position))
    positioned = torch.tensor([one.position is not None for one in descriptions], dtype=torch.bool)
    pair = torch.tensor([len(one.objects) == 2 for one in descriptions], dtype=torch.bool)
    return Scores(colour, shape, position, positioned, pair)


def segment(images: Tensor) -> tuple[Tensor, Tensor]:
    """Colour of each pixel and how much of the pixel it covers.

    Returns:
        index into COLOURS, or UNKNOWN, int64 (B, 32, 32), and the share of the pixel that each colour would cover,
        float32 (B, 6, 32, 32) in [0, 1].
    """
    background = torch.tensor(BACKGROUND)
    lines = torch.tensor(list(COLOURS.values())) - background  # (6, 3)
    pixels = (images / 2 + 0.5).permute(0, 2, 3, 1) - background  # (B, H, W, 3)
    squared = lines.square().sum(1)
    covered = (pixels @ (lines / squared[:, None]).T).clamp_(0, 1)  # (B, H, W, 6)
    # |pixel - covered * line|^2, expanded, so that no (B, H, W, 6, 3) is needed.
    away = pixels.square().sum(-1, keepdim=True) + covered * (covered * squared - 2 * (pixels @ lines.T))
    nearest, names = away.min(dim=-1)
    names = names.masked_fill(nearest > UNKNOWN_DISTANCE**2, UNKNOWN)
    return names, covered.permute(0, 3, 1, 2).contiguous()


def _check_colours(names: np.ndarray, covered: np.ndarray, colours: Sequence[str]) -> tuple[bool, list[np.ndarray]]:
    """Whether an image has these colours and no others, and how much of each pixel (32, 32) each object covers.

    Args:
        names, covered: (32, 32) and (6, 32, 32), of one image, as `segment` gives them.
    """
    wanted = [list(COLOURS).index(colour) for colour in colours]
    own = np.take_along_axis(covered, names[None] % UNKNOWN, axis=0)[0]  # covered by the pixel's own colour
    counts = np.bincount(names[(own > COVERED) | (names == UNKNOWN)], minlength=UNKNOWN + 1)
    right = np.delete(counts, wanted).max() <= MOST_FOREIGN_PIXELS
    pieces = []
    for name in wanted:
        mask = ((names == name) & (covered[name] > COVERED)).astype(np.uint8)
        piece, share = _largest_piece(mask)
        right &= counts[name] >= LEAST_PIXELS and share >= LEAST_IN_ONE_PIECE
        # The edge, where less than half of a pixel is covered, belongs to the object too.
        edge = cv2.dilate(piece, np.ones((3, 3), np.uint8)) * ((names == name) | (covered[name] < COVERED))
        pieces.append(covered[name] * edge)
    return bool(right), pieces


def _largest_piece(mask: np.ndarray) -> tuple[np.ndarray, float]:
    """The largest connected piece of a uint8 mask, and its share of the mask."""
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    areas = statistics[1:, cv2.CC_STAT_AREA]
    if not len(areas):
        return mask, 0.0
    return (labels == 1 + areas.argmax()).astype(np.uint8), areas.max() / areas.sum()


def _kinds_and_centres(pieces: Tensor) -> tuple[list[str | None], list[tuple[float, float] | None]]:
    """Of pieces (P, 32, 32): the kind whose ideal drawing overlaps most, and the centroid (x, y) in pixels.

    The kind is None where even the best overlap is small, and both are None where the piece is empty.
    """
    area = pieces.sum((1, 2))
    pixels = torch.arange(IMAGE_SIZE) + 0.5
    x, y = (pieces.sum(axis) @ pixels / area.clamp_min(1) for axis in (1, 2))
    overlaps = []
    for kind in KINDS:
        ideal = coverage(kind, x, y, (area / AREA_OF_RADIUS[kind]).sqrt())
        union = torch.maximum(pieces, ideal).sum((1, 2))
        overlaps.append(torch.minimum(pieces, ideal).sum((1, 2)) / union.clamp_min(1))
    best, index = torch.stack(overlaps).max(dim=0)
    kinds = [KINDS[i] if overlap >= LEAST_OVERLAP else None for i, overlap in zip(index, best, strict=True)]
    centres = [(i, j) if size >= 1 else None for i, j, size in zip(x.tolist(), y.tolist(), area, strict=True)]
    return kinds, centres


def _position_right(centres: Sequence[tuple[float, float]], position: str | None) -> bool:
    if position is None:
        return True
    if len(centres) == 1:
        zones = [["low", "middle", "high"][(value >= MIDDLE[0]) + (value > MIDDLE[1])] for value in centres[0]]
        across = "low" if "left" in position else "high" if "right" in position else "middle"
        down = "low" if "top" in position else "high" if "bottom" in position else "middle"
        return zones == [across, down]
    (x0, y0), (x1, y1) = centres
    along, across = (y1 - y0, x1 - x0) if position in ("above", "below") else (x1 - x0, y1 - y0)
    if position in ("below", "to the right of"):
        along = -along
    return along > LEAST_DISTANCE and abs(across) < along
