"""Linear attention: every query reads one state, the sum of the outer products of all keys and values.

Mathematics. Per batch element and head, for queries m = 0 .. M - 1 and keys and values n = 0 .. N - 1, with the feature
map phi, gates a_n of keys and b_n of values (1 where there are none) that depend on the place alone:

    k'_n = a_n phi(k_n)      v'_n = b_n v_n      S = sum_n k'_n v'_n^T      s = sum_n k'_n      t = sum_n v'_n

    division:     out_m = (phi(q_m) S) / (phi(q_m) . s + N eps)                          phi(x) = relu(x) + eps
    subtraction:  out_m = c phi(q_m) S + (1 - c phi(q_m) . s) t / N,  c = D^-0.5 / N     phi(x) = relu(x)

Without a feature map phi(x) = x. Gates have any sign: under division a query whose denominator vanishes has no finite
output. Without keys the output is zero.

Gradients, given d_m, that of out_m. Let g_m = d_m / denominator and p_m = phi(q_m) . (S g_m) / denominator (division),
or g_m = c d_m and p_m = g_m . t / N (subtraction). Then

    dphi(q_m) = S g_m - s p_m    dS = sum_m phi(q_m) g_m^T    ds = -sum_m phi(q_m) p_m
    dk'_n = dS v'_n + ds         dv'_n = dS^T k'_n + dt       da_n = phi(k_n) . dk'_n      db_n = v_n . dv'_n

with dt = 0 (division) or (sum_m d_m - s^T dS) / N (subtraction), so that nothing but the inputs, S, s and t is kept.
The derivative of relu at 0 is 0.

Sources: LINA, arXiv 2601.22630 (division with a gate of keys and values; its official code divides both sums by N,
which is the same quotient); InLine attention, arXiv 2412.06590 (subtraction); linear attention, arXiv 2006.16236.

Files: `reference.py` is the definition, all pairs of tokens; `factored.py` is the `torch` backend; `native.cpp` is the
CPU kernel, with `convolution.h` for a convolution in its read-out, and `triton.py` the GPU kernel; `operators.py`
registers them with PyTorch.
"""

import torch
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.fused_layers import add_image_convolution
from kernels.linear_attention import factored, operators, reference
from kernels.linear_attention.arguments import Settings, check_arguments, check_convolution
from kernels.precision import common_dtype, full_precision

__all__ = ["linear_attention", "linear_attention_with_convolution"]


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_gate: Tensor | None = None,
    value_gate: Tensor | None = None,
    feature_map: str | None = "relu",
    normalization: str = "division",
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Attention of all queries to all keys in time and memory proportional to their number.

    Args:
        query: (B, M, heads, D), any strides.
        key: (B, N, heads, D).
        value: (B, N, heads, V).
        key_gate: (heads, N), or (1, N) for all heads: factors on the mapped keys, also where they normalise.
        value_gate: the same for the values.
        feature_map: "relu", or None where queries and keys are mapped already.
        normalization: "division" or "subtraction", as above.
        eps: division only: what relu's features and the mean of the denominator are raised by; positive.
        backend: one of `kernels.backend.BACKENDS`; chosen by device if None.

    Returns:
        (B, M, heads, V) in the dtype of `value`; features and sums are float32 at least.

    Raises:
        ValueError: shapes, devices, dtypes or options do not fit.
        RuntimeError: the named backend cannot run here.
    """
    settings = Settings(feature_map, normalization, eps)
    check_arguments(query, key, value, key_gate, value_gate, settings)
    backend = resolve_backend("linear_attention", query.device, backend)
    if backend in ("native", "triton"):
        arguments = (*settings.as_arguments(), backend)
        return operators.linear_attention(query, key, value, key_gate, value_gate, *arguments)[0]
    gates = [gate for gate in (key_gate, value_gate) if gate is not None]
    with full_precision(query.device):
        query, key, widened, *gates = common_dtype(query, key, value, *gates)
        given = iter(gates)
        key_gate, value_gate = (None if gate is None else next(given) for gate in (key_gate, value_gate))
        form = reference if backend == "reference" else factored
        return form.linear_attention(query, key, widened, key_gate, value_gate, settings).to(value.dtype)


def linear_attention_with_convolution(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    key_gate: Tensor | None = None,
    value_gate: Tensor | None = None,
    feature_map: str | None = "relu",
    normalization: str = "division",
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """`linear_attention + [0 | depthwise convolution of the image]`, the image being the last h w tokens of `x`.

    The native kernel, while gradients are off, convolves each block of queries as it reads them out: the output is
    written once. Else, and on a GPU, this is `linear_attention` and then `kernels.fused_layers.add_image_convolution`.

    Args:
        query: as in `linear_attention`, like what is not named here.
        key: (B, N, heads, D).
        value: (B, N, heads, V).
        x: (B, M, C) with C = heads V, a token for each query.
        weight: (C, 1, K, K) with K odd; outside of the image lie (K - 1) / 2 zeros.
        bias: (C,), or None for none.
        grid: (h, w), at most M pixels.
        key_gate: (heads, N) or (1, N).
        value_gate: the same.
        feature_map: "relu" or None.
        normalization: "division" or "subtraction".
        eps: positive.
        backend: one of `kernels.backend.BACKENDS`; chosen by device if None.

    Returns:
        (B, M, C) in the dtype of `value`; sums are float32 at least.

    Raises:
        ValueError: shapes, devices, dtypes or options do not fit.
        RuntimeError: the named backend cannot run here.
    """
    settings = Settings(feature_map, normalization, eps)
    check_arguments(query, key, value, key_gate, value_gate, settings)
    check_convolution(x, weight, bias, grid, query, value)
    backend = resolve_backend("linear_attention_with_convolution", query.device, backend)
    without_gradients = not torch.is_grad_enabled()
    if backend == "native" and without_gradients:
        return operators.linear_attention_with_convolution(
            query, key, value, key_gate, value_gate, x, weight, bias, *grid, *settings.as_arguments()
        )
    options = {"feature_map": feature_map, "normalization": normalization, "eps": eps, "backend": backend}
    mixed = linear_attention(query, key, value, key_gate=key_gate, value_gate=value_gate, **options).flatten(2)
    if 0 in grid:
        return mixed
    return add_image_convolution(mixed, x, weight, bias, grid=grid, overwrite=without_gradients, backend=backend)
