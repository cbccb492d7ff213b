"""Training of LINA: `LinaTraining` holds the loss, the optimiser and the moving average of the weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from generation.lina.autoencoder import TinyAutoencoder
from generation.lina.embeddings import patchify
from generation.lina.packaged_text_encoder import PackagedTextEncoder
from generation.lina.pipeline import LinaPipeline
from generation.lina.shipped_models import SHIPPED, folder_of
from generation.lina.text_encoder import WordTextEncoder
from generation.lina.token_denoiser import FlowSchedule
from generation.lina.transformer import LinaTransformer
from generation.numbered_batches import generator_of_batch
from training_runs.atomic_files import write_folder_atomically


class LinaTraining(pl.LightningModule):
    """Flow matching of masked tokens.

    Batches are dictionaries: `image` `[B, 3, h, w]` in [-1, 1], and `caption`, B strings, or `features`, those of a
    frozen text encoder, `[length_i, text_dim]` each, or `label`, `[B]`.

    Args:
        transformer: arguments of `LinaTransformer`.
        autoencoder: folder of a trained `TinyAutoencoder`, or the shipped model whose it is; it is frozen.
        text_encoder: arguments of a `WordTextEncoder` trained along; or "packaged" where batches hold the features of
            a `PackagedTextEncoder`; or None where they hold other features, or labels.
        learning_rate: of AdamW, reached after `warmup_steps`, kept for `flat` of the run, then falling to 1 % of it.
        betas: of AdamW.
        weight_decay: of everything but the norms, as published.
        warmup_steps: of a linear warm-up.
        flat: share of the run before the rate falls.
        ema_decay: of the moving average of the weights at its slowest; it is min(ema_decay, (1 + i) / (10 + i)).
        loss_repeat: noises and times for each condition.
        least_masked: share of tokens masked at least.
        prompt_dropout: share of captions the model is not told.
        shift: of the noise levels.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the loss is not finite.
    """

    def __init__(
        self,
        transformer: dict[str, Any],
        autoencoder: str,
        text_encoder: dict[str, Any] | Literal["packaged"] | None = None,
        learning_rate: float = 1.5e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.02,
        warmup_steps: int = 200,
        flat: float = 0.3,
        ema_decay: float = 0.998,
        loss_repeat: int = 2,
        least_masked: float = 0.7,
        prompt_dropout: float = 0.1,
        shift: float = 1.0,
    ):
        super().__init__()
        for name, value, valid, words in (
            ("learning_rate", learning_rate, learning_rate > 0, "above 0"),
            ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
            ("warmup_steps", warmup_steps, warmup_steps >= 0, "at least 0"),
            ("flat", flat, 0 <= flat < 1, "at least 0 and below 1"),
            ("ema_decay", ema_decay, 0 <= ema_decay < 1, "at least 0 and below 1"),
            ("loss_repeat", loss_repeat, loss_repeat >= 1, "at least 1"),
            ("least_masked", least_masked, 0 <= least_masked < 1, "at least 0 and below 1"),
            ("prompt_dropout", prompt_dropout, 0 <= prompt_dropout <= 1, "from 0 to 1"),
            ("shift", shift, shift > 0, "above 0"),
        ):
            if not valid:
                raise ValueError(f"{name} is {value}; it must be {words}")
        self.save_hyperparameters()
        self.transformer = LinaTransformer(**transformer)
        self.text_encoder = WordTextEncoder(**text_encoder) if isinstance(text_encoder, dict) else None
        self.autoencoder = TinyAutoencoder.from_pretrained(
            folder_of(autoencoder) / "vae" if autoencoder in SHIPPED else autoencoder, low_cpu_mem_usage=False
        )
        self.autoencoder.requires_grad_(False).eval()
        self.schedule = FlowSchedule(shift)
        self.seed = torch.initial_seed() % 2**31
        self.average = EMAModel(self._trained(), decay=ema_decay)

    def _trained(self) -> list[nn.Parameter]:
        networks = [self.transformer, *([] if self.text_encoder is None else [self.text_encoder])]
        return [parameter for network in networks for parameter in network.parameters()]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the networks have the moving average as weights, and are in evaluation mode."""
        trained, modes = self._trained(), [(module, module.training) for module in self.modules()]
        self.average.store(trained)
        self.average.copy_to(trained)
        self.eval()
        try:
            yield
        finally:
            self.average.restore(trained)
            for module, mode in modes:
                module.training = mode

    def pipeline(self) -> LinaPipeline:
        """The networks, with the weights that they have now, as a pipeline."""
        encoder = PackagedTextEncoder() if self.hparams.text_encoder == "packaged" else self.text_encoder
        scheduler = FlowMatchEulerDiscreteScheduler(shift=self.hparams.shift)
        return LinaPipeline(self.transformer, self.autoencoder, scheduler, encoder)

    def condition_of(self, batch: dict[str, Any]) -> Sequence[Tensor] | Tensor:
        """What `LinaTransformer.embed_condition` takes, of all images."""
        if "label" in batch:
            return batch["label"]
        return batch["features"] if self.text_encoder is None else self.text_encoder(batch["caption"])

    def tokens_of(self, images: Tensor) -> Tensor:
        """`[B, N, D]` latent tokens of `[B, 3, h, w]` images."""
        with torch.no_grad():
            latents = self.autoencoder.encode(images).latent_dist.mode() * self.autoencoder.config.scaling_factor
        return patchify(latents, self.transformer.config.patch_size)

    def loss(self, batch: dict[str, Any], dropout: float, generator: torch.Generator | None = None) -> Tensor:
        """The loss of a batch, of whose captions a share `dropout` is hidden; `generator` lies on the same device."""
        tokens = self.tokens_of(batch["image"])
        condition = self.condition_of(batch)
        dropped = torch.rand(len(tokens), generator=generator, device=tokens.device) < dropout
        nothing = self.transformer.unconditional(len(tokens))
        if isinstance(condition, Tensor):
            condition = torch.where(dropped, nothing, condition)
        else:
            # What is dropped stays in the graph, for each process of a distributed run needs all gradients.
            unused = sum((c.sum() * 0 for c in condition), tokens.new_zeros(()))
            condition = [n if drop else c for n, c, drop in zip(nothing, condition, dropped.tolist(), strict=True)]
            tokens = tokens + unused
        settings = self.hparams
        draw = self.transformer.draw(tokens, self.schedule, settings.loss_repeat, settings.least_masked, generator)
        return self.transformer(tokens, condition, draw, self.schedule)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        generator = generator_of_batch(self, self.seed, batch_index)
        loss = self.loss(batch, self.hparams.prompt_dropout, generator)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss is {loss.item()} at step {self.global_step}: lower the learning rate")
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["image"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """The loss, with the same noise at every validation, of the weights and of their moving average."""
        with self.averaged():
            averaged = self.loss(batch, 0.0, torch.Generator(self.device).manual_seed(batch_index))
        loss = self.loss(batch, 0.0, torch.Generator(self.device).manual_seed(batch_index))
        losses, size = {"val/loss": loss, "val/loss_of_average": averaged}, len(batch["image"])
        self.log_dict(losses, prog_bar=True, sync_dist=True, batch_size=size)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        # Not in a hook after the batch: Lightning writes checkpoints before it comes to the module's hooks.
        super().optimizer_step(*arguments, **options)
        self.average.step(self._trained())

    def on_fit_start(self) -> None:
        self.average.to(self.device)

    on_validation_start = on_fit_start

    @rank_zero_only
    def on_train_end(self) -> None:
        """Leave the moving average as `<run>/pipeline`, in a run that leaves checkpoints."""
        if self.trainer.checkpoint_callback is None:
            return
        folder = Path(self.trainer.default_root_dir) / "pipeline"
        with self.averaged():
            write_folder_atomically(folder, self.pipeline().save_pretrained)
        print(f"trained model: {folder}\ndraw with it:  python -m generation sample PROMPT --model {folder}")

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip for a fused optimiser, with which gradients scaled for float16 cannot be clipped.
        if gradient_clip_val:
            if gradient_clip_algorithm not in (None, "norm"):
                raise ValueError(f"gradient_clip_algorithm is {gradient_clip_algorithm!r}; LINA is clipped by 'norm'")
            if self.trainer.precision == "16-mixed":
                raise ValueError(
                    "precision is '16-mixed', which cannot be clipped here; valid are 'bf16-mixed', '32-true'"
                )
            nn.utils.clip_grad_norm_(self._trained(), gradient_clip_val)

    def configure_optimizers(self) -> dict[str, Any]:
        settings = self.hparams
        norms = {id(p) for module in self.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
        trained = [parameter for parameter in self._trained() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) not in norms], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if id(p) in norms], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, settings.learning_rate, settings.betas, fused=True)
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            if step < settings.warmup_steps:
                return (step + 1) / settings.warmup_steps
            fallen = (step / total - settings.flat) / (1 - settings.flat)
            return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(max(fallen, 0.0), 1.0)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.average.load_state_dict(checkpoint["average"])
