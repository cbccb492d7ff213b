"""A tiny text encoder for small vocabularies: words to vectors, then transformer blocks."""

import logging
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from generation.lina.captioned_shapes import VOCABULARY

logger = logging.getLogger(__name__)

WORD = re.compile(r"\w+")
REMEMBERED_PROMPTS = 1 << 16  # beyond which the memory of tokenised prompts is emptied
SHOWN_PROMPT, SHOWN_WORD, SHOWN_WORDS = 77, 20, 8  # in warnings: characters, and how many unknown words
SHOWN_VOCABULARY = 40  # words


class Words(NamedTuple):
    """A prompt, read: embedding indices, those of its words that have no embedding of their own, and its length."""

    tokens: list[int]
    unknown: tuple[str, ...]
    length: int


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


class TransformerBlock(nn.Module):
    """Pre-norm attention among the words of each prompt, then a two-layer perceptron."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor, is_word: Tensor) -> Tensor:
        """x (B, L, C); is_word bool (B, L), True for at least one position of every prompt."""
        batch, length, dim = x.shape
        heads = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # (B, heads, L, C / heads) each
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=is_word[:, None, None, :])
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, dim))
        return x + self.mlp(self.mlp_norm(x))


class WordTextEncoder(ModelMixin, ConfigMixin):
    """Prompts to one vector a word, without padding.

    Prompts are lower-cased and split at whitespace and punctuation. Words outside the vocabulary share `buckets`
    embeddings by a hash, so that every prompt is accepted, with a warning; words that share one cannot be told apart.

    Args:
        vocabulary: words with an embedding of their own, lower case; those of captioned shapes by default.
        buckets: embeddings for all other words together.
        dim: channels of the output.
        num_heads: of the attention; divides `dim`.
        depth: transformer blocks.
        max_length: words of a prompt at most; a longer one is cut, with a warning.
    """

    @register_to_config
    def __init__(
        self,
        vocabulary: Sequence[str] = VOCABULARY,
        buckets: int = 64,
        dim: int = 128,
        num_heads: int = 4,
        mlp_ratio: int = 2,
        depth: int = 1,
        max_length: int = 12,
    ) -> None:
        super().__init__()
        for name in ("buckets", "dim", "num_heads", "mlp_ratio", "depth", "max_length"):
            if self.config[name] < 1:
                raise ValueError(f"{name} is {self.config[name]}; it is at least 1")
        if dim % num_heads or dim % 2:
            raise ValueError(f"dim is {dim}; it must be a multiple of num_heads, {num_heads}, and of 2")
        if isinstance(vocabulary, str) or len(set(vocabulary)) != len(vocabulary):
            raise ValueError(f"vocabulary is {vocabulary!r}; it must be a list of different words")
        if wrong := [word for word in vocabulary if WORD.findall(word.lower()) != [word]]:
            raise ValueError(f"vocabulary holds {wrong[0]!r}; entries are single lower-case words without punctuation")
        self.index_of = {word: index for index, word in enumerate(vocabulary)}
        self.embedding = nn.Embedding(len(vocabulary) + buckets, dim)
        # As large as the words: with faint positions a model reads captions as bags of words for a long time.
        angles = torch.outer(torch.arange(max_length), 100.0 ** -torch.linspace(0, 1, dim // 2))
        self.positions = nn.Parameter(torch.cat([angles.sin(), angles.cos()], 1))
        self.blocks = nn.ModuleList([TransformerBlock(dim, num_heads, mlp_ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.embedding.weight)
        self._words_of: dict[str, Words] = {}

    def tokenize(self, prompt: str) -> list[int]:
        """Embedding indices of a prompt's words, `max_length` at most."""
        return self._read(prompt).tokens

    def _read(self, prompt: str) -> Words:
        read = self._words_of.get(prompt)
        if read is None:
            found = WORD.findall(prompt.lower())
            kept = found[: self.config.max_length]
            unknown = tuple(word for word in kept if word not in self.index_of)
            read = Words([self._token(word) for word in kept], unknown, len(found))
            if len(self._words_of) >= REMEMBERED_PROMPTS:
                self._words_of.clear()
            self._words_of[prompt] = read
        return read

    def _warn(self, prompts: Sequence[str], words: Sequence[Words]) -> None:
        """Of prompts that are cut and of unknown words, once each, however many there are."""
        most = self.config.max_length
        if cut := {prompt: own.length for prompt, own in zip(prompts, words, strict=True) if own.length > most}:
            prompt, length = next(iter(cut.items()))
            others = f" (so are {len(cut) - 1} other prompts)" if len(cut) > 1 else ""
            shown = shortened(prompt, SHOWN_PROMPT)
            logger.warning("prompt %r has %d words; those after the first %d are cut%s", shown, length, most, others)
        if unknown := list(dict.fromkeys(word for own in words for word in own.unknown)):
            shown = ", ".join(repr(shortened(word, SHOWN_WORD)) for word in unknown[:SHOWN_WORDS])
            others = f" and {len(unknown) - SHOWN_WORDS} more" if len(unknown) > SHOWN_WORDS else ""
            known = list(self.index_of)
            first = ", ".join(known[:SHOWN_VOCABULARY]) + (", ..." if len(known) > SHOWN_VOCABULARY else "")
            message = "unknown words: %s%s; the model has learnt nothing of them. Its vocabulary is %d words: %s"
            logger.warning(message, shown, others, len(known), first)

    def _token(self, word: str) -> int:
        if word in self.index_of:
            return self.index_of[word]
        # crc32 is the same in every process and on every machine, unlike Python's hash.
        return len(self.index_of) + zlib.crc32(word.encode()) % self.config.buckets

    def forward(self, prompts: Sequence[str]) -> list[Tensor]:
        """One (length, dim) tensor a prompt, length its number of words: 0 for an empty prompt."""
        if isinstance(prompts, str):
            raise ValueError(f"prompts is the string {prompts!r}; it must be a list of prompts")
        words = [self._read(prompt) for prompt in prompts]
        self._warn(prompts, words)
        tokens = [own.tokens for own in words]
        worded = [i for i, own in enumerate(tokens) if own]
        encoded = [self.positions.new_zeros(0, self.config.dim) for _ in tokens]
        if not worded:
            return encoded
        longest = max(len(tokens[i]) for i in worded)
        padded = torch.tensor([tokens[i] + [-1] * (longest - len(tokens[i])) for i in worded], device=self.device)
        is_word = padded >= 0
        x = self.embedding(padded.clamp_min(0)) + self.positions[:longest]  # (B, L, C)
        for block in self.blocks:
            x = block(x, is_word)
        x = self.norm(x)
        # One split, not a slice a prompt: the gradient of every slice would fill a whole (B, L, C).
        for i, own in zip(worded, x[is_word].split([len(tokens[i]) for i in worded]), strict=True):
            encoded[i] = own
        return encoded
