"""Batches of scenes to learn from, drawn by number: the same for a seed, and the same when a run is resumed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multimodal.argument_checks import check_real, check_whole
from multimodal.q_zoom.training.sample_data import NumbersToCome
from multimodal.tiny_reader.dialogues import Dialogues, lay_out
from multimodal.tiny_reader.scenes import HELD_OUT_SEED, KINDS, Question, Scene, draw_scene
from multimodal.tiny_reader.views import (
    WHOLE,
    background_labels,
    box_with,
    cell_labels,
    coarse_view,
    region_grid,
    region_view,
)

# Rows and columns of regions, and how often: a cell and its neighbours, at edges and corners too, and larger boxes.
REGION_SHAPES = {
    (3, 3): 8,
    (2, 3): 4,
    (3, 2): 4,
    (2, 2): 3,
    (3, 4): 2,
    (4, 3): 2,
    (4, 4): 1,
    (2, 4): 1,
    (4, 2): 1,
}


@dataclass(frozen=True)
class LabelledViews:
    """Pictures of one size and what their cells show.

    Attributes:
        pictures: `[B, 3, H, W]` of uint8.
        labels: a label `[B, cells]` (see `cell_labels`).
        backgrounds: `[B]`.
    """

    pictures: Tensor
    labels: dict[str, Tensor]
    backgrounds: Tensor

    def to(self, device: torch.device) -> "LabelledViews":
        labels = {name: values.to(device) for name, values in self.labels.items()}
        return LabelledViews(self.pictures.to(device), labels, self.backgrounds.to(device))


class Scenes(Sequence[Scene]):
    """The scenes of consecutive seeds, drawn at once."""

    def __init__(self, count: int, first_seed: int = 0) -> None:
        self.scenes = [draw_scene(first_seed + index) for index in range(count)]
        self.coarse = torch.stack([coarse_view(scene) for scene in self.scenes])  # [N, 3, 48, 48]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Scene:
        return self.scenes[index]


class Lessons(Dataset):
    """Batches by number.

    Args:
        scenes: to draw from.
        length: how many batches there are.
        seed: of what is drawn.
    """

    def __init__(self, scenes: Scenes, length: int, seed: int) -> None:
        self.scenes, self.length, self.seed = scenes, length, seed

    def __len__(self) -> int:
        return self.length

    def drawn(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, number])


def region_shape(random: np.random.Generator) -> tuple[int, int]:
    shares = np.array(list(REGION_SHAPES.values()), dtype=float)
    return list(REGION_SHAPES)[random.choice(len(shares), p=shares / shares.sum())]


class ViewLessons(Lessons):
    """Half whole scenes, half regions of one size, with what their cells show; `views` of each."""

    def __init__(self, scenes: Scenes, length: int, seed: int, views: int) -> None:
        super().__init__(scenes, length, seed)
        self.views = views

    def __getitem__(self, number: int) -> tuple[LabelledViews, LabelledViews]:
        random = self.drawn(number)
        chosen = random.integers(len(self.scenes), size=self.views)
        whole = labelled(self.scenes.coarse[chosen], [self.scenes[i] for i in chosen], [WHOLE] * self.views, (6, 6))
        shape = region_shape(random)
        scenes = [self.scenes[i] for i in random.integers(len(self.scenes), size=self.views)]
        boxes = [box_with(random, s.landmarks[random.integers(len(s.landmarks))], *shape) for s in scenes]
        pictures = torch.stack([region_view(scene, box) for scene, box in zip(scenes, boxes, strict=True)])
        return whole, labelled(pictures, scenes, boxes, region_grid(*shape))


def labelled(pictures: Tensor, scenes: Sequence[Scene], boxes: Sequence[Any], grid: tuple[int, int]) -> LabelledViews:
    return LabelledViews(pictures, cell_labels(scenes, boxes, grid), background_labels(scenes))


class QuestionLessons(Lessons):
    """Questions about whole scenes, about scenes with a region, and about regions alone.

    Args:
        coarse, regions: so many questions of each kind on average, of `KINDS`, about scenes and about scenes with a
            region of them.
        alone: share of the batches whose regions are shown without their scenes.
    """

    def __init__(
        self,
        scenes: Scenes,
        length: int,
        seed: int,
        coarse: Mapping[str, float],
        regions: Mapping[str, float],
        alone: float,
    ) -> None:
        super().__init__(scenes, length, seed)
        self.coarse, self.regions, self.alone = coarse, regions, alone

    def __getitem__(self, number: int) -> list[Dialogues]:
        random = self.drawn(number)
        lessons = []
        if self.coarse:
            chosen, questions = self.asked(random, self.coarse)
            lessons.append(lay_out(questions, [self.scenes.coarse[chosen]]))
        if self.regions:
            shape, alone = region_shape(random), random.random() < self.alone
            kinds = {kind: count for kind, count in self.regions.items() if not (alone and kind == "where")}
            chosen, questions = self.asked(random, kinds)
            scenes = [self.scenes[i] for i in chosen]
            boxes = [
                box_with(random, scene.landmarks[landmark_of(random, scene, question)], *shape)
                for scene, question in zip(scenes, questions, strict=True)
            ]
            views = torch.stack([region_view(scene, box) for scene, box in zip(scenes, boxes, strict=True)])
            pictures = [views] if alone else [self.scenes.coarse[chosen], views]
            lessons.append(lay_out(questions, pictures, None if alone else boxes))
        return lessons

    def asked(self, random: np.random.Generator, kinds: Mapping[str, float]) -> tuple[np.ndarray, list[Question]]:
        """Scenes and a question about each."""
        counts = np.array(list(kinds.values()))
        size = round(counts.sum())
        chosen = random.integers(len(self.scenes), size=size)
        drawn = random.choice(list(kinds), size=size, p=counts / counts.sum())
        questions = [question_of(random, self.scenes[i], kind) for i, kind in zip(chosen, drawn, strict=True)]
        return chosen, questions


def question_of(random: np.random.Generator, scene: Scene, kind: str) -> Question:
    """One of the scene's questions of a kind."""
    questions = [question for question in scene.questions() if question.kind == kind]
    return questions[random.integers(len(questions))]


