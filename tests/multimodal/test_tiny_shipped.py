"""The shipped tiny reader with its branches does what its card says, on scenes that nothing was trained with."""

import dataclasses

import numpy as np
import pytest
import torch

from multimodal.tiny_reader.evaluation import question_scores
from multimodal.tiny_reader.scenes import HELD_OUT_SEED, draw_scene, paint_plate
from multimodal.tiny_reader.shipped import load_reader
from multimodal.tiny_reader.zoom_evaluation import questions_to_ask, small_print, zoom_scores


@pytest.fixture(scope="module")
def zoom():
    return load_reader()


@pytest.fixture(scope="module")
def read(zoom):
    """Scores of the model alone."""
    with torch.inference_mode():
        return question_scores(zoom.model, [draw_scene(HELD_OUT_SEED + index) for index in range(40)])


@pytest.fixture(scope="module")
def zoomed(zoom):
    """Scores of Q-Zoom."""
    return zoom_scores(zoom, questions_to_ask(100))


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("coarse_where", 0.9),
        ("coarse_shape", 0.9),
        ("coarse_background", 0.98),
        ("coarse_code_big", 0.85),
        ("oracle_code_small", 0.9),
    ],
)
def test_the_reader_reads(read, name, least):
    assert read[name] >= least


def test_small_print_cannot_be_read_from_afar(read):
    assert read["coarse_code_small"] <= 0.05


@pytest.mark.parametrize(
    ("name", "least"), [("box", 0.85), ("gate", 0.9), ("small_zoom", 0.8), ("big_zoom", 0.85), ("easy_zoom", 0.9)]
)
def test_q_zoom_finds_and_reads(zoomed, name, least):
    assert zoomed[name] >= least


def test_q_zoom_loses_little_against_the_right_region(zoomed):
    assert zoomed["small_zoom"] >= 0.85 * zoomed["small_oracle"]


def test_q_zoom_looks_closer_at_little_and_saves_visual_tokens(zoomed):
    assert zoomed["easy_opened"] <= 0.1
    assert zoomed["full_tokens"] / zoomed["visual_tokens"] >= 5


def test_the_answer_is_read_from_the_picture(zoom):
    """A code that is painted over is answered as it reads now."""
    followed = []
    for scene, question in questions_to_ask(60):
        if not small_print(scene, question):
            continue
        mark = scene.landmarks[question.landmark]
        code = f"{(int(mark.code) + 37) % 100:02d}"
        pixels = scene.pixels.astype(np.float32)
        paint_plate(pixels, dataclasses.replace(mark, code=code))
        picture = dataclasses.replace(scene, pixels=pixels.astype(np.uint8)).picture()
        inputs = zoom.ask(picture, question.text)
        ids = zoom.generate(inputs, picture, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        followed.append(zoom.processor.decode(ids, skip_special_tokens=True).strip() == f"{mark.colour} {code}")
    assert len(followed) >= 10
    assert np.mean(followed) >= 0.8
