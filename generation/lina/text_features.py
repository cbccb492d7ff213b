"""Features of prompts by whichever text encoder a model has."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from generation.loaded_weights import not_finite

logger = logging.getLogger(__name__)

SHOWN = 60  # characters of a prompt in a message


def encode_prompts(encoder: nn.Module, tokenizer: Any, prompts: Sequence[str], length: int) -> list[Tensor]:
    """Features `[length_i, dim]` of each prompt, at most `length` of them: a longer one is cut, with a warning.

    Args:
        encoder: takes a list of prompts, if `tokenizer` is None; else a model of transformers, whose last hidden state
            is taken.
        tokenizer: of a model of transformers.
        prompts: not empty.
        length: of the longest.
    """
    if tokenizer is None:
        features = encoder(list(prompts))
        for prompt, own in zip(prompts, features, strict=True):
            _warn_if_cut(prompt, len(own), length)
        return [own[:length] for own in features]
    features = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        _warn_if_cut(prompt, len(ids), length)
        ids = torch.tensor([ids[:length]], dtype=torch.long, device=encoder.device)
        features.append(encoder(input_ids=ids).last_hidden_state[0])
    return features


def _warn_if_cut(prompt: str, tokens: int, length: int) -> None:
    if tokens > length:
        shown = prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]}..."
        logger.warning("prompt %r has %d tokens; those after the first %d are cut", shown, tokens, length)


def load_text_encoder(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Phi-2 without its head, and its tokenizer, from `text_encoder/` and `tokenizer/` below `folder`.

    Raises:
        ValueError: a file is missing or damaged, or weights are missing or not finite.
    """
    from transformers import AutoTokenizer, PhiModel
    from transformers.utils import logging as transformers_logging

    place = folder / "text_encoder"
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # or it reports that the head, which is not wanted, is left out
    try:
        encoder, report = PhiModel.from_pretrained(
            place, dtype=dtype, local_files_only=True, weights_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    # transformers raises whatever the reader of the damaged file raises.
    except Exception as error:
        raise ValueError(f"{place} or {folder / 'tokenizer'} cannot be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if wrong := sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"]))):
        raise ValueError(f"{place}: {len(wrong)} tensors are missing or of a wrong shape, the first {wrong[0]}")
    if wrong := not_finite(encoder):
        raise ValueError(f"{place}: the tensor {wrong} is not finite")
    return encoder.requires_grad_(False).eval(), tokenizer
