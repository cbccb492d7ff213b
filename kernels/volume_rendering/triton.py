"""Volume rendering on GPUs: one program a ray, which takes its samples a block at a time.

Forward has a program for each tile of channels of a ray, and all but the first compute the weights again. Backward
takes the samples twice: forward, to write what light is left behind each in the memory of the density's gradient, and
back, to read it from the cache. Every sum has one order, so the bits are the same every time.

Precision: float32, sums of optical depths within blocks of a ray.

Floor, a prediction and not a measurement: nothing here has been timed or has run on a GPU. A sample of three float32
colours is 28 bytes forward, 52 backward: 2^18 samples, 7.3 and 13.6 MB, 2.4 and 4.5 us at the 3.0 TB/s of an H100, less
than a launch takes.
"""

import torch
import triton
from torch import Tensor

from kernels.gpu.triton import launch
from kernels.volume_rendering.triton_kernels import rendering_backward_kernel, rendering_forward_kernel

# Samples of a block, one a thread; tests/kernels/test_triton_compilation.py sees that no register is spilled.
BLOCK, WARPS = 32, 1
MOST_CHANNELS = 16  # of a tile


def forward(
    density: Tensor, colour: Tensor, start: Tensor, end: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Colour over black, opacity, depth and weights; arguments as in the operation, none float64."""
    rays, channels = offsets.shape[0] - 1, colour.shape[1]
    shapes = ((rays, channels), (rays,), (rays,), density.shape)
    written = [density.new_empty(shape, dtype=torch.float32) for shape in shapes]
    ray_colour, opacity, depth, weights = written
    tiles = max(1, triton.cdiv(channels, _tile(channels)))
    outputs = (weights, ray_colour, opacity, depth, density.shape[0], channels, tiles)
    _run(rendering_forward_kernel, rays * tiles, (density, colour, start, end, offsets), outputs)
    return tuple(written)


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
    of_density = density.new_empty(density.shape, dtype=torch.float32)
    of_colour = colour.new_empty(colour.shape)
    given = (None if gradient is None else gradient.contiguous() for gradient in gradients)
    others = (weights, *given, of_density, of_colour, density.shape[0], colour.shape[1])
    _run(rendering_backward_kernel, offsets.shape[0] - 1, (density, colour, start, end, offsets), others)
    return of_density.to(density.dtype), of_colour


def _tile(channels: int) -> int:
    return min(MOST_CHANNELS, max(1, triton.next_power_of_2(channels)))


def _run(kernel: triton.JITFunction, programs: int, inputs: tuple[Tensor, ...], others: tuple) -> None:
    if programs == 0:
        return
    density, colour, *distances = inputs
    arguments = (density.contiguous(), colour, *colour.stride(), *(x.contiguous() for x in distances), *others)
    constants = {"BLOCK": BLOCK, "CHANNELS": _tile(colour.shape[1]), "num_warps": WARPS}
    launch(density, kernel, programs, *arguments, **constants)
