"""`python -m generation evaluate` and `evaluate-openmoji`: what they write, and errors before a model is loaded."""

import json

import pytest

from generation import __main__ as command_line
from generation.lina import openmoji_scores, shape_scores
from generation.lina.captioned_shapes import LEVELS
from training_runs.atomic_files import write_atomically


def stopped(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        command_line.main(list(arguments))
    assert stop.value.code != 0
    errors = capsys.readouterr().err
    return stop.value.code if isinstance(stop.value.code, str) else errors.splitlines()[-1]


@pytest.mark.parametrize("command", ["evaluate", "evaluate-openmoji"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: model is 'nowhere'; expected shapes"),
        (["--steps", "0"], "--steps is 0; it must be from 1"),
        (["--diffusion-steps", "-1"], "--diffusion-steps is -1"),
        (["--guidance", "-1"], "--guidance is -1.0; it must be at least 0"),
        (["--guidance", "nan"], "--guidance is nan"),
        (["--seed", "-1"], "--seed is -1"),
        (["--output", "taken/file"], "error: --output is 'taken/file'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_before_a_model_is_loaded(command, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    for home in (shape_scores, openmoji_scores):
        monkeypatch.setattr(home, "load_pipeline", lambda _: pytest.fail("loaded"))
    model = [] if arguments == ["nowhere"] else ["shapes"]
    errors = stopped(capsys, command, *model, *arguments)
    assert message in errors
    assert "\n" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--prompts", "0"], "--prompts is 0"),
        (["evaluate", "--grid", "grid.txt"], "--grid is grid.txt; it must end in .png"),
        (["evaluate", "--steps", "4", "0"], "--steps is 0"),
        (["evaluate-openmoji", "--pictures", "0"], "--pictures is 0"),
    ],
)
def test_options_of_one_command_are_checked(arguments, message, capsys):
    assert message in stopped(capsys, *arguments)


def test_levels_are_those_of_captioned_shapes(tmp_path):
    options = command_line.evaluate_options(["--levels", *LEVELS, "--output", str(tmp_path / "scores.json")])
    assert tuple(options.levels) == LEVELS


def test_scores_of_a_shipped_model_are_written(tmp_path, capsys):
    output, grid = tmp_path / "new/scores.json", tmp_path / "grid.png"
    few = ["--prompts", "2", "--levels", "single", "--guidance", "1", "--steps", "2", "--diffusion-steps", "2"]
    command_line.main(["evaluate", "shapes", *few, "--output", str(output), "--grid", str(grid)])
    report = json.loads(output.read_text())
    assert (report["model"], report["prompts"], len(report["scores"])) == ("shapes", 2, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "new"]
    assert grid.read_bytes().startswith(b"\x89PNG")
    assert output.stat().st_mode & 0o777 == 0o644
    assert f"written to {output}" in capsys.readouterr().out


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.json"

    def fail(partial: str) -> None:
        with open(partial, "w") as file:
            file.write("half")
        raise RuntimeError("no space")

    path.write_text("old")
    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]
    assert path.read_text() == "old"


def test_every_command_is_listed(capsys):
    command_line.main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"python -m generation {command} " in f"{listed} " for command in ("fit", "validate", "sample"))
    assert all(f"generation {command}" in listed for command in command_line.HOME_OF)
