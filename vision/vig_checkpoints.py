"""Where ViG's weights come from, and how foreign checkpoints become state dicts of our models."""

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from timm.models import resolve_pretrained_cfg
from torch import Tensor, nn

from vision.patch_embedding import resize_position_embedding

SHIPPED_CHECKPOINTS = Path(__file__).parent / "checkpoints"
_PUBLISHED_AT = "https://huggingface.co/hustvl/ViG/resolve/main/"
_DIGEST_NOTE = "sha256:"
# timm's own order: an averaged model comes first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_WRAPPER_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")
_LEGACY_HIERARCHICAL_NAMES = (
    (re.compile(r"^patch_embed\.proj\."), "patch_embed.0."),
    (re.compile(r"^patch_embed\.norm\."), "patch_embed.2."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.ln_1\."), r"\1.norm."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.self_attention\."), r"\1.op."),
    (re.compile(r"^norm\."), "classifier.norm."),
    (re.compile(r"^head\."), "classifier.head."),
)


def published_file(name: str, sha256: str) -> dict[str, Any]:
    """Entries of a timm pretrained cfg for one of the authors' files; timm has no field for a digest but `notes`."""
    return {"url": _PUBLISHED_AT + name, "notes": (_DIGEST_NOTE + sha256,)}


def locate_pretrained(variant: str, pretrained_cfg: Any, overlay: dict | None, cache_dir: str | None) -> dict:
    """Return the cfg overlay with which timm loads the weights of `variant` from a file that was checked.

    A published file is downloaded once into torch hub's folder and its SHA-256 is compared with the cfg's, each time.

    Raises:
        FileNotFoundError: the cfg names a file that does not exist.
        RuntimeError: the digest is not the recorded one.
    """
    overlay = dict(overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay)
    if cfg.source or cfg.state_dict:
        return overlay
    if cfg.file:
        if not Path(cfg.file).is_file():
            raise FileNotFoundError(
                f"the weights of {variant}.{cfg.tag} are missing: {cfg.file} does not exist; "
                f"train them, name another file in pretrained_cfg_overlay, or use pretrained=False"
            )
        return overlay
    digests = [note.removeprefix(_DIGEST_NOTE) for note in cfg.notes or () if note.startswith(_DIGEST_NOTE)]
    if cfg.url and digests:
        overlay["file"] = str(download(cfg.url, digests[0], cache_dir))
    return overlay


def download(url: str, sha256: str, cache_dir: str | None = None) -> Path:
    """Return the local path of `url`'s file, downloaded if it is not there, with its SHA-256 verified.

    Raises:
        RuntimeError: the digest differs.
        ConnectionError: the file cannot be fetched.
    """
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(urlparse(url).path).name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except URLError as error:
            raise ConnectionError(
                f"{url} cannot be fetched ({error.reason}); name a file that you have: "
                'pretrained_cfg_overlay={"file": "<path>"}'
            ) from error
        return path
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise RuntimeError(f"{path} has SHA-256 {found}, but {url} has {sha256}; delete the file and try again")
    return path


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turn a checkpoint of the authors (or of timm, DDP, torch.compile) into a state dict of `model`.

    Unwraps `state_dict_ema`, `model_ema`, `state_dict` and `model` (in this order), strips `module.` and `_orig_mod.`,
    renames the old names of ViG-H, flattens 1x1 convolutions to matrices and resamples the position embedding to the
    model's grid. Keys of the published files are those of our models.

    Raises:
        ValueError: a position embedding is not for a square grid, so that its grid is not known.
    """
    while wrapper := next((name for name in _WRAPPERS if isinstance(state_dict.get(name), Mapping)), None):
        state_dict = state_dict[wrapper]
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    hierarchical = "classifier.norm.weight" in shapes or "layers.0.blocks.0.op.o_proj.weight" in shapes

    converted = {}
    for name, value in state_dict.items():
        name = _WRAPPER_PREFIXES.sub("", name)
        if hierarchical:
            for old, new in _LEGACY_HIERARCHICAL_NAMES:
                name = old.sub(new, name)
        shape = shapes.get(name)
        if shape is not None and value.shape != shape:
            if value.dim() == 4 and len(shape) == 2 and value.shape[2:] == (1, 1):
                value = value.flatten(1)
            elif name == "pos_embed":
                side = math.isqrt(value.shape[1])
                if side * side != value.shape[1]:
                    raise ValueError(f"pos_embed has {value.shape[1]} tokens; only a square grid can be resampled")
                value = resize_position_embedding(value, (side, side), model.grid_size)
        converted[name] = value
    return converted
