"""The packed linear layer against `nn.Linear`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels.packed_linear import PackedLinear, activated_linear, can_pack, is_plain, packed_twin


@pytest.fixture
def linear():
    return nn.Linear(19, 33)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(1, 19), (65, 19), (2, 7, 19), (2, 3, 5, 19)], ids=str)
def test_equals_linear(shape, bias):
    linear = nn.Linear(19, 33, bias=bias)
    x = torch.randn(shape)
    assert can_pack(linear)
    torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-6)


def test_strided_input(linear):
    x = torch.randn(4, 6, 40)[..., 5:24]
    torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-6)


def test_autocast_multiplies_in_bfloat16(linear):
    x = torch.randn(8, 19)
    packed = PackedLinear(linear)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = packed(x), linear(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(packed(x), linear(x).detach(), rtol=1e-5, atol=1e-6)


def test_new_weights_are_packed_again(linear):
    x = torch.randn(3, 19)
    packed = PackedLinear(linear)
    before = packed(x)
    with torch.no_grad():
        packed.weight.mul_(2.0)
        packed.bias.mul_(2)
    torch.testing.assert_close(packed(x), 2 * before, rtol=1e-5, atol=1e-5)
    rounded = packed.bfloat16().float()
    expected = nn.functional.linear(x, rounded.weight, rounded.bias)
    torch.testing.assert_close(rounded(x), expected, rtol=1e-5, atol=1e-5)


def test_made_and_used_in_inference_mode():
    with torch.inference_mode():
        linear = nn.Linear(19, 33)
        x = torch.randn(3, 19)
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-5)


def test_float64_is_not_rounded_by_autocast(linear):
    packed = PackedLinear(linear.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed(torch.randn(3, 19, dtype=torch.float64)).dtype == torch.float64


def test_gradients_of_the_input(linear):
    x = torch.randn(3, 19, requires_grad=True)
    PackedLinear(linear)(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.detach().sum(0).expand(3, 19))


def test_copies_and_state_dicts_are_ordinary(linear):
    packed = PackedLinear(linear)
    x = torch.randn(3, 19)
    expected = packed(x)
    torch.testing.assert_close(copy.deepcopy(packed)(x), expected)
    assert list(packed.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(packed.double()(x.double()).float(), expected, rtol=1e-5, atol=1e-6)


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 48), nn.LayerNorm(48), nn.Linear(48, 8))


def test_twin_computes_the_same_and_leaves_the_module_alone():
    module, x = two_layers(), torch.randn(5, 24)
    with torch.no_grad():
        twin = packed_twin(module)
        torch.testing.assert_close(twin(x), module(x), rtol=1e-5, atol=1e-6)
    assert [type(child) for child in module] == [nn.Linear, nn.LayerNorm, nn.Linear]
    assert type(twin[0]) is PackedLinear
    assert twin[1] is module[1]
    module(x).sum().backward()
    assert module[0].weight.grad is not None


def test_twin_of_what_cannot_be_packed_is_the_module():
    module = two_layers().double()
    assert packed_twin(module) is module


def replace_forward(layer: nn.Linear) -> None:
    """On the instance, as accelerate does it."""
    layer.forward = lambda x: 3 * F.linear(x, layer.weight, layer.bias)


INTERFERENCES = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda module, inputs, output: 3 * output),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],)),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda module, inputs, outputs: None),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda module, outputs: None),
    "forward of its own": replace_forward,
}


@pytest.mark.parametrize("interfere", INTERFERENCES.values(), ids=INTERFERENCES)
def test_twin_leaves_layers_that_are_not_plain_unpacked(interfere):
    module, x = two_layers(), torch.randn(5, 24)
    assert is_plain(module[2])
    interfere(module[2])
    assert not is_plain(module[2])
    with torch.no_grad():
        twin = packed_twin(module)
        torch.testing.assert_close(twin(x), module(x), rtol=1e-5, atol=1e-6)
    assert type(twin[0]) is PackedLinear
    assert twin[2] is module[2]


@pytest.mark.parametrize("activation", [F.gelu, F.silu, torch.tanh])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_activated_linear(packed, activation):
    linear, x = nn.Linear(24, 48), torch.randn(5, 24)
    layer = PackedLinear(linear) if packed else linear
    with torch.no_grad():
        torch.testing.assert_close(activated_linear(layer, x, activation), activation(linear(x)), rtol=1e-5, atol=1e-6)
