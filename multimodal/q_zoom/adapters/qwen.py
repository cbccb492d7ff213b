"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: rotary positions of time, rows and columns, images of any shape."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel

from multimodal.q_zoom.adapters.protocol import image_run
from multimodal.q_zoom.layers import Decoder, Rotary
from multimodal.q_zoom.positions import fused_positions
from multimodal.q_zoom.prompt import ImageTokens, Prompt
from multimodal.q_zoom.regions import Box, cells_to_pixels, cells_touched


class QwenAdapter:
    """Reads the vision-language models of the Qwen family; see `BackboneAdapter`.

    Args:
        model: of transformers' `Qwen2VL-`, `Qwen2_5_VL-` or `Qwen3VLForConditionalGeneration`.
        processor: the model's; `None` serves prompts that were prepared elsewhere.
    """

    alignments = ("continuous", "separate")
    marked = True
    fixed_tokens = None

    def __init__(self, model: PreTrainedModel, processor: Any):
        self.model = model
        self.processor = processor
        language, config = model.model.language_model, model.config
        self.decoder = Decoder(language.config, language.layers, language.norm, model.lm_head)
        self.image_token = config.image_token_id
        self.video_token = config.video_token_id
        vision = config.vision_config
        self.merge = vision.spatial_merge_size
        self.cell_pixels = vision.patch_size * self.merge
        self.deepstack_levels = len(getattr(vision, "deepstack_visual_indexes", None) or ())

    def prompts(self, inputs: Mapping[str, Tensor]) -> list[Prompt]:
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(ids)
        grids, pixels = inputs.get("image_grid_thw"), inputs.get("pixel_values")
        if grids is None or pixels is None:
            raise ValueError("inputs have no image (pixel_values and image_grid_thw); Q-Zoom needs one a question")
        if len(grids) != len(ids):
            raise ValueError(f"inputs have {len(ids)} questions and {len(grids)} images; each must have one image")
        rows = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
        starts = [
            self._image_start(row, grid, index) for index, (row, grid) in enumerate(zip(rows, grids, strict=True))
        ]
        patches = pixels.split(grids.prod(-1).tolist())
        return [
            self._prompt(row, start, self._features(values, grid[None])[0])
            for row, start, values, grid in zip(rows, starts, patches, grids, strict=True)
        ]

    def encode(self, images: Sequence[Image], budget: tuple[int, int]) -> list[ImageTokens]:
        return [self._encoded(image, budget) for image in images]

    def ask(self, images: Sequence[Image], questions: Sequence[str], budget: tuple[int, int]) -> Mapping[str, Tensor]:
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for question in questions
        ]
        inputs = self.processor(
            text=texts,
            images=list(images),
            images_kwargs={"size": self._pixels(budget)},
            text_kwargs={"padding": True, "padding_side": "left"},
            return_tensors="pt",
        )
        for row, (image, grid) in enumerate(zip(images, inputs["image_grid_thw"], strict=True)):
            tokens = int(grid.prod()) // self.merge**2
            if tokens > budget[1]:
                raise ValueError(
                    f"images[{row}] has {image.width} x {image.height} pixels; so long a strip takes {tokens} visual "
                    f"tokens at least, and {budget[1]} are allowed"
                )
        return inputs.to(self.model.device)

    def rotary(self, embeddings: Tensor, positions: Tensor) -> Rotary:
        return self.model.model.language_model.rotary_emb(embeddings, positions)

    def fused_positions(
        self, prompt: Prompt, grids: Sequence[tuple[int, int]], boxes: Sequence[Sequence[int]], alignment: str
    ) -> Tensor:
        fused = fused_positions(prompt.positions[:, 0], prompt.image_start, prompt.grid, grids, boxes, alignment)
        return fused[:, None]

    def cells_to_pixels(self, box: Box, prompt: Prompt, size: tuple[int, int], least: int) -> Box:
        return cells_to_pixels(box, prompt.grid, size, least, cell_pixels=self.cell_pixels)

    def pixels_to_cells(self, box: Box, prompt: Prompt, size: tuple[int, int]) -> Box:
        return cells_touched(box, prompt.grid, size)

    def over_image(self, cells: Tensor, size: tuple[int, int]) -> Tensor:
        return cells

    def check_picture(self, prompt: Prompt, size: tuple[int, int], row: int) -> None:
        (rows, columns), (width, height) = prompt.grid, size
        # Processors round each side to whole cells, and have one at least.
        widest, narrowest = (columns + 1) / max(rows - 1, 0.5), max(columns - 1, 0.5) / (rows + 1)
        if not narrowest <= width / height <= widest and min(rows, columns) > 1:
            raise ValueError(
                f"images[{row}] has {width} x {height} pixels, which cannot be the image that inputs were made of: its "
                f"visual tokens have {rows} rows and {columns} columns"
            )

    def generation_positions(self, positions: Sequence[Tensor], length: int) -> dict[str, Any]:
        # Four axes: the first is the place in the text, which attention masks are made from.
        padded = positions[0].new_zeros(4, len(positions), length, dtype=torch.float32)
        for row, axes in enumerate(positions):
            count = axes.shape[-1]
            padded[0, row, length - count :] = torch.arange(count, device=axes.device)
            padded[1:, row, length - count :] = axes[:, 0]
        return {"position_ids": padded}

    def _encoded(self, image: Image, budget: tuple[int, int]) -> ImageTokens:
        """One image within the budget, which the processor exceeds for strips: a side has one cell at least."""
        least, most = budget
        while True:
            size = self._pixels((min(least, most), most))
            values = self.processor.image_processor(images=[image], size=size, return_tensors="pt")
            tokens = int(values["image_grid_thw"].prod()) // self.merge**2
            if most == 1 and tokens > budget[1]:
                raise ValueError(
                    f"a region of {image.width} x {image.height} pixels takes {tokens} visual tokens at least; "
                    f"{budget[1]} are left for it"
                )
            if tokens <= budget[1]:
                values = values.to(self.model.device)
                return self._features(values["pixel_values"], values["image_grid_thw"])[0]
            most = max(1, min(most - 1, int(most * (budget[1] / tokens) ** 2)))

    def _pixels(self, budget: tuple[int, int]) -> dict[str, int]:
        least, most = (tokens * self.cell_pixels**2 for tokens in budget)
        return {"shortest_edge": least, "longest_edge": most}

    def _image_start(self, ids: Tensor, grid: Tensor, row: int) -> int:
        if (ids == self.video_token).any():
            raise ValueError(f"row {row} of inputs holds a video; Q-Zoom takes one image a question")
        start, count = image_run(ids, self.image_token, row)
        expected = int(grid.prod()) // self.merge**2
        if count != expected:
            raise ValueError(f"row {row} of inputs has {count} image tokens; its image has {expected}")
        return start

    def _features(self, pixels: Tensor, grids: Tensor) -> list[ImageTokens]:
        encoded = self.model.get_image_features(pixels, image_grid_thw=grids, return_dict=True)
        levels = [
            level.split([len(features) for features in encoded.pooler_output]) if isinstance(level, Tensor) else level
            for level in getattr(encoded, "deepstack_features", None) or ()
        ]
        return [
            ImageTokens(
                features,
                (int(grid[1]) // self.merge, int(grid[2]) // self.merge),
                tuple(level[index] for level in levels),
            )
            for index, (features, grid) in enumerate(zip(encoded.pooler_output, grids, strict=True))
        ]

    def _prompt(self, ids: Tensor, start: int, image: ImageTokens) -> Prompt:
        visual = ids == self.image_token
        embeddings = self.model.get_input_embeddings()(ids)
        embeddings[visual] = image.features.to(embeddings)
        grid = ids.new_tensor([[1, image.grid[0] * self.merge, image.grid[1] * self.merge]])
        positions, _ = self.model.model.get_rope_index(
            ids[None], mm_token_type_ids=visual[None].int(), image_grid_thw=grid
        )
        deepstack = tuple(level.to(embeddings) for level in image.deepstack)
        return Prompt(ids, embeddings[None], positions, start, image.grid, visual, deepstack)
