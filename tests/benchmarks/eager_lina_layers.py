"""Layers of `tests.benchmarks.eager_lina`, one operation at a time as the official code runs them.

Shapes: B images, N tokens in row-major order, M context tokens, C width, H heads, d = C/H, K predicted tokens, W width
of the denoiser.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6
NULL_ROWS = 512


def position_embedding(width: int, grid: tuple[int, int]) -> Tensor:
    """(h w, C), row by row: sine and cosine of the column, then of the row."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    rows, columns = (torch.arange(side, dtype=torch.float32)[:, None] * frequencies for side in grid)
    rows = torch.cat([rows.sin(), rows.cos()], -1)[:, None].expand(*grid, -1)
    columns = torch.cat([columns.sin(), columns.cos()], -1)[None].expand(*grid, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1)


class PatchEmbedding(nn.Module):
    """(B, c, h p, w p) to (B, h w, C)."""

    def __init__(self, channels: int, width: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class LinearAttention(nn.Module):
    """The encoder's: division-normalised attention with ReLU features, (B, N, C) to (B, N, C)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def attend(self, x: Tensor, gates: tuple[Tensor, Tensor] | None = None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (B, H, N, d)
        query, key = query.relu() + EPSILON, key.relu() + EPSILON
        query, key, value = query.float(), key.float(), value.float()
        if gates is not None:
            key, value = key * gates[0], value * gates[1]
        normaliser = 1 / (query @ key.mean(dim=-2, keepdim=True).transpose(-2, -1) + EPSILON)  # (B, H, N, 1)
        memory = (key.transpose(-2, -1) * length**-0.5) @ (value * length**-0.5)  # (B, H, d, d)
        attended = query @ memory * normaliser
        return attended.to(x.dtype).transpose(1, 2).reshape(batch, length, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(x))


class GatedConvolutionalAttention(LinearAttention):
    """The decoder's: a gate for every head and position, and a 5x5 depthwise convolution of the image tokens.

    `gated=False` is the ablation that has the convolution alone.
    """

    def __init__(self, width: int, heads: int, grid: tuple[int, int], context_length: int, gated: bool = True):
        super().__init__(width, heads)
        self.grid, self.context_length = grid, context_length
        self.dw_conv = nn.Conv2d(width, width, 5, padding=2, groups=width)
        length = context_length + grid[0] * grid[1]
        self.key_scale = nn.Parameter(torch.ones(1, heads, length, 1)) if gated else None
        self.value_scale = nn.Parameter(torch.ones(1, heads, length, 1)) if gated else None

    def convolve(self, x: Tensor) -> Tensor:
        batch, _, width = x.shape
        image = x[:, self.context_length :].reshape(batch, *self.grid, width).permute(0, 3, 1, 2).contiguous()
        image = self.dw_conv(image).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([x.new_zeros(batch, self.context_length, width), image], 1)

    def forward(self, x: Tensor) -> Tensor:
        gates = None if self.key_scale is None else (self.key_scale, self.value_scale)
        return self.proj(self.attend(x, gates) + self.convolve(x))


class SoftmaxAttention(nn.Module):
    """NOVA's: (B, N, C) to (B, N, C)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(attended.transpose(1, 2).reshape(batch, length, width))


class TransformerMLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Residual block with the norms after attention and MLP."""

    def __init__(self, width: int, attention: nn.Module):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = attention, TransformerMLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class Projector(nn.Module):
    def __init__(self, input_width: int, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(input_width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class TimeConditionEmbedding(nn.Module):
    """Sum of a projected condition z (B, K, C) and a projected timestep (B,) or (B, K): (B, K, W)."""

    def __init__(self, condition_width: int, width: int, frequencies: int = 256):
        super().__init__()
        self.timestep_proj, self.condition_proj = Projector(frequencies, width), Projector(condition_width, width)
        self.half = frequencies // 2
        self.table: Tensor | None = None  # the official code keeps it too, in float32 whatever the model's precision

    def frequency_embedding(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        if self.table is None or self.table.device != timestep.device:
            index = torch.arange(self.half, dtype=torch.float32, device=timestep.device)
            self.table = (index * (-math.log(10000) / self.half)).exp()
        angles = timestep.unsqueeze(-1).float() * self.table
        return torch.cat([angles.cos(), angles.sin()], -1).to(dtype)

    def forward(self, timestep: Tensor, z: Tensor) -> Tensor:
        time = self.timestep_proj(self.frequency_embedding(timestep, z.dtype))
        return self.condition_proj(z) + (time.unsqueeze(1) if time.dim() == 2 else time)


class AdaptiveNorm(nn.Module):
    """LayerNorm whose scale and shift, and a gate if statistics = 3, come from the condition."""

    def __init__(self, width: int, statistics: int):
        super().__init__()
        self.statistics = statistics
        self.proj = nn.Linear(width, statistics * width)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        scale, shift, *gate = self.proj(F.silu(condition)).chunk(self.statistics, -1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift, *gate


class DenoiserBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.proj, self.norm2 = AdaptiveNorm(width, 3), Projector(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        normed, gate = self.norm1(x, condition)
        return x + self.norm2(self.proj(normed)) * gate


class TextEmbedding(nn.Module):
    """Prompts (length, text_dim), padded with fixed random rows, to (B, text_length, C); None is the empty prompt."""

    def __init__(self, text_dim: int, width: int, text_length: int):
        super().__init__()
        self.text_length = text_length
        self.register_buffer("weight", torch.randn(NULL_ROWS, text_dim) * 0.02)
        self.proj, self.norm = nn.Linear(text_dim, width), nn.LayerNorm(width)

    def encode(self, prompts: Sequence[Tensor | None]) -> Tensor:
        features = self.weight[: self.text_length].repeat(len(prompts), 1, 1)
        for row, prompt in zip(features, prompts, strict=True):
            if prompt is not None:
                row[: len(prompt)] = prompt
        return features

    def forward(self, prompts: Sequence[Tensor | None]) -> Tensor:
        return self.norm(self.proj(self.encode(prompts)))


class LabelEmbedding(nn.Module):
    """Labels (B,) to (B, 1, C); the label `num_classes` is no class."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes + 1, width) * 0.02)
        self.norm = nn.LayerNorm(width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.norm(F.embedding(labels, self.weight).unsqueeze(1))


class MaskEmbedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.bos_token = nn.Parameter(torch.randn(1, width) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(1, width) * 0.02)


class FramePositionEmbedding(nn.Module):
    """Positions of the context tokens (1, M, C) in the one frame that an image is."""

    def __init__(self, width: int, grid: tuple[int, int], frequencies: int = 256):
        super().__init__()
        self.half = frequencies // 2
        self.register_buffer("positions", position_embedding(width, grid), persistent=False)
        self.time_proj = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)

    def time_embedding(self) -> Tensor:
        """(1, C), of frame 0."""
        weight = self.norm.weight
        angles = torch.zeros(1, self.half, device=weight.device)
        return self.norm(self.time_proj(torch.cat([angles.sin(), angles.cos()], -1).to(weight.dtype)))

    def forward(self) -> Tensor:
        return (self.time_embedding() + self.positions).unsqueeze(0)
