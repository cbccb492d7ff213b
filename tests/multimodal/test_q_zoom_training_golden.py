"""Losses and gradients of Q-Zoom's stages against the official implementation's, and batches against single rows."""

import json

import pytest
import torch

from multimodal.q_zoom.prefill import fuse
from multimodal.q_zoom.prompt import ImageTokens, Prompt
from multimodal.q_zoom.pseudo_labels import region_loss
from multimodal.q_zoom.training.padded_rows import (
    answer_loss,
    gate_logits,
    read_rows,
    score_maps,
    tap_rows,
    with_answer,
)
from multimodal.q_zoom.training.samples import ZoomSample
from multimodal.q_zoom.training.stages import gate_loss
from tests.multimodal.golden_models import GoldenModel, golden_model

PROMPT = 57  # tokens before the answer in the golden dialogue
IMAGE = ZoomSample("unused.png", "unused?")


@pytest.fixture(scope="module", name="loaded")
def _loaded() -> GoldenModel:
    return golden_model("qwen2_5vl_training")


@pytest.fixture
def golden(loaded) -> GoldenModel:
    loaded.zoom.zero_grad(set_to_none=True)
    loaded.zoom.requires_grad_(False)
    return loaded


def prompt_of(golden: GoldenModel, length: int | None = None) -> Prompt:
    ids = golden.tensors["in.input_ids"][0][:length]
    adapter = golden.zoom.adapter
    image = ImageTokens(golden.tensors["in.image_embeds"], (5, 7))
    return adapter._prompt(ids, int((ids == adapter.image_token).nonzero()[0]), image)


def rows_of(golden: GoldenModel, *prompts: Prompt) -> list:
    return tap_rows(golden.zoom.adapter, prompts, golden.zoom.config.tap_layer)


def close(actual, expected, scale: float = 1.0) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5 * scale, rtol=2e-5)


@pytest.mark.parametrize(
    ("target", "loss"),
    [("roi_target_map", "loss"), ("roi_target_map_resized", "loss_resized"), ("ignored", "loss_all_ignore")],
    ids=["map's size", "another size", "nothing labelled"],
)
def test_region_proposal_has_the_official_loss(golden, target, loss):
    labels = torch.full((5, 7), -100) if target == "ignored" else golden.tensors[f"in.{target}"]
    maps = score_maps(golden.zoom.adapter, golden.zoom.proposal, rows_of(golden, prompt_of(golden, PROMPT)))
    close(region_loss(maps, [labels]), golden.tensors[f"out.stage1.{loss}"])


def test_region_proposal_has_the_official_gradients_and_all_its_parameters_get_one(golden):
    proposal = golden.zoom.proposal.requires_grad_(True)
    maps = score_maps(golden.zoom.adapter, proposal, rows_of(golden, prompt_of(golden, PROMPT)))
    region_loss(maps, [golden.tensors["in.roi_target_map"]]).backward()
    for parameter, name in (
        (proposal.q_proj.weight, "q_proj_last"),
        (proposal.k_proj.weight, "k_proj_last"),
        (proposal.input_layernorm.weight, "in_norm_last"),
        (proposal.layers[0].mlp.down_proj.weight, "down_proj_first"),
    ):
        close(parameter.grad, golden.tensors[f"out.stage1.grad.{name}"])
    missing = [name for name, parameter in proposal.named_parameters() if parameter.grad is None]
    assert missing == []
    # What officially gets none is what this branch does not have.
    unused = {name.split(".", 1)[1] for name in json.loads(golden.settings["twig_params_without_stage1_grad"])}
    kept = {name for name, _ in proposal.named_parameters() if not name.startswith("layers.")}
    assert not {name.removeprefix("self_attn.") for name in unused} & kept
    assert all(parameter.grad is None for parameter in golden.zoom.model.parameters())


@pytest.mark.parametrize("signal", [0, 1])
def test_gate_has_the_official_loss_and_gradient(golden, signal):
    gate = golden.zoom.gate.requires_grad_(True)
    logits = gate_logits(golden.zoom.adapter, gate, rows_of(golden, prompt_of(golden, PROMPT)))
    loss = gate_loss(logits, [IMAGE.replace(zoom=signal)])
    close(loss, golden.tensors[f"out.stage3.loss_signal{signal}"])
    loss.backward()
    close(gate.head.weight.grad, golden.tensors[f"out.stage3.grad_head_signal{signal}"], scale=10)


