"""`python -m generation fit`: what it refuses, in one line, and what it leaves then."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from generation.__main__ import main
from training_runs.command_line import check_checkpoint, checkpoint_path

CONFIG = {
    "model": {
        "class_path": "generation.radiance_field.training.RadianceFieldTraining",
        "init_args": {
            "kind": "single_grid",
            "field": {
                "levels": 2,
                "log2_table_size": 8,
                "hidden_width": 8,
                "direction_levels": 1,
                "resolutions": [4, 16],
            },
            "occupancy": {"resolution": [8, 8, 4], "warmup_steps": 32},
            "step": 0.3,
            "samples": 512,
        },
    },
    "data": {
        "class_path": "generation.radiance_field.scene_rays.SceneRays",
        "init_args": {"source": "city", "city": {"image_size": 16, "train_views": 3, "test_views": 2, "samples": 1}},
    },
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """`fit` of a small field with more flags; runs are in `tmp_path / "runs"`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GATED_VISION_BACKEND", "torch")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(CONFIG))

    def run(*flags: str) -> None:
        main(["fit", "--config", str(tmp_path / "small.yaml"), "--runs", str(tmp_path / "runs"), *flags])

    return run


def refusal(fit, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        fit(*flags)
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    return stop.value.code


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.init_args.step", "-1"], "error: step is -1.0; it must be a finite number, at least 0"),
        (["--data.init_args.source", "nosuch"], "error: city is {"),
        (["--model.init_args.field.appearances", "7"], "error: field.appearances is 7; of scene 'city' it must be"),
        (["--experiment", "../../x"], "error: experiment is '../../x'; it must be the name of a folder within"),
        (["--experiment", "."], "error: experiment is '.'; it must be the name of a folder within"),
    ],
    ids=["a number of the model", "data", "at setup", "a folder outside", "the folder of all runs"],
)
def test_what_is_refused_is_one_line_and_leaves_nothing(flags, words, fit, tmp_path):
    assert refusal(fit, *flags).startswith(words)
    left = [path for path in (tmp_path / "runs").rglob("*") if path.name.isdecimal() or path.is_file()]
    assert left == []
    assert not (tmp_path.parent / "x").exists()


@pytest.mark.parametrize("where", ["runs", "runs/small"])
def test_runs_that_cannot_be_written(where, fit, tmp_path):
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text("a file")
    assert "there is a file of that name" in refusal(fit)


def text(path: Path) -> None:
    path.write_text("# Title")


def cut(path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1000)}, "global_step": 3}, path)
    path.write_bytes(path.read_bytes()[:-900])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (text, "it cannot be read as a checkpoint"),
        (cut, "it cannot be read as a checkpoint"),
        (lambda path: path.write_bytes(b""), "it cannot be read as a checkpoint"),
        (lambda path: torch.save([1], path), "it is no checkpoint of a training"),
        (lambda path: torch.save({"weight": torch.ones(1)}, path), "it is no checkpoint of a training"),
        (lambda path: path.mkdir(), "that folder is of no run that left a checkpoint"),
        (lambda path: None, "there is no such file"),
    ],
    ids=["text", "cut", "empty", "a list", "weights alone", "a folder", "nothing"],
)
def test_checkpoints_that_are_none(make, words, fit, tmp_path):
    make(tmp_path / "x.ckpt")
    message = refusal(fit, "--ckpt_path", str(tmp_path / "x.ckpt"))
    assert message.startswith(f"error: ckpt_path is '{tmp_path / 'x.ckpt'}'; {words}")


def test_a_folder_stands_for_its_last_checkpoint(tmp_path):
    checkpoint = tmp_path / "3" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save({"state_dict": {}, "global_step": 3}, checkpoint)
    for given in (str(tmp_path / "3"), "last", str(checkpoint)):
        assert checkpoint_path(given, tmp_path, [3]) == str(checkpoint) == check_checkpoint(str(checkpoint))
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / ".metadata").write_text("")
    assert checkpoint_path(str(tmp_path / "sharded"), tmp_path, [3]) == str(tmp_path / "sharded")
    assert checkpoint_path("https://example.org/a.ckpt", tmp_path, [3]) == "https://example.org/a.ckpt"
    assert checkpoint_path(None, tmp_path, [3]) is None


def test_a_run_ends_without_a_notice_of_lightnings(fit, tmp_path, capfd):
    fit()
    said = capfd.readouterr()
    assert not re.search("weights_only", said.out + said.err)
    assert "callbacks" in torch.load(tmp_path / "runs" / "small" / "0" / "checkpoints" / "last.ckpt", weights_only=True)
