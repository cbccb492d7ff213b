"""Spiking neurons' Triton kernels in their interpreter: the authors' spikes, sizes, options, strides, their limits."""

import pytest
import torch

pytest.importorskip("triton")

from kernels.spiking_neuron import spiking_neuron
from tests.kernels.test_spiking_neuron import (
    GOLDEN,
    GOLDEN_CASES,
    VIEWS,
    check,
    check_gradients_of_one_output,
    check_infinite_currents,
    currents_of_random_strides,
    each_golden_case,
    each_option,
    each_output,
    inputs,
    results,
)


@each_golden_case
def test_spikes_of_the_authors_code(case):
    leaf = GOLDEN[f"{case}.x"].float().requires_grad_()
    spikes = spiking_neuron(leaf, backend="triton", **GOLDEN_CASES[case])
    assert torch.equal(spikes.double(), GOLDEN[f"{case}.s"])
    [gradient] = torch.autograd.grad(spikes, leaf, GOLDEN[f"{case}.grad_s"].float())
    torch.testing.assert_close(gradient.double(), GOLDEN[f"{case}.grad_x"], rtol=0, atol=3e-6)


@each_option
def test_options(options):
    check(*inputs(5, 3, 23), "triton", **options)


@pytest.mark.parametrize("count", [1, 2, 63, 197, 1100])
@pytest.mark.parametrize("steps", [1, 4, 33])
def test_sizes(count, steps):
    check(*inputs(steps, count), "triton", tau=1.7)


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view):
    current = VIEWS[view]()
    check(current, torch.randn(current.shape[1:]), "triton", tau=2.5)


def test_random_strides():
    for current, state in currents_of_random_strides():
        check(current, state, "triton", tau=2.5)


def test_infinite_currents():
    check_infinite_currents("triton")


@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 0, 3), (3,)], ids=str)
def test_empty_and_single(shape):
    check(*inputs(*shape), "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_narrow_dtypes(dtype):
    check(*inputs(6, 70, dtype=dtype), "triton", tau=2.0)
    current, state = inputs(6, 70)
    check(current.to(dtype), state, "triton")


@each_output
def test_either_output_may_lack_a_gradient(chosen):
    check_gradients_of_one_output(chosen, "triton")


def test_same_bits_every_time():
    current, state = inputs(5, 1100)
    first, second = (results(current, state, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["current", "initial_state"])
def test_float64_is_refused(name):
    arguments = {"current": torch.ones(2, 3), "initial_state": torch.ones(3)}
    arguments[name] = arguments[name].double()
    with pytest.raises(RuntimeError, match="the triton kernels take float32, bfloat16 and float16"):
        spiking_neuron(**arguments, backend="triton")
