"""Linear attention's Triton kernels in their interpreter: sizes, options, strides, exact repetition, their limits."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from kernels.linear_attention import triton as triton_attention
from tests.kernels.test_linear_attention import (
    GATES,
    SMALL,
    Case,
    attend,
    check,
    each_normalization,
    outputs_and_gradients,
    strided_inputs,
)

SIZES = [
    Case(1, 1), Case(2, 2), Case(33, 65, 16, 16), Case(1, 40), Case(40, 1), Case(70, 600, 8, 8, batch=1, heads=2),
    *(Case(5, 40, d, v, batch=1, heads=2) for d, v in ((1, 1), (7, 5), (32, 32), (64, 64), (96, 96), (20, 70))),
]  # fmt: skip


@each_normalization
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes(case, normalization):
    check(case.inputs(), "triton", normalization=normalization)


@pytest.mark.parametrize("case", [Case(70, 130, 96, 48, batch=1, heads=2), SMALL], ids=str)
def test_the_tiles_of_bfloat16_inputs(case, monkeypatch):
    """Its products the interpreter cannot form: on float32 inputs."""
    monkeypatch.setattr(triton_attention, "WIDE", triton_attention.NARROW)
    check(case.inputs(), "triton")


@each_normalization
@pytest.mark.parametrize("case", GATES, ids=str)
def test_gates(case, normalization):
    check(case.inputs(), "triton", normalization=normalization)


@each_normalization
def test_mapped_already(normalization):
    query, key, *others = SMALL.inputs()
    check([query.exp(), key.exp(), *others], "triton", normalization=normalization, feature_map=None)


@each_normalization
@pytest.mark.parametrize("factor", [1e4, 0.0, -1.0])
def test_extreme_keys(factor, normalization):
    query, key, *others = SMALL.inputs()
    check([query, key.abs() * factor, *others], "triton", normalization=normalization)


def test_float16_and_mixed_dtypes():
    query, key, value, *gates = SMALL.inputs()
    leaves = [x.requires_grad_() for x in (query, key.half(), value.half(), *gates)]
    output = attend(leaves, backend="triton")
    gradients = torch.autograd.grad(output.float().sum(), leaves)
    assert [x.dtype for x in (output, *gradients)] == [torch.float16, *(x.dtype for x in leaves)]
    expected = attend([x.double() for x in leaves], backend="reference")
    assert (output - expected).abs().max() < 1e-3 * expected.abs().max()


def test_strided_and_broadcast_inputs_give_the_bits_of_copies():
    views = strided_inputs(40, 8)
    copies = [x.contiguous() for x in views]
    actual, expected = (outputs_and_gradients(x, torch.float32, "triton") for x in (views, copies))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    check(views, "triton")


def test_same_bits_every_time():
    inputs = Case(40, 600, 8, 8, batch=1).inputs()
    first, second = (outputs_and_gradients(inputs, torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_normalization
@pytest.mark.parametrize("name", ["batch", "queries", "keys", "heads", "head_dim", "value_dim"])
def test_empty(name, normalization):
    check(replace(SMALL, **{name: 0}, gates=("", "shared")).inputs(), "triton", normalization=normalization)


@pytest.mark.parametrize("place", range(5), ids=["query", "key", "value", "key_gate", "value_gate"])
def test_float64_is_refused(place):
    inputs = SMALL.inputs()
    inputs[place] = inputs[place].double()
    name = ("query", "key", "value", "key_gate", "value_gate")[place]
    with pytest.raises(ValueError, match=f"{name} is float64; the triton backend takes float32"):
        attend(inputs, backend="triton")
