"""Training of the tiny reader as Lightning modules: first its eyes, then its answers.

    python -m multimodal fit --config configs/multimodal/tiny_vision.yaml
    python -m multimodal fit --config configs/multimodal/tiny_where.yaml
    python -m multimodal fit --config configs/multimodal/tiny_reader.yaml

Each goes on from the model that the one before left in `<run>/model`.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F

from multimodal.argument_checks import check_real, check_whole
from multimodal.tiny_reader.dialogues import IGNORED, Dialogues, hidden_states
from multimodal.tiny_reader.evaluation import cell_scores, question_scores
from multimodal.tiny_reader.lessons import LabelledViews
from multimodal.tiny_reader.model import TinyReaderForConditionalGeneration, tiny_configuration
from multimodal.tiny_reader.processing import BACKGROUND_IDS, LABEL_IDS, build_processor
from multimodal.tiny_reader.scenes import Scene
from multimodal.tiny_reader.views import ABSENT, UNASKED, normalised


class ReaderTraining(pl.LightningModule):
    """What both trainings share: the optimiser, and the folder that holds the model in the end.

    The optimiser is AdamW with betas 0.9 and 0.98 and a weight decay of 0.01; its rate rises for `warmup` steps and
    falls as a cosine to `last` of its highest. The trainer's `gradient_clip_val` is meant to be 1.

    Args:
        model: to train.
        learning_rate: the highest.
        warmup: steps.
        last: share of the rate at the end.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the loss is not finite.
    """

    def __init__(
        self, model: TinyReaderForConditionalGeneration, learning_rate: float, warmup: int, last: float
    ) -> None:
        super().__init__()
        if not check_real("learning_rate", learning_rate):
            raise ValueError(f"learning_rate is {learning_rate}; it must be above 0")
        self.learning_rate = learning_rate
        self.warmup = check_whole("warmup", warmup, 0)
        self.last = check_real("last", last, 0, 1)
        self.model = model

    @property
    def vision(self) -> nn.Module:
        return self.model.model.visual

    def groups(self) -> list[dict[str, Any]]:
        """Parameters with their rates."""
        return [{"params": list(self.parameters()), "lr": self.learning_rate}]

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch."""

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        loss = self.loss(batch)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss is {loss.item()} at step {self.global_step}: lower the learning rate")
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.groups(), betas=(0.9, 0.98), weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)

        def share(step: int) -> float:
            falling = 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
            return min(1, (step + 1) / (self.warmup + 1)) * (self.last + (1 - self.last) * falling)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_end(self) -> None:
        keeps = self.trainer.state.fn == TrainerFn.FITTING and self.trainer.checkpoint_callback is not None
        if keeps and self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir) / "model"
            self.model.save_pretrained(folder)
            build_processor().save_pretrained(folder)
            print(f"trained model: {folder}")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if batch and isinstance(batch[0], Dialogues | LabelledViews):
            return [part.to(device) for part in batch]
        return batch  # held-out scenes


class VisionTraining(ReaderTraining):
    """The eyes learn to name what is where, in the decoder's words.

    A cell's token is classified, for each label, by its products with the embeddings of the words that can be named,
    which are trained along, against a constant 0 for none of them: tokens come to be sums of the words they show.

    Args:
        width: of the decoder, a multiple of 32.
        learning_rate, warmup, last: see `ReaderTraining`.
    """

    def __init__(self, width: int = 96, learning_rate: float = 2e-3, warmup: int = 100, last: float = 0.02) -> None:
        super().__init__(TinyReaderForConditionalGeneration(tiny_configuration(width)), learning_rate, warmup, last)
        names = [*LABEL_IDS, "background"]
        self.sharpness = nn.ParameterDict({name: nn.Parameter(torch.tensor(3.0)) for name in names})

    def groups(self) -> list[dict[str, Any]]:
        words = self.model.get_input_embeddings().parameters()
        trained = [*self.vision.parameters(), *words, *self.sharpness.parameters()]
        return [{"params": trained, "lr": self.learning_rate}]

    def logits(self, tokens: Tensor, name: str, words: Sequence[int]) -> Tensor:
        return self.sharpness[name] * (tokens @ self.model.get_input_embeddings().weight[list(words)].T)

    def label_logits(self, tokens: Tensor) -> dict[str, Tensor]:
        """Of each label `[B, cells, 1 + classes]`, the first for none."""
        return {name: F.pad(self.logits(tokens, name, words), (1, 0)) for name, words in LABEL_IDS.items()}

    def loss(self, batch: Sequence[LabelledViews]) -> Tensor:
        return sum(self.view_loss(views) for views in batch)

    def view_loss(self, views: LabelledViews) -> Tensor:
        """Cross-entropies, of cells that show something and of those that do not each their mean."""
        tokens = self.vision.encode(normalised(views.pictures))
        total = tokens.new_zeros(())
        for name, logits in self.label_logits(tokens).items():
            labels = views.labels[name]
            losses = F.cross_entropy(logits.flatten(0, 1), (labels + 1).clamp(min=0).flatten(), reduction="none")
            losses, asked = losses.view_as(labels), labels != UNASKED
            shown = asked & (labels != ABSENT)
            if shown.any():
                total = total + losses[shown].mean() + losses[asked & ~shown].mean()
        backgrounds = views.backgrounds[:, None].expand(-1, tokens.shape[1])
        logits = self.logits(tokens, "background", BACKGROUND_IDS)
        return total + F.cross_entropy(logits.flatten(0, 1), backgrounds.flatten())

    def validation_step(self, batch: Sequence[Scene], batch_index: int) -> None:
        def classified(pictures: Tensor) -> dict[str, Tensor]:
            tokens = self.vision.encode(normalised(pictures.to(self.device)))
            return {name: logits.argmax(-1).cpu() - 1 for name, logits in self.label_logits(tokens).items()}

        scores = {f"val/{name}": value for name, value in cell_scores(classified, batch).items()}
        self.log_dict(scores, prog_bar=True, batch_size=len(batch))