def fused_with_answer(golden: GoldenModel) -> tuple[Prompt, torch.Tensor]:
    tensors, adapter = golden.tensors, golden.zoom.adapter
    region = ImageTokens(tensors["out.stage2.roi_features"], (2, 3))
    box = tensors["out.stage2.bbox_cells_xyxy"].tolist()
    fused = fuse(adapter, prompt_of(golden, PROMPT), [region], box, "continuous")
    return with_answer(adapter, fused, tensors["in.input_ids"][0, PROMPT:])


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_tuning_has_the_official_labels_positions_loss_and_gradients(golden, checkpointed):
    tensors, adapter = golden.tensors, golden.zoom.adapter
    prompt, labels = fused_with_answer(golden)
    close(prompt.positions, tensors["out.stage2.position_ids"])
    assert labels.equal(tensors["out.stage2.labels"][0])
    adapter.decoder.layers.requires_grad_(True)
    adapter.decoder.head.requires_grad_(True)
    loss = answer_loss(adapter, [prompt], [labels], checkpointed=checkpointed)
    close(loss, tensors["out.stage2.loss"])
    loss.backward()
    close(adapter.decoder.head.weight.grad.norm(), tensors["out.stage2.grad_lm_head_norm"])
    close(adapter.decoder.layers[0].self_attn.q_proj.weight.grad.norm(), tensors["out.stage2.grad_layer0_q_norm"])
    assert adapter.decoder.norm.weight.grad is None


@torch.no_grad()
def test_rows_of_a_batch_are_what_they_are_alone(golden):
    zoom = golden.zoom
    fused, labels = fused_with_answer(golden)
    plain, plain_labels = with_answer(zoom.adapter, prompt_of(golden, PROMPT), torch.tensor([137, 48]))
    prompts, targets = [plain, fused], [plain_labels, labels]
    together = read_rows(zoom.adapter, prompts, 6)
    for states, prompt in zip(together, prompts, strict=True):
        close(states[: prompt.length], read_rows(zoom.adapter, [prompt], 6)[0], scale=10)
    # Cross-entropy is the mean over all tokens: 2 of one row, 5 of the other.
    alone = [answer_loss(zoom.adapter, [p], [t]) for p, t in zip(prompts, targets, strict=True)]
    close(answer_loss(zoom.adapter, prompts, targets), (2 * alone[0] + 5 * alone[1]) / 7)
    rows = rows_of(golden, *prompts)
    singles = [rows_of(golden, prompt)[0] for prompt in prompts]
    for made, single in zip(score_maps(zoom.adapter, zoom.proposal, rows), singles, strict=True):
        close(made, score_maps(zoom.adapter, zoom.proposal, [single])[0])
    logits = torch.cat([gate_logits(zoom.adapter, zoom.gate, [single]) for single in singles])
    close(gate_logits(zoom.adapter, zoom.gate, rows), logits)


@torch.no_grad()
def test_rows_with_features_added_to_layers_are_what_they_are_alone():
    golden = golden_model("qwen3vl_e2e")
    adapter, tensors = golden.zoom.adapter, golden.tensors
    ids, (_, height, width) = tensors["in.input_ids"][0], tensors["in.image_grid_thw"][0].tolist()
    levels = tuple(tensors[key] for key in sorted(tensors) if key.startswith("in.deepstack."))
    image = ImageTokens(tensors["in.image_embeds"], (height // 2, width // 2), levels)
    prompt = adapter._prompt(ids, int((ids == adapter.image_token).nonzero()[0]), image)
    longer, _ = with_answer(adapter, prompt, torch.tensor([1, 2, 3]))
    first, second = tap_rows(adapter, [prompt, longer], golden.zoom.config.tap_layer)
    expected = tensors["out.coarse.hidden_K_before_deepstack"][0]
    close(first.hidden, expected, scale=10)
    close(second.hidden[: prompt.length], expected, scale=10)


def test_answers_must_be_there(golden):
    prompt = prompt_of(golden, PROMPT)
    with pytest.raises(ValueError, match="labels name no token"):
        answer_loss(golden.zoom.adapter, [prompt], [torch.full_like(prompt.input_ids, -100)])
    with pytest.raises(ValueError, match="has no zoom"):
        gate_loss(torch.zeros(1), [IMAGE])
