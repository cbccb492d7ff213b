"""Where a model's weights come from: published files with their digests, and the wrappings of checkpoints."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from timm.models import resolve_pretrained_cfg

_DIGEST_NOTE = "sha256:"
# timm's own order: an averaged model comes first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_WRAPPER_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")


def published_file(url: str, sha256: str) -> dict[str, Any]:
    """Entries of a timm pretrained cfg for a published file; timm has no field for a digest but `notes`."""
    return {"url": url, "notes": (_DIGEST_NOTE + sha256,)}


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


def unwrapped(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The names and tensors of a checkpoint, whatever wraps them.

    Unwraps `state_dict_ema`, `model_ema`, `state_dict` and `model` (in this order), strips `module.` and `_orig_mod.`.
    """
    while wrapper := next((name for name in _WRAPPERS if isinstance(checkpoint.get(name), Mapping)), None):
        checkpoint = checkpoint[wrapper]
    return ((_WRAPPER_PREFIXES.sub("", name), value) for name, value in checkpoint.items())
