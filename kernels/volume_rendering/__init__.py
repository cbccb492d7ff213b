"""Volume rendering: samples along rays, packed one ray after the other, composited into colours, opacities and depths.

Mathematics. Of one ray, its samples j in order, with density sigma >= 0, colour c and the interval from t0 to t1:

    tau_j = sigma_j (t1_j - t0_j)         alpha_j = 1 - exp(-tau_j)
    T_j = exp(-sum over k < j of tau_k)   w_j = T_j alpha_j
    colour = sum_j w_j c_j + (1 - opacity) background
    opacity = sum_j w_j                   depth = sum_j w_j (t0_j + t1_j) / 2

A ray without samples has opacity and depth 0 and the colour of the background. The depth is accumulated, so it is too
short where the ray is not opaque; `expected_depth` divides by the opacity, in the ways of nerfacc and nerfstudio, and
`median_depth` is where half of the light is gone.

Gradients. With those of the outputs, and g_j that of w_j through all of them,

    g_j = <g_colour, c_j - background> + g_opacity + g_depth (t0_j + t1_j) / 2 + g_weights_j
    sigma_j: (t1_j - t0_j) (T_j (1 - alpha_j) g_j - sum over k > j of w_k g_k)
    c_j: w_j g_colour                     background: (1 - opacity) g_colour

Distances are never differentiated. Sums run within a ray, so that no ray takes digits from another, and the gradient of
an opaque sample is 0, however long the interval (1e10 for the last one, as in NeRF). Nothing but the inputs and the
weights is kept for backward.

Sources: NeRF, arXiv 2003.08934; the packed form, expected depth and visibility, nerfacc at 57ccfa14; the median depth,
nerfstudio at 50e0e3c7; the interval of 1e10, Switch-NeRF at b9d2aeb.

Files: `reference.py` is the definition, ray by ray; `vectorised.py` is the `torch` backend; `native.cpp` is the CPU
kernel and `triton.py` the GPU kernel; `operators.py` registers them with PyTorch; `depths.py` are depths from weights.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.precision import common_dtype
from kernels.volume_rendering import operators, reference, vectorised
from kernels.volume_rendering.arguments import check_arguments, check_offset_values, check_visibility
from kernels.volume_rendering.depths import expected_depth, median_depth

__all__ = ["Composited", "composite", "expected_depth", "median_depth", "visible"]

NO_TRITON = "visibility has no triton kernel: PyTorch finds it on a GPU"


class Composited(NamedTuple):
    """What `composite` returns.

    Attributes:
        colour: (R, C), in the dtype of the samples' colours.
        opacity: (R,), as are all that follow in the dtype of the arithmetic.
        depth: (R,), accumulated.
        weights: (S,), of the samples.
    """

    colour: Tensor
    opacity: Tensor
    depth: Tensor
    weights: Tensor


def composite(
    density: Tensor,
    colour: Tensor,
    start: Tensor,
    end: Tensor,
    offsets: Tensor,
    *,
    background: Tensor | None = None,
    backend: str | None = None,
) -> Composited:
    """Composite the samples of R rays; the arithmetic is in the widest of the inputs' dtypes, float32 at least.

    Args:
        density: (S,), 0 at least and finite, however large. Any strides, as all inputs.
        colour: (S, C), any C and any numbers.
        start: (S,), where a sample's interval begins along its ray; finite, without gradient.
        end: (S,), where it ends.
        offsets: (R + 1,) int64; the samples of ray r are rows offsets[r] to offsets[r + 1], in order of distance.
        background: (C,) or (R, C), behind what is not opaque; None for black, at no cost. nerfstudio's `last_sample` is
            the last colour of each ray, `colour[offsets[1:] - 1]` if no ray is empty.
        backend: one of `kernels.backend.BACKENDS`; chosen by device if None.

    Returns:
        Colour, opacity, depth and weights, all differentiable by density, colour and background.

    Raises:
        ValueError: shapes, devices or dtypes do not fit; on CPU also where the offsets do not begin with 0, decrease,
            or do not end with S. (On GPUs, where to look would be to wait, the `triton` kernels then stay within the
            samples, and what they return means nothing.)
        RuntimeError: the named backend cannot run here.
        NotImplementedError: a gradient of a gradient of the `native` or `triton` backend; `torch` and `reference` have
            them.
    """
    check_arguments(density, start, end, offsets, colour, background)
    inputs = (density, colour, start.detach(), end.detach())
    wide = any(tensor.dtype == torch.float64 for tensor in inputs)
    refusal = "the triton kernels take float32, bfloat16 and float16, and an input is float64" if wide else None
    backend = resolve_backend("volume_rendering", density.device, backend, refusals={"triton": refusal})
    if backend in ("native", "triton"):
        outputs = operators.volume_rendering(*inputs, offsets, backend)
    else:
        check_offset_values(offsets, density.shape[0])
        form = reference if backend == "reference" else vectorised
        outputs = form.composite(*common_dtype(*inputs), offsets)
    mixed, opacity, depth, weights = outputs
    if background is not None:
        mixed = mixed + (1 - opacity)[:, None] * background
    return Composited(mixed.to(colour.dtype), opacity, depth, weights)


@torch.no_grad()
def visible(
    density: Tensor,
    start: Tensor,
    end: Tensor,
    offsets: Tensor,
    transmittance: float = 1e-4,
    alpha: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Which samples count, so that the others need no colour: those that enough light reaches and that stop enough.

    Args:
        density, start, end, offsets: as in `composite`.
        transmittance: least T of a sample that counts.
        alpha: least alpha of one.
        backend: "reference", "torch" or "native"; chosen by device if None.

    Returns:
        (S,) bool, without gradient.

    Raises:
        ValueError: as in `composite`, or a limit is not a number from 0 to 1.
        RuntimeError: the named backend cannot run here.
    """
    check_arguments(density, start, end, offsets)
    check_visibility(transmittance, alpha)
    backend = resolve_backend("visible", density.device, backend, refusals={"triton": NO_TRITON})
    if backend == "native":
        return operators.visible_samples(density, start, end, offsets, transmittance, alpha)
    check_offset_values(offsets, density.shape[0])
    form = reference if backend == "reference" else vectorised
    return form.visible(*common_dtype(density, start, end), offsets, transmittance, alpha)
