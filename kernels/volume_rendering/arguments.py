"""What the arguments must be, and the errors where they are not."""

import torch
from torch import Tensor


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """In which dtype the kernels compute."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def check_arguments(
    density: Tensor,
    start: Tensor,
    end: Tensor,
    offsets: Tensor,
    colour: Tensor | None = None,
    background: Tensor | None = None,
) -> None:
    """Raise `ValueError` for what does not fit."""
    if density.dim() != 1:
        raise ValueError(f"density has shape {tuple(density.shape)}; it must be (S,)")
    samples = density.shape[0]
    for name, tensor in (("start", start), ("end", end)):
        if tensor.shape != (samples,):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; with {samples} densities it must be {(samples,)}"
            )
    if colour is not None and (colour.dim() != 2 or colour.shape[0] != samples):
        raise ValueError(f"colour has shape {tuple(colour.shape)}; with {samples} densities it must be ({samples}, C)")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"offsets has shape {tuple(offsets.shape)}; it must be (rays + 1,)")
    if offsets.dtype != torch.int64:
        raise ValueError(f"offsets has dtype {offsets.dtype}; it must be torch.int64")
    if background is not None:
        shapes = ((colour.shape[1],), (offsets.shape[0] - 1, colour.shape[1]))
        if tuple(background.shape) not in shapes:
            raise ValueError(
                f"background has shape {tuple(background.shape)}; it must be {shapes[0]} or, one a ray, {shapes[1]}"
            )
    tensors = {"density": density, "colour": colour, "start": start, "end": end, "background": background}
    for name, tensor in {**tensors, "offsets": offsets}.items():
        if tensor is None:
            continue
        if tensor.device != density.device:
            raise ValueError(
                f"{name} is on {tensor.device} and density on {density.device}; they must be on one device"
            )
        if name != "offsets" and not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")


def check_offset_values(offsets: Tensor, samples: int) -> None:
    """Raise `ValueError` for offsets on CPU that are no division of the samples; not while a graph is traced."""
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if offsets[0] != 0 or offsets[-1] != samples or (offsets.diff() < 0).any():
        raise wrong_offsets(offsets, samples)


def wrong_offsets(offsets: Tensor, samples: int) -> ValueError:
    """The error that says what is wrong with them."""
    if offsets[0] != 0:
        return ValueError(f"offsets[0] is {offsets[0].item()}; it must be 0")
    if (decreasing := offsets.diff() < 0).any():
        ray = int(decreasing.int().argmax())
        pair = offsets[ray : ray + 2].tolist()
        return ValueError(f"offsets[{ray}] and offsets[{ray + 1}] are {pair}; offsets must not decrease")
    return ValueError(f"the last of offsets is {offsets[-1].item()}; it must be the number of samples, {samples}")


def check_visibility(transmittance: float, alpha: float) -> None:
    """Raise `ValueError` for limits that are no fractions."""
    for name, limit in (("transmittance", transmittance), ("alpha", alpha)):
        if not 0 <= limit <= 1:
            raise ValueError(f"{name} is {limit}; it must be from 0 to 1")
