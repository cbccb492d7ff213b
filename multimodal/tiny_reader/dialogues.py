"""Questions with their pictures and answers as rows of tokens, in the order and at the positions of use.

A picture alone is laid out as stock Qwen2.5-VL has it; a scene with a region that was looked at as Q-Zoom has it,
the region's tokens on the rows and columns of the scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from multimodal.q_zoom.positions import fused_positions, splice_plan
from multimodal.tiny_reader.processing import CHAT_QUESTION, IMAGE, build_tokenizer
from multimodal.tiny_reader.scenes import Box, Question
from multimodal.tiny_reader.views import GRID

IGNORED = -100


@dataclass(frozen=True)
class Dialogues:
    """B rows of S tokens, padded on the right, where no token of a row sees it.

    Attributes:
        ids: `[B, S]`.
        labels: `[B, S]`, the answers' tokens and -100 elsewhere.
        positions: `[3, B, S]`, time, row and column, float32.
        lengths: `[B]`, of the prompts; the token before that is the one an answer begins from.
        pictures: of every picture of a row `[B, 3, H, W]` of uint8, the scene before the region.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    lengths: Tensor
    pictures: tuple[Tensor, ...]

    def to(self, device: torch.device) -> "Dialogues":
        tensors = (getattr(self, name).to(device) for name in ("ids", "labels", "positions", "lengths"))
        return Dialogues(*tensors, tuple(pictures.to(device) for pictures in self.pictures))


@cache
def tokens_of(text: str) -> tuple[int, ...]:
    return tuple(tokenizer()(text, add_special_tokens=False)["input_ids"])


@cache
def tokenizer():
    return build_tokenizer()


def image_positions(start: int, grid: tuple[int, int]) -> Tensor:
    """Positions of a picture's tokens, `[3, rows * columns]`, as of stock Qwen2.5-VL."""
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column]).flatten(1) + start


def prompt_row(question: str, grid: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
    """Ids `[S]` and positions `[3, S]` of a question about one picture, and the index of the picture's first token."""
    before, after = (tokens_of(part) for part in CHAT_QUESTION.format(question=question).split(IMAGE))
    start, count = len(before), grid[0] * grid[1]
    ids = torch.tensor([*before, *tokens_of(IMAGE) * count, *after])
    texts = [torch.arange(start), torch.arange(len(after)) + start + max(grid)]
    parts = [texts[0].expand(3, -1), image_positions(start, grid), texts[1].expand(3, -1)]
    return ids, torch.cat(parts, 1).float(), start


def lay_out(
    questions: Sequence[Question],
    pictures: Sequence[Tensor],
    region_boxes: Sequence[Box] | None = None,
) -> Dialogues:
    """Rows of one form: a picture each, or with `region_boxes` a scene and a region of it each.

    Args:
        questions: B.
        pictures: `[B, 3, H, W]` of uint8, one tensor, or two (scenes, then regions).
        region_boxes: of the regions, in cells of the coarse view.
    """
    *_, (rows, columns) = (tuple(size // 8 for size in part.shape[2:]) for part in pictures)
    made = []
    for index, question in enumerate(questions):
        if region_boxes is None:
            ids, positions, _ = prompt_row(question.text, (rows, columns))
        else:
            ids, positions, start = prompt_row(question.text, (GRID, GRID))
            plan = splice_plan(len(ids), start, GRID**2, [rows * columns])
            ids = plan.splice(ids, ids.new_full((rows * columns,), ids[start].item()))
            positions = fused_positions(positions, start, (GRID, GRID), [(rows, columns)], [region_boxes[index]])
        answer = torch.tensor(tokens_of(question.answer + "<|im_end|>"))
        made.append((ids, positions, answer))
    longest = max(len(ids) + len(answer) for ids, _, answer in made)
    all_ids = torch.zeros(len(made), longest, dtype=torch.long)
    labels = torch.full_like(all_ids, IGNORED)
    all_positions = torch.zeros(3, len(made), longest)
    for index, (ids, positions, answer) in enumerate(made):
        length, end = len(ids), len(ids) + len(answer)
        all_ids[index, :end] = torch.cat([ids, answer])
        labels[index, length:end] = answer
        all_positions[:, index, :length] = positions
        all_positions[:, index, length:] = positions[:, -1:] + 1 + torch.arange(longest - length)
    return Dialogues(all_ids, labels, all_positions, torch.tensor([len(ids) for ids, _, _ in made]), tuple(pictures))


def hidden_states(model: PreTrainedModel, dialogues: Dialogues, features: Sequence[Tensor]) -> Tensor:
    """What the decoder makes of the rows, `[B, S, width]`, after its last norm.

    Args:
        features: of every picture of a row, `[B, tokens, width]`.
    """
    language = model.model.language_model
    embeddings = language.embed_tokens(dialogues.ids)
    visual = dialogues.ids == model.config.image_token_id
    embeddings = embeddings.masked_scatter(visual[..., None], torch.cat(list(features), 1).to(embeddings))
    output = language(inputs_embeds=embeddings, position_ids=dialogues.positions, use_cache=False)
    return output.last_hidden_state


def answers_right(predicted: Tensor, labels: Tensor) -> Tensor:
    """Which rows are right in all tokens of the answer, `[B]` bool, of predictions for the next tokens, `[B, S]`."""
    following = labels[:, 1:]
    return ((predicted[:, :-1] == following) | (following == IGNORED)).all(1)
