"""Whether what a user gives to a pipeline or a command can be worked with: asked before work starts.

It imports nothing that takes seconds, for command lines ask first.
"""

import argparse
import math
import reprlib
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SEEDS = (0, 2**32 - 1)  # of PyTorch's generator on CPU, which takes no more bits


def check_numbers(
    parser: argparse.ArgumentParser, options: argparse.Namespace, limits: Mapping[str, tuple[float, float]]
) -> None:
    """End the program if an option, or one of a list, is not from its least to its greatest value."""
    for name, (least, most) in limits.items():
        given = getattr(options, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not (least <= value <= most and value < math.inf):
                valid = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                parser.error(f"--{name.replace('_', '-')} is {value}; it must be {valid}")


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


def whole_numbers(
    name: str, value: Any, most: int, valid: str, count: int, device: "torch.device", *, floating: bool = False
) -> "Tensor":
    """`value`, a whole number from 0 to `most`, or one for each of `count` images, as `[count]` of int64.

    A compiled network is not asked for the numbers: that would break its graph.

    Args:
        valid: which numbers are, in words.
        floating: take whole numbers of floating point as well.

    Raises:
        ValueError: it is something else.
    """
    import torch

    def wrong(what: str) -> ValueError:  # not in words before it is needed: an exported network has any `count`
        return ValueError(f"{name} {what}; it must be a whole number {valid}, or one for each of {count} images")

    try:
        tensor = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise wrong(f"is {value!r}") from None
    if tensor.dim() > 1 or (tensor.dim() == 1 and tensor.shape[0] not in (1, count)):
        raise wrong(f"has the shape {tuple(tensor.shape)}")
    if tensor.is_complex() or tensor.dtype == torch.bool or (tensor.is_floating_point() and not floating):
        raise wrong(f"is {value!r}")
    if not torch.compiler.is_compiling() and not ((tensor >= 0) & (tensor <= most) & (tensor == tensor.round())).all():
        raise wrong(f"is {tensor.tolist()}")
    return tensor.long().expand(count)


def check_real(name: str, value: Any, most: float | None = None) -> float:
    """`value` as a `float`.

    Raises:
        ValueError: it is no finite number from 0, to `most` if that is given.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value!r}; it must be a finite number, at least 0")
    if most is not None and value > most:
        raise ValueError(f"{name} is {value!r}; it must be a number from 0 to {most}")
    return float(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value`.

    Raises:
        ValueError: it is none of `choices`.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; valid are {', '.join(map(repr, choices))}")
    return value


def check_generator(generator: Any, images: int) -> "torch.Generator | list[torch.Generator] | None":
    """`generator`: None, one, or a list of one for each image.

    Raises:
        ValueError: it is none of these.
    """
    import torch

    several = isinstance(generator, Sequence)
    if several and len(generator) != images:
        raise ValueError(f"generator is a list of {len(generator)}; there are {images} images")
    if generator is not None and not all(
        isinstance(own, torch.Generator) for own in (generator if several else [generator])
    ):
        raise ValueError(f"generator is {generator!r}; it must be a torch.Generator, or one for each image")
    return list(generator) if several else generator


def check_callback(callback: Any, inputs: Any, valid: tuple[str, ...]) -> list[str]:
    """`inputs`, the names of tensors that the callback is offered.

    Raises:
        ValueError: the callback cannot be called, or `inputs` are not all `valid`.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end is {callback!r}; it must be callable, or None")
    if isinstance(inputs, str) or not isinstance(inputs, Sequence) or not all(name in valid for name in inputs):
        raise ValueError(f"callback_on_step_end_tensor_inputs is {inputs!r}; valid are lists of {', '.join(valid)}")
    return list(inputs)


def returned_tensor(returned: Any, name: str, tensor: "Tensor") -> "Tensor":
    """What a callback that was offered `tensor` under `name` wants to go on with.

    Raises:
        ValueError: that is not a finite floating-point tensor of the same shape, or it returned something else.
    """
    import torch

    if returned is None:
        return tensor
    if not isinstance(returned, dict) or not returned.keys() <= {name}:
        given = reprlib.repr(returned)
        raise ValueError(f"callback_on_step_end returned {given}; it must be None or a dict with no key but {name!r}")
    new = returned.get(name, tensor)
    is_tensor = isinstance(new, torch.Tensor)
    if not is_tensor or new.shape != tensor.shape or not new.is_floating_point() or not new.isfinite().all():
        what = f"of shape {tuple(new.shape)}, {new.dtype}" if is_tensor else f"as a {type(new).__name__}"
        raise ValueError(
            f"callback_on_step_end returned {name} {what}; they must be finite floating-point numbers of shape "
            f"{tuple(tensor.shape)}"
        )
    return new
