"""What the arguments must be, and the errors where they are not."""

import math

import torch
from torch import Tensor


def check_arguments(
    origins: Tensor,
    directions: Tensor,
    near: Tensor | float,
    far: Tensor | float,
    occupied: Tensor,
    box: Tensor,
    step: float,
    cone_angle: float,
    jitter: Tensor | None,
) -> None:
    """Raise `ValueError` for what does not fit."""
    if origins.dim() != 2 or origins.shape[1] != 3:
        raise ValueError(f"origins has shape {tuple(origins.shape)}; it must be (R, 3)")
    if directions.shape != origins.shape:
        raise ValueError(
            f"directions has shape {tuple(directions.shape)}; it must be that of origins, {tuple(origins.shape)}"
        )
    if occupied.dim() != 4 or 0 in occupied.shape:
        raise ValueError(
            f"occupied has shape {tuple(occupied.shape)}; it must be (levels, X, Y, Z), of 1 each at least"
        )
    if occupied.dtype != torch.bool:
        raise ValueError(f"occupied has dtype {occupied.dtype}; it must be torch.bool")
    if box.shape != (2, 3):
        raise ValueError(f"box has shape {tuple(box.shape)}; it must be (2, 3), the lower and the upper corner")
    tensors = {"origins": origins, "directions": directions, "near": near, "far": far, "jitter": jitter, "box": box}
    for name, tensor in {**tensors, "occupied": occupied}.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device != origins.device:
            raise ValueError(
                f"{name} is on {tensor.device} and origins on {origins.device}; they must be on one device"
            )
        if name != "occupied" and not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")
        if name in ("near", "far", "jitter") and tensor.shape != origins.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be one number a ray, (R,)")
    if not 0 < step < math.inf:
        raise ValueError(f"step is {step}; it must be positive and finite")
    if not 0 <= cone_angle < math.inf:
        raise ValueError(f"cone_angle is {cone_angle}; it must be 0 at least and finite")


def per_ray(value: Tensor | float, origins: Tensor) -> Tensor:
    """(R,) in float64."""
    if isinstance(value, Tensor):
        return value.double()
    return torch.full(origins.shape[:1], value, dtype=torch.float64, device=origins.device)


def check_values(origins: Tensor, directions: Tensor, near: Tensor, far: Tensor, box: Tensor, jitter: Tensor) -> None:
    """Raise `ValueError` for numbers on CPU with which no ray can march; not while a graph is traced."""
    if origins.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for name, tensor in (("origins", origins), ("directions", directions), ("near", near)):
        if not (finite := tensor.isfinite() if tensor.dim() == 1 else tensor.isfinite().all(1)).all():
            row = int(finite.int().argmin())
            raise ValueError(f"{name}[{row}] is {tensor[row].tolist()}; it must be finite")
    if far.isnan().any():
        raise ValueError(f"far[{int(far.isnan().int().argmax())}] is nan; it must be a number or infinity")
    if not (fits := (jitter >= 0) & (jitter <= 1)).all():
        row = int(fits.int().argmin())
        raise ValueError(f"jitter[{row}] is {jitter[row].item()}; it must be from 0 to 1")
    if not (box.isfinite().all() and (box[1] > box[0]).all()):
        raise ValueError(
            f"box is {box.tolist()}; its upper corner must be above its lower one on every axis, and finite"
        )
