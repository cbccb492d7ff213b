"""Official checkpoints of Switch-NeRF: both layouts of the experts, the background, and what is refused."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from generation.radiance_field.switch_nerf import BackgroundField, SwitchNeRFField
from generation.radiance_field.switch_nerf_checkpoints import BACKGROUND_NAMES, FOREGROUND_NAMES, from_official

SIZES = {
    "width": 16, "experts": 3, "expert_layers": 4, "skips": (1,), "position_octaves": 3, "direction_octaves": 2,
    "appearances": 5, "appearance_features": 6, "colour_width": 10,
}  # fmt: skip
OPTIONS = {"skips": (1,), "direction_octaves": 2}


def foreground() -> SwitchNeRFField:
    torch.manual_seed(0)
    return SwitchNeRFField(**SIZES).eval()


def background() -> BackgroundField:
    torch.manual_seed(1)
    return BackgroundField(
        width=12, layers=5, skips=(2,), position_octaves=3, direction_octaves=2, appearances=5, appearance_features=6
    ).eval()


def theirs(name: str, names: dict[str, str]) -> str:
    owner, _, last = name.rpartition(".")
    return f"{next(key for key, ours in names.items() if ours == owner)}.{last}"


def foreground_state(field: SwitchNeRFField, form: str) -> dict[str, Tensor]:
    state = {}
    for name, value in field.state_dict().items():
        match = re.fullmatch(r"experts\.(weights|biases)\.(\d+)", name)
        if name == "space.box":
            continue
        if match is None:
            state[theirs(name, FOREGROUND_NAMES)] = value
        elif form == "training":
            bias = match[1] == "biases"
            state[f"layers.0.experts.0.{'bias' if bias else 'weights'}.{match[2]}"] = value[:, None] if bias else value
        else:
            for e, of_expert in enumerate(value):
                what, transposed = ("bias", of_expert) if match[1] == "biases" else ("weight", of_expert.t())
                state[f"layers.0.experts.0.experts.{e}.layers.{match[2]}.{what}"] = transposed
    return state


def background_state(field: BackgroundField) -> dict[str, Tensor]:
    state = {}
    for name, value in field.state_dict().items():
        match = re.fullmatch(r"position\.(\d+)\.(\w+)", name)
        state[f"xyz_encodings.{match[1]}.0.{match[2]}" if match else theirs(name, BACKGROUND_NAMES)] = value
    return state


def checkpoint(form: str = "training", prefix: str = "module.") -> dict:
    return {
        "model_state_dict": {prefix + name: value for name, value in foreground_state(foreground(), form).items()},
        "bg_model_state_dict": {prefix + name: value for name, value in background_state(background()).items()},
        "iteration": 500000,
    }


def same(one: nn.Module, other: nn.Module) -> None:
    states = one.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    for name in states[0]:
        assert_close(states[0][name], states[1][name], atol=0, rtol=0)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("form", ["training", "evaluation"])
def test_both_forms(form, prefix):
    loaded = from_official(checkpoint(form, prefix), **OPTIONS)
    same(loaded.foreground, foreground())
    same(loaded.background, background())
    assert not loaded.foreground.training
    points, directions = torch.randn(20, 3), nn.functional.normalize(torch.randn(20, 3), dim=1)
    assert_close(loaded.foreground(points, directions, 2).colour, foreground()(points, directions, 2).colour)


def test_file_and_bare_state_dict(tmp_path):
    path = tmp_path / "500000.pt"
    torch.save(checkpoint(), path)
    same(SwitchNeRFField.from_official(path, **OPTIONS), foreground())
    loaded = from_official(foreground_state(foreground(), "evaluation"), **OPTIONS)
    same(loaded.foreground, foreground())
    assert loaded.background is None


def test_official_sizes():
    """3.95 million parameters, as the shapes of the authors' 8 experts and 100 pictures give."""
    field = SwitchNeRFField(appearances=100)
    counts = {
        "space": 0, "position": 75 * 256 + 256, "gate": 2 * (256 * 256 + 256) + 2 * 256 + 256 * 8,
        "experts": 8 * 7 * (256 * 256 + 256), "raw_density": 257, "features": 256 * 256 + 256,
        "colour": 331 * 128 + 128 + 128 * 3 + 3, "appearance": 100 * 48,
    }  # fmt: skip
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in field.named_children()} == counts
    assert sum(counts.values()) == 3_951_684
    state = foreground_state(field, "training")
    assert state["layers.0.experts.0.weights.6"].shape == (8, 256, 256)
    assert state["layers.0.experts.0.bias.6"].shape == (8, 1, 256)
    assert state["layers.2.fcs.0.weight"].shape == (128, 331)
    same(from_official(state).foreground, field)


def changed(name: str, value: Tensor | None, form: str = "training", model: str = "model_state_dict") -> dict:
    content = checkpoint(form, "")
    if value is None:
        del content[model][name]
    else:
        content[model][name] = value
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nowhere.pt", "no such file"),
        ({"iteration": 3}, "no state dict"),
        ({"weight": torch.zeros(3)}, "not one of Switch-NeRF"),
        (changed("layers.sigma.fcs.0.weight", None), "missing .'raw_density.weight'"),
        (changed("layers.9.weight", torch.zeros(3)), "unexpected .'layers.9.weight'"),
        (changed("layers.1.fcs.0.weight", torch.zeros(16, 15)), r"features.weight is \(16, 15\)"),
        (changed("layers.xyz.fcs.0.weight", torch.zeros(16, 20)), "takes 20 numbers"),
        (changed("layers.0.experts.0.bias.1", torch.zeros(3, 16)), r"bias.1 is \(3, 16\)"),
        (changed("layers.0.experts.0.experts.1.layers.2.weight", None, "evaluation"), "all experts must have them"),
        (changed("layers.0.experts.0.weights.0", torch.zeros(16, 16)), "must have 3 dims"),
        (changed("rgb.weight", None, model="bg_model_state_dict"), "missing .'colour.1.weight'"),
        (checkpoint() | {"bg_model_state_dict": 3}, "bg_model_state_dict"),
    ],
)
def test_what_is_refused(content, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        from_official(tmp_path / content if isinstance(content, str) else content, **OPTIONS)


def test_unreadable_files(tmp_path):
    (tmp_path / "torn.pt").write_bytes(b"PK not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model_state_dict": SIZES | {"field": BackgroundField}}, tmp_path / "code.pt")
    for name in ("torn.pt", "list.pt", "code.pt"):
        with pytest.raises(ValueError, match=name):
            from_official(tmp_path / name)


def test_skips_beyond_the_experts():
    with pytest.raises(ValueError, match=r"skips hold \[7\]"):
        from_official(checkpoint(), skips=(7,))
