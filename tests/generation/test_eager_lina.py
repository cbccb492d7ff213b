"""The eager reference of LINA against golden files made by running the official code (tests/golden/lina).

Values are compared to 1e-5 of their largest, gradients to 2e-5, or of a thousandth of the model's largest gradient
where they nearly vanish.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.testing import assert_close

from tests.benchmarks import eager_lina, eager_lina_layers
from tests.benchmarks.eager_lina import EagerDenoiser, EagerLina, EagerLinaConfig, EagerTransformer

GOLDEN = Path(__file__).parent.parent / "golden" / "lina"
VALUES, GRADIENTS = 1e-5, 2e-5
GATES_AND_CONVOLUTION = ("key_scale", "value_scale", "dw_conv.weight", "dw_conv.bias")
SMALL = EagerLinaConfig(
    width=32,
    heads=2,
    context_depth=2,
    image_depth=4,
    head_width=40,
    head_depth=2,
    latent_channels=4,
    latent_size=(8, 8),
    patch_size=2,
)


class Golden:
    """A file's tensors, by name or by prefix, and its metadata."""

    def __init__(self, name: str):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.metadata = file.metadata()

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def below(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def load(self, module: nn.Module, prefix: str = "sd.") -> nn.Module:
        module.load_state_dict(self.below(prefix), strict=True)
        return module


@cache
def read(name: str) -> Golden:
    return Golden(name)


def assert_near(value: Tensor, golden: Tensor, tolerance: float = VALUES, floor: float = 0.0) -> None:
    """`value` is `golden` within `tolerance` of the largest of golden, or of `floor` if that is larger."""
    largest = max(golden.abs().max().item(), floor) if golden.numel() else floor
    assert_close(value.detach(), golden, atol=tolerance * largest, rtol=0)


def assert_gradients(module: nn.Module, golden: Golden) -> None:
    """The gradients of all parameters that the file lists; none at all passes for zero."""
    expected = golden.below("grad.sd.")
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    parameters = dict(module.named_parameters())
    for name, gradient in expected.items():
        actual = parameters[name].grad
        if actual is None:
            assert not gradient.any(), name
        else:
            assert_near(actual, gradient, GRADIENTS, 1e-3 * largest)


def model_of(golden: Golden) -> EagerLina:
    given, encoders = json.loads(golden.metadata["args"]), json.loads(golden.metadata["encoders"])
    (context_depth, width, heads), (image_depth, *_), (head_depth, head_width) = encoders.values()
    stride = given["image_stride"]
    classes = len(golden["sd.label_embed.weight"]) - 1 if "sd.label_embed.weight" in golden.tensors else None
    config = EagerLinaConfig(
        width=width,
        heads=heads,
        context_depth=context_depth,
        image_depth=image_depth,
        head_width=head_width,
        head_depth=head_depth,
        latent_channels=given["image_dim"],
        latent_size=tuple(side // stride for side in given["image_size"]),
        patch_size=15 // stride + 1,
        text_dim=given.get("text_token_dim"),
        text_length=given.get("text_token_len"),
        num_classes=classes,
    )
    return golden.load(EagerLina(config))


def embedded_condition(model: EagerLina, golden: Golden, unconditional: bool) -> Tensor:
    """The condition that the files hold as `in.c`, made from prompts or labels."""
    if "in.label" in golden.tensors:
        labels = golden["in.label"]
        nothing = torch.full_like(labels, model.config.num_classes)
        return model.label_embed(torch.cat([labels, nothing]) if unconditional else labels)
    prompts = [golden["in.prompt0"], golden["in.prompt1"]]
    return model.text_embed([*prompts, None, None] if unconditional else prompts)


ATTENTIONS = {
    "attn_decoder_kvgate": lambda: eager_lina_layers.GatedConvolutionalAttention(48, 4, (4, 4), 4),
    "attn_encoder": lambda: eager_lina_layers.LinearAttention(48, 4),
    "attn_decoder_nogate": lambda: eager_lina_layers.GatedConvolutionalAttention(16, 2, (16, 16), 64, gated=False),
    "attn_gate_kvscale1": lambda: eager_lina_layers.GatedConvolutionalAttention(16, 2, (16, 16), 64),
    "block_decoder": lambda: eager_lina_layers.Block(
        48, eager_lina_layers.GatedConvolutionalAttention(48, 4, (4, 4), 4)
    ),
    "block_encoder": lambda: eager_lina_layers.Block(48, eager_lina_layers.LinearAttention(48, 4)),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_and_block(name):
    golden = read(name)
    module = golden.load(ATTENTIONS[name]())
    x = golden["in.x"].clone().requires_grad_()
    y = module(x)
    assert_near(y, golden["out.y"])
    (y * golden["in.w"]).sum().backward()
    assert_gradients(module, golden)
    assert_near(x.grad, golden["grad.x"], GRADIENTS)


@pytest.mark.parametrize("name", ["attn_decoder_kvgate", "attn_encoder"])
def test_attention_in_bfloat16(name):
    """ReLU and epsilon in bfloat16, the rest in float32; a last bit may depend on the processor's matrix product."""
    golden = read(name)
    module = golden.load(ATTENTIONS[name]()).bfloat16()
    y = module(golden["in.x"].bfloat16())
    assert y.dtype == torch.bfloat16
    assert_near(y.float(), golden["out.y_bf16"].float(), 2**-7)


def test_softmax_attention():
    module = eager_lina_layers.SoftmaxAttention(48, 4)
    x = torch.randn(2, 13, 48)
    query, key, value = module.qkv(x).view(2, 13, 3, 4, 12).permute(2, 0, 3, 1, 4)
    attended = (query @ key.mT / 12**0.5).softmax(-1) @ value
    assert_near(module(x), module.proj(attended.transpose(1, 2).flatten(2)).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_softmax_model_samples_and_has_neither_gates_nor_convolution(dtype):
    linear, softmax = (EagerLina(replace(SMALL, attention=kind)).to(dtype) for kind in ("linear", "softmax"))
    extra = set(linear.state_dict()) - set(softmax.state_dict())
    assert extra == {f"image_encoder.blocks.{index}.attn.{name}" for index in (2, 3) for name in GATES_AND_CONVOLUTION}
    condition, order = torch.randn(4, 6, 32, dtype=dtype), torch.rand(2, 16, 1).argsort(1)
    noise = torch.randn(2, 2, 4, 8, 8, dtype=dtype)
    for model in (linear, softmax):
        latents = model.sample(condition, order, [6, 10], noise, [3.0, 3.0], eager_lina.sample_sigmas(2))
        assert latents.shape == (2, 4, 8, 8)
        assert latents.dtype == dtype
        assert latents.isfinite().all()


def test_image_encoder():
    golden = read("vit_image")
    encoder = golden.load(EagerTransformer(SMALL, depth=4, encoder_depth=2, patch_size=2))
    tokens = encoder.patch_embed(golden["in.x"])
    assert_near(tokens, golden["mid.tokens"])
    tokens = tokens + eager_lina_layers.position_embedding(32, (4, 4))
    visible = golden["in.prev_ids"]
    assert_near(encoder(tokens, golden["in.c"], visible), golden["out.y"])
    assert_near(encoder(tokens, golden["in.c"], visible[:, :0]), golden["out.y_no_visible"])
    assert_near(encoder(tokens, golden["in.c"]), golden["out.y_prev_none"])


def test_context_encoder():
    golden = read("vit_video")
    encoder = golden.load(EagerTransformer(SMALL, depth=2, encoder_depth=2, patch_size=4))
    assert_near(encoder(golden["in.x"], golden["in.c"]), golden["out.y"])


def test_denoiser():
    golden = read("diffusion_mlp")
    denoiser = golden.load(EagerDenoiser(4, 2, condition_width=24, width=32, depth=3))
    noisy, z = (golden[name].clone().requires_grad_() for name in ("in.x", "in.z"))
    embedding = denoiser.time_cond_embed
    assert_near(embedding.frequency_embedding(golden["in.t_tok"], torch.float32), golden["mid.freq_embed"])
    assert_near(embedding(golden["in.t_tok"], z), golden["mid.time_cond"])
    velocity = denoiser(noisy, golden["in.t_tok"], z)
    assert_near(velocity, golden["out.y"])
    (velocity * golden["in.w"]).sum().backward()
    assert_gradients(denoiser, golden)
    assert_near(noisy.grad, golden["grad.x"], GRADIENTS)
    assert_near(z.grad, golden["grad.z"], GRADIENTS)
    assert_near(denoiser(noisy, golden["in.t_batch"], z), golden["out.y_tbatch"])
    assert_near(denoiser(noisy, golden["in.t_batch"], z, golden["in.pred_ids"]), golden["out.y_pred_ids"])


def test_adaptive_norm():
    golden = read("adaln_zero")
    normed, gate = golden.load(eager_lina_layers.AdaptiveNorm(20, 3))(golden["in.x"], golden["in.z"])
    assert_near(normed, golden["out.h"])
    assert_near(gate, golden["out.gate"])


def test_embeddings():
    golden = read("embeddings")
    assert_near(eager_lina_layers.position_embedding(32, (3, 5)), golden["out.pos_embed"][0])
    frame = golden.load(eager_lina_layers.FramePositionEmbedding(32, (3, 5)), "sd.video_pos_embed.")
    assert_near(frame.time_embedding(), golden["out.video_time_embed"][0])
    assert_near(frame(), golden["out.video_pos_embed"][0])
    text = golden.load(eager_lina_layers.TextEmbedding(10, 32, 6), "sd.text_embed.")
    prompts = [golden["in.prompt0"], golden["in.prompt1"]]
    assert_near(text.encode(prompts), golden["mid.text_encoded"])
    assert_near(text(prompts), golden["out.text_embed"])
    label = golden.load(eager_lina_layers.LabelEmbedding(32, 7), "sd.label_embed.")
    assert_near(label(golden["in.labels"]), golden["out.label_embed"])
    patches = golden.load(eager_lina_layers.PatchEmbedding(4, 16, 2), "sd.patch_embed.")
    assert_near(patches(golden["in.image"]), golden["out.patch_tokens"])
    assert torch.equal(eager_lina.patchify(golden["in.image"], 2), golden["out.patchify"])
    assert torch.equal(eager_lina.unpatchify(golden["out.patchify"], 2, (3, 4)), golden["out.unpatchify"])


@pytest.mark.parametrize("shift", [1, 3])
def test_sigmas(shift):
    golden = read("schedules")
    assert_near(eager_lina.train_sigmas(shift), golden[f"train_sigmas.shift{shift}"])
    assert_near(eager_lina.train_sigmas(shift) * 1000, golden[f"train_timesteps.shift{shift}"])
    for steps in (5, 25):
        sigmas = eager_lina.sample_sigmas(steps, shift)
        assert_near(sigmas, golden[f"sample_sigmas.shift{shift}.n{steps}"])
        assert_near(sigmas[:-1] * 1000, golden[f"sample_timesteps.shift{shift}.n{steps}"])


@pytest.mark.parametrize(("steps", "tokens"), [(128, 4096), (64, 256), (64, 4096), (8, 16)])
def test_num_preds(steps, tokens):
    golden = read("schedules")[f"num_preds.steps{steps}.patches{tokens}"]
    assert eager_lina.num_preds(steps, tokens) == golden.tolist()


@pytest.mark.parametrize("name", ["t2i_train", "c2i_train"])
def test_training_loss(name):
    golden = read(name)
    model = model_of(golden)
    assert_near(embedded_condition(model, golden, unconditional=False), golden["in.c"])
    seen = {}
    model.video_encoder.register_forward_hook(lambda module, given, out: seen.update(video_out=out))
    model.image_encoder.register_forward_hook(lambda module, given, out: seen.update(prev_ids=given[2], z=out))
    model.image_decoder.register_forward_hook(
        lambda module, given, out: seen.update(x_t=given[0], t_in=given[1], pred=out)
    )
    loss = model.training_loss(
        golden["in.x"],
        golden["in.c"],
        golden["in.u"],
        golden["in.mask_ratio"].item(),
        golden["in.noise"],
        golden["in.timestep_index"],
        int(golden.metadata["loss_repeat"]),
        float(golden.metadata["shift"]),
    )
    for key, value in seen.items():
        assert_near(value, golden[f"mid.{key}"])
    assert_near(loss[None], golden["out.loss"])
    loss.backward()
    assert_gradients(model, golden)


@pytest.mark.parametrize("name", ["t2i_sample", "c2i_sample"])
def test_sampling(name):
    golden = read(name)
    model = model_of(golden)
    condition = embedded_condition(model, golden, unconditional=True)
    assert_near(condition, golden["in.c"])
    counts = golden["in.num_preds"].tolist()
    sigmas = eager_lina.sample_sigmas(int(golden.metadata["num_diffusion_steps"]), float(golden.metadata["shift"]))
    assert_near(sigmas, golden["mid.sigmas"])
    scale = float(golden.metadata["guidance_scale"])
    guidance = [scale] * len(counts)
    if name == "c2i_sample":
        least = float(golden.metadata["min_guidance_scale"])
        guidance = eager_lina.guidance_ramp(scale, least, len(counts))
    assert_near(torch.tensor(guidance), golden["mid.guidance"])

    encoded, denoised, contexts = [], [], []
    model.video_encoder.register_forward_hook(lambda module, given, out: contexts.extend([given[0], out]))
    model.image_encoder.register_forward_hook(lambda module, given, out: encoded.append(out))
    denoise = model.denoise

    def recorded_denoise(noise, z, predicted, *rest):
        denoised.append((predicted, denoise(noise, z, predicted, *rest)))
        return denoised[-1][1]

    model.denoise = recorded_denoise
    latents = model.sample(condition, golden["in.order"], counts, golden["in.noise"], guidance, sigmas)
    assert_near(contexts[0], golden["mid.video_in"])
    assert_near(contexts[1], golden["mid.video_out"])
    for step, (z, (predicted, tokens)) in enumerate(zip(encoded, denoised, strict=True)):
        assert torch.equal(predicted, golden[f"mid.pred_ids.{step}"])
        assert_near(z, golden[f"mid.z.{step}"])
        assert_near(tokens, golden[f"mid.sample.{step}"])
    assert_near(latents, golden["out.latents"])
