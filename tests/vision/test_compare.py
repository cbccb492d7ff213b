"""`python -m vision compare`: plan, refusals, table, resumption."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from vision.__main__ import main
from vision.compare import Contestant, Run, check_settings, compare, finished_result, planned_run
from vision.reports import RunReport
from vision.standings import Result, Standing, verdict

COMPARISON = """
experiment: small
expected_order: [two, one]
seeds: [1]
fit:
  model: {model_args: {img_size: 8}, learning_rate: 1.0e-2, warmup_epochs: 0, ema_decay: 0.5}
  trainer:
    {max_epochs: 2, limit_train_batches: 3, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
datasets:
  digits: {data: {class_path: Digits, init_args: {image_size: 8, batch_size: 256, evaluation_batch_size: 400}}}
models:
  one: {model: vig_nano_patch4_28, model_args: {depth: 1}}
  two: {model: vig_nano_patch4_28, model_args: {depth: 1, embed_dim: 48}}
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The YAML of a comparison that has run, and its folder."""
    folder = tmp_path_factory.mktemp("compare")
    config = folder / "small.yaml"
    config.write_text(COMPARISON)
    main(["compare", "--config", str(config), "--runs", str(folder / "runs")])
    return config, folder / "runs" / "small"


def again(config, folder, *flags):
    main(["compare", "--config", str(config), "--runs", str(folder.parent), *flags])


def test_every_run_leaves_its_result_and_its_configuration(compared):
    _, folder = compared
    for model in ("one", "two"):
        run = folder / "digits" / model / "seed1"
        result = json.loads((run / "result.json").read_text())
        assert result["settings"] == yaml.safe_load((run / "fit.yaml").read_text())
        assert result["settings"]["seed_everything"] == 1
        assert (result["stage"], result["images"]) == ("test_ema", 359)
        assert 0.2 < result["accuracy"] < 1
        assert 0.2 < result["validation_accuracy"] < 1
        assert result["seconds"] > 0
        rows = list(csv.DictReader((run / "0/metrics.csv").open()))
        [logged] = [float(row["test_ema/accuracy"]) for row in rows if row["test_ema/accuracy"]]
        assert result["accuracy"] == logged, "what fit reports"
        # The file is an ordinary configuration of `fit`.
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", str(run / "fit.yaml"), "--print_config"])
        assert stop.value.code == 0


def test_table_and_plot_are_saved(compared):
    _, folder = compared
    rows = list(csv.DictReader((folder / "comparison.csv").open()))
    assert {(row["dataset"], row["model"], row["seed"]) for row in rows} == {
        ("digits", name, "1") for name in ("one", "two")
    }
    accuracies = [float(row["accuracy"]) for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert not [entry.name for entry in folder.iterdir() if entry.name.startswith(".")], "nothing half written"


def test_finished_runs_are_skipped_and_their_table_is_printed(compared, capsys, monkeypatch):
    monkeypatch.setattr("vision.compare.train", None)  # a training would fail
    again(*compared)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[1/2] digits, one, seed 1: finished before, ")
    assert lines[1].startswith("[2/2] digits, two, seed 1: finished before, ")
    table = lines.index("digits: test_ema accuracy of 359 images")
    assert lines[table + 1].split() == ["rank", "model", "parameters", "seed", "1", "mean", "spread", "seconds"]
    assert [line.split()[0] for line in lines[table + 3 : table + 5]] == ["1", "2"]
    assert lines[table + 5].startswith("The expected order two > one ")


def test_changed_settings_are_refused_with_the_file_and_the_change(compared, tmp_path):
    _, folder = compared
    changed = tmp_path / "changed.yaml"
    changed.write_text(COMPARISON.replace("learning_rate: 1.0e-2", "learning_rate: 2.0e-2"))
    with pytest.raises(ValueError, match=r"one.seed1.result\.json .*model\.learning_rate was 0\.01, is 0\.02"):
        again(changed, folder)


def test_broken_run_is_resumed_to_the_same_result(compared, tmp_path, monkeypatch, capsys):
    config, whole = compared
    report = RunReport.on_train_epoch_end

    def break_in_the_second_epoch(self, trainer, module):
        if trainer.current_epoch == 1:
            raise RuntimeError("power cut")
        report(self, trainer, module)

    with monkeypatch.context() as patched:
        patched.setattr(RunReport, "on_train_epoch_end", break_in_the_second_epoch)
        with pytest.raises(RuntimeError, match="power cut"):
            again(config, tmp_path / "small")
    run = tmp_path / "small/digits/one/seed1"
    assert (run / "0/checkpoints/last.ckpt").is_file()
    assert not (run / "result.json").exists()
    capsys.readouterr()
    again(config, tmp_path / "small")
    printed = capsys.readouterr().out
    assert "[1/2] digits, one, seed 1: resuming" in printed
    assert "[2/2] digits, two, seed 1: training" in printed
    assert [row["epoch"] for row in csv.DictReader((run / "1/metrics.csv").open()) if row["train/loss"]] == ["1"]
    resumed, uninterrupted = (
        json.loads((root / "digits/one/seed1/result.json").read_text()) for root in (tmp_path / "small", whole)
    )
    for seconds in (resumed.pop("seconds"), uninterrupted.pop("seconds")):
        assert seconds > 0
    assert resumed == uninterrupted


def test_broken_run_of_other_settings_is_not_resumed(tmp_path):
    run = Run("data", "model", 0, tmp_path, {"model": {"depth": 2}})
    (tmp_path / "0/checkpoints").mkdir(parents=True)
    (tmp_path / "0/checkpoints/last.ckpt").touch()
    (tmp_path / "fit.yaml").write_text("model: {depth: 3}\ntrainer: {max_epochs: 1}\n")
    with pytest.raises(ValueError, match=r"fit\.yaml .*model\.depth was 3, is 2; trainer was .*, is absent"):
        finished_result(run)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learning_rate", "learnign_rate", r"digits, one, seed 1: .*learnign_rate"),
        ("max_epochs", "max_epoch", r"digits, one, seed 1: .*max_epoch"),
        ("init_args: {image_size", "init_args: {picture_size", r"digits, one, seed 1: (?s:.*)picture_size"),
        ("embed_dim:", "embed_width:", r"digits, two, seed 1: .*embed_width"),
        (
            "model: vig_nano_patch4_28, model_args: {depth: 1, ",
            "model: vig_none, model_args: {",
            r"digits, two.*vig_none",
        ),
        ("batch_size: 256", "batch_size: 0", r"digits, one, seed 1: (?s:.*)batch_size is 0"),
        ("max_epochs: 2", "max_epochs: many", r"digits, one, seed 1: (?s:.*)max_epochs"),
        ("expected_order: [two, one]", "expected_order: [two]", r"expected_order is \['two'\].*one, two"),
        ("seeds: [1]", "seeds: [1, 1]", r"seeds is \[1, 1\]"),
        ("seeds: [1]", "seeds: [-1]", r"seeds is \[-1\]"),
        ("  digits: {", "  a/b: {", r"datasets has the name 'a/b'"),
        ("fit:\n", "fit:\n  seed_everything: 3\n", r"seed_everything is 3"),
    ],
    ids=lambda value: value[:28].strip() if "\\" not in value else "",
)
def test_wrong_setting_is_named_before_any_training(old, new, message, tmp_path, monkeypatch):
    monkeypatch.setattr("vision.compare.train", None)
    assert old in COMPARISON
    config = tmp_path / "wrong.yaml"
    config.write_text(COMPARISON.replace(old, new))
    with pytest.raises(ValueError, match=message):
        again(config, tmp_path / "runs/small")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [("expected_order", "expected_ordre", "expected_ordre"), ("model: vig", "modle: vig", "modle")],
    ids=["key of the comparison", "key of a model"],
)
def test_unknown_key_of_the_comparison_is_named(old, new, named, tmp_path, capsys):
    config = tmp_path / "wrong.yaml"
    config.write_text(COMPARISON.replace(old, new))
    with pytest.raises(SystemExit) as stop:
        again(config, tmp_path / "runs/small")
    assert stop.value.code != 0
    assert named in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_help_names_the_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--help"])
    assert stop.value.code == 0
    assert "--expected_order" in capsys.readouterr().out


def test_a_flag_into_the_settings_of_fit_is_refused(compared):
    with pytest.raises(SystemExit, match=r"--fit\.trainer\.max_epochs.*in the YAML alone"):
        again(*compared, "--fit.trainer.max_epochs", "1")


def test_settings_are_merged_without_touching_what_they_came_from():
    shared = {"model": {"model_args": {"drop_path_rate": 0.1}, "weight_decay": 0.1}, "trainer": {"max_epochs": 3}}
    dataset = {"data": {"class_path": "Digits"}, "trainer": {"max_epochs": 5}}
    first, second = (
        planned_run(Path("root"), ("set", dataset), ("net", Contestant("resnet18", {"depth": depth})), 4, shared)
        for depth in (1, 2)
    )
    assert first.settings == {
        "seed_everything": 4,
        "model": {"model": "resnet18", "model_args": {"drop_path_rate": 0.1, "depth": 1}, "weight_decay": 0.1},
        "data": {"class_path": "Digits"},
        "trainer": {"max_epochs": 5},
    }
    assert first.folder == Path("root/set/net/seed4")
    assert second.settings["model"]["model_args"]["depth"] == 2
    assert shared["model"]["model_args"] == {"drop_path_rate": 0.1}


def test_the_check_builds_but_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"model": {"model_args": {"img_size": 8, "depth": 1}}, "data": {"class_path": "Digits"}}
    check_settings(Run("digits", "ViG", 0, tmp_path / "runs", settings))
    assert list(tmp_path.iterdir()) == []


def standing(name, *accuracies):
    return Standing(name, [Result("test_ema", accuracy, 100, None, 1000, 2.0) for accuracy in accuracies])


@pytest.mark.parametrize(
    ("accuracies", "lines"),
    [
        (
            {"A": (0.90, 0.92), "B": (0.70, 0.72)},
            ["order A > B came out.", "A against B: +20.00 points, more than the spread of such a difference, 2.00."],
        ),
        (
            {"A": (0.70, 0.80), "B": (0.74, 0.80)},
            [
                "did not come out; measured: B > A.",
                "A against B: -2.00 points, within the spread of such a difference, 8.25.",
            ],
        ),
        ({"A": (0.7,), "B": (0.6,)}, ["came out.", "A against B: +10.00 points, one seed shows no spread"]),
        ({"A": (0.7,), "B": (0.7,)}, ["did not come out; measured: A = B.", "+0.00 points"]),
    ],
    ids=["as expected", "reversed, within the spread", "one seed", "a tie"],
)
def test_verdict(accuracies, lines):
    ranking = sorted((standing(*item) for item in ((k, *v) for k, v in accuracies.items())), key=lambda s: -s.mean)
    said = verdict(ranking, ["A", "B"])
    assert len(said) == len(lines)
    for line, expected in zip(said, lines, strict=True):
        assert expected in line


def test_verdict_without_an_expectation_compares_neighbours_of_the_ranking():
    ranking = [standing("A", 0.9, 0.8), standing("B", 0.8, 0.7), standing("C", 0.5, 0.4)]
    assert [line.split(":")[0] for line in verdict(ranking, None)] == ["A against B", "B against C"]


def test_compare_returns_the_rankings(compared):
    config, folder = compared
    given = yaml.safe_load(config.read_text()) | {"runs": str(folder.parent), "seeds": (1,)}
    given["models"] = {name: Contestant(**model) for name, model in given["models"].items()}
    ranking = compare(**given)["digits"]
    assert {standing.model for standing in ranking} == {"one", "two"}
    assert ranking[0].mean >= ranking[1].mean
    assert ranking[0].spread is None
