"""Making samples of Q-Zoom's stages: recorded attention, chosen heads, answers, folders, and the authors' pickles."""

import json
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multimodal.q_zoom.pseudo_labels import LabelRules, PointingHeads
from multimodal.q_zoom.training import commands, gate_labels, region_labels
from multimodal.q_zoom.training.gate_labels import label_by_region, label_by_resolution, mine_harmed
from multimodal.q_zoom.training.loading import load_zoom
from multimodal.q_zoom.training.official_records import gate_samples, read_records, region_samples
from multimodal.q_zoom.training.prompts import inputs_of
from multimodal.q_zoom.training.region_labels import (
    BOX_REQUEST,
    SHORT_ANSWER,
    Answered,
    answer_and_record,
    choose_heads,
    map_of,
    natural_request,
    with_attention,
)
from multimodal.q_zoom.training.sample_data import FolderData, SampleBatches
from multimodal.q_zoom.training.samples import SampleFolder, ZoomSample, write_samples
from multimodal.q_zoom.training.stages import labels_of
from multimodal.tiny_reader import stage_data
from multimodal.tiny_reader.processing import build_processor
from multimodal.tiny_reader.stage_data import SceneAttention, SceneZooms, scene_samples
from tests.multimodal.test_q_zoom_stages import SETTINGS, untrained_reader


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("reader"))
    untrained_reader().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def zoom(backbone):
    return load_zoom(backbone, None, SETTINGS)


@pytest.fixture(scope="module")
def scenes() -> list[ZoomSample]:
    return scene_samples(6, ("code", "where", "shape"))


# Attention


@torch.no_grad()
def test_recorded_attention_is_what_the_model_attends_to(zoom, scenes):
    """In a batch padded on the left, against the attention that transformers returns for each row alone."""
    model, before = zoom.model, zoom.adapter.decoder.config._attn_implementation
    some = [scenes[0], scenes[1]]  # questions of different lengths
    answers = answer_and_record(zoom, some, [1, 3], max_new_tokens=4)
    assert zoom.adapter.decoder.config._attn_implementation == before
    assert not any(layer.self_attn._forward_hooks for layer in zoom.adapter.decoder.layers)
    model.set_attn_implementation("eager")
    lengths = set()
    for sample, answered in zip(some, answers, strict=True):
        inputs = inputs_of(zoom, [sample], None)
        options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
        made = model.generate(**inputs, **options, output_attentions=True)
        lengths.add(inputs["input_ids"].shape[1])
        visual = inputs["input_ids"][0] == zoom.adapter.image_token
        new = made.sequences[:, inputs["input_ids"].shape[1] :]
        assert answered.text == zoom.processor.batch_decode(new, skip_special_tokens=True)[0].strip()
        expected = Answered("", made.attentions, visual, (6, 6))
        for heads, count_prompt in (({1: [0]}, False), ({3: [1], 1: None}, True)):
            expected_map = map_of(expected, heads, count_prompt=count_prompt)
            torch.testing.assert_close(map_of(answered, heads, count_prompt=count_prompt), expected_map)
    model.set_attn_implementation(before)
    assert len(lengths) == 2


def test_an_answer_ends_where_the_model_ends_it(zoom, scenes, monkeypatch):
    """Attention after the end is not the answer's; an answer that ends at once has none."""
    ends = zoom.adapter.model.generation_config.eos_token_id
    ids = inputs_of(zoom, scenes[:2], None)["input_ids"]
    generate = zoom.model.generate

    def ended(**options):
        made = generate(**options)
        made[0, ids.shape[1] + 2] = ends
        made[1, ids.shape[1]] = ends
        return made

    monkeypatch.setattr(zoom.model, "generate", ended)
    first, second = answer_and_record(zoom, scenes[:2], [0], max_new_tokens=5)
    assert [len(first.steps), len(second.steps)] == [3, 1]
    assert second.text == ""
    assert map_of(second, {0: [0]}, count_prompt=False) is None
    assert map_of(second, {0: [0]}, count_prompt=True).shape == (6, 6)
    made = with_attention(zoom, scenes[:2], PointingHeads({0: [1]}, {}), max_new_tokens=5)
    assert [sample.question for sample in made] == [scenes[0].question]
    torch.testing.assert_close(made[0].grounding, map_of(first, {0: [1]}, count_prompt=False))
    assert not made[0].sink.any()
    assert made[0].tokens == 36


