"""`QZoom.generate` on random stock models: stock answers where shut, batches, boxes, stock options, bad input."""

import threading

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, TextStreamer

from multimodal.q_zoom import QZoom, UnsupportedBackbone
from tests.multimodal.random_models import FAMILIES, random_zoom

QUESTIONS = ["what is the code at red?", "where is blue?", "what is the background?"]
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module", params=list(FAMILIES))
def zoom(request) -> QZoom:
    return random_zoom(request.param)


@pytest.fixture(scope="module")
def qwen() -> QZoom:
    return random_zoom("qwen2_5_vl")


def pictures(count: int = 3) -> list[Image.Image]:
    """Noise, so that every part of a picture is unlike every other, of several shapes."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(200, 150), (96, 200), (130, 131)][:count]
    return [
        Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())
        for width, height in sizes
    ]


def new_tokens(sequences: Tensor, inputs) -> Tensor:
    """What was generated; the sequences must begin with the prompts as they were given."""
    length = inputs["input_ids"].shape[1]
    assert sequences[:, :length].equal(inputs["input_ids"])
    return sequences[:, length:]


def test_shut_gate_gives_the_stock_models_tokens(zoom):
    images = pictures()
    inputs = zoom.ask(images, QUESTIONS)
    stock = zoom.model.generate(**inputs, **GREEDY)
    never = zoom.generate(inputs, gate="never", **GREEDY)
    shut, infos = zoom.generate(inputs, images, gate_threshold=1.0, return_zoom_info=True, **GREEDY)
    assert never.equal(stock)
    assert shut.equal(stock)
    assert not any(info.opened for info in infos)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_exact_scores_of_a_shut_gate_are_the_stock_models_bit_for_bit(family):
    zoom = random_zoom(family, exact=True)
    image = pictures(1)[0]
    inputs = zoom.ask(image, QUESTIONS[0])
    options = {"output_logits": True, "return_dict_in_generate": True, **GREEDY}
    stock = zoom.model.generate(**inputs, **options)
    shut = zoom.generate(inputs, image, gate_threshold=1.0, **options)
    assert shut.sequences.equal(stock.sequences)
    assert all(ours.equal(theirs) for ours, theirs in zip(shut.logits, stock.logits, strict=True))


def test_rows_of_a_mixed_batch_get_their_own_answers(zoom):
    images = pictures()
    alone = [
        zoom.generate(zoom.ask(image, question), image, return_zoom_info=True, **GREEDY)
        for image, question in zip(images, QUESTIONS, strict=True)
    ]
    probabilities = sorted(infos[0].gate_probability for _, infos in alone)
    threshold = (probabilities[0] + probabilities[1]) / 2
    settings = {"gate_threshold": threshold, "return_zoom_info": True, **GREEDY}
    inputs = zoom.ask(images, QUESTIONS)
    together, infos = zoom.generate(inputs, images, **settings)
    assert sorted(info.opened for info in infos) == [False, True, True]
    for row, (image, question) in enumerate(zip(images, QUESTIONS, strict=True)):
        single = zoom.ask(image, question)
        sequences, (info,) = zoom.generate(single, image, **settings)
        assert new_tokens(together, inputs)[row].equal(new_tokens(sequences, single)[0])
        assert infos[row].boxes == info.boxes
        assert infos[row].gate_probability == pytest.approx(info.gate_probability, abs=1e-5)
        assert infos[row].visual_tokens == info.visual_tokens


def test_looking_closer_changes_what_the_model_sees(zoom):
    image = pictures(1)[0]
    inputs = zoom.ask(image, QUESTIONS[0])
    options = {"output_logits": True, "return_dict_in_generate": True, **GREEDY}
    first = {
        box: zoom.generate(inputs, image, box=box, **options).logits[0] for box in ((0, 0, 60, 60), (100, 80, 200, 150))
    }
    stock = zoom.generate(inputs, gate="never", **options).logits[0]
    one, other = first.values()
    assert not torch.allclose(one, other, atol=1e-3)
    assert not torch.allclose(one, stock, atol=1e-3)


@pytest.mark.parametrize("alignment", ["continuous", "separate"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_reusing_the_first_layers_changes_nothing(family, alignment):
    if family == "llava" and alignment == "continuous":
        pytest.skip("LLaVA's positions have no rows and columns")
    zoom = random_zoom(family, alignment=alignment)
    image = pictures(1)[0]
    with torch.no_grad():
        (prompt,) = zoom.adapter.prompts(zoom.ask(image, QUESTIONS[0]))
        tap = zoom.read_to_tap(prompt)
        where = [(20, 30, 120, 90), (0, 0, 50, 150)]
        cells = [zoom.adapter.pixels_to_cells(box, prompt, image.size) for box in where]
        reused, again = (zoom.look_closer(tap, image, where, cells, reuse=reuse) for reuse in (True, False))
    torch.testing.assert_close(reused.hidden, again.hidden, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("copies", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}])
def test_beams_and_several_sequences_are_stocks(zoom, copies):
    images = pictures(2)
    inputs = zoom.ask(images, QUESTIONS[:2])
    options = {"max_new_tokens": 4, **copies}
    assert zoom.generate(inputs, images, gate_threshold=1.0, **options).equal(zoom.model.generate(**inputs, **options))


def test_sampling_streams_stops_and_processors_are_stocks(qwen, capsys):
    class OnlyToken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([20]), 0.0)

    image = pictures(1)[0]
    inputs = qwen.ask(image, QUESTIONS[0])
    tokens = qwen.generate(inputs, image, gate="always", logits_processor=[OnlyToken()], **GREEDY)
    assert new_tokens(tokens, inputs).tolist() == [[20] * 5]
    ended = qwen.generate(inputs, image, gate="always", logits_processor=[OnlyToken()], eos_token_id=20, **GREEDY)
    assert new_tokens(ended, inputs).tolist() == [[20]]
    qwen.generate(inputs, image, streamer=TextStreamer(qwen.processor.tokenizer, skip_prompt=True), **GREEDY)
    assert capsys.readouterr().out.strip()
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(qwen.generate(inputs, image, gate="always", do_sample=True, max_new_tokens=8))
    assert draws[0].equal(draws[1])
    longest = inputs["input_ids"].shape[1] + 3
    assert qwen.generate(inputs, image, gate="always", max_length=longest, do_sample=False).shape[1] == longest


def test_a_batch_padded_on_the_right_is_read_as_well(qwen):
    images = pictures(2)
    inputs = dict(qwen.ask(images, QUESTIONS[:2]))
    padding = (inputs["attention_mask"] == 0).sum(dim=1).tolist()
    assert max(padding) > 0
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        rows = zip(inputs[name], padding, strict=True)
        inputs[name] = torch.stack([row.roll(-count) for row, count in rows])
    made = qwen.generate(inputs, images, gate="always", **GREEDY)
    for row, image in enumerate(images):
        single = qwen.ask(image, QUESTIONS[row])
        assert new_tokens(qwen.generate(single, image, gate="always", **GREEDY), single)[0].equal(made[row, -5:])


def test_separability_reopens_only_what_does_not_stand_out(qwen):
    images = pictures()
    inputs = qwen.ask(images, QUESTIONS)
    stock = new_tokens(qwen.generate(inputs, gate="never", **GREEDY), inputs)
    opened = new_tokens(qwen.generate(inputs, images, gate="always", **GREEDY), inputs)
    _, infos = qwen.generate(inputs, images, gate="separability", gate_threshold=0.0, return_zoom_info=True, **GREEDY)
    scores = [info.gate_probability for info in infos]
    threshold = sorted(scores)[1]
    made, infos = qwen.generate(
        inputs, images, gate="separability", gate_threshold=threshold, return_zoom_info=True, **GREEDY
    )
    assert [info.opened for info in infos] == [score < threshold for score in scores]
    for row, score in enumerate(scores):
        expected = opened if score < threshold else stock
        assert new_tokens(made, inputs)[row].equal(expected[row])


def test_budgets_bound_the_visual_tokens():
    zoom = random_zoom("qwen2_5_vl", max_visual_tokens=50)
    image = pictures(1)[0]
    inputs = zoom.ask(image, QUESTIONS[0])
    _, (info,) = zoom.generate(inputs, image, gate="always", return_zoom_info=True, **GREEDY)
    assert info.visual_tokens <= 50
    _, (two,) = zoom.generate(inputs, image, box=[(0, 0, 60, 60), (90, 60, 190, 140)], return_zoom_info=True, **GREEDY)
    assert two.visual_tokens <= 50
    assert info.full_tokens == round(200 / 16) * round(150 / 16)


def test_propose_gives_boxes_inside_the_image_and_a_map(zoom):
    image = pictures(1)[0]
    found = zoom.propose(image, QUESTIONS[0], region_threshold=0.3)
    assert found.heat_map.dim() == 2
    assert found.heat_map.min() >= 0
    assert found.heat_map.max() <= 1
    for left, top, right, bottom in found.boxes:
        assert 0 <= left < right <= image.width
        assert 0 <= top < bottom <= image.height
    assert found.boxes
    assert zoom.propose(image, QUESTIONS[0], region_threshold=1.0).boxes == []


def test_threads_do_not_disturb_one_another(qwen):
    images = pictures()
    pairs = list(zip(images, QUESTIONS, strict=True))
    expected = [qwen.generate(qwen.ask(image, question), image, **GREEDY) for image, question in pairs]
    made: dict[int, Tensor] = {}

    def answer(row: int) -> None:
        made[row] = qwen.generate(qwen.ask(images[row], QUESTIONS[row]), images[row], **GREEDY)

    threads = [threading.Thread(target=answer, args=(row,)) for row in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(made[row].equal(expected[row]) for row in range(3))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_one_first_layer_serves_both_branches(family):
    shared = random_zoom(family, share_first_layer=True)
    apart = random_zoom(family)
    image = pictures(1)[0]
    results = [
        zoom.generate(zoom.ask(image, QUESTIONS[0]), image, return_zoom_info=True, **GREEDY)[1][0]
        for zoom in (shared, apart)
    ]
    apart.gate.head.load_state_dict(shared.gate.head.state_dict())
    again = apart.generate(apart.ask(image, QUESTIONS[0]), image, return_zoom_info=True, **GREEDY)[1][0]
    assert results[0].gate_probability == pytest.approx(again.gate_probability, abs=1e-5)
    assert sum(p.numel() for p in shared.parameters()) < sum(p.numel() for p in apart.parameters())


def test_bfloat16_and_eager_attention_work():
    zoom = random_zoom("qwen2_5_vl")
    image = pictures(1)[0]
    inputs = zoom.ask(image, QUESTIONS[0])
    expected = zoom.generate(inputs, image, gate="always", **GREEDY)
    zoom.model.set_attn_implementation("eager")
    assert zoom.generate(inputs, image, gate="always", **GREEDY).equal(expected)
    zoom.to(torch.bfloat16)
    assert zoom.generate(inputs, image, gate="always", **GREEDY).shape == expected.shape


def with_two_images(inputs):
    return {**inputs, "image_grid_thw": inputs["image_grid_thw"].repeat(2, 1)}


def without(name: str):
    return lambda inputs: {key: value for key, value in inputs.items() if key != name}


def with_ids(change):
    return lambda inputs: {**inputs, "input_ids": change(inputs["input_ids"].clone())}


BAD_INPUTS = {
    "no pixels": (without("pixel_values"), {}, "no image"),
    "two images, one placeholder": (with_two_images, {}, "1 questions and 2 images"),
    "no image token": (with_ids(lambda ids: ids.masked_fill(ids == 6, 3)), {}, "no image token"),
    "an image token too many": (
        with_ids(lambda ids: ids.index_fill(1, torch.tensor([-1]), 6)),
        {},
        "more than one place",
    ),
    "no original image": (dict, {"images": None}, "images is None"),
    "two original images": (dict, {"images": pictures(2)}, "images holds 2 for 1"),
    "an image smaller than a cell": (dict, {"images": Image.new("RGB", (15, 40))}, "15 x 40"),
    "a box without area": (dict, {"box": (5, 5, 5, 40)}, "200 x 150"),
    "a box outside": (dict, {"box": (300, 10, 350, 40)}, "200 x 150"),
    "a box of NaN": (dict, {"box": (float("nan"), 0, 10, 10)}, "finite"),
    "a box of three numbers": (dict, {"box": (0, 0, 10)}, "four numbers"),
    "boxes for two rows": (dict, {"box": [None, (0, 0, 9, 9)]}, "2 entries for 1"),
    "a box and no zoom": (dict, {"box": (0, 0, 9, 9), "gate": "never"}, "leave one"),
    "an unknown gate": (dict, {"gate": "often"}, "'often'"),
    "a gate threshold above 1": (dict, {"gate_threshold": 1.5}, "gate_threshold is 1.5"),
    "a region threshold of NaN": (dict, {"region_threshold": float("nan")}, "region_threshold is nan"),
    "beams with two answers": (dict, {"gate": "separability", "num_beams": 2}, "num_beams is 2"),
}


@pytest.mark.parametrize("case", list(BAD_INPUTS))
def test_bad_input_is_refused_before_any_layer_runs(qwen, case, monkeypatch):
    change, options, message = BAD_INPUTS[case]
    image = pictures(1)[0]
    inputs = change(dict(qwen.ask(image, QUESTIONS[0])))
    monkeypatch.setattr(qwen.adapter.decoder.layers[0], "forward", lambda *_, **__: pytest.fail("a layer ran"))
    with pytest.raises(ValueError, match=message):
        qwen.generate(inputs, **{"images": image, **options}, **GREEDY)


def test_files_that_are_no_images_and_empty_questions_are_refused(qwen, tmp_path):
    cut = tmp_path / "cut.png"
    pictures(1)[0].save(cut)
    cut.write_bytes(cut.read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be read"):
        qwen.ask(str(cut), QUESTIONS[0])
    with pytest.raises(ValueError, match="cannot be read"):
        qwen.ask(tmp_path / "absent.png", QUESTIONS[0])
    with pytest.raises(ValueError, match="not empty"):
        qwen.ask(pictures(1)[0], "  ")


def test_scores_that_are_not_numbers_are_named():
    zoom = random_zoom("qwen2_5_vl")
    image = pictures(1)[0]
    with torch.no_grad():
        zoom.proposal.q_proj.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        zoom.generate(zoom.ask(image, QUESTIONS[0]), image, gate="always", **GREEDY)
    with torch.no_grad():
        zoom.gate.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="gate's probability"):
        zoom.generate(zoom.ask(image, QUESTIONS[0]), image, **GREEDY)


UNSUPPORTED = {
    "an encoder-decoder": ("T5Config", {}, "encoder-decoder"),
    "cross-attention": ("MllamaConfig", {}, "cross-attention"),
    "a resampler": ("Idefics2Config", {}, "resampler"),
    "linear attention": ("Qwen3_5Config", {}, "linear_attention"),
    "an unknown kind": ("GPT2Config", {}, "register_adapter"),
}


@pytest.mark.parametrize("case", list(UNSUPPORTED))
def test_backbones_that_cannot_be_exact_are_refused_with_the_reason(case):
    import transformers

    name, settings, reason = UNSUPPORTED[case]
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    model = type("Model", (), {"config": getattr(transformers, name)(**settings)})()
    with pytest.raises(UnsupportedBackbone, match=reason):
        QZoom.wrap(model, None, random_zoom("qwen2_5_vl").config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tap_layer": 5}, "6 layers"),
        ({"tap_layer": 1}, "at least 2"),
        ({"region_threshold": 2}, "region_threshold is 2"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        random_zoom("qwen3_vl", **changes)
