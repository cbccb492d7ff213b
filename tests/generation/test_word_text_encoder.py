"""The word-level text encoder: lengths, independence of the batch, unknown words, and its checkpoint."""

import logging

import pytest
import torch

from generation.lina.captioned_shapes import VOCABULARY
from generation.lina.text_encoder import WordTextEncoder


@pytest.fixture
def encoder():
    return WordTextEncoder(dim=32).eval()


def test_one_vector_a_word(encoder):
    prompts = ["a red circle", "", "A  red, circle above an orange square!", "..."]
    assert [tuple(vectors.shape) for vectors in encoder(prompts)] == [(3, 32), (0, 32), (7, 32), (0, 32)]
    assert [tuple(vectors.shape) for vectors in encoder(["", ""])] == [(0, 32), (0, 32)]
    assert encoder([]) == []


def test_a_prompt_does_not_depend_on_its_batch(encoder):
    prompts = ["a red circle", "", "a blue square to the left of a green triangle"]
    for alone, together in zip([encoder([prompt])[0] for prompt in prompts], encoder(prompts), strict=True):
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


def test_case_and_punctuation_do_not_matter_and_order_does(encoder):
    plain, shouted, turned = encoder(["red circle", "RED, CIRCLE.", "circle red"])
    torch.testing.assert_close(plain, shouted)
    assert (plain.flip(0) - turned).abs().max() > 0.01  # positions tell


def test_words_see_each_other(encoder):
    first, second = encoder(["red circle", "red square"])
    assert (first[0] - second[0]).abs().max() > 1e-3


def test_unknown_words_have_stable_buckets(encoder):
    known = len(VOCABULARY)
    assert encoder.tokenize("red zebra") == [VOCABULARY.index("red"), known + 54]
    assert encoder.tokenize("Zébra")[0] >= known
    assert encoder.tokenize("zebra") == WordTextEncoder(dim=8, num_heads=2).tokenize("ZEBRA")


def test_long_prompts_are_cut_and_named_in_every_call(encoder, caplog):
    prompt = " ".join(["red"] * 40)
    with caplog.at_level(logging.WARNING, logger="generation.lina.text_encoder"):
        assert len(encoder([prompt])[0]) == 12
        encoder([prompt, prompt])
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"prompt {prompt[:77] + '...'!r} has 40 words; those after the first 12 are cut"] * 2
    torch.testing.assert_close(encoder([prompt])[0], encoder([" ".join(["red"] * 12)])[0])


def test_unknown_words_are_named_once_a_call(encoder, caplog):
    prompts = ["a mauve dodecahedron", "a mauve sqare", "", "a red circle", "x" * 500]
    with caplog.at_level(logging.WARNING, logger="generation.lina.text_encoder"):
        encoder(prompts)
        encoder(prompts)
        encoder(["a red circle", ""])
    first, second = (record.getMessage() for record in caplog.records)
    assert first == second
    assert f"unknown words: 'mauve', 'dodecahedron', 'sqare', '{'x' * 20}...'; " in first
    assert all(word in first for word in VOCABULARY)


def test_of_many_unknown_words_and_of_a_large_vocabulary_some_are_shown(caplog):
    encoder = WordTextEncoder(vocabulary=[f"known{i}" for i in range(1000)], dim=8, num_heads=2)
    with caplog.at_level(logging.WARNING, logger="generation.lina.text_encoder"):
        encoder([" ".join(f"new{i}" for i in range(12))])
    (message,) = (record.getMessage() for record in caplog.records)
    assert "'new7' and 4 more" in message
    assert "1000 words: known0, " in message
    assert len(message) < 600


def test_every_parameter_in_use_has_a_gradient(encoder):
    encoder = encoder.train()
    sum(
        vectors.sum() * (i + 1) for i, vectors in enumerate(encoder(["a red circle", "", " ".join(VOCABULARY[:12])]))
    ).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_saved_and_loaded(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = WordTextEncoder.from_pretrained(tmp_path).eval()
    prompts = ["a red zebra", "a purple triangle at the center"]
    for ours, theirs in zip(encoder(prompts), loaded(prompts), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"buckets": 0}, "buckets is 0"),
        ({"dim": 30}, "dim is 30; it must be a multiple of num_heads"),
        ({"vocabulary": ["red", "red"]}, "list of different words"),
        ({"vocabulary": "red"}, "list of different words"),
        ({"vocabulary": ["Red"]}, "vocabulary holds 'Red'"),
        ({"vocabulary": ["top left"]}, "vocabulary holds 'top left'"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        WordTextEncoder(**settings)


def test_a_single_string_is_refused(encoder):
    with pytest.raises(ValueError, match="must be a list of prompts"):
        encoder("a red circle")
