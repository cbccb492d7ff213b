"""The definition: one ray, and one interval of it, after the other."""

import math

import torch
from torch import Tensor


def _is_occupied(at: list[float], occupied: Tensor) -> bool:
    """Whether the cell of a point is, in the box's coordinates: -1 to 1 in the smallest one."""
    farthest = max(map(abs, at))
    for level, cells in enumerate(occupied):
        if farthest <= 2.0**level:
            index = (
                min(math.floor((u / 2.0**level + 1) / 2 * size), size - 1)
                for u, size in zip(at, cells.shape, strict=True)
            )
            return bool(cells[tuple(index)])
    return False


def _end_of_grid(origin: list[float], direction: list[float], half: float) -> float:
    """A distance beyond which a ray is outside of all boxes."""
    ends = [
        (math.copysign(half, d) - o) / d if d else math.inf if abs(o) <= half else -math.inf
        for o, d in zip(origin, direction, strict=True)
    ]
    return min(ends) if any(direction) else -math.inf


def march(
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    jitter: Tensor,
    occupied: Tensor,
    box: Tensor,
    step: float,
    cone_angle: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Start, end and offsets, in float64, of float64 tensors; the rest as in the package."""
    centre, half = (box[0] + box[1]) / 2, (box[1] - box[0]) / 2
    rays = zip((origins - centre) / half, directions / half, near, far, jitter, strict=True)
    starts, ends, offsets = [], [], [0]

    def interval(distance: float) -> float:
        return max(step, cone_angle * distance)

    for origin, direction, first, last, shift in ([x.tolist() for x in ray] for ray in rays):
        outside = _end_of_grid(origin, direction, 2.0 ** (len(occupied) - 1))
        t, k = first + shift * interval(first), 0
        while True:
            if cone_angle == 0:
                start, end = first + (k + shift) * step, first + (k + 1 + shift) * step
            else:
                start, end = t, t + interval(t)
            middle = (start + end) / 2
            if middle >= last or middle > outside + (end - start):
                break
            if _is_occupied([o + middle * d for o, d in zip(origin, direction, strict=True)], occupied):
                starts.append(start)
                ends.append(end)
            t, k = end, k + 1
        offsets.append(len(starts))
    options = {"dtype": torch.float64, "device": origins.device}
    return torch.tensor(starts, **options), torch.tensor(ends, **options), torch.tensor(offsets, device=origins.device)
