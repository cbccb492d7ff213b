"""Stage 2 of Q-Zoom's training: the model learns to read a question with a region of its image put in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL.Image import Image
from torch import Tensor, nn

from multimodal.argument_checks import check_real
from multimodal.q_zoom.prefill import fuse
from multimodal.q_zoom.prompt import Prompt
from multimodal.q_zoom.regions import Box, checked_box
from multimodal.q_zoom.training.padded_rows import answer_loss, with_answer
from multimodal.q_zoom.training.prompts import answer_ids, prompts_of
from multimodal.q_zoom.training.samples import ZoomSample
from multimodal.q_zoom.training.stages import Mean, ZoomStage

RANDOM_SIDES = (0.1, 0.6)  # least and greatest side of a random box, as shares of the map's


class TargetedTuning(ZoomStage):
    """Stage 2: next-token prediction of the answer, with the region in the prompt (arXiv 2604.06912).

    Decoder layers and head are trained; encoder and branches stay. Embeddings of words stay too, unless the model ties
    them to the head, as Qwen2.5-VL-3B and the tiny reader do: both are one weight then, which is trained. Regions are
    those that the trained branch proposes for the question alone, before the answer, as in use. (The published code for
    Qwen2.5-VL asks by the last token of the whole training sequence.) A sample without any is learnt as the question
    stands.

    Args:
        backbone, heads, settings, options: see `ZoomStage`; `heads` are those of stage 1.
        use_boxes: take a sample's `box` as its region, where it has one, instead of what is proposed.
        random_boxes: probability to take a random box instead, with sides from 0.1 to 0.6 of the map's (0.8 as
            published for Qwen3-VL, 0 for Qwen2.5-VL).
        checkpointed: keep no activations inside of decoder layers but compute them again: less memory, more time.
        learning_rate, warmup, betas, weight_decay: see `ZoomStage`; the defaults are the published ones.
    """

    def __init__(
        self,
        backbone: str,
        heads: str | None = None,
        settings: dict[str, Any] | str | None = None,
        use_boxes: bool = False,
        random_boxes: float = 0.0,
        checkpointed: bool = False,
        learning_rate: float = 1e-6,
        warmup: float = 0.03,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        options: dict[str, Any] | None = None,
    ):
        super().__init__(backbone, heads, settings, learning_rate, warmup, betas, weight_decay, options)
        self.use_boxes, self.checkpointed = use_boxes, checkpointed
        self.random_boxes = check_real("random_boxes", random_boxes, 0, 1)

    def trained(self) -> list[nn.Module]:
        return [self.zoom.adapter.decoder.layers, self.zoom.adapter.decoder.head]

    def loss(self, samples: Sequence[ZoomSample], generator: torch.Generator | None = None) -> Tensor:
        adapter, rows = self.zoom.adapter, []
        for sample, prompt in zip(samples, prompts_of(self.zoom, samples), strict=True):
            fused = self.with_region(sample, prompt, generator)
            rows.append(with_answer(adapter, fused, answer_ids(adapter, sample.question, sample.answer)))
        prompts, labels = zip(*rows, strict=True)
        return answer_loss(adapter, prompts, labels, checkpointed=self.checkpointed)

    @torch.no_grad()
    def scores(self, samples: Sequence[ZoomSample]) -> dict[str, Mean]:
        """The loss, without random boxes."""
        return {"loss": Mean(float(self.loss(samples)), len(samples))}

    def with_region(self, sample: ZoomSample, prompt: Prompt, generator: torch.Generator | None) -> Prompt:
        """The prompt with its region put in; as it is where there is none."""
        picture = sample.picture()
        boxes, cells = self.regions(sample, prompt, picture, generator)
        budget = self.zoom.region_budget(prompt, len(boxes)) if boxes else None
        if budget is None:
            return prompt
        regions = self.zoom.adapter.encode([picture.crop(box) for box in boxes], budget)
        return fuse(self.zoom.adapter, prompt, regions, cells, self.zoom.config.alignment)

    @torch.no_grad()
    def regions(
        self, sample: ZoomSample, prompt: Prompt, picture: Image, generator: torch.Generator | None
    ) -> tuple[list[Box], list[Box]]:
        """Boxes to look at, in pixels of the picture and in cells."""
        zoom = self.zoom
        if generator is not None and torch.rand((), generator=generator) < self.random_boxes:
            cells = random_box(prompt.grid, generator)
            least = zoom.config.least_region_pixels
            return [zoom.adapter.cells_to_pixels(cells, prompt, picture.size, least)], [cells]
        if self.use_boxes and sample.box is not None:
            box = checked_box(sample.box, picture.size)
            return [box], [zoom.adapter.pixels_to_cells(box, prompt, picture.size)]
        where = zoom.propose_at(zoom.read_to_tap(prompt), picture.size, zoom.config.region_threshold)
        return where.boxes, where.cells

    @rank_zero_only
    def _save(self, name: str) -> None:
        super()._save(name)
        folder = Path(self.trainer.default_root_dir) / ("model" if name == "branches" else f"{name}_model")
        self.zoom.model.save_pretrained(folder)
        self.zoom.processor.save_pretrained(folder)


def random_box(grid: tuple[int, int], generator: torch.Generator) -> Box:
    """A box of cells anywhere in a map of `grid` rows and columns, its sides 0.1 to 0.6 of the map's, at least one."""
    edges = []
    for count in (grid[1], grid[0]):
        share = RANDOM_SIDES[0] + (RANDOM_SIDES[1] - RANDOM_SIDES[0]) * torch.rand((), generator=generator)
        length = max(1, round(float(share) * count))
        start = int(torch.randint(count - length + 1, (), generator=generator))
        edges.append((start, start + length))
    (left, right), (top, bottom) = edges
    return Box(left, top, right, bottom)
