"""Labels for the region proposal without annotation: the backbone's own attention says where it looked.

While it answers, some heads of the backbone point at what the answer is about. Their attention becomes a map over the
image, and the map labels: 1 region, 0 background, -100 neither, which the loss passes over.

Source: Q-Zoom (arXiv 2604.06912) and SD-RPN (arXiv 2509.16944), as their code does it; `tests/golden/qzoom` pins it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from multimodal.argument_checks import check_real, check_size, check_whole
from multimodal.q_zoom.regions import Box, blurred

REGION, BACKGROUND, IGNORED = 1, 0, -100
PRESMOOTHING_KERNEL = 5

Heads = Mapping[int, Sequence[int] | None]
"""Heads of each layer, counted from 0; None stands for all of a layer's heads."""


@dataclass(frozen=True)
class PointingHeads:
    """The heads of a backbone whose attention points at the answer, and those that show its attention sinks."""

    grounding: Heads
    sink: Heads


POINTING_HEADS = {
    "qwen2_5_vl_3b": {
        "textual": PointingHeads({20: [1, 4], 22: [14]}, {}),
        "natural": PointingHeads({21: [9, 11], 22: [0, 7]}, {8: [1, 13]}),
    },
    "qwen2_5_vl_7b": {
        "textual": PointingHeads({22: [1, 4], 23: [6, 11]}, {}),
        "natural": PointingHeads({16: [1, 7, 17], 19: [17, 20]}, {9: [4, 22]}),
    },
    "qwen3_vl_4b": {
        "textual": PointingHeads({19: [24, 27], 24: [21, 23]}, {24: [6, 10]}),
        "natural": PointingHeads({20: [15, 21, 23], 21: [8, 10, 11]}, {20: [1, 24]}),
    },
    "qwen3_vl_8b": {
        "textual": PointingHeads({19: [24, 26, 27], 24: [21, 22, 23]}, {24: [1, 2]}),
        "natural": PointingHeads({20: [15, 21, 23], 21: [8, 10, 11]}, {21: [7]}),
    },
    "llava_1_5_7b": {"textual": PointingHeads({14: [13, 24, 26]}, {2: None})},
    "llava_1_5_13b": {"textual": PointingHeads({16: [2, 21, 30], 15: [2], 13: [21, 23, 26]}, {16: [17, 22]})},
}
"""The heads that the authors found: of pictures with text ("textual") and of photographs ("natural")."""


@dataclass(frozen=True)
class LabelRules:
    """How a map of attention becomes labels.

    Attributes:
        sink_threshold: cells of at least so much attention in the sink map are attention sinks.
        region_share: region is what has more than this share of the greatest attention outside sinks, in [0, 1].
        background_share: background is what has less than this share, outside the box around the region, in [0, 1].
        most_area: samples whose box covers at least this share of the map are ignored, in (0, 1].
        least_peak: samples whose greatest attention is less are ignored; 0 ignores none.
        blur_kernel: the box goes around the region after a Gaussian blur of this many cells (odd, sigma 1) and so is
            `blur_kernel // 2` cells larger on each side; 1 blurs nothing.
        presmoothing: drop isolated peaks first: those where the map, blurred over 5 cells, is less than the mean of
            both shares of its greatest value.
    """

    sink_threshold: float = 1e-2
    region_share: float = 0.2
    background_share: float = 0.1
    most_area: float = 0.5
    least_peak: float = 5e-3
    blur_kernel: int = 3
    presmoothing: bool = False

    def __post_init__(self):
        for name in ("region_share", "background_share", "most_area"):
            check_real(name, getattr(self, name), 0.0, 1.0)
        if self.most_area == 0:
            raise ValueError("most_area is 0; it must be positive, for it would ignore every sample")
        check_real("sink_threshold", self.sink_threshold)
        check_real("least_peak", self.least_peak)
        if check_whole("blur_kernel", self.blur_kernel, 1) % 2 == 0:
            raise ValueError(f"blur_kernel is {self.blur_kernel}; it must be odd")


QWEN_RULES = LabelRules(region_share=0.25, background_share=0.05)
LLAVA_RULES = LabelRules(sink_threshold=1e-3, least_peak=0.0, blur_kernel=1)


