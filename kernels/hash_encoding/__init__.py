"""Multiresolution hash encoding: a point reads interpolated features of grids of several resolutions, kept in a table.

Mathematics. Of a point x in [0, 1]^D, at each of L levels, with its scale s and its S rows of F numbers of the table:

    p = s x + 1/2        k = floor(p)        w = p - k        per dimension
    y = sum over corners c in {0, 1}^D of  prod_d (w_d if c_d else 1 - w_d)  table[slot(k + c)]

    slot(k) = sum_d k_d R^d                       mod S     if R^D <= S: R vertices a side, every one has its row
    slot(k) = xor_d k_d prime_d                   mod S     otherwise, S = 2^log2_table_size; vertices share rows

in unsigned 32-bit integers that wrap. The half staggers the levels. s_l = N_min b^l - 1 and R_l = ceil(s_l) + 1, in
float32 as in tiny-cuda-nn, with b = (N_max / N_min)^(1 / (L - 1)); a level that is not hashed has the least multiple of
8 that holds R^D as its S. Smoothstep interpolates with w^2 (3 - 2 w); nearest takes the corner k alone. With the
convention "nerfstudio", s_l = floor(N_min b^l), nothing is staggered, every level is hashed, and the upper corner is
ceil(p): a point on a vertex has no gradient along that dimension.

Mixture. The tables of E experts, each with its own (N_min, N_max), lie one after the other in one table; point i reads
the grid of expert[i], and its features are multiplied by gate[i].

Gradients. With g that of the features of one level, after the gate, T_c the corners' rows and u_c their factors:

    table[slot_c] += u_c g        gate: sum over levels of <y, g>
    x_d: sum over levels of  s dw_d sum over c with c_d = 0 of  prod_{e != d} u_e  <T_{c + d} - T_c, g>

with dw = 1, or 6 w (1 - w) of smoothstep. Gradients of gradients (normals, eikonal losses): backends `torch` and
`reference`.

Sources: Instant neural graphics primitives, arXiv 2201.05989; tiny-cuda-nn, encodings/grid.h at 6ee3546b; nerfstudio,
field_components/encodings.py at 50e0e3c7. The mixture is inferred from the abstract of Switch-NeRF++.

Files: `grid.py` says what grids there are; `reference.py` is the definition; `vectorised.py` is the `torch` backend;
`native.cpp` is the CPU kernel and `triton.py` the GPU kernel; `layout.py` is how features lie in memory; `operators.py`
registers the kernels with PyTorch.
"""

import torch
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.hash_encoding import operators, reference, vectorised
from kernels.hash_encoding.arguments import check_arguments, check_values
from kernels.hash_encoding.grid import HashGrid
from kernels.precision import common_dtype

__all__ = ["HashGrid", "hash_encoding"]


def hash_encoding(
    points: Tensor,
    table: Tensor,
    grid: HashGrid,
    *,
    expert: Tensor | None = None,
    gate: Tensor | None = None,
    max_level: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Features of points.

    Outside of [0, 1] the grid goes on as the integers wrap, as in tiny-cuda-nn; positions beyond the range of int32
    stay at its ends. No point and no expert makes a kernel touch memory outside of the table.

    Args:
        points: (P, D), in [0, 1] usually, any strides.
        table: (grid.entries, F), as `grid.initialize` makes it.
        grid: its configuration.
        expert: (P,), integers, which grid of a mixture a point reads. Sorted ones are fastest on CPU.
        gate: (P,), multiplies a point's features; None for 1.
        max_level: features of levels from this one on are zeros and take no time; None for all levels.
        backend: one of `kernels.backend.BACKENDS`; chosen by device if None.

    Returns:
        (P, L F) in the dtype of `table`, level 0 first. The arithmetic is in the widest of the inputs' dtypes, float32
        at least. The kernels lay features of one kind side by side (strides 1, P), as a linear layer takes them.

    Raises:
        ValueError: shapes, devices or dtypes do not fit; on CPU also where a point is NaN or infinite or an expert
            does not exist. (On GPUs, where to look would be to wait, such a point's features are NaN with the `triton`
            backend.)
        RuntimeError: the named backend cannot run here.
        NotImplementedError: a gradient of a gradient of the `native` or `triton` backend.
    """
    check_arguments(points, table, grid, expert, gate, max_level)
    inputs = (points, table) if gate is None else (points, table, gate)
    wide = any(tensor.dtype == torch.float64 for tensor in inputs)
    refusal = "the triton kernels take float32, bfloat16 and float16, and an input is float64" if wide else None
    backend = resolve_backend("hash_encoding", points.device, backend, refusals={"triton": refusal})
    max_level = grid.levels if max_level is None else max_level
    if backend in ("native", "triton"):
        return operators.hash_encoding(points, table, expert, gate, *grid.as_arguments(), max_level, backend)
    if points.device.type == "cpu" and not torch.compiler.is_compiling():
        check_values(points, expert, grid)
    points, widened, *gates = common_dtype(*inputs)
    form = reference if backend == "reference" else vectorised
    features = form.hash_encoding(points, widened, grid, expert, max_level)
    return (features * gates[0][:, None] if gates else features).to(table.dtype)
