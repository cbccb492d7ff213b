"""Branches of Q-Zoom in files: a folder of their own, or among the weights of the authors' checkpoints."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.utils import cached_file

from multimodal.q_zoom.configuration import CONFIGURATION_FILE, PRESETS, QZoomConfig
from training_runs.atomic_files import write_atomically

if TYPE_CHECKING:
    from multimodal.q_zoom.model import QZoom

HEADS_FILE = "q_zoom_heads.safetensors"
OFFICIAL = re.compile(r"(?:^|\.)(twig_layers|twig_norm|high_res_layers|high_res_head)\.(.+)$")
UNUSED = ("self_attn.v_proj", "self_attn.o_proj", "mlp.", "post_attention_layernorm")
WHERE = ("revision", "token", "cache_dir", "local_files_only", "subfolder")  # options that also find other files
SUFFIX = {"tap_layer": "twig_K", "proposal_depth": "twig_T"}


def save(zoom: "QZoom", folder: str | Path, *, official_keys: bool) -> None:
    """Write a Q-Zoom's branches and settings into `folder`, each file whole or not at all; other files there stay.

    Raises:
        ValueError: `folder` is empty, or a file.
    """
    if not str(folder).strip():
        raise ValueError(f"folder is {str(folder)!r}; it must be the path of a folder")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder is {str(folder)!r}; there is a file of that name")
    weights = official_weights(zoom) if official_keys else own_weights(zoom)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    write_atomically(folder / HEADS_FILE, lambda partial: save_file(tensors, partial))
    write_atomically(folder / CONFIGURATION_FILE, lambda partial: zoom.config.save(Path(partial)))


def load(
    kind: type["QZoom"], base: str, heads: str | None, config: QZoomConfig | None, options: Mapping[str, Any]
) -> "QZoom":
    """A Q-Zoom of a stock model and branches; arguments as of `QZoom.from_pretrained`."""
    model = load_base(base, options)
    where = {name: value for name, value in options.items() if name in WHERE}
    processor = AutoProcessor.from_pretrained(base, **where)
    if heads is not None:
        path = Path(heads) / HEADS_FILE
        config = config or QZoomConfig.load(heads)
        weights = read(path)
    else:
        config = config or official_config(model)
        weights, path = {}, base
        for file in weight_files(base, where):
            weights.update(read(file, only_branches=True))
    zoom = kind.wrap(model, processor, config)
    load_weights(zoom, weights, path)
    return zoom


def load_weights(zoom: "QZoom", weights: Mapping[str, Tensor], source: object) -> None:
    """Put weights, under own or official names, into the branches; all of them or none.

    Raises:
        ValueError: one is missing, unknown, of another shape, or not finite; the message names it and `source`.
    """
    if any(OFFICIAL.search(name) for name in weights):
        weights = from_official(weights, zoom.config.proposal_depth)
        if zoom.config.share_first_layer:
            weights = without_shared_layer(weights, source)
        if not any(name.startswith("gate.") for name in weights):
            zoom.gate = None  # stages 1 and 2 have none yet, and LLaVA's published checkpoints have none at all
    expected = own_weights(zoom)
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"{source} does not fit the branches: missing {missing[:5]}, unknown {unknown[:5]}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}; it must be {tuple(expected[name].shape)}"
            raise ValueError(f"{name} in {source} has shape {shapes}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} in {source} holds numbers that are not finite")
    with torch.no_grad():
        for name, tensor in weights.items():
            expected[name].copy_(tensor)


def own_weights(zoom: "QZoom") -> dict[str, Tensor]:
    """The branches' parameters by name; a layer both share stands once, under the proposal."""
    named = [("proposal", zoom.proposal), *([] if zoom.gate is None else [("gate", zoom.gate)])]
    seen: set[int] = set()
    weights = {}
    for branch, module in named:
        for name, parameter in module.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                weights[f"{branch}.{name}"] = parameter
    return weights


