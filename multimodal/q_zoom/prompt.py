"""A question with its image as a decoder reads it: embeddings, positions, and where the visual tokens stand."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.q_zoom.positions import splice_plan


@dataclass(frozen=True)
class ImageTokens:
    """An encoded image.

    Args:
        features: `[N, C]`, row by row.
        grid: rows and columns, N together.
        deepstack: `[N, C]` for each of the first decoder layers, added to their outputs (Qwen3-VL), or none.
    """

    features: Tensor
    grid: tuple[int, int]
    deepstack: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """One question, never padded.

    Args:
        input_ids: `[S]`.
        embeddings: `[1, S, C]`, the image's features in place.
        positions: `[A, 1, S]` of A rotary axes: 3 (time, row, column), whole numbers or not, or 1.
        image_start: index of the first token of the source image.
        grid: rows and columns of the source image.
        visual: `[S]` bool: tokens of the source image and of regions.
        deepstack: `[V, C]` a level, for the V visual tokens in order.
    """

    input_ids: Tensor
    embeddings: Tensor
    positions: Tensor
    image_start: int
    grid: tuple[int, int]
    visual: Tensor
    deepstack: tuple[Tensor, ...] = ()

    @property
    def length(self) -> int:
        return self.input_ids.shape[0]

    @property
    def image_stop(self) -> int:
        """Index after the source image's last token."""
        return self.image_start + self.grid[0] * self.grid[1]

    def first(self, count: int) -> "Prompt":
        """The prompt's first `count` tokens, the whole source image among them."""
        seen = int(self.visual[:count].sum())
        return self._part(slice(count), tuple(level[:seen] for level in self.deepstack))

    def after(self, count: int) -> "Prompt":
        """What follows the prompt's first `count` tokens; `image_start` and `grid` stay the source image's."""
        seen = int(self.visual[:count].sum())
        return self._part(slice(count, None), tuple(level[seen:] for level in self.deepstack))

    def _part(self, part: slice, deepstack: tuple[Tensor, ...]) -> "Prompt":
        return Prompt(
            self.input_ids[part],
            self.embeddings[:, part],
            self.positions[..., part],
            self.image_start,
            self.grid,
            self.visual[part],
            deepstack,
        )


def with_regions(
    prompt: Prompt, regions: Sequence[ImageTokens], positions: Tensor, image_token: int, *, marked: bool
) -> Prompt:
    """`prompt` with the tokens of regions of its image put in after the image.

    Args:
        positions: `[A, 1, S']` of the new prompt.
        image_token: the id visual tokens have.
        marked: as of `positions.splice_plan`.
    """
    counts = [region.features.shape[0] for region in regions]
    image = prompt.grid[0] * prompt.grid[1]
    plan = splice_plan(prompt.length, prompt.image_start, image, counts, marked=marked)
    levels = zip(prompt.deepstack, *(region.deepstack for region in regions), strict=True)
    return Prompt(
        plan.splice(prompt.input_ids, prompt.input_ids.new_full((sum(counts),), image_token)),
        plan.splice(prompt.embeddings[0], torch.cat([region.features for region in regions]))[None],
        positions,
        prompt.image_start,
        prompt.grid,
        plan.splice(prompt.visual, prompt.visual.new_ones(sum(counts))),
        tuple(torch.cat([level.to(prompt.embeddings) for level in parts]) for parts in levels),
    )
