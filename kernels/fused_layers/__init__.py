"""The elementwise layers around a gated scan, each in one pass over memory on CPU.

Outside the scan and the matrix products these passes are where an eager model spends its time. `reference.py` holds
the definitions (backends `reference` and `torch`), `native.cpp` and `convolution.cpp` the CPU kernels; there are no
Triton kernels of these, because on a GPU `torch.compile` fuses the definitions: the `triton` backend runs them as they
are.
"""

import torch
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.fused_layers import operators, reference

__all__ = [
    "add_image_convolution",
    "depthwise_convolution",
    "gated_norm_mix",
    "gated_product",
    "gelu_depthwise_residual",
    "rms_norm",
    "swiglu",
]

ACTIVATIONS = (None, "silu")
GATES = ("sigmoid", "silu")


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension, statistics in float32 at least.

    Args:
        x: (..., C).
        weight: (C,).
        eps: added to the mean square.
        backend: one of `kernels.backend.BACKENDS`; chosen by device if None.

    Returns:
        (..., C) in the dtype of `x`; under autocast in autocast's, ready for the matrix product that follows.

    Raises:
        ValueError: `weight` does not fit `x`.
    """
    _check_shape("weight", weight, (x.shape[-1],), x)
    dtype = _output_dtype(x)
    if resolve_backend("rms_norm", x.device, backend) == "native":
        return operators.rms_norm(x, weight, eps, dtype)
    return reference.rms_norm(x, weight, eps).to(dtype)


def depthwise_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """`residual + activation(convolution + bias)`: a depthwise convolution of channels-last maps that keeps their size.

    `x` and `residual` may be slices of channels of wider maps: on CPU nothing is copied.

    Args:
        x: (B, H, W, C).
        weight: (C, 1, K, K) with K odd; outside of the map lie (K - 1) / 2 zeros.
        bias: (C,), or None for none.
        residual: (B, H, W, C), added at the end; `x` itself or another map, or None for none.
        activation: None or "silu".
        backend: as in `rms_norm`.

    Returns:
        (B, H, W, C) in the dtype of `x`, under autocast in autocast's. A residual is not rounded to it: with one the
        dtype is that of the sum, as in PyTorch.

    Raises:
        ValueError: shapes do not fit or the activation is unknown.
    """
    _check_convolution(x, weight, bias)
    if residual is not None:
        _check_shape("residual", residual, tuple(x.shape), x)
    activate = _check_activation(activation)
    dtype = _output_dtype(x)
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    if resolve_backend("depthwise_convolution", x.device, backend) == "native":
        add_input = residual is x
        return operators.depthwise_convolution(
            x, weight, bias, None if add_input else residual, add_input, activate, dtype
        )
    return reference.depthwise_convolution(x, weight, bias, residual, activation).to(dtype)


def add_image_convolution(
    tokens: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    overwrite: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`tokens + [0 | depthwise_convolution(image)]`, where the image is the last h w tokens of `x`, row by row.

    Args:
        tokens: (B, N, C).
        x: (B, N, C); may be `tokens`, or share its memory: where that is overwritten, the image is copied before.
        weight: (C, 1, K, K); as in `depthwise_convolution`, like `bias`.
        bias: (C,), or None for none.
        grid: (h, w), at most N pixels.
        overwrite: the result lies in `tokens`, what comes before the image untouched; without gradients only.
        backend: as in `rms_norm`.

    Returns:
        (B, N, C) in the dtype of `tokens`, also under autocast.

    Raises:
        ValueError: shapes do not fit, or `overwrite` where a gradient is wanted.
    """
    if x.dim() != 3 or x.shape[1] < grid[0] * grid[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be (batch, tokens, channels) with {grid} tokens at least"
        )
    _check_shape("tokens", tokens, tuple(x.shape), x)
    _check_convolution(x[:, x.shape[1] - grid[0] * grid[1] :].unflatten(1, grid), weight, bias)
    if (
        overwrite
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (tokens, x, weight, bias))
    ):
        raise ValueError("overwrite is True, and a gradient is wanted; it works without gradients only")
    if resolve_backend("add_image_convolution", x.device, backend) != "native":
        return reference.add_image_convolution(tokens, x, weight, bias, grid, overwrite)
    if overwrite:
        operators.add_image_convolution_(tokens, x, weight, bias, *grid)
        return tokens
    return operators.add_image_convolution(tokens, x, weight, bias, *grid)


