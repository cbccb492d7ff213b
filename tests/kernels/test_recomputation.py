"""A linear layer of a recomputed value: the plain expression's values and gradients, and less kept."""

import pytest
import torch
from torch import nn

from kernels.fused_layers import swiglu
from kernels.recomputation import linear_of


def outputs_and_gradients(expression, tensors, modules):
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = expression(*leaves)
    torch.manual_seed(1)
    wanted = [*leaves, *[p for module in modules for p in module.parameters()]]
    return [output.detach(), *torch.autograd.grad(output, wanted, torch.randn(output.shape).to(output.dtype))]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_function_of_tensors(bias, autocast):
    linear = nn.Linear(8, 5, bias=bias)
    x = torch.randn(2, 3, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = outputs_and_gradients(lambda x: linear_of(swiglu, (x,), linear), [x], [linear])
        expected = outputs_and_gradients(lambda x: linear(swiglu(x)), [x], [linear])
    tolerance = 2e-2 if autocast else 1e-5
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def test_module_with_parameters():
    norm, linear = nn.LayerNorm(8), nn.Linear(8, 5)
    x = torch.randn(4, 8)
    actual = outputs_and_gradients(lambda x: linear_of(norm, (x,), linear), [x], [norm, linear])
    expected = outputs_and_gradients(lambda x: linear(norm(x)), [x], [norm, linear])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


def test_frozen_tensors_and_weights_get_no_gradient():
    linear = nn.Linear(8, 5)
    linear.weight.requires_grad_(False)
    x = torch.randn(4, 16)
    linear_of(swiglu, (x,), linear).sum().backward()
    assert x.grad is None
    assert linear.weight.grad is None
    torch.testing.assert_close(linear.bias.grad, torch.full((5,), 4.0))


def test_the_result_is_not_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear_of(swiglu, (torch.randn(4, 16, requires_grad=True),), nn.Linear(8, 5))
    assert (4, 16) in kept
    assert (4, 8) not in kept


def test_hooks_and_other_layers_see_the_plain_expression():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = Doubled(8, 5)
    x = torch.randn(4, 16, requires_grad=True)
    torch.testing.assert_close(linear_of(swiglu, (x,), layer), layer(swiglu(x)))
    watched, seen = nn.Linear(8, 5), []
    watched.register_forward_hook(lambda module, args, output: seen.append(output))
    linear_of(swiglu, (x,), watched)
    assert len(seen) == 1
