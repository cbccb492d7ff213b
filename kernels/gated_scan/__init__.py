"""Gated linear attention as a scan over tokens, in one direction or in both at once.

Mathematics (per batch element and head, natural-log decays g <= 0, one per token and key channel):

    forward :  S_t = diag(exp(gf_t)) S_{t-1} + k_t v_t^T        of_t = scale * q_t^T S_t
    backward:  R_t = diag(exp(gb_t)) R_{t+1} + k_t v_t^T        ob_t = scale * q_t^T R_t
    bidirectional output: (of_t + ob_t) / 2

The receiving token's own decay is applied, the source token's is not; the current token sits in both directions,
undecayed. Source: ViG, arXiv 2405.18425.

Files: `reference.py` is the definition, `chunked.py` the portable PyTorch form, `native.cpp` the CPU kernel and
`triton.py` the GPU kernel; `operators.py` registers the last two with PyTorch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.gated_scan import chunked, operators, reference
from kernels.gated_scan.arguments import check_arguments, check_decays, check_tensor
from kernels.precision import common_dtype, full_precision

__all__ = ["bidirectional_gated_scan", "gated_scan", "log_decay_from_logits"]


def log_decay_from_logits(logits: Tensor, normalizer: float = 16.0) -> Tensor:
    """Return `logsigmoid(logits) / normalizer`: the log decays of gate logits (any shape), in float32 at least."""
    return F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / normalizer


def bidirectional_gated_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay_forward: Tensor,
    log_decay_backward: Tensor,
    *,
    scale: float | None = None,
    logit_normalizer: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean of a forward and a backward gated linear attention over the same tokens.

    Args:
        query: (B, N, H, K); any N >= 0, any strides.
        key: (B, N, H, K).
        value: (B, N, H, V).
        log_decay_forward: (B, N, H, K), natural logarithms <= 0; the first token's has no effect.
        log_decay_backward: (B, N, H, K), likewise; the last token's has no effect.
        scale: factor on the queries; K ** -0.5 if None.
        logit_normalizer: if given, the two decay arguments are gate logits z of any sign, and the log decay
            `logsigmoid(z) / logit_normalizer` is taken inside the operation (ViG: 16), nothing being stored.
        backend: one of `kernels.backend.BACKENDS`; chosen by device if None.

    Returns:
        (B, N, H, V) in the dtype of `value`; sums are taken in float32 at least.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, a log decay is positive or NaN, or an option is out of range.
        RuntimeError: the named backend cannot run here.
    """
    decays = {"log_decay_forward": log_decay_forward, "log_decay_backward": log_decay_backward}
    scale = check_arguments(query, key, value, decays, scale, logit_normalizer)
    backend = resolve_backend("bidirectional_gated_scan", query.device, backend)
    if logit_normalizer is None and backend != "native":
        check_decays(decays)
    if backend in ("native", "triton"):
        function = operators.bidirectional_gated_scan
        return function(
            query, key, value, log_decay_forward, log_decay_backward, scale, logit_normalizer or 0.0, backend
        )
    plain = (reference if backend == "reference" else chunked).bidirectional_gated_scan
    tensors = common_dtype(query, key, value, *_log_decays(decays, logit_normalizer))
    with full_precision(query.device):
        return plain(*tensors, scale).to(value.dtype)


def gated_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    logit_normalizer: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated linear attention in one direction.

    Args:
        query: (B, N, H, K).
        key: (B, N, H, K).
        value: (B, N, H, V).
        log_decay: (B, N, H, K), natural logarithms <= 0.
        scale: factor on the queries; K ** -0.5 if None.
        reverse: scan from the last token to the first.
        initial_state: (B, H, K, V), the state before the first token scanned; zeros if None.
        logit_normalizer: as in `bidirectional_gated_scan`.
        backend: as in `bidirectional_gated_scan`.

    Returns:
        The output (B, N, H, V) in the dtype of `value`, and the final state (B, H, K, V) in float32 at least.

    Raises:
        ValueError, RuntimeError: as in `bidirectional_gated_scan`.
    """
    decays = {"log_decay": log_decay}
    scale = check_arguments(query, key, value, decays, scale, logit_normalizer)
    if initial_state is not None:
        expected = (query.shape[0], query.shape[2], query.shape[3], value.shape[3])
        check_tensor("initial_state", initial_state, expected, query)
    backend = resolve_backend("gated_scan", query.device, backend)
    if logit_normalizer is None and backend != "native":
        check_decays(decays)
    if backend in ("native", "triton"):
        normalizer = logit_normalizer or 0.0
        return operators.gated_scan(query, key, value, log_decay, initial_state, scale, normalizer, reverse, backend)
    plain = (reference if backend == "reference" else chunked).gated_scan
    states = () if initial_state is None else (initial_state,)
    tensors = common_dtype(query, key, value, *_log_decays(decays, logit_normalizer), *states)
    with full_precision(query.device):
        output, final_state = plain(*tensors[:4], scale, reverse, tensors[4] if states else None)
    return output.to(value.dtype), final_state


def _log_decays(decays: dict[str, Tensor], normalizer: float | None) -> list[Tensor]:
    if normalizer is None:
        return list(decays.values())
    return [log_decay_from_logits(logits, normalizer) for logits in decays.values()]