def gelu_depthwise_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """`h + depthwise_convolution(h, weight, bias)` of `h = gelu(x)` (exact, by the error function).

    On CPU `h` is never stored, and backward computes it again from `x`.

    Args:
        x: (B, H, W, C); as in `depthwise_convolution`, like what follows.
        weight: (C, 1, K, K).
        bias: (C,), or None for none.
        backend: as in `rms_norm`.

    Returns:
        (B, H, W, C); the dtype as in `rms_norm`.

    Raises:
        ValueError: shapes do not fit.
    """
    _check_convolution(x, weight, bias)
    dtype = _output_dtype(x)
    if resolve_backend("gelu_depthwise_residual", x.device, backend) == "native":
        return operators.gelu_depthwise_residual(x, weight, bias, dtype)
    return reference.gelu_depthwise_residual(x, weight, bias).to(dtype)


def gated_product(x: Tensor, logits: Tensor, kind: str, *, backend: str | None = None) -> Tensor:
    """`x * sigmoid(logits)` or `x * silu(logits)`.

    Both may be slices of channels of a wider projection: on CPU nothing is copied.

    Args:
        x: (..., C).
        logits: (..., C).
        kind: "sigmoid" or "silu".
        backend: as in `rms_norm`.

    Returns:
        (..., C) in the dtype of `x`.

    Raises:
        ValueError: shapes do not fit or the kind is unknown.
    """
    if x.dim() == 0:
        raise ValueError("x is a scalar; it must be (..., channels)")
    _check_shape("logits", logits, tuple(x.shape), x)
    if kind not in GATES:
        raise ValueError(f"kind is {kind!r}; valid are 'sigmoid' and 'silu'")
    if resolve_backend("gated_product", x.device, backend) == "native":
        return operators.gated_product(x, logits, kind == "silu")
    return reference.gated_product(x, logits, kind).to(x.dtype)


def swiglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """`silu(a) * b` for the halves a, b of the last dimension: (..., 2M) -> (..., M).

    Raises:
        ValueError: the last dimension is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x has {x.shape[-1]} channels; they must be even to be halved")
    if resolve_backend("swiglu", x.device, backend) == "native":
        return operators.swiglu(x)
    return reference.swiglu(x)


def gated_norm_mix(
    scan: Tensor,
    local: Tensor,
    gate_logits: Tensor,
    scan_weight: Tensor,
    local_weight: Tensor,
    eps: float = 1e-6,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """ViG's mix of the global and the local branch, per channel convex (arXiv 2405.18425):

        G = sigmoid(gate_logits);  y = activation(G * rms_norm(scan) + (1 - G) * rms_norm(local))

    Args:
        scan: (B, N, H, V), output of the bidirectional scan.
        local: (B, N, H, V), output of the depthwise convolution, heads split.
        gate_logits: (B, N, H, V).
        scan_weight: (V,), norm weight shared by the heads.
        local_weight: (V,).
        eps: of both norms.
        activation: None or "silu".
        backend: as in `rms_norm`.

    Returns:
        (B, N, H, V) in the dtype of `scan`.

    Raises:
        ValueError: shapes do not fit or the activation is unknown.
    """
    if scan.dim() != 4:
        raise ValueError(f"scan has shape {tuple(scan.shape)}; it must be (batch, tokens, heads, value_dim)")
    for name, tensor in (("local", local), ("gate_logits", gate_logits)):
        _check_shape(name, tensor, tuple(scan.shape), scan)
    for name, tensor in (("scan_weight", scan_weight), ("local_weight", local_weight)):
        _check_shape(name, tensor, (scan.shape[-1],), scan)
    activate = _check_activation(activation)
    if resolve_backend("gated_norm_mix", scan.device, backend) == "native":
        return operators.gated_norm_mix(scan, local, gate_logits, scan_weight, local_weight, eps, activate)
    mixed = reference.gated_norm_mix(scan, local, gate_logits, scan_weight, local_weight, eps, activation)
    return mixed.to(scan.dtype)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with x of {tuple(x.shape)} it must be {shape}")


def _check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (batch, height, width, channels)")
    size = weight.shape[-1] if weight.dim() else 0
    if size % 2 == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (channels, 1, K, K) with K odd")
    _check_shape("weight", weight, (x.shape[-1], 1, size, size), x)
    if bias is not None:
        _check_shape("bias", bias, (x.shape[-1],), x)


def _check_activation(activation: str | None) -> bool:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; valid are None and 'silu'")
    return activation == "silu"


def _output_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if x.dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