def test_heads_that_look_at_the_box_are_chosen(zoom, scenes, monkeypatch):
    def pointing(zoom, samples, layers, **_):
        answers = []
        for sample in samples:
            middle = int((sample.box[1] + sample.box[3]) / 64) * 6 + int((sample.box[0] + sample.box[2]) / 64)
            weights = {layer: torch.zeros(2, 1, 40) for layer in layers}
            for (layer, head), cell in {(1, 0): middle, (2, 1): middle, (3, 0): 35 - middle}.items():
                weights[layer][head, 0, cell] = 1
            if sample is samples[0]:
                weights[2][1] = weights[3][0]
            answers.append(Answered("", [weights, weights], torch.arange(40) < 36, (6, 6)))
        return answers

    monkeypatch.setattr(region_labels, "answer_and_record", pointing)
    chosen = choose_heads(zoom, scenes, 3, batch_size=6, least=0.8)
    assert chosen.heads == {1: [0], 2: [1]}  # a third points less often than 0.8 of the best
    assert chosen.hits.shape == (4, 2)
    assert chosen.hits[1, 0] == 1
    assert chosen.hits[2, 1] == pytest.approx(5 / 6)
    assert choose_heads(zoom, scenes, 3, batch_size=6, least=0.9).heads == {1: [0]}
    assert choose_heads(zoom, scenes, 1, batch_size=6).heads == {1: [0]}
    with pytest.raises(ValueError, match="with a box each"):
        choose_heads(zoom, [scenes[0].replace(box=None)])


@pytest.mark.parametrize(
    ("question", "asked"),
    [("Where? " + SHORT_ANSWER, "Where? " + BOX_REQUEST), ("Where? ", "Where? " + BOX_REQUEST)],
)
def test_photographs_are_asked_about_with_boxes(question, asked):
    assert natural_request(question) == asked


# Answers

TRUTH = ["12", "red", "34", "56"]
CLOSED = ["12", "blue", "99", "56"]  # without a region
OPEN = ["12.", "red", "98", "57"]  # with it


@pytest.fixture
def asked() -> list[ZoomSample]:
    return [ZoomSample("none.png", f"question {index}", answer) for index, answer in enumerate(TRUTH)]


def test_samples_are_labelled_by_what_a_region_does(asked, monkeypatch):
    answers = {"never": CLOSED, "always": OPEN}
    monkeypatch.setattr(gate_labels, "answers_to", lambda zoom, samples, *, gate, **_: answers[gate])
    made = label_by_region(None, asked, balanced=False)
    assert [(sample.question, sample.zoom) for sample in made.samples] == [
        ("question 0", 0),
        ("question 1", 1),
        ("question 3", 0),
    ]
    assert made.kinds == {"easy": 1, "hard": 1, "wrong": 1, "harmed": 1}
    balanced = label_by_region(None, asked, seed=3)
    assert sorted(sample.zoom for sample in balanced.samples) == [0, 1]
    assert [sample.question for sample in mine_harmed(None, asked).samples] == ["question 3"]
    with pytest.raises(ValueError, match="has no answer"):
        label_by_region(None, [asked[0].replace(answer="")])


@pytest.mark.parametrize(("match", "hard"), [("exact", 2), ("substring", 0)])
def test_samples_are_labelled_by_answers_at_several_resolutions(asked, monkeypatch, match, hard):
    at = {
        16: ["12", "1 red one", "99", "5"],
        36: ["12", "red", "99", "56"],
        64: ["12", "red", "34", "56"],
        81: ["12", "red", "35", "56"],
    }
    monkeypatch.setattr(gate_labels, "answers_to", lambda zoom, samples, **_: at[samples[0].tokens])
    made = label_by_resolution(None, asked, [16, 36, 64, 81], match=match, seed=1)
    assert made.kinds["hard"] == hard  # one wrong answer contains the right one, another is contained in it
    assert made.kinds["unstable"] == 1
    assert all(sample.tokens in at and sample.zoom in (0, 1) for sample in made.samples)
    with pytest.raises(ValueError, match="resolutions are"):
        label_by_resolution(None, asked, [64, 36, 81])


