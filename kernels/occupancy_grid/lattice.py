"""The `torch` backend: every interval of the lattices of many rays at once, and a mask."""

import torch
from torch import Tensor

INTERVALS = 1 << 20  # at a time


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
    origins, directions = (origins - centre) / half, directions / half
    enter, leave = _outermost_box(origins, directions, 2.0 ** (len(occupied) - 1))
    leave = torch.minimum(leave, far)
    hits = enter <= leave
    counts = near.new_zeros(near.shape, dtype=torch.int64)
    starts, ends = [near[:0]], [near[:0]]
    growing = cone_angle > 0
    lattice = _growing if growing else _even
    for chosen in _chunks(near, jitter, enter, leave, hits, step, growing):
        edges, last = lattice(*(x[chosen] for x in (near, jitter, enter, leave)), step, cone_angle)
        middle = (edges[:, :-1] + edges[:, 1:]) / 2  # (rays, intervals)
        at = origins[chosen, None] + middle[..., None] * directions[chosen, None]
        taken = _is_occupied(at, occupied) & (middle < far[chosen, None]) & last
        counts[chosen] = taken.sum(1)
        starts.append(edges[:, :-1][taken])
        ends.append(edges[:, 1:][taken])
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return torch.cat(starts), torch.cat(ends), offsets


def _outermost_box(origins: Tensor, directions: Tensor, half: float) -> tuple[Tensor, Tensor]:
    """(R,) each, where rays enter and leave it; those that miss it leave before they enter."""
    sides = torch.stack([(-half - origins) / directions, (half - origins) / directions]).sort(0).values
    parallel, within = directions == 0, origins.abs() <= half
    # A ray along a side is between both sides everywhere, or nowhere.
    enter = torch.where(parallel, torch.where(within, -torch.inf, torch.inf), sides[0]).amax(1)
    leave = torch.where(parallel, torch.where(within, torch.inf, -torch.inf), sides[1]).amin(1)
    return torch.where(parallel.all(1), torch.inf, enter), torch.where(parallel.all(1), -torch.inf, leave)


def _chunks(
    near: Tensor, jitter: Tensor, enter: Tensor, leave: Tensor, hits: Tensor, step: float, growing: bool
) -> tuple[Tensor, ...]:
    """The rays that hit the grid, in chunks of `INTERVALS`."""
    rays = hits.nonzero()[:, 0]
    if rays.shape[0] == 0:
        return ()
    begin = near[rays] if growing else torch.maximum(enter[rays], near[rays])
    longest = ((leave[rays] - begin) / step).max().clamp(min=0).item()
    return rays.split(max(1, int(INTERVALS / (longest + 3))))


def _even(
    near: Tensor, jitter: Tensor, enter: Tensor, leave: Tensor, step: float, cone_angle: float
) -> tuple[Tensor, Tensor]:
    """Edges (rays, intervals + 1) of intervals of one length, from where each ray enters; which of them count."""
    first = ((enter - near) / step - jitter - 0.5).floor().clamp(min=0)
    last = ((leave - near) / step - jitter - 0.5).ceil()
    most = int((last - first).max().clamp(min=-1).item()) + 1
    k = first[:, None] + torch.arange(most + 1, device=near.device)
    return near[:, None] + (k + jitter[:, None]) * step, k[:, :-1] <= last[:, None]


def _growing(
    near: Tensor, jitter: Tensor, enter: Tensor, leave: Tensor, step: float, cone_angle: float
) -> tuple[Tensor, Tensor]:
    """As `_even`, of intervals that grow, from `near`; all of them count."""
    t = near + jitter * (cone_angle * near).clamp(min=step)
    edges = [t]
    while (t <= leave).any():
        t = t + (cone_angle * t).clamp(min=step)
        edges.append(t)
    return torch.stack(edges, 1), torch.ones((), dtype=torch.bool, device=near.device)


def _is_occupied(at: Tensor, occupied: Tensor) -> Tensor:
    """Whether the cells of points (..., 3) are, in the box's coordinates: -1 to 1 in the smallest one."""
    levels, *sizes = occupied.shape
    farthest = at.abs().amax(-1)
    level = sum((farthest > 2.0**other).long() for other in range(levels))
    inside = level < levels
    level = level.clamp(max=levels - 1)
    scale = torch.exp2(level.to(at.dtype))
    place = level
    for axis, size in enumerate(sizes):
        cell = ((at[..., axis] / scale + 1) / 2 * size).floor().clamp(min=0, max=size - 1).long()
        place = place * size + cell
    return occupied.reshape(-1)[place] & inside
