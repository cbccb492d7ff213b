"""Branches of Q-Zoom in files: own and official names, both layouts, and files that are wrong."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from multimodal.q_zoom import QZoom, QZoomConfig
from multimodal.q_zoom.checkpoints import HEADS_FILE, UNUSED, from_official, load_weights, official_weights, own_weights
from multimodal.q_zoom.heads import RegionProposal
from tests.multimodal.golden_models import GOLDEN, golden_model
from tests.multimodal.random_models import random_zoom

FAMILIES = ["qwen2_5_vl", "qwen3_vl", "llava"]


def changed(zoom: QZoom, by: float) -> QZoom:
    """The same Q-Zoom with other branches."""
    with torch.no_grad():
        for weight in own_weights(zoom).values():
            weight += by
    return zoom


def same(one: QZoom, other: QZoom) -> bool:
    ours, theirs = own_weights(one), own_weights(other)
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("official", [False, True], ids=["own names", "official names"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_branches_come_back(family, official, tmp_path):
    zoom = changed(random_zoom(family), 0.01)
    zoom.save_pretrained(tmp_path / "heads", official_keys=official)
    other = random_zoom(family)
    assert not same(zoom, other)
    load_weights(other, load_file(tmp_path / "heads" / HEADS_FILE), "heads")
    assert same(zoom, other)
    assert QZoomConfig.load(tmp_path / "heads") == zoom.config


def test_a_shared_layer_is_written_once_and_comes_back(tmp_path):
    zoom = changed(random_zoom("qwen2_5_vl", share_first_layer=True), 0.01)
    zoom.save_pretrained(tmp_path / "heads")
    with safe_open(tmp_path / "heads" / HEADS_FILE, "pt") as file:
        assert not [name for name in file.keys() if name.startswith("gate.layers.0")]  # noqa: SIM118
    other = random_zoom("qwen2_5_vl", share_first_layer=True)
    load_weights(other, load_file(tmp_path / "heads" / HEADS_FILE), "heads")
    assert same(zoom, other)


@pytest.mark.parametrize("name", ["qwen2_5vl_e2e_small", "qwen3vl_e2e"])
def test_export_gives_the_official_file_back(name):
    golden = golden_model(name)
    written = official_weights(golden.zoom)
    branches = {key[3:]: value for key, value in golden.tensors.items() if key.startswith("sd.")}
    branches = {key: value for key, value in branches.items() if "twig" in key or "high_res" in key}
    assert written.keys() == branches.keys()
    last = f"twig_layers.{golden.zoom.config.proposal_depth - 1}."
    for key, value in written.items():
        # What the authors' code never uses is written back with the model's own values, as it started.
        if not (last in key and key.split(last)[1].startswith(UNUSED)):
            assert value.equal(branches[key]), key


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model.", ""])
def test_names_of_either_layout_are_understood(prefix):
    zoom = changed(random_zoom("qwen2_5_vl"), 0.01)
    written = official_weights(zoom)
    moved = {prefix + key.removeprefix("model."): value for key, value in written.items()}
    ours = from_official(moved, zoom.config.proposal_depth)
    assert ours.keys() == own_weights(zoom).keys()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_checkpoint_of_the_authors_loads_in_one_step(family, tmp_path):
    zoom = changed(random_zoom(family), 0.01)
    folder = tmp_path / "published"
    zoom.model.save_pretrained(folder)
    zoom.processor.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **official_weights(zoom)}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"enable_twig": True, "twig_K": 3, "twig_T": 2, "reuse_src_pos": False}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = QZoom.from_pretrained(str(folder))
    assert same(zoom, loaded)
    assert loaded.config.tap_layer == 3
    assert loaded.config.alignment == "continuous"


def test_heads_of_their_own_go_around_a_stock_checkpoint(tmp_path):
    zoom = changed(random_zoom("qwen2_5_vl"), 0.01)
    zoom.model.save_pretrained(tmp_path / "base")
    zoom.processor.save_pretrained(tmp_path / "base")
    zoom.save_pretrained(tmp_path / "heads")
    loaded = QZoom.from_pretrained(str(tmp_path / "base"), heads=str(tmp_path / "heads"))
    assert same(zoom, loaded)
    with pytest.raises(ValueError, match="no branches of Q-Zoom"):
        QZoom.from_pretrained(str(tmp_path / "base"))


def test_a_base_without_all_its_weights_is_refused(tmp_path, caplog):
    zoom = random_zoom("qwen2_5_vl")
    zoom.model.save_pretrained(tmp_path / "base")
    zoom.processor.save_pretrained(tmp_path / "base")
    zoom.save_pretrained(tmp_path / "heads")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "model.odd.weight": torch.zeros(2)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"not of the model or of branches.*odd"):
        QZoom.from_pretrained(str(tmp_path / "base"), heads=str(tmp_path / "heads"))
    weights.pop("lm_head.weight")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"are missing.*lm_head"):
        QZoom.from_pretrained(str(tmp_path / "base"), heads=str(tmp_path / "heads"))
    assert "sharded" not in caplog.text


def without_one(weights):
    weights.pop("gate.head.bias")


def with_another(weights):
    weights["gate.tail.bias"] = torch.zeros(1)


def with_nan(weights):
    weights["proposal.q_proj.weight"][0, 0] = torch.nan


def with_other_shape(weights):
    weights["gate.head.weight"] = torch.zeros(1, 3)


WRONG = {
    "a tensor is missing": (without_one, "missing.*gate.head.bias"),
    "a tensor too many": (with_another, "unknown.*gate.tail.bias"),
    "NaN": (with_nan, "proposal.q_proj.weight.*not finite"),
    "another shape": (with_other_shape, "gate.head.weight.*(1, 64)"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_weights_are_named_and_nothing_is_loaded(case):
    spoil, message = WRONG[case]
    zoom = random_zoom("qwen2_5_vl")
    weights = {name: weight.detach() + 0.01 for name, weight in own_weights(zoom).items()}
    spoil(weights)
    before = {name: weight.detach().clone() for name, weight in own_weights(zoom).items()}
    with pytest.raises(ValueError, match=message):
        load_weights(zoom, weights, "heads")
    assert all(weight.equal(before[name]) for name, weight in own_weights(zoom).items())


SPOILT = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:2000]),
    "text": lambda path: path.write_text("not a tensor"),
    "absent": lambda path: path.unlink(),
}


@pytest.mark.parametrize("case", list(SPOILT))
def test_files_that_cannot_be_read_are_named(case, tmp_path):
    zoom = random_zoom("qwen2_5_vl")
    zoom.model.save_pretrained(tmp_path / "base")
    zoom.processor.save_pretrained(tmp_path / "base")
    zoom.save_pretrained(tmp_path / "heads")
    SPOILT[case](tmp_path / "heads" / HEADS_FILE)
    with pytest.raises(ValueError, match=HEADS_FILE):
        QZoom.from_pretrained(str(tmp_path / "base"), heads=str(tmp_path / "heads"))


def test_saving_leaves_other_files_alone(tmp_path, monkeypatch):
    zoom = random_zoom("qwen2_5_vl")
    zoom.save_pretrained(tmp_path / "heads")
    (tmp_path / "heads" / "mine.txt").write_text("mine")
    changed(zoom, 0.01).save_pretrained(tmp_path / "heads")
    assert sorted(path.name for path in (tmp_path / "heads").iterdir()) == ["mine.txt", "q_zoom.json", HEADS_FILE]
    saved = load_file(tmp_path / "heads" / HEADS_FILE)
    assert all(saved[name].equal(weight) for name, weight in own_weights(zoom).items())
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for folder in ("file", "", " "):
        with pytest.raises(ValueError, match=r"^folder is"):
            zoom.save_pretrained(folder)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "heads"]


def test_llavas_scores_are_the_official_formulas():
    """A norm of its own, the layer's norm, query and keys without rotation, mean over heads."""
    with safe_open(GOLDEN / "llava_rpn_score.safetensors", "pt") as file:
        settings = file.metadata()
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    hidden, expected = tensors["in.twig_hidden"], tensors["out.score_map"]
    width, heads = hidden.shape[-1], int(settings["num_heads"])
    config = LlamaConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rms_norm_eps=float(settings["rms_norm_eps"]),
    )
    last, norm = LlamaDecoderLayer(config, 0), LlamaRMSNorm(width, config.rms_norm_eps)
    weights = {name.split("twig_layers.2.")[-1]: value for name, value in tensors.items() if name.startswith("sd.")}
    norm.weight.data = weights.pop("sd.model.twig_norm.weight")
    assert not last.load_state_dict(weights, strict=False).unexpected_keys
    proposal = RegionProposal([last], rotary=False, norm=norm)
    start, cells = int(settings["image_token_start"]), expected[0].numel()
    image = torch.arange(start, start + cells).expand(len(hidden), -1)
    query = torch.full((len(hidden),), hidden.shape[1] - 1)
    rotary = (torch.ones(1, hidden.shape[1], width // heads),) * 2
    scores = proposal(hidden, rotary, image, query, mask=None)
    assert_close(scores.view(expected.shape), expected, atol=1e-5, rtol=1e-5)
