"""How well the tiny reader reads: scores over scenes that it was not trained with.

    python -m multimodal.tiny_reader.evaluation [folder] [--scenes 1000]

An answer counts if all its tokens are right, the ending included, which is what greedy decoding would give.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from multimodal.tiny_reader.dialogues import answers_right, hidden_states, lay_out
from multimodal.tiny_reader.model import TinyReaderForConditionalGeneration
from multimodal.tiny_reader.scenes import HELD_OUT_SEED, Box, Question, Scene, draw_scene
from multimodal.tiny_reader.shipped import READER
from multimodal.tiny_reader.views import (
    GRID,
    WHOLE,
    box_around,
    cell_labels,
    coarse_view,
    normalised,
    region_grid,
    region_view,
)


def cell_scores(classified: Callable[[Tensor], dict[str, Tensor]], scenes: Sequence[Scene]) -> dict[str, float]:
    """Shares of landmarks named right in their cells: in whole scenes, and in the region around one landmark of each.

    Args:
        classified: from pictures `[B, 3, H, W]` of uint8 to the classes of their cells, `[B, cells]` a label.
    """
    scores: dict[str, list[float]] = defaultdict(list)

    def count(prefix: str, pictures: Tensor, boxes: Sequence[Box], shown: Sequence[Scene], grid: tuple[int, int]):
        labels, found = cell_labels(shown, boxes, grid), classified(pictures)
        for name, truth in labels.items():
            named = truth >= 0
            scores[f"{prefix}_{name}"] += (found[name][named] == truth[named]).float().tolist()

    count("coarse", torch.stack([coarse_view(scene) for scene in scenes]), [WHOLE] * len(scenes), scenes, (GRID, GRID))
    for boxes, shown in by_shape([box_around(scene.landmarks[0]) for scene in scenes], scenes):
        views = torch.stack([region_view(scene, box) for scene, box in zip(shown, boxes, strict=True)])
        count("region", views, boxes, shown, region_grid(boxes[0][3] - boxes[0][1], boxes[0][2] - boxes[0][0]))
    return {name: float(np.mean(values)) for name, values in scores.items() if values}


def by_shape(boxes: Sequence[Box], scenes: Sequence) -> list[tuple[list[Box], list]]:
    """Boxes of equal size together, with what belongs to them."""
    groups: dict[tuple[int, int], tuple[list[Box], list]] = {}
    for box, scene in zip(boxes, scenes, strict=True):
        of_size = groups.setdefault((box[2] - box[0], box[3] - box[1]), ([], []))
        of_size[0].append(box)
        of_size[1].append(scene)
    return list(groups.values())


@torch.no_grad()
def answered_right(
    model: PreTrainedModel,
    scenes: Sequence[Scene],
    questions: Sequence[Question],
    boxes: Sequence[Box] | None = None,
) -> Tensor:
    """Which questions are answered right, `[B]` bool, of the coarse view or with regions of one size too."""
    pictures = [torch.stack([coarse_view(scene) for scene in scenes])]
    if boxes is not None:
        pictures.append(torch.stack([region_view(scene, box) for scene, box in zip(scenes, boxes, strict=True)]))
    dialogues = lay_out(questions, pictures, boxes).to(model.device)
    features = [model.model.visual.encode(normalised(part)) for part in dialogues.pictures]
    predicted = model.lm_head(hidden_states(model, dialogues, features)).argmax(-1)
    return answers_right(predicted, dialogues.labels).cpu()


def question_results(model: PreTrainedModel, scenes: Sequence[Scene]) -> dict[str, list[float]]:
    """All questions of the scenes, 1 for a right answer and 0 for a wrong one.

    "coarse" is the coarse view alone, "oracle" with the region of the right cell and its neighbours; codes in small
    and in big print are counted apart.
    """
    asked: dict[str, list[tuple[Scene, Question]]] = defaultdict(list)
    for scene in scenes:
        for question in scene.questions():
            name = question.kind
            if name == "code":
                name = "code_big" if scene.landmarks[question.landmark].big else "code_small"
            asked[name].append((scene, question))
    results: dict[str, list[float]] = defaultdict(list)
    for name, pairs in asked.items():
        results[f"coarse_{name}"] = answered_right(model, *zip(*pairs, strict=True)).float().tolist()
        if name in ("code_big", "code_small", "shape"):
            around = [box_around(scene.landmarks[question.landmark]) for scene, question in pairs]
            for boxes, some in by_shape(around, pairs):
                results[f"oracle_{name}"] += answered_right(model, *zip(*some, strict=True), boxes).float().tolist()
    return dict(sorted(results.items()))


def question_scores(model: PreTrainedModel, scenes: Sequence[Scene]) -> dict[str, float]:
    """The means of `question_results`."""
    return {name: float(np.mean(values)) for name, values in question_results(model, scenes).items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m multimodal.tiny_reader.evaluation", description=__doc__)
    parser.add_argument("folder", nargs="?", default=READER, help="of the model (default: the shipped one)")
    parser.add_argument("--scenes", type=int, default=1000, help="held-out scenes (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.scenes < 1:
        parser.error(f"--scenes is {options.scenes}; it must be at least 1")
    model = TinyReaderForConditionalGeneration.from_pretrained(options.folder).eval()
    results: dict[str, list[float]] = defaultdict(list)
    for start in range(0, options.scenes, 100):
        scenes = [draw_scene(HELD_OUT_SEED + seed) for seed in range(start, min(start + 100, options.scenes))]
        for name, values in question_results(model, scenes).items():
            results[name] += values
    print(f"right answers to all questions of {options.scenes} held-out scenes")
    for name, values in results.items():
        print(f"  {name:20s} {100 * np.mean(values):5.1f} %  of {len(values)}")


if __name__ == "__main__":
    main()
