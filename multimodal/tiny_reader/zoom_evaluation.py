"""How well Q-Zoom works around the tiny reader: scores over scenes that nothing was trained with.

    python -m multimodal evaluate [folder] [--scenes 1000]

Every scene is asked one question, kinds in turn. Codes in small print need a closer look; all other questions can be
answered without.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import torch

from multimodal.argument_checks import check_whole
from multimodal.q_zoom.model import QZoom
from multimodal.tiny_reader.scenes import HELD_OUT_SEED, Question, Scene, draw_scene
from multimodal.tiny_reader.shipped import READER
from multimodal.tiny_reader.views import COARSE_CELL, box_around

ASKED = ("code", "code", "shape", "where", "background")
BATCH = 50


def questions_to_ask(count: int, first_seed: int = HELD_OUT_SEED) -> list[tuple[Scene, Question]]:
    """A question about each of `count` scenes, the same at every call."""
    pairs = []
    for index in range(check_whole("count", count, 1)):
        scene = draw_scene(first_seed + index)
        questions = [question for question in scene.questions() if question.kind == ASKED[index % len(ASKED)]]
        pairs.append((scene, questions[index // len(ASKED) % len(questions)]))
    return pairs


def small_print(scene: Scene, question: Question) -> bool:
    """Whether the answer can be read near by only."""
    return question.kind == "code" and not scene.landmarks[question.landmark].big


def zoom_scores(zoom: QZoom, pairs: Sequence[tuple[Scene, Question]]) -> dict[str, float]:
    """Shares and means over questions.

    "small", "big" and "easy" are codes in small and in big print, and all other questions: how often they are answered
    right "coarse", without a closer look, by "zoom", Q-Zoom deciding, and by "oracle", with a look at the right cell of
    the coarse view and its neighbours. "box" is the share of proposals for small codes that hold the code's whole
    plate, "gate" how often the gate decides as the print has it, "easy_opened" how often it opens for what is not in
    small print, big codes among it, "visual_tokens" the mean of Q-Zoom, "full_tokens" that of the pictures unreduced.
    """
    counts: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        counts.setdefault(name, []).append(float(value))

    for start in range(0, len(pairs), BATCH):
        some = pairs[start : start + BATCH]
        pictures, texts = [scene.picture() for scene, _ in some], [question.text for _, question in some]
        inputs = zoom.ask(pictures, texts)
        small = [small_print(*pair) for pair in some]
        oracle = [
            tuple(COARSE_CELL * edge for edge in box_around(scene.landmarks[question.landmark])) if needs else None
            for needs, (scene, question) in zip(small, some, strict=True)
        ]
        right, infos = {}, {}
        for name, options in {
            "coarse": {"gate": "never"},
            "zoom": {"gate": "auto"},
            "oracle": {"gate": "auto", "box": oracle},
        }.items():
            ids, infos[name] = zoom.generate(
                inputs, pictures, return_zoom_info=True, max_new_tokens=4, do_sample=False, **options
            )
            answers = zoom.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right[name] = [
                answer.strip() == question.answer for answer, (_, question) in zip(answers, some, strict=True)
            ]
        for index, (scene, question) in enumerate(some):
            info = infos["zoom"][index]
            opened = info.gate_probability >= zoom.config.gate_threshold
            note("gate", opened == small[index])
            note("visual_tokens", info.visual_tokens)
            note("full_tokens", info.full_tokens)
            kind = "small" if small[index] else "big" if question.kind == "code" else "easy"
            note(f"{kind}_coarse", right["coarse"][index])
            note(f"{kind}_zoom", right["zoom"][index])
            if small[index]:
                note("small_oracle", right["oracle"][index])
                boxes = zoom.propose(scene.picture(), question.text).boxes
                note("box", any(holds(box, scene.landmarks[question.landmark].plate) for box in boxes))
            else:
                note("easy_opened", opened)
    return {name: sum(values) / len(values) for name, values in sorted(counts.items())}


def holds(box: Sequence[int], plate: Sequence[int]) -> bool:
    """Whether `plate` lies in `box`, both left, top, right, bottom."""
    return box[0] <= plate[0] and box[1] <= plate[1] and box[2] >= plate[2] and box[3] >= plate[3]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m multimodal evaluate", description=__doc__)
    parser.add_argument("folder", nargs="?", default=READER, help="of the model (default: the shipped one)")
    parser.add_argument("--heads", help="folder of the branches (default: that of the model)")
    parser.add_argument("--scenes", type=int, default=1000, help="held-out scenes (default: %(default)s)")
    parser.add_argument("--gate-threshold", type=float, help="instead of the model's")
    parser.add_argument("--region-threshold", type=float, help="instead of the model's")
    options = parser.parse_args(arguments)
    if options.scenes < 1:
        parser.error(f"--scenes is {options.scenes}; it must be at least 1")
    zoom = QZoom.from_pretrained(options.folder, options.heads or options.folder)
    given = {"gate_threshold": options.gate_threshold, "region_threshold": options.region_threshold}
    changes = {name: value for name, value in given.items() if value is not None}
    zoom.config = dataclasses.replace(zoom.config, **changes)
    with torch.inference_mode():
        scores = zoom_scores(zoom, questions_to_ask(options.scenes))
    print(f"one question about each of {options.scenes} held-out scenes")
    for name, value in scores.items():
        print(f"  {name:20s} {value:6.1f}" if "tokens" in name else f"  {name:20s} {100 * value:6.1f} %")
    print(f"  visual tokens of the full picture over Q-Zoom's: {scores['full_tokens'] / scores['visual_tokens']:.1f} x")


if __name__ == "__main__":
    main()
