"""The definition: a matrix of weights of all pairs of a query and a key."""

from torch import Tensor

from kernels.linear_attention.arguments import Settings


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, settings: Settings
) -> Tensor:
    """Tensors of one dtype; shapes and the rest as `kernels.linear_attention.linear_attention`."""
    tokens = max(key.shape[1], 1)  # without keys all sums are zero, and so is the output
    query, key = (settings.features(x).transpose(1, 2) for x in (query, key))  # (B, heads, M or N, D)
    value = value.transpose(1, 2)
    if key_gate is not None:
        key = key * key_gate[:, :, None]
    if value_gate is not None:
        value = value * value_gate[:, :, None]
    weights = query @ key.transpose(-1, -2)  # (B, heads, M, N)
    total = weights.sum(-1, keepdim=True)
    if settings.divides:
        output = weights / (total + tokens * settings.eps) @ value
    else:
        scale = max(query.shape[-1], 1) ** -0.5 / tokens
        # Each row of weights is moved so that it sums to one.
        output = (scale * weights + (1 - scale * total) / tokens) @ value
    return output.transpose(1, 2)
