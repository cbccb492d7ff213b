"""`fuse()` merges projections for inference and keeps the numbers."""

import pytest
import timm
import torch
from torch import nn

import vision  # noqa: F401  registers the models
from kernels.packed_linear import PackedLinear

SMALL = {
    "plain": ("vig_small_patch16_224", {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2}),
    "plain-silu": ("vig_tiny_patch16_224", {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2}),
    "hierarchical": ("vig_h_tiny", {"dims": (16, 32, 32, 32), "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 2)}),
}


@pytest.fixture(params=SMALL)
def model(request) -> nn.Module:
    torch.manual_seed(0)
    name, args = SMALL[request.param]
    model = timm.create_model(name, num_classes=10, **args)
    for parameter in model.parameters():  # unit gain, biases and norms not trivial
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


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


def test_one_product_takes_the_place_of_three(model):
    def projections() -> int:
        return sum(isinstance(module, nn.Linear | PackedLinear) for module in model.modules())

    mixers = sum(name.endswith("qkv_proj") for name, _ in model.named_modules())
    before = projections()
    model.fuse()
    assert projections() == before - 2 * mixers


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