def test_answers_come_in_the_samples_order_whatever_their_budgets(zoom, scenes):
    mixed = [sample.replace(tokens=(36, 64, None)[index % 3]) for index, sample in enumerate(scenes)]
    together = gate_labels.answers_to(zoom, mixed, batch_size=2, max_new_tokens=3)
    assert together == [gate_labels.answers_to(zoom, [sample], max_new_tokens=3)[0] for sample in mixed]
    opened = gate_labels.answers_to(zoom, mixed[:2], gate="always", max_new_tokens=3)
    assert len(opened) == 2


def test_drawn_scenes_are_labelled_by_the_model_that_is_trained(zoom, capsys, monkeypatch):
    monkeypatch.setattr(stage_data, "HEAD_SAMPLES", 4)

    class Trainer:
        lightning_module = type("Module", (), {"zoom": zoom})

    data = SceneAttention(count=8, validation_count=4, heads=2, batch_size=4)
    data.trainer = Trainer()
    training, validation = data.samples(validation=False), data.samples(validation=True)
    assert (len(training), len(validation)) == (8, 4)
    assert all(sample.grounding.shape == (6, 6) for sample in training)
    assert data.samples(validation=False) is training
    assert capsys.readouterr().out.count("point at the landmark") == 3  # kinds, once each
    with pytest.raises(ValueError, match="kinds are"):
        SceneZooms(kinds=["colour"])
    with pytest.raises(ValueError, match="point at no landmark"):
        SceneAttention(kinds=["background"])


def test_scenes_of_another_seed_are_others():
    first, second = (scene_samples(3, first_seed=500_000_000 + seed * 1_000_000) for seed in (0, 1))
    assert [sample.picture().tobytes() for sample in first] != [sample.picture().tobytes() for sample in second]


# Folders


