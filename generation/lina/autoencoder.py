"""A tiny autoencoder with the interface of diffusers' `AutoencoderKL`: 32 x 32 pixels become 8 x 8 x 6 numbers.

Pixels are folded into channels (4 x 4 of RGB become 48), widened, and refined by residual blocks; the decoder does the
same backwards, with one more block. Everything is convolutional, so any image size divisible by the patch size works.

Latents have zero mean and unit variance in every channel: the encoder's raw output is shifted and scaled by the buffers
`latents_mean` and `latents_std`, measured once after training (`whiten`), and the decoder undoes it. `scaling_factor`
is therefore 1 and `shift_factor` 0; pipelines written for other autoencoders apply them and change nothing.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a skip. No normalisation: flat pictures have channels of zero variance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class TinyAutoencoder(ModelMixin, ConfigMixin):
    """Images (B, C, H, W) in [-1, 1] to latents (B, latent_channels, H / patch_size, W / patch_size) and back.

    Args:
        patch_size: pixels of a side that one latent position stands for.
        width: channels inside.
        encoder_blocks: residual blocks before the latents; `decoder_blocks` come after them.
        latent_noise: standard deviation, before whitening, of the noise that `latent_dist.sample()` adds and that the
            decoder was trained with. `latent_dist.mode()` adds none.
        scaling_factor: 1, since the latents are whitened inside.
        shift_factor: 0, for the same reason.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 6,
        patch_size: int = 4,
        width: int = 64,
        encoder_blocks: int = 1,
        decoder_blocks: int = 2,
        latent_noise: float = 0.12,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        for name in ("in_channels", "latent_channels", "patch_size", "width"):
            if self.config[name] < 1:
                raise ValueError(f"{name} is {self.config[name]}; it is at least 1")
        for name in ("encoder_blocks", "decoder_blocks", "latent_noise"):
            if self.config[name] < 0:
                raise ValueError(f"{name} is {self.config[name]}; it is at least 0")
        folded = in_channels * patch_size**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(patch_size),
            nn.Conv2d(folded, width, 1),
            *(ResidualBlock(width) for _ in range(encoder_blocks)),
            nn.Conv2d(width, latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            *(ResidualBlock(width) for _ in range(decoder_blocks)),
            nn.Conv2d(width, folded, 1),
            nn.PixelShuffle(patch_size),
        )
        self.register_buffer("latents_mean", torch.zeros(1, latent_channels, 1, 1))
        self.register_buffer("latents_std", torch.ones(1, latent_channels, 1, 1))

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Distribution of the latents (B, latent_channels, h, w): around `mode()`, with the same noise everywhere."""
        channels, patch_size = self.config.in_channels, self.config.patch_size
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % patch_size or x.shape[3] % patch_size:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; it must be (B, {channels}, H, W) with H and W multiples of {patch_size}"
            )
        mean = (self.encoder(x) - self.latents_mean) / self.latents_std
        variance = (self.config.latent_noise / self.latents_std) ** 2
        log_variance = variance.clamp_min(torch.finfo(variance.dtype).tiny).log().expand_as(mean)
        latent_dist = DiagonalGaussianDistribution(torch.cat((mean, log_variance), dim=1))
        return AutoencoderKLOutput(latent_dist=latent_dist) if return_dict else (latent_dist,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Images (B, C, H, W) of latents; about [-1, 1], not clamped."""
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"z has shape {tuple(z.shape)}; it must be (B, {self.config.latent_channels}, height, width)"
            )
        sample = self.decoder(z * self.latents_std + self.latents_mean)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor) -> Tensor:
        """Reconstructions, without latent noise."""
        return self.decode(self.encode(sample).latent_dist.mode()).sample

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Give every latent channel zero mean and unit variance over `images`; reconstructions stay the same."""
        latents = self.encode(images).latent_dist.mode()
        std, mean = torch.std_mean(latents.float(), dim=(0, 2, 3), keepdim=True)
        if (std < 1e-6).any():
            raise ValueError(f"images make a latent channel constant: standard deviations {std.flatten().tolist()}")
        self.latents_mean += mean * self.latents_std
        self.latents_std *= std
