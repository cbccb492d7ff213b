"""Counted operations: against PyTorch's own counter on real models, published numbers and times measured on a CPU."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from multimodal.q_zoom.configuration import QZoomConfig
from multimodal.q_zoom.operation_count import (
    PUBLISHED,
    OperationCount,
    TextShape,
    VisionTransformerShape,
    operation_table,
    vision_shape,
)

QWEN7, QWEN3_4 = PUBLISHED["qwen2_5_vl_7b"], PUBLISHED["qwen3_vl_4b"]
TEXT = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
VISION = {"depth": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 96}
TOKENS = {"image_token_id": 290, "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293}


def tiny(name: str) -> torch.nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if name == "qwen2_5_vl":
        text = {**TEXT, "rope_parameters": {**rope, "mrope_section": [4, 4, 4]}}
        config = Qwen2_5_VLConfig(text_config=text, vision_config={**VISION, "fullatt_block_indexes": [1]}, **TOKENS)
        model = Qwen2_5_VLForConditionalGeneration
    else:
        text = {**TEXT, "head_dim": 32, "rope_parameters": {**rope, "mrope_section": [6, 5, 5]}}
        vision = {**VISION, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS)
        model = Qwen3VLForConditionalGeneration
    config._attn_implementation = "eager"
    return model(config).eval()


def counted(run) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_counts_of_real_models(name):
    """8 x 8 visual tokens are whole windows. PyTorch counts attention in full, which we count as causal: half of it."""
    model = tiny(name)
    count = OperationCount.from_configs(model.config, QZoomConfig(tap_layer=2), tokens_before=3, tokens_after=9)
    shape = count.vision
    pixels, grid = torch.randn(256, shape.patch_values), torch.tensor([[1, 16, 16]])
    operations = counted(lambda: model.model.visual(pixels, grid_thw=grid))
    assert operations == pytest.approx(shape.operations(64), rel=0.01)
    ids = torch.full((1, 76), 5)
    operations = counted(lambda: model(input_ids=ids, logits_to_keep=1))
    text = count.text
    square = text.layers * 2 * text.heads * text.head_width * 76**2
    assert operations == pytest.approx(count.base(64) - shape.operations(64) + square, rel=0.01)


def test_counts_of_the_tiny_reader():
    from multimodal.tiny_reader.model import ConvolutionalVision, TinyReaderConfig

    config = TinyReaderConfig(vision_config={**VISION, "patch_size": 4}, text_config=TEXT)
    vision = ConvolutionalVision(config.vision_config)
    operations = counted(lambda: vision.encode(torch.randn(1, 3, 48, 64)))
    assert operations == pytest.approx(vision_shape(config).operations(48), rel=0.01)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_shapes_of_published_models_from_their_configurations(name):
    published = QWEN7 if name == "qwen2_5_vl" else QWEN3_4
    text, vision = published.text, published.vision
    sizes = {
        "hidden_size": text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.key_value_heads,
        "intermediate_size": text.feed_forward,
        "vocab_size": text.vocabulary,
    }
    seen = {"hidden_size": vision.width, "depth": vision.depth, "intermediate_size": vision.feed_forward}
    seen["out_hidden_size"] = vision.output_width
    if name == "qwen2_5_vl":
        config = Qwen2_5_VLConfig(text_config=sizes, vision_config=seen)
    else:
        sizes["head_dim"], seen["deepstack_visual_indexes"] = text.head_width, [5, 11, 17]
        config = Qwen3VLConfig(text_config=sizes, vision_config=seen)
    assert TextShape.from_config(config) == text
    assert vision_shape(config) == vision


def test_published_sizes_give_the_known_cost_of_a_token():
    assert QWEN7.text.layers * QWEN7.text.linear_operations == pytest.approx(13.05e9, rel=1e-3)
    assert QWEN7.vision.operations(1000) / 1000 == pytest.approx(5.5e9, rel=0.01)


@pytest.mark.parametrize(("count", "overhead"), [(QWEN7, 0.078), (QWEN3_4, 0.059)], ids=["Qwen2.5-7B", "Qwen3-4B"])
def test_what_a_gate_a_zoom_and_two_passes_cost(count, overhead):
    """At 576 tokens for the image, and for the region."""
    base = count.base(576)
    assert count.closed(576) / base - 1 == pytest.approx(overhead, abs=0.002)
    assert count.open(576, 576) / base == pytest.approx(2.1, abs=0.05)
    assert count.two_pass(576, 576) / base == pytest.approx(3.0, abs=0.05)


def test_last_layers_for_the_last_token_alone_count_their_keys_and_values():
    """Two layers of S tokens are left out, but for the keys and values of all and the rest of the last."""
    whole, ours = QWEN7, replace(QWEN7, last_token_only=True)
    text, length = whole.text, whole.tokens_before + 576 + whole.tokens_after
    keys_and_values = 2 * text.width * 2 * text.key_value_heads * text.head_width
    kept = (length - 1) * keys_and_values + text.linear_operations + 4 * text.heads * text.head_width * (length - 0.5)
    left_out = text.layer_operations(length) - kept
    assert whole.closed(576) - ours.closed(576) == pytest.approx(2 * left_out)
    without_gate = replace(ours, gate_depth=0)
    assert replace(whole, gate_depth=0).closed(576) - without_gate.closed(576) == pytest.approx(left_out)
    assert whole.base(576) == ours.base(576)


@pytest.mark.parametrize(
    ("count", "base", "coarse", "region", "open_share", "reuse", "speed_up"),
    [
        (replace(QWEN7, gate_depth=0), 515, 515, 400, 1.0, False, 0.45),
        (replace(QWEN7, gate_depth=0), 515, 515, 515, 1.0, False, 0.41),
        (replace(QWEN7, gate_depth=0), 515, 515, 400, 1.0, True, 0.55),
        (replace(QWEN7, gate_depth=0), 515, 515, 515, 1.0, True, 0.49),
        (QWEN7, 515, 515, 400, 0.36, True, 0.73),
        (QWEN7, 2085, 855, 400, 125 / 400, True, 1.98),
        (QWEN7, 3430, 560, 400, 0.9, True, 3.54),
    ],
    ids=[
        "SD-RPN 400",
        "SD-RPN 515",
        "SD-RPN 400 reuse",
        "SD-RPN 515 reuse",
        "documents",
        "cross-budget",
        "high resolution",
    ],
)
def test_predictions_of_published_throughputs(count, base, coarse, region, open_share, reuse, speed_up):
    zoomed = count.open(coarse, region, reuse=reuse)
    expected = count.closed(coarse) * (1 - open_share) + zoomed * open_share
    assert count.base(base) / expected == pytest.approx(speed_up, rel=0.025)


CPU = OperationCount(
    TextShape(384, 12, 6, 2, 64, 1152, 8000),
    VisionTransformerShape(192, 6, 512, True, 2, 64, 384, 1176),
    tap_layer=8,
)
"""Of a measured model width, depths, tap and branches are known; its other sizes are plausible ones."""


@pytest.mark.parametrize(
    ("coarse", "region", "base", "closed", "opened"),
    [
        (144, 144, 576, (3.52, 3.57), (1.73, 1.86)),
        (144, 144, 1024, (7.52, 7.35), (3.69, 3.83)),
        (256, 144, 1024, (4.08, 4.32), (2.59, 2.72)),
        (256, 256, 1024, (4.54, 4.32), (2.20, 2.19)),
        (144, 144, 144, (0.91, 0.86), (0.45, 0.45)),
        (256, 256, 256, (0.91, 0.87), (0.44, 0.44)),
    ],
    ids=str,
)
def test_ratios_of_times_measured_on_a_cpu(coarse, region, base, closed, opened):
    """(measured, predicted): Qwen2.5-VL classes with random weights, one thread, float32, best of three."""
    (row,) = operation_table(CPU, [(coarse, region)], base_tokens=base)
    for ours, (measured, predicted) in ((row.closed_speed_up, closed), (row.open_speed_up, opened)):
        assert ours == pytest.approx(predicted, rel=0.025)
        assert ours == pytest.approx(measured, rel=0.1)


def test_what_changes_the_count():
    count = CPU
    opened = count.open(144, 144)
    assert count.open(144, 144, reuse=False) > opened
    assert replace(count, share_first_layer=True).open(144, 144) < opened
    assert replace(count, share_first_layer=True).closed(144) == count.closed(144)
    assert replace(count, gate_depth=0).closed(144) == count.base(144)
    assert replace(count, gate_depth=0, share_first_layer=True).open(9, 9) == replace(count, gate_depth=0).open(9, 9)
    assert (count.expected(144, 144, 0.0), count.expected(144, 144, 1.0)) == (count.closed(144), pytest.approx(opened))
    one_more = replace(count, answer_tokens=2).base(144) - count.base(144)
    step = count.text.layers * count.text.layer_operations(1, count._length(144)) + count.text.logits_operations
    assert one_more == pytest.approx(step)


def test_the_table():
    rows = operation_table(QWEN7, [(256, 256), (576, 400)], open_share=0.25)
    assert [(row.coarse_tokens, row.region_tokens, row.base_tokens) for row in rows] == [
        (256, 256, 256),
        (576, 400, 576),
    ]
    for row in rows:
        assert row.closed < row.expected < row.open
        assert row.expected == pytest.approx(0.75 * row.closed + 0.25 * row.open)
        assert row.expected_speed_up == row.base / row.expected < row.closed_speed_up < 1
        assert row.base == pytest.approx(QWEN7.base(row.coarse_tokens) / 1e9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tap_layer": 29}, "tap_layer is 29.*from 1 to 28"),
        ({"gate_depth": -1}, "gate_depth is -1"),
        ({"answer_tokens": 0}, "answer_tokens is 0"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        replace(QWEN7, **change)


def test_wrong_budgets_are_named():
    with pytest.raises(ValueError, match="visual is 0"):
        QWEN7.base(0)
    with pytest.raises(ValueError, match="open_share is 2"):
        QWEN7.expected(9, 9, 2)
    with pytest.raises(ValueError, match="'bert'"):
        vision_shape(type("Config", (), {"model_type": "bert"}))
