"""LINA against tensors computed by the official code (tests/golden/lina): layers, models, training, whole sampling."""

import json
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from generation.lina.attention import Attention, gather
from generation.lina.blocks import Block, ContextEncoder, ImageEncoder
from generation.lina.embeddings import (
    FramePositionEmbedding,
    LabelEmbedding,
    PatchEmbedding,
    TextEmbedding,
    patchify,
    rotary_angles,
    rotate,
    sine_positions,
    unpatchify,
)
from generation.lina.official_checkpoints import from_official
from generation.lina.sampling import Plan, draw_tokens, guidance_ramp, predictions_per_step
from generation.lina.token_denoiser import FlowSchedule, Modulation, TokenDenoiser
from generation.lina.transformer import LinaTransformer, TrainingDraw

GOLDEN = Path(__file__).parent.parent / "golden" / "lina"
VALUES, GRADIENTS = 1e-5, 2e-5


@cache
def golden(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def load(module: nn.Module, tensors: dict[str, Tensor], prefix: str = "sd.") -> nn.Module:
    module.load_state_dict(from_official(part(tensors, prefix)))
    return module


def close(actual: Tensor, wanted: Tensor, tolerance: float = VALUES, scale: float | None = None) -> None:
    scale = wanted.abs().max().item() if scale is None else scale
    torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance * scale)


