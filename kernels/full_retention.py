"""Manhattan retention over all tokens of a map at once: RMT's full form.

    output = softmax(q k^T / sqrt(D) + (|h_i - h_j| + |w_i - w_j|) log gamma) v

with q and k rotated as in `kernels.window_retention` (one window on the whole map). Quadratic in the tokens, so it is
for small maps; PyTorch's scaled dot-product attention computes it on every device. Source: RMT, arXiv 2309.11523.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kernels.precision import common_dtype, full_precision
from kernels.window_retention import tables
from kernels.window_retention.reference import rotate

__all__ = ["full_retention"]


def full_retention(query: Tensor, key: Tensor, value: Tensor, log_decay: Sequence[float]) -> Tensor:
    """Retention over all tokens of a map.

    Args:
        query: (B, H, W, heads, D), D even.
        key: (B, H, W, heads, D).
        value: (B, H, W, heads, V).
        log_decay: one natural logarithm of gamma a head.

    Returns:
        (B, H, W, heads, V) in the dtype of `value`; computed in float32 at least.

    Raises:
        ValueError: there is not one log decay a head.
    """
    size, dtype = query.shape[1:3], value.dtype
    if len(log_decay) != query.shape[3]:
        raise ValueError(f"log_decay has {len(log_decay)} entries; query has {query.shape[3]} heads, one entry each")
    with full_precision(query.device):
        query, key, value = (x.permute(0, 3, 1, 2, 4) for x in common_dtype(query, key, value))
        query, key = (rotate(x, size).flatten(2, 3) for x in (query, key))
        bias = manhattan_bias(size[0], size[1], tuple(log_decay), value)
        mixed = F.scaled_dot_product_attention(query, key, value.flatten(2, 3), attn_mask=bias)
    return mixed.transpose(1, 2).unflatten(1, size).to(dtype)


def manhattan_bias(height: int, width: int, log_decay: tuple[float, ...], like: Tensor) -> Tensor:
    """(|h_i - h_j| + |w_i - w_j|) log gamma, (heads, tokens, tokens), in `like`'s dtype."""

    def build() -> Tensor:
        row_steps, column_steps = (tables.distances(side).abs().to(like.dtype) for side in (height, width))
        steps = row_steps[:, None, :, None] + column_steps[None, :, None, :]
        return tables.by_head(log_decay, 3).to(like.dtype) * steps.reshape(height * width, -1)

    return tables.constant(("manhattan", height, width, log_decay), build, like)
