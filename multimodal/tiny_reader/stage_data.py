"""Drawn scenes as samples of Q-Zoom's training, labelled by the model that is trained: no file is needed.

Samples are made when a run begins, from seeds of scenes alone and the frozen model, so a run that is resumed makes the
same again.
"""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from multimodal.argument_checks import check_whole
from multimodal.q_zoom.model import QZoom
from multimodal.q_zoom.pseudo_labels import PointingHeads
from multimodal.q_zoom.training.gate_labels import label_by_region
from multimodal.q_zoom.training.region_labels import choose_heads, with_attention
from multimodal.q_zoom.training.sample_data import ZoomData
from multimodal.q_zoom.training.samples import ZoomSample
from multimodal.tiny_reader.scenes import HELD_OUT_SEED, KINDS, Scene, draw_scene

FIRST_SEED = 500_000_000  # scenes from here on are the stages'
HEAD_SAMPLES = 128


def scene_samples(
    count: int, kinds: Sequence[str] = KINDS, *, first_seed: int = FIRST_SEED, big_print: float = 0.3
) -> list[ZoomSample]:
    """Questions about scenes, one a scene, their kinds in turn; boxes are of the landmark with its plate.

    Args:
        count: how many.
        kinds: of `scenes.KINDS`.
        first_seed: of the scenes, which have the seeds that follow.
        big_print: as of `draw_scene`.

    Raises:
        ValueError: an argument is out of range.
    """
    check_whole("count", count, 1)
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds are {list(kinds)}; they must be some of {', '.join(KINDS)}")
    samples = []
    for index in range(count):
        scene = draw_scene(first_seed + index, big_print=big_print)
        asked = [question for question in scene.questions() if question.kind == kinds[index % len(kinds)]]
        question = asked[int(np.random.default_rng([first_seed, index]).integers(len(asked)))]
        box = None if question.landmark is None else extent(scene, question.landmark)
        samples.append(ZoomSample(scene.picture(), question.text, question.answer, box=box))
    return samples


def extent(scene: Scene, index: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a landmark with its plate, in pixels."""
    box, plate = scene.landmarks[index].box, scene.landmarks[index].plate
    return min(box[0], plate[0]), min(box[1], plate[1]), max(box[2], plate[2]), max(box[3], plate[3])


class SceneData(ZoomData):
    """Labelled questions about scenes.

    Args:
        count: questions to train with, before those that teach nothing are left out.
        validation_count: held-out questions to validate with.
        kinds: of questions, see `scenes.KINDS`.
        big_print: share of codes in big print.
        batch_size, evaluation_batch_size, seed: see `ZoomData`; `seed` shifts the scenes as well.
    """

    def __init__(
        self,
        count: int,
        validation_count: int,
        kinds: Sequence[str],
        big_print: float,
        batch_size: int,
        evaluation_batch_size: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, 0, seed)
        self.counts = {
            False: check_whole("count", count, 1),
            True: check_whole("validation_count", validation_count, 1),
        }
        self.kinds, self.big_print = list(kinds), big_print
        scene_samples(1, self.kinds, big_print=big_print)  # refuses what cannot be drawn
        self._made: dict[bool, list[ZoomSample]] = {}

    def samples(self, *, validation: bool) -> Sequence[ZoomSample]:
        if validation not in self._made:
            first = HELD_OUT_SEED if validation else FIRST_SEED + self.seed * 1_000_000
            drawn = scene_samples(self.counts[validation], self.kinds, first_seed=first, big_print=self.big_print)
            self._made[validation] = self.labelled(self.trainer.lightning_module.zoom, drawn)
        return self._made[validation]

    @abstractmethod
    def labelled(self, zoom: QZoom, samples: list[ZoomSample]) -> list[ZoomSample]:
        """The samples with what the stage learns from, without those that teach nothing."""


class SceneAttention(SceneData):
    """Stage 1: the attention of the model's own pointing heads, found for each kind of question by landmarks' boxes.

    Args:
        count, validation_count, kinds, big_print, batch_size, evaluation_batch_size, seed: see `SceneData`.
        heads: so many pointing heads at most are chosen for a kind.
        count_prompt: the step of the prompt's last token counts as the answer's tokens do: answers are of one or two.
    """

    def __init__(
        self,
        count: int = 4096,
        validation_count: int = 512,
        kinds: Sequence[str] = ("code", "shape", "where"),
        big_print: float = 0.3,
        heads: int = 2,
        count_prompt: bool = True,
        batch_size: int = 64,
        evaluation_batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(count, validation_count, kinds, big_print, batch_size, evaluation_batch_size, seed)
        if "background" in self.kinds:
            raise ValueError(f"kinds are {self.kinds}; questions about the background point at no landmark")
        self.head_count, self.count_prompt = check_whole("heads", heads, 1), count_prompt
        self.pointing: dict[str, PointingHeads] = {}

    def labelled(self, zoom: QZoom, samples: list[ZoomSample]) -> list[ZoomSample]:
        asked, made = {"count_prompt": self.count_prompt, "batch_size": 64, "max_new_tokens": 4}, []
        for kind in dict.fromkeys(self.kinds):
            if kind not in self.pointing:
                chosen = choose_heads(zoom, scene_samples(HEAD_SAMPLES, [kind]), self.head_count, **asked)
                rates = [
                    f"{layer}.{head} {chosen.hits[layer, head]:.0%}"
                    for layer, some in chosen.heads.items()
                    for head in some
                ]
                print(f"heads (layer.head) that point at the landmark for {kind!r}: {', '.join(rates)}")
                self.pointing[kind] = PointingHeads(chosen.heads, {})
            turns = [turn for turn, other in enumerate(self.kinds) if other == kind]
            mine = [sample for place, sample in enumerate(samples) if place % len(self.kinds) in turns]
            made += with_attention(zoom, mine, self.pointing[kind], **asked)
        return made


class SceneZooms(SceneData):
    """Stage 3: whether the model answers right without a closer look, or only with the one its proposal gives.

    Args:
        count, validation_count, kinds, big_print, batch_size, evaluation_batch_size, seed: see `SceneData`.
    """

    def __init__(
        self,
        count: int = 4096,
        validation_count: int = 512,
        kinds: Sequence[str] = ("code", "code", "shape", "where", "background"),
        big_print: float = 0.3,
        batch_size: int = 64,
        evaluation_batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(count, validation_count, kinds, big_print, batch_size, evaluation_batch_size, seed)

    def labelled(self, zoom: QZoom, samples: list[ZoomSample]) -> list[ZoomSample]:
        made = label_by_region(zoom, samples, seed=self.seed, batch_size=64, max_new_tokens=4)
        print(f"questions by what a region does to their answers: {dict(made.kinds)}; {len(made.samples)} labelled")
        return made.samples
