"""How many floating-point operations an answer costs, with and without a zoom, before anything is run.

Counted are the matrix products of one question's prefill (a multiplication and an addition are two operations), causal
attention at half its square; norms, activations and the preparation of pixels are not. Ratios of these counts predict
measured ratios of time on a CPU within about 10 %. The published throughputs are 20 to 25 % better than the counts say,
for they also have the long images' attention and memory in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from multimodal.argument_checks import check_real, check_whole

if TYPE_CHECKING:
    from multimodal.q_zoom.configuration import QZoomConfig


@dataclass(frozen=True)
class TextShape:
    """Sizes of a decoder with grouped-query attention and a gated feed-forward network."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    head_width: int
    feed_forward: int
    vocabulary: int

    @classmethod
    def from_config(cls, config: Any) -> "TextShape":
        """The decoder of a transformers configuration, or of the language model inside one."""
        text = config.get_text_config()
        return cls(
            width=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            key_value_heads=text.num_key_value_heads,
            head_width=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            feed_forward=text.intermediate_size,
            vocabulary=text.vocab_size,
        )

    @property
    def linear_operations(self) -> float:
        """Of one token in one layer, without attention."""
        projections = 2 * (self.heads + self.key_value_heads) * self.head_width
        return 2 * self.width * (projections + 3 * self.feed_forward)

    def layer_operations(self, tokens: int, cached: int = 0) -> float:
        """Of `tokens` new tokens in one layer, after `cached` ones."""
        attention = 4 * self.heads * self.head_width * (tokens * cached + tokens**2 / 2)
        return tokens * self.linear_operations + attention

    @property
    def logits_operations(self) -> float:
        """Of one token's logits."""
        return 2 * self.width * self.vocabulary


class VisionShape(Protocol):
    """What the count asks of a vision model."""

    def operations(self, visual_tokens: int) -> float:
        """Of an image that gives so many visual tokens."""
        ...