def landmark_of(random: np.random.Generator, scene: Scene, question: Question) -> int:
    """Index of the landmark asked about, any for the background."""
    return int(random.integers(len(scene.landmarks))) if question.landmark is None else question.landmark


class HeldOutScenes(Dataset):
    """Scenes that are never trained with, in lists."""

    def __init__(self, count: int, size: int) -> None:
        self.scenes, self.size = [draw_scene(HELD_OUT_SEED + index) for index in range(count)], size

    def __len__(self) -> int:
        return -(-len(self.scenes) // self.size)

    def __getitem__(self, number: int) -> list[Scene]:
        return self.scenes[number * self.size : (number + 1) * self.size]


class SceneLessons(pl.LightningDataModule):
    """Lessons of the tiny reader; an epoch is the whole run.

    Args:
        steps: batches of the run, which is as many steps of the optimiser.
        scenes: different scenes.
        views: whole scenes, and as many regions, of a batch with labelled cells; 0 for batches of questions.
        coarse, regions, alone: of batches of questions, see `QuestionLessons`.
        held_out: scenes for validation.
        seed: of what is drawn.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        steps: int,
        scenes: int = 12000,
        views: int = 0,
        coarse: dict[str, float] | None = None,
        regions: dict[str, float] | None = None,
        alone: float = 0.15,
        held_out: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.steps = check_whole("steps", steps, 1)
        self.count = check_whole("scenes", scenes, 1, HELD_OUT_SEED)
        self.views = check_whole("views", views, 0)
        self.alone = check_real("alone", alone, 0, 1)
        self.held_out = check_whole("held_out", held_out, 0)
        self.seed = check_whole("seed", seed, 0)
        self.coarse, self.regions = checked_kinds("coarse", coarse), checked_kinds("regions", regions)
        if not self.views and not self.coarse and not self.regions:
            raise ValueError("views is 0 and coarse and regions are empty; there must be something to learn")
        self.lessons: Lessons | None = None

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.lessons is None:
            scenes = Scenes(self.count)
            if self.views:
                self.lessons = ViewLessons(scenes, self.steps, self.seed, self.views)
            else:
                self.lessons = QuestionLessons(scenes, self.steps, self.seed, self.coarse, self.regions, self.alone)

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer

        def to_come() -> Iterator[int]:
            return iter(range(trainer.global_step % self.steps, self.steps))

        return DataLoader(self.lessons, batch_size=None, sampler=NumbersToCome(self.lessons, to_come))

    def val_dataloader(self) -> DataLoader | list:
        return DataLoader(HeldOutScenes(self.held_out, 100), batch_size=None) if self.held_out else []


def checked_kinds(name: str, kinds: Mapping[str, float] | None) -> dict[str, float]:
    """`kinds` without those that are never asked.

    Raises:
        ValueError: a kind is unknown, or its number is no number of at least 0.
    """
    for kind, count in (kinds or {}).items():
        if kind not in KINDS:
            raise ValueError(f"{name} has {kind!r}; kinds of questions are {', '.join(KINDS)}")
        check_real(f"{name}[{kind!r}]", count)
    return {kind: float(count) for kind, count in (kinds or {}).items() if count}
