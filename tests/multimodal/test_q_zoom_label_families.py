"""Labels of stage 1 from each family of backbones: commands as they come, grids of training, system messages."""

import pytest
import torch
from PIL import Image

from multimodal.q_zoom.pseudo_labels import PointingHeads
from multimodal.q_zoom.training import commands
from multimodal.q_zoom.training.loading import least_settings
from multimodal.q_zoom.training.padded_rows import score_maps
from multimodal.q_zoom.training.prompts import inputs_of, prompts_of, told
from multimodal.q_zoom.training.region_labels import choose_heads, with_attention
from multimodal.q_zoom.training.samples import SampleFolder, ZoomSample, write_samples
from multimodal.q_zoom.training.stages import rows_of
from tests.multimodal.random_models import FAMILIES, random_zoom

SIZES = ((230, 330), (480, 220), (600, 190), (200, 200), (1200, 100))  # width, height
HEADS = PointingHeads({1: [0]}, {})
SHORT = {"max_new_tokens": 2, "batch_size": 4}


@pytest.fixture
def samples() -> list[ZoomSample]:
    noise = torch.Generator().manual_seed(0)
    pictures = [
        Image.fromarray(torch.randint(256, (height, width, 3), generator=noise, dtype=torch.uint8).numpy())
        for width, height in SIZES
    ]
    return [ZoomSample(picture, "what is the code at red ?", "1", box=(20, 30, 90, 80)) for picture in pictures]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each family, made when it is asked for."""
    made = {}

    def folder(family: str) -> str:
        if family not in made:
            zoom, path = random_zoom(family), tmp_path_factory.mktemp(family)
            zoom.model.save_pretrained(path)
            zoom.processor.save_pretrained(path)
            made[family] = str(path)
        return made[family]

    return folder


@pytest.mark.parametrize("family", [*FAMILIES])
@pytest.mark.parametrize("command", ["regions", "gate"])
def test_labels_are_made_without_settings(family, command, saved, samples, tmp_path):
    write_samples(tmp_path / "asked", [sample.replace(tokens=36) for sample in samples[:2]])
    given = ["--backbone", saved(family), "--samples", str(tmp_path / "asked"), "--out", str(tmp_path / "out")]
    if command == "regions":
        commands.main([command, *given, "--max_new_tokens", "3"])
        assert len(SampleFolder(tmp_path / "out")) == 2
    else:
        # A random model answers nothing right, so there is nothing to write.
        with pytest.raises(ValueError, match="samples are none"):
            commands.main([command, *given, "--resolutions", "[16, 25, 36]", "--max_new_tokens", "2"])


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen2_5_vl", (1, "continuous", (256, 576))),
        ("qwen3_vl", (2, "continuous", (256, 576))),
        ("llava", (1, "separate", (36, 36))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_least_settings_are_what_the_backbone_can_have(family, expected):
    config = least_settings(random_zoom(family).adapter)
    assert (config.tap_layer, config.alignment, config.coarse_tokens) == expected


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_training_shows_images_on_the_grid_of_their_labels(family, samples):
    """Whatever budget the settings of training have, and where a budget of one number gives another grid."""
    fixed = {"coarse_tokens": (36, 36), "region_tokens": (36, 36)}
    labelling = random_zoom(family, **(fixed if family == "llava" else {"coarse_tokens": (40, 56)}))
    training = random_zoom(family, **(fixed if family == "llava" else {"coarse_tokens": (90, 120)}))
    asked = [sample.replace(tokens=tokens) for sample in samples for tokens in (None, 50)]
    made = with_attention(labelling, asked, HEADS, **SHORT)
    assert len(made) == len(asked)
    grids = [tuple(sample.grounding.shape) for sample in made]
    assert [prompt.grid for prompt in prompts_of(labelling, asked)] == grids
    assert [prompt.grid for prompt in prompts_of(training, made)] == grids
    with torch.no_grad():
        maps = score_maps(training.adapter, training.proposal, rows_of(training, made))
    assert [tuple(cells.shape) for cells in maps] == grids
    alone = [prompt.grid for prompt in prompts_of(training, [sample.replace(grounding=None) for sample in made])]
    assert (alone == grids) == (family == "llava")


def test_attention_of_other_size_leaves_budgets_alone(samples):
    zoom = random_zoom("qwen2_5_vl")
    carrying = [sample.replace(tokens=36, grounding=torch.ones(2, 3)) for sample in samples[:2]]
    bare = [sample.replace(grounding=None) for sample in carrying]
    assert inputs_of(zoom, carrying, 36)["pixel_values"].equal(inputs_of(zoom, bare, 36)["pixel_values"])


@pytest.mark.parametrize("tokens", [None, 36], ids=["budget of the settings", "of the sample"])
def test_a_system_message_comes_before_the_question(samples, tokens):
    zoom = random_zoom("qwen3_vl")
    system = told(zoom, "the code is red .")
    ids = [inputs_of(one, samples[:1], tokens)["input_ids"] for one in (zoom, system)]
    texts = [zoom.processor.batch_decode(row)[0].split() for row in ids]
    assert texts[1] != texts[0]
    assert texts[1][-len(texts[0]) :] == texts[0]
    assert " ".join(texts[1][: -len(texts[0])]) == "<|im_start|> system the code is red . <|im_end|>"


def test_attention_and_heads_are_taken_with_the_system_message(samples):
    zoom = random_zoom("qwen2_5_vl")
    plain, again, after = (
        with_attention(zoom, samples[:2], HEADS, system=system, **SHORT) for system in (None, None, "the code is red .")
    )
    for first, second, third in zip(plain, again, after, strict=True):
        assert first.grounding.equal(second.grounding)
        assert not first.grounding.equal(third.grounding)
        assert first.question == third.question
    assert choose_heads(zoom, samples, system="the code is red .", **SHORT).hits.shape == (6, 4)
    for bad in (" ", 3):
        with pytest.raises(ValueError, match="system is"):
            with_attention(zoom, samples, HEADS, system=bad, **SHORT)
