"""The loop that draws images: in some order, a few tokens a step, each step seeing all tokens drawn before.

Everything random comes from outside (an order and a source of noise), so that an image depends on its own generator
and on nothing else in its batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from generation.lina.attention import gather
from generation.lina.attention_memory import EncoderMemory
from generation.lina.token_denoiser import SamplingDenoiser
from generation.lina.transformer import LinaTransformer
from kernels.packed_linear import packed_twin

ORDERS = ("random", "raster", "spiral")


def predictions_per_step(steps: int, count: int) -> list[int]:
    """How many of `count` tokens each step draws: few at first, by a cosine. Zeros are steps that are skipped."""
    left = [round(math.cos(math.pi / 2 * (k + 1) / steps) * count) for k in range(steps)]
    return [before - after for before, after in zip([count, *left[:-1]], left, strict=True)]


def guidance_ramp(guidance: float, steps: int, start: float | None = None) -> list[float]:
    """The guidance of each step: constant, or, if `start` is given, in even steps from just above `start`."""
    start = guidance if start is None else start
    return [(guidance - start) * (i + 1) / steps + start for i in range(steps)]


def generation_order(grid: tuple[int, int], kind: str, strength: float, uniform: Tensor) -> Tensor:
    """In which order tokens are drawn.

    Args:
        grid: rows and columns.
        kind: "random", "raster" (row by row) or "spiral" (from the centre outwards).
        strength: 0 makes any order random, 1 strict; between, tokens are drawn about when the order says.
        uniform: `[B, N]` numbers in [0, 1).

    Returns:
        `[B, N]` indices.
    """
    if kind == "random":
        return uniform.argsort(dim=1, stable=True)
    places = torch.arange(grid[0] * grid[1], device=uniform.device)
    rank = places if kind == "raster" else _spiral(grid).to(uniform.device).argsort()
    return (strength * rank / len(places) + (1 - strength) * uniform).argsort(dim=1, stable=True)


def _spiral(grid: tuple[int, int]) -> Tensor:
    """Indices of all tokens, from the centre outwards: around it by distance (to the side), then by angle."""
    rows, columns = torch.meshgrid(*(torch.arange(size) - (size - 1) / 2 for size in grid), indexing="ij")
    ring = torch.maximum(rows.abs(), columns.abs()).ceil()
    return (ring * 8 + torch.atan2(rows, columns)).flatten().argsort(stable=True)


@dataclass(frozen=True)
class Plan:
    """What the loop is to do.

    Args:
        order: `[B, N]` indices; the first `known` of them are given.
        known: how many tokens are given.
        predictions: how many tokens each step draws, all at least 1.
        guidance: of each step.
        sigmas: of each step, the noise levels of the token denoiser, descending from 1 to 0.
        least_guided: below this noise level there is no guidance; 0 is exact.
        refresh_every: so many steps share what the first half of the image encoder made of the tokens known at the
            first of them, unless these are changed; 1 is exact, more needs linear attention by division.
    """

    order: Tensor
    known: int
    predictions: Sequence[int]
    guidance: Sequence[float]
    sigmas: Sequence[tuple[float, ...]]
    least_guided: float = 0.0
    refresh_every: int = 1


def draw_tokens(
    model: LinaTransformer,
    context: Tensor,
    unconditional: Tensor | None,
    tokens: Tensor,
    plan: Plan,
    noise: Callable[[int, Tensor], Tensor],
    *,
    grid: tuple[int, int] | None = None,
    images_per_prompt: int = 1,
) -> Iterator[Tensor]:
    """Draw all tokens that are not known, step by step.

    Args:
        model: in evaluation mode; iterate without gradients.
        context: `[B, n, C]` of the prompts.
        unconditional: `[B, n, C]` of the negative prompts; None where no step has guidance.
        tokens: `[B, N, D]`, of which those known at the start count.
        plan: order, steps, guidance.
        noise: of a step and the `[B, k]` indices drawn in it: `[B, k, D]`.
        grid: rows and columns of the tokens, the model's own if None.
        images_per_prompt: so many images, one behind the other, have the same contexts: as long as no token is known,
            they share the work.

    Yields:
        After each step all tokens, `[B, N, D]`; what is changed in them counts.
    """
    config = model.config
    if plan.refresh_every > 1 and (config.attention, config.normalization) != ("linear", "division"):
        raise ValueError(
            f"refresh_every is {plan.refresh_every}; it must be 1 for {config.attention} attention normalised by "
            f"{config.normalization}"
        )
    grid = model.grid_of(model.latent_size) if grid is None else grid
    model = packed_twin(model)  # for this call alone, so that it never lags behind a training
    denoise = SamplingDenoiser(model.image_decoder)
    tokens = tokens.clone()
    known_before = accumulate(plan.predictions[:-1], initial=plan.known)
    steps = zip(known_before, plan.predictions, plan.guidance, plan.sigmas, strict=True)
    for step, (known, count, guidance, sigmas) in enumerate(steps):
        if step % plan.refresh_every == 0:
            memory = EncoderMemory.of_depth(config.encoder_depth) if plan.refresh_every > 1 else None
        visible, wanted = plan.order[:, :known], plan.order[:, known : known + count]
        guided = unconditional is not None and guidance != 1
        contexts = [context, unconditional] if guided else [context]
        if known == 0 and images_per_prompt > 1:
            prompts = torch.cat([c[::images_per_prompt] for c in contexts])
            condition = model.encode_image(tokens[: len(prompts)], prompts, grid, visible[:1].expand(len(prompts), 0))
            condition = condition.repeat_interleave(images_per_prompt, 0)
            condition = gather(condition, wanted.repeat(len(contexts), 1))
        else:
            several = [x.repeat(len(contexts), *[1] * (x.dim() - 1)) for x in (tokens, visible, wanted)]
            if memory is not None:
                seen = gather(several[0], several[1])
                if not memory.is_of(seen):  # guidance began or ended, or the caller changed known tokens
                    memory = EncoderMemory.of_depth(config.encoder_depth)
                memory.seen = seen
            condition = model.encode_image(several[0], torch.cat(contexts), grid, several[1], several[2], memory)
        drawn = denoise(noise(step, wanted), condition, sigmas, guidance, plan.least_guided)
        tokens.scatter_(1, wanted[..., None].expand_as(drawn), drawn)
        yield tokens
