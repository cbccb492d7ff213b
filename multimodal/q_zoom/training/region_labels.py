"""Attention of a backbone while it answers, recorded for the labels of the region proposal (stage 1).

Which heads point at what an answer is about differs from model to model: `POINTING_HEADS` names those of the published
models, and `choose_heads` finds them by samples whose boxes are known.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multimodal.argument_checks import check_real, check_whole
from multimodal.q_zoom.adapters import BackboneAdapter
from multimodal.q_zoom.adapters.protocol import image_run
from multimodal.q_zoom.model import QZoom
from multimodal.q_zoom.pseudo_labels import PointingHeads, attention_map
from multimodal.q_zoom.regions import cells_touched
from multimodal.q_zoom.training.prompts import by_budget, inputs_of, told
from multimodal.q_zoom.training.samples import ZoomSample

SHORT_ANSWER = "Answer the question using a single word or phrase."
BOX_REQUEST = (
    "Output the grounding bounding box of Region of Interest for the question. IMPORTANT: The output MUST be raw text, "
    "one box per line. DO NOT use JSON. Follow this exact format: x_min y_min x_max y_max {detail_label}."
)

Request = Callable[[str], str]

Steps = list[dict[int, Tensor]]
"""Attention of one answer by step and layer, `[heads, 1, keys]`; the first step is the prompt's last token's."""


@dataclass(frozen=True)
class Answered:
    """An answer with what its tokens looked at.

    Args:
        text: the answer.
        steps: attention, the prompt's step first.
        visual: `[S]` bool: the image's tokens among the keys of the prompt.
        grid: rows and columns of the image.
    """

    text: str
    steps: Steps
    visual: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class ChosenHeads:
    """Heads by layer, and how often each one's highest cell was in the samples' boxes, `[layers, heads]`."""

    heads: dict[int, list[int]]
    hits: Tensor


@contextmanager
def recorded_attention(adapter: BackboneAdapter, layers: Sequence[int]) -> Iterator[Steps]:
    """Within the block the model attends eagerly, and every call appends the last token's attention, `[B, H, keys]`."""
    language = adapter.decoder
    before = language.config._attn_implementation
    model = adapter.model.model.language_model
    steps: Steps = []

    def hook_of(layer: int):
        def keep(module: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
            if not steps or layer in steps[-1]:
                steps.append({})
            steps[-1][layer] = output[1][:, :, -1].detach().float().cpu()

        return keep

    hooks = [language.layers[layer].self_attn.register_forward_hook(hook_of(layer)) for layer in layers]
    model.set_attn_implementation("eager")
    try:
        yield steps
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def answer_and_record(
    zoom: QZoom,
    samples: Sequence[ZoomSample],
    layers: Sequence[int],
    *,
    request: Request | None = None,
    system: str | None = None,
    max_new_tokens: int = 128,
) -> list[Answered]:
    """Greedy answers of the backbone, with the attention of some layers while their tokens were read.

    Args:
        samples: shown at the same budget of tokens.
        layers: whose attention is kept.
        request: what is asked instead of a sample's question, given that.
        system: text of a system message before it; `None` leaves that to the model's chat format.
        max_new_tokens: of an answer.

    Raises:
        ValueError: a layer does not exist, or `system` is empty.
    """
    adapter = zoom.adapter
    if system is not None:
        zoom = told(zoom, system)
    for layer in layers:
        check_whole("layers", layer, 0, len(adapter.decoder.layers) - 1)
    asked = samples if request is None else [sample.replace(question=request(sample.question)) for sample in samples]
    inputs = inputs_of(zoom, asked, samples[0].tokens)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    prompts = adapter.prompts(inputs)
    with recorded_attention(adapter, layers) as steps:
        generated = adapter.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[:, ids.shape[1] :]
    ends = end_tokens(adapter)
    answered = []
    for row, prompt in enumerate(prompts):
        ended = torch.isin(generated[row].cpu(), ends).nonzero()
        length = int(ended[0]) if len(ended) else generated.shape[1] - 1  # the last token is never read
        own = [{layer: weights[row][:, None] for layer, weights in step.items()} for step in steps[: length + 1]]
        start, count = image_run(ids[row], adapter.image_token, row)
        visual = torch.zeros(ids.shape[1], dtype=torch.bool)
        visual[start : start + count] = mask[row, start : start + count].bool().cpu()
        text = adapter.processor.batch_decode(generated[row : row + 1, : length + 1], skip_special_tokens=True)[0]
        answered.append(Answered(text.strip(), own, visual, prompt.grid))
    return answered


def natural_request(question: str) -> str:
    """What is asked of a photograph instead of `question`: boxes, in the published words.

    The authors' code for labels is not public. Their description has the request follow the question, as here (in the
    place of a request for a short answer, if there is one), and optionally puts a system message first, "You are a
    helpful assistant.", which is not part of this text: give it as the `system` of `with_attention` and of
    `choose_heads`. The chat format of Qwen2.5-VL has it anyway, that of Qwen3-VL has not.
    """
    if SHORT_ANSWER in question:
        return question.replace(SHORT_ANSWER, BOX_REQUEST).strip()
    return f"{question.strip()} {BOX_REQUEST}"


def end_tokens(adapter: BackboneAdapter) -> Tensor:
    """Ids that end an answer."""
    ends = adapter.model.generation_config.eos_token_id
    return torch.tensor([] if ends is None else ends if isinstance(ends, list) else [ends], dtype=torch.long)


def map_of(answered: Answered, heads: Mapping[int, Sequence[int] | None], *, count_prompt: bool) -> Tensor | None:
    """How the answer's tokens look at the image, `[rows, columns]` (see `attention_map`); `None` if none was read.

    Args:
        count_prompt: the step of the prompt's last token counts as well.
    """
    steps = [answered.steps[0], *answered.steps] if count_prompt else answered.steps
    return attention_map(steps, answered.visual, answered.grid, heads) if len(steps) > 1 else None


def choose_heads(
    zoom: QZoom,
    samples: Sequence[ZoomSample],
    count: int = 3,
    *,
    least: float = 0.75,
    count_prompt: bool = False,
    request: Request | None = None,
    system: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
) -> ChosenHeads:
    """The heads that most often look most at the box of a sample.

    Args:
        samples: about 128, whose boxes are known.
        count: how many heads at most.
        least: a head is left out that points at the box less often than the best one times this, in [0, 1].
        count_prompt: as of `map_of`.
        request, system: as of `answer_and_record`.
        batch_size: samples answered at a time.

    Raises:
        ValueError: a sample has no box, or no answer has a token that was read.
    """
    layers = range(len(zoom.adapter.decoder.layers))
    check_real("least", least, 0, 1)
    if not samples or any(sample.box is None for sample in samples):
        raise ValueError("samples must be some, with a box each, by which heads are chosen")
    asking = {"request": request, "system": system, "max_new_tokens": max_new_tokens}
    hits, counted = 0, 0
    for chunk in chunks(samples, batch_size):
        answers = answer_and_record(zoom, chunk, layers, **asking)
        for sample, answered in zip(chunk, answers, strict=True):
            size = sample.picture().size
            box = cells_touched(sample.box, answered.grid, size)
            found = [
                [map_of(answered, {layer: [head]}, count_prompt=count_prompt) for head in range(len(weights))]
                for layer, weights in answered.steps[0].items()
            ]
            if found[0][0] is None:
                continue
            highest = torch.stack([torch.stack([cells.flatten().argmax() for cells in row]) for row in found])
            row, column = highest // answered.grid[1], highest % answered.grid[1]
            hits += (row >= box.top) & (row < box.bottom) & (column >= box.left) & (column < box.right)
            counted += 1
    if not counted:
        raise ValueError("of no sample's answer a token was read after the prompt; allow more, or count the prompt")
    rates = hits.float() / counted
    best = rates.flatten().argsort(descending=True, stable=True)[: check_whole("count", count, 1, rates.numel())]
    enough = [index for index in best.tolist() if rates.flatten()[index] >= least * rates.max()]
    heads: dict[int, list[int]] = {}
    for index in sorted(enough):
        heads.setdefault(index // rates.shape[1], []).append(index % rates.shape[1])
    return ChosenHeads(heads, rates)


def with_attention(
    zoom: QZoom,
    samples: Sequence[ZoomSample],
    heads: PointingHeads,
    *,
    count_prompt: bool = False,
    request: Request | None = None,
    system: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
) -> list[ZoomSample]:
    """Samples with the backbone's attention; those whose answer has no token that was read are left out.

    An answer that is not known becomes the backbone's own. Budgets become the number of tokens seen, so that training,
    whatever its settings, shows every image on the rows and columns of its labels (see `ZoomSample.grid`).

    Args:
        heads: those that point at the answer and those that show sinks.
        count_prompt: as of `map_of`.
        request, system: as of `answer_and_record`.
        batch_size: samples answered at a time.
        max_new_tokens: of an answer.
    """
    asking = {"request": request, "system": system, "max_new_tokens": max_new_tokens}
    layers = sorted({*heads.grounding, *heads.sink})
    done: dict[int, ZoomSample] = {}
    for budget in by_budget(samples).values():
        for chunk in chunks(budget, batch_size):
            some = [samples[index] for index in chunk]
            answers = answer_and_record(zoom, some, layers, **asking)
            for index, sample, answered in zip(chunk, some, answers, strict=True):
                grounding = map_of(answered, heads.grounding, count_prompt=count_prompt)
                if grounding is not None:
                    sink = map_of(answered, heads.sink, count_prompt=count_prompt)
                    done[index] = sample.replace(
                        grounding=grounding,
                        sink=sink,
                        tokens=answered.grid[0] * answered.grid[1],
                        answer=sample.answer or answered.text,
                    )
    return [done[index] for index in sorted(done)]


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    """`items` in order, `size` at a time."""
    for start in range(0, len(items), check_whole("batch_size", size, 1)):
        yield items[start : start + size]
