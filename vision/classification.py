"""Training of image classifiers: `ImageClassification` holds a timm model's loss, optimiser and metrics."""

import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from vision.model_files import model_description

TOP = 5


def _metrics(num_classes: int) -> nn.ModuleDict:
    metrics: dict[str, Metric] = {
        "loss": MeanMetric(),
        "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
        "class_accuracy": MulticlassAccuracy(num_classes, average="none", validate_args=False),
        "confusion": MulticlassConfusionMatrix(num_classes, validate_args=False),
    }
    if num_classes > TOP:
        metrics[f"top{TOP}_accuracy"] = MulticlassAccuracy(num_classes, top_k=TOP, average="micro", validate_args=False)
    return nn.ModuleDict(metrics)


def _check_ranges(settings: Any) -> None:
    for name, least, most in (
        ("learning_rate", 0.0, math.inf),
        ("weight_decay", 0.0, math.inf),
        ("layer_decay", 0.0, 1.0),
        ("warmup_epochs", 0.0, math.inf),
        ("warmup_learning_rate", 0.0, math.inf),
        ("minimum_learning_rate", 0.0, math.inf),
        ("label_smoothing", 0.0, 1.0),
        ("mixup", 0.0, math.inf),
        ("cutmix", 0.0, math.inf),
        ("ema_decay", 0.0, 1.0),
    ):
        value = settings[name]
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name} is {value}; it lies between {least} and {most}")


class ImageClassification(pl.LightningModule):
    """A timm model, trained with AdamW, a linear warm-up and a cosine per step.

    With `ema_decay` every evaluation runs twice, on the weights and on their moving average, logged as `<stage>/...`
    and `<stage>_ema/...`; the average is what is saved and predicted with.

    Args:
        model: a name of `timm.list_models()`, the suite's included.
        model_args: what else `timm.create_model` takes: `img_size`, `drop_path_rate`, `pretrained`...
        num_classes: classes of the head. The command line takes it from the data.
        in_chans: channels of the images. The command line takes it from the data.
        learning_rate: after the warm-up, of the last layer. It is not scaled by the batch size.
        weight_decay: none on biases, norms and what the model's `no_weight_decay()` names.
        layer_decay: factor of the learning rate from each layer to the one before it; 1 for none.
        warmup_epochs: linear warm-up, before the cosine; fractions of an epoch are allowed.
        warmup_learning_rate: where it starts.
        minimum_learning_rate: where the cosine ends.
        label_smoothing: of the training targets.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none. With both, each batch takes one or the other.
        ema_decay: of the moving average of the weights; None for no average.
        ema_warmup: let the decay grow as 1 - (1 + step)^(-2/3) until it reaches `ema_decay`.
    """

    def __init__(
        self,
        model: str = "vig_nano_patch4_28",
        model_args: dict[str, Any] | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float = 1.0,
        warmup_epochs: float = 5.0,
        warmup_learning_rate: float = 1e-6,
        minimum_learning_rate: float = 1e-5,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        ema_decay: float | None = 0.9999,
        ema_warmup: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        _check_ranges(self.hparams)
        self.model = timm.create_model(model, num_classes=num_classes, in_chans=in_chans, **(model_args or {}))
        self.average = None
        if ema_decay is not None:
            self.average = ModelEmaV3(self.model, decay=ema_decay, use_warmup=ema_warmup).requires_grad_(False)
        self.mixup = None
        if mixup or cutmix:
            self.mixup = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
        suffixes = [""] if self.average is None else ["", "_ema"]
        self.metrics = nn.ModuleDict(
            {stage + suffix: _metrics(num_classes) for stage in ("val", "test") for suffix in suffixes}
        )

    @property
    def final_model(self) -> nn.Module:
        """The model to keep: the averaged one where there is an average."""
        return self.model if self.average is None else self.average.module

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of the model to keep for images (B, C, H, W)."""
        return self.final_model(images)

    def setup(self, stage: str) -> None:
        if self.trainer.datamodule is not None:
            self.model.pretrained_cfg = model_description(self.model, self.trainer.datamodule)
            self.final_model.pretrained_cfg = self.model.pretrained_cfg

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # Drop-path and mixup draw from a state that the step decides: a resumed run repeats the uninterrupted one.
        run_seed = getattr(self.trainer.datamodule, "seed", 0)
        step = self.current_epoch * self.trainer.num_training_batches + batch_index
        seed = (run_seed * 1_000_003 + step * self.trainer.world_size + self.global_rank) % 2**32
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  timm's Mixup draws from the global generator

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        images, targets = batch
        if self.mixup is None:
            loss = F.cross_entropy(self.model(images), targets, label_smoothing=self.hparams.label_smoothing)
        else:
            images, targets = self.mixup(images, targets)  # (B, classes), already smoothed
            loss = F.cross_entropy(self.model(images), targets)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update(self.model, step=self.global_step)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _evaluated(self, stage: str) -> Iterator[tuple[str, nn.Module, nn.ModuleDict]]:
        yield stage, self.model, self.metrics[stage]
        if self.average is not None:
            yield f"{stage}_ema", self.average.module, self.metrics[f"{stage}_ema"]

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        for _, model, metrics in self._evaluated(stage):
            logits = model(images)
            metrics["loss"].update(F.cross_entropy(logits, labels), weight=len(labels))
            for name in metrics:
                if name != "loss":
                    metrics[name].update(logits, labels)

    def _log_metrics(self, stage: str) -> None:
        for name, _, metrics in self._evaluated(stage):
            values = {key: metric.compute() for key, metric in metrics.items()}
            for metric in metrics.values():
                metric.reset()
            scalars = {f"{name}/{key}": value for key, value in values.items() if value.ndim == 0}
            self.log_dict(scalars, sync_dist=True)  # every process holds the same values
            self.last_evaluation = {"stage": name, **values}  # the reports draw the confusion matrix from it

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["pretrained_cfg"] = self.model.pretrained_cfg

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.model.pretrained_cfg = self.final_model.pretrained_cfg = checkpoint["pretrained_cfg"]

    def configure_optimizers(self) -> dict[str, Any]:
        settings = self.hparams
        optimizer = create_optimizer_v2(
            self.model,
            opt="adamw",
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay if settings.layer_decay != 1 else None,
            fused=not self.trainer.precision.endswith("mixed"),  # which Lightning cannot clip the gradients of
        )
        if math.isinf(self.trainer.estimated_stepping_batches):
            raise ValueError("max_epochs and max_steps are both -1; the cosine needs an end")
        steps = int(self.trainer.estimated_stepping_batches)
        self.trainer.fit_loop.setup_data()  # done already, unless the run's end is given in steps
        steps_per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        warmup = min(steps - 1, round(settings.warmup_epochs * steps_per_epoch))
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(1, steps - warmup),
            lr_min=settings.minimum_learning_rate,
            warmup_t=warmup,
            warmup_lr_init=settings.warmup_learning_rate,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: CosineLRScheduler, metric: Any) -> None:
        scheduler.step_update(num_updates=self.global_step)
