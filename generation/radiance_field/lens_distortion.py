"""Brown-Conrady lens distortion, as OpenCV and COLMAP define it, and its inverse by Newton's method.

With (x, y) the undistorted image plane at distance 1 (x right, y down) and r² = x² + y²:

    x' = x (1 + k1 r² + k2 r⁴ + k3 r⁶) + 2 p1 x y + p2 (r² + 2 x²)
    y' = y (1 + k1 r² + k2 r⁴ + k3 r⁶) + 2 p2 x y + p1 (r² + 2 y²)
"""

from torch import Tensor

COEFFICIENTS = ("k1", "k2", "k3", "p1", "p2")


def distort(x: Tensor, y: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """(x', y') of (x, y).

    Args:
        x, y: `[...]`.
        coefficients: `[..., 5]`: k1 k2 k3 p1 p2.
    """
    k1, k2, k3, p1, p2 = coefficients.unbind(-1)
    squared = x * x + y * y
    radial = 1 + squared * (k1 + squared * (k2 + squared * k3))
    return (
        x * radial + 2 * p1 * x * y + p2 * (squared + 2 * x * x),
        y * radial + 2 * p2 * x * y + p1 * (squared + 2 * y * y),
    )


def undistort(x: Tensor, y: Tensor, coefficients: Tensor, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """(x, y) that `distort` takes to the given (x', y'); shapes as there.

    Newton's method starts at the distorted position. Where the lens model folds over itself, far outside the picture it
    was fitted to, there is no such position, and what comes back is wrong: compare `distort` of it.
    """
    k1, k2, k3, p1, p2 = coefficients.unbind(-1)
    to_x, to_y = x, y
    for _ in range(iterations):
        squared = x * x + y * y
        radial = 1 + squared * (k1 + squared * (k2 + squared * k3))
        slope = 2 * (k1 + squared * (2 * k2 + squared * 3 * k3))  # d radial / dx = slope x, d radial / dy = slope y
        at_x, at_y = distort(x, y, coefficients)
        off_x, off_y = at_x - to_x, at_y - to_y
        x_by_x = radial + slope * x * x + 2 * p1 * y + 6 * p2 * x
        x_by_y = slope * x * y + 2 * p1 * x + 2 * p2 * y  # = y_by_x
        y_by_y = radial + slope * y * y + 2 * p2 * x + 6 * p1 * y
        determinant = x_by_x * y_by_y - x_by_y * x_by_y
        determinant = determinant.where(determinant.abs() > 1e-6, 1e-6)
        x = x - (off_x * y_by_y - off_y * x_by_y) / determinant
        y = y - (off_y * x_by_x - off_x * x_by_y) / determinant
    return x, y
