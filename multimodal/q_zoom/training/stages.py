"""The stages of Q-Zoom's training as Lightning modules: region proposal (1, 2.5), targeted tuning (2) and gate (3).

Batches are lists of `ZoomSample`. A run leaves the branches in `<run>/branches`, and those of the lowest validation
loss in `<run>/best`, folders that `QZoom.from_pretrained(..., heads=...)` and the next stage read; stage 2 leaves its
model in `<run>/model` besides. Checkpoints hold what is trained, never the frozen backbone.

Source: arXiv 2604.06912, its code's rates and schedules; see each class.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from multimodal.argument_checks import check_real
from multimodal.q_zoom.images import opened
from multimodal.q_zoom.model import QZoom
from multimodal.q_zoom.pseudo_labels import IGNORED, QWEN_RULES, LabelRules, content_mask, pseudo_labels, region_loss
from multimodal.q_zoom.regions import cells_touched, find_regions
from multimodal.q_zoom.training.loading import load_zoom
from multimodal.q_zoom.training.padded_rows import TapRow, gate_logits, score_maps, tap_rows
from multimodal.q_zoom.training.prompts import prompts_of
from multimodal.q_zoom.training.sample_data import ZoomData
from multimodal.q_zoom.training.samples import ZoomSample

SEED_STRIDE = 0x7F4A7C15


class Mean(NamedTuple):
    """A mean over samples of a batch, and over how many."""

    value: float
    count: int


class ZoomStage(pl.LightningModule):
    """What the stages share: the model, the optimiser, and what is kept.

    The optimiser is AdamW under a cosine that falls to 0 after a linear warm-up; the trainer's `gradient_clip_val`
    clips (1.0 as published).

    Args:
        backbone, heads, settings: as of `load_zoom`.
        learning_rate: the highest.
        warmup: share of the run until it is reached, in [0, 1).
        betas, weight_decay: of AdamW; norms and biases do not decay.
        options: of the model's `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: an argument is out of range, or the model cannot be made (see `load_zoom`); when a run begins, the
            data do not keep the samples that are to be remembered.
        RuntimeError: the loss is not finite.
    """

    measures: tuple[str, ...] = ("loss",)  # of `scores`: processes must log the same, whatever their samples tell
    remember = False

    def __init__(
        self,
        backbone: str,
        heads: str | None,
        settings: dict[str, Any] | str | None,
        learning_rate: float,
        warmup: float,
        betas: tuple[float, float],
        weight_decay: float,
        options: dict[str, Any] | None,
    ):
        super().__init__()
        if not check_real("learning_rate", learning_rate):
            raise ValueError(f"learning_rate is {learning_rate}; it must be above 0")
        check_real("weight_decay", weight_decay)
        for name, value in (("warmup", warmup), *((f"betas[{i}]", beta) for i, beta in enumerate(betas))):
            if check_real(name, value, 0, 1) == 1:
                raise ValueError(f"{name} is {value}; it must be below 1")
        self.learning_rate, self.warmup, self.betas, self.weight_decay = learning_rate, warmup, betas, weight_decay
        self.zoom = load_zoom(backbone, heads, settings, **(options or {}))
        self.seed = torch.initial_seed() % 2**31
        self.lowest = math.inf  # validation loss so far
        self.zoom.requires_grad_(False).eval()
        for part in self.trained():
            part.requires_grad_(True)

    @abstractmethod
    def trained(self) -> list[nn.Module]:
        """The parts of the model that this stage trains."""

    @abstractmethod
    def loss(self, samples: Sequence[ZoomSample], generator: torch.Generator | None = None) -> Tensor:
        """The loss of a batch, of what chance there is in it drawn from `generator`."""

    @abstractmethod
    def scores(self, samples: Sequence[ZoomSample]) -> dict[str, Mean]:
        """The `measures` of a validation batch, but those that none of its samples tells."""

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if self.remember and isinstance(data, ZoomData) and not data.keeps_samples:
            raise ValueError(
                f"remember is True, but {type(data).__name__} makes new samples of every epoch, by which what is kept "
                "would grow without end; set the data's in_memory to true and num_workers to 0, or remember to false"
            )

    def training_step(self, batch: Sequence[ZoomSample], batch_index: int) -> Tensor:
        accumulated = self.trainer.accumulate_grad_batches
        number = self.global_step * accumulated + batch_index % accumulated
        # The CPU's generator takes 32 bits; the stride, odd, keeps runs whose seeds are near apart.
        drawn = (self.seed * SEED_STRIDE + number * 4096 + self.global_rank) % 2**32
        generator = torch.Generator().manual_seed(drawn)
        loss = self.loss(batch, generator)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss is {loss.item()} at step {self.global_step}: lower the learning rate")
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Sequence[ZoomSample], batch_index: int) -> None:
        scores = self.scores(batch) if batch else {}  # the last batch may leave a process without
        for name in self.measures:
            value, count = scores.get(name, Mean(0.0, 0))
            self.log(f"val/{name}", value, prog_bar=True, sync_dist=True, batch_size=count)

    def on_validation_end(self) -> None:
        metrics = self.trainer.callback_metrics
        if not self.trainer.sanity_checking and self._leaves_files() and "val/loss" in metrics:
            loss = float(metrics["val/loss"])
            if loss < self.lowest:
                self.lowest = loss
                self._save("best")

    def on_train_end(self) -> None:
        if self._leaves_files():
            self._save("branches")
            print(f"trained branches: {Path(self.trainer.default_root_dir) / 'branches'}")

    def _leaves_files(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING and self.trainer.checkpoint_callback is not None

    @rank_zero_only
    def _save(self, name: str) -> None:
        self.zoom.save_pretrained(str(Path(self.trainer.default_root_dir) / name))

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], self.learning_rate, self.betas)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(self.warmup * total), total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = self._trained_names()
        checkpoint["state_dict"] = {name: checkpoint["state_dict"][name] for name in names}
        checkpoint["lowest"] = self.lowest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names, given = set(self._trained_names()), set(checkpoint["state_dict"])
        if names != given:
            raise ValueError(
                f"the checkpoint is not of this stage or model: missing {sorted(names - given)[:3]}, "
                f"unknown {sorted(given - names)[:3]}"
            )
        self.strict_loading = False  # the frozen parts are not in it
        self.lowest = checkpoint["lowest"]

    def _trained_names(self) -> list[str]:
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]


class SampleMemory:
    """What samples become before anything that is trained, kept so that later epochs need not make it again.

    Args:
        make: what samples become, one each.
        kept: keep it, by the identity of the samples.
    """

    def __init__(self, make: Callable[[Sequence[ZoomSample]], list], kept: bool) -> None:
        self.make, self.kept = make, kept
        self._made: dict[int, tuple[ZoomSample, Any]] = {}

    def of(self, samples: Sequence[ZoomSample]) -> list:
        """What `samples` become, in order."""
        if not self.kept:
            return self.make(samples)
        missing = [sample for sample in samples if id(sample) not in self._made]
        if missing:
            # The sample is kept too, or another could get its identity.
            made = zip(missing, self.make(missing), strict=True)
            self._made |= {id(sample): (sample, result) for sample, result in made}
        return [self._made[id(sample)][1] for sample in samples]


def rows_of(zoom: QZoom, samples: Sequence[ZoomSample]) -> list[TapRow]:
    """The samples' questions read to the tap."""
    return tap_rows(zoom.adapter, prompts_of(zoom, samples), zoom.config.tap_layer)


