"""Pictures of scenes that are made rather than taken: made once, then kept in the user's cache folder."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from training_runs.atomic_files import write_atomically

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/gated-vision-suite`, where compiled kernels are too."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gated-vision-suite"


def kept_pictures(path: Path, what: str, make: Callable[[], dict[str, Tensor]], about: dict[str, str]) -> dict:
    """Tensors by name, from a file or, if there is none or it is damaged, made and then written to it.

    Where the file cannot be written, they are made each time, and that is said.

    Args:
        path: of the file, whose name tells all that the pictures depend on.
        what: of whom the pictures are, in words.
        make: makes them.
        about: to be written into the file beside them.
    """
    if path.is_file():
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            logger.warning("%s is damaged, and is made again: %s", path, error)
    pictures = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda partial: save_file(pictures, partial, about))
    except OSError as error:
        logger.warning("The pictures of %s cannot be kept in %s, and are made each time: %s", what, path.parent, error)
    return pictures
