"""Depths of rays from their weights; plain PyTorch."""

import torch
from torch import Tensor

CONVENTIONS = ("nerfacc", "nerfstudio")


def expected_depth(
    depth: Tensor, opacity: Tensor, *, convention: str = "nerfacc", middle: Tensor | None = None
) -> Tensor:
    """The mean distance at which rays end, of those of their light that end at all.

    Args:
        depth: (R,), accumulated, of `composite`.
        opacity: (R,).
        convention: "nerfacc" divides by the opacity, float32's epsilon at least; "nerfstudio" by the opacity and 1e-10,
            and then clips to the least and the largest of all samples' mid points.
        middle: those mid points, any shape; "nerfstudio" needs at least one.

    Raises:
        ValueError: the convention is unknown, or it needs mid points and there are none.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}; valid are {', '.join(map(repr, CONVENTIONS))}")
    if convention == "nerfacc":
        return depth / opacity.clamp(min=torch.finfo(torch.float32).eps)
    if middle is None or middle.numel() == 0:
        raise ValueError("middle is empty; convention='nerfstudio' clips to the samples' mid points")
    return (depth / (opacity + 1e-10)).clamp(middle.min(), middle.max())


def median_depth(weights: Tensor, start: Tensor, end: Tensor, offsets: Tensor) -> Tensor:
    """Mid point of each ray's first sample at which the weights add up to 1/2; of its last one if they never do.

    Args:
        weights: (S,), of `composite`.
        start, end, offsets: as in `composite`.

    Returns:
        (R,), without gradient; 0 for rays without samples.
    """
    if weights.shape[0] == 0:
        return weights.new_zeros(offsets.shape[0] - 1)
    with torch.no_grad():
        first, last = offsets[:-1], offsets[1:] - 1
        sums = torch.nn.functional.pad(weights.double().cumsum(0), (1, 0))
        half = sums[first] + 0.5
        # Sums never fall, so the first sample of a ray to reach its half can be looked up among those of all rays.
        chosen = torch.searchsorted(sums[1:], half).clamp(min=first, max=last.clamp(min=0))
        middle = (start + end).to(weights.dtype)[chosen.clamp(max=weights.shape[0] - 1)] / 2
        return middle.where(last >= first, 0)
