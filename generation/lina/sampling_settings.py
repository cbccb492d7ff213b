"""How an image is to be drawn: what users choose, checked, and the plan that follows from it."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from generation.argument_checks import check_choice, check_real, check_whole
from generation.lina.sampling import ORDERS, Plan, generation_order, guidance_ramp, predictions_per_step
from generation.lina.token_denoiser import FlowSchedule

SPACINGS = ("official", "trailing")
MOST_STEPS = 10_000
MOST_TOKENS = 65536  # of an image: 4096 x 4096 pixels of the published text-to-image models
FAST_SHARE, FAST_DIFFUSION_STEPS, FAST_LEAST_GUIDED = 4, 8, 0.25


def check_size(
    given: tuple[int | None, int | None], own: tuple[int, int], image: tuple[int, int] | None, multiple: int
) -> tuple[int, int]:
    """Height and width to draw: as given, or else of the image that is drawn into, or else the model's own.

    Raises:
        ValueError: one is no positive multiple of `multiple`, or together they make more than `MOST_TOKENS` tokens.
    """
    height, width = (own if size is None else size for size, own in zip(given, image or own, strict=True))
    for name, size, asked in zip(("height", "width"), (height, width), given, strict=True):
        if isinstance(size, bool) or not isinstance(size, int) or size < multiple or size % multiple:
            valid = f"it must be a multiple of {multiple} pixels"
            if asked is None:
                below = size // multiple * multiple
                near = " or ".join(str(near) for near in (below, below + multiple) if near)
                raise ValueError(f"{name} is {size}, taken from image; {valid}, such as {near}")
            raise ValueError(f"{name} is {size!r}; {valid}")
    if (count := 4 * (height // multiple) * (width // multiple)) > MOST_TOKENS:
        raise ValueError(
            f"height and width are {[height, width]}; that makes {count} tokens, and at most {MOST_TOKENS} work"
        )
    return height, width


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
        least = self.min_guidance_scale
        if least is not None and least > self.guidance_scale:
            raise ValueError(
                f"min_guidance_scale is {least}; it must be a number from 0 to guidance_scale, {self.guidance_scale}"
            )
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
