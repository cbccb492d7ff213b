"""Tokens and where they are: patches of latents, sine positions, rotations, captions, classes, mask and context tokens.

Images are `[B, C, h, w]` latents of an autoencoder; tokens are `[B, N, p * p * C]`, in row-major order, the channels of
one in the order (row in the patch, column in the patch, channel).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

TIME_FREQUENCIES = 256
WAVELENGTH = 10000.0


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """`[B, C, h p, w p]` latents as `[B, h w, p p C]` tokens."""
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (ph pw c)", ph=patch_size, pw=patch_size)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The inverse of `patchify` for a map of `grid` (rows, columns) tokens."""
    return rearrange(
        tokens, "b (h w) (ph pw c) -> b c (h ph) (w pw)", h=grid[0], w=grid[1], ph=patch_size, pw=patch_size
    )


def frequencies(count: int, like: Tensor) -> Tensor:
    """`10000^(-i / count)` for i < count, rounded as in the official code: the last bits matter at times up to 1000."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.exp(-math.log(WAVELENGTH) * torch.arange(count, device=like.device, dtype=dtype) / count)


def sine_positions(width: int, grid: tuple[int, int], like: Tensor) -> Tensor:
    """`[h w, width]`: sine and cosine of the column, then of the row, at `width / 4` frequencies each."""
    bands = frequencies(width // 4, like)
    rows, columns = (torch.outer(torch.arange(size, device=like.device), bands) for size in grid)
    rows, columns = (torch.cat([angle.sin(), angle.cos()], 1) for angle in (rows, columns))
    shape = (*grid, width // 2)
    both = torch.cat([columns[None].expand(shape), rows[:, None].expand(shape)], 2)
    return both.flatten(0, 1).to(like.dtype)


def rotary_angles(head_dim: int, grid: tuple[int, int], leading: int, like: Tensor) -> Tensor:
    """`[leading + h w, head_dim / 2]` angles by which pairs of channels turn; those of `leading` tokens are zero.

    An eighth of the channels turn by the frame (always 0 here), half of the others by the row, half by the column.

    Raises:
        ValueError: the channels beyond that eighth do not divide into pairs for rows and columns.
    """
    by_frame = head_dim // 8
    by_side = (head_dim - by_frame) // 2
    if by_frame % 2 or by_side % 2 or by_frame + 2 * by_side != head_dim:
        raise ValueError(f"rotary needs a head dimension such as 32, 64 or 96, not {head_dim}")
    bands = frequencies(by_side // 2, like)
    rows, columns = (torch.outer(torch.arange(size, device=like.device), bands) for size in grid)
    shape = (*grid, by_side // 2)
    turning = torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], 2).flatten(0, 1)
    return F.pad(turning, (by_frame // 2, 0, leading, 0))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the channel pairs (2 i, 2 i + 1) of `[B, N, H, D]` by `[N, D / 2]` or `[B, N, D / 2]` angles."""
    cosine, sine = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2).to(x.dtype)


class PatchEmbedding(nn.Module):
    """A linear map of patches, with the parameters of a convolution whose stride is its kernel.

    Args:
        channels: of the latents.
        patch_size: side of a patch.
        width: of the tokens that leave.
    """

    def __init__(self, channels: int, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def token_weight(self) -> Tensor:
        """The weight as `[width, p p C]`, in the order in which `patchify` lays out a token."""
        return self.proj.weight.permute(0, 2, 3, 1).flatten(1)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[..., p p C]` tokens to `[..., width]`."""
        return F.linear(tokens, self.token_weight(), self.proj.bias)


class TextEmbedding(nn.Module):
    """Features of captions, padded by fixed random rows, projected to the width of the model.

    An unconditional prompt is no features at all: every row is padding.

    Args:
        text_dim: of the text encoder's features.
        width: of the model.
        length: rows of every embedded prompt.
    """

    ROWS = 512  # of the official buffer, whatever the length

    def __init__(self, text_dim: int, width: int, length: int):
        super().__init__()
        self.length = length
        self.register_buffer("weight", torch.randn(max(self.ROWS, length), text_dim) * 0.02)
        self.proj = nn.Linear(text_dim, width)
        self.norm = nn.LayerNorm(width).requires_grad_(False)

    def pad(self, features: Sequence[Tensor]) -> Tensor:
        """`[length_i, text_dim]` of each prompt to `[B, length, text_dim]`; what is beyond `length` is cut off."""
        null = self.weight[: self.length]
        kept = [feature[: self.length].to(null) for feature in features]
        padded = nn.utils.rnn.pad_sequence([*kept, null], batch_first=True)[:-1]
        lengths = torch.tensor([len(feature) for feature in kept], device=null.device)
        is_text = torch.arange(self.length, device=null.device) < lengths[:, None]
        return torch.where(is_text[..., None], padded, null)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features of each prompt, `[length_i, text_dim]`, to `[B, length, width]`."""
        return self.norm(self.proj(self.pad(features)))


class LabelEmbedding(nn.Module):
    """A learned token for each class, and one, the last, for none.

    Args:
        classes: how many.
        width: of the model.
    """

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes + 1, width) * 0.02)
        self.norm = nn.LayerNorm(width).requires_grad_(False)

    @property
    def null(self) -> int:
        """The label that means no class."""
        return self.weight.shape[0] - 1

    def forward(self, labels: Tensor) -> Tensor:
        """`[B]` labels to `[B, 1, width]`."""
        return self.norm(F.embedding(labels, self.weight))[:, None]


class MaskEmbedding(nn.Module):
    """The tokens that stand for what is not there: `bos_token` begins the context, `mask_token` is an unknown token."""

    def __init__(self, width: int):
        super().__init__()
        self.bos_token = nn.Parameter(torch.randn(1, width) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(1, width) * 0.02)


class FramePositionEmbedding(nn.Module):
    """Position of a context token: sines of its place, and a learned embedding of the frame, of which images have one.

    The parameters are frozen, as in the official training.
    """

    def __init__(self, width: int):
        super().__init__()
        self.time_proj = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)
        self.requires_grad_(False)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """`[h w, width]` for a map of `grid` context tokens."""
        weight = self.norm.weight
        first_frame = weight.new_tensor([0.0, 1.0]).repeat_interleave(TIME_FREQUENCIES // 2)  # sines, cosines of 0
        return sine_positions(weight.shape[0], grid, weight) + self.norm(self.time_proj(first_frame))