@dataclass(frozen=True)
class PseudoLabels:
    """Labels `[rows, columns]` of int64 (1, 0, -100), and the box in cells around the region: None without one."""

    labels: Tensor
    box: Box | None

    @property
    def ignored(self) -> bool:
        """Whether the whole sample teaches nothing."""
        return bool((self.labels == IGNORED).all())


def attention_map(
    attentions: Sequence[Mapping[int, Tensor] | Sequence[Tensor]], visual: Tensor, grid: tuple[int, int], heads: Heads
) -> Tensor:
    """How much the answer's tokens look at each cell of the image: `[rows, columns]`, float32.

    The mean over the steps of decoding, then over all chosen heads alike. The first step, which reads the prompt, does
    not count. Without heads the map is 0: a backbone without sinks.

    Args:
        attentions: of each step the attention weights by layer, `[1, heads, queries, keys]` or without the 1: the
            `attentions` of transformers' `generate(..., return_dict_in_generate=True, output_attentions=True)` of a
            model with `attn_implementation="eager"`, or only the layers needed, recorded by hooks.
        visual: `[S]` bool, True at the prompt's image tokens. Keys beyond the prompt are the answer's.
        grid: rows and columns of the image's tokens.

    Raises:
        ValueError: there is no step of decoding, a layer or head is missing, or a number of tokens does not fit.
    """
    rows, columns = check_size("grid", grid)
    if visual.dim() != 1 or visual.dtype != torch.bool or int(visual.sum()) != rows * columns:
        raise ValueError(
            f"visual is {visual.dtype} of shape {tuple(visual.shape)} with {int(visual.sum())} true; it must be bool, "
            f"[S], true at {rows} x {columns} image tokens"
        )
    if len(attentions) < 2:
        raise ValueError(
            f"attentions have {len(attentions)} steps; there must be one more than the first, the prompt's"
        )
    maps = [
        torch.stack([_image_attention(step, layer, chosen, visual) for step in attentions[1:]]).mean(0)
        for layer, chosen in heads.items()
    ]
    if not maps:
        return torch.zeros(rows, columns, device=visual.device)
    return torch.cat(maps).mean(0).unflatten(0, (rows, columns))


def _image_attention(
    step: Mapping[int, Tensor] | Sequence[Tensor], layer: int, chosen: Sequence[int] | None, visual: Tensor
) -> Tensor:
    """Attention `[heads, image tokens]` of the last query."""
    try:
        weights = step[layer]
    except (KeyError, IndexError):
        raise ValueError(f"heads are of layer {layer}; attentions have no such layer") from None
    if weights.dim() == 4 and weights.shape[0] == 1:
        weights = weights[0]
    if weights.dim() != 3 or weights.shape[-1] < visual.shape[0]:
        raise ValueError(
            f"attentions of layer {layer} have the shape {tuple(weights.shape)}; it must be [1, heads, queries, keys] "
            f"with at least the prompt's {visual.shape[0]} keys"
        )
    count = weights.shape[0]
    chosen = range(count) if chosen is None else chosen
    if not len(chosen) or not all(0 <= head < count for head in chosen):
        raise ValueError(f"heads of layer {layer} are {list(chosen)}; it has heads 0 to {count - 1}")
    return weights[list(chosen), -1, : visual.shape[0]][:, visual.to(weights.device)].float()


def content_mask(image_size: tuple[int, int], side: int) -> Tensor:
    """Which cells of a square map of `side` x `side` show an image that was padded around its middle: bool.

    As in the official code: of an odd number of cells of padding the image gets one.

    Raises:
        ValueError: `image_size` (width, height) or `side` is not positive.
    """
    width, height = check_size("image_size", image_size)
    check_whole("side", side, 1)
    mask = torch.zeros(side, side, dtype=torch.bool)
    rows, columns = (max(int(length / max(width, height) * side), 1) for length in (height, width))
    top, left = (side - rows) // 2, (side - columns) // 2
    bottom, right = rows + math.ceil((side - rows) / 2), columns + math.ceil((side - columns) / 2)
    mask[top:bottom, left:right] = True
    return mask


