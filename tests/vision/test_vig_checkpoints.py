"""Weights in and out: official and wrapped checkpoints, verified downloads, timm's and transformers' round trips."""

import hashlib
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import load_checkpoint, save_for_hf
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

import vision  # noqa: F401  registers the models
from vision.vig import checkpoint_filter_fn

PLAIN = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
HIERARCHICAL = {"dims": (16, 32, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "num_classes": 10}
SMALL = {"plain": ("vig_tiny_patch16_224", PLAIN), "hierarchical": ("vig_h_tiny", HIERARCHICAL)}
PUBLISHED = {
    "vig_tiny_patch16_224": ("vig_t_77p2acc.pth", "a1eb2901db2331df033d3d6f8f20fb6d0561287f4972d98fc293c746cc70bfbb"),
    "vig_small_patch16_224": ("vig_s_81p7acc.pth", "ad1c62e85af5f527fbbb193077ab3192ed8f77c76631a91599e87fdae9dee0e6"),
    "vig_base_patch16_224": ("vig_b_82p6acc.pth", "0a681ccacf5c012a6a432a39e9ad773fae053ac863696c42bb261e300af9f158"),
    "vig_h_tiny": ("vig_h_t_82p8acc.pth", "287d1b6e742edf4b6dc6a36010ad09c27e52c5c140369ffc36230b4b335c5e68"),
    "vig_h_small": ("vig_h_s_83p8acc.pth", "0d52501e8d6097177ba47520cc15052d694b82ecb7b7ffffab59a11dc40bbb4a"),
    "vig_h_base": ("vig_h_b_84p2acc.pth", "49acb31474ba5cf616414739c9410721f8e7f77b5b20ac57b84e16f28682a263"),
}


@pytest.fixture(params=SMALL)
def family(request) -> str:
    return request.param


def create(family: str, seed: int = 0, **kwargs) -> nn.Module:
    name, args = SMALL[family]
    torch.manual_seed(seed)
    return timm.create_model(name, **{**args, **kwargs}).eval()


def assert_same_weights(model: nn.Module, expected: nn.Module, but: tuple[str, ...] = ()) -> None:
    found = model.state_dict()
    for name, value in expected.state_dict().items():
        if not name.startswith(but):
            assert torch.equal(found[name], value), name


def as_legacy_name(name: str) -> str:
    """What early ViG-H checkpoints called the parameter."""
    for new, old in (("patch_embed.0", "patch_embed.proj"), ("patch_embed.2", "patch_embed.norm")):
        name = re.sub(rf"^{re.escape(new)}\.", f"{old}.", name)
    name = re.sub(r"^(layers\.\d+\.blocks\.\d+)\.norm\.", r"\1.ln_1.", name)
    name = re.sub(r"^(layers\.\d+\.blocks\.\d+)\.op\.", r"\1.self_attention.", name)
    return re.sub(r"^classifier\.", "", name)


WRAPPINGS = {
    "bare": lambda weights, other: weights,
    "model": lambda weights, other: {"model": weights, "epoch": 3},
    "state_dict": lambda weights, other: {"state_dict": weights},
    "averaged": lambda weights, other: {"model": other, "model_ema": weights},
    "data-parallel": lambda weights, other: {"model": {f"module.{k}": v for k, v in weights.items()}},
    "compiled": lambda weights, other: {"model": {f"module._orig_mod.{k}": v for k, v in weights.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_checkpoints(family, wrapping, tmp_path):
    source, other = create(family), create(family, seed=1)
    wrapped = WRAPPINGS[wrapping](source.state_dict(), other.state_dict())
    model = create(family, seed=2)
    model.load_state_dict(checkpoint_filter_fn(wrapped, model), strict=True)
    assert_same_weights(model, source)

    torch.save(wrapped, tmp_path / "checkpoint.pth")
    model = create(family, seed=2)
    load_checkpoint(model, str(tmp_path / "checkpoint.pth"), filter_fn=checkpoint_filter_fn)
    assert_same_weights(model, source)


def test_legacy_hierarchical_names_and_1x1_convolutions():
    source, model = create("hierarchical"), create("hierarchical", seed=1)
    legacy = {}
    for name, value in source.state_dict().items():
        projection = name.startswith("layers") and value.ndim == 2
        legacy[as_legacy_name(name)] = value[:, :, None, None] if projection else value
    assert "layers.0.blocks.0.self_attention.qkv_proj.weight" in legacy
    assert legacy["layers.0.blocks.0.self_attention.qkv_proj.weight"].ndim == 4
    assert {"norm.weight", "head.weight", "patch_embed.proj.weight"} <= set(legacy)
    model.load_state_dict(checkpoint_filter_fn({"model": legacy}, model), strict=True)
    assert_same_weights(model, source)


def test_position_embedding_takes_the_models_grid():
    source, model = create("plain"), create("plain", seed=1, img_size=(96, 80))
    model.load_state_dict(checkpoint_filter_fn(source.state_dict(), model), strict=True)
    images = torch.randn(1, 3, 96, 80)
    torch.testing.assert_close(model(images), source(images))
    with pytest.raises(ValueError, match="pos_embed has 30 tokens"):
        checkpoint_filter_fn(model.state_dict(), source)


def pretrained_cfg(family: str, **kwargs) -> dict:
    cfg = timm.get_pretrained_cfg(SMALL[family][0]).to_dict(remove_source=True)
    return {**cfg, "num_classes": 10, "notes": (), **kwargs}


def test_other_classes_and_channels_keep_the_backbone(family, tmp_path):
    source = create(family)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    cfg = pretrained_cfg(family, file=str(tmp_path / "weights.pth"))
    assert_same_weights(create(family, seed=1, pretrained=True, pretrained_cfg=cfg), source)
    head, stem = cfg["classifier"], cfg["first_conv"]
    model = create(family, seed=1, pretrained=True, pretrained_cfg=cfg, num_classes=4, in_chans=1)
    assert_same_weights(model, source, but=(head, stem + ".weight"))
    grey = source.get_submodule(stem).weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.get_submodule(stem).weight, grey)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 4)
    features = create(family, seed=1, pretrained=True, pretrained_cfg=cfg, features_only=True, out_indices=(0, 1))
    assert len(features(torch.randn(1, 3, 64, 64))) == 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_recorded(name):
    file, sha256 = PUBLISHED[name]
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.url == f"https://huggingface.co/hustvl/ViG/resolve/main/{file}"
    assert cfg.notes == (f"sha256:{sha256}",)
    assert cfg.tag == "in1k"


def test_downloads_are_verified(tmp_path):
    source = create("plain")
    file = tmp_path / "published.pth"
    torch.save({"model": source.state_dict()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    cache = tmp_path / "cache"

    def load(digest: str) -> nn.Module:
        cfg = pretrained_cfg("plain", url=file.as_uri(), notes=(f"sha256:{digest}",))
        return create("plain", seed=1, pretrained=True, pretrained_cfg=cfg, cache_dir=str(cache))

    with pytest.raises(RuntimeError, match="invalid hash value"):
        load("0" * 64)
    assert not list(cache.iterdir())
    assert_same_weights(load(digest), source)
    file.unlink()
    assert_same_weights(load(digest), source)  # from the cache
    (cache / "published.pth").write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match=f"{digest}; delete the file"):
        load(digest)


def test_missing_shipped_file_is_named(tmp_path):
    overlay = {"file": str(tmp_path / "absent.safetensors")}
    with pytest.raises(FileNotFoundError, match=r"vig_nano_patch4_28.mnist5k are missing: .*absent.safetensors"):
        timm.create_model("vig_nano_patch4_28.mnist5k", pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize(("tag", "channels", "classes"), [("mnist5k", 1, 10), ("openmoji", 3, 9)])
def test_nano_tags_load_their_file(tag, channels, classes, tmp_path):
    name = f"vig_nano_patch4_28.{tag}"
    source = timm.create_model(name)
    assert source(torch.randn(1, channels, 28, 28)).shape == (1, classes)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors")}
    assert_same_weights(timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay), source)


def test_local_folder_round_trip(family, tmp_path):
    model = create(family)
    save_for_hf(model, tmp_path, model_args=SMALL[family][1])
    reloaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(reloaded(images), model(images))


def test_transformers_wrapper_round_trip(family, tmp_path):
    name, args = SMALL[family]
    config = TimmWrapperConfig(
        architecture=name, model_args={k: v for k, v in args.items() if k != "num_classes"}, num_labels=10
    )
    model = TimmWrapperForImageClassification(config).eval()
    images = torch.randn(1, 3, 64, 64)
    output = model(images, labels=torch.tensor([1]))
    assert output.logits.shape == (1, 10)
    assert output.loss.isfinite()
    model.save_pretrained(tmp_path)
    reloaded = TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(reloaded(images).logits, output.logits)
