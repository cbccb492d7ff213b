"""How an image is to be drawn: the numbers that users choose, checked, and the plan that follows from them."""

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from generation.lina.sampling import ORDERS, Plan, generation_order, guidance_ramp, predictions_per_step
from generation.lina.token_denoiser import FlowSchedule

SPACINGS = ("official", "trailing")
MOST_STEPS = 10_000
FAST_SHARE, FAST_DIFFUSION_STEPS, FAST_LEAST_GUIDED = 4, 8, 0.25


def check_whole(name: str, value: Any, least: int, most: int) -> int:
    """`value` as an `int`.

    Raises:
        ValueError: it is no whole number from `least` to `most`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {least} to {most}")
    return int(value)


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


@dataclass(frozen=True)
class SamplingSettings:
    """What `LinaPipeline.__call__` takes under the same names, which its docstring explains.

    Raises:
        ValueError: a number or choice is not valid.
    """

    num_inference_steps: int = 64
    num_diffusion_steps: int = 25
    last_diffusion_steps: int | None = None
    guidance_scale: float = 5.0
    min_guidance_scale: float | None = None
    guidance_above: float = 0.0
    spacing: str = "official"
    order: str = "random"
    order_strength: float = 1.0
    refresh_every: int = 1

    def __post_init__(self):
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if value is None and name in ("last_diffusion_steps", "min_guidance_scale"):
                continue
            if name.endswith("_steps") or name == "refresh_every":
                check_whole(name, value, 1, MOST_STEPS)
            elif name in ("order_strength", "guidance_above"):
                check_real(name, value, 1)
            elif name.endswith("guidance_scale"):
                check_real(name, value)
        check_choice("spacing", self.spacing, SPACINGS)
        check_choice("order", self.order, ORDERS)

    def faster(self) -> "SamplingSettings":
        """A quarter of the steps of autoregression, 8 trailing diffusion steps, guidance above 0.25, or less."""
        last = self.last_diffusion_steps
        return replace(
            self,
            num_inference_steps=-(-self.num_inference_steps // FAST_SHARE),
            num_diffusion_steps=min(self.num_diffusion_steps, FAST_DIFFUSION_STEPS),
            last_diffusion_steps=None if last is None else min(last, FAST_DIFFUSION_STEPS),
            guidance_above=max(self.guidance_above, FAST_LEAST_GUIDED),
            spacing="trailing",
        )

    @property
    def guided(self) -> bool:
        """Whether any step has guidance."""
        return self.guidance_scale != 1 or self.min_guidance_scale not in (None, 1)

    def plan(self, uniform: Tensor, known: Tensor, grid: tuple[int, int], shift: float) -> Plan:
        """What the loop is to do.

        Args:
            uniform: `[B, N]` numbers in [0, 1), of which the order is made.
            known: `[B, N]` booleans: tokens that are given, as many in each image.
            grid: rows and columns of the N tokens.
            shift: of the noise levels.
        """
        given = int(known[0].sum())
        ranked = generation_order(grid, self.order, self.order_strength, uniform)
        # Known tokens first, the others in their order.
        order = ranked.gather(1, (~known.gather(1, ranked)).int().argsort(dim=1, stable=True))
        predictions = [n for n in predictions_per_step(self.num_inference_steps, known.shape[1] - given) if n]
        last = self.num_diffusion_steps if self.last_diffusion_steps is None else self.last_diffusion_steps
        diffusion_steps = torch.linspace(self.num_diffusion_steps, last, len(predictions)).round().int().tolist()
        schedule = FlowSchedule(shift)
        return Plan(
            order=order,
            known=given,
            predictions=predictions,
            guidance=guidance_ramp(self.guidance_scale, len(predictions), self.min_guidance_scale),
            sigmas=[tuple(schedule.sampling_sigmas(steps, self.spacing).tolist()) for steps in diffusion_steps],
            least_guided=self.guidance_above,
            refresh_every=self.refresh_every,
        )
