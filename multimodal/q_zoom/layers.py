"""Decoder layers of transformers, run a few at a time: from one layer to another, or for the last token alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig
from transformers.masking_utils import create_causal_mask

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the tokens' positions, `[1, S, D]` each."""


@dataclass(frozen=True)
class Decoder:
    """The parts of a stock language model that Q-Zoom runs by itself."""

    config: PretrainedConfig
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Module


def run_layers(
    decoder: Decoder,
    layers: range,
    hidden: Tensor,
    rotary: Rotary,
    cache: DynamicCache | None = None,
    *,
    past: bool = False,
    visual: Tensor | None = None,
    deepstack: Sequence[Tensor] = (),
) -> Tensor:
    """Hidden states `[1, S, C]` after some of the decoder's layers.

    Args:
        cache: takes the layers' keys and values; holds those of earlier tokens if `past`.
        past: there are earlier tokens.
        visual: `[S]` bool, which tokens `deepstack` is added to.
        deepstack: `[V, C]` a level: what is added after layer 0, 1 and so on (Qwen3-VL).
    """
    # A mask's length is read off the cache's first layer, which is not this one's where layers follow others.
    mask = causal_mask(decoder, hidden, cache if past else None)
    for index in layers:
        hidden = decoder.layers[index](
            hidden,
            attention_mask=mask,
            position_embeddings=rotary,
            position_ids=None,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        if index < len(deepstack):
            hidden = hidden.clone()
            hidden[:, visual] += deepstack[index]
    return hidden


def causal_mask(decoder: Decoder, hidden: Tensor, cache: DynamicCache | None = None) -> Tensor | None:
    """What the layers want as attention mask for `hidden` after what `cache` holds; `None` where they need none."""
    return create_causal_mask(
        config=decoder.config, inputs_embeds=hidden, attention_mask=None, past_key_values=cache, position_ids=None
    )


def rotate(states: Tensor, rotary: Rotary) -> Tensor:
    """Queries or keys `[B, H, S, D]` turned by their positions."""
    cosine, sine = (part.unsqueeze(1) for part in rotary)
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat((-second, first), dim=-1) * sine


def heads(attention: nn.Module, projection: str, hidden: Tensor) -> Tensor:
    """Queries ("q"), keys ("k") or values ("v") of an attention of transformers, not rotated: `[B, H, S, D]`."""
    states = getattr(attention, f"{projection}_proj")(hidden)
    states = states.view(*states.shape[:-1], -1, attention.head_dim)
    norm = getattr(attention, f"{projection}_norm", None)
    return (states if norm is None else norm(states)).transpose(1, 2)


def last_token(layer: nn.Module, hidden: Tensor, rotary: Rotary, cache: DynamicCache | None = None) -> Tensor:
    """The output of `layer` for the last token, `[1, 1, C]`: the others give keys and values only.

    Args:
        cache: takes the keys and values of all tokens.
    """
    cache = DynamicCache() if cache is None else cache
    cosine, sine = rotary
    attention, normed, before = layer.self_attn, layer.input_layernorm(hidden[:, :-1]), (cosine[:, :-1], sine[:, :-1])
    keys, values = rotate(heads(attention, "k", normed), before), heads(attention, "v", normed)
    cache.update(keys, values, attention.layer_idx)
    return layer(
        hidden[:, -1:],
        attention_mask=None,
        position_embeddings=(cosine[:, -1:], sine[:, -1:]),
        position_ids=None,
        past_key_values=cache,
        use_cache=True,
    )


def beginning(cache: DynamicCache, layers: int, tokens: int) -> DynamicCache:
    """A cache of its own with the first tokens of the first layers of `cache`, whose tensors it shares."""
    part = DynamicCache()
    for index in range(layers):
        kept = cache.layers[index]
        part.update(kept.keys[:, :, :tokens], kept.values[:, :, :tokens], index)
    return part
