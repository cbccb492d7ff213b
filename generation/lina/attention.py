"""LINA's token mixer: linear attention with gates on keys and values and a depthwise convolution beside it.

With tokens x, of which the last h w are an image's in row-major order and those before it its context, and per head

    q, k, v = x W        q, k rotated by their places where angles are given
    k, v <- g_k k', g_v v'        one learned number for each head and place; k' = relu(k) + 1e-6
    attention = (q' sum_n k_n v_n^T) / (q' sum_n k_n + N 1e-6)
    output = (attention + [0 | depthwise 5 x 5 convolution of x's image]) W_out

Sources: LINA, arXiv 2601.22630, and its published code; the subtraction-normalised form is InLine attention, arXiv
2412.06590; the bank of value embeddings follows the abstract of MoVE, arXiv 2601.22887 (a bank shared by all layers,
mixed softly for each token into the values); how the mixing weights come about there is inferred: a softmax of a linear
map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.lina.attention_memory import AttentionMemory
from generation.lina.embeddings import rotate
from kernels.fused_layers import add_image_convolution
from kernels.linear_attention import linear_attention, linear_attention_with_convolution
from kernels.packed_linear import is_plain

ATTENTIONS = ("linear", "softmax")
NORMALIZATIONS = ("division", "subtraction")
GATES = ("per_head", "shared", "key", "value")


def resize_gate(gate: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Gates of a sequence [prefix | context | image] for another image size, interpolated in two dimensions.

    Args:
        gate: `[heads, prefix + (h / 2) (w / 2) + h w]`.
        old: (h, w), the map of image tokens that it is for.
        new: the map of image tokens that it shall be for.

    Returns:
        `[heads, prefix + (h' / 2) (w' / 2) + h' w']`; the prefix keeps its gates.
    """
    image = old[0] * old[1]
    context = (old[0] // 2) * (old[1] // 2)
    prefix, context_part, image_part = gate.split([gate.shape[1] - image - context, context, image], 1)
    halves = [(old[0] // 2, old[1] // 2), (new[0] // 2, new[1] // 2)]
    parts = [prefix]
    for part, (source, target) in ((context_part, halves), (image_part, (old, new))):
        maps = part.unflatten(1, source)[None]
        parts.append(F.interpolate(maps, target, mode="bilinear", align_corners=False)[0].flatten(1))
    return torch.cat(parts, 1)


class Attention(nn.Module):
    """The token mixer above; keys of the state dict as in the official code, except that gates are [heads, tokens].

    Args:
        width: channels C.
        heads: how many; they divide C.
        attention: "linear" or "softmax".
        normalization: "division" or "subtraction" (linear attention only).
        gates: None, or which gates to learn: "per_head" (keys and values), "shared" (the same for all heads), "key" or
            "value" (one of them, for each head).
        prefix: tokens before the context (text), of which the gates need the number.
        grid: (rows, columns) of the image's tokens that the gates are for.
        locality: side of the depthwise convolution, 0 for none.
        value_bank: how many shared value embeddings are mixed into the values, 0 for none.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        attention: str = "linear",
        normalization: str = "division",
        gates: str | None = None,
        prefix: int = 0,
        grid: tuple[int, int] = (0, 0),
        locality: int = 0,
        value_bank: int = 0,
    ):
        super().__init__()
        self.heads, self.attention, self.normalization = heads, attention, normalization
        self.grid, self.gate_prefix = tuple(grid), prefix
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        tokens = prefix + (grid[0] // 2) * (grid[1] // 2) + grid[0] * grid[1]
        shape = (1 if gates == "shared" else heads, tokens)
        self.key_gate = nn.Parameter(torch.ones(shape)) if gates in ("per_head", "shared", "key") else None
        self.value_gate = nn.Parameter(torch.ones(shape)) if gates in ("per_head", "shared", "value") else None
        self.dw_conv = nn.Conv2d(width, width, locality, padding=locality // 2, groups=width) if locality else None
        self.value_router = nn.Linear(width, value_bank) if value_bank else None

    def gates_for(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Key and value gates for an image of `grid` tokens, interpolated where they were learned for another."""
        if grid == self.grid:
            return self.key_gate, self.value_gate
        return tuple(
            None if gate is None else resize_gate(gate, self.grid, grid) for gate in (self.key_gate, self.value_gate)
        )

    @torch.no_grad()
    def resize(self, grid: tuple[int, int], gates: str = "interpolate") -> None:
        """Make the gates parameters for images of `grid` tokens: "interpolate" them, or "reset" them to ones."""
        for name, gate in zip(("key_gate", "value_gate"), self.gates_for(grid), strict=True):
            if gate is not None:
                setattr(self, name, nn.Parameter(torch.ones_like(gate) if gates == "reset" else gate.clone()))
        self.grid = tuple(grid)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] = (0, 0),
        wanted: Tensor | None = None,
        bank: Tensor | None = None,
        angles: Tensor | None = None,
        memory: AttentionMemory | None = None,
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: `[B, N, C]`.
            grid: rows and columns of the image's tokens at the end of x; (0, 0) where neither gates nor convolution
                need them.
            wanted: `[B, k]` indices of the only tokens wanted, None for all.
            bank: `[value_bank, C]`.
            angles: `[N, D / 2]` or `[B, N, D / 2]`, by which queries and keys are rotated, None for none.
            memory: of tokens before these, which see these no more; only for linear attention by division, ungated.

        Returns:
            `[B, N, C]`, or `[B, k, C]`.
        """
        query, key, value = self._projections(x, wanted)
        if bank is not None and self.value_router is not None:
            weights = self.value_router(x).softmax(-1)
            value = value + (weights @ bank.to(weights.dtype)).unflatten(-1, (self.heads, -1))
        if angles is not None:
            key = rotate(key, angles)
            query = rotate(query, angles if wanted is None else gather(angles.expand(len(x), -1, -1), wanted))
        if memory is not None:
            mixed = memory.attend(query, key, value).to(value.dtype).flatten(2)
        elif self.attention == "softmax":
            heads_first = (t.transpose(1, 2) for t in (query, key, value))
            mixed = F.scaled_dot_product_attention(*heads_first).transpose(1, 2).flatten(2)
        else:
            key_gate, value_gate = self.gates_for(grid)
            options = {"key_gate": key_gate, "value_gate": value_gate, "normalization": self.normalization}
            if self.dw_conv is not None and wanted is None:
                convolution = (x, self.dw_conv.weight, self.dw_conv.bias)
                mixed = linear_attention_with_convolution(query, key, value, *convolution, grid=grid, **options)
                return self.proj(mixed)
            mixed = linear_attention(query, key, value, **options).flatten(2)
        if self.dw_conv is not None:
            mixed = self._add_locality(mixed, x, grid, wanted)
        return self.proj(mixed)

    def _projections(self, x: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if wanted is None:
            return self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        width = x.shape[2]
        if is_plain(self.qkv):
            query = F.linear(gather(x, wanted), self.qkv.weight[:width], self.qkv.bias[:width])
            key_value = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:])
        else:  # an adapter or a hook does more than its weight tells, and is to be called with all tokens
            query, key_value = self.qkv(x).split([width, 2 * width], 2)
            query = gather(query, wanted)
        return query.unflatten(2, (self.heads, -1)), *key_value.unflatten(2, (2, self.heads, -1)).unbind(2)

    def _add_locality(self, mixed: Tensor, x: Tensor, grid: tuple[int, int], wanted: Tensor | None) -> Tensor:
        """Add the convolution of the image's tokens to theirs; without gradients in the memory of `mixed`."""
        weight, bias = self.dw_conv.weight, self.dw_conv.bias
        if wanted is None:
            return add_image_convolution(mixed, x, weight, bias, grid=grid, overwrite=not torch.is_grad_enabled())
        before = x.shape[1] - grid[0] * grid[1]
        places = wanted - before
        windows = windows_at(x[:, before:].unflatten(1, grid), places.clamp(min=0), weight.shape[-1])
        local = torch.einsum("bkoc,co->bkc", windows, weight.flatten(1).to(x.dtype)) + bias.to(x.dtype)
        return mixed + local * (places >= 0)[..., None]


def windows_at(image: Tensor, places: Tensor, side: int) -> Tensor:
    """Windows around `[B, k]` pixels of `[B, h, w, C]`, zero beyond the borders: `[B, k, side^2, C]`, row by row.

    For a few pixels this is less than to convolve all.
    """
    pad = side // 2
    padded = F.pad(image, (0, 0, pad, pad, pad, pad))
    width, offset = padded.shape[2], torch.arange(side, device=image.device)
    corner = places // image.shape[2] * width + places % image.shape[2]
    index = corner[..., None] + (offset[:, None] * width + offset).flatten()
    return gather(padded.flatten(1, 2), index.flatten(1)).unflatten(1, index.shape[1:])


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `[B, k]` of `[B, N, C]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
