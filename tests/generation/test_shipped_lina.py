"""The LINA models that come along: their size, their cards, and that they draw what captions say."""

import re
from pathlib import Path

import pytest
import torch

from generation.lina.captioned_shapes import held_out_prompts
from generation.lina.shape_scores import score
from generation.lina.shipped_models import SHIPPED, load_pipeline
from generation.model_folders import CHECKPOINTS

PRESENT = [name for name, folder in SHIPPED.items() if (CHECKPOINTS / folder / "model_index.json").is_file()]
DOCUMENTATION = (Path(__file__).parents[2] / "docs" / "lina.md").read_text()


@pytest.mark.parametrize("name", PRESENT)
def test_size_and_card(name):
    folder = CHECKPOINTS / SHIPPED[name]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    card = (folder / "README.md").read_text()
    assert f"configs/generation/{SHIPPED[name]}.yaml" in card


def test_shapes_follow_captions():
    pipeline = load_pipeline("shapes")
    settings = {"guidance_scale": 3.0, "num_inference_steps": 16, "num_diffusion_steps": 10, "spacing": "trailing"}
    assert score(pipeline, "single", 40, **settings)["all_correct"] >= 0.95
    assert score(pipeline, "pairs", 40, **settings)["all_correct"] >= 0.9


def test_shapes_without_a_caption_are_shapes_too():
    pipeline = load_pipeline("shapes")
    drawn = pipeline("", generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert drawn.shape == (1, 3, 32, 32)
    assert drawn.std() > 0.05


def test_stated_number_of_parameters():
    transformer = load_pipeline("shapes").transformer
    trained = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    assert f"{trained:,} trained parameters in the transformer" in DOCUMENTATION


def test_held_out_captions_are_words_the_model_knows():
    vocabulary = set(load_pipeline("shapes").text_encoder.index_of)
    words = {word for scene in held_out_prompts("pairs", 200) for word in re.findall(r"\w+", scene.caption)}
    assert words <= vocabulary
