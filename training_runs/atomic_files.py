"""Files that are written whole or not at all, and whether they can be written: asked before long work, not after it."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[str], Any]) -> None:
    """Let `write` fill a file beside `path`, whose name ends in the same suffix, then put it in its place."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-", suffix=path.suffix)
    os.close(handle)
    try:
        write(partial)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """JSON of a report, whole or not at all."""
    write_atomically(path, lambda partial: Path(partial).write_text(json.dumps(content, indent=1)))


def write_folder_atomically(folder: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a new folder beside `folder`, then put it in its place; what was there is lost only then."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as scratch:
        new = Path(scratch) / folder.name
        write(new)
        if folder.exists():
            os.replace(folder, Path(scratch) / "replaced")
        os.replace(new, folder)


def prepare_output(name: str, path: Path, as_folder: bool = False) -> None:
    """Make the folder that `path` is, or in which it is to be a file, and see that files can be written into it.

    Args:
        name: of the argument, for the message.
        path: a file, or a folder if `as_folder`.

    Raises:
        ValueError: nothing can be written there.
    """
    folder = path if as_folder else path.parent
    try:
        if not as_folder and path.is_dir():
            raise ValueError(f"{name} is {str(path)!r}; that is a folder, and it must be a file")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "there is a file of that name" if isinstance(error, FileExistsError) else error.strerror
        raise ValueError(
            f"{name} is {str(path)!r}; it must be where files can be written, but {str(folder)!r}: {reason}"
        ) from error