def from_official(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Weights under the authors' names, in either layout, under ours, without those that are never used.

    Args:
        depth: layers of the region proposal.
    """
    ours = {}
    for name, tensor in weights.items():
        found = OFFICIAL.search(name)
        if found is None:
            continue
        part, rest = found.groups()
        if part == "twig_norm":
            ours[f"proposal.norm.{rest}"] = tensor
        elif part == "high_res_head":
            ours[f"gate.head.{rest}"] = tensor
        elif part == "high_res_layers":
            ours[f"gate.layers.{rest}"] = tensor
        else:
            index, inner = rest.split(".", 1)
            if int(index) < depth - 1:
                ours[f"proposal.layers.{rest}"] = tensor
            elif not inner.startswith(UNUSED):
                ours[f"proposal.{inner.removeprefix('self_attn.')}"] = tensor
    return ours


def without_shared_layer(weights: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Weights without the gate's first layer, which is the proposal's.

    Raises:
        ValueError: they are two.
    """
    kept = dict(weights)
    for name in [name for name in weights if name.startswith("gate.layers.0.")]:
        twin = weights.get(name.replace("gate.", "proposal.", 1))
        if twin is None or not kept.pop(name).equal(twin):
            raise ValueError(f"{name} in {source} is not the proposal's; with share_first_layer it must be the same")
    return kept


def official_weights(zoom: "QZoom") -> dict[str, Tensor]:
    """The branches under the authors' names; the tensors they never use keep the model's values, as with them."""
    prefix = "model.language_model." if zoom.model.config.model_type == "qwen3_vl" else "model."
    last = zoom.config.proposal_depth - 1
    source = zoom.adapter.decoder.layers[zoom.config.tap_layer + last]
    weights = {
        f"{prefix}twig_layers.{last}.{name}": tensor
        for name, tensor in source.named_parameters()
        if name.startswith(UNUSED)
    }
    for name, tensor in zoom.proposal.named_parameters():
        if name.startswith("layers.") or name.startswith("norm."):
            weights[f"{prefix}twig_{name}"] = tensor
        else:
            inner = name if name.startswith("input_layernorm") else f"self_attn.{name}"
            weights[f"{prefix}twig_layers.{last}.{inner}"] = tensor
    if zoom.gate is not None:
        weights |= {f"{prefix}high_res_{name}": tensor for name, tensor in zoom.gate.named_parameters()}
    # A shared layer is written twice: safetensors holds no tensor under two names.
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def official_config(model: PreTrainedModel) -> QZoomConfig:
    """Settings of one of the authors' checkpoints, by its configuration.

    Its `reuse_src_pos` is not taken over: the published scripts switched it off in the last stage, though the stage
    before was trained with it on. Alignment is continuous where the backbone has it; give a configuration otherwise.

    Raises:
        ValueError: the model's configuration names no branches.
    """
    config = model.config
    depths = {name: getattr(config, key, None) for name, key in SUFFIX.items()}
    if None in depths.values():
        raise ValueError(
            f"{config.name_or_path!r} has no branches of Q-Zoom ({', '.join(SUFFIX.values())} in its configuration); "
            f"give heads, a folder with branches, or put untrained ones around the model by QZoom.wrap"
        )
    family = {"qwen3_vl": "qwen3_vl_4b", "llava": "llava_1_5"}.get(config.model_type, "qwen2_5_vl_7b")
    settings = {**vars(PRESETS[family]), **depths, "gate_depth": depths["proposal_depth"]}
    return QZoomConfig(**settings)


def weight_files(base: str, where: Mapping[str, Any]) -> list[Path]:
    """The safetensors files of a model, local or on the hub, that can hold branches.

    Args:
        where: which revision and so on, as `from_pretrained` takes it.
    """
    index = cached_file(base, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **where)
    if index is None:
        return [Path(cached_file(base, "model.safetensors", **where))]
    names = json.loads(Path(index).read_text())["weight_map"]
    files = sorted({file for name, file in names.items() if is_branch(name)})
    return [Path(cached_file(base, file, **where)) for file in files]


def is_branch(name: str) -> bool:
    """Whether a tensor of a checkpoint is one of the branches'."""
    return OFFICIAL.search(name) is not None


def read(path: Path, *, only_branches: bool = False) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        ValueError: it is none, or cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys()) if not only_branches or is_branch(name)}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error


def load_base(base: str, options: Mapping[str, Any]) -> PreTrainedModel:
    """The stock model of a checkpoint, which may hold branches besides.

    Raises:
        ValueError: weights of the model are missing or of other shapes, or there are some that are nobody's.
    """
    try:
        with unreported():
            model, info = AutoModelForImageTextToText.from_pretrained(base, **options, output_loading_info=True)
    except OSError as error:
        raise ValueError(f"{base!r} holds no model of transformers, and there is none of that name: {error}") from error
    unknown = [name for name in info["unexpected_keys"] if not is_branch(name)]
    for kind, names in (
        ("are missing", info["missing_keys"]),
        ("have other shapes", info["mismatched_keys"]),
        ("are not of the model or of branches", unknown),
    ):
        if names:
            raise ValueError(f"{base!r} does not fit {type(model).__name__}: weights {kind}: {sorted(names)[:3]}")
    return model


@contextmanager
def unreported() -> Iterator[None]:
    """Keep transformers from reporting what does not fit: branches among the weights would be all it speaks of."""
    logger = logging.getLogger("transformers.modeling_utils")

    def grave(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    # A filter, for at another level transformers would report on sharding instead.
    logger.addFilter(grave)
    try:
        yield
    finally:
        logger.removeFilter(grave)
