"""Answers by stock `generate`, from prompts that Q-Zoom has read: the caches of rows become one, padded on the left."""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from multimodal.q_zoom.adapters.protocol import BackboneAdapter
from multimodal.q_zoom.generation_options import GenerationOptions
from multimodal.q_zoom.prefill import Prefilled


def continue_by_generate(
    adapter: BackboneAdapter, rows: Sequence[Prefilled], input_ids: Tensor, options: GenerationOptions
) -> Any:
    """What `generate` of the stock model returns, as if its prompts had been `input_ids`.

    Args:
        rows: prompts that were read; their caches must not be used afterwards.
        input_ids: `[B, S]`, the questions as the caller gave them, which the result starts with.
        options: of `generate`. Streamers and stopping criteria see the prompts with their regions.
    """
    length = max(row.prompt.length for row in rows)
    cache = together([row.cache for row in rows], length)
    if options.copies > 1:
        cache.batch_repeat_interleave(options.copies)
    ids = input_ids.new_full((len(rows), length), options.padding)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - row.prompt.length :] = row.prompt.input_ids
        mask[index, length - row.prompt.length :] = 1
    logits = torch.stack([row.logits for row in rows])[:, None].repeat_interleave(options.copies, dim=0)
    generated = with_first_answer(adapter.model, logits, cache).generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        **adapter.generation_positions([row.prompt.positions for row in rows], length),
        generation_config=options.config,
        **options.others,
    )
    if isinstance(generated, Tensor):
        return as_asked(generated, input_ids, length)
    generated.sequences = as_asked(generated.sequences, input_ids, length)
    return generated


def with_first_answer(model: PreTrainedModel, logits: Tensor, cache: DynamicCache) -> PreTrainedModel:
    """A stand-in for `model`, for one `generate`, which begins with a token that was read already.

    `generate` always asks the model for a token at least, so the last is taken out of `cache`. The stand-in shares all
    of the model's parts and answers that first question by putting the token back and returning `logits`; whatever else
    it is asked the stock model answers. Nothing is set on the model itself.

    Args:
        logits: `[B, 1, V]` of the last token.
    """
    last = [(layer.keys[:, :, -1:], layer.values[:, :, -1:]) for layer in cache.layers]
    cache.crop(-1)
    stand_in, stock, waiting = copy.copy(model), model.forward, [logits]

    @functools.wraps(stock)
    def forward(
        input_ids: Tensor | None = None, *arguments: Any, past_key_values: Cache | None = None, **options: Any
    ) -> Any:
        first = waiting.pop() if waiting else None
        more = options.get("output_attentions") or options.get("output_hidden_states")
        if first is None or more or input_ids is None or input_ids.shape[1] != 1:
            return stock(input_ids, *arguments, past_key_values=past_key_values, **options)
        for index, states in enumerate(last):
            past_key_values.update(*states, index)
        return CausalLMOutputWithPast(logits=first, past_key_values=past_key_values)

    stand_in.forward = forward
    return stand_in


def as_asked(sequences: Tensor, input_ids: Tensor, length: int) -> Tensor:
    """Generated sequences whose first `length` tokens become the caller's own prompts again."""
    copies = len(sequences) // len(input_ids)
    return torch.cat((input_ids.repeat_interleave(copies, dim=0), sequences[:, length:]), dim=1)


def together(caches: Sequence[DynamicCache], length: int) -> DynamicCache:
    """One cache for a batch, each row padded on the left to `length` tokens."""
    if len(caches) == 1:
        return caches[0]
    joined = DynamicCache()
    for index in range(len(caches[0].layers)):
        states = [
            torch.cat([padded(getattr(cache.layers[index], kind), length) for cache in caches])
            for kind in ("keys", "values")
        ]
        joined.update(*states, index)
    return joined


def padded(states: Tensor, length: int) -> Tensor:
    """`[1, H, S, D]` with zeros before, to `length` tokens."""
    return F.pad(states, (0, 0, length - states.shape[2], 0))
