"""Options of `generate` as stock ranks and counts them, budgets of long strips, boxes in every form, odd images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from multimodal.q_zoom.checkpoints import from_official, load_weights, official_weights
from multimodal.q_zoom.images import opened
from multimodal.q_zoom.model import boxes_by_row
from multimodal.q_zoom.pictures import heat_overlay
from tests.multimodal.random_models import random_zoom
from tests.multimodal.test_q_zoom_generate import GREEDY, QUESTIONS, new_tokens, pictures


class Ending(LogitsProcessor):
    """Ends an answer as soon as that is allowed, and otherwise says the same word."""

    def __init__(self, word: int, end: int) -> None:
        self.word, self.end = word, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = scores[:, self.end] > -torch.inf
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.word] = 0
        forced[allowed, self.end] = 1
        return forced


@pytest.fixture(scope="module")
def zoom():
    return random_zoom("qwen2_5_vl")


@pytest.fixture(scope="module")
def picture():
    return pictures(1)[0]


@pytest.mark.parametrize("form", ["option", "given configuration", "the model's"])
def test_max_length_counts_the_prompt_as_given(form, picture):
    zoom = random_zoom("qwen2_5_vl")
    inputs = zoom.ask(picture, QUESTIONS[0])
    longest = inputs["input_ids"].shape[1] + 7
    options = {"do_sample": False}
    if form == "option":
        options["max_length"] = longest
    elif form == "given configuration":
        options = {"generation_config": GenerationConfig(max_length=longest, do_sample=False)}
    else:
        zoom.model.generation_config.max_length = longest
    assert zoom.generate(inputs, picture, gate="always", **options).shape[1] == longest
    assert zoom.generate(inputs, gate="never", **options).shape[1] == longest


def test_min_length_counts_the_prompt_as_given(zoom, picture):
    inputs = zoom.ask(picture, QUESTIONS[0])
    options = {"eos_token_id": 3, "min_length": inputs["input_ids"].shape[1] + 4, "max_new_tokens": 8}
    ended = [
        zoom.generate(inputs, picture, gate=gate, logits_processor=[Ending(20, 3)], **options)
        for gate in ("never", "always")
    ]
    assert new_tokens(ended[0], inputs).tolist() == [[20] * 4 + [3]]
    assert ended[1].equal(ended[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "use_cache is False"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache is False"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens is 3"),
        ({"assistant_model": object()}, "assistant_model is"),
        ({"max_length": 3}, "max_length is 3"),
        ({"gate": "separability", "generation_config": GenerationConfig(return_dict_in_generate=True)}, "return_dict"),
        ({"gate": "separability", "generation_config": GenerationConfig(num_beams=2)}, "num_beams is 2"),
    ],
    ids=["no cache", "no cache, configured", "prompt lookup", "assistant", "too short", "dictionary", "beams"],
)
def test_options_that_would_change_answers_are_refused(zoom, picture, options, message):
    inputs = zoom.ask(picture, QUESTIONS[0])
    with pytest.raises(ValueError, match=message):
        zoom.generate(inputs, picture, **{"gate": "always", **options})


def test_separability_counts_up_to_the_end_and_pads_what_is_shorter(zoom):
    """An answer that ends at once is scored by what was said, whatever stands behind it."""
    images = pictures(2)
    inputs = zoom.ask(images, QUESTIONS[:2])
    first = new_tokens(zoom.generate(inputs, gate="never", **GREEDY), inputs)
    end = int(first[0, 1])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    asked = {"gate": "separability", "gate_threshold": 0.0, "return_zoom_info": True}
    _, short = zoom.generate(inputs, images, eos_token_id=end, **asked, **options)
    _, one = zoom.generate(inputs, images, **asked, **options | {"max_new_tokens": 1})
    assert short[0].gate_probability == pytest.approx(one[0].gate_probability, abs=1e-6)
    made = zoom.generate(inputs, images, gate="separability", gate_threshold=1.0, eos_token_id=end, **options)
    opened_rows = zoom.generate(inputs, images, gate="always", eos_token_id=end, **options)
    for row in range(2):
        kept = opened_rows[row][: made.shape[1]]
        assert made[row, : len(kept)].equal(kept)
        assert (made[row, len(kept) :] == 1).all()


@pytest.mark.parametrize("box", [(0, 0, 2000, 20), (0, 0, 2000, 400)], ids=["a strip", "the whole"])
def test_strips_stay_within_the_cap(box):
    zoom = random_zoom("qwen2_5_vl", max_visual_tokens=80)
    image = Image.new("RGB", (2000, 400))
    inputs = zoom.ask(image, QUESTIONS[0])
    _, (info,) = zoom.generate(inputs, image, box=box, return_zoom_info=True, **GREEDY)
    assert info.opened
    assert info.region_tokens > 0
    assert info.visual_tokens <= 80


def test_a_cap_leaves_room_for_a_region():
    zoom = random_zoom("qwen2_5_vl", max_visual_tokens=60)
    image = pictures(1)[0]
    _, (info,) = zoom.generate(
        zoom.ask(image, QUESTIONS[0]), image, box=(0, 0, 90, 90), return_zoom_info=True, **GREEDY
    )
    assert info.opened
    assert info.visual_tokens <= 60
    with pytest.raises(ValueError, match="72 tokens together"):
        random_zoom("llava", max_visual_tokens=60)
    with pytest.raises(ValueError, match="takes 36 tokens for every image"):
        random_zoom("llava", coarse_tokens=(4, 9))


@pytest.mark.parametrize("size", [(2500, 17), (4000, 17)], ids=["too many tokens", "too long"])
def test_images_that_are_strips_are_refused(zoom, size):
    with pytest.raises(ValueError, match=rf"images\[0\] has {size[0]} x 17"):
        zoom.ask(Image.new("RGB", size), QUESTIONS[0])


def test_tokens_at_full_resolution_are_told_where_the_image_is_known(zoom, picture):
    inputs = zoom.ask(picture, QUESTIONS[0])
    _, (blind,) = zoom.generate(inputs, gate="never", return_zoom_info=True, **GREEDY)
    _, (seen,) = zoom.generate(inputs, picture, gate="never", return_zoom_info=True, **GREEDY)
    assert blind.full_tokens is None
    assert seen.full_tokens == 12 * 9


BOXES = {
    "a tuple": ((1, 2, 90, 80), [(1, 2, 90, 80)]),
    "a list of one": ([(1, 2, 90, 80)], [(1, 2, 90, 80)]),
    "two": ([(1, 2, 90, 80), (50, 50, 100, 100)], [(1, 2, 90, 80), (50, 50, 100, 100)]),
    "an array": (np.array([1, 2, 90, 80]), [(1, 2, 90, 80)]),
    "a tensor of two": (torch.tensor([[1, 2, 90, 80], [50, 50, 100, 100]]), [(1, 2, 90, 80), (50, 50, 100, 100)]),
    "grown": ((50, 50, 52, 100), [(43, 50, 59, 100)]),
}


@pytest.mark.parametrize("case", list(BOXES))
def test_boxes_come_in_every_form(case):
    box, expected = BOXES[case]
    assert [tuple(one) for one in boxes_by_row(box, [(200, 150)], 16)[0]] == expected


@pytest.mark.parametrize("box", [[], 5, "left", [None, 3]], ids=["empty", "a number", "text", "a number for a row"])
def test_what_is_no_box_is_refused(box):
    with pytest.raises(ValueError, match=r"^box "):
        boxes_by_row(box, [(200, 150)] * (2 if isinstance(box, list) and box else 1), 16)


def test_another_image_than_that_of_the_inputs_is_refused(zoom, picture):
    with pytest.raises(ValueError, match="cannot be the image that inputs were made of"):
        zoom.generate(zoom.ask(picture, QUESTIONS[0]), Image.new("RGB", (40, 900)), **GREEDY)


def test_inputs_without_ids_and_with_videos_are_refused(zoom, picture):
    with pytest.raises(ValueError, match="input_ids among it"):
        zoom.generate({"pixel_values": torch.zeros(1)}, picture, **GREEDY)
    inputs = dict(zoom.ask(picture, QUESTIONS[0]))
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, 0] = zoom.adapter.video_token
    with pytest.raises(ValueError, match="holds a video"):
        zoom.generate(inputs, picture, **GREEDY)


def test_exif_orientation_is_followed(tmp_path):
    upright = pictures(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    upright.save(tmp_path / "turned.png", exif=exif)
    assert opened(tmp_path / "turned.png").size == upright.size[::-1]


@pytest.mark.parametrize(("settings", "most"), [({"max_boxes": 2}, 2), ({"max_boxes": 1}, 1)])
def test_settings_of_regions_reach_the_proposal(settings, most, monkeypatch):
    zoom = random_zoom("qwen2_5_vl", box_mode="components", margin_cells=1, **settings)
    cells = torch.full((6, 9), -9.0)
    cells[1:3, 1:4] = cells[4:6, 6:8] = 9.0
    monkeypatch.setattr("multimodal.q_zoom.model.score_map", lambda *_, **__: (cells, None))
    found = zoom.propose(Image.new("RGB", (192, 144)), QUESTIONS[0], region_threshold=0.5)
    assert len(found.boxes) == most
    assert tuple(found.cells[0]) == (0, 0, 5, 4)


def test_llavas_cells_are_of_the_padded_square():
    """A picture of 240 x 80 fills the two middle rows of six: its map and boxes leave the padding out."""
    zoom = random_zoom("llava")
    image = Image.new("RGB", (240, 80), "gray")
    (prompt,) = zoom.adapter.prompts(zoom.ask(image, QUESTIONS[0]))
    assert tuple(zoom.adapter.pixels_to_cells((0, 0, 240, 80), prompt, image.size)) == (0, 2, 6, 4)
    assert tuple(zoom.adapter.pixels_to_cells((200, 40, 240, 80), prompt, image.size)) == (5, 3, 6, 4)
    cells = torch.zeros(6, 6)
    cells[2:4] = 1
    cells[2:4, :3] = 0.5
    heat = zoom.adapter.over_image(cells, image.size)
    assert heat.shape == (32, 96)
    shown = np.asarray(heat_overlay(image, heat.numpy())).astype(int).sum(2)
    assert (shown[:, 200:].min() > shown[:, :100].max()).all()
    # Bars of grey above and below: what the encoder sees there is one colour.
    pixels = zoom.ask(image, QUESTIONS[0])["pixel_values"][0]
    assert pixels[:, :15].flatten(1).std(1).max() < 1e-4


def test_checkpoints_without_a_gate_can_be_opened_by_hand(picture):
    zoom = random_zoom("qwen2_5_vl")
    weights = {name: value for name, value in official_weights(zoom).items() if "high_res" not in name}
    load_weights(zoom, weights, "stage 1")
    inputs = zoom.ask(picture, QUESTIONS[0])
    assert zoom.generate(inputs, picture, gate="always", **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 5
    with pytest.raises(ValueError, match="had no gate"):
        zoom.generate(inputs, picture, **GREEDY)
    zoom.generate(inputs, picture, box=(0, 0, 90, 90), **GREEDY)


def test_official_names_of_a_shared_layer_come_back():
    zoom = random_zoom("qwen2_5_vl", share_first_layer=True)
    written = official_weights(zoom)
    load_weights(random_zoom("qwen2_5_vl", share_first_layer=True), written, "heads")
    first = next(name for name in written if "high_res_layers.0" in name)
    written[first] = written[first] + 1
    assert from_official(written, 2)
    with pytest.raises(ValueError, match="must be the same"):
        load_weights(random_zoom("qwen2_5_vl", share_first_layer=True), written, "heads")


def test_deepstack_levels_of_all_images_together_are_split():
    """transformers 5.17 gives each level as one tensor; later versions give one for each image."""
    zoom = random_zoom("qwen3_vl")
    image = pictures(1)[0]
    inputs = zoom.ask(image, QUESTIONS[0])
    (expected,) = zoom.adapter.prompts(inputs)
    stock = zoom.model.get_image_features

    def together(*arguments, **options):
        made = stock(*arguments, **options)
        made.deepstack_features = [torch.cat(list(level)) for level in made.deepstack_features]
        return made

    zoom.model.get_image_features = together
    (found,) = zoom.adapter.prompts(inputs)
    assert all(ours.equal(theirs) for ours, theirs in zip(found.deepstack, expected.deepstack, strict=True))
