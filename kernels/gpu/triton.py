"""The decisions that every Triton backend takes alike: operands of matrix products, tile sizes, strides, launches."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def log_sigmoid(x):
    """Natural logarithm of the sigmoid of a float32 tile, to float32's precision at either end."""
    # log1p(y) = log(u) y / (u - 1) with u = 1 + y rounded (Kahan): the rounding of u cancels.
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * y / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.minimum(x, 0.0) - log1p


INTERPRETED = not isinstance(log_sigmoid, triton.JITFunction)
MOST_REGISTERS = 255  # of a thread, on NVIDIA GPUs


def tile_size(size: int, largest: int) -> int:
    """A power of two, at least the 16 that tensor cores ask for."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def are_narrow(*dtypes: torch.dtype) -> bool:
    """Whether matrix products of inputs of `dtypes` take bfloat16 operands."""
    return all(dtype == torch.bfloat16 for dtype in dtypes)


def dot_operands(*dtypes: torch.dtype) -> tuple[tl.dtype, str]:
    """The type in which matrix products take their operands, and their `input_precision`, for inputs of `dtypes`."""
    if INTERPRETED:  # its products of bfloat16 are wrong: it keeps them as integers
        return tl.float32, "ieee"
    if are_narrow(*dtypes):
        return tl.bfloat16, "ieee"
    if _compiled_by("hip"):
        return tl.float32, "ieee"
    return tl.float32, "tf32x3" if torch.float32 in dtypes else "tf32"


def _compiled_by(backend: str) -> bool:
    return not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == backend


def all_registers() -> dict[str, int]:
    """Launch options that keep NVIDIA's assembler from spilling a few registers to have more programs at once."""
    return {"maxnreg": MOST_REGISTERS} if _compiled_by("cuda") else {}


def refuse_float64(**tensors: Tensor | None) -> None:
    """Raise `ValueError` naming the first tensor in float64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.float64:
            raise ValueError(f"{name} is float64; the triton backend takes float32, bfloat16 and float16")


def with_strides(first: Tensor, *others: Tensor | None) -> list[Any]:
    """Each tensor followed by its strides; one that is None by zeros."""
    none = (0,) * first.dim()
    return [item for x in (first, *others) for item in (x, none if x is None else x.stride())]


def launch(like: Tensor, kernel: triton.JITFunction, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run `programs` programs of `kernel` on the device of `like`."""
    with torch.cuda.device_of(like):
        kernel[(programs,)](*arguments, **constants)
