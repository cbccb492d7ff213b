"""Q-Zoom around a stock image-text-to-text model of transformers."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from multimodal.argument_checks import check_choice, check_real
from multimodal.q_zoom.adapters import adapter_of
from multimodal.q_zoom.configuration import QZoomConfig
from multimodal.q_zoom.generation import continue_by_generate
from multimodal.q_zoom.generation_options import GenerationOptions
from multimodal.q_zoom.heads import RegionProposal, ZoomGate, copies_of_layers
from multimodal.q_zoom.images import ImageLike, opened_images
from multimodal.q_zoom.prefill import (
    Prefilled,
    Tap,
    fuse,
    gate_probability,
    read_on,
    read_to_tap,
    reread,
    score_map,
    with_shared_layer,
)
from multimodal.q_zoom.prompt import Prompt
from multimodal.q_zoom.regions import Box, checked_box, find_regions, widened_box
from multimodal.q_zoom.separability_gate import answer_twice

GATES = ("auto", "always", "never", "separability")


@dataclass(frozen=True)
class Proposal:
    """Where to look: boxes in pixels of the source image and in cells, and probabilities `[H, W]` over the image.

    The probabilities are those of the cells, blurred; of LLaVA, whose cells cover a padded square, at a finer grid.
    """

    boxes: list[Box]
    cells: list[Box]
    heat_map: Tensor


@dataclass(frozen=True)
class ZoomInfo:
    """What was done for one question.

    Args:
        gate_probability: of the gate, or the answer's separability with `gate="separability"`; `None` if not asked.
        opened: the answer was given with a closer look.
        boxes: what was looked at, in pixels of the source image.
        heat_map: `[H, W]`, the probabilities over the image that boxes were found in; `None` if none were looked for.
        source_tokens, region_tokens: visual tokens of the whole image and of the regions.
        full_tokens: visual tokens that the image would take at its own resolution; `None` if the image was not given.
        note: why there was no closer look though the gate was open, or "".
    """

    gate_probability: float | None
    opened: bool
    boxes: list[Box]
    heat_map: Tensor | None
    source_tokens: int
    region_tokens: int
    full_tokens: int | None
    note: str = ""

    @property
    def visual_tokens(self) -> int:
        return self.source_tokens + self.region_tokens


class QZoom(nn.Module):
    """A stock model of transformers that looks closer where a question needs it (arXiv 2604.06912).

    The model is never changed and holds no state of a call, so one Q-Zoom may serve several threads. Make one by
    `QZoom.wrap` or `QZoom.from_pretrained`.

    Example:
        >>> zoom = QZoom.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct", heads="q_zoom_heads")
        >>> inputs = zoom.ask("street.jpg", "What does the sign say?")
        >>> sequences, infos = zoom.generate(inputs, "street.jpg", max_new_tokens=32, return_zoom_info=True)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        config: QZoomConfig,
        proposal: RegionProposal,
        gate: ZoomGate | None,
    ):
        super().__init__()
        self.model = model
        self.processor = processor
        self.config = config
        self.proposal = proposal
        self.gate = gate
        self.adapter = adapter_of(model, processor)

    @classmethod
    def wrap(cls, model: PreTrainedModel, processor: Any, config: QZoomConfig) -> "QZoom":
        """Put Q-Zoom around a model, its branches copies of the model's layers after the tap, so far untrained.

        Raises:
            UnsupportedBackbone: the model's kind cannot be worked with; the message says why.
            ValueError: `config` does not fit the model.
        """
        adapter = adapter_of(model, processor)
        check_fit(config, adapter)
        layers = adapter.decoder.layers
        first = config.tap_layer
        proposed = copies_of_layers(layers[first : first + config.proposal_depth])
        gated = copies_of_layers(layers[first : first + config.gate_depth])
        if config.share_first_layer:
            gated[0] = proposed[0]
        norm = copy.deepcopy(adapter.decoder.norm) if config.proposal_norm else None
        proposal = RegionProposal(proposed, rotary=config.proposal_rotary, norm=norm)
        reference = next(layers[first].parameters())
        gate = ZoomGate(gated, adapter.decoder.config.hidden_size).to(reference)
        return cls(model, processor, config, proposal, gate).eval()

    @classmethod
    def from_pretrained(
        cls, base: str, heads: str | None = None, config: QZoomConfig | None = None, **options: Any
    ) -> "QZoom":
        """Load a stock model, and the branches from a folder of their own or from the model's checkpoint.

        Args:
            base: as of `AutoModelForImageTextToText.from_pretrained`; a checkpoint of the authors, whose branches are
                among its weights, serves as well.
            heads: folder written by `save_pretrained`; `None` looks for the branches in `base`.
            config: overrides the saved settings.
            options: of `AutoModelForImageTextToText.from_pretrained`, such as `dtype`.
        """
        from multimodal.q_zoom.checkpoints import load

        return load(cls, base, heads, config, options)

    def save_pretrained(self, folder: str, *, official_keys: bool = False) -> None:
        """Write the branches (never the model) and their settings into `folder`.

        Args:
            official_keys: name the weights as the authors' code does, with the tensors of the last proposal layer it
                never uses.
        """
        from multimodal.q_zoom.checkpoints import save

        save(self, folder, official_keys=official_keys)

    def ask(self, images: ImageLike | Sequence[ImageLike], questions: str | Sequence[str]) -> Mapping[str, Tensor]:
        """Inputs of `generate`: one question about one image a row, images within the coarse budget of tokens.

        Raises:
            ValueError: an empty question, or images that cannot be used.
        """
        listed = [questions] if isinstance(questions, str) else list(questions)
        if not listed or any(not isinstance(question, str) or not question.strip() for question in listed):
            raise ValueError(f"questions is {questions!r}; each question must be a text that is not empty")
        pictures = opened_images(images, len(listed), self.adapter.cell_pixels)
        least, most = self.config.coarse_tokens
        cap = self.config.max_visual_tokens
        if cap is not None and self.adapter.fixed_tokens is None:
            most = min(most, cap - min(self.config.region_tokens[0], cap // 2))  # a region must find room
        return self.adapter.ask(pictures, listed, (min(least, most), most))

    @torch.no_grad()
    def generate(
        self,
        inputs: Mapping[str, Tensor],
        images: ImageLike | Sequence[ImageLike] | None = None,
        *,
        gate: str = "auto",
        box: Any = None,
        gate_threshold: float | None = None,
        region_threshold: float | None = None,
        return_zoom_info: bool = False,
        **options: Any,
    ) -> Any:
        """Answer questions, looking closer where the gate says so.

        Rows are decided and read one by one, so every row of a batch gets the answer it gets alone; decoding runs for
        all together. Sequences start with `input_ids` as they were given, as those of stock `generate` do.

        Args:
            inputs: the processor's output, of `ask` or made otherwise; one image a row.
            images: the original images, one a row; not needed for `gate="never"`.
            gate: "auto" (the gate decides), "always", "never" (the stock model) or "separability": answer without a
                closer look first and look closer if the answer's tokens do not stand out (SpecEyes).
            box: where to look, instead of the proposal: `(left, top, right, bottom)` in pixels of the original image,
                or a list of them; for several rows a list with one of these, or `None`, a row. Where one is given the
                gate is not asked.
            gate_threshold, region_threshold: instead of the configuration's, in [0, 1]; for `gate="separability"`
                `gate_threshold` stands for `separability_threshold`.
            return_zoom_info: return `(output, [ZoomInfo, ...])`.
            options: any arguments of stock `generate` but assisted decoding and `use_cache=False`. Lengths count the
                prompts as given; streamers, stopping criteria and logits processors see
                them with their regions.

        Raises:
            ValueError: inputs, images, boxes or thresholds that cannot be used.
        """
        check_choice("gate", gate, GATES)
        thresholds = self._thresholds(gate, gate_threshold, region_threshold)
        if inputs.get("input_ids") is None:
            raise ValueError(f"inputs hold {sorted(inputs)}; they must be a processor's output, input_ids among it")
        rows = len(inputs["input_ids"])
        if gate == "never":
            if box is not None:
                raise ValueError("box is given and gate is 'never'; leave one of them out")
            pictures = [None] * rows if images is None else opened_images(images, rows, self.adapter.cell_pixels)
            prompts = self.adapter.prompts(inputs) if return_zoom_info else []
            output = self.model.generate(**inputs, **options)
            infos = [self.closed(*pair) for pair in zip(prompts, pictures, strict=False)]
            return (output, infos) if return_zoom_info else output
        if gate == "auto" and self.gate is None and box is None:
            raise ValueError(
                "gate is 'auto', but the checkpoint had no gate; valid are 'always', 'never', 'separability'"
            )
        pictures = opened_images(images, rows, self.adapter.cell_pixels)
        boxes = boxes_by_row(box, [picture.size for picture in pictures], self.config.least_region_pixels)
        settled = GenerationOptions.of(self.model, options, inputs["input_ids"].shape[1])
        prompts = self.adapter.prompts(inputs)
        for row, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
            self.adapter.check_picture(prompt, picture.size, row)
        if gate == "separability":
            output, infos = answer_twice(self, inputs, prompts, pictures, boxes, thresholds, settled)
        else:
            read = [
                self._read(prompt, picture, gate, chosen, thresholds)
                for prompt, picture, chosen in zip(prompts, pictures, boxes, strict=True)
            ]
            infos = [info for _, info in read]
            output = continue_by_generate(self.adapter, [row for row, _ in read], inputs["input_ids"], settled)
        return (output, infos) if return_zoom_info else output

    @torch.no_grad()
    def propose(self, image: ImageLike, question: str, *, region_threshold: float | None = None) -> Proposal:
        """Where to look in an image to answer a question; runs the layers up to the tap and the proposal alone."""
        inputs = self.ask(image, question)
        (picture,) = opened_images(image, 1, self.adapter.cell_pixels)
        (prompt,) = self.adapter.prompts(inputs)
        _, region_threshold = self._thresholds("auto", None, region_threshold)
        return self.propose_at(read_to_tap(self.adapter, prompt, self.config.tap_layer), picture.size, region_threshold)

    def propose_at(self, tap: Tap, size: tuple[int, int], threshold: float) -> Proposal:
        """As `propose`, for a prompt read to the tap; `size` is the source image's width and height."""
        config = self.config
        scores, kept = score_map(self.adapter, tap, self.proposal, sinks=config.sink == "first_token")
        found = find_regions(
            scores,
            threshold=threshold,
            sink=config.sink,
            keep_mask=kept,
            box_mode=config.box_mode,
            max_boxes=config.max_boxes,
            margin_cells=config.margin_cells,
        )
        least = config.least_region_pixels
        pixels = [self.adapter.cells_to_pixels(box, tap.prompt, size, least) for box in found.boxes]
        pixels = [widened_box(box, size, 1) for box in pixels]
        return Proposal(pixels, found.boxes, self.adapter.over_image(found.probabilities, size))

    def read_to_tap(self, prompt: Prompt) -> Tap:
        """`prompt` read by the layers both branches read from."""
        tap = read_to_tap(self.adapter, prompt, self.config.tap_layer)
        return tap if self.gate is None else with_shared_layer(self.adapter, tap, self.proposal, self.gate)

    def look_closer(
        self, tap: Tap, picture: Image, boxes: Sequence[Box], cells: Sequence[Box], *, reuse: bool = True
    ) -> Tap | None:
        """The prompt with regions of its image, read to the tap; `None` if no visual tokens are left for them.

        Args:
            boxes: regions in pixels of `picture`.
            cells: the same in cells of the source image.
            reuse: as of `prefill.reread`.
        """
        budget = self.region_budget(tap.prompt, len(boxes))
        if budget is None:
            return None
        regions = self.adapter.encode([picture.crop(box) for box in boxes], budget)
        fused = fuse(self.adapter, tap.prompt, regions, cells, self.config.alignment)
        return reread(self.adapter, tap, fused, reuse=reuse)

    def _read(
        self, prompt: Prompt, picture: Image, gate: str, chosen: Sequence[Box], thresholds: tuple[float, float]
    ) -> tuple[Prefilled, ZoomInfo]:
        """One prompt read, with a closer look if it is to have one."""
        tap = self.read_to_tap(prompt)
        probability = None
        if gate == "auto" and not chosen:
            if self.gate is None:
                raise ValueError("gate is 'auto', but the checkpoint had no gate; give every row a box")
            probability = check_real("the gate's probability", gate_probability(self.adapter, tap, self.gate), 0, 1)
            if probability < thresholds[0]:
                return read_on(self.adapter, tap, exact=self.config.exact), self.closed(prompt, picture, probability)
        return self.open(tap, picture, chosen, thresholds[1], probability)

    def open(
        self, tap: Tap, picture: Image, chosen: Sequence[Box], threshold: float, probability: float | None
    ) -> tuple[Prefilled, ZoomInfo]:
        """A prompt read with a closer look at `chosen` boxes, or at those proposed.

        Args:
            threshold: of the region.
            probability: what the gate said, for the information returned.
        """
        prompt = tap.prompt
        if chosen:
            cells = [Box(*self.adapter.pixels_to_cells(box, prompt, picture.size)) for box in chosen]
            where = Proposal(list(chosen), cells, None)
        else:
            where = self.propose_at(tap, picture.size, threshold)
        closer = self.look_closer(tap, picture, where.boxes, where.cells) if where.boxes else None
        if closer is None:
            note = "no visual tokens are left for a region" if where.boxes else "no cell is above the region threshold"
            info = self.closed(prompt, picture, probability, where.heat_map, note)
            return read_on(self.adapter, tap, exact=self.config.exact), info
        source = prompt.grid[0] * prompt.grid[1]
        tokens = int(closer.prompt.visual.sum()) - source
        full = full_tokens(picture, self.adapter.cell_pixels)
        info = ZoomInfo(probability, True, where.boxes, where.heat_map, source, tokens, full)
        return read_on(self.adapter, closer, exact=self.config.exact), info

    def closed(
        self,
        prompt: Prompt,
        picture: Image | None,
        probability: float | None = None,
        heat_map: Tensor | None = None,
        note: str = "",
    ) -> ZoomInfo:
        """What was done for a prompt that was answered without a closer look."""
        source = prompt.grid[0] * prompt.grid[1]
        full = None if picture is None else full_tokens(picture, self.adapter.cell_pixels)
        return ZoomInfo(probability, False, [], heat_map, source, 0, full, note)

    def _thresholds(self, gate: str, gate_threshold: float | None, region_threshold: float | None) -> tuple:
        config = self.config
        usual = config.separability_threshold if gate == "separability" else config.gate_threshold
        pair = (
            usual if gate_threshold is None else gate_threshold,
            config.region_threshold if region_threshold is None else region_threshold,
        )
        names = ("gate_threshold", "region_threshold")
        return tuple(check_real(name, value, 0, 1) for name, value in zip(names, pair, strict=True))

    def region_budget(self, prompt: Prompt, regions: int) -> tuple[int, int] | None:
        """Least and most visual tokens of each of so many regions; `None` if none are left."""
        least, most = self.config.region_tokens
        if self.config.max_visual_tokens is not None:
            most = min(most, (self.config.max_visual_tokens - prompt.grid[0] * prompt.grid[1]) // regions)
        return (min(least, most), most) if most >= 1 else None


def check_fit(config: QZoomConfig, adapter: Any) -> None:
    """Raise a `ValueError` if a model cannot have the tap, the branches or the positions of `config`."""
    count = len(adapter.decoder.layers)
    for name in ("proposal_depth", "gate_depth"):
        depth = getattr(config, name)
        if config.tap_layer + depth > count:
            raise ValueError(
                f"tap_layer is {config.tap_layer} and {name} {depth}; together they must be at most the "
                f"decoder's {count} layers, whose weights the branch starts from"
            )
    if config.tap_layer < adapter.deepstack_levels:
        raise ValueError(
            f"tap_layer is {config.tap_layer}; the first {adapter.deepstack_levels} layers get features of the image "
            f"added, so it must be at least {adapter.deepstack_levels}"
        )
    fixed = adapter.fixed_tokens
    for name in ("coarse_tokens", "region_tokens"):
        least, most = getattr(config, name)
        if fixed is not None and not least <= fixed <= most:
            kind = adapter.model.config.model_type
            raise ValueError(f"{name} is {(least, most)}; {kind!r} takes {fixed} tokens for every image")
    if fixed is not None and config.max_visual_tokens is not None and config.max_visual_tokens < 2 * fixed:
        raise ValueError(
            f"max_visual_tokens is {config.max_visual_tokens}; an image and a region take {2 * fixed} tokens together"
        )
    if config.alignment not in adapter.alignments:
        kinds = ", ".join(adapter.alignments)
        raise ValueError(f"alignment is {config.alignment!r}; {adapter.model.config.model_type!r} has only {kinds}")


def full_tokens(picture: Image, cell: int) -> int:
    """Visual tokens of an image at its own resolution."""
    return max(1, round(picture.width / cell)) * max(1, round(picture.height / cell))


def boxes_by_row(box: Any, sizes: Sequence[tuple[int, int]], least: int) -> list[list[Box]]:
    """Boxes as `generate` takes them, one list a row, inside images of `sizes` (width, height).

    Args:
        least: shorter sides grow to it, in pixels.

    Raises:
        ValueError: not as described there, or a box with no area inside its image.
    """
    rows = len(sizes)
    if box is None:
        return [[] for _ in sizes]
    if hasattr(box, "tolist"):
        box = box.tolist()
    if not isinstance(box, Sequence) or isinstance(box, str) or not len(box):
        raise ValueError(f"box is {box!r}; it must be four numbers (left, top, right, bottom) or a list of such boxes")
    if is_box(box):
        box = [box]
        if rows > 1:
            raise ValueError(f"box is one box for {rows} questions; give a list with one entry, or None, a question")
    if rows == 1 and all(is_box(entry) for entry in box):
        box = [box]
    if len(box) != rows:
        raise ValueError(f"box has {len(box)} entries for {rows} questions; give one, or None, a question")
    by_row = []
    for entry, size in zip(box, sizes, strict=True):
        if entry is not None and not hasattr(entry, "__len__"):
            raise ValueError(f"box holds {entry!r}; each entry must be None, a box, or a list of boxes")
        listed = [] if entry is None else [entry] if is_box(entry) else list(entry)
        by_row.append([widened_box(checked_box(one, size), size, least) for one in listed])
    return by_row


def is_box(value: Any) -> bool:
    """Whether a value is numbers rather than a list of boxes."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return isinstance(value, Sequence) and len(value) > 0 and all(isinstance(edge, Real) for edge in value)
