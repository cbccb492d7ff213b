"""Retention in shifted windows: a pass along the width, then a pass along the height, of a map of tokens.

Mathematics. Each axis of the map, of length L, is rolled by `-shift`, padded at its end to whole windows and cut into
them; two tokens may meet if they lie in the same window and neither the wrap-around nor the padding lies between
them. Per head, with q and k rotated by their place in the window (below), gamma = exp(log_decay) <= 1 and s the head's
slope, for tokens i, j of one row (width pass) or one column (height pass) that may meet:

    softmax:  A_ij = softmax_j(scale q_i.k_j + |i - j| log gamma)
    sigmoid:  a_ij = sigmoid(scale q_i.k_j + s |i - j|) gamma^|i - j|     (signed slopes: s (i - j))
              A_ij = a_ij / max(sum_j a_ij, 1)  ("clamp"),  a_ij / sum_j a_ij  ("sum")  or  a_ij  ("none")

    output = A_height (A_width value)

so that both passes together decay with the Manhattan distance. Rotation: channel pair m = 0 .. D/2 - 1 of the token at
row h and column w of its window turns by the angle (h * window_width + w) * 10000^(-m / (D/2 - 1)).

Because rolling and cutting an axis leaves nothing but runs of neighbours, the operation needs no roll, no padding and
no copy of windows: `tables.runs` lists the runs, and the native and Triton kernels index the map by them.

Sources: RMT, arXiv 2309.11523 (decay, rotation, two passes; with one window on the whole map, and softmax, this is its
decomposed retention exactly); Swin, arXiv 2103.14030 (shifted windows); SWAT, arXiv 2502.18845 (sigmoid, slopes);
Gated-SwinRMT, arXiv 2604.06014 (their combination, re-implemented from its abstract: what is inferred is an argument).

Files: `reference.py` is the definition, in Swin's own terms, and serves the `torch` backend too; `native.cpp` is the
CPU kernel and `triton.py` the GPU kernel; `operators.py` registers them with PyTorch; `tables.py` keeps the constants
of each size.
"""

from collections.abc import Sequence

from torch import Tensor

from kernels.backend import resolve_backend
from kernels.precision import common_dtype, full_precision
from kernels.window_retention import operators, reference
from kernels.window_retention.arguments import Settings, as_pair, check_arguments
from kernels.window_retention.tables import LARGEST_TILE

__all__ = ["window_retention"]


def window_retention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Sequence[float],
    *,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    activation: str = "softmax",
    slopes: Sequence[float] | None = None,
    signed_slopes: bool = False,
    normalization: str = "clamp",
    rotary: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Width pass, then height pass, of windowed retention over a map.

    Args:
        query: (B, H, W, heads, D), any strides; D is even if `rotary`.
        key: (B, H, W, heads, D).
        value: (B, H, W, heads, V).
        log_decay: one natural logarithm of gamma a head, finite and <= 0. A constant: it gets no gradient.
        window: rows and columns of a window, at most the map's.
        shift: rows and columns by which the windows are shifted, each 0 .. window - 1.
        activation: "softmax" or "sigmoid".
        slopes: sigmoid only: what is added to a head's scores for each step of distance; None for nothing.
        signed_slopes: multiply the slopes by i - j (query minus key) instead of |i - j|.
        normalization: sigmoid only: "clamp", "sum" or "none", as above.
        rotary: rotate queries and keys by their place in the window.
        scale: factor on the scores; D ** -0.5 if None.
        backend: one of `kernels.backend.BACKENDS`; chosen by device if None. Windows of more than 64 tokens have no
            Triton kernel: on a GPU they run on `torch` unless Triton is asked for by name.

    Returns:
        (B, H, W, heads, V) in the dtype of `value`; sums are taken in float32 at least.

    Raises:
        ValueError: shapes, devices, dtypes or options do not fit.
        RuntimeError: the named backend cannot run here.
    """
    settings = Settings(
        log_decay=tuple(map(float, log_decay)),
        slopes=() if slopes is None else tuple(map(float, slopes)),
        window=as_pair("window", window),
        shift=as_pair("shift", shift),
        activation=activation,
        normalization=normalization,
        signed_slopes=signed_slopes,
        rotary=rotary,
        scale=float(max(query.shape[-1], 1)) ** -0.5 if scale is None else scale,
    )
    check_arguments(query, key, value, settings)
    tokens = settings.window[0] * settings.window[1]
    refusal = None
    if tokens > LARGEST_TILE:
        refusal = f"the triton kernel takes windows of up to {LARGEST_TILE} tokens, not {tokens}"
    backend = resolve_backend("window_retention", query.device, backend, refusals={"triton": refusal})
    if backend in ("native", "triton"):
        return operators.window_retention(query, key, value, *settings.as_arguments(), backend)
    with full_precision(query.device):
        return reference.window_retention(*common_dtype(query, key, value), settings).to(value.dtype)
