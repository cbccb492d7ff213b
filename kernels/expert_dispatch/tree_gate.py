"""A sparse gate that is differentiable everywhere: k soft decision trees whose leaves are the experts (COMET).

Nodes are numbered like a heap: node i has the children 2 i + 1 and 2 i + 2, the first E - 1 are splits and expert e is
node E - 1 + e, for any E. A split sends S(t) of what reaches it to its first child and the rest to its second, with

    S(t) = 0 for t <= -w / 2,    1 for t >= w / 2,    1 / 2 + 3 t / (2 w) - 2 t^3 / w^3 between

so a tree whose splits have saturated reaches one expert. With what reaches expert e in tree j, r[j, e], and the leaves'
logits a, the weight of an expert is

    weight[e] = sum_j r[j, e] exp(a[j, e]) / sum_{j, e} r[j, e] exp(a[j, e])

of which at most k are not 0 then; the entropy of r, added to the loss, drives splits there.

Sources: COMET, arXiv 2306.02742, and its code; smooth steps, arXiv 2002.07772. INFERRED: leaves are numbered by
the heap, where the authors' permutations renumber them, and logits of leaves may be left out.
"""

import torch
from torch import Tensor

from kernels.precision import common_dtype


def leaf_probabilities(split_logits: Tensor, *, width: float = 1.0) -> Tensor:
    """What reaches each expert in each tree, rows summing to 1.

    Args:
        split_logits: (..., E - 1), the splits of a tree in heap order.
        width: w of the mathematics, of the region where a split is soft.

    Returns:
        (..., E) in float32 at least.

    Raises:
        ValueError: the width is not positive, or a split is NaN.
    """
    if not 0 < width < float("inf"):
        raise ValueError(f"width is {width}; it must be positive and finite")
    if not split_logits.is_floating_point() or split_logits.dim() == 0:
        raise ValueError(
            f"split_logits has shape {tuple(split_logits.shape)} and dtype {split_logits.dtype}; it must be a "
            "floating-point tensor (..., experts - 1)"
        )
    if not torch.compiler.is_compiling() and split_logits.isnan().any():
        raise ValueError("split_logits has a NaN; such a split leads nowhere")
    [splits] = common_dtype(split_logits)
    t = (splits / width).clamp(-0.5, 0.5)
    first = 0.5 + t * (1.5 - 2 * t * t)
    reach = [torch.ones_like(splits.sum(-1))]
    for i in range(splits.shape[-1]):
        reach += [reach[i] * first[..., i], reach[i] * (1 - first[..., i])]
    return torch.stack(reach[splits.shape[-1] :], -1)


def tree_gate(split_logits: Tensor, leaf_logits: Tensor | None = None, *, width: float = 1.0) -> Tensor:
    """Weights of the experts, for `route(weights, softmax=False, experts_per_token=k)`.

    Args:
        split_logits: (N, k, E - 1).
        leaf_logits: (N, k, E); 0 if None.
        width: of the soft region of a split.

    Returns:
        (N, E), rows summing to 1, in float32 at least.

    Raises:
        ValueError: shapes do not fit, the width is not positive or a number is NaN.
    """
    expected = (*split_logits.shape[:2], split_logits.shape[-1] + 1) if split_logits.dim() == 3 else None
    if expected is None or expected[1] == 0 or (leaf_logits is not None and leaf_logits.shape != expected):
        raise ValueError(
            f"split_logits has shape {tuple(split_logits.shape)} and leaf_logits "
            f"{None if leaf_logits is None else tuple(leaf_logits.shape)}; they must be "
            "(tokens, trees, experts - 1) and (tokens, trees, experts)"
        )
    reach = leaf_probabilities(split_logits, width=width)
    if leaf_logits is None:
        return reach.mean(1)
    if not torch.compiler.is_compiling() and not leaf_logits.isfinite().all():
        raise ValueError("leaf_logits has a number that is not finite")
    reach, leaf_logits = common_dtype(reach, leaf_logits)
    reached = leaf_logits.masked_fill(reach == 0, -torch.inf)  # what is not reached may be larger by any factor
    shifted = reached - reached.detach().amax((1, 2), keepdim=True)
    weights = (reach * shifted.exp()).sum(1)
    return weights / weights.sum(1, keepdim=True)


def leaf_entropy(reach: Tensor) -> Tensor:
    """Mean over tokens of the entropy of `leaf_probabilities` (N, k, E), summed over trees; 0 without tokens."""
    logarithm = reach.clamp(min=torch.finfo(reach.dtype).tiny).log()
    return -(reach * logarithm).sum() / max(len(reach), 1)
