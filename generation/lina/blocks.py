"""The transformers of LINA: a context encoder, and an image encoder of two halves.

Blocks are residual with the norm after each branch: x <- x + norm(attention(x)), x <- x + norm(MLP(x)).

The image encoder's first half sees the context and the tokens that are known, its second half the context and all
tokens, the unknown ones replaced by one learned mask token; gates and convolutions are in the second half only.
Captions and classes reach it through the context tokens alone, unless it is given them as a prefix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.lina.attention import Attention, gather
from generation.lina.attention_memory import AttentionMemory, EncoderMemory
from generation.lina.embeddings import PatchEmbedding, rotary_angles, sine_positions
from kernels.packed_linear import activated_linear


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activated_linear(self.fc1, x, F.gelu))


class Block(nn.Module):
    """Attention and MLP, each with a norm behind it.

    Args:
        width: channels.
        heads: of the attention.
        mlp_ratio: hidden width of the MLP over `width`.
        attention_options: of `Attention`.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, **attention_options):
        super().__init__()
        self.attn = Attention(width, heads, **attention_options)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.norm2 = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] = (0, 0),
        wanted: Tensor | None = None,
        bank: Tensor | None = None,
        angles: Tensor | None = None,
        memory: AttentionMemory | None = None,
    ) -> Tensor:
        """`[B, N, C]` to the same, or to `[B, k, C]` of the tokens `wanted`; arguments as of `Attention.forward`."""
        mixed = self.norm1(self.attn(x, grid, wanted, bank, angles, memory))
        x = (x if wanted is None else gather(x, wanted)) + mixed
        return x + self.norm2(self.mlp(x))


class ContextEncoder(nn.Module):
    """Turns a caption or class into the context of an image.

    `patch_embed` embeds the earlier frames of a video: for images it is never used, and kept, frozen, because official
    checkpoints hold it.
    """

    def __init__(self, depth: int, width: int, heads: int, channels: int, patch_size: int, **options):
        super().__init__()
        self.patch_embed = PatchEmbedding(channels, patch_size, width).requires_grad_(False)
        self.blocks = nn.ModuleList([Block(width, heads, **options) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def forward(self, condition: Tensor, context: Tensor, bank: Tensor | None = None) -> Tensor:
        """`[B, T, C]` caption or class tokens and `[B, n, C]` beginnings to `[B, n, C]` context tokens."""
        x = torch.cat([condition, context], 1)
        for block in self.blocks:
            x = block(x, bank=bank)
        return self.norm(x[:, condition.shape[1] :])


class ImageEncoder(nn.Module):
    """Predicts, for each image token, what the token denoiser needs to know to draw it.

    Args:
        encoder_depth: blocks that see the known tokens only.
        decoder_depth: blocks that see all, at least 1.
        width: channels.
        heads: of the attention.
        channels: of the latents.
        patch_size: of the image's tokens.
        rotary: rotate queries and keys of image tokens by their places (in the authors' ablations only; that context
            tokens stay as they are is as there).
        decoder_options: of the attention of the second half, beside `options`.
        options: of all blocks.
    """

    def __init__(
        self,
        encoder_depth: int,
        decoder_depth: int,
        width: int,
        heads: int,
        channels: int,
        patch_size: int,
        decoder_options: dict,
        rotary: bool = False,
        **options,
    ):
        super().__init__()
        self.encoder_depth, self.rotary, self.head_dim = encoder_depth, rotary, width // heads
        self.patch_embed = PatchEmbedding(channels, patch_size, width)
        first = [Block(width, heads, **options) for _ in range(encoder_depth)]
        second = [Block(width, heads, **options, **decoder_options) for _ in range(decoder_depth)]
        self.blocks = nn.ModuleList([*first, *second])
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        mask_token: Tensor,
        grid: tuple[int, int],
        known: Tensor | None,
        wanted: Tensor | None = None,
        bank: Tensor | None = None,
        memory: EncoderMemory | None = None,
    ) -> Tensor:
        """Conditions of the token denoiser.

        Args:
            tokens: `[B, N, p p C_latent]`; what is not known is not looked at.
            context: `[B, n, C]`, context tokens, and text tokens before them if the model has a text prefix.
            mask_token: `[1, C]`, or one for each token.
            grid: (rows, columns) of the N tokens.
            known: `[B, m]` indices of the known tokens; None for all of them.
            wanted: `[B, k]` indices of the tokens whose conditions are wanted, None for all.
            bank: shared value embeddings.
            memory: what the calls before made of the first of the known tokens, which is taken as it is: approximate.

        Returns:
            `[B, N, C]`, or `[B, k, C]`.
        """
        positions = sine_positions(mask_token.shape[-1], grid, mask_token)
        if known is None:
            known = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
        before, angles = context.shape[1], None
        if self.rotary:
            angles = rotary_angles(self.head_dim, grid, before, tokens)
        context, visible = self._encode_known(tokens, context, positions, known, bank, angles, memory)
        masked = (mask_token + positions).to(visible.dtype).expand(len(visible), -1, -1)
        x = torch.cat([context, masked.scatter(1, known[..., None].expand_as(visible), visible)], 1)
        for block in self.blocks[self.encoder_depth : -1]:
            x = block(x, grid, bank=bank, angles=angles)
        wanted = None if wanted is None else wanted + before
        # Nothing comes after the last block, so that of it only the wanted tokens are computed.
        x = self.blocks[-1](x, grid, wanted, bank, angles)
        return self.norm(x[:, before:] if wanted is None else x)

    def _encode_known(
        self,
        tokens: Tensor,
        context: Tensor,
        positions: Tensor,
        known: Tensor,
        bank: Tensor | None,
        angles: Tensor | None,
        memory: EncoderMemory | None,
    ) -> tuple[Tensor, Tensor]:
        """The first half: context `[B, n, C]` and known tokens `[B, m, C]`."""
        before = context.shape[1]
        remembered = memory is not None and memory.context is not None
        new = known[:, memory.known.shape[1] :] if remembered else known
        x = self.patch_embed(gather(tokens, new)) + positions[new]
        if angles is not None:
            angles = angles[before + new] if remembered else F.pad(angles[before + new], (0, 0, before, 0))
        x = x if remembered else torch.cat([context, x], 1)
        layers = [None] * self.encoder_depth if memory is None else memory.layers
        for block, layer in zip(self.blocks[: self.encoder_depth], layers, strict=True):
            x = block(x, bank=bank, angles=angles, memory=layer)
        if remembered:
            context, visible = memory.context, torch.cat([memory.known, x], 1)
        else:
            context, visible = x.split([before, x.shape[1] - before], 1)
        if memory is not None:
            memory.context, memory.known = context, visible
        return context, visible
