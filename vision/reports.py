"""What a run leaves behind: curves, confusion matrix, accuracy of each class, the trained model, and a summary."""

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from torch import Tensor

from vision.model_files import save_model

_NAMES_SHOWN = 40  # label names along a confusion matrix; more are not legible


class RunReport(pl.Callback):
    """Writes `curves.png` and `model/` into `folder` when training ends, and the test's files when a test does.

    The history of the curves and the seconds of training are part of the checkpoint: a resumed run goes on with both.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.history: list[dict[str, float]] = []
        self.validated = False  # in the epoch in progress
        self._seconds, self._started = 0.0, None  # before the training in progress, and when that began

    @property
    def seconds(self) -> float:
        """Of training and the validations in it, of all parts of a resumed run together."""
        return self._seconds + (0.0 if self._started is None else time.monotonic() - self._started)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]
        self._seconds = state_dict.get("seconds", 0.0)  # absent from checkpoints of earlier versions

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Between validations the trainer repeats the last one's metrics; the curves show those that were measured.
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if self.validated or name.startswith("train/")
        }
        self.history.append({"epoch": trainer.current_epoch + 1, **metrics})
        self.validated = False

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._seconds, self._started = self.seconds, None
        self._save(trainer, module)

    @rank_zero_only
    def _save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        plot_curves(self.history).savefig(self.folder / "curves.png")
        save_model(module.final_model, self.folder / "model", module.hparams.model_args)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.validated = not trainer.sanity_checking
        if trainer.state.fn == "validate":
            self._report_evaluation(trainer, module)

    def on_test_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._report_evaluation(trainer, module)

    @rank_zero_only
    def _report_evaluation(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        evaluation, names = module.last_evaluation, trainer.datamodule.label_names
        plot_confusion(evaluation["confusion"], names).savefig(self.folder / "confusion.png")
        with (self.folder / "class_accuracy.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["class", "images", "accuracy"])
            images = evaluation["confusion"].sum(1).tolist()
            rows.writerows(zip(names, images, evaluation["class_accuracy"].tolist(), strict=True))
        print(f"\n{evaluation['stage']} accuracy {evaluation['accuracy']:.2%} of {sum(images)} images")
        print(f"plots and tables: {self.folder}")
        if (self.folder / "model").is_dir():
            print(f"trained model:    {self.folder / 'model'}")
            print(f"classify with it: python -m vision predict --checkpoint {self.folder / 'model'} picture.png")


def plot_curves(history: Sequence[dict[str, float]]) -> Figure:
    """Loss and accuracy over the epochs; `history` holds a dict of metrics, with `epoch`, for each epoch."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        names = sorted({name for row in history for name in row if name.endswith(f"/{quantity}")})
        for name in names:
            points = [(row["epoch"], row[name]) for row in history if name in row]
            axes.plot(*zip(*points, strict=True), label=name.removesuffix(f"/{quantity}"), marker=".")
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.grid(alpha=0.3)
        if names:
            axes.legend()
    return figure


def plot_confusion(confusion: Tensor, names: Sequence[str]) -> Figure:
    """Confusion matrix (true class, predicted class) of counts, coloured by the share of the true class."""
    shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy(force=True)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if len(names) <= _NAMES_SHOWN:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 15:
        for row, column in confusion.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, int(confusion[row, column]), ha="center", va="center", color=colour, fontsize=8)
    return figure