class AnswerTraining(ReaderTraining):
    """The decoder learns to answer, by next-token prediction of the answers.

    Args:
        start: folder of the model to go on from.
        likeness: standard deviation of new weights for queries and keys, the same for both, so that tokens attend to
            what is like them before anything is learnt; `None` keeps those that `start` has.
        copying: standard deviation of new weights for values and, transposed, for outputs, so that a token takes over
            what it attends to; `None` keeps those that `start` has.
        vision_rate: share of the learning rate for the eyes, 0 to freeze them.
        learning_rate, warmup, last: see `ReaderTraining`.
    """

    def __init__(
        self,
        start: str,
        likeness: float | None = None,
        copying: float | None = None,
        vision_rate: float = 0.1,
        learning_rate: float = 2e-3,
        warmup: int = 50,
        last: float = 0.02,
    ) -> None:
        super().__init__(TinyReaderForConditionalGeneration.from_pretrained(start), learning_rate, warmup, last)
        self.vision_rate = check_real("vision_rate", vision_rate, 0, 1)
        self.vision.requires_grad_(vision_rate > 0)
        for name, value in (("likeness", likeness), ("copying", copying)):
            if value is not None:
                check_real(name, value)
        start_attention(self.model, likeness, copying)

    def groups(self) -> list[dict[str, Any]]:
        groups = [{"params": list(self.model.model.language_model.parameters()), "lr": self.learning_rate}]
        if self.vision_rate:
            groups.append({"params": list(self.vision.parameters()), "lr": self.learning_rate * self.vision_rate})
        return groups

    def loss(self, batch: Sequence[Dialogues]) -> Tensor:
        total = torch.zeros((), device=self.device)
        for dialogues in batch:
            features = [self.vision.encode(normalised(pictures)) for pictures in dialogues.pictures]
            hidden = hidden_states(self.model, dialogues, features)[:, :-1]
            following = dialogues.labels[:, 1:]
            asked = following != IGNORED
            total = total + F.cross_entropy(self.model.lm_head(hidden[asked]), following[asked])
        return total

    def validation_step(self, batch: Sequence[Scene], batch_index: int) -> None:
        scores = {f"val/{name}": value for name, value in question_scores(self.model, batch).items()}
        self.log_dict(scores, prog_bar=True, batch_size=len(batch))


@torch.no_grad()
def start_attention(
    model: TinyReaderForConditionalGeneration, likeness: float | None = None, copying: float | None = None
) -> None:
    """New attention weights for all decoder layers, after "mimetic initialisation" (arXiv 2305.09828).

    Queries are made equal to keys and outputs to transposed values, so that the products of both are near to multiples
    of the identity. From weights without that start, tokens did not learn to attend to the cells of their own colour.

    Args:
        likeness: standard deviation of the weights of queries and keys; `None` leaves them.
        copying: of those of values and outputs.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        if likeness is not None:
            attention.q_proj.weight.normal_(0, likeness)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
        if copying is not None:
            attention.v_proj.weight.normal_(0, copying)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
