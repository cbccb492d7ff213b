"""What keeps experts from starving; computed in float32 at least."""

import torch
from torch import Tensor

from kernels.precision import common_dtype


def load_balance_loss(probabilities: Tensor, first_choice: Tensor) -> Tensor:
    """E / N^2 sum_e (sum_n p[n, e]) #{n: e is the first choice of n}: 1 where balanced, E where collapsed.

    Args:
        probabilities: (N, E); the gradient passes through them alone.
        first_choice: (N) indices, dropped choices included; `routing.indices[0]`.

    Returns:
        (), 0 without tokens. Source: arXiv 2006.16668.

    Raises:
        ValueError: the shapes do not fit.
    """
    if probabilities.dim() != 2 or first_choice.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities have shape {tuple(probabilities.shape)} and first_choice {tuple(first_choice.shape)}; "
            "they must be (tokens, experts) and (tokens)"
        )
    [probabilities] = common_dtype(probabilities)
    tokens, experts = probabilities.shape
    ones = torch.ones_like(first_choice, dtype=probabilities.dtype)
    counts = probabilities.new_zeros(experts).index_add_(0, first_choice, ones)
    return (probabilities.sum(0) * counts).sum() * (experts / max(tokens, 1) ** 2)


def load_importance_loss(logits: Tensor, threshold: Tensor, noise: float) -> Tensor:
    """Mean of the squared coefficients of variation of the experts' importance and load.

        importance_e = sum_n p[n, e],    load_e = sum_n Phi((p[n, e] - threshold[n]) E / noise),    p = softmax(logits)

    with the distribution Phi of the unit normal and var / (mean^2 + 1e-10) for each, var over E - 1. As in the source,
    a probability is compared with a logit.

    Args:
        logits: (N, E) without noise, N and E at least 1 and 2.
        threshold: (N), the noisy logit of each token's last choice: `routing.scores.gather(1, routing.indices[-1:].T)`,
            squeezed. The gradient passes through it, too.
        noise: that of the routing, positive.

    Returns:
        (). Source: Tutel, arXiv 2206.03382, after arXiv 1701.06538.

    Raises:
        ValueError: the shapes or the noise do not fit.
    """
    if logits.dim() != 2 or logits.shape[0] < 1 or logits.shape[1] < 2 or threshold.shape != logits.shape[:1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and threshold {tuple(threshold.shape)}; they must be "
            "(tokens, experts) and (tokens), with a token and two experts at least"
        )
    if not noise > 0:
        raise ValueError(f"noise is {noise}; it must be positive, for loads are measured by it")
    logits, threshold = common_dtype(logits, threshold)
    probabilities = logits.softmax(1)
    load = torch.special.ndtr((probabilities - threshold[:, None]) * (logits.shape[1] / noise)).sum(0)
    return sum(x.var() / (x.mean().square() + 1e-10) for x in (probabilities.sum(0), load)) / 2
