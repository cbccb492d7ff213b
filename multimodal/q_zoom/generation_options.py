"""What a caller asks of `generate`, gathered from keywords, a given configuration and the model's."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

UNSUPPORTED = {
    "assistant_model": "the helping model has not read the regions",
    "prompt_lookup_num_tokens": "it reads several tokens where Q-Zoom has read one",
    "assistant_early_exit": "it reads several tokens where Q-Zoom has read one",
}


@dataclass(frozen=True)
class GenerationOptions:
    """Settled options of `generate`.

    Args:
        config: all settings; lengths count new tokens alone.
        others: keywords that are no settings, such as `logits_processor` and `streamer`.
    """

    config: GenerationConfig
    others: dict[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel, options: Mapping[str, Any], prompt_length: int) -> "GenerationOptions":
        """Settle options as stock `generate` ranks them: keywords, then `generation_config`, then the model's own.

        Args:
            prompt_length: tokens of the caller's prompts, which `max_length` and `min_length` count and regions do not.

        Raises:
            ValueError: `use_cache` is False, decoding is assisted, or `max_length` leaves no new token.
        """
        others = dict(options)
        given = others.pop("generation_config", None)
        config = copy.deepcopy(model.generation_config)
        if given is not None:
            kept = {name: value for name, value in given.to_dict().items() if value is not None}
            config.update(**{name: value for name, value in kept.items() if not name.startswith(("_", "transformers"))})
        others = config.update(**others)
        for name, reason in UNSUPPORTED.items():
            value = others.get(name, getattr(config, name, None))
            if value is not None:
                raise ValueError(f"{name} is {value!r}; Q-Zoom cannot go on with it, for {reason}; leave it out")
        if config.use_cache is False:
            raise ValueError("use_cache is False; without a cache the image would be lost after the first token")
        if config.max_new_tokens is None and config.max_length is not None:
            config.max_new_tokens = config.max_length - prompt_length
            if config.max_new_tokens < 1:
                raise ValueError(
                    f"max_length is {config.max_length}; with a prompt of {prompt_length} tokens it must be at least "
                    f"{prompt_length + 1}"
                )
        if config.min_new_tokens is None and config.min_length:
            config.min_new_tokens = max(0, config.min_length - prompt_length)
        config.max_length = config.min_length = None
        return cls(config, others)

    @property
    def copies(self) -> int:
        """Sequences a prompt is decoded in at once."""
        return max(self.config.num_beams or 1, self.config.num_return_sequences or 1)

    @property
    def ends(self) -> set[int]:
        """Ids that end an answer."""
        ends = self.config.eos_token_id
        return set(ends) if isinstance(ends, (list, tuple)) else set() if ends is None else {int(ends)}

    @property
    def padding(self) -> int:
        """The id that fills a batch's shorter rows; masks hide it."""
        if self.config.pad_token_id is not None:
            return int(self.config.pad_token_id)
        return min(self.ends, default=0)

    def with_settings(self, **settings: Any) -> "GenerationOptions":
        """These options with other settings."""
        config = copy.deepcopy(self.config)
        config.update(**settings)
        return replace(self, config=config)