class RegionProposalTraining(ZoomStage):
    """Stage 1: the region proposal learns where the backbone looks while it answers (SD-RPN, arXiv 2509.16944).

    Binary cross-entropy over the labelled cells of a batch, against labels made of the attention that samples carry
    (`pseudo_labels`). With `heads` given it goes on from trained branches, which with samples labelled by a tuned
    backbone is stage 2.5. Layers after the tap are not run.

    Args:
        backbone, heads, settings, options: see `ZoomStage`.
        rules: how attention becomes labels.
        learning_rate, warmup, betas, weight_decay: see `ZoomStage`; the defaults are the published ones.
        remember: keep labels and what the frozen layers make of every sample; for data that keep their samples in
            memory (see `ZoomData.keeps_samples`).
    """

    measures = ("loss", "labelled", "hit", "inside", "area")

    def __init__(
        self,
        backbone: str,
        heads: str | None = None,
        settings: dict[str, Any] | str | None = None,
        rules: LabelRules = QWEN_RULES,
        learning_rate: float = 1e-4,
        warmup: float = 0.03,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        remember: bool = False,
        options: dict[str, Any] | None = None,
    ):
        super().__init__(backbone, heads, settings, learning_rate, warmup, betas, weight_decay, options)
        self.remember = remember
        self.rows = SampleMemory(partial(rows_of, self.zoom), remember)
        self.labels = SampleMemory(lambda samples: [labels_of(sample, rules) for sample in samples], remember)

    def trained(self) -> list[nn.Module]:
        return [self.zoom.proposal]

    def loss(self, samples: Sequence[ZoomSample], generator: torch.Generator | None = None) -> Tensor:
        return region_loss(self._maps(samples), self.labels.of(samples))

    @torch.no_grad()
    def scores(self, samples: Sequence[ZoomSample]) -> dict[str, Mean]:
        """The loss; "labelled", the share of samples that teach anything; and of those whose box is known: "hit", the
        highest cell is in it, "inside", how much of it the proposed regions hold, "area", their share of the image.

        Where no box is known at all, validation logs the latter three as not a number.
        """
        maps, labels = self._maps(samples), self.labels.of(samples)
        taught = [float((cells != IGNORED).any()) for cells in labels]
        count = len(samples)
        scores = {"loss": Mean(float(region_loss(maps, labels)), count), "labelled": Mean(sum(taught) / count, count)}
        known = [(sample, cells) for sample, cells in zip(samples, maps, strict=True) if sample.box is not None]
        if known:
            found = [region_scores(self.zoom, sample, cells) for sample, cells in known]
            scores |= {name: Mean(sum(one[name] for one in found) / len(found), len(found)) for name in found[0]}
        return scores

    def _maps(self, samples: Sequence[ZoomSample]) -> list[Tensor]:
        return score_maps(self.zoom.adapter, self.zoom.proposal, self.rows.of(samples))