@dataclass(frozen=True)
class VisionTransformerShape:
    """Sizes of Qwen's vision transformers.

    Attributes:
        gated: whether the feed-forward network is gated (three matrices), or has two.
        full_layers: how many layers attend to the whole image; the others to windows of `window_patches`.
        output_width: of the visual tokens, which a merger of two layers makes from `patches_per_token` patches.
        mergers: 1, and one more for each level of DeepStack.
        patch_values: numbers in one patch: channels x frames x height x width.
    """

    width: int
    depth: int
    feed_forward: int
    gated: bool
    full_layers: int
    window_patches: int
    output_width: int
    patch_values: int
    patches_per_token: int = 4
    mergers: int = 1

    @classmethod
    def from_config(cls, vision: Any) -> "VisionTransformerShape":
        """The vision transformer of Qwen2.5-VL or Qwen3-VL, by its `vision_config`."""
        windowed = hasattr(vision, "fullatt_block_indexes")
        return cls(
            width=vision.hidden_size,
            depth=vision.depth,
            feed_forward=vision.intermediate_size,
            gated=windowed,
            full_layers=len(vision.fullatt_block_indexes) if windowed else vision.depth,
            window_patches=(vision.window_size // vision.patch_size) ** 2 if windowed else 0,
            output_width=vision.out_hidden_size,
            patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            patches_per_token=vision.spatial_merge_size**2,
            mergers=1 + len(getattr(vision, "deepstack_visual_indexes", None) or ()),
        )

    def operations(self, visual_tokens: int) -> float:
        patches = visual_tokens * self.patches_per_token
        matrices = 4 * self.width**2 + (3 if self.gated else 2) * self.width * self.feed_forward
        keys = self.full_layers * patches + (self.depth - self.full_layers) * self.window_patches
        merged = self.width * self.patches_per_token
        return (
            patches * 2 * (self.patch_values * self.width + self.depth * matrices)
            + patches * 4 * self.width * keys
            + visual_tokens * self.mergers * 2 * merged * (merged + self.output_width)
        )


@dataclass(frozen=True)
class ConvolutionalVisionShape:
    """Sizes of the tiny reader's vision: three convolutions of stride 2, then ConvNeXt blocks; cells of 8 pixels."""

    width: int
    depth: int
    output_width: int
    channels: int = 3
    narrowest: int = 32

    @classmethod
    def from_config(cls, vision: Any) -> "ConvolutionalVisionShape":
        return cls(vision.hidden_size, vision.depth, vision.out_hidden_size, vision.in_channels)

    def operations(self, visual_tokens: int) -> float:
        half = self.width * 2 // 3
        stem = 16 * 25 * self.channels * self.narrowest + 4 * 9 * self.narrowest * half + 9 * half * self.width
        blocks = self.depth * (25 * self.width + 4 * self.width**2)
        return visual_tokens * 2 * (stem + blocks + (self.width + 16) * self.output_width)


def vision_shape(config: Any) -> VisionShape:
    """The vision model of a transformers configuration.

    Raises:
        ValueError: it is none of Qwen2.5-VL, Qwen3-VL and the tiny reader.
    """
    if config.model_type == "tiny_reader":
        return ConvolutionalVisionShape.from_config(config.vision_config)
    if config.model_type in ("qwen2_5_vl", "qwen3_vl"):
        return VisionTransformerShape.from_config(config.vision_config)
    raise ValueError(
        f"config.model_type is {config.model_type!r}; operations are counted of 'qwen2_5_vl', 'qwen3_vl', 'tiny_reader'"
    )


@dataclass(frozen=True)
class OperationCount:
    """Operations of one question to a Q-Zoom model.

    Attributes:
        tap_layer: how many layers run before the branches read the hidden states.
        proposal_depth: layers of the region proposal; of the last only queries and keys are computed.
        gate_depth: layers of the gate; 0: no gate.
        share_first_layer: the proposal begins with the first layer of the gate.
        tokens_before, tokens_after: of the prompt's text, before and after the image.
        answer_tokens: of the answer; the first comes from the prefill itself.
        last_token_only: count as `QZoom` computes: of the last layers of gate and decoder, keys and values of all
            tokens and all else of the last. Otherwise these layers count whole, as the published code computes them.
    """

    text: TextShape
    vision: VisionShape
    tap_layer: int
    proposal_depth: int = 3
    gate_depth: int = 3
    share_first_layer: bool = False
    tokens_before: int = 16
    tokens_after: int = 32
    answer_tokens: int = 1
    last_token_only: bool = False

    def __post_init__(self):
        check_whole("tap_layer", self.tap_layer, 1, self.text.layers)
        check_whole("proposal_depth", self.proposal_depth, 1)
        check_whole("gate_depth", self.gate_depth, 0)
        check_whole("tokens_before", self.tokens_before, 0)
        check_whole("tokens_after", self.tokens_after, 0)
        check_whole("answer_tokens", self.answer_tokens, 1)

    @classmethod
    def from_configs(cls, model: Any, q_zoom: "QZoomConfig", **tokens: int) -> "OperationCount":
        """Of a backbone's transformers configuration and the settings of the Q-Zoom around it.

        Args:
            tokens: `tokens_before`, `tokens_after`, `answer_tokens`; and `last_token_only`.

        Raises:
            ValueError: as `vision_shape` does.
        """
        return cls(
            TextShape.from_config(model),
            vision_shape(model),
            q_zoom.tap_layer,
            q_zoom.proposal_depth,
            q_zoom.gate_depth,
            q_zoom.share_first_layer,
            **tokens,
        )

    def base(self, visual: int) -> float:
        """Of the backbone alone, reading the image as `visual` tokens."""
        check_whole("visual", visual, 1)
        length = self._length(visual)
        return self.vision.operations(visual) + self._layers(self.text.layers, length) + self._answer(length)

    def closed(self, visual: int) -> float:
        """Where the gate does not open: the backbone and the gate."""
        length = self._length(visual)
        return self.base(visual) + self._layers(self.gate_depth, length) - self._left_out(length, length)

    def open(self, visual: int, region: int, *, reuse: bool = True) -> float:
        """Where the gate opens and the region is read as `region` tokens and two marks.

        Args:
            reuse: keep what the layers before the tap cached of the prompt up to the image; else they run again.
        """
        check_whole("visual", visual, 1)
        check_whole("region", region, 1)
        text, length, inserted = self.text, self._length(visual), region + 2
        fused = length + inserted
        new = inserted + self.tokens_after
        again = text.layer_operations(new, self.tokens_before + visual) if reuse else text.layer_operations(fused)
        shared = int(self.share_first_layer and self.gate_depth > 0 and self.proposal_depth > 1)
        proposal = self._layers(self.proposal_depth - 1 - shared, length)
        queries, keys = text.heads * text.head_width, text.key_value_heads * text.head_width
        proposal += 2 * text.width * (queries + visual * keys) + 2 * queries * visual
        return (
            self.vision.operations(visual)
            + self._layers(self.tap_layer + self.gate_depth, length)
            + proposal
            + self.vision.operations(region)
            + self.tap_layer * again
            + self._layers(text.layers - self.tap_layer, fused)
            + self._answer(fused)
            - self._left_out(length, fused)
        )

    def expected(self, visual: int, region: int, open_share: float) -> float:
        """The mean where a share of questions, from 0 to 1, opens the gate."""
        check_real("open_share", open_share, 0.0, 1.0)
        closed = self.closed(visual)
        return closed + open_share * (self.open(visual, region) - closed)

    def two_pass(self, visual: int, region: int) -> float:
        """Of the backbone asked twice, as without Q-Zoom: for the region, then with both images."""
        check_whole("region", region, 1)
        fused = self._length(visual) + region + 2
        images = self.vision.operations(visual) + self.vision.operations(region)
        return self.base(visual) + images + self._layers(self.text.layers, fused) + self._answer(fused)

    def _length(self, visual: int) -> int:
        return self.tokens_before + visual + self.tokens_after

    def _layers(self, layers: int, tokens: int) -> float:
        return layers * self.text.layer_operations(tokens)

    def _left_out(self, gate_tokens: int, decoder_tokens: int) -> float:
        """What `last_token_only` saves in the last layers of the gate and of the decoder."""
        if not self.last_token_only:
            return 0.0
        text = self.text
        keys_and_values = 4 * text.width * text.key_value_heads * text.head_width
        lengths = [decoder_tokens, *([gate_tokens] if self.gate_depth > 0 else [])]
        return sum(
            text.layer_operations(tokens) - text.layer_operations(1, tokens - 1) - (tokens - 1) * keys_and_values
            for tokens in lengths
        )

    def _answer(self, length: int) -> float:
        steps = (self.text.layer_operations(1, length + step) for step in range(self.answer_tokens - 1))
        return self.text.layers * sum(steps) + self.answer_tokens * self.text.logits_operations


@dataclass(frozen=True)
class OperationRow:
    """One budget of visual tokens: operations in units of 10^9, and how many times fewer than the backbone's they are.

    `base_tokens` is the backbone's own budget; a speed-up below 1 is a slow-down.
    """

    coarse_tokens: int
    region_tokens: int
    base_tokens: int
    open_share: float
    base: float
    closed: float
    open: float
    expected: float

    @property
    def closed_speed_up(self) -> float:
        return self.base / self.closed

    @property
    def open_speed_up(self) -> float:
        return self.base / self.open

    @property
    def expected_speed_up(self) -> float:
        return self.base / self.expected


def operation_table(
    count: OperationCount,
    budgets: Sequence[tuple[int, int]],
    *,
    base_tokens: int | None = None,
    open_share: float = 0.5,
) -> list[OperationRow]:
    """A row for each budget of (coarse, region) tokens.

    Args:
        base_tokens: what the backbone alone reads the image as; by default each row's coarse tokens.
        open_share: of the questions, from 0 to 1, opens the gate.
    """
    rows = []
    for coarse, region in budgets:
        alone = coarse if base_tokens is None else base_tokens
        operations = (
            count.base(alone),
            count.closed(coarse),
            count.open(coarse, region),
            count.expected(coarse, region, open_share),
        )
        rows.append(OperationRow(coarse, region, alone, open_share, *(value / 1e9 for value in operations)))
    return rows


QWEN2_5_VISION = {
    "width": 1280,
    "depth": 32,
    "feed_forward": 3420,
    "gated": True,
    "full_layers": 4,
    "window_patches": 64,
    "patch_values": 1176,
}
PUBLISHED = {
    "qwen2_5_vl_3b": OperationCount(
        TextShape(2048, 36, 16, 2, 128, 11008, 151936),
        VisionTransformerShape(**QWEN2_5_VISION, output_width=2048),
        tap_layer=24,
    ),
    "qwen2_5_vl_7b": OperationCount(
        TextShape(3584, 28, 28, 4, 128, 18944, 152064),
        VisionTransformerShape(**QWEN2_5_VISION, output_width=3584),
        tap_layer=18,
    ),
    "qwen3_vl_4b": OperationCount(
        TextShape(2560, 36, 32, 8, 128, 9728, 151936),
        VisionTransformerShape(1024, 24, 4096, False, 24, 0, 2560, 1536, mergers=4),
        tap_layer=24,
    ),
}
"""The sizes in `config.json` of Qwen/Qwen2.5-VL-{3B,7B}-Instruct and Qwen/Qwen3-VL-4B-Instruct on the Hugging Face hub,
with the depths of Q-Zoom's released checkpoints."""
