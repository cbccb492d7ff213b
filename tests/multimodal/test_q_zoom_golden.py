"""Q-Zoom around stock models against the official implementation's outputs, step by step and end to end."""

import pytest
import torch
from torch import Tensor

from multimodal.q_zoom import QZoom
from multimodal.q_zoom.generation import continue_by_generate
from multimodal.q_zoom.generation_options import GenerationOptions
from multimodal.q_zoom.prefill import fuse, gate_probability, read_on, read_to_tap, reread, score_map
from multimodal.q_zoom.prompt import ImageTokens, Prompt
from multimodal.q_zoom.regions import find_regions
from tests.multimodal.golden_models import GoldenModel, golden_model

FILES = ["qwen2_5vl_e2e_small", "qwen2_5vl_e2e_sinkmask", "qwen3vl_e2e"]


@pytest.fixture(scope="module", params=FILES)
def golden(request) -> GoldenModel:
    return golden_model(request.param)


def image_of(golden: GoldenModel, prefix: str) -> ImageTokens:
    """The source image (`in`) or the region (`out.roi`) as the official encoder gave it."""
    tensors = golden.tensors
    grid = tensors[f"{prefix}.{'image_grid_thw' if prefix == 'in' else 'grid_thw'}"][0]
    features = tensors[f"{prefix}.{'image_embeds' if prefix == 'in' else 'features'}"]
    levels = sorted(key for key in tensors if key.startswith(f"{prefix}.deepstack."))
    return ImageTokens(features, (int(grid[1]) // 2, int(grid[2]) // 2), tuple(tensors[key] for key in levels))


def prompt_of(golden: GoldenModel) -> Prompt:
    ids = golden.tensors["in.input_ids"][0]
    adapter = golden.zoom.adapter
    return adapter._prompt(ids, int((ids == adapter.image_token).nonzero()[0]), image_of(golden, "in"))


def close(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the greatest number; the golden models' hidden states reach 40."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual / scale, expected.to(actual) / scale, atol=1e-5, rtol=0)


@torch.no_grad()
def test_source_image_reaches_the_prompt_as_officially(golden):
    prompt = prompt_of(golden)
    close(prompt.positions, golden.tensors["out.coarse.position_ids"])
    close(prompt.embeddings, golden.tensors["out.coarse.inputs_embeds"])
    if "in.pixel_values" in golden.tensors:
        (read,) = golden.zoom.adapter.prompts(golden.inputs)
        close(read.embeddings, prompt.embeddings)
        for level, expected in zip(read.deepstack, prompt.deepstack, strict=True):
            close(level, expected)


@torch.no_grad()
def test_tap_gate_and_score_map_are_the_official_ones(golden):
    zoom, tensors = golden.zoom, golden.tensors
    tap = read_to_tap(zoom.adapter, prompt_of(golden), zoom.config.tap_layer)
    hidden = "hidden_K" if "out.coarse.hidden_K" in tensors else "hidden_K_before_deepstack"
    close(tap.hidden, tensors[f"out.coarse.{hidden}"])
    assert gate_probability(zoom.adapter, tap, zoom.gate) == pytest.approx(float(tensors["out.gate.prob"]), abs=1e-5)
    sinks = zoom.config.sink == "first_token"
    scores, kept = score_map(zoom.adapter, tap, zoom.proposal, sinks=sinks)
    close(scores, tensors["out.rpn.score_map"])
    if sinks:
        assert kept.equal(tensors["out.rpn.keep_mask"])
    found = find_regions(scores, threshold=zoom.config.region_threshold, sink=zoom.config.sink, keep_mask=kept)
    assert [list(box) for box in found.boxes] == tensors["out.roi.bbox_cells_xyxy"].tolist()
    close(found.probabilities, tensors["out.rpn.blurred"])


@torch.no_grad()
def test_closed_gate_is_the_stock_model_bit_for_bit(golden):
    zoom, prompt = golden.zoom, prompt_of(golden)
    read = read_on(zoom.adapter, read_to_tap(zoom.adapter, prompt, zoom.config.tap_layer), exact=True)
    stock = zoom.model.model.language_model(
        inputs_embeds=prompt.embeddings,
        position_ids=prompt.positions,
        **(
            {"visual_pos_masks": prompt.visual[None], "deepstack_visual_embeds": list(prompt.deepstack)}
            if prompt.deepstack
            else {}
        ),
    )
    assert read.logits.equal(zoom.model.lm_head(stock.last_hidden_state[:, -1:])[0, 0])
    close(read.logits, golden.tensors["out.closed.logits_last"][0])
    assert generated(golden, prompt).equal(golden.tensors["out.closed.tokens"])


@pytest.mark.parametrize("reuse", [True, False], ids=["reusing", "rereading"])
@pytest.mark.parametrize(("alignment", "key"), [("continuous", "open"), ("separate", "open_separate")])
@torch.no_grad()
def test_open_gate_gives_the_official_answer(golden, alignment, key, reuse):
    zoom, tensors = golden.zoom, golden.tensors
    prompt = prompt_of(golden)
    tap = read_to_tap(zoom.adapter, prompt, zoom.config.tap_layer)
    fused = fuse(
        zoom.adapter, prompt, [image_of(golden, "out.roi")], tensors["out.roi.bbox_cells_xyxy"].tolist(), alignment
    )
    expected = tensors["out.fused.position_ids" if key == "open" else "out.open_separate.position_ids"]
    close(fused.positions, expected)
    assert fused.input_ids.equal(tensors["out.fused.input_ids"][0])
    again = reread(zoom.adapter, tap, fused, reuse=reuse)
    close(read_on(zoom.adapter, again, exact=True).logits, tensors[f"out.{key}.logits_last"][0])
    rows = [read_on(zoom.adapter, again)]
    ids = tensors["in.input_ids"]
    made = continue_by_generate(zoom.adapter, rows, ids, greedy(zoom))
    assert made[:, ids.shape[1] :].equal(tensors[f"out.{key}.tokens"])


def greedy(zoom: QZoom) -> GenerationOptions:
    return GenerationOptions.of(zoom.model, {"max_new_tokens": 8, "do_sample": False}, 0)


def generated(golden: GoldenModel, prompt: Prompt) -> Tensor:
    """Eight greedy tokens of a prompt read without a closer look."""
    zoom, ids = golden.zoom, golden.tensors["in.input_ids"]
    rows = [read_on(zoom.adapter, read_to_tap(zoom.adapter, prompt, zoom.config.tap_layer))]
    made = continue_by_generate(zoom.adapter, rows, ids, greedy(zoom))
    assert made[:, : ids.shape[1]].equal(ids)
    return made[:, ids.shape[1] :]
