"""ViG and ViG-H against golden files made by running the official code in float64 (tests/golden/vig).

Parameters of the small models are drawn at unit gain, so that every branch shows in the logits. The official training
path, on which we run always, is the exact target. The official evaluation path of plain ViG halves the scan once more
before its norm; with a hook on the scan that does the same, its tensors are matched as exactly.
"""

import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

import kernels
import vision  # noqa: F401  registers the models
from kernels.backend import unavailable_reason
from vision import gated_linear_attention, patch_embedding
from vision.vig import ViG
from vision.vig_hierarchical import HierarchicalViG

GOLDEN = Path(__file__).parent.parent / "golden" / "vig"
SMALL = ("vig_sb_64x64", "vig_sb_96x80", "vig_t_64x64", "vig_t_80x48", "vig_h_64x64", "vig_h_80x48")
BACKENDS = [name for name in ("torch", "native") if unavailable_reason(name, "cpu") is None]
PRECISIONS = [  # backend, dtype, tolerance of outputs and (relative to the largest) of gradients
    pytest.param("reference", torch.float64, 1e-8, 1e-6, id="reference-f64"),
    *(pytest.param(name, torch.float64, 1e-8, 1e-6, id=f"{name}-f64") for name in BACKENDS),
    *(pytest.param(name, torch.float32, 2e-5, 1e-4, id=f"{name}-f32") for name in BACKENDS),
]
FULL = {
    "vig_t": "vig_tiny_patch16_224",
    "vig_s": "vig_small_patch16_224",
    "vig_b": "vig_base_patch16_224",
    "vig_h_t": "vig_h_tiny",
    "vig_h_s": "vig_h_small",
    "vig_h_b": "vig_h_base",
}


@cache
def read(name: str) -> tuple[dict[str, Tensor], dict]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["info"])  # noqa: SIM118


def small_model(tensors: dict[str, Tensor], info: dict, dtype: torch.dtype) -> nn.Module:
    given = info["kwargs"]
    if info["cls"] == "ViG":
        wanted = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
        activation = "silu" if given["use_act_in_conv"] else None
        model = ViG(**{name: given[name] for name in wanted}, activation=activation)
    else:
        model = HierarchicalViG(**{name: given[name] for name in ("dims", "depths", "num_heads", "num_classes")})
    weights = {name.removeprefix("sd."): value for name, value in tensors.items() if name.startswith("sd.")}
    model.load_state_dict(weights, strict=True)
    return model.to(dtype)


def take_official_evaluation_path(model: ViG) -> None:
    for block in model.blocks:
        block.attn.scan.register_forward_hook(lambda module, args, scanned: scanned / 2)


def channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def record(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Run the model and return what the golden files hold of the way there, in their layouts."""
    plain = isinstance(model, ViG)
    block = model.blocks[0] if plain else model.layers[0].blocks[0]
    seen = {}

    def keep(name: str, value: Tensor) -> None:
        seen[name] = value.flatten(1, 2) if plain else channels_first(value)

    hooks = [
        block.register_forward_pre_hook(lambda module, args: keep("block0_in", args[0])),
        block.register_forward_hook(lambda module, args, out: keep("block0", out)),
        (block.attn if plain else block.op).register_forward_hook(lambda module, args, out: keep("block0_attn", out)),
    ]
    maps, intermediates = model.forward_intermediates(images)
    for hook in hooks:
        hook.remove()
    seen["features"] = model.forward_head(maps, pre_logits=True)
    seen["output"] = model(images)
    if not plain:
        seen |= {f"stage{i}": stage for i, stage in enumerate(intermediates)}
    return seen


@pytest.mark.parametrize(("backend", "dtype", "tolerance", "_"), PRECISIONS)
@pytest.mark.parametrize("path", ["official training", "official evaluation"])
@pytest.mark.parametrize("name", SMALL)
def test_small_models(name, path, backend, dtype, tolerance, _):
    tensors, info = read(name)
    model = small_model(tensors, info, dtype).eval()
    if path == "official evaluation" and info["cls"] == "ViG":
        take_official_evaluation_path(model)
    with torch.no_grad(), kernels.use_backend(backend):
        seen = record(model, tensors["input"].to(dtype))
    plain = info["cls"] == "ViG"
    if path == "official training":
        expected = {"output": tensors["output_train"], "block0_in": tensors["block0_in"]}
        expected |= {"block0": tensors["block0_train"]} if plain else {}
    else:
        kept = ("block0_in", "block0_attn", "block0", "features", "output", *(f"stage{i}" for i in range(4)))
        expected = {key: tensors[key] for key in kept if key in tensors}
        assert len(expected) == (5 if plain else 9)
    for key, target in expected.items():
        torch.testing.assert_close(
            seen[key].double(), target, atol=tolerance, rtol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize(("backend", "dtype", "_", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", SMALL)
def test_small_model_gradients_in_eval_mode(name, backend, dtype, _, tolerance):
    tensors, info = read(name)
    model = small_model(tensors, info, dtype).eval()
    images = tensors["input"].to(dtype, copy=True).requires_grad_()
    with kernels.use_backend(backend):
        (model(images) * tensors["grad_output"].to(dtype)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()} | {"input": images.grad}
    expected = {key.removeprefix("grad."): value.double() for key, value in tensors.items() if key.startswith("grad.")}
    assert len(expected) >= 18
    for key, target in expected.items():
        worst = (gradients[key].double() - target).abs().max() / target.abs().max()
        assert worst <= tolerance, f"{key}: {worst:.1e} of the largest gradient"


def formula_tensor(name: str, shape: tuple[int, ...], salt: int) -> Tensor:
    """The full-size models' weights and input: splitmix64 noise seeded by the tensor's name, float32."""
    count = int(np.prod(shape))
    seed = np.uint64(zlib.crc32(name.encode()) << 32 | salt)
    with np.errstate(over="ignore"):
        z = seed + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    uniform = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    if name == "input":
        amplitude, centre = 3**0.5, 0.0
    elif name.endswith("gk_proj.1.bias"):
        amplitude, centre = 2.0, 1.0
    elif len(shape) == 1:
        amplitude, centre = 0.2, 0.0 if name.endswith(".bias") else 1.0
    elif name == "pos_embed":
        amplitude, centre = 0.5, 0.0
    else:
        amplitude, centre = (3 / np.prod(shape[1:])) ** 0.5, 0.0
    values = (centre + amplitude * (2 * uniform - 1)).astype(np.float32)
    return torch.from_numpy(values).reshape(shape)


@pytest.mark.parametrize(
    ("variant", "dtype", "tolerance"),
    [(variant, torch.float32, 2e-5) for variant in FULL]
    + [("vig_t", torch.float64, 1e-8), ("vig_h_t", torch.float64, 1e-8)],
)
def test_full_size(variant, dtype, tolerance):
    tensors, info = read(f"full_{variant}_224x224")
    with torch.device("meta"):
        model = timm.create_model(FULL[variant])
    assert sum(p.numel() for p in model.parameters()) == info["params"]
    weights = {key: formula_tensor(key, tuple(value.shape), info["salt"]) for key, value in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model = model.eval().to(dtype)
    if isinstance(model, ViG):
        take_official_evaluation_path(model)
    images = formula_tensor("input", (1, 3, 224, 224), info["salt"]).to(dtype)
    with torch.inference_mode():
        maps, intermediates = model.forward_intermediates(images)
        seen = {"output": model.forward_head(maps)}
        if variant.startswith("vig_h"):
            seen |= {f"stage{i}_mean": stage.mean((2, 3)) for i, stage in enumerate(intermediates)}
        else:
            seen |= {
                "block0_mean": intermediates[0].mean((2, 3)),
                "features": model.forward_head(maps, pre_logits=True),
            }
    for key, value in seen.items():
        torch.testing.assert_close(
            value.double(), tensors[key], atol=tolerance, rtol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["vig_t_64x64", "vig_h_64x64"])
def test_large_maps_train_alike(name, autocast, monkeypatch):
    """What a training step on a large map computes again, here on a small one."""
    tensors, info = read(name)
    results = []
    for recompute_from in (10**9, 1):
        for module in (gated_linear_attention, patch_embedding):
            monkeypatch.setattr(module, "RECOMPUTE_FROM", recompute_from)
        model = small_model(tensors, info, torch.float32).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(tensors["input"].float())
        results.append([logits, *torch.autograd.grad(logits.float().square().sum(), list(model.parameters()))])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize("name", SMALL)
def test_training_mode_computes_the_same(name):
    tensors, info = read(name)
    model = small_model(tensors, info, torch.float32)
    assert torch.equal(model.train()(tensors["input"]), model.eval()(tensors["input"]))


@pytest.mark.parametrize("name", [name for name in SMALL if "_h_" not in name])
def test_official_evaluation_path_hardly_differs(name):
    tensors, info = read(name)
    with torch.no_grad():
        output = small_model(tensors, info, torch.float64).eval()(tensors["input"].double())
    torch.testing.assert_close(output, tensors["output"], atol=5e-5, rtol=0)


def test_state_dicts_are_the_official_ones():
    shapes = json.loads((GOLDEN / "state_dict_shapes.json").read_text())
    assert set(shapes) == set(FULL)
    for variant, expected in shapes.items():
        model = timm.create_model(FULL[variant], device="meta")
        found = [(key, list(value.shape)) for key, value in model.state_dict().items()]
        assert found == list(expected.items()), variant
