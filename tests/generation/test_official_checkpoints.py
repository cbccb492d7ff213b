"""Folders in the authors' format, fabricated from the golden state dicts: loaded, drawn from, and broken."""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.testing import assert_close
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from generation.lina.attention import gather
from generation.lina.embeddings import patchify, unpatchify
from generation.lina.official_checkpoints import load_autoencoder, load_pipeline, to_official
from generation.lina.pipeline import LinaPipeline
from generation.lina.sampling import Plan, draw_tokens
from generation.lina.shipped_models import load_pipeline as load_by_name
from generation.lina.transformer import LinaTransformer

GOLDEN = Path(__file__).parent.parent / "golden" / "lina"
ARCH = ["vit_d2w32", "vit_d4w32", "mlp_d2w40"]
CONFIGS = {
    "t2i": {
        "_class_name": "NOVATransformer3DModel",
        "arch": ARCH,
        "image_dim": 4,
        "image_size": [64, 64],
        "image_stride": 8,
        "image_base_size": [4, 4],
        "video_base_size": [1, 2, 2],
        "rotary_pos_embed": False,
        "text_token_dim": 12,
        "text_token_len": 6,
        "video_mixer_rank": None,
    },
    "c2i": {
        "arch": ARCH,
        "image_dim": 16,
        "image_size": [256, 256],
        "image_stride": 16,
        "image_base_size": [16, 16],
        "video_base_size": [1, 8, 8],
        "rotary_pos_embed": False,
        "text_token_dim": None,
        "text_token_len": None,
    },
}
MODULE = "diffnext.models.transformers.transformer_nova_linear_decouple1_kvscale1"
PLAIN = {"block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
WORDS = ["[UNK]", "a", "red", "circle", "blue", "square", "not"]


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def state_dict(kind: str) -> dict[str, Tensor]:
    tensors = golden(f"{kind}_sample")[0]
    return {key.removeprefix("sd."): tensor for key, tensor in tensors.items() if key.startswith("sd.")}


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def save_autoencoder(folder: Path, **options) -> AutoencoderKL:
    """As `save_pretrained` of the authors' class does: their class name, and plain blocks whatever there is."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**options).eval()
    blocks = len(options["block_out_channels"])
    config = {"_class_name": "AutoencoderKLMAR", "scaling_factor": 0.5, "double_z": True, **options}
    config |= {"down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks}
    write_json(folder / "config.json", config)
    torch.save(vae.state_dict(), folder / "diffusion_pytorch_model.bin")
    return vae


def write_folder(folder: Path, kind: str, *, safe: bool = False, pairs: bool = True, shift: float = 1.0) -> Path:
    """A whole folder but for the text encoder."""
    names = {"transformer": "NOVATransformer3DModel", "vae": "AutoencoderKLMAR"}
    modules = {"transformer": MODULE, "vae": "diffnext.models.autoencoders.autoencoder_kl_mar"}
    index = {name: [modules[name], names[name]] if pairs else names[name] for name in names}
    scheduler = "FlowMatchEulerDiscreteScheduler"
    index["scheduler"] = ["diffusers", scheduler] if pairs else scheduler
    write_json(folder / "model_index.json", {"_class_name": "NOVAPipeline" if pairs else "NOVAC2IPipeline", **index})
    write_json(folder / "transformer" / "config.json", CONFIGS[kind])
    if safe:
        save_file(state_dict(kind), folder / "transformer" / "diffusion_pytorch_model.safetensors")
    else:
        torch.save(state_dict(kind), folder / "transformer" / "diffusion_pytorch_model.bin")
    config = {"_class_name": scheduler, "_diffusers_version": "0.31.0", "num_train_timesteps": 1000, "shift": shift}
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    options = PLAIN if kind == "t2i" else PLAIN | {"block_out_channels": [8] * 5, "latent_channels": 16}
    blocks = len(options["block_out_channels"])
    down = ["DownEncoderBlock2D"] * (blocks - 1) + ["AttnDownEncoderBlock2D" if kind == "c2i" else "DownEncoderBlock2D"]
    save_autoencoder(folder / "vae", **options, down_block_types=down, up_block_types=["UpDecoderBlock2D"] * blocks)
    return folder


def write_text_encoder(folder: Path) -> None:
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=len(WORDS),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=3,
        max_position_embeddings=32,
    )
    PhiForCausalLM(config).save_pretrained(folder / "text_encoder")
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token=WORDS[0]).save_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("t2i"), "t2i", safe=True, shift=3.0)
    write_text_encoder(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path, "t2i")


def draw(pipeline: LinaPipeline, *arguments, **options) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "num_diffusion_steps": 2, "output_type": "pt"} | options
    return pipeline(*arguments, generator=torch.Generator().manual_seed(0), **options).images


@pytest.mark.parametrize(
    ("kind", "forms"), [("t2i", {}), ("c2i", {}), ("t2i", {"safe": True, "pairs": False}), ("c2i", {"pairs": False})]
)
def test_the_loaded_model_draws_the_official_tokens(tmp_path, kind, forms):
    tensors, _ = golden(f"{kind}_sample")
    pipeline = LinaPipeline.from_official(write_folder(tmp_path, kind, **forms))
    model = pipeline.transformer
    assert not model.training
    patch_size, grid = model.config.patch_size, model.grid_of(model.latent_size)
    noise = [patchify(noise, patch_size) for noise in tensors["in.noise"]]
    plan = Plan(
        order=tensors["in.order"][..., 0],
        known=0,
        predictions=tensors["in.num_preds"].tolist(),
        guidance=tensors["mid.guidance"].tolist(),
        sigmas=[tuple(tensors["mid.sigmas"].tolist())] * len(noise),
    )
    with torch.no_grad():
        contexts = model.encode_condition(tensors["in.c"], grid).chunk(2)
        blank = torch.zeros_like(noise[0])
        *_, drawn = draw_tokens(model, *contexts, blank, plan, lambda step, wanted: gather(noise[step], wanted))
    latents = tensors["out.latents"]
    assert_close(unpatchify(drawn, grid, patch_size), latents, rtol=0, atol=1e-5 * latents.abs().max().item())
    options = {"class_labels": [1, 999]} if kind == "c2i" else {"prompt_embeds": [tensors["in.prompt0"]]}
    images = draw(pipeline, **options)
    assert images.shape == (len(next(iter(options.values()))), 3, *CONFIGS[kind]["image_size"])
    assert images.isfinite().all()


def test_configuration_and_frozen_weights(text_folder):
    pipeline = load_pipeline(text_folder)
    config = pipeline.transformer.config
    assert (config.num_heads, config.text_length, config.gates, config.locality) == (2, 6, "per_head", 5)
    assert pipeline.scheduler.config.shift == 3.0
    assert pipeline.vae.config.scaling_factor == 0.5
    assert pipeline.vae_scale_factor == 8
    frozen = {key for key, p in pipeline.transformer.named_parameters() if not p.requires_grad}
    assert {key.split(".")[0] for key in frozen} == {"video_encoder", "video_pos_embed", "text_embed"}
    saved = to_official(pipeline.transformer.state_dict())
    expected = load_file(text_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in expected.items())


def test_the_text_encoder_is_loaded_for_a_prompt_and_freed(text_folder, monkeypatch, caplog):
    loads = []
    from generation.lina import pipeline as module

    load = module.load_text_encoder
    monkeypatch.setattr(module, "load_text_encoder", lambda *a: loads.append(a) or load(*a))
    lazy = load_pipeline(text_folder)
    kept = load_pipeline(text_folder, text_encoder=True)
    images = draw(lazy, "a red circle", "not blue")
    assert len(loads) == 1  # for the prompt and the negative prompt
    assert lazy.text_encoder is None
    assert kept.text_encoder is not None
    assert_close(draw(kept, "a red circle", "not blue"), images)
    assert not torch.equal(draw(kept, "a blue circle", "not blue"), images)
    with pytest.raises(ValueError, match="give prompt_embeds instead of prompt"):
        draw(load_pipeline(text_folder, text_encoder=False), "a red circle")
    features = lazy.encode_prompt(["a red circle", " "])
    assert [tuple(own.shape) for own in features] == [(3, 12), (0, 12)]
    assert torch.equal(draw(lazy, prompt_embeds=features[:1], negative_prompt="not blue"), images)
    assert len(lazy.encode_prompt("a red circle " * 3)[0]) == 6
    assert "has 9 tokens; those after the first 6 are cut" in caplog.text


def test_dtype_and_loading_by_folder(text_folder):
    pipeline = load_pipeline(text_folder, dtype=torch.bfloat16)
    assert {pipeline.transformer.dtype, pipeline.vae.dtype} == {torch.bfloat16}
    assert draw(pipeline, "a red circle").isfinite().all()
    assert load_pipeline(text_folder, dtype=torch.float16).vae.dtype == torch.float32
    assert load_by_name(text_folder).transformer.config.text_dim == 12


def test_the_autoencoder_of_mar_in_old_names(tmp_path):
    """Attention in its last down block, which its configuration does not tell, under names of before diffusers 0.15."""
    down = ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
    options = PLAIN | {
        "block_out_channels": [8, 8],
        "down_block_types": down,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    vae = save_autoencoder(tmp_path, **options)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, tensor in vae.state_dict().items():
        for new_name, old_name in names.items():
            key = key.replace(f".{new_name}.", f".{old_name}.")
        old[key] = tensor
    torch.save(old, tmp_path / "diffusion_pytorch_model.bin")
    loaded = load_autoencoder(tmp_path)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert_close(loaded.encode(x).latent_dist.mode(), vae.encode(x).latent_dist.mode())


def test_a_sharded_index(folder):
    place, tensors = folder / "transformer", state_dict("t2i")
    expected = load_pipeline(folder).transformer.state_dict()
    (place / "diffusion_pytorch_model.bin").unlink()
    parts = {}
    for i in range(2):
        part = dict(list(tensors.items())[i::2])
        save_file(part, place / f"diffusion_pytorch_model-{i + 1}-of-2.safetensors")
        parts |= dict.fromkeys(part, f"diffusion_pytorch_model-{i + 1}-of-2.safetensors")
    write_json(place / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": parts})
    loaded = load_pipeline(folder).transformer.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


VARIANTS = {
    "softmax": ({"attention": "softmax", "gates": None, "locality": 0}, {"num_heads": 2}),
    "linear6": ({"gates": None, "locality": 0}, {"num_heads": 2, "attention": "linear"}),
    "convolution": ({"gates": None}, {"num_heads": 2}),
    "key gates": ({"gates": "key"}, {}),
    "value gates": ({"gates": "value"}, {}),
    "shared gates": ({"gates": "shared"}, {"num_heads": 2}),
    "larger": ({"latent_size": (16, 16)}, {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_the_tensors_tell(folder, name):
    options, arguments = VARIANTS[name]
    sizes = {"width": 32, "num_heads": 2, "context_depth": 2, "encoder_depth": 2, "decoder_depth": 2}
    sizes |= {"denoiser_width": 40, "denoiser_depth": 2, "latent_channels": 4, "latent_size": (8, 8), "patch_size": 2}
    model = LinaTransformer(**sizes | {"text_dim": 12, "text_length": 6} | options)
    torch.save(to_official(model.state_dict()), folder / "transformer" / "diffusion_pytorch_model.bin")
    loaded = load_pipeline(folder, **arguments).transformer
    for key in ("attention", "normalization", "gates", "locality", "num_heads", "latent_size"):
        assert loaded.config[key] == model.config[key], key
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_separate_projections_are_subtraction(folder):
    tensors = {}
    for key, tensor in state_dict("t2i").items():
        if ".qkv." in key:
            tensors[key.replace("qkv", "q")], tensors[key.replace("qkv", "kv")] = tensor.split([32, 64])
        elif "_scale" not in key:
            tensors[key] = tensor
    torch.save(tensors, folder / "transformer" / "diffusion_pytorch_model.bin")
    loaded = load_pipeline(folder, num_heads=2).transformer
    assert loaded.config.normalization == "subtraction"
    assert torch.equal(loaded.state_dict()["image_encoder.blocks.0.attn.qkv.weight"],
                       state_dict("t2i")["image_encoder.blocks.0.attn.qkv.weight"])  # fmt: skip


def change(file: str, **values):
    """Change entries of a JSON file; None takes them out."""

    def act(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | values
        write_json(folder / file, {key: value for key, value in content.items() if value is not None})

    return act


def change_tensor(key: str, make):
    """Replace a tensor of the transformer; None takes it out."""

    def act(folder: Path) -> None:
        tensors = state_dict("t2i")
        tensors[key] = make(tensors.get(key))
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        torch.save(tensors, folder / "transformer" / "diffusion_pytorch_model.bin")

    return act


def overwrite(file: str, content: bytes | None):
    def act(folder: Path) -> None:
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content)

    return act


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def save_hostile(folder: Path) -> None:
    torch.save({"x": Hostile()}, folder / "transformer" / "diffusion_pytorch_model.bin")


BIAS, KEY_SCALE = "image_decoder.head.bias", "image_encoder.blocks.2.attn.key_scale"
FAULTS = {
    "no index": (overwrite("model_index.json", None), "model_index.json cannot be read"),
    "broken index": (overwrite("model_index.json", b"{"), "model_index.json cannot be read"),
    "index of a list": (overwrite("model_index.json", b"[]"), "it must be a JSON object"),
    "index of ours": (
        change("model_index.json", _class_name="LinaPipeline"),
        "load it by LinaPipeline.from_pretrained",
    ),
    "other pipeline": (change("model_index.json", _class_name="FluxPipeline"), "valid are 'NOVAPipeline'"),
    "no vae": (change("model_index.json", vae=None), "model_index.json lacks vae"),
    "diffusion": (change("model_index.json", scheduler=["diffusers", "DDPMScheduler"]), "'DDPMScheduler'"),
    "no config": (overwrite("transformer/config.json", None), "config.json cannot be read"),
    "no arch": (change("transformer/config.json", arch=None), "lacks 'arch'"),
    "strange arch": (change("transformer/config.json", arch=["a", "b", "c"]), "it must look like vit_d16w768"),
    "odd depth": (change("transformer/config.json", arch=["vit_d2w32", "vit_d3w32", "mlp_d2w40"]), "even depth"),
    "other width": (change("transformer/config.json", arch=["vit_d2w64", "vit_d4w64", "mlp_d2w40"]), "has shape"),
    "too deep": (
        change("transformer/config.json", arch=["vit_d9w32", "vit_d4w32", "mlp_d2w40"]),
        "tensors are missing",
    ),
    "too shallow": (change("transformer/config.json", arch=["vit_d1w32", "vit_d4w32", "mlp_d2w40"]), "unexpected"),
    "no weights": (overwrite("transformer/diffusion_pytorch_model.bin", None), "has no diffusion_pytorch_model"),
    "empty weights": (overwrite("transformer/diffusion_pytorch_model.bin", b""), "is damaged"),
    "hostile weights": (save_hostile, "holds more than tensors"),
    "missing tensor": (change_tensor(BIAS, lambda t: None), f"1 tensors are missing: {BIAS}"),
    "unexpected tensor": (change_tensor("other", lambda t: torch.ones(1)), "1 tensors are unexpected: other"),
    "wrong shape": (change_tensor(BIAS, lambda t: t[:3]), rf"{BIAS} has shape \(3,\); it must be \(16,\)"),
    "NaN": (change_tensor(BIAS, lambda t: t * float("nan")), f"{BIAS} holds numbers that are not finite"),
    "strange gates": (change_tensor(KEY_SCALE, lambda t: t[0]), r"it must be \(1, heads, tokens, 1\)"),
    "gates of no map": (change_tensor(KEY_SCALE, lambda t: t[:, :, :19]), "are for 19 tokens"),
    "no scheduler": (overwrite("scheduler/scheduler_config.json", None), "scheduler_config.json cannot be read"),
    "bad shift": (change("scheduler/scheduler_config.json", shift=0), "shift is 0"),
    "other levels": (change("scheduler/scheduler_config.json", num_train_timesteps=500), "num_train_timesteps 500"),
    "other latents": (change("transformer/config.json", image_dim=8), "has shape"),
    "vae without blocks": (change("vae/config.json", block_out_channels=None, _class_name=None), "lacks 'block_out"),
    "damaged vae": (overwrite("vae/diffusion_pytorch_model.bin", b"PK"), "vae/diffusion_pytorch_model.bin is damaged"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    act, words = FAULTS[name]
    act(folder)
    with pytest.raises(ValueError, match=words) as raised:
        load_pipeline(folder)
    assert str(folder) in str(raised.value)
    assert not (folder / "executed").exists()


def test_more_faults(tmp_path):
    write_folder(tmp_path, "t2i", safe=True)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        load_pipeline(tmp_path)
    with pytest.raises(ValueError, match="text_encoder is 'now'; valid are 'lazy', True, False"):
        load_pipeline(tmp_path, text_encoder="now")
    with pytest.raises(ValueError, match="cannot be read"):
        load_pipeline(tmp_path / "nowhere")


def test_heads_that_nothing_tells_are_asked_for(folder):
    tensors = {key: tensor for key, tensor in state_dict("t2i").items() if "_scale" not in key}
    torch.save(tensors, folder / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="give num_heads"):
        load_pipeline(folder)


def test_a_missing_text_encoder_is_named(folder):
    with pytest.raises(ValueError, match="text_encoder"):
        load_pipeline(folder, text_encoder=True)
