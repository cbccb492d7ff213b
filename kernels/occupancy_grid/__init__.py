"""Occupancy grids: rays step through nested boxes of cells, and take samples in those that are occupied.

Mathematics. A ray, x(t) = origin + t direction, has a lattice of distances that its jitter shifts by a part of a step:

    cone_angle 0:   t_k = near + (k + jitter) step                                    k = 0, 1, 2, ...
    otherwise:      t_0 = near + jitter dt(near),    t_{k+1} = t_k + dt(t_k),         dt(t) = max(step, cone_angle t)

Interval k is from t_k to t_{k+1}, and its mid point m = (t_k + t_{k+1}) / 2 alone decides whether it is a sample: m
lies before `far`, and the cell of x(m) is occupied. With the centre c and the half sides h of the box,

    u = (x - c) / h          level = the least l with max |u| <= 2^l; beyond the last level nothing is occupied
    cell = floor((u / 2^level + 1) / 2 resolution), at most resolution - 1, per axis

so that the box of level l is the first one, scaled by 2^l around its centre. Nothing is clipped: the last sample may
end behind `far`. All of it is computed in float64, whatever the inputs, u as (origin - c) / h + m (direction / h), so
that every backend finds the same samples, but for a mid point within rounding (1e-15) of a cell's border; samples are
then rounded to the dtype of the origins. There is no gradient.

Source: Instant neural graphics primitives, arXiv 2201.05989; the nested boxes and the step that grows with distance
are those of its implementation in nerfacc at 57ccfa14, whose traversal this is in other words.

Files: `reference.py` is the definition, interval by interval; `lattice.py` is the `torch` backend, all intervals of
many rays at once; `native.cpp` is the CPU kernel, which skips empty blocks of cells; `operators.py` registers it with
PyTorch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.occupancy_grid import lattice, operators, reference
from kernels.occupancy_grid.arguments import check_arguments, check_values, per_ray

__all__ = ["Marched", "march"]

NO_TRITON = "marching has no triton kernel: PyTorch finds all samples at once on a GPU"


class Marched(NamedTuple):
    """Packed samples: those of ray r are rows offsets[r] to offsets[r + 1], in order of distance.

    Attributes:
        start: (S,), where each begins along its ray.
        end: (S,), where it ends.
        offsets: (R + 1,) int64.
    """

    start: Tensor
    end: Tensor
    offsets: Tensor


@torch.no_grad()
def march(
    origins: Tensor,
    directions: Tensor,
    near: Tensor | float,
    far: Tensor | float,
    occupied: Tensor,
    box: Tensor,
    *,
    step: float,
    cone_angle: float = 0.0,
    jitter: Tensor | None = None,
    backend: str | None = None,
) -> Marched:
    """Samples of R rays in the occupied cells of a grid.

    Args:
        origins: (R, 3), any strides, as all inputs.
        directions: (R, 3); distances are in units of their lengths, 1 usually. A ray without direction has no samples.
        near: where the lattice begins, a number or one a ray (R,), finite.
        far: where it ends, a number or one a ray (R,); infinity for the end of the grid.
        occupied: (levels, X, Y, Z) bool, the cells of nested boxes, the smallest first.
        box: (2, 3), lower and upper corner of the smallest box.
        step: least length of an interval, positive.
        cone_angle: growth of the intervals with distance; 0 for none.
        jitter: (R,), from 0 to 1, the part of a step by which a ray's lattice is shifted; None for 0.
        backend: "reference", "torch" or "native"; chosen by device if None.

    Returns:
        Start and end of the samples in the dtype of the origins, float32 at least, and the offsets of the rays.

    Raises:
        ValueError: shapes, devices, dtypes or numbers do not fit; on CPU also where an origin, direction, `near`,
            `far` or `jitter` is NaN, an origin, direction or `near` is infinite, or the box is empty.
        RuntimeError: the named backend cannot run here.
    """
    check_arguments(origins, directions, near, far, occupied, box, step, cone_angle, jitter)
    near, far, shift = (per_ray(x, origins) for x in (near, far, 0.0 if jitter is None else jitter))
    check_values(origins, directions, near, far, box, shift)
    backend = resolve_backend("occupancy_grid", origins.device, backend, refusals={"triton": NO_TRITON})
    arguments = (origins.double(), directions.double(), near, far, shift, occupied, box.double(), step, cone_angle)
    form = {"reference": reference.march, "torch": lattice.march, "native": operators.occupancy_march}[backend]
    start, end, offsets = form(*arguments)
    dtype = torch.promote_types(origins.dtype, torch.float32)
    return Marched(start.to(dtype), end.to(dtype), offsets)
