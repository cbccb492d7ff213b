"""The tiny autoencoder: its interface, its whitened latents, and that it learns."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from generation.lina.autoencoder import TinyAutoencoder
from generation.lina.autoencoder_training import (
    TinyAutoencoderTraining,
    peak_signal_to_noise,
    quality,
    train_autoencoder,
)
from generation.lina.captioned_shapes import CaptionedShapes, draw, training_scenes


@pytest.fixture
def images():
    return draw(training_scenes(np.random.default_rng(0), 16, {"pairs": 1.0}))


@pytest.fixture
def autoencoder(images):
    autoencoder = TinyAutoencoder(width=16)
    autoencoder.whiten(images)
    return autoencoder.eval()


def test_interface_of_diffusers(autoencoder, images):
    latent_dist = autoencoder.encode(images).latent_dist
    latents = latent_dist.mode()
    assert latents.shape == (16, 6, 8, 8)
    draws = [latent_dist.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    reconstruction = autoencoder.decode(latents).sample
    assert reconstruction.shape == images.shape
    assert torch.equal(reconstruction, autoencoder(images))
    assert torch.equal(reconstruction, autoencoder.decode(latents, return_dict=False)[0])
    assert torch.equal(latents, autoencoder.encode(images, return_dict=False)[0].mode())
    assert (autoencoder.config.scaling_factor, autoencoder.config.shift_factor) == (1.0, 0.0)


def test_other_sizes():
    autoencoder = TinyAutoencoder(
        in_channels=4, latent_channels=3, patch_size=8, width=8, encoder_blocks=0, decoder_blocks=1
    )
    x = torch.rand(2, 4, 48, 64)
    assert autoencoder.encode(x).latent_dist.mode().shape == (2, 3, 6, 8)
    assert autoencoder(x).shape == x.shape


def test_whitening_changes_latents_and_not_pictures(images):
    autoencoder = TinyAutoencoder(width=16)
    before = autoencoder(images)
    noise = autoencoder.encode(images).latent_dist.std[0, :, 0, 0]
    for _ in range(2):  # a second time, as after a second training
        autoencoder.whiten(images)
        std, mean = torch.std_mean(autoencoder.encode(images).latent_dist.mode(), dim=(0, 2, 3))
        torch.testing.assert_close(mean, torch.zeros(6), atol=1e-5, rtol=0)
        torch.testing.assert_close(std, torch.ones(6), atol=1e-5, rtol=0)
        torch.testing.assert_close(autoencoder(images), before, atol=1e-5, rtol=1e-5)
        whitened_noise = autoencoder.encode(images).latent_dist.std[0, :, 0, 0] * autoencoder.latents_std.flatten()
        torch.testing.assert_close(whitened_noise, noise)


def test_constant_latents_cannot_be_whitened():
    with pytest.raises(ValueError, match="images make a latent channel constant"):
        TinyAutoencoder(width=8, encoder_blocks=0).whiten(torch.zeros(1, 3, 4, 4).expand(2, 3, 4, 4))


def test_no_noise_means_no_noise(images):
    latent_dist = TinyAutoencoder(width=8, latent_noise=0.0).encode(images).latent_dist
    torch.testing.assert_close(latent_dist.sample(), latent_dist.mode(), atol=1e-5, rtol=0)


def test_saved_and_loaded(autoencoder, images, tmp_path):
    autoencoder.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = TinyAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded(images), autoencoder(images))
    assert torch.equal(loaded.latents_std, autoencoder.latents_std)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 30, 32)])
def test_images_are_checked(autoencoder, shape):
    with pytest.raises(ValueError, match="x has shape"):
        autoencoder.encode(torch.zeros(shape))


def test_latents_and_settings_are_checked(autoencoder):
    with pytest.raises(ValueError, match="z has shape"):
        autoencoder.decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="patch_size is 0"):
        TinyAutoencoder(patch_size=0)
    with pytest.raises(ValueError, match="latent_noise is -1"):
        TinyAutoencoder(latent_noise=-1)
    with pytest.raises(ValueError, match="whitening_batches is 0"):
        TinyAutoencoderTraining(whitening_batches=0)


def test_signal_to_noise():
    targets = torch.zeros(2, 3, 4, 4)
    images = torch.stack((torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 2.0)))
    torch.testing.assert_close(peak_signal_to_noise(images, targets), torch.tensor([20.0, 10 * np.log10(4)]).float())


def test_training_learns_and_whitens():
    pl.seed_everything(0)
    module = TinyAutoencoderTraining(TinyAutoencoder(width=8), warmup_steps=5, learning_rate=1e-2)
    before = quality(module.autoencoder, count=20)["psnr"]
    data = CaptionedShapes(batch_size=32, images_per_epoch=32 * 30, evaluation_images=20)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert trainer.callback_metrics["validation/psnr"] > before + 5
    images = next(iter(data.val_dataloader()))["image"]
    std = module.autoencoder.encode(images).latent_dist.mode().std((0, 2, 3))
    assert (std - 1).abs().max() < 0.3


def test_command_writes_a_loadable_folder(tmp_path, capsys):
    train_autoencoder(str(tmp_path / "autoencoder"), images=64, batch_size=32, threads=torch.get_num_threads())
    assert "psnr" in capsys.readouterr().out
    assert TinyAutoencoder.from_pretrained(tmp_path / "autoencoder").config.latent_channels == 6
