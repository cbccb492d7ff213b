"""How clearly a model's own logits set its answer apart from the alternatives: a confidence that needs no training.

Source: SpecEyes (arXiv 2603.23483), as its code does it. A model that is confidently wrong scores as high as one that
is right, and the scale of raw logits differs from model to model: choose the threshold on questions of your own.
"""

import torch
from torch import Tensor

from multimodal.argument_checks import check_choice, check_real, check_whole

AGGREGATES = ("min", "mean", "bottom20")
LEAST_ALTERNATIVES = 2  # of one alternative the spread is 0
EPSILON = 1e-6


def token_separability(logits: Tensor, top_k: int = 64) -> Tensor:
    """By how many standard deviations the greatest logit exceeds the mean of the next `top_k - 1`: `[...]`, float32.

    Args:
        logits: `[..., V]`, raw: before any temperature, top-k or top-p.
        top_k: the greatest logit and its alternatives, from 3 to V.

    Raises:
        ValueError: `top_k` is not in that range, or the `top_k` greatest logits are not all finite.
    """
    if logits.dim() == 0 or not logits.is_floating_point():
        raise ValueError(
            f"logits are {logits.dtype} of shape {tuple(logits.shape)}; they must be floating point, [..., V]"
        )
    check_whole("top_k", top_k, LEAST_ALTERNATIVES + 1, logits.shape[-1])
    greatest = logits.float().topk(top_k, dim=-1).values
    if not greatest.isfinite().all():
        raise ValueError(f"logits are not finite among the top_k={top_k} greatest; give raw logits, not filtered ones")
    alternatives = greatest[..., 1:]
    return (greatest[..., 0] - alternatives.mean(-1)) / (alternatives.std(-1, unbiased=False) + EPSILON)


def answer_separability(logits: Tensor, aggregate: str = "min", *, top_k: int = 64, slope: float = 0.6) -> Tensor:
    """The confidence of an answer: `sigmoid(slope * separability of its tokens)`, a scalar from 0.5 on to 1.

    SpecEyes accepts an answer above 0.98 with "min": every token stands out by 6.49 standard deviations or more.

    Args:
        logits: `[N, V]` of the answer's N tokens; see `token_separability`.
        aggregate: "min", "mean", or "bottom20", the mean of the lowest 20 % (rounded down, at least one).

    Raises:
        ValueError: as above, or there is no token.
    """
    check_choice("aggregate", aggregate, AGGREGATES)
    check_real("slope", slope)
    _check_answer(logits)
    scores = token_separability(logits, top_k)
    if aggregate == "bottom20":
        scores = scores.topk(max(1, int(0.2 * scores.numel())), largest=False).values
    return torch.sigmoid(slope * (scores.min() if aggregate == "min" else scores.mean()))


def log_confidence(logits: Tensor) -> Tensor:
    """The geometric mean of the probabilities of an answer's most probable tokens: a scalar from 0 to 1.

    It is what separability is compared with: of `[N, V]` logits.

    Raises:
        ValueError: there is no token.
    """
    _check_answer(logits)
    return logits.float().log_softmax(-1).amax(-1).mean().exp()


def _check_answer(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[0] == 0:
        raise ValueError(f"logits have the shape {tuple(logits.shape)}; they must be [N, V] of at least one token")
