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
from kernels.full_retention import full_retention
from tests.vision.small_models import RETENTION, create
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


@pytest.mark.parametrize(
    "prepare",
    [
        lambda: create("rmt", features_only=True, out_indices=(0, 1)),
        lambda: create("rmt", **TWO_STAGES),
        lambda: frozen_statistics(create("rmt")),
    ],
    ids=["first-stages", "two-stages", "frozen-statistics"],
)
def test_one_pixel_is_taken_where_no_statistics_are_of_it(prepare):
    model = prepare()
    outputs = model(torch.randn(1, 3, 32, 32))
    assert all(output.isfinite().all() for output in outputs)


TWO_STAGES = {
    "embed_dims": (16, 32),
    "depths": (1, 1),
    "num_heads": (1, 2),
    "mlp_ratios": (2, 2),
    "init_values": (2, 2),
    "heads_ranges": (4, 4),
    "layerscales": (False, False),
    "chunkwise_recurrents": (True, False),
}


def frozen_statistics(model: nn.Module) -> nn.Module:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def test_deeper_pyramids_are_guarded_too():
    five = {name: (*values, values[-1]) for name, values in RETENTION.items() if isinstance(values, tuple)}
    five |= {name: (2,) * 5 for name in ("init_values", "heads_ranges", "mlp_ratios")}
    model = create("rmt", **five, layerscales=(False,) * 5, chunkwise_recurrents=(True,) * 5).train()
    with pytest.raises(ValueError, match="images larger than 64 pixels"):
        model(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["rmt_small", "rmt_base"])
def test_gated_models_of_equal_depths_lack_only_the_gates(name):
    rmt = timm.create_model(name, device="meta")
    depths = [len(stage.blocks) for stage in rmt.layers]
    gated = timm.create_model(name.replace("rmt", "gated_swin_rmt") + "_retention", depths=depths, device="meta")
    assert {key for key in gated.state_dict() if ".g_proj." not in key} == set(rmt.state_dict())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=str)
def test_full_retention_is_the_formula(dtype, tolerance):
    query, key, value = (torch.randn(2, 5, 4, 3, 8).to(dtype) for _ in range(3))
    log_decay = (-0.3, -0.1, -0.01)
    output = full_retention(query, key, value, log_decay)
    assert output.dtype == dtype
    q, k, v = (x.double().flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    angle = torch.arange(20, dtype=torch.float64)[:, None] * 10000.0 ** -torch.linspace(0, 1, 4, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)
    q, k = (torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2) for x in (q, k))
    rows, columns = torch.arange(20) // 4, torch.arange(20) % 4
    steps = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()
    bias = torch.tensor(log_decay, dtype=torch.float64)[:, None, None] * steps
    expected = ((q @ k.transpose(-1, -2) * 8**-0.5 + bias).softmax(-1) @ v).transpose(1, 2).unflatten(1, (5, 4))
    assert (output.double() - expected).abs().max() < tolerance * expected.abs().max()


def test_full_retention_needs_a_decay_a_head():
    with pytest.raises(ValueError, match="log_decay has 2 entries; query has 3 heads"):
        full_retention(*torch.randn(3, 1, 2, 2, 3, 8), (-0.1, -0.2))
