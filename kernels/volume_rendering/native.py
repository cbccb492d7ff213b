"""Calls the CPU kernels of `native.cpp`."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels.native import NativeTensor, library, native_tensor, readable
from kernels.volume_rendering.arguments import arithmetic_dtype, wrong_offsets

NO_MEMORY, WRONG_OFFSETS = 1, 2  # outcomes
FORWARD, BACKWARD, VISIBLE = range(3)  # tasks


class Problem(ctypes.Structure):
    """`struct Problem` of native.cpp."""

    _fields_ = (
        ("rays", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        *(
            (name, NativeTensor)
            for name in (
                "density", "start", "end", "colour", "weights", "ray_colour", "opacity", "depth", "grad_ray_colour",
                "grad_opacity", "grad_depth", "grad_weights", "grad_density", "grad_colour",
            )
        ),
        ("visible", ctypes.c_void_p),
        ("least_transmittance", ctypes.c_double),
        ("least_alpha", ctypes.c_double),
    )  # fmt: skip


@cache
def _function():
    function = library("volume_rendering/native.cpp").volume_rendering
    function.argtypes = (ctypes.POINTER(Problem), ctypes.c_int, ctypes.c_int)
    function.restype = ctypes.c_int
    return function


def forward(
    density: Tensor, colour: Tensor, start: Tensor, end: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Colour over black, opacity, depth and weights; arguments as in the operation.

    Raises:
        ValueError: the offsets are no division of the samples.
    """
    dtype = arithmetic_dtype(density, colour, start, end)
    rays, channels = offsets.shape[0] - 1, colour.shape[1]
    shapes = {"ray_colour": (rays, channels), "opacity": (rays,), "depth": (rays,), "weights": density.shape}
    written = {name: density.new_empty(shape, dtype=dtype) for name, shape in shapes.items()}
    inputs = {"density": density, "colour": colour, "start": start, "end": end}
    _run(FORWARD, offsets, dtype, inputs | written, channels)
    return tuple(written.values())


def backward(
    gradients: tuple[Tensor | None, ...],
    weights: Tensor,
    density: Tensor,
    colour: Tensor,
    start: Tensor,
    end: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of density and colour in their dtypes, of those of the outputs (None: zeros)."""
    dtype = arithmetic_dtype(density, colour, start, end)
    of_density, of_colour = (x.new_empty(x.shape, dtype=dtype) for x in (density, colour))
    given = zip(("grad_ray_colour", "grad_opacity", "grad_depth", "grad_weights"), gradients, strict=True)
    inputs = {"density": density, "colour": colour, "start": start, "end": end, "weights": weights, **dict(given)}
    _run(BACKWARD, offsets, dtype, inputs | {"grad_density": of_density, "grad_colour": of_colour}, colour.shape[1])
    return of_density.to(density.dtype), of_colour.to(colour.dtype)


def visible(density: Tensor, start: Tensor, end: Tensor, offsets: Tensor, transmittance: float, alpha: float) -> Tensor:
    """Which samples count; arguments as in the operation."""
    found = density.new_empty(density.shape, dtype=torch.bool)
    numbers = {"visible": found.data_ptr(), "least_transmittance": transmittance, "least_alpha": alpha}
    inputs = {"density": density, "start": start, "end": end}
    _run(VISIBLE, offsets, arithmetic_dtype(density, start, end), inputs, 0, **numbers)
    return found


def _run(
    task: int, offsets: Tensor, dtype: torch.dtype, tensors: dict[str, Tensor | None], channels: int, **numbers
) -> None:
    offsets, samples = offsets.contiguous(), tensors["density"].shape[0]
    problem = Problem(
        rays=offsets.shape[0] - 1, samples=samples, channels=channels, offsets=offsets.data_ptr(), **numbers
    )
    views = {field: readable(x.to(dtype)) for field, x in tensors.items() if x is not None}
    for field, view in views.items():
        setattr(problem, field, native_tensor(view))
    outcome = _function()(problem, task, torch.get_num_threads())
    if outcome == WRONG_OFFSETS:
        raise wrong_offsets(offsets, samples)
    if outcome == NO_MEMORY:
        raise MemoryError(f"volume_rendering: no memory for the optical depths of {samples} samples")
