"""Checkpoint folders of the authors (and of NOVA): their tensors and configurations as ours.

The keys of the state dicts are the same, with two exceptions: gates lose their outer dimensions ([1, H, N, 1] there,
[H, N] here), and the separate query and key-value projections of subtraction-normalised models become one. What the
configuration does not say (gates, convolution, normalization, heads, the size that the gates are for) is read off the
tensors.

Folders hold `model_index.json`, `transformer`, `vae` and `scheduler`, those of text-to-image models also `text_encoder`
and `tokenizer`. Nothing in them is executed: weights are safetensors or tensors in a pickle that may hold nothing else,
and the modules that `model_index.json` names are not imported.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from generation.lina.pipeline import LinaPipeline
from generation.lina.text_features import load_text_encoder
from generation.lina.transformer import SIZES, LinaTransformer

logger = logging.getLogger(__name__)

GATE_KEYS = {"key_scale": "key_gate", "value_scale": "value_gate"}
PIPELINES = ("NOVAPipeline", "NOVAC2IPipeline")
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
WEIGHTS = "diffusion_pytorch_model"
HEADS_OF_WIDTH = dict(SIZES.values())
# Attention of autoencoders saved before diffusers 0.15.
DEPRECATED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
MAR_BLOCKS = (128, 128, 256, 256, 512)


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' tensors under our keys."""
    converted = {}
    for key, tensor in state_dict.items():
        stem, _, last = key.rpartition(".")
        if last in GATE_KEYS:
            converted[f"{stem}.{GATE_KEYS[last]}".lstrip(".")] = tensor[0, :, :, 0]
        elif match := re.fullmatch(r"(|.*\.)q\.(weight|bias)", key):
            rest = state_dict[f"{match[1]}kv.{match[2]}"]
            converted[f"{match[1]}qkv.{match[2]}"] = torch.cat([tensor, rest])
        elif not re.fullmatch(r"(|.*\.)kv\.(weight|bias)", key):
            converted[key] = tensor
    return converted


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the keys of the authors' division-normalised (or softmax) models."""
    ours = {gate: scale for scale, gate in GATE_KEYS.items()}
    converted = {}
    for key, tensor in state_dict.items():
        stem, _, last = key.rpartition(".")
        if last in ours:
            converted[f"{stem}.{ours[last]}".lstrip(".")] = tensor[None, :, :, None]
        else:
            converted[key] = tensor
    return converted


def load_pipeline(
    path: str | Path,
    *,
    text_encoder: str | bool = "lazy",
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    num_heads: int | None = None,
) -> LinaPipeline:
    """A pipeline from a folder in the authors' format.

    Args:
        path: the folder.
        text_encoder: of text-to-image models: "lazy" loads it for each encoding of prompts and frees it afterwards (it
            is twice as large as the model), True loads it now, False never. A pipeline that loads it lazily does not
            save it.
        dtype: of the weights; those of the files if None.
        attention: "linear" or "softmax", for models with neither gates nor convolutions: NOVA (softmax) and the
            authors' ablation without either (linear) have the same tensors. Softmax if None.
        num_heads: of models without gates whose width is none of the published ones; their files do not tell it.

    Raises:
        ValueError: a file is missing, damaged, or not what it should be; the message names it, and the tensor.
    """
    folder = Path(path)
    if text_encoder != "lazy" and not isinstance(text_encoder, bool):
        raise ValueError(f"text_encoder is {text_encoder!r}; valid are 'lazy', True, False")
    _check_index(folder / "model_index.json")
    transformer = load_transformer(folder / "transformer", dtype=dtype, attention=attention, num_heads=num_heads)
    vae = load_autoencoder(folder / "vae", dtype=dtype)
    scheduler = load_scheduler(folder / "scheduler")
    if vae.config.latent_channels != transformer.config.latent_channels:
        raise ValueError(
            f"{folder / 'vae'} has {vae.config.latent_channels} latent channels; {folder / 'transformer'} needs "
            f"{transformer.config.latent_channels}"
        )
    encoder, tokenizer, text_folder = None, None, None
    if transformer.config.text_dim and text_encoder is not False:
        text_folder = folder if (folder / "text_encoder").is_dir() else None
        if text_encoder is True:
            encoder, tokenizer = load_text_encoder(folder, dtype or transformer.dtype)
    pipeline = LinaPipeline(transformer, vae, scheduler, encoder, tokenizer)
    pipeline.text_encoder_folder = text_folder
    return pipeline


def load_transformer(
    folder: Path, *, dtype: torch.dtype | None = None, attention: str | None = None, num_heads: int | None = None
) -> LinaTransformer:
    """The model of `config.json` and `diffusion_pytorch_model.*`, in evaluation mode; arguments and errors as above."""
    config_file = folder / "config.json"
    config = _read_json(config_file)
    weights_file, tensors = _read_weights(folder)
    try:
        options = _transformer_options(config, tensors, attention, num_heads)
        with torch.device("meta"):  # random weights of a large model would take minutes
            model = LinaTransformer(**options)
        tensors = from_official(tensors)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{config_file} with {weights_file}: {what}") from error
    return _assign(model, tensors, weights_file, dtype)


