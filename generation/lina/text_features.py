"""Features of prompts by whichever text encoder a model has."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def encode_prompts(encoder: nn.Module, tokenizer: Any, prompts: Sequence[str], length: int) -> list[Tensor]:
    """Features `[length_i, dim]` of each prompt; of an empty prompt there are none.

    Args:
        encoder: takes a list of prompts, if `tokenizer` is None; else a model of transformers, whose last hidden state is
            taken.
        tokenizer: of a model of transformers.
        prompts: a longer one is cut to `length` tokens, with a warning.
        length: of the longest.
    """
    if tokenizer is None:
        return encoder(list(prompts))
    features = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"] if prompt.strip() else []
        if len(ids) > length:
            logger.warning("prompt %r has %d tokens; those after the first %d are cut", prompt, len(ids), length)
        ids = torch.tensor([ids[:length]], dtype=torch.long, device=encoder.device)
        if ids.shape[1]:
            features.append(encoder(input_ids=ids).last_hidden_state[0])
        else:
            features.append(torch.zeros(0, encoder.config.hidden_size, device=encoder.device, dtype=encoder.dtype))
    return features


def load_text_encoder(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Phi-2 without its head, and its tokenizer, from `text_encoder/` and `tokenizer/` below `folder`."""
    from transformers import AutoTokenizer, PhiModel

    encoder = PhiModel.from_pretrained(folder / "text_encoder", dtype=dtype, local_files_only=True, weights_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return encoder.requires_grad_(False).eval(), tokenizer
