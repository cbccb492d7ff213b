"""From samples to prompts, and to the answers that follow them in training."""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from multimodal.q_zoom.adapters import BackboneAdapter
from multimodal.q_zoom.model import QZoom
from multimodal.q_zoom.prompt import Prompt
from multimodal.q_zoom.training.samples import ZoomSample


class SystemMessage:
    """A processor whose chats begin with a system message of `text`; otherwise it is `processor`."""

    def __init__(self, processor: Any, text: str) -> None:
        self.processor, self.text = processor, text

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.processor(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        message = {"role": "system", "content": [{"type": "text", "text": self.text}]}
        return self.processor.apply_chat_template([message, *conversation], **options)


def told(zoom: QZoom, system: str) -> QZoom:
    """The same Q-Zoom, all weights shared, that puts a system message before every question.

    Raises:
        ValueError: `system` is no text, or empty.
    """
    if not isinstance(system, str) or not system.strip():
        raise ValueError(f"system is {system!r}; it must be a text that is not empty, or None")
    zoom = copy.copy(zoom)
    zoom.adapter = copy.copy(zoom.adapter)
    zoom.adapter.processor = SystemMessage(zoom.adapter.processor, system)
    return zoom


def inputs_of(zoom: QZoom, samples: Sequence[ZoomSample], tokens: int | None) -> Mapping[str, Tensor]:
    """The processor's output for samples shown at the same budget, `None` for the configuration's.

    Processors choose rows and columns by the budget, and where it is one number it can be others than where it is a
    range; images that have a grid of their own (see `ZoomSample.grid`) are resized to it first where
    it would be another, and the processor leaves them so.
    """
    pictures = [on_grid(zoom.adapter, sample) for sample in samples]
    questions = [sample.question for sample in samples]
    return zoom.ask(pictures, questions) if tokens is None else zoom.adapter.ask(pictures, questions, (tokens, tokens))


def on_grid(adapter: BackboneAdapter, sample: ZoomSample) -> Image.Image:
    """The sample's image as the processor is to get it."""
    picture, grid = sample.picture(), sample.grid()
    if grid is None or adapter.fixed_tokens is not None:
        return picture
    cell = adapter.cell_pixels
    height, width, budget = grid[0] * cell, grid[1] * cell, grid[0] * grid[1] * cell**2
    if smart_resize(picture.height, picture.width, cell, budget, budget) == (height, width):
        return picture  # the processor brings it there itself
    return picture.resize((width, height), Image.Resampling.BICUBIC)


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
