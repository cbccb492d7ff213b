"""Results of finished runs, kept in files with the settings they depend on, so that an experiment can go on."""

import json
from pathlib import Path
from typing import Any

from training_runs.atomic_files import write_json


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Dotted names of what differs."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [name]
    keys = {**ours, **theirs}
    return [
        different
        for key in keys
        for different in (
            differences(ours[key], theirs[key], f"{name}.{key}".lstrip("."))
            if key in ours and key in theirs
            else [f"{name}.{key}".lstrip(".")]
        )
    ]


def finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result in a file, without its settings; None if there is no file.

    Raises:
        ValueError: it is of a run with other settings, or no result.
    """
    if not path.exists():
        return None
    advice = "use another output folder, or delete the file"
    try:
        result = json.loads(path.read_text())
        theirs = result.pop("settings")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} does not hold the result of a run with its settings; {advice}") from error
    if different := differences(settings, theirs):
        raise ValueError(f"{path} is of a run with other settings: {', '.join(different)} differ; {advice}")
    return result


def keep(path: Path, result: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write what `finished` reads."""
    write_json(path, result | {"settings": settings})
