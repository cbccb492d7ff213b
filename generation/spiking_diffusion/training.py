"""Training of spiking diffusion: `SpikingDiffusionTraining` holds the loss, the optimiser and the moving average."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from generation.argument_checks import check_choice
from generation.loaded_weights import quiet_loading
from generation.model_folders import folder_of
from generation.numbered_batches import generator_of_batch
from generation.spiking_diffusion.image_sets import LabelledImages
from generation.spiking_diffusion.pipeline import SpikingDiffusionPipeline, ddim_scheduler
from generation.spiking_diffusion.quantized_unet import QuantizedUNet2DModel
from generation.spiking_diffusion.shipped_models import SHIPPED
from generation.spiking_diffusion.unet import SpikingUNet2DModel
from training_runs.atomic_files import write_folder_atomically

NETWORKS = {"spiking": SpikingUNet2DModel, "quantized": QuantizedUNet2DModel}


class SpikingDiffusionTraining(pl.LightningModule):
    """Mean squared error of the predicted noise.

    Batches are dictionaries: `image` `[B, C, S, S]` in [-1, 1] and, for a class-conditional model, `label` `[B]`.

    Args:
        unet: arguments of the network.
        network: "spiking", a `SpikingUNet2DModel`, or "quantized", a `QuantizedUNet2DModel` to be converted afterwards.
        init_from: the weights to begin with: a shipped model, or the folder of a saved model, pipeline or run.
            Temporal-wise scales that they lack begin as ones: the second stage of SDM's training.
        learning_rate: of AdamW, reached after `warmup_steps`, falling to 2 % of it along a cosine.
        weight_decay: of the weights of convolutions and linear layers, and of the classes' embedding.
        warmup_steps: of a linear warm-up.
        ema_decay: of the moving average of weights and batch-norm statistics at its slowest; it is
            min(ema_decay, (1 + i) / (10 + i)).
        label_dropout: share of labels the model is not told.

    Raises:
        ValueError: an argument is out of range, or `init_from` does not fit the model.
        RuntimeError: the loss is not finite.
    """

    def __init__(
        self,
        unet: dict[str, Any],
        network: Literal["spiking", "quantized"] = "spiking",
        init_from: str | None = None,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 100,
        ema_decay: float = 0.998,
        label_dropout: float = 0.1,
    ):
        super().__init__()
        check_choice("network", network, tuple(NETWORKS))
        for name, value, valid, words in (
            ("learning_rate", learning_rate, learning_rate > 0, "above 0"),
            ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
            ("warmup_steps", warmup_steps, warmup_steps >= 0, "at least 0"),
            ("ema_decay", ema_decay, 0 <= ema_decay < 1, "at least 0 and below 1"),
            ("label_dropout", label_dropout, 0 <= label_dropout <= 1, "from 0 to 1"),
        ):
            if not valid:
                raise ValueError(f"{name} is {value}; it must be {words}")
        self.save_hyperparameters()
        # A tenth faster on CPU: convolutions need not reorder what they read.
        self.unet = NETWORKS[network](**unet).to(memory_format=torch.channels_last)
        if init_from is not None:
            self._begin_with(folder_of(init_from, SHIPPED))
        self.scheduler = ddim_scheduler(self.unet.config.num_train_timesteps)
        self.seed = torch.initial_seed() % 2**31
        self.average = AveragedModel(self.unet, multi_avg_fn=self._update_average, use_buffers=True)
        self.average.requires_grad_(False)

    def setup(self, stage: str) -> None:
        """See that the data is what the network is for.

        Raises:
            ValueError: images have another size or other channels, or there are other classes.
        """
        data = getattr(getattr(self.trainer, "datamodule", None), "data", None)
        if not isinstance(data, LabelledImages):
            return
        config, (channels, size) = self.unet.config, data.images.shape[1:3]
        pairs = [("sample_size", size), ("in_channels", channels)]
        if config.num_class_embeds is not None:
            pairs.append(("num_class_embeds", len(data.names)))
        for name, wanted in pairs:
            if config[name] != wanted:
                raise ValueError(f"{name} is {config[name]}; of these data it must be {wanted}")

    def _begin_with(self, folder: Path) -> None:
        candidates = (folder, folder / "unet", folder / "pipeline" / "unet")
        found = next((candidate for candidate in candidates if (candidate / "config.json").is_file()), None)
        if found is None:
            raise ValueError(f"init_from is {str(folder)!r}; expected the folder of a saved model, pipeline or run")
        kind, wanted = json.loads((found / "config.json").read_text()).get("_class_name"), type(self.unet)
        if kind != wanted.__name__:
            raise ValueError(f"init_from is {str(folder)!r}, a {kind}; a {wanted.__name__} is needed")
        state = wanted.from_pretrained(found, local_files_only=True, **quiet_loading()).state_dict()
        ours, theirs = ({name: value.shape for name, value in s.items()} for s in (self.unet.state_dict(), state))
        new = {name for name in ours.keys() - theirs.keys() if name.endswith(".step_scale")}
        if wrong := [name for name in ours | theirs if name not in new and ours.get(name) != theirs.get(name)]:
            raise ValueError(f"init_from is {str(folder)!r}; it differs from the model: {', '.join(wrong[:5])}")
        self.unet.load_state_dict(state, strict=False)

    @torch.no_grad()
    def _update_average(self, averages: list[Tensor], values: list[Tensor], updates: Tensor | int) -> None:
        if not averages[0].is_floating_point():  # how many batches the norms have seen
            torch._foreach_copy_(averages, values)
            return
        decay = min(self.hparams.ema_decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(averages, values, 1 - decay)

    def pipeline(self) -> SpikingDiffusionPipeline:
        """The moving average, as a pipeline."""
        return SpikingDiffusionPipeline(self.average.module.eval(), self.scheduler)

    def loss(self, unet: nn.Module, batch: dict[str, Tensor], dropout: float, generator: torch.Generator) -> Tensor:
        """The loss of a batch, of whose labels a share `dropout` is hidden; `generator` lies on the same device."""
        images, where = batch["image"], {"generator": generator, "device": self.device}
        timestep = torch.randint(self.scheduler.config.num_train_timesteps, (len(images),), **where)
        noise, labels = torch.randn(images.shape, **where), None
        if (classes := self.unet.config.num_class_embeds) is not None:
            hidden = torch.rand(len(images), **where) < dropout
            labels = torch.where(hidden, classes, batch["label"])
        noisy = self.scheduler.add_noise(images, noise, timestep)
        return F.mse_loss(unet(noisy, timestep, labels).sample.float(), noise)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        generator = generator_of_batch(self, self.seed, batch_index)
        loss = self.loss(self.unet, batch, self.hparams.label_dropout, generator)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss is {loss.item()} at step {self.global_step}: lower the learning rate")
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["image"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """The moving average's loss, with the same noise at every validation."""
        generator = torch.Generator(self.device).manual_seed(batch_index)
        loss = self.loss(self.average.module.eval(), batch, 0.0, generator)
        self.log("val/loss_of_average", loss, prog_bar=True, sync_dist=True, batch_size=len(batch["image"]))

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        # Not in a hook after the batch: Lightning writes checkpoints before it comes to the module's hooks.
        super().optimizer_step(*arguments, **options)
        self.average.update_parameters(self.unet)

    @rank_zero_only
    def on_train_end(self) -> None:
        """Leave the moving average as `<run>/pipeline`, in a run that leaves checkpoints."""
        if self.trainer.checkpoint_callback is None:
            return
        folder = Path(self.trainer.default_root_dir) / "pipeline"
        write_folder_atomically(folder, self.pipeline().save_pretrained)
        command = f"python -m generation sample-spiking --model {folder} --output grid.png"
        print(f"trained model: {folder}\ndraw with it:  {command}")

    def configure_optimizers(self) -> dict[str, Any]:
        settings = self.hparams
        trained = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, settings.learning_rate)
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            if step < settings.warmup_steps:
                return (step + 1) / settings.warmup_steps
            return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
