"""The elementwise layers around a gated scan, each in one pass over memory on CPU.

Outside the scan and the matrix products these passes are where an eager model spends its time. `reference.py` holds
the definitions (backends `reference` and `torch`), `native.cpp` the CPU kernels; on a GPU `torch.compile` fuses the
definitions.
"""

from torch import Tensor

from kernels.fused_layers import reference

__all__ = ["depthwise_convolution", "gated_norm_mix", "rms_norm", "swiglu"]

ACTIVATIONS = (None, "silu")


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension, statistics in float32 at least.

    Args:
        x: (..., C).
        weight: (C,).
        eps: added to the mean square.
        backend: one of `kernels.backend.BACKENDS`; chosen by device if None.

    Returns:
        (..., C) in the dtype of `x`.
    """
    return reference.rms_norm(x, weight, eps)


def depthwise_convolution(
    x: Tensor, weight: Tensor, *, activation: str | None = None, backend: str | None = None
) -> Tensor:
    """3x3 depthwise convolution of channels-last maps with zero padding 1 and no bias, then the activation.

    Args:
        x: (B, H, W, C).
        weight: (C, 1, 3, 3).
        activation: None or "silu".

    Returns:
        (B, H, W, C).
    """
    return reference.depthwise_convolution(x, weight, activation)


def swiglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """`silu(a) * b` for the halves a, b of the last dimension: (..., 2M) -> (..., M)."""
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
    """ViG's mix of the global and the local branch, per channel convex:

        G = sigmoid(gate_logits);  y = activation(G * rms_norm(scan) + (1 - G) * rms_norm(local))

    Args:
        scan: (B, N, H, V), output of the bidirectional scan.
        local: (B, N, H, V), output of the depthwise convolution, heads split.
        gate_logits: (B, N, H, V).
        scan_weight: (V,), norm weight shared by the heads.
        local_weight: (V,).
        activation: None or "silu".

    Returns:
        (B, N, H, V).
    """
    return reference.gated_norm_mix(scan, local, gate_logits, scan_weight, local_weight, eps, activation)
