"""`fuse()` merges projections for inference and keeps the numbers."""

import pytest
import torch
from torch import nn

from kernels.packed_linear import PackedLinear
from tests.vision.small_models import create, draw_unit_gain

MODELS = {
    "vig": ("vig", {}),
    "vig-without-activation": ("vig", {"activation": None}),
    "vig_h": ("vig_h", {}),
    "rmt": ("rmt", {}),
    "retention": ("retention", {}),
    "retention-headwise": ("retention", {"gate": "headwise"}),
    "retention-of-residual": ("retention", {"gate_source": "residual", "downsample": "merge"}),
    "swat": ("swat", {}),
    "swat-ungated": ("swat", {"value_gate": False}),
}


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    family, args = MODELS[request.param]
    return draw_unit_gain(create(family, num_classes=10, **args)).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=["f32", "f64"])
def test_numbers_stay(model, dtype, tolerance):
    model.to(dtype)
    images = torch.randn(2, 3, 96, 80, dtype=dtype)
    with torch.no_grad():
        expected = model(images)
        assert model.fuse() is model
        output = model(images)
        again = model.fuse()(images)
    assert (output - expected).abs().max() <= tolerance * expected.abs().max()
    assert torch.equal(again, output)


def test_one_product_takes_the_place_of_several(model):
    def projections() -> int:
        return sum(isinstance(module, nn.Linear | PackedLinear) for module in model.modules())

    merged = sum(2 for name, _ in model.named_modules() if name.endswith("qkv_proj"))
    merged += sum(len(module.projections) - 1 for module in model.modules() if hasattr(module, "projections"))
    before = projections()
    model.fuse()
    assert merged > 0
    assert projections() == before - merged
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_fused_model_is_for_inference(model):
    model.train()
    model.fuse()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.eval()
    with pytest.raises(RuntimeError, match="fused for inference"):
        model.train()
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    model(images).sum().backward()
    assert images.grad.abs().sum() > 0
