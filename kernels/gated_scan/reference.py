"""The gated scan by its definition: one token after the other, in the dtype of its inputs.

Source: ViG (arXiv 2405.18425), gated linear attention with one decay per key channel:

    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,    o_t = scale * q_t^T S_t
"""

import torch
from torch import Tensor


def gated_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    scale: float,
    reverse: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One direction. Shapes as in `kernels.gated_scan.gated_scan`; every argument has the same dtype."""
    batch, tokens, heads, key_dim = query.shape
    state = initial_state
    if state is None:
        state = value.new_zeros(batch, heads, key_dim, value.shape[-1])
    outputs: list[Tensor] = [value.new_zeros(batch, heads, value.shape[-1])] * tokens
    for t in reversed(range(tokens)) if reverse else range(tokens):
        update = key[:, t, :, :, None] * value[:, t, :, None, :]  # (B, H, K, V)
        state = log_decay[:, t, :, :, None].exp() * state + update
        outputs[t] = scale * (query[:, t, :, :, None] * state).sum(-2)
    output = torch.stack(outputs, dim=1) if tokens else value.clone()
    return output, state


def bidirectional_gated_scan(
    query: Tensor, key: Tensor, value: Tensor, log_decay_forward: Tensor, log_decay_backward: Tensor, scale: float
) -> Tensor:
    """Mean of both directions: the current token is in both, undecayed, and so has weight 1/2 + 1/2."""
    forward, _ = gated_scan(query, key, value, log_decay_forward, scale, False, None)
    backward, _ = gated_scan(query, key, value, log_decay_backward, scale, True, None)
    return (forward + backward) / 2
