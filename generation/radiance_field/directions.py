"""Encodings of directions and positions: real spherical harmonics, and sines and cosines of octaves."""

import math

import torch
from torch import Tensor

MOST_LEVELS = 5


def spherical_harmonics(directions: Tensor, levels: int = 4) -> Tensor:
    """Real, orthonormal spherical harmonics of degrees 0 to `levels` - 1.

    Degree l has the orders m = -l to l, at l² + l + m. With the Legendre functions P without the Condon-Shortley phase,
    K their norms, and c + i s = (x + i y)^|m|:

        Y(l, m) = K P(l, |m|)(z) / sin^|m| times 1 for m = 0, √2 c for m > 0, √2 s for m < 0

    so degree 1 is √(3 / 4π) (y, z, x). These are the signs of nerfstudio's PyTorch code, of the unit directions as they
    are; tiny-cuda-nn's differ, and it takes (d + 1) / 2.

    Args:
        directions: `[N, 3]`, unit vectors; of others, the polynomials that these are.
        levels: 1 to 5.

    Returns:
        `[N, levels²]`, values of one kind side by side in memory (strides 1, N).

    Raises:
        ValueError: the shape or the number of levels does not fit.
    """
    check_directions(directions)
    if levels not in range(1, MOST_LEVELS + 1):
        raise ValueError(f"levels is {levels!r}; it must be a whole number from 1 to {MOST_LEVELS}")
    x, y, z = directions.t().contiguous()
    values: list[Tensor] = [x] * levels**2
    cosine, sine = None, None
    for m in range(levels):
        if m == 1:
            cosine, sine = x, y
        elif m > 1:
            cosine, sine = x * cosine - y * sine, x * sine + y * cosine
        earlier, legendre = None, float(math.prod(range(1, 2 * m, 2)))
        for degree in range(m, levels):
            if degree > m:
                following = z * ((2 * degree - 1) / (degree - m)) * legendre
                if earlier is not None:
                    following = following - earlier * ((degree + m - 1) / (degree - m))
                earlier, legendre = legendre, following
            factor = math.sqrt(
                (2 * degree + 1) / (4 * math.pi) * math.factorial(degree - m) / math.factorial(degree + m)
            )
            middle = degree * degree + degree
            if m == 0:
                values[middle] = legendre * factor if degree else torch.full_like(x, factor)
            else:
                scaled = legendre * (math.sqrt(2) * factor)
                values[middle + m], values[middle - m] = cosine * scaled, sine * scaled
    return torch.stack(values).t()


def frequency_embedding(x: Tensor, octaves: int) -> Tensor:
    """x, then sin(2^k x) and cos(2^k x) of all of x for k = 0 to `octaves` - 1, as in Mega-NeRF and Switch-NeRF.

    Args:
        x: `[..., D]`.
        octaves: 0 or more.

    Returns:
        `[..., D (2 octaves + 1)]`.
    """
    if octaves == 0:
        return x
    frequencies = 2.0 ** torch.arange(octaves, dtype=x.dtype, device=x.device)
    angles = x[..., None, :] * frequencies[:, None]  # (..., octaves, D)
    waves = torch.stack([angles.sin(), angles.cos()], -2)  # (..., octaves, 2, D)
    return torch.cat([x, waves.flatten(-3)], -1)


def check_directions(directions: Tensor, count: int | None = None) -> None:
    """Raise `ValueError` for what is not `[N, 3]`, or of another N than `count`."""
    if directions.dim() != 2 or directions.shape[1] != 3 or (count is not None and len(directions) != count):
        expected = "(N, 3)" if count is None else (count, 3)
        raise ValueError(f"directions have shape {tuple(directions.shape)}; it must be {expected}")
