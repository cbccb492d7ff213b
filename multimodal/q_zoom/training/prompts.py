"""From samples to prompts, and to the answers that follow them in training."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from multimodal.q_zoom.adapters import BackboneAdapter
from multimodal.q_zoom.model import QZoom
from multimodal.q_zoom.prompt import Prompt
from multimodal.q_zoom.training.samples import ZoomSample


def inputs_of(zoom: QZoom, samples: Sequence[ZoomSample], tokens: int | None) -> Mapping[str, Tensor]:
    """The processor's output for samples shown at the same budget, `None` for the configuration's."""
    pictures = [sample.picture() for sample in samples]
    questions = [sample.question for sample in samples]
    return zoom.ask(pictures, questions) if tokens is None else zoom.adapter.ask(pictures, questions, (tokens, tokens))


def by_budget(samples: Sequence[ZoomSample]) -> dict[int | None, list[int]]:
    """Indices of samples by the number of visual tokens their images are shown at."""
    budgets = defaultdict(list)
    for index, sample in enumerate(samples):
        budgets[sample.tokens].append(index)
    return dict(budgets)


def prompts_of(zoom: QZoom, samples: Sequence[ZoomSample]) -> list[Prompt]:
    """The samples' questions with their images as the decoder reads them, in order."""
    prompts: list[Prompt | None] = [None] * len(samples)
    for tokens, indices in by_budget(samples).items():
        inputs = inputs_of(zoom, [samples[index] for index in indices], tokens)
        for index, prompt in zip(indices, zoom.adapter.prompts(inputs), strict=True):
            prompts[index] = prompt
    return prompts


def answer_ids(adapter: BackboneAdapter, question: str, answer: str) -> Tensor:
    """Ids of an answer as the chat format ends it: what follows the prompt, `[N]`.

    Raises:
        ValueError: the answer is empty, or the chat format puts it elsewhere than after the prompt.
    """
    if not answer.strip():
        raise ValueError(f"answer to {question!r} is {answer!r}; it must be a text that is not empty")
    processor = adapter.processor
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    dialogue = processor.apply_chat_template(answered, tokenize=False)
    if not dialogue.startswith(prompt):
        raise ValueError(f"the chat format does not put an answer after its prompt: {prompt!r} and {dialogue!r}")
    tokenizer = processor.tokenizer
    ids = tokenizer(dialogue[len(prompt) :], add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, device=adapter.model.device)
