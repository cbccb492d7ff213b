"""Training of the tiny autoencoder.

    python -m generation.lina.autoencoder_training --output runs/lina_autoencoder

trains it on captioned shapes on one CPU core (7 minutes on a busy one), prints the quality on held-out pictures
(36.8 dB; the checker finds every reconstruction right) and writes a folder for `TinyAutoencoder.from_pretrained`.

    python -m generation.lina.autoencoder_training --data emoji --output runs/emoji_autoencoder \\
        --images 280000 --precision bf16-mixed

does the same on OpenMoji at 48 pixels (7.5 minutes of one core; 31.6 dB on held-out pictures, 30.7 in training).
"""

import math
import time
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from generation.lina.autoencoder import TinyAutoencoder
from generation.lina.captioned_shapes import CaptionedShapes, draw, held_out_prompts
from generation.lina.openmoji import CaptionedEmoji, split_emoji, to_signed
from generation.lina.shape_checker import check

Data = Literal["shapes", "emoji"]
# Arguments of the autoencoder of each kind of data. 48 x 48 pixels of emoji become 12 x 12 x 8 numbers, which a
# transformer with patches of 2 x 2 draws with 36 tokens.
AUTOENCODERS: dict[str, dict[str, Any]] = {"shapes": {}, "emoji": {"latent_channels": 8}}


class TinyAutoencoderTraining(pl.LightningModule):
    """AdamW with a linear warm-up and a cosine; the loss is L1 + 2 MSE + `latent_penalty` times the mean of z squared.

    When training ends, the latents are whitened over `whitening_batches` of the last batches.

    Args:
        autoencoder: what to train; a new one by default.
        warmup_steps: of the learning rate.
        latent_penalty: weight of the mean squared latent, before whitening; keeps latents from outgrowing their noise.
        whitening_batches: batches, of training images, over which the latents' mean and variance are measured.
    """

    def __init__(
        self,
        autoencoder: TinyAutoencoder | None = None,
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-4,
        warmup_steps: int = 100,
        latent_penalty: float = 1e-3,
        whitening_batches: int = 32,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("learning_rate", learning_rate, 0),
            ("weight_decay", weight_decay, 0),
            ("warmup_steps", warmup_steps, 0),
            ("latent_penalty", latent_penalty, 0),
            ("whitening_batches", whitening_batches, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it is at least {least}")
        self.autoencoder = TinyAutoencoder() if autoencoder is None else autoencoder
        self.learning_rate, self.weight_decay, self.warmup_steps = learning_rate, weight_decay, warmup_steps
        self.latent_penalty, self.whitening_batches = latent_penalty, whitening_batches
        self._last_images: list[Tensor] = []

    def training_step(self, batch: dict, batch_index: int) -> Tensor:
        images = batch["image"]
        latent_dist = self.autoencoder.encode(images).latent_dist
        reconstruction = self.autoencoder.decode(latent_dist.sample()).sample
        l1, mse = F.l1_loss(reconstruction, images), F.mse_loss(reconstruction, images)
        loss = l1 + 2 * mse + self.latent_penalty * latent_dist.mode().square().mean()
        self.log("train/loss", loss)
        self.log("train/mse", mse)
        self._last_images = [*self._last_images, images][-self.whitening_batches :]
        return loss

    def validation_step(self, batch: dict, batch_index: int) -> None:
        images = batch["image"]
        psnr = peak_signal_to_noise(self.autoencoder(images), images)
        self.log("validation/psnr", psnr.mean(), batch_size=len(images), sync_dist=True, prog_bar=True)

    def on_train_end(self) -> None:
        if self._last_images:
            self.autoencoder.whiten(torch.cat(self._last_images))

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / (self.warmup_steps + 1)
            progress = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(progress, 1)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def peak_signal_to_noise(images: Tensor, targets: Tensor) -> Tensor:
    """In dB, of each image (B,), for values in [-1, 1]; images are clamped to that range first."""
    mse = (images.clamp(-1, 1) - targets).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mse)


@torch.no_grad()
def quality(autoencoder: TinyAutoencoder, count: int = 500) -> dict[str, float]:
    """Mean PSNR in dB and the checker's scores of reconstructions of held-out single objects and pairs."""
    scenes = [scene for level in ("single", "pairs") for scene in held_out_prompts(level, count)]
    images = draw(scenes)
    reconstructions = autoencoder(images)
    scores = check(reconstructions, [scene.caption for scene in scenes]).summary()
    return {"psnr": peak_signal_to_noise(reconstructions, images).mean().item(), **scores}


@torch.no_grad()
def emoji_quality(autoencoder: TinyAutoencoder, image_size: int = 48) -> dict[str, float]:
    """PSNR in dB of reconstructed OpenMoji pictures: mean and 5th percentile in training, mean of held-out ones."""
    training, held_out = (
        peak_signal_to_noise(torch.cat([autoencoder(batch) for batch in images.split(100)]), images)
        for images in (to_signed(part.images) for part in split_emoji(image_size))
    )
    return {
        "psnr": held_out.mean().item(),
        "psnr_in_training": training.mean().item(),
        "psnr_in_training_5th_percentile": training.quantile(0.05).item(),
    }


def train_autoencoder(
    output: str,
    data: Data = "shapes",
    images: int = 200_000,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    autoencoder: dict[str, Any] | None = None,
    precision: str = "32-true",
    threads: int = 1,
    seed: int = 0,
) -> None:
    """Train a tiny autoencoder and save it.

    Args:
        output: folder to write.
        data: captioned shapes, 32 x 32, or OpenMoji, 48 x 48.
        images: training images; shapes are all different, emoji are shifted.
        batch_size: images of a step.
        learning_rate: at its peak.
        autoencoder: arguments of `TinyAutoencoder` other than those usual for the data.
        precision: of Lightning; "bf16-mixed" is faster where the processor multiplies bfloat16.
        threads: of torch.
        seed: of the weights, the noise and the pictures.
    """
    if data not in get_args(Data):
        raise ValueError(f"data is {data!r}; valid are {', '.join(get_args(Data))}")
    torch.set_num_threads(threads)
    pl.seed_everything(seed)
    model = TinyAutoencoder(**AUTOENCODERS[data] | (autoencoder or {}))
    module = TinyAutoencoderTraining(model.to(memory_format=torch.channels_last), learning_rate)
    settings: dict[str, Any] = {"batch_size": batch_size, "images_per_epoch": images, "seed": seed}
    if data == "shapes":
        datamodule, quality_of = CaptionedShapes("pairs", **settings), quality
    else:
        datamodule, quality_of = CaptionedEmoji(features=False, shift=3, mirrored=0.5, **settings), emoji_quality
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    started = time.monotonic()
    trainer.fit(module, datamodule)
    print(f"trained on {images} images in {time.monotonic() - started:.0f} s")
    model = model.eval().to(memory_format=torch.contiguous_format)
    model.save_pretrained(output)
    print({name: round(value, 4) for name, value in quality_of(model).items()})
    print(f"wrote {output}")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(train_autoencoder, as_positional=False)
