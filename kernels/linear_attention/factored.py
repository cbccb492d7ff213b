"""The `torch` backend: the state first, then what every query reads of it, in plain operations that can be exported."""

import torch.nn.functional as F
from torch import Tensor

from kernels.linear_attention.arguments import Settings


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, settings: Settings
) -> Tensor:
    """Tensors of one dtype; shapes and the rest as `kernels.linear_attention.linear_attention`.

    A column of ones beside the values makes s another column of S, and the denominators another of the numerators.
    """
    count, head_dim = key.shape[1], query.shape[3]
    tokens = count if count else 1  # without keys all sums are zero, and so is the output
    query, key = settings.features(query).transpose(1, 2), settings.features(key).permute(0, 2, 3, 1)
    value = value.transpose(1, 2)
    if key_gate is not None:
        key = key * key_gate[:, None, :]
    if value_gate is not None:
        value = value * value_gate[:, :, None]
    state = key @ F.pad(value, (0, 1), value=1.0)  # (B, heads, D, V + 1)
    read = query @ state  # (B, heads, M, V + 1)
    numerator, total = read[..., :-1], read[..., -1:]
    if settings.divides:
        output = numerator / (total + tokens * settings.eps)
    else:
        scale = max(head_dim, 1) ** -0.5 / tokens
        output = scale * numerator + (1 - scale * total) * (value.sum(2, keepdim=True) / tokens)
    return output.transpose(1, 2)
