"""`python -m vision`: fit, validate, test, resume, two processes, predict."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageOps

from vision.__main__ import main
from vision.predict import Classifier, predict
from vision.training import TrainingCommandLine

ROOT = Path(__file__).parents[2]
FAST = """
seed_everything: 3
model:
  model: vig_nano_patch4_28
  model_args: {img_size: 8, depth: 1}
  learning_rate: 1.0e-2
  warmup_epochs: 1
  ema_decay: 0.9
data:
  class_path: Digits
  init_args:
    image_size: 8
    batch_size: 256
    evaluation_batch_size: 400
    distortion: {rotation: 10, shift: 0.1}
trainer:
  {max_epochs: 2, gradient_clip_val: 1, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of runs after a fit and its resumption by `--ckpt_path last`, and the configuration."""
    folder = tmp_path_factory.mktemp("cli")
    config = folder / "fast.yaml"
    config.write_text(FAST)
    first = TrainingCommandLine(["fit", "--config", str(config), "--runs", str(folder / "runs")])
    assert first.datamodule.seed == 3, "the data's seed is seed_everything"
    assert (first.model.hparams.num_classes, first.model.hparams.in_chans) == (10, 1)
    main(["fit", f"--config={config}", f"--runs={folder / 'runs'}", "--ckpt_path=last", "--trainer.max_epochs=5"])
    return folder / "runs" / "fast", config


def test_fit_leaves_a_whole_run_folder(runs):
    names = {entry.name for entry in (runs[0] / "0").iterdir()}
    expected = {
        "config.yaml",
        "metrics.csv",
        "curves.png",
        "confusion.png",
        "class_accuracy.csv",
        "model",
        "checkpoints",
    }
    assert expected <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (runs[0] / "0/checkpoints/last.ckpt").is_file()
    settings = yaml.safe_load((runs[0] / "0/config.yaml").read_text())
    assert settings["seed_everything"] == 3
    assert settings["model"]["learning_rate"] == 0.01


def test_resumed_run_goes_on_where_the_first_stopped(runs):
    rows = list(csv.DictReader((runs[0] / "1/metrics.csv").open()))
    epochs = [int(row["epoch"]) for row in rows if row["train/loss"]]
    assert epochs == [2, 3, 4]


def test_last_without_a_run_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="no run in"):
        main(["fit", "--config", str(runs[1]), "--runs", str(tmp_path), "--ckpt_path", "last"])


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--trainer.overfit_batches", "2"], 4),
        (["--trainer.limit_train_batches", "3"], 6),
        (["--trainer.accumulate_grad_batches", "2"], 6),
        (["--trainer.max_epochs", "-1", "--trainer.max_steps", "7"], 7),
        (["--trainer.fast_dev_run", "true"], 1),
        (["--trainer.precision", "bf16-mixed"], 10),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_trainer_flags_work(flags, steps, runs, tmp_path):
    line = TrainingCommandLine(["fit", "--config", str(runs[1]), "--runs", str(tmp_path), *flags])
    assert line.trainer.global_step == steps
    assert (tmp_path / "fast/0/model").is_dir() == ("--trainer.fast_dev_run" not in flags)


def test_training_without_an_end_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="max_epochs and max_steps are both -1"):
        main(["fit", "--config", str(runs[1]), "--runs", str(tmp_path), "--trainer.max_epochs", "-1"])


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_of_a_checkpoint(command, runs, capsys, tmp_path):
    checkpoint = runs[0] / "1/checkpoints/last.ckpt"
    main([command, "--config", str(runs[1]), "--runs", str(tmp_path), "--ckpt_path", str(checkpoint)])
    assert f"{command.removesuffix('idate')}_ema accuracy" in capsys.readouterr().out
    assert (tmp_path / "fast/0/confusion.png").is_file()


@pytest.mark.parametrize("command", [[], ["--help"]], ids=["nothing", "help"])
def test_help_lists_the_commands(command, capsys):
    main(command)
    assert "python -m vision predict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "shown"),
    [("fit", "--model.label_smoothing"), ("predict", "--checkpoint"), ("linear-probe", "--image_size")],
)
def test_help_of_each_command(command, shown, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert shown in capsys.readouterr().out


def test_unknown_command_is_named():
    with pytest.raises(SystemExit, match=r"'fitt'.*fit, validate"):
        main(["fitt"])


def logged(run_folder):
    rows = csv.DictReader((run_folder / "metrics.csv").open())
    return {(row["epoch"], name): float(value) for row in rows for name, value in row.items() if "/" in name and value}


def test_two_processes_give_the_losses_of_one(runs, tmp_path):
    command = [sys.executable, "-m", "vision", "fit", "--config", runs[1], "--runs", tmp_path]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = logged(runs[0] / "0"), logged(tmp_path / "fast/0")
    assert one.keys() == two.keys()
    assert len([key for key in one if key[1] == "train/loss"]) == 2
    for key, value in one.items():
        assert two[key] == pytest.approx(value, abs=1e-5), key


def picture_of(dataset, index, path):
    pixels = dataset.images[index, 0].numpy()
    image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST)
    image.save(path)
    return image


@pytest.fixture
def pictures(tmp_path):
    from vision.in_memory_images import Digits

    data = Digits(8)
    data.setup("test")
    for index in range(5):
        picture_of(data.test_set, index, tmp_path / f"{index}.png")
    return tmp_path


def test_predict_writes_every_probability_and_names_bad_files(runs, pictures, capsys):
    (pictures / "broken.jpg").write_bytes(b"no image")
    output = pictures / "predictions.csv"
    with pytest.raises(SystemExit) as stop:
        main(
            ["predict", "--checkpoint", str(runs[0] / "1"), str(pictures), "--output", str(output), "--batch_size", "2"]
        )
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "5 images classified, 1 bad files" in printed.out
    assert "broken.jpg" in printed.err
    rows = list(csv.DictReader(output.open()))
    assert [Path(row["path"]).name for row in rows] == ["0.png", "1.png", "2.png", "3.png", "4.png", "broken.jpg"]
    assert "UnidentifiedImageError" in rows[-1]["error"]
    assert rows[-1]["class"] == ""
    for row in rows[:-1]:
        probabilities = {name: float(row[name]) for name in "0123456789"}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert max(probabilities, key=probabilities.get) == row["class"]
        assert row["error"] == ""


def test_predict_prints_the_top_of_one_picture(runs, pictures, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--checkpoint", str(runs[0] / "1"), str(pictures / "0.png"), "--top", "3"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("0.png")
    shares = [float(line.split("%")[0]) for line in lines[1:4]]
    assert shares == sorted(shares, reverse=True)
    assert lines[4].startswith("1 images classified")


def test_dark_digit_on_white_paper_is_inverted(runs, pictures):
    from vision.model_files import load_model

    classifier = Classifier(load_model(runs[0] / "1"))
    light_on_dark = pictures / "0.png"
    ImageOps.invert(Image.open(light_on_dark)).convert("RGB").save(pictures / "paper.png")
    assert (classifier.read(pictures / "paper.png") - classifier.read(light_on_dark)).abs().max() < 1e-6
    never = Classifier(classifier.model, invert="never")
    assert (never.read(pictures / "paper.png") - classifier.read(light_on_dark)).abs().max() > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": ["nowhere.png"]}, "nowhere.png does not exist"),
        ({"checkpoint": "nowhere"}, "checkpoint is 'nowhere'"),
        ({"top": 0}, "top is 0"),
        ({"invert": "maybe"}, "invert is 'maybe'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_predict_refuses(settings, message, runs, pictures):
    with pytest.raises(ValueError, match=message):
        predict(**{"images": [str(pictures)], "checkpoint": str(runs[0] / "1"), **settings})
