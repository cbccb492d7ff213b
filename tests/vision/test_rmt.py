"""RMT against the tensors of its authors' code, their parameter counts and their checkpoints."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

import vision  # noqa: F401  registers the models
from tests.vision.small_models import create
from vision.rmt import checkpoint_filter_fn

GOLDEN = Path(__file__).parents[1] / "golden" / "rmt"
LAYOUTS = json.loads((GOLDEN / "rmt_key_layouts.json").read_text())
OFFICIAL = {"rmt_tiny": "RMT_T", "rmt_small": "RMT_S", "rmt_base": "RMT_B", "rmt_large": "RMT_L"}
TOLERANCE = 5e-5  # of every activation: the authors' float32 is 4e-6 from their float64


class Golden:
    """One file: its tensors, and the model that its configuration and state dict make."""

    def __init__(self, name: str, **kwargs):
        with safe_open(GOLDEN / f"rmt_{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no dict
            settings = json.loads(file.metadata()["config"])
        self.weights = {key[3:]: value for key, value in self.tensors.items() if key.startswith("sd.")}
        self.model = timm.create_model("rmt_tiny", **{**settings, **kwargs}).eval()
        self.model.load_state_dict(checkpoint_filter_fn(self.weights, self.model), strict=True)

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]


@pytest.fixture(params=["decomposed", "full", "mixed_layerscale"])
def golden(request) -> Golden:
    return Golden(request.param)


def test_every_activation(golden):
    model, seen = golden.model, {}

    def keep(name: str, module: nn.Module, argument: bool = False) -> None:
        def hook(module, arguments, output):
            seen[name] = output
            if argument:
                seen[name.replace("output", "input")] = arguments[0]

        module.register_forward_hook(hook)

    block = model.layers[0].blocks[0]
    keep("stem_output", model.patch_embed)
    keep("block0_output", block, argument=True)
    keep("retention0_output", block.retention, argument=True)
    keep("ffn0_output", block.ffn)
    with torch.no_grad():
        x = model.patch_embed(golden["input"])
        for i, stage in enumerate(model.layers):
            x = stage(x)
            seen[f"layer{i}_output"] = x
        features = model.project(x)
        seen["features"] = model.forward_head(features, pre_logits=True)
        seen["output"] = model(golden["input"])
    assert len(seen) == 12
    for name, value in seen.items():
        torch.testing.assert_close(value, golden[name], atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients(golden):
    names = [key.removeprefix("grad.") for key in golden.tensors if key.startswith("grad.")]
    parameters = dict(golden.model.named_parameters())
    images = golden["input"].requires_grad_()
    loss = (golden.model(images) * golden["loss_weight"]).sum()
    gradients = torch.autograd.grad(loss, [images, *(parameters[name] for name in names)])
    expected = [golden["grad_input"], *(golden[f"grad.{name}"] for name in names)]
    assert len(expected) == 5
    for gradient, target in zip(gradients, expected, strict=True):
        assert (gradient - target).abs().max() < 1e-3 * target.abs().max()


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_names_shapes_and_decays(name):
    layout = LAYOUTS[OFFICIAL[name]]
    model = timm.create_model(name, device="meta")
    own = {key: list(value.shape) for key, value in model.state_dict().items()}
    official = {key: shape for key, shape in layout["state_dict"].items() if ".Relpos." not in key}
    assert own == official
    assert sum(parameter.numel() for parameter in model.parameters()) == layout["params"]
    for stage, decays in layout["decay"].items():
        own_decays = model.layers[int(stage)].blocks[0].retention.core.log_decay
        assert own_decays == pytest.approx(decays, rel=2e-5)


@pytest.mark.parametrize(
    ("key", "change"),
    [("layers.1.Relpos.decay", 0.5), ("layers.0.Relpos.angle", 1.001)],
    ids=["other-decay", "other-angle"],
)
def test_constants_of_another_model_are_refused(key, change):
    golden = Golden("decomposed")
    golden.weights[key] = golden.weights[key] * change
    with pytest.raises(ValueError, match=rf"{key} of the checkpoint is \["):
        checkpoint_filter_fn(golden.weights, golden.model)


def test_token_labelling_head_is_refused():
    golden = Golden("full")
    with pytest.raises(ValueError, match=r"holds aux_head\.weight"):
        checkpoint_filter_fn({**golden.weights, "aux_head.weight": torch.zeros(10, 64)}, golden.model)


def test_a_file_of_the_authors_loads_through_timm(tmp_path):
    """Their files hold the averaged model, and pickle the run's settings as a Namespace."""
    golden = Golden("full")
    other = {key: torch.zeros_like(value) for key, value in golden.weights.items()}
    saved = {"model": other, "model_ema": golden.weights, "epoch": 3, "args": Namespace(lr=1e-3, data="imagenet")}
    torch.save(saved, tmp_path / "rmt.pth")
    with safe_open(GOLDEN / "rmt_full.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["config"])
    cfg = timm.get_pretrained_cfg("rmt_tiny").to_dict() | {"file": str(tmp_path / "rmt.pth"), "num_classes": 10}
    model = timm.create_model("rmt_tiny", pretrained=True, pretrained_cfg=cfg, **settings).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(golden["input"]), golden["output"], atol=TOLERANCE, rtol=0)


def test_no_weights_are_promised():
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("rmt_tiny", pretrained=True)


@pytest.mark.parametrize("size", [(1, 1), (33, 70), (224, 32)], ids=str)
def test_any_image_size(size):
    model = create("rmt").eval()
    with torch.no_grad():
        assert model.forward_features(torch.randn(1, 3, *size)).shape[1:3] == tuple(-(-side // 32) for side in size)


def test_one_pixel_of_batch_statistics_is_refused_in_words():
    model = create("rmt").train()
    with pytest.raises(ValueError, match=r"shape \(1, 3, 32, 32\): the last map would be one pixel"):
        model(torch.randn(1, 3, 32, 32))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 1000)
    assert model(torch.randn(1, 3, 32, 33)).shape == (1, 1000)
