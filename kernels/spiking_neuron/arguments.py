"""The settings of spiking neurons, and the errors where they or the tensors do not fit."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

RESETS = ("hard", "soft")
SURROGATES = ("atan", "sigmoid", "rectangular")


@dataclass(frozen=True)
class Settings:
    """What `spiking_neuron` takes besides its tensors."""

    threshold: float
    tau: float | None
    decay_input: bool
    reset: str
    reset_value: float
    surrogate: str
    alpha: float
    detach_reset: bool

    def as_arguments(self) -> tuple[Any, ...]:
        """The fields in the order of an operator's arguments, for it takes no dataclass; `Settings(*...)` is back."""
        # Not `astuple`: it copies every field deeply, and a traced copy is bound to the very object.
        return (
            self.threshold,
            self.tau,
            self.decay_input,
            self.reset,
            self.reset_value,
            self.surrogate,
            self.alpha,
            self.detach_reset,
        )

    @property
    def hard(self) -> bool:
        return self.reset == "hard"

    @property
    def rest(self) -> float:
        """Where membranes start and what they leak to."""
        return self.reset_value if self.hard else 0.0

    @property
    def current_slope(self) -> float:
        """dh/dx of the mathematics."""
        return 1.0 if self.tau is None or not self.decay_input else 1 / self.tau

    @property
    def membrane_slope(self) -> float:
        """dh/dv of the mathematics."""
        return 1.0 if self.tau is None else 1 - 1 / self.tau

    @property
    def reset_constant(self) -> float:
        """dv/ds of the mathematics is `reset_constant` + `reset_factor` h; 0 if the reset is detached."""
        if self.detach_reset:
            return 0.0
        return self.rest if self.hard else -self.threshold

    @property
    def reset_factor(self) -> float:
        """See `reset_constant`."""
        return -1.0 if self.hard and not self.detach_reset else 0.0

    def charge(self, membrane: Tensor, current: Tensor) -> Tensor:
        """h of one step."""
        if self.tau is None:
            return membrane + current
        if self.decay_input:
            return membrane + (current - (membrane - self.rest)) / self.tau
        return membrane - (membrane - self.rest) / self.tau + current

    def slope(self, distance: Tensor) -> Tensor:
        """The surrogate's derivative at `distance` from the threshold."""
        if self.surrogate == "atan":
            return self.alpha / 2 / (1 + (math.pi / 2 * self.alpha * distance).square())
        if self.surrogate == "sigmoid":
            fraction = torch.sigmoid(self.alpha * distance)
            return self.alpha * fraction * (1 - fraction)
        return (distance.abs() < self.alpha / 2).to(distance.dtype) / self.alpha


def check_arguments(current: Tensor, initial_state: Tensor | None, settings: Settings) -> None:
    """Raise `ValueError` for what does not fit."""
    if current.dim() == 0:
        raise ValueError("current has shape (); it must be (time steps, ...)")
    tensors = {"current": current}
    if initial_state is not None:
        tensors["initial_state"] = initial_state
        if initial_state.shape != current.shape[1:]:
            raise ValueError(
                f"initial_state has shape {tuple(initial_state.shape)}; with current {tuple(current.shape)} it must be "
                f"{tuple(current.shape[1:])}"
            )
    for name, tensor in tensors.items():
        if tensor.device != current.device:
            raise ValueError(
                f"{name} is on {tensor.device} and current on {current.device}; they must be on one device"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")
    check_settings(settings)


def check_settings(settings: Settings) -> None:
    """Raise `ValueError` for what no neuron can have."""
    for name, choices in (("reset", RESETS), ("surrogate", SURROGATES)):
        if (chosen := getattr(settings, name)) not in choices:
            raise ValueError(f"{name} is {chosen!r}; valid are {', '.join(map(repr, choices))}")
    for name in ("threshold", "alpha"):
        value = getattr(settings, name)
        if not (_is_number(value) and 0 < value < math.inf):
            raise ValueError(f"{name} is {value!r}; it must be a number, positive and finite")
    if settings.tau is not None and not (_is_number(settings.tau) and 1 <= settings.tau < math.inf):
        raise ValueError(f"tau is {settings.tau!r}; it must be a number, at least 1 and finite, or None for no leak")
    if not (_is_number(settings.reset_value) and -math.inf < settings.reset_value < math.inf):
        raise ValueError(f"reset_value is {settings.reset_value!r}; it must be a number, and finite")
    if not settings.hard and settings.reset_value != 0:
        raise ValueError(f"reset_value is {settings.reset_value}; it must be 0 with reset='soft', which has none")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | torch.SymFloat | torch.SymInt) and not isinstance(value, bool)
