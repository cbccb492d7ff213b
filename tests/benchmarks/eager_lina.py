"""The official LINA arithmetic, step by step and unoptimised: what `benchmark lina` measures our model against.

Written from a description of LINA (arXiv 2601.22630) and of NOVA, on which it builds, and held to golden files made by
running the official code (tests/generation/test_eager_lina.py). Parameters have the official names, so official weights
load with `load_state_dict(strict=True)`. Nothing is fused, cached or skipped that the official code does not skip:

- attention casts queries, keys and values to float32, adds epsilons, applies gates and scales, one operation at a time;
- the convolution goes to NCHW and back, and is padded with zeros for the context tokens by a concatenation;
- each step of the diffusion embeds the whole noisy map, gathers the predicted tokens, projects their condition again,
  and scatters the result into a whole map;
- conditional and unconditional context are encoded in one batch, guided or not.

Shapes: B images, N = h w image tokens in row-major order, M = N/4 context tokens, C width, H heads, d = C/H, W width of
the denoiser, D = p p c values of a token in the order (row, column, channel).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.eager_lina_layers import (
    AdaptiveNorm,
    Block,
    DenoiserBlock,
    FramePositionEmbedding,
    GatedConvolutionalAttention,
    LabelEmbedding,
    LinearAttention,
    MaskEmbedding,
    PatchEmbedding,
    SoftmaxAttention,
    TextEmbedding,
    TimeConditionEmbedding,
    position_embedding,
)

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class EagerLinaConfig:
    """Sizes of a LINA (`attention="linear"`) or of the NOVA it began from (`"softmax"`: no gates, no convolution)."""

    width: int
    heads: int
    context_depth: int
    image_depth: int  # the first half sees visible tokens only, the second half all
    head_width: int
    head_depth: int
    latent_channels: int
    latent_size: tuple[int, int]
    patch_size: int
    text_dim: int | None = None  # text-to-image, with text_length
    text_length: int | None = None
    num_classes: int | None = None  # class-conditional
    attention: Literal["linear", "softmax"] = "linear"

    @property
    def grid(self) -> tuple[int, int]:
        return self.latent_size[0] // self.patch_size, self.latent_size[1] // self.patch_size

    @property
    def context_grid(self) -> tuple[int, int]:
        return self.grid[0] // 2, self.grid[1] // 2


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def train_sigmas(shift: float = 1.0) -> Tensor:
    """(1000,), from 1 down; a timestep is 1000 sigma."""
    return shifted(torch.arange(TRAIN_STEPS, 0, -1) / TRAIN_STEPS, shift)


def sample_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """(steps + 1,), from 1 to 0; the one before the last is the least of training, which is shifted here once more."""
    least = train_sigmas(shift)[-1].item()
    return torch.cat([shifted(torch.linspace(1, least, steps), shift), torch.zeros(1)])


def num_preds(steps: int, tokens: int) -> list[int]:
    """How many of `tokens` each of `steps` autoregressive steps predicts, by a cosine; the sampler skips zeros."""
    hidden = [round(math.cos(math.pi / 2 * step / steps) * tokens) for step in range(steps + 1)]
    return [before - after for before, after in pairwise(hidden)]


def guidance_ramp(scale: float, least: float, steps: int) -> list[float]:
    """Class-conditional guidance, rising with the steps that predict anything; that of text-to-image is constant."""
    return [(scale - least) * (step + 1) / steps + least for step in range(steps)]


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """(B, c, h p, w p) to (B, h w, p p c)."""
    batch, channels, height, width = image.shape
    rows, columns = height // patch_size, width // patch_size
    patches = image.view(batch, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(tokens: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """(B, h w, p p c) to (B, c, h p, w p)."""
    batch, _, values = tokens.shape
    channels = values // (patch_size * patch_size)
    patches = tokens.view(batch, *grid, patch_size, patch_size, channels).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(batch, channels, grid[0] * patch_size, grid[1] * patch_size)


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """The tokens (B, K, C) of (B, N, C) that ids (B, K, 1) name."""
    return tokens.gather(1, ids.expand(-1, -1, tokens.shape[-1]))


def scatter_tokens(tokens: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """tokens (B, N, C) with values (B, K, C) in the places that ids (B, K, 1) name."""
    return tokens.scatter(1, ids.expand(-1, -1, tokens.shape[-1]), values)


class EagerTransformer(nn.Module):
    """Blocks over [context | tokens]; the first `encoder_depth` of them may see some of the tokens only.

    Serves as context encoder (all blocks encoder blocks) and as image encoder (gates and convolution in the rest).
    """

    def __init__(self, config: EagerLinaConfig, depth: int, encoder_depth: int, patch_size: int):
        super().__init__()
        self.encoder_depth = encoder_depth
        self.patch_embed = PatchEmbedding(config.latent_channels, config.width, patch_size)
        self.blocks = nn.ModuleList()
        for index in range(depth):
            if config.attention == "softmax":
                attention = SoftmaxAttention(config.width, config.heads)
            elif index < encoder_depth:
                attention = LinearAttention(config.width, config.heads)
            else:
                context_length = math.prod(config.context_grid)
                attention = GatedConvolutionalAttention(config.width, config.heads, config.grid, context_length)
            self.blocks.append(Block(config.width, attention))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor, context: Tensor, visible: Tensor | None = None) -> Tensor:
        """tokens (B, N, C), context (B, M, C), visible (B, K, 1) or None for all, to (B, N, C)."""
        context_length = context.shape[1]
        seen = tokens if visible is None else gather_tokens(tokens, visible)
        x = torch.cat([context, seen], 1)
        for index, block in enumerate(self.blocks):
            if index == self.encoder_depth and visible is not None:
                context, seen = x[:, :context_length], x[:, context_length:]
                x = torch.cat([context, scatter_tokens(tokens, visible, seen)], 1)
            x = block(x)
        return self.norm(x)[:, context_length:]


class EagerDenoiser(nn.Module):
    """Velocity of the tokens of a noisy map (B, c, h p, w p), given z (B, N, C): (B, N, D).

    With `predicted` (B, K, 1), of these tokens only; the others come back as they are in the noisy map.
    """

    def __init__(self, channels: int, patch_size: int, condition_width: int, width: int, depth: int):
        super().__init__()
        self.patch_embed = PatchEmbedding(channels, width, patch_size)
        self.time_cond_embed = TimeConditionEmbedding(condition_width, width)
        self.blocks = nn.ModuleList(DenoiserBlock(width) for _ in range(depth))
        self.norm = AdaptiveNorm(width, 2)
        self.head = nn.Linear(width, patch_size * patch_size * channels)

    def forward(self, noisy: Tensor, timestep: Tensor, z: Tensor, predicted: Tensor | None = None) -> Tensor:
        x = self.patch_embed(noisy)
        if predicted is not None:
            unchanged = patchify(noisy, self.patch_embed.patch_size)
            x, z = gather_tokens(x, predicted), gather_tokens(z, predicted)
        condition = self.time_cond_embed(timestep, z)
        for block in self.blocks:
            x = block(x, condition)
        velocity = self.head(self.norm(x, condition)[0])
        return velocity if predicted is None else scatter_tokens(unchanged, predicted, velocity)


class EagerLina(nn.Module):
    """The three networks; all randomness comes in as arguments."""

    def __init__(self, config: EagerLinaConfig):
        super().__init__()
        self.config = config
        patch_size, width = config.patch_size, config.width
        half = config.image_depth // 2
        self.video_encoder = EagerTransformer(config, config.context_depth, config.context_depth, 2 * patch_size)
        self.image_encoder = EagerTransformer(config, config.image_depth, half, patch_size)
        self.image_decoder = EagerDenoiser(
            config.latent_channels, patch_size, width, config.head_width, config.head_depth
        )
        self.mask_embed = MaskEmbedding(width)
        self.register_buffer("positions", position_embedding(width, config.grid), persistent=False)
        self.video_pos_embed = FramePositionEmbedding(width, config.context_grid)
        if config.num_classes is not None:
            self.label_embed = LabelEmbedding(width, config.num_classes)
        if config.text_dim is not None:
            self.text_embed = TextEmbedding(config.text_dim, width, config.text_length)

    def encode_context(self, condition: Tensor) -> Tensor:
        """Condition (B, L, C), embedded text or class, to context (B, M, C)."""
        tokens = self.mask_embed.bos_token + self.video_pos_embed()
        return self.video_encoder(tokens.expand(len(condition), -1, -1), condition)

    def encode_image(self, latents: Tensor, context: Tensor, mask: Tensor, visible: Tensor) -> Tensor:
        """Latents (B, c, h p, w p) with mask (B, N, 1), 1 where hidden, and visible (B, K, 1), to z (B, N, C)."""
        tokens = self.image_encoder.patch_embed(latents)
        tokens = torch.where(mask.bool(), self.mask_embed.mask_token, tokens)
        return self.image_encoder(tokens + self.positions, context, visible)

    def training_loss(
        self,
        latents: Tensor,
        condition: Tensor,
        mask_uniform: Tensor,
        mask_ratio: float,
        noise: Tensor,
        timestep_index: Tensor,
        loss_repeat: int,
        shift: float = 1.0,
    ) -> Tensor:
        """Flow-matching loss of the masked tokens.

        Args:
            latents: (B, c, h p, w p).
            condition: (B, L, C), embedded text or class.
            mask_uniform: (B, N, 1); the round((1 - mask_ratio) N) smallest are visible.
            noise: (R B, N, D), for the batch repeated R = loss_repeat times.
            timestep_index: (R B, N) into `train_sigmas`.
        """
        patch_size, grid = self.config.patch_size, self.config.grid
        visible_count = round((1 - mask_ratio) * mask_uniform.shape[1])
        visible = mask_uniform.argsort(1)[:, :visible_count]
        mask = latents.new_ones(mask_uniform.shape).scatter(1, visible, 0.0)
        z = self.encode_image(latents, self.encode_context(condition), mask, visible)
        z, mask = z.repeat(loss_repeat, 1, 1), mask.repeat(loss_repeat, 1, 1).squeeze(-1)
        clean = patchify(latents, patch_size).repeat(loss_repeat, 1, 1)
        sigma = train_sigmas(shift).to(latents.device)[timestep_index]
        noisy = (sigma.unsqueeze(-1) * noise + (1 - sigma.unsqueeze(-1)) * clean).to(latents.dtype)
        velocity = self.image_decoder(unpatchify(noisy, patch_size, grid), sigma * TRAIN_STEPS, z)
        error = F.mse_loss(velocity.float(), (noise - clean).float(), reduction="none").mean(-1)
        return (error * mask).sum() / (mask.sum() + 1e-5)

    def diffusion_step(
        self,
        noisy: Tensor,
        timestep: Tensor,
        z: Tensor,
        predicted: Tensor,
        guidance: float,
        sigma: Tensor,
        next_sigma: Tensor,
    ) -> Tensor:
        """One Euler step of a whole map (B, c, h p, w p); z and predicted may be [conditional; unconditional].

        timestep, sigma and next_sigma are scalars.
        """
        guided = len(z) == 2 * len(noisy)
        both = torch.cat([noisy, noisy]) if guided else noisy
        velocity = self.image_decoder(both, timestep.expand(len(z)), z, predicted)
        if guided:
            conditional, unconditional = velocity.chunk(2)
            velocity = unconditional + guidance * (conditional - unconditional)
        velocity = unpatchify(velocity, self.config.patch_size, self.config.grid)
        return (noisy.float() + (next_sigma - sigma) * velocity).to(velocity.dtype)

    def denoise(self, noise: Tensor, z: Tensor, predicted: Tensor, guidance: float, sigmas: Tensor) -> Tensor:
        """Noise (B, c, h p, w p) through all sigmas (K + 1,) to tokens (B, N, D); those not predicted mean nothing."""
        noisy = noise
        for timestep, sigma, next_sigma in zip(sigmas[:-1] * TRAIN_STEPS, sigmas[:-1], sigmas[1:], strict=True):
            noisy = self.diffusion_step(noisy, timestep, z, predicted, guidance, sigma, next_sigma)
        return patchify(noisy, self.config.patch_size)

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        order: Tensor,
        num_preds: Sequence[int],
        noise: Tensor,
        guidance: Sequence[float],
        sigmas: Tensor,
    ) -> Tensor:
        """Latents (B, c, h p, w p).

        Args:
            condition: (2B, L, C), [conditional; unconditional], or (B, L, C) for no guidance.
            order: (B, N, 1), the order in which the tokens are predicted.
            num_preds: tokens of each step; steps without any are to be left out.
            noise: (steps, B, c, h p, w p).
            guidance: scale of each step.
            sigmas: `sample_sigmas`.
        """
        patch_size, grid = self.config.patch_size, self.config.grid
        copies = len(condition) // len(order)
        context = self.encode_context(condition)
        latents = torch.zeros_like(noise[0])
        mask = latents.new_ones(order.shape)
        done = 0
        for step, count in enumerate(num_preds):
            visible, predicted = order[:, :done], order[:, done : done + count]
            doubled = (part.repeat(copies, *[1] * (part.dim() - 1)) for part in (latents, mask, visible, predicted))
            latents_twice, mask_twice, visible_twice, predicted_twice = doubled
            z = self.encode_image(latents_twice, context, mask_twice, visible_twice)
            denoised = self.denoise(noise[step], z, predicted_twice, guidance[step], sigmas)
            tokens = scatter_tokens(patchify(latents, patch_size), predicted, gather_tokens(denoised, predicted))
            latents = unpatchify(tokens, patch_size, grid)
            mask = mask.scatter(1, predicted, 0.0)
            done += count
        return latents