def pseudo_labels(
    grounding: Tensor, sink: Tensor, rules: LabelRules = QWEN_RULES, *, content: Tensor | None = None
) -> PseudoLabels:
    """Labels of one image's cells.

    Args:
        grounding: `[rows, columns]`, attention of the answer to the cells, not negative.
        sink: `[rows, columns]`, attention that shows sinks, not negative; zeros where there are none.
        content: `[rows, columns]` bool, False where the image was padded: those cells are background. None: nowhere.

    Raises:
        ValueError: shapes differ, or attention is negative or not finite.
    """
    for name, cells in (("grounding", grounding), ("sink", sink)):
        if cells.dim() != 2 or cells.shape != grounding.shape or cells.numel() == 0:
            raise ValueError(
                f"{name} has the shape {tuple(cells.shape)}; both maps must be [rows, columns], and alike, "
                f"and grounding has {tuple(grounding.shape)}"
            )
        if not (cells.isfinite() & (cells >= 0)).all():
            raise ValueError(f"{name} must be finite and not negative; it is from {cells.min()} to {cells.max()}")
    if content is not None and (content.shape != grounding.shape or content.dtype != torch.bool):
        raise ValueError(
            f"content is {content.dtype} of shape {tuple(content.shape)}; it must be bool of {tuple(grounding.shape)}"
        )
    labels = torch.full(grounding.shape, IGNORED, dtype=torch.long, device=grounding.device)
    is_sink = sink >= rules.sink_threshold
    padding = torch.zeros_like(is_sink) if content is None else ~content.to(is_sink.device)
    without_sinks = grounding.double().masked_fill(is_sink, 0)
    attention = without_sinks.masked_fill(padding, 0)
    if rules.presmoothing:
        smooth = blurred(attention, PRESMOOTHING_KERNEL)
        limit = smooth.max() * ((rules.region_share + rules.background_share) / 2)
        attention = attention.masked_fill(smooth <= limit, 0)
    peak = attention.max()
    region = attention > peak * rules.region_share
    if not region.any():
        return PseudoLabels(labels, None)
    inside = blurred(attention.masked_fill(~region, 0), rules.blur_kernel) > 0
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    box = Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    if box.width * box.height >= rules.most_area * grounding.numel() or peak < rules.least_peak:
        return PseudoLabels(labels, box)
    outside = torch.ones_like(region)
    outside[box.top : box.bottom, box.left : box.right] = False
    labels[(outside & (without_sinks < peak * rules.background_share)) | padding] = BACKGROUND
    labels[region] = REGION
    return PseudoLabels(labels, box)


def region_loss(score_maps: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Binary cross-entropy of score maps (logits) against labels: the mean over all labelled cells of the batch.

    A score map of another size than its labels is resized to theirs, bilinearly. Without any labelled cell the loss is
    0, with gradients of 0.

    Args:
        score_maps: `[rows, columns]` for each image, sizes may differ.
        labels: `[rows, columns]` for each image: 1, 0 or -100.

    Raises:
        ValueError: there are none, not as many of both, or labels of other values.
    """
    if len(score_maps) != len(labels) or not len(labels):
        raise ValueError(f"score_maps are {len(score_maps)} and labels {len(labels)}; each image needs one of both")
    scores, targets = [], []
    for score_map, label in zip(score_maps, labels, strict=True):
        if score_map.dim() != 2 or label.dim() != 2:
            raise ValueError(
                f"a score map has the shape {tuple(score_map.shape)} and its labels {tuple(label.shape)}; "
                "both must be [rows, columns]"
            )
        known = (label == REGION) | (label == BACKGROUND)
        if not (known | (label == IGNORED)).all():
            raise ValueError(f"labels hold {sorted(set(label.unique().tolist()) - {1, 0, -100})}; valid are 1, 0, -100")
        cells = score_map.float()
        if score_map.shape != label.shape:
            cells = F.interpolate(cells[None, None], size=label.shape, mode="bilinear", align_corners=False)[0, 0]
        known = known.to(cells.device)
        scores.append(cells[known])
        targets.append(label.to(cells)[known])
    scores, targets = torch.cat(scores), torch.cat(targets)
    return F.binary_cross_entropy_with_logits(scores, targets, reduction="sum") / max(1, targets.numel())
