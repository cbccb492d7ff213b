"""What Q-Zoom asks of a backbone."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel

from multimodal.q_zoom.layers import Decoder, Rotary
from multimodal.q_zoom.prompt import ImageTokens, Prompt
from multimodal.q_zoom.regions import Box


class UnsupportedBackbone(ValueError):
    """A model Q-Zoom cannot be put around, with the reason."""


class BackboneAdapter(Protocol):
    """A family of models of transformers, as Q-Zoom sees it.

    A model qualifies whose decoder reads one image as one unbroken run of tokens on a rectangular grid, among the
    tokens of the question, with full causal attention.

    Attributes:
        model: the stock model, never changed.
        decoder: its language model's parts.
        image_token: id of the tokens that stand for the image.
        cell_pixels: side of the square of pixels a visual token covers.
        alignments: where the tokens of a region can stand: "continuous" needs rotary positions of rows and columns.
        marked: the image has a token before and one after it, which regions get as well.
        deepstack_levels: how many decoder layers get features of the image added.
        fixed_tokens: how many tokens every image takes; `None` where that follows from its size and the budget.
    """

    model: PreTrainedModel
    decoder: Decoder
    image_token: int
    cell_pixels: int
    alignments: tuple[str, ...]
    marked: bool
    deepstack_levels: int
    fixed_tokens: int | None

    def prompts(self, inputs: Mapping[str, Tensor]) -> list[Prompt]:
        """The rows of a processor's output, each without padding.

        Raises:
            ValueError: a row has no image, more than one, or a number of image tokens that is not its image's.
        """
        ...

    def encode(self, images: Sequence[Image], budget: tuple[int, int]) -> list[ImageTokens]:
        """Visual tokens of images, at least and at most `budget` of each."""
        ...

    def ask(self, images: Sequence[Image], questions: Sequence[str], budget: tuple[int, int]) -> Mapping[str, Tensor]:
        """The processor's output for one image and one question a row, in the model's chat format."""
        ...

    def rotary(self, embeddings: Tensor, positions: Tensor) -> Rotary:
        """Cosines and sines of positions `[A, 1, S]`."""
        ...

    def fused_positions(
        self, prompt: Prompt, grids: Sequence[tuple[int, int]], boxes: Sequence[Sequence[int]], alignment: str
    ) -> Tensor:
        """Positions `[A, 1, S']` of `prompt` with regions put in.

        Args:
            grids: rows and columns of each region's tokens.
            boxes: of each region in cells of the source image: left, top, right, bottom, the latter two exclusive.
        """
        ...

    def cells_to_pixels(self, box: Box, prompt: Prompt, size: tuple[int, int], least: int) -> Box:
        """A box of cells as a box in the source image of `size` (width, height), at least `least` pixels a side."""
        ...

    def pixels_to_cells(self, box: Box, prompt: Prompt, size: tuple[int, int]) -> Box:
        """The cells a box of pixels touches."""
        ...

    def over_image(self, cells: Tensor, size: tuple[int, int]) -> Tensor:
        """A map of the cells `[rows, columns]` as one that covers just the source image of `size` (width, height)."""
        ...

    def check_picture(self, prompt: Prompt, size: tuple[int, int], row: int) -> None:
        """Raise a `ValueError` if an image of `size` cannot be the one that the prompt of a row was made of."""
        ...

    def generation_positions(self, positions: Sequence[Tensor], length: int) -> dict[str, Any]:
        """What `generate` is given as positions of prompts `[A, 1, S]`, padded on the left to `length`."""
        ...


def image_run(input_ids: Tensor, image_token: int, row: int) -> tuple[int, int]:
    """First index and number of the image's tokens in a row's ids `[S]`.

    Raises:
        ValueError: there are none, or they are not one run.
    """
    places = (input_ids == image_token).nonzero()[:, 0]
    if not len(places):
        raise ValueError(
            f"row {row} of inputs has no image token (id {image_token}); Q-Zoom needs one image a question"
        )
    start, count = int(places[0]), len(places)
    if int(places[-1]) - start + 1 != count:
        raise ValueError(
            f"row {row} of inputs has image tokens in more than one place; Q-Zoom takes one image a question"
        )
    return start, count
