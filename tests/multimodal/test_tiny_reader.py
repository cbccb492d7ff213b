"""The tiny reader: its scenes, its words, its rows of tokens, and that stock transformers runs it."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from multimodal.q_zoom.configuration import QZoomConfig
from multimodal.q_zoom.model import QZoom
from multimodal.q_zoom.regions import Box
from multimodal.tiny_reader import TinyReaderForConditionalGeneration
from multimodal.tiny_reader.dialogues import answers_right, hidden_states, lay_out, prompt_row, tokens_of
from multimodal.tiny_reader.evaluation import answered_right
from multimodal.tiny_reader.lessons import QuestionLessons, SceneLessons, Scenes
from multimodal.tiny_reader.model import tiny_configuration
from multimodal.tiny_reader.processing import WORDS, build_processor
from multimodal.tiny_reader.scenes import COLOURS, HELD_OUT_SEED, draw_scene
from multimodal.tiny_reader.training import start_attention
from multimodal.tiny_reader.views import (
    ABSENT,
    GRID,
    UNASKED,
    WHOLE,
    box_around,
    box_with,
    cell_labels,
    coarse_view,
    normalised,
    region_grid,
    region_view,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TinyReaderForConditionalGeneration(tiny_configuration(64)).eval()


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def asked(processor, scenes, texts, **options):
    messages = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
    prompts = processor.apply_chat_template(messages, add_generation_prompt=True)
    pictures = [scene.picture() for scene in scenes]
    return processor(text=prompts, images=pictures, padding=True, return_tensors="pt", **options)


@pytest.mark.parametrize("seed", [0, 7, HELD_OUT_SEED + 3])
def test_a_scene_is_drawn_from_its_seed(seed):
    scene, again = draw_scene(seed), draw_scene(seed)
    assert (scene.pixels == again.pixels).all()
    assert scene.landmarks == again.landmarks
    assert not (scene.pixels == draw_scene(seed + 1).pixels).all()
    assert len({mark.colour for mark in scene.landmarks}) == len(scene.landmarks)
    for mark in scene.landmarks:
        left, top, right, bottom = mark.extent
        assert 48 * mark.column <= left < right <= 48 * (mark.column + 1)
        assert 48 * mark.row <= top < bottom <= 48 * (mark.row + 1)
        middle = scene.pixels[mark.box[3] - 3 : mark.box[3] - 1, (left + right) // 2 - 1 : (left + right) // 2 + 1]
        assert np.abs(middle.mean((0, 1)) - COLOURS[mark.colour]).max() < 40  # in the grain


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param({"seed": -1}, "seed is -1", id="seed"),
        pytest.param({"seed": 0, "landmarks": 5}, "landmarks is 5", id="landmarks"),
        pytest.param({"seed": 0, "big_print": 1.5}, "big_print is 1.5", id="print"),
    ],
)
def test_a_scene_that_cannot_be_drawn_is_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        draw_scene(**arguments)


def test_every_question_and_answer_is_made_of_known_words(processor):
    unknown = processor.tokenizer.unk_token_id
    for seed in range(40):
        for question in draw_scene(seed).questions():
            assert unknown not in tokens_of(question.text + question.answer)
            assert processor.tokenizer.decode(tokens_of(question.answer)) == question.answer


def test_rows_of_one_picture_are_those_of_the_stock_processor(model, processor):
    scene = draw_scene(5)
    question = scene.questions()[1]
    inputs = asked(processor, [scene], [question.text])
    ids, positions, start = prompt_row(question.text, (GRID, GRID))
    stock, _ = model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"])
    assert ids.tolist() == inputs["input_ids"][0].tolist()
    assert torch.equal(positions, stock[:, 0].float())
    assert WORDS[ids[start - 1]] == "<|vision_start|>"


def test_unfolded_patches_are_the_picture(model, processor):
    scenes = [draw_scene(1), draw_scene(2)]
    inputs = asked(processor, scenes, ["Where is red?"] * 2)
    pictures = normalised(torch.stack([coarse_view(scene) for scene in scenes]))
    unfolded = model.model.visual.unfold(inputs["pixel_values"], 12, 12)
    torch.testing.assert_close(unfolded, pictures.contiguous(), atol=1e-6, rtol=0)
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    torch.testing.assert_close(torch.stack(list(features)), model.model.visual.encode(pictures), atol=1e-5, rtol=1e-5)


def test_pictures_of_several_sizes_are_read_one_by_one(model):
    visual, grids = model.model.visual, torch.tensor([[1, 12, 12], [1, 12, 12], [1, 8, 20], [1, 12, 12]])
    patches = torch.randn(int(grids.prod(1).sum()), 96)
    together = visual(patches, grids).pooler_output
    parts = patches.split(grids.prod(1).tolist())
    alone = [visual(part, grid[None]).pooler_output for part, grid in zip(parts, grids, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_videos_are_refused(model):
    with pytest.raises(ValueError, match="videos cannot be read"):
        model.model.visual(torch.zeros(288, 96), torch.tensor([[2, 12, 12]]))


def test_a_saved_model_is_loaded_by_the_auto_classes(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, words = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is TinyReaderForConditionalGeneration
    inputs = asked(words, [draw_scene(3)], ["What is the background?"])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_rows_and_generation_agree(model):
    scenes = [draw_scene(11), draw_scene(12)]
    questions = [scene.questions()[2] for scene in scenes]
    dialogues = lay_out(questions, [torch.stack([coarse_view(scene) for scene in scenes])])
    with torch.inference_mode():
        features = [model.model.visual.encode(normalised(dialogues.pictures[0]))]
        logits = model.lm_head(hidden_states(model, dialogues, features))
    for index, question in enumerate(questions):
        length = int(dialogues.lengths[index])
        inputs = asked(build_processor(), [scenes[index]], [question.text])
        made = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]
        assert made == logits[index, length - 1].argmax()


def test_a_region_is_laid_out_as_q_zoom_does(model, processor):
    config = QZoomConfig(2, 2, 1, sink="none", coarse_tokens=(36, 36), region_tokens=(64, 64), least_region_pixels=8)
    zoom = QZoom.wrap(model, processor, config)
    scene = draw_scene(21)
    question = next(question for question in scene.questions() if question.kind == "code")
    cells = box_around(scene.landmarks[question.landmark])
    dialogues = lay_out([question], [coarse_view(scene)[None], region_view(scene, cells)[None]], [cells])
    length = int(dialogues.lengths[0])
    (prompt,) = zoom.adapter.prompts(zoom.ask(scene.picture(), question.text))
    pixels = Box(*(32 * edge for edge in cells))
    closer = zoom.look_closer(zoom.read_to_tap(prompt), scene.picture(), [pixels], [Box(*cells)]).prompt
    assert closer.input_ids.tolist() == dialogues.ids[0, :length].tolist()
    torch.testing.assert_close(closer.positions[:, 0], dialogues.positions[:, 0, :length])
    features = torch.cat([model.model.visual.encode(normalised(part))[0] for part in dialogues.pictures])
    # The stock processor resizes by torchvision, which is a little off Pillow.
    torch.testing.assert_close(closer.embeddings[0, closer.visual], features, atol=0.05, rtol=0.05)


def test_answers_are_right_if_all_their_tokens_are():
    labels = torch.tensor([[-100, -100, 5, 6], [-100, -100, 5, 6], [-100, 7, -100, -100]])
    predicted = torch.tensor([[0, 5, 6, 1], [0, 5, 5, 1], [7, 0, 0, 0]])
    assert answers_right(predicted, labels).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (3, 3), (4, 3), (2, 4)])
def test_boxes_hold_their_landmark_and_views_their_budget(shape):
    random = np.random.default_rng(0)
    for seed in range(30):
        scene = draw_scene(seed)
        mark = scene.landmarks[0]
        left, top, right, bottom = box_with(random, mark, *shape)
        assert (bottom - top, right - left) == shape
        assert 32 * left <= mark.centre[0] < 32 * right
        assert 32 * top <= mark.centre[1] < 32 * bottom
        rows, columns = region_grid(*shape)
        assert 48 <= rows * columns <= 72
        assert region_view(scene, (left, top, right, bottom)).shape == (3, 8 * rows, 8 * columns)


def test_the_box_around_a_landmark_holds_it_whole():
    for seed in range(200):
        for mark in draw_scene(seed).landmarks:
            left, top, right, bottom = (32 * edge for edge in box_around(mark))
            assert left <= mark.extent[0]
            assert top <= mark.extent[1]
            assert right >= mark.extent[2]
            assert bottom >= mark.extent[3]


def test_cells_are_labelled_with_what_they_show():
    scene = draw_scene(5)
    whole = cell_labels([scene], [WHOLE], (GRID, GRID))
    assert (whole["colour"] != ABSENT).sum() == len(scene.landmarks)
    mark = scene.landmarks[0]
    cell = int(mark.centre[1] // 32) * GRID + int(mark.centre[0] // 32)
    assert whole["colour"][0, cell] == list(COLOURS).index(mark.colour)
    assert whole["row"][0, cell] == mark.row
    assert whole["tens"][0, cell] == (int(mark.code[0]) if mark.big else UNASKED)
    box = box_around(mark)
    near = cell_labels([scene], [box], region_grid(box[3] - box[1], box[2] - box[0]))
    assert int(mark.code[1]) in near["units"]
    assert (near["row"] == UNASKED).all()


def test_lessons_are_drawn_by_number():
    scenes = Scenes(20)
    kinds = {"code": 4, "where": 2}
    lessons, again = (QuestionLessons(scenes, 5, 3, kinds, kinds, 0.5) for _ in range(2))
    for number in (0, 4):
        for one, other in zip(lessons[number], again[number], strict=True):
            assert torch.equal(one.ids, other.ids)
            assert torch.equal(one.positions, other.positions)
            assert torch.equal(one.pictures[-1], other.pictures[-1])
    assert not torch.equal(lessons[0][0].ids, lessons[1][0].ids)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param({"steps": 0, "views": 4}, "steps is 0", id="steps"),
        pytest.param({"steps": 1, "coarse": {"who": 1}}, "coarse has 'who'", id="kind"),
        pytest.param({"steps": 1, "regions": {"code": -1}}, "regions\\['code'\\] is -1", id="count"),
        pytest.param({"steps": 1}, "something to learn", id="nothing"),
    ],
)
def test_lessons_that_cannot_be_drawn_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        SceneLessons(**arguments)


def test_attention_starts_with_likeness_and_copies():
    fresh = TinyReaderForConditionalGeneration(tiny_configuration(64))
    before = fresh.model.language_model.layers[0].self_attn.v_proj.weight.clone()
    start_attention(fresh, likeness=0.1)
    assert torch.equal(fresh.model.language_model.layers[0].self_attn.v_proj.weight, before)
    start_attention(fresh, likeness=0.1, copying=0.05)
    for layer in fresh.model.language_model.layers:
        attention = layer.self_attn
        assert torch.equal(attention.q_proj.weight, attention.k_proj.weight)
        assert torch.equal(attention.v_proj.weight, attention.o_proj.weight.T)


def test_scores_count_rows(model):
    scenes = [draw_scene(seed) for seed in range(4)]
    questions = [scene.questions()[0] for scene in scenes]
    assert answered_right(model, scenes, questions).shape == (4,)
