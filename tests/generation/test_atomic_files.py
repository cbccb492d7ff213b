"""Files and folders that appear whole or not at all, and lose nothing else."""

import os
from pathlib import Path

import pytest

from training_runs.atomic_files import write_atomically, write_folder_atomically


def fill(folder: Path, text: str = "new") -> None:
    folder.mkdir()
    (folder / "model").write_text(text)


def fail(path: Path | str) -> None:
    raise RuntimeError("the disk is full")


def test_a_folder_replaces_the_one_before(tmp_path):
    folder, beside = tmp_path / "deep/model", tmp_path / "deep/other"
    for text in ("old", "new"):
        write_folder_atomically(folder, lambda path, text=text: fill(path, text))
    beside.write_text("kept")
    write_folder_atomically(folder, fill)
    assert (folder / "model").read_text() == "new"
    assert sorted(os.listdir(tmp_path / "deep")) == ["model", "other"]


@pytest.mark.parametrize("write", [write_atomically, write_folder_atomically])
def test_what_was_there_stays_if_writing_fails(write, tmp_path):
    target = tmp_path / "target"
    if write is write_atomically:
        target.write_text("old")
    else:
        fill(target, "old")
    with pytest.raises(RuntimeError, match="the disk is full"):
        write(target, fail)
    assert (target if target.is_file() else target / "model").read_text() == "old"
    assert os.listdir(tmp_path) == ["target"]


def test_the_working_directory_is_never_emptied(tmp_path, monkeypatch):
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    write_folder_atomically(Path("model"), fill)
    (inner / "mine").write_text("kept")
    with pytest.raises(RuntimeError, match="the disk is full"):
        write_folder_atomically(Path("."), fail)
    assert sorted(os.listdir(inner)) == ["mine", "model"]
