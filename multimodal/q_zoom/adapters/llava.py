"""LLaVA: square images of a fixed number of tokens, positions of one axis."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from multimodal.q_zoom.adapters.protocol import image_run
from multimodal.q_zoom.layers import Decoder, Rotary
from multimodal.q_zoom.prompt import ImageTokens, Prompt
from multimodal.q_zoom.regions import Box, cells_touched, padded_square_to_pixels

FINER = 16  # times a map of cells, for cutting off a square's padding


class LlavaAdapter:
    """Reads `LlavaForConditionalGeneration`; see `BackboneAdapter`.

    `ask` pads images to a square with the processor's mean colour, as LLaVA-1.5 was trained; heat maps and boxes are
    of that square, so inputs made otherwise must be padded alike.
    """

    alignments = ("separate",)
    marked = False
    deepstack_levels = 0

    def __init__(self, model: PreTrainedModel, processor: Any):
        self.model = model
        self.processor = processor
        language, vision = model.model.language_model, model.config.vision_config
        self.decoder = Decoder(language.config, language.layers, language.norm, model.lm_head)
        self.image_token = model.config.image_token_id
        self.cell_pixels = vision.patch_size
        self.side = vision.image_size
        self.grid = (self.side // vision.patch_size,) * 2
        self.fixed_tokens = self.grid[0] * self.grid[1]

    def prompts(self, inputs: Mapping[str, Tensor]) -> list[Prompt]:
        ids, pixels = inputs["input_ids"], inputs.get("pixel_values")
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(ids)
        if pixels is None:
            raise ValueError("inputs have no image (pixel_values); Q-Zoom needs one a question")
        if len(pixels) != len(ids):
            raise ValueError(f"inputs have {len(ids)} questions and {len(pixels)} images; each must have one image")
        rows = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
        expected = self.fixed_tokens
        starts = []
        for index, row in enumerate(rows):
            start, count = image_run(row, self.image_token, index)
            if count != expected:
                raise ValueError(f"row {index} of inputs has {count} image tokens; its image has {expected}")
            starts.append(start)
        return [
            self._prompt(row, start, self._features(values[None]))
            for row, start, values in zip(rows, starts, pixels, strict=True)
        ]

    def encode(self, images: Sequence[Image.Image], budget: tuple[int, int]) -> list[ImageTokens]:
        size = {"height": self.side, "width": self.side}
        encoded = [
            self.processor.image_processor(images=[image], size=size, do_center_crop=False, return_tensors="pt")
            for image in images
        ]
        return [self._features(values["pixel_values"].to(self.model.device)) for values in encoded]

    def ask(
        self, images: Sequence[Image.Image], questions: Sequence[str], budget: tuple[int, int]
    ) -> Mapping[str, Tensor]:
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for question in questions
        ]
        colour = tuple(round(255 * mean) for mean in self.processor.image_processor.image_mean)
        squares = [ImageOps.pad(image, (max(image.size),) * 2, color=colour) for image in images]
        return self.processor(text=texts, images=squares, padding=True, padding_side="left", return_tensors="pt").to(
            self.model.device
        )

    def rotary(self, embeddings: Tensor, positions: Tensor) -> Rotary:
        return self.model.model.language_model.rotary_emb(embeddings, positions[0])

    def fused_positions(
        self, prompt: Prompt, grids: Sequence[tuple[int, int]], boxes: Sequence[Sequence[int]], alignment: str
    ) -> Tensor:
        length = prompt.length + sum(rows * columns for rows, columns in grids)
        return torch.arange(length, device=prompt.positions.device)[None, None]

    def cells_to_pixels(self, box: Box, prompt: Prompt, size: tuple[int, int], least: int) -> Box:
        return padded_square_to_pixels(box, prompt.grid, size, least, square_pixels=self.side)

    def pixels_to_cells(self, box: Box, prompt: Prompt, size: tuple[int, int]) -> Box:
        # Cells are of the square the image is padded to.
        side = max(size)
        across, down = ((side - length) // 2 for length in size)
        moved = (box[0] + across, box[1] + down, box[2] + across, box[3] + down)
        return cells_touched(moved, prompt.grid, (side, side))

    def over_image(self, cells: Tensor, size: tuple[int, int]) -> Tensor:
        # The square's padding goes; cells are cut where the image ends within one.
        finer = F.interpolate(cells[None, None], scale_factor=FINER, mode="bilinear")[0, 0]
        height, width = (
            max(1, round(side * length / max(size))) for side, length in zip(finer.shape, size[::-1], strict=True)
        )
        top, left = (finer.shape[0] - height) // 2, (finer.shape[1] - width) // 2
        return finer[top : top + height, left : left + width]

    def check_picture(self, prompt: Prompt, size: tuple[int, int], row: int) -> None:
        pass  # any image becomes the same square of tokens

    def generation_positions(self, positions: Sequence[Tensor], length: int) -> dict[str, Any]:
        padded = positions[0].new_zeros(len(positions), length)
        for row, axes in enumerate(positions):
            padded[row, length - axes.shape[-1] :] = axes[0, 0]
        return {"position_ids": padded}

    def _features(self, pixels: Tensor) -> ImageTokens:
        encoded = self.model.get_image_features(pixels.to(self.model.dtype), return_dict=True)
        return ImageTokens(encoded.pooler_output[0], self.grid)

    def _prompt(self, ids: Tensor, start: int, image: ImageTokens) -> Prompt:
        visual = ids == self.image_token
        embeddings = self.model.get_input_embeddings()(ids)
        embeddings[visual] = image.features.to(embeddings)
        positions = torch.arange(len(ids), device=ids.device)[None, None]
        return Prompt(ids, embeddings[None], positions, start, image.grid, visual)
