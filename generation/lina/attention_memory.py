"""Approximate encoding of known tokens: those seen before are not looked at again.

Linear attention keeps all it knows of its keys and values in a few sums. When tokens become known, the first half of
the image encoder can add theirs to the sums of each layer and compute these tokens alone, instead of all known ones.
That is no longer what the model was trained for, since the tokens before would have changed too (every token sees every
other): the sums have to be made anew every few steps.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.precision import common_dtype, full_precision

EPS = 1e-6


@dataclass
class AttentionMemory:
    """The sums of one division-normalised linear attention without gates.

    Args:
        sums: `[B, H, D, D + 1]`, of keys times values, and, in the last column, of keys; None before the first tokens.
        count: tokens they are over.
    """

    sums: Tensor | None = None
    count: int = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Add the keys and values of tokens, `[B, N, H, D]`, and read out their queries: `[B, N, H, D]`.

        With the first tokens that is `kernels.linear_attention` of them; like it, it computes in float32 at least, also
        under autocast.
        """
        with full_precision(query.device):
            query, key, value = common_dtype(query, key, value)
            with_ones = F.pad(value, (0, 1), value=1.0)
            new = torch.einsum("bnhd,bnhe->bhde", F.relu(key) + EPS, with_ones)
            self.sums = new if self.sums is None else self.sums + new
            self.count += key.shape[1]
            read = torch.einsum("bnhd,bhde->bnhe", F.relu(query) + EPS, self.sums)
            return read[..., :-1] / (read[..., -1:] + self.count * EPS)


@dataclass
class EncoderMemory:
    """What the first half of the image encoder made of the tokens known so far.

    Args:
        layers: of each block.
        context: `[B, n, C]`, its output; None before the first call.
        known: `[B, m, C]`, its output for the known tokens in the order in which they became known.
        seen: `[B, m, D]`, these tokens as they were when they were encoded; kept by whoever asks `is_of`.
    """

    layers: list[AttentionMemory] = field(default_factory=list)
    context: Tensor | None = None
    known: Tensor | None = None
    seen: Tensor | None = None

    @classmethod
    def of_depth(cls, blocks: int) -> "EncoderMemory":
        return cls([AttentionMemory() for _ in range(blocks)])

    def is_of(self, tokens: Tensor) -> bool:
        """Whether the known tokens `[B, n, D]` begin with those seen, of the same images and unchanged since."""
        if self.seen is None:
            return True
        return len(tokens) == len(self.seen) and torch.equal(tokens[:, : self.seen.shape[1]], self.seen)