def load_autoencoder(folder: Path, *, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """SDXL's autoencoder, or MAR's, which is the same but for attention in its last down block, as diffusers' class."""
    config_file = folder / "config.json"
    config = _read_json(config_file)
    weights_file, tensors = _read_weights(folder)
    renamed = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if "attentions" in parts and parts[-2] in DEPRECATED:
            key = ".".join([*parts[:-2], DEPRECATED[parts[-2]], parts[-1]])
            tensor = tensor.flatten(1) if tensor.dim() > 2 else tensor
        renamed[key] = tensor
    known = signature(AutoencoderKL.__init__).parameters
    options = {name: value for name, value in config.items() if name in known}
    if config.get("_class_name") == "AutoencoderKLMAR":
        options = {"block_out_channels": MAR_BLOCKS, "latent_channels": 16, "layers_per_block": 2, **options}
    try:
        blocks = range(len(options["block_out_channels"]))
        for side, name in (("encoder.down_blocks", "DownEncoderBlock2D"), ("decoder.up_blocks", "UpDecoderBlock2D")):
            attends = [any(key.startswith(f"{side}.{i}.attentions.") for key in renamed) for i in blocks]
            option = f"{side.split('.')[1].removesuffix('s')}_types"
            options[option] = [f"Attn{name}" if attend else name for attend in attends]
        with torch.device("meta"):
            model = AutoencoderKL(**options)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{config_file}: {what}") from error
    if dtype == torch.float16 and model.config.force_upcast:
        dtype = torch.float32  # in float16 its activations overflow
    return _assign(model, renamed, weights_file, dtype)


def load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of `scheduler_config.json`: flow matching with 1000 levels and a fixed shift, and nothing else."""
    file = folder / "scheduler_config.json"
    config = _read_json(file)
    name, levels = config.get("_class_name", SCHEDULER), config.get("num_train_timesteps", 1000)
    shift = config.get("shift", 1.0)
    if name != SCHEDULER or levels != 1000 or config.get("use_dynamic_shifting"):
        raise ValueError(
            f"{file}: _class_name is {name!r}, num_train_timesteps {levels}, use_dynamic_shifting "
            f"{config.get('use_dynamic_shifting')}; valid are {SCHEDULER!r}, 1000, false"
        )
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise ValueError(f"{file}: shift is {shift!r}; it must be a positive number")
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=levels, shift=float(shift))


def _check_index(file: Path) -> None:
    """Components are pairs of module and class, or, saved again by diffusers, classes alone; neither is needed."""
    index = _read_json(file)
    name = index.get("_class_name")
    if name == LinaPipeline.__name__:
        raise ValueError(f"{file} is a {name}; load it by LinaPipeline.from_pretrained")
    if name not in PIPELINES:
        raise ValueError(f"{file}: _class_name is {name!r}; valid are {', '.join(map(repr, PIPELINES))}")
    if missing := {"transformer", "vae", "scheduler"} - index.keys():
        raise ValueError(f"{file} lacks {', '.join(sorted(missing))}")
    scheduler = index["scheduler"]
    scheduler = scheduler if isinstance(scheduler, str) else scheduler[-1]
    if scheduler != SCHEDULER:
        raise ValueError(f"{file}: the scheduler is {scheduler!r}; valid is {SCHEDULER!r}")


def _transformer_options(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], attention: str | None, num_heads: int | None
) -> dict[str, Any]:
    """Arguments of `LinaTransformer`."""
    context_depth, width = _parse("vit", config["arch"][0])
    depth, image_width = _parse("vit", config["arch"][1])
    denoiser_depth, denoiser_width = _parse("mlp", config["arch"][2])
    if width != image_width or depth % 2:
        raise ValueError(f"arch is {config['arch']}; needed are two equal widths, and an even depth of the second")
    prefix = f"image_encoder.blocks.{depth // 2}"
    gates, gate = _gates(tensors, prefix)
    kernel = tensors.get(f"{prefix}.attn.dw_conv.weight")
    subtraction = f"{prefix}.attn.q.weight" in tensors
    if attention is None:
        linear = gates is not None or kernel is not None or subtraction
        attention = "linear" if linear else "softmax"
        if not linear:
            logger.info("neither gates nor convolutions: taken for softmax attention; attention= says otherwise")
    if num_heads is None:
        num_heads = gate.shape[1] if gate is not None and gates != "shared" else HEADS_OF_WIDTH.get(width)
    if num_heads is None:
        raise ValueError(f"arch has width {width}, of which the number of heads is not known; give num_heads")
    patch_size = 15 // config["image_stride"] + 1
    grid = config.get("image_base_size") or [
        side // config["image_stride"] // patch_size for side in config["image_size"]
    ]
    grid = _grid(grid, None if gate is None else gate.shape[2], prefix)
    text_dim = config.get("text_token_dim") or None
    return {
        "width": width,
        "num_heads": num_heads,
        "context_depth": context_depth,
        "encoder_depth": depth // 2,
        "decoder_depth": depth // 2,
        "denoiser_width": denoiser_width,
        "denoiser_depth": denoiser_depth,
        "mlp_ratio": tensors[f"{prefix}.mlp.fc1.weight"].shape[0] / width,
        "latent_channels": config["image_dim"],
        "latent_size": (grid[0] * patch_size, grid[1] * patch_size),
        "patch_size": patch_size,
        "text_dim": text_dim,
        "text_length": config.get("text_token_len") or 256,
        "num_classes": None if text_dim else tensors["label_embed.weight"].shape[0] - 1,
        "attention": attention,
        "normalization": "subtraction" if subtraction else "division",
        "gates": gates,
        "locality": 0 if kernel is None else kernel.shape[-1],
        "rotary": bool(config.get("rotary_pos_embed")),
    }


def _parse(kind: str, arch: str) -> tuple[int, int]:
    """Depth and width of "vit_d16w1536"."""
    if not (match := re.fullmatch(rf"{kind}_d(\d+)w(\d+)", str(arch))):
        raise ValueError(f"arch has {arch!r}; it must look like {kind}_d16w768")
    return int(match[1]), int(match[2])


def _gates(tensors: Mapping[str, Tensor], prefix: str) -> tuple[str | None, Tensor | None]:
    """The kind of gates, and one of them, [1, H or 1, N, 1]."""
    key, value = (tensors.get(f"{prefix}.attn.{name}") for name in GATE_KEYS)
    gate = value if key is None else key
    if gate is None:
        return None, None
    if gate.dim() != 4 or gate.shape[0] != 1 or gate.shape[3] != 1:
        raise ValueError(f"the gates {prefix}.attn.* have shape {tuple(gate.shape)}; it must be (1, heads, tokens, 1)")
    if key is None or value is None:
        return ("value" if key is None else "key"), gate
    return ("shared" if gate.shape[1] == 1 else "per_head"), gate


def _grid(base: list[int], gate_length: int | None, prefix: str) -> tuple[int, int]:
    """Rows and columns of image tokens: as configured, or, in the same proportion, as many as there are gates."""
    rows, columns = base
    if gate_length is None:
        return rows, columns
    count = gate_length * 4 // 5
    scale = math.sqrt(count / (rows * columns))
    rows, columns = round(rows * scale), round(columns * scale)
    if rows * columns * 5 != gate_length * 4:
        raise ValueError(
            f"the gates {prefix}.attn.* are for {gate_length} tokens; maps of the shape {tuple(base)} have "
            f"{rows * columns * 5 // 4} and the like"
        )
    return rows, columns


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; it must be a JSON object")
    return content


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file (or index of files) of weights in `folder`, and its tensors."""
    for suffix in ("safetensors", "bin"):
        file = folder / f"{WEIGHTS}.{suffix}"
        if file.is_file():
            return file, _read_tensors(file)
        index = folder / f"{WEIGHTS}.{suffix}.index.json"
        if index.is_file():
            parts = _read_json(index).get("weight_map")
            if not isinstance(parts, dict):
                raise ValueError(f"{index} lacks weight_map")
            # Only names: an index shall not point out of its folder.
            files = sorted({folder / Path(str(part)).name for part in parts.values()})
            return index, {key: tensor for part in files for key, tensor in _read_tensors(part).items()}
    raise ValueError(f"{folder} has no {WEIGHTS}.safetensors or .bin")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    # A damaged or hostile pickle can raise anything.
    except Exception as error:
        raise ValueError(f"{file} is damaged, or holds more than tensors: {error}") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} holds no state dict")
    return dict(tensors)


def _assign(model: nn.Module, tensors: dict[str, Tensor], file: Path, dtype: torch.dtype | None) -> nn.Module:
    """Make `tensors` the weights of `model`, which has none yet."""
    wanted = model.state_dict()
    for what, keys in (("missing", wanted.keys() - tensors.keys()), ("unexpected", tensors.keys() - wanted.keys())):
        if keys:
            shown = ", ".join(sorted(keys)[:5]) + (", ..." if len(keys) > 5 else "")
            raise ValueError(f"{file}: {len(keys)} tensors are {what}: {shown}")
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:
            shapes = tuple(tensor.shape), tuple(wanted[key].shape)
            raise ValueError(f"{file}: the tensor {key} has shape {shapes[0]}; it must be {shapes[1]}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{file}: the tensor {key} holds numbers that are not finite, or are no floating point")
    dtype = next(iter(tensors.values())).dtype if dtype is None else dtype
    # Copies: tensors of a mapped file may lie at any byte, on which the last bits of matrix products depend.
    copies = {key: tensor.to(dtype, copy=True).contiguous() for key, tensor in tensors.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()
