"""Training of classifiers: optimiser, moving average, resuming, reports, saved models."""

import csv
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from vision.augmentation import RandomDistortion
from vision.classification import ImageClassification
from vision.in_memory_images import Digits
from vision.model_files import load_model, save_model
from vision.reports import RunReport, plot_confusion, plot_curves

TINY = {"model": "vig_nano_patch4_28", "model_args": {"img_size": 8, "depth": 1, "drop_path_rate": 0.2}, "in_chans": 1}
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}


def digits():
    return Digits(8, RandomDistortion(rotation=10, shift=0.1), batch_size=256, evaluation_batch_size=400)


def module(**settings):
    torch.manual_seed(0)
    return ImageClassification(**{**TINY, "warmup_epochs": 1, "ema_decay": 0.9, **settings})


class Killed(Exception):
    pass


class Kill(pl.Callback):
    """Ends the process, as it were, when training reaches a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Killed


def trained(epochs, folder, ckpt_path=None, kill_at=None, save_every=None, **settings):
    """A module trained for `epochs` of five steps, and its trainer."""
    checkpoint = ModelCheckpoint(folder, filename="last", enable_version_counter=False, every_n_train_steps=save_every)
    callbacks = [Kill(kill_at), RunReport(folder), checkpoint]
    trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET)
    model = module(**settings)
    trainer.fit(model, digits(), ckpt_path=ckpt_path)
    return model, trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model, trainer = trained(6, folder, learning_rate=1e-2)
    trainer.test(model, datamodule=digits(), verbose=False)
    return model, trainer, folder


def test_training_learns(run):
    _, trainer, _ = run
    history = trainer.callbacks[1].history
    assert len(history) == 6
    assert history[-1]["train/loss"] < 0.8 * history[0]["train/loss"]
    assert trainer.callback_metrics["test/accuracy"] > 0.4  # chance is 0.1


def test_curves_show_only_what_was_measured(tmp_path):
    report = RunReport(tmp_path)
    trainer = pl.Trainer(
        max_epochs=3, check_val_every_n_epoch=2, callbacks=[report], enable_checkpointing=False, **QUIET
    )
    trainer.fit(module(), digits())
    assert ["val/accuracy" in row for row in report.history] == [False, True, False]
    assert all("train/loss" in row for row in report.history)


def test_weights_and_average_are_evaluated_apart(run):
    model, trainer, _ = run
    for name in ("accuracy", "top5_accuracy", "loss"):
        assert trainer.callback_metrics[f"test/{name}"] != trainer.callback_metrics[f"test_ema/{name}"]
    assert not any(parameter.requires_grad for parameter in model.average.parameters())


def test_logged_metrics_are_those_of_the_logits(run):
    model, trainer, _ = run
    data = trainer.datamodule.test_set
    images, labels = data.__getitems__(list(range(len(data))))
    with torch.no_grad():
        logits = model(images)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    accuracy = (logits.argmax(1) == labels).float().mean()
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean()
    expected = {"loss": loss, "accuracy": accuracy, "top5_accuracy": top5}
    for name, value in expected.items():
        torch.testing.assert_close(trainer.callback_metrics[f"test_ema/{name}"], value, rtol=1e-4, atol=1e-5)
    confusion = model.last_evaluation["confusion"]
    assert confusion.sum(1).tolist() == labels.bincount(minlength=10).tolist()
    torch.testing.assert_close(model.last_evaluation["class_accuracy"], confusion.diag() / confusion.sum(1))


def test_run_folder_holds_the_reports(run):
    _, _, folder = run
    for name in ("curves.png", "confusion.png"):
        assert (folder / name).stat().st_size > 10_000
    rows = list(csv.DictReader((folder / "class_accuracy.csv").open()))
    assert [row["class"] for row in rows] == list("0123456789")
    assert sum(int(row["images"]) for row in rows) == 359


@pytest.mark.parametrize("form", ["", "model", "model/model.safetensors", "last.ckpt"])
def test_saved_model_gives_the_same_logits(run, form):
    model, _, folder = run
    loaded = load_model(folder / form)
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)
    assert loaded.pretrained_cfg["label_names"] == list("0123456789")
    assert tuple(loaded.pretrained_cfg["input_size"]) == (1, 8, 8)


def test_weights_file_loads_through_timm_alone(run):
    model, _, folder = run
    arguments = {"in_chans": 1, "num_classes": 10, "img_size": 8, "depth": 1}
    built = timm.create_model(
        TINY["model"], checkpoint_path=str(folder / "model/model.safetensors"), **arguments
    ).eval()
    images = torch.zeros(1, 1, 8, 8)
    torch.testing.assert_close(built(images), model(images), rtol=0, atol=0)


def test_a_fine_tuned_model_loads_without_its_ancestor(run, tmp_path):
    model, _, _ = run
    save_model(model.final_model, tmp_path, {**TINY["model_args"], "pretrained": True, "pretrained_cfg_overlay": {}})
    assert load_model(tmp_path).num_classes == 10


def test_failed_save_leaves_the_old_file_whole(run, tmp_path, monkeypatch):
    model, _, _ = run
    save_model(model.final_model, tmp_path, TINY["model_args"])
    before = (tmp_path / "model.safetensors").read_bytes()

    def disk_full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("vision.model_files.save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_model(model.final_model, tmp_path, TINY["model_args"])
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*expected a folder"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(("save_every", "kill_at"), [(None, 10), (7, 8), (3, 14)], ids=["epoch", "step 7", "step 12"])
def test_resumed_run_equals_the_uninterrupted_one(save_every, kill_at, tmp_path):
    settings = {"mixup": 0.8, "cutmix": 1.0, "learning_rate": 5e-3, "save_every": save_every}
    whole, whole_trainer = trained(3, tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        trained(3, tmp_path / "killed", kill_at=kill_at, **settings)
    resumed, trainer = trained(3, tmp_path / "killed", ckpt_path=tmp_path / "killed/last.ckpt", **settings)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    assert len(trainer.callbacks[1].history) == 3
    assert trainer.callbacks[1].history[0] == whole_trainer.callbacks[1].history[0]
    saved = load_file(tmp_path / "killed/model/model.safetensors")
    torch.testing.assert_close(saved["head.weight"], whole.average.module.head.weight, rtol=0, atol=0)


def test_checkpoint_holds_no_pickled_objects(run):
    saved = torch.load(run[2] / "last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["model"] == TINY["model"]


def test_schedule_warms_up_and_follows_the_cosine(tmp_path):
    rates = []

    class Record(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[-1]["lr"])

    model = module(learning_rate=1e-2, warmup_learning_rate=1e-4, minimum_learning_rate=1e-3, warmup_epochs=1)
    trainer = pl.Trainer(max_epochs=3, callbacks=[Record()], enable_checkpointing=False, **QUIET)
    trainer.fit(model, digits())
    steps = len(rates)
    warmup = steps // 3
    rise = [1e-4 + (1e-2 - 1e-4) * step / warmup for step in range(warmup)]
    phase = torch.arange(steps - warmup) / (steps - warmup)
    fall = (1e-3 + (1e-2 - 1e-3) * (1 + torch.cos(torch.pi * phase)) / 2).tolist()
    assert rates == pytest.approx(rise + fall, rel=1e-5)


def test_layer_decay_and_weight_decay_groups():
    model = module(layer_decay=0.5, weight_decay=0.3, model_args={"img_size": 8, "depth": 3})
    model.trainer = SimpleNamespace(
        estimated_stepping_batches=10,
        num_training_batches=5,
        accumulate_grad_batches=1,
        precision="32-true",
        fit_loop=SimpleNamespace(setup_data=lambda: None),
    )
    optimizer = model.configure_optimizers()["optimizer"]
    scale_of = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.model.named_parameters())
    assert set(scale_of) == {id(parameter) for parameter in named.values()}
    scales = [scale_of[id(named[f"blocks.{block}.mlp.down_proj.weight"])] for block in range(3)]
    assert scales[1] == 2 * scales[0]
    assert scales[2] == 2 * scales[1]
    assert scale_of[id(named["head.weight"])] == 1
    assert {decay_of[id(p)] for name, p in named.items() if p.ndim == 1} == {0.0}
    assert decay_of[id(named["head.weight"])] == 0.3


def test_average_follows_its_decay():
    model = module(ema_decay=0.9, ema_warmup=False)
    before = model.average.module.head.weight.clone()
    with torch.no_grad():
        model.model.head.weight.add_(1.0)
    model.average.update(model.model, step=10)
    torch.testing.assert_close(model.average.module.head.weight, before + 0.1)


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_training_without_average(mixup, tmp_path):
    model, trainer = trained(1, tmp_path, ema_decay=None, mixup=mixup)
    assert model.final_model is model.model
    assert not any("ema" in name for name in trainer.callback_metrics)


@pytest.mark.parametrize(
    "bad",
    [{"learning_rate": -1.0}, {"layer_decay": 1.5}, {"label_smoothing": 2.0}, {"ema_decay": float("nan")}],
    ids=str,
)
def test_impossible_setting_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        module(**bad)


def test_fast_dev_run_writes_nothing(tmp_path):
    trainer = pl.Trainer(fast_dev_run=True, callbacks=[RunReport(tmp_path)], **QUIET)
    trainer.fit(module(), digits())
    assert list(tmp_path.iterdir()) == []


def test_plots_of_two_or_many_classes(tmp_path):
    for classes in (2, 60):
        plot_confusion(torch.eye(classes, dtype=torch.long), [str(i) for i in range(classes)]).savefig(
            tmp_path / "a.png"
        )
    figure = plot_curves([{"epoch": 1, "train/loss": 2.0}, {"epoch": 2, "train/loss": 1.0, "val/loss": 1.5}])
    assert {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines} == {
        "train": [2, 1],
        "val": [1.5],
    }