def check_gradients(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    wanted = from_official(part(tensors, "grad.sd."))
    largest = max(tensor.abs().max().item() for tensor in wanted.values())
    parameters = dict(module.named_parameters())
    for key, gradient in wanted.items():
        given = parameters[key].grad
        given = torch.zeros_like(gradient) if given is None else given
        close(given, gradient, GRADIENTS, max(gradient.abs().max().item(), 1e-3 * largest))


LAYERS = {  # file: options, rows and columns of the image's tokens
    "attn_decoder_kvgate": ({"gates": "per_head", "locality": 5}, (4, 4)),
    "attn_encoder": ({}, (0, 0)),
    "attn_decoder_nogate": ({"locality": 5}, (16, 16)),
    "attn_gate_kvscale1": ({"gates": "per_head", "locality": 5}, (16, 16)),
    "attn_gate_kvscale2": ({"gates": "shared", "locality": 5}, (16, 16)),
    "attn_gate_kvscale3": ({"gates": "key", "locality": 5}, (16, 16)),
    "attn_gate_kvscale4": ({"gates": "value", "locality": 5}, (16, 16)),
    "attn_subtract": ({"normalization": "subtraction"}, (0, 0)),
    "attn_subtract_conv": ({"normalization": "subtraction", "locality": 5}, (16, 16)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_attention(name):
    tensors, metadata = golden(name)
    options, grid = LAYERS[name]
    arguments = json.loads(metadata["args"])
    layer = load(Attention(arguments["dim"], arguments["num_heads"], grid=grid, **options), tensors)
    x = tensors["in.x"].clone().requires_grad_()
    y = layer(x, grid)
    close(y, tensors["out.y"])
    if "in.w" in tensors:
        (y * tensors["in.w"]).sum().backward()
        check_gradients(layer, tensors)
        close(x.grad, tensors["grad.x"], GRADIENTS)


@pytest.mark.parametrize("name", ["attn_decoder_kvgate", "attn_encoder"])
def test_attention_in_bfloat16(name):
    tensors, metadata = golden(name)
    options, grid = LAYERS[name]
    arguments = json.loads(metadata["args"])
    layer = load(Attention(arguments["dim"], arguments["num_heads"], grid=grid, **options), tensors).bfloat16()
    close(layer(tensors["in.x"].bfloat16(), grid), tensors["out.y_bf16"], 2e-2)


def test_rotary_attention():
    tensors, metadata = golden("attn_encoder_rope")
    arguments, rope = json.loads(metadata["args"]), json.loads(metadata["rope"])
    angles = rotary_angles(rope["dim"], tuple(rope["base_size"]), rope["pad"], tensors["in.x"])
    chosen = torch.nn.functional.pad(tensors["in.ids"][..., 0] + rope["pad"], (rope["pad"], 0))
    chosen[:, : rope["pad"]] = torch.arange(rope["pad"])
    q = tensors["in.q"].transpose(1, 2)
    close(rotate(q, angles[chosen]).transpose(1, 2), tensors["mid.q_rot"])
    layer = load(Attention(arguments["dim"], arguments["num_heads"]), tensors)
    close(layer(tensors["in.x"], angles=angles[chosen]), tensors["out.y"])


@pytest.mark.parametrize(("name", "gates", "locality"), [("block_encoder", None, 0), ("block_decoder", "per_head", 5)])
def test_block(name, gates, locality):
    tensors, metadata = golden(name)
    arguments = json.loads(metadata["args"])
    block = Block(arguments["dim"], arguments["num_heads"], grid=(4, 4), gates=gates, locality=locality)
    x = tensors["in.x"].clone().requires_grad_()
    y = load(block, tensors)(x, (4, 4))
    close(y, tensors["out.y"])
    (y * tensors["in.w"]).sum().backward()
    check_gradients(block, tensors)
    close(x.grad, tensors["grad.x"], GRADIENTS)


def test_context_encoder():
    tensors, _ = golden("vit_video")
    encoder = load(ContextEncoder(2, 32, 2, 4, 4), tensors)
    close(encoder(tensors["in.c"], tensors["in.x"]), tensors["out.y"])


@pytest.mark.parametrize(
    ("output", "known"), [("out.y", "some"), ("out.y_no_visible", "none"), ("out.y_prev_none", "all")]
)
def test_image_encoder(output, known):
    tensors, _ = golden("vit_image")
    options = {"gates": "per_head", "locality": 5, "grid": (4, 4)}
    encoder = load(ImageEncoder(2, 2, 32, 2, 4, 2, options), tensors)
    tokens = patchify(tensors["in.x"], 2)
    visible = tensors["in.prev_ids"][..., 0]
    ids = {"some": visible, "none": visible[:, :0], "all": None}[known]
    embedded = encoder.patch_embed(tokens)
    close(embedded, tensors["mid.tokens"])
    # In this file unknown tokens hold what stood there instead of a mask token.
    encode = partial(encoder, tokens, tensors["in.c"], embedded, (4, 4), ids)
    close(encode(), tensors[output])
    wanted = torch.tensor([[3, 0, 15], [7, 8, 1]])
    close(encode(wanted), gather(tensors[output], wanted))


@pytest.mark.parametrize(("output", "time"), [("out.y", "in.t_tok"), ("out.y_tbatch", "in.t_batch")])
def test_token_denoiser(output, time):
    tensors, _ = golden("diffusion_mlp")
    denoiser = load(TokenDenoiser(3, 32, 24, 4, 2), tensors)
    x, z = (tensors[name].clone().requires_grad_() for name in ("in.x", "in.z"))
    y = denoiser(patchify(x, 2), z, tensors[time].view(2, -1))
    close(y, tensors[output])
    if output == "out.y":
        (y * tensors["in.w"]).sum().backward()
        check_gradients(denoiser, tensors)
        close(x.grad, tensors["grad.x"], GRADIENTS)
        close(z.grad, tensors["grad.z"], GRADIENTS)


def test_token_denoiser_of_predicted_tokens():
    tensors, _ = golden("diffusion_mlp")
    denoiser = load(TokenDenoiser(3, 32, 24, 4, 2), tensors)
    wanted, tokens = tensors["in.pred_ids"][..., 0], patchify(tensors["in.x"], 2)
    y = denoiser(gather(tokens, wanted), gather(tensors["in.z"], wanted), tensors["in.t_batch"][:, None])
    close(tokens.scatter(1, tensors["in.pred_ids"].expand_as(y), y), tensors["out.y_pred_ids"])


def test_modulation():
    tensors, _ = golden("adaln_zero")
    hidden, gate = load(Modulation(20, 3), tensors)(tensors["in.x"], torch.nn.functional.silu(tensors["in.z"]))
    close(hidden, tensors["out.h"])
    close(gate, tensors["out.gate"])


def test_embeddings():
    tensors, _ = golden("embeddings")
    close(sine_positions(32, (3, 5), tensors["out.pos_embed"]), tensors["out.pos_embed"][0])
    positions = load(FramePositionEmbedding(32), tensors, "sd.video_pos_embed.")
    close(positions((3, 5)), tensors["out.video_pos_embed"][0, 0])
    text = load(TextEmbedding(10, 32, 6), tensors, "sd.text_embed.")
    prompts = [tensors["in.prompt0"], tensors["in.prompt1"]]
    close(text.pad(prompts), tensors["mid.text_encoded"])
    close(text(prompts), tensors["out.text_embed"])
    labels = load(LabelEmbedding(7, 32), tensors, "sd.label_embed.")
    close(labels(tensors["in.labels"]), tensors["out.label_embed"])
    tokens = patchify(tensors["in.image"], 2)
    assert torch.equal(tokens, tensors["out.patchify"])
    assert torch.equal(unpatchify(tokens, (3, 4), 2), tensors["out.unpatchify"])
    patches = load(PatchEmbedding(4, 2, 16), tensors, "sd.patch_embed.")
    close(patches(tokens), tensors["out.patch_tokens"])


def test_schedules():
    tensors, _ = golden("schedules")
    for shift in (1, 3):
        schedule = FlowSchedule(shift)
        close(schedule.training_sigmas(), tensors[f"train_sigmas.shift{shift}"])
        close(1000 * schedule.training_sigmas(), tensors[f"train_timesteps.shift{shift}"])
        for steps in (5, 25):
            sigmas = schedule.sampling_sigmas(steps)
            close(sigmas, tensors[f"sample_sigmas.shift{shift}.n{steps}"])
            close(1000 * sigmas[:-1], tensors[f"sample_timesteps.shift{shift}.n{steps}"])


@pytest.mark.parametrize(("steps", "count"), [(64, 256), (64, 4096), (128, 4096), (8, 16)])
def test_predictions_of_each_step(steps, count):
    tensors, _ = golden("schedules")
    assert predictions_per_step(steps, count) == tensors[f"num_preds.steps{steps}.patches{count}"].tolist()


SMALL = {
    "t2i": {"latent_channels": 4, "latent_size": (8, 8), "patch_size": 2, "text_dim": 12, "text_length": 6},
    "c2i": {"latent_channels": 16, "latent_size": (16, 16), "num_classes": 1000},
}


def small_model(kind: str, tensors: dict[str, Tensor]) -> LinaTransformer:
    model = LinaTransformer(
        width=32,
        num_heads=2,
        context_depth=2,
        encoder_depth=2,
        decoder_depth=2,
        denoiser_width=40,
        denoiser_depth=2,
        **SMALL[kind],
    )
    return load(model, tensors)


@pytest.mark.parametrize("kind", SMALL)
def test_training_loss(kind):
    tensors, metadata = golden(f"{kind}_train")
    model = small_model(kind, tensors).requires_grad_()
    condition = tensors["in.label"] if kind == "c2i" else [tensors["in.prompt0"], tensors["in.prompt1"]]
    close(model.embed_condition(condition), tensors["in.c"])
    draw = TrainingDraw(tensors["mid.prev_ids"][..., 0], tensors["in.noise"], tensors["in.timestep_index"])
    count = tensors["in.u"].shape[1]
    visible = round((1 - tensors["in.mask_ratio"].item()) * count)
    assert torch.equal(tensors["in.u"][..., 0].argsort(1)[:, :visible], draw.known)
    tokens = patchify(tensors["in.x"], SMALL[kind].get("patch_size", 1))
    loss = model(tokens, condition, draw, FlowSchedule(float(metadata["shift"])))
    close(loss[None], tensors["out.loss"])
    loss.backward()
    check_gradients(model, tensors)


@pytest.mark.parametrize("kind", SMALL)
def test_sampling(kind):
    """Every step's conditions and tokens, from the official order and noise."""
    tensors, metadata = golden(f"{kind}_sample")
    model = small_model(kind, tensors).eval()
    patch_size = model.config.patch_size
    noise = [patchify(noise, patch_size) for noise in tensors["in.noise"]]
    sigmas = FlowSchedule(float(metadata["shift"])).sampling_sigmas(int(metadata["num_diffusion_steps"]))
    close(sigmas, tensors["mid.sigmas"])
    guidance = guidance_ramp(
        float(metadata["guidance_scale"]),
        len(noise),
        float(metadata.get("min_guidance_scale", metadata["guidance_scale"])),
    )
    close(torch.tensor(guidance), tensors["mid.guidance"])
    plan = Plan(
        order=tensors["in.order"][..., 0],
        known=0,
        predictions=tensors["in.num_preds"].tolist(),
        guidance=guidance,
        sigmas=[tuple(sigmas.tolist())] * len(noise),
    )
    with torch.no_grad():
        contexts = model.encode_condition(tensors["in.c"], model.grid_of(model.latent_size)).chunk(2)
        close(torch.cat(contexts), tensors["mid.video_out"])
        blank = torch.zeros_like(noise[0])
        drawing = draw_tokens(model, *contexts, blank, plan, lambda step, wanted: gather(noise[step], wanted))
        for step, tokens in enumerate(drawing):
            drawn = tensors[f"mid.pred_ids.{step}"][: len(tokens), :, 0]
            close(gather(tokens, drawn), gather(tensors[f"mid.sample.{step}"], drawn))
    close(unpatchify(tokens, model.grid_of(model.latent_size), patch_size), tensors["out.latents"])