def test_folders_give_back_what_was_written(tmp_path, scenes):
    file = tmp_path / "photo.png"
    Image.new("RGB", (40, 20), "red").save(file)
    maps = {"grounding": torch.rand(6, 6), "sink": torch.rand(6, 6)}
    written = [
        scenes[0].replace(zoom=0, tokens=36, **maps),
        scenes[0].replace(question="the same image?"),
        ZoomSample(file, "Wie heißt das?", "x", square=True, zoom=1, grounding=maps["grounding"]),
    ]
    write_samples(tmp_path / "made", written)
    read = SampleFolder(tmp_path / "made")
    assert len(read) == 3
    for one, other in zip(read, written, strict=True):
        assert one.picture().tobytes() == other.picture().tobytes()
        for name in ("question", "answer", "tokens", "square", "box", "zoom"):
            assert getattr(one, name) == getattr(other, name), name
        for name in maps:
            first, second = getattr(one, name), getattr(other, name)
            assert (first is None) == (second is None)
            assert first is None or first.equal(second)
    assert read[2].picture().size == (40, 40)
    assert len(list((tmp_path / "made" / "images").iterdir())) == 1
    assert pickle.loads(pickle.dumps(read))[0].grounding.equal(maps["grounding"])  # as a worker gets it
    with pytest.raises(ValueError, match="is there already"):
        write_samples(tmp_path / "made", written)
    with pytest.raises(ValueError, match="samples are none"):
        write_samples(tmp_path / "other", [])
    assert FolderData(str(tmp_path / "made"), in_memory=True).training[0].grounding.equal(maps["grounding"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ('"text"', "line 2: it must be an object"),
        ('{"image": "a.png"}', "line 2: it must be an object with image and question"),
        ('{"image": "a.png", "question": "q", "colour": 1}', "of .* no others"),
        ('{"image": 3, "question": "q"}', "image is 3"),
        ('{"image": "a.png", "question": " "}', "question is ' '"),
        ('{"image": "a.png", "question": "q", "answer": 3}', "answer is 3"),
        ('{"image": "a.png", "question": "q", "tokens": 0}', "tokens is 0"),
        ('{"image": "a.png", "question": "q", "box": [1, 2, 3]}', "box of sample 'q' is"),
        ('{"image": "a.png", "question": "q", "box": [1, 2, NaN, 4]}', "line 2: box of sample 'q' is .*nan"),
        ('{"image": "a.png", "question": "q", "box": [1, 2, Infinity, 4]}', "box of sample 'q' is .*inf"),
        ('{"image": "a.png", "question": "q", "box": [1, 2, 1, 4]}', "right beyond left"),
        ('{"image": "a.png", "question": "q", "box": [1, 4, 3, 2]}', "bottom below top"),
        ('{"image": "a.png", "question": "q", "box": [0, 0, 1e-200, 1e-200]}', "box of sample 'q'"),
        ('{"image": "a.png", "question": "q", "zoom": 2}', "zoom is 2"),
    ],
)
def test_bad_lines_are_refused_by_file_and_line(tmp_path, line, message):
    (tmp_path / "samples.jsonl").write_text('{"image": "a.png", "question": "q"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        SampleFolder(tmp_path)


@pytest.mark.parametrize("content", [None, "", b"\xff\xfe"], ids=["no file", "no line", "no text"])
def test_folders_without_samples_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "samples.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"samples\.jsonl"):
        SampleFolder(tmp_path)


def test_processes_share_out_batches_and_every_pass_holds_all_samples():
    samples = list(range(10))
    whole = SampleBatches(samples, 4, 5, (0, 1), seed=3)
    shares = [SampleBatches(samples, 4, 5, (rank, 2), seed=3) for rank in range(2)]
    drawn = [whole[number] for number in range(5)]
    order = [sample for batch in drawn for sample in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == samples
    assert order[:10] != order[10:]
    for number, batch in enumerate(drawn):
        assert [shares[0][number][0], shares[1][number][0], shares[0][number][1], shares[1][number][1]] == batch
    assert SampleBatches(samples, 4, 5, (0, 1), seed=4)[0] != drawn[0]
    ordered = SampleBatches(samples, 4, 3, (1, 2), seed=None)
    assert [ordered[number] for number in range(3)] == [[1, 3], [5, 7], [9]]


# Pickles


def record(**changes) -> dict:
    return {
        "uid": np.int64(3),
        "question_id": "gqa-1",
        "dataset": "gqa",
        "mode": "natural",
        "prompt": "Where? Output grounding bounding box related to the question in JSON.",
        "text": "here",
        "image": "a.png",
        "sink_attn": np.zeros((4, 4)),
        "grounding_attn_o2i": np.arange(16, dtype=np.float16).reshape(4, 4),
        **changes,
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_records_of_every_protocol_are_read(tmp_path, protocol):
    kept = record(more={1, 2}, score=np.float32(0.5), view=np.arange(12).reshape(3, 4)[:, ::2])
    (tmp_path / "records.pkl").write_bytes(pickle.dumps([kept], protocol=protocol))
    (read,) = read_records(tmp_path / "records.pkl")
    assert read.keys() == kept.keys()
    np.testing.assert_array_equal(read["grounding_attn_o2i"], kept["grounding_attn_o2i"])
    np.testing.assert_array_equal(read["view"], kept["view"])
    assert read["more"] == {1, 2}
    assert read["score"] == 0.5


class Command:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (Command(), "builtins.exec"),
        (record(image=Path("a.png")), r"pathlib.*Path"),
        (record(extra=OrderedDict()), "collections.OrderedDict"),
        (record(extra=torch.zeros(1)), r"torch\._utils"),
        (record(extra=np.random.default_rng(0)), r"numpy\.random"),
        (record(extra=np.load), r"numpy\.load"),
    ],
    ids=["code", "path", "other containers", "tensor", "generator", "function"],
)
def test_pickles_that_name_anything_else_are_refused(tmp_path, content, named):
    (tmp_path / "records.pkl").write_bytes(pickle.dumps([content]))
    with pytest.raises(ValueError, match=named):
        read_records(tmp_path / "records.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"not a pickle", "cannot be read"),
        (pickle.dumps([record()])[:-40], "read"),
        (b"cos\nsystem\n(S'true'\ntR.", r"os\.system"),
        (pickle.dumps(3), "it holds a int"),
        (pickle.dumps([3]), "it holds a list"),
    ],
)
def test_broken_pickles_are_refused(tmp_path, content, message):
    (tmp_path / "records.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "records.pkl")


def test_records_become_samples(tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    oblong = record(grounding_attn_o2i=np.ones((2, 5)), sink_attn=None, prompt="What?")
    (tmp_path / "records.pkl").write_bytes(pickle.dumps({"a": record(), "b": oblong}))
    square, other = region_samples(tmp_path / "records.pkl", tmp_path)
    assert square.question == f"Where? {SHORT_ANSWER}"
    assert (square.answer, square.tokens, square.square) == ("here", 16, True)
    assert (other.question, other.tokens, other.square, other.sink) == ("What?", 10, False, None)
    assert square.picture().size == (40, 40)
    peak = torch.zeros(4, 4)
    peak[1, 2] = 1
    labels = labels_of(square.replace(grounding=peak), LabelRules(most_area=0.75))
    assert labels.tolist() == [[0, 0, 0, 0], [0, -100, 1, -100], [0, -100, -100, -100], [0, 0, 0, 0]]  # padding is 0
    for broken, message in (
        ({"prompt": 3}, "3 as prompt"),
        ({"grounding_attn_o2i": np.ones(4)}, r"shape \(4,\)"),
        ({"grounding_attn_o2i": "x"}, "no array of numbers"),
    ):
        (tmp_path / "broken.pkl").write_bytes(pickle.dumps([record(**broken)]))
        with pytest.raises(ValueError, match=message):
            region_samples(tmp_path / "broken.pkl", tmp_path)
    lacking = record()
    del lacking["text"]
    (tmp_path / "broken.pkl").write_bytes(pickle.dumps([lacking]))
    with pytest.raises(ValueError, match="has no text"):
        region_samples(tmp_path / "broken.pkl", tmp_path)


def test_records_of_answers_become_labels(tmp_path):
    easy = {"image": "a.png", "prompt": "q", "text": "7", "res": [64, 128, 256, 512], "ms_answers": ["7"] * 4}
    hard = {**easy, "res": np.array([64, 128, 256, 512]), "ms_answers": ["1", "2", "7", "7"]}
    (tmp_path / "records.pkl").write_bytes(pickle.dumps({"a": easy, "b": hard}))
    made = gate_samples(tmp_path / "records.pkl", tmp_path, seed=0)
    assert made.kinds == {"easy": 1, "hard": 1}
    assert made.samples[0].zoom == 0
    assert made.samples[0].tokens in (64, 128)


# Commands


def test_commands_make_folders_that_stages_read(backbone, scenes, tmp_path, capsys):
    write_samples(tmp_path / "asked", scenes)
    given = ["--backbone", backbone, "--samples", str(tmp_path / "asked")]
    out = tmp_path / "regions"
    flags = ["--head_count", "2", "--max_new_tokens", "3", "--settings", json.dumps(SETTINGS)]
    commands.main(["regions", *given, "--out", str(out), *flags])
    made = SampleFolder(out)
    assert len(made) == len(scenes)
    assert made[0].grounding.shape == (6, 6)
    assert "pointing heads" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is there already"):
        commands.main(["regions", *given, "--out", str(out)])
    with pytest.raises(ValueError, match="pointing is 'gpt'"):
        commands.main(["regions", *given, "--out", str(tmp_path / "x"), "--pointing", "gpt"])
    (tmp_path / "records.pkl").write_bytes(pickle.dumps([record()]))
    images = ["--images", str(tmp_path)]
    commands.main(
        ["convert", "--records", str(tmp_path / "records.pkl"), *images, "--out", str(tmp_path / "converted")]
    )
    assert SampleFolder(tmp_path / "converted")[0].grounding[3, 3] == 15
