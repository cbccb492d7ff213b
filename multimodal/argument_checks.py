"""Whether a number or a choice that a user gives can be worked with: asked before work starts."""

import math
from numbers import Integral, Real
from typing import Any


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an `int`.

    Raises:
        ValueError: it is no whole number from `least`, to `most` if that is given.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        valid = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}; it must be a whole number {valid}")
    return int(value)


def check_real(name: str, value: Any, least: float = 0.0, most: float = math.inf) -> float:
    """`value` as a `float`.

    Raises:
        ValueError: it is no finite number from `least` to `most`.
    """
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not least <= value <= most:
        valid = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}; it must be a finite number, {valid}")
    return float(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value`.

    Raises:
        ValueError: it is none of `choices`.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; valid are {', '.join(map(repr, choices))}")
    return value


def check_size(name: str, value: Any) -> tuple[int, int]:
    """`value`, two sides in whole cells or pixels, as a tuple of `int`.

    Raises:
        ValueError: it is not two whole numbers of at least 1.
    """
    try:
        first, second = value
        return check_whole(name, first, 1), check_whole(name, second, 1)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}; it must be two whole numbers of at least 1") from None