class GateTraining(ZoomStage):
    """Stage 3: the gate learns which questions need a closer look; binary cross-entropy with the samples' `zoom`.

    The region proposal stays as it is, a first layer that both share included. Layers after the tap are not run.

    Args:
        backbone, heads, settings, options: see `ZoomStage`; `heads` are those of stage 1.
        learning_rate, warmup, betas, weight_decay: see `ZoomStage`; the defaults are the published ones.
        remember: as of `RegionProposalTraining`.
    """

    measures = ("loss", "accuracy", "opened")

    def __init__(
        self,
        backbone: str,
        heads: str | None = None,
        settings: dict[str, Any] | str | None = None,
        learning_rate: float = 1e-4,
        warmup: float = 0.03,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        remember: bool = False,
        options: dict[str, Any] | None = None,
    ):
        super().__init__(backbone, heads, settings, learning_rate, warmup, betas, weight_decay, options)
        self.remember = remember
        self.rows = SampleMemory(partial(rows_of, self.zoom), remember)

    def trained(self) -> list[nn.Module]:
        shared = self.zoom.config.share_first_layer
        return [*self.zoom.gate.layers[1 if shared else 0 :], self.zoom.gate.head]

    def loss(self, samples: Sequence[ZoomSample], generator: torch.Generator | None = None) -> Tensor:
        return gate_loss(self._logits(samples), samples)

    @torch.no_grad()
    def scores(self, samples: Sequence[ZoomSample]) -> dict[str, Mean]:
        """The loss, "accuracy" at a probability of 0.5, and "opened", the share that is looked at closely at the
        configuration's threshold."""
        logits = self._logits(samples)
        right = (logits >= 0) == zoom_targets(samples, logits).bool()
        opened_at = logits.sigmoid() >= self.zoom.config.gate_threshold
        means = (gate_loss(logits, samples), right.float().mean(), opened_at.float().mean())
        return {name: Mean(float(mean), len(samples)) for name, mean in zip(self.measures, means, strict=True)}

    def _logits(self, samples: Sequence[ZoomSample]) -> Tensor:
        return gate_logits(self.zoom.adapter, self.zoom.gate, self.rows.of(samples)).float()


def zoom_targets(samples: Sequence[ZoomSample], like: Tensor) -> Tensor:
    """The samples' `zoom` as numbers.

    Raises:
        ValueError: a sample has none.
    """
    unlabelled = next((index for index, sample in enumerate(samples) if sample.zoom is None), None)
    if unlabelled is not None:
        raise ValueError(f"sample {samples[unlabelled].question!r} has no zoom, 0 or 1, which the gate learns from")
    return torch.tensor([float(sample.zoom) for sample in samples]).to(like)


def gate_loss(logits: Tensor, samples: Sequence[ZoomSample]) -> Tensor:
    """Binary cross-entropy of the gate's logits `[B]`, the mean over samples."""
    return F.binary_cross_entropy_with_logits(logits, zoom_targets(samples, logits))


def labels_of(sample: ZoomSample, rules: LabelRules) -> Tensor:
    """The labels of the sample's cells, `[rows, columns]`.

    Raises:
        ValueError: the sample carries no attention, or none that can be labelled.
    """
    if sample.grounding is None:
        raise ValueError(f"sample {sample.question!r} has no grounding, the attention that the proposal learns from")
    sink = torch.zeros_like(sample.grounding) if sample.sink is None else sample.sink
    content = None
    if sample.square:
        content = content_mask(opened(sample.image).size, sample.grounding.shape[0])
    return pseudo_labels(sample.grounding, sink, rules, content=content).labels


def region_scores(zoom: QZoom, sample: ZoomSample, cells: Tensor) -> dict[str, float]:
    """What a score map `[rows, columns]` proposes against the sample's box; see `RegionProposalTraining.scores`.

    Sinks of the first token (Qwen3-VL) are not left out.
    """
    config, grid = zoom.config, tuple(cells.shape)
    found = find_regions(
        cells.float(),
        threshold=config.region_threshold,
        sink=config.sink if config.sink == "corner" else "none",
        box_mode=config.box_mode,
        max_boxes=config.max_boxes,
        margin_cells=config.margin_cells,
    )
    size = sample.picture().size
    touched = cells_touched(sample.box, grid, size)
    row, column = divmod(int(cells.argmax()), grid[1])
    left, top, right, bottom = sample.box
    scale_x, scale_y = size[0] / grid[1], size[1] / grid[0]
    overlaps = [
        max(0, min(right, box.right * scale_x) - max(left, box.left * scale_x))
        * max(0, min(bottom, box.bottom * scale_y) - max(top, box.top * scale_y))
        for box in found.boxes
    ]
    return {
        "hit": float(touched.top <= row < touched.bottom and touched.left <= column < touched.right),
        "inside": min(1.0, sum(overlaps) / ((right - left) * (bottom - top))),
        "area": sum(box.width * box.height for box in found.boxes) / cells.numel(),
    }
