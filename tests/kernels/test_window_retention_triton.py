"""Window retention's Triton kernels in their interpreter: sizes, options, strides, exact repetition, their limits."""

from dataclasses import replace
from itertools import cycle

import pytest
import torch

from kernels.window_retention import window_retention
from kernels.window_retention.arguments import Settings
from tests.kernels.retention_cases import (
    EXTREME_DECAYS,
    OPTIONS,
    Case,
    arguments,
    check,
    compare,
    make_inputs,
    outputs_and_gradients,
    strided_views,
)

pytest.importorskip("triton")

from kernels.window_retention import triton as triton_retention

SMALL = Case((5, 6), (3, 4), (1, 2), 1, 2)
SIZES = (
    Case((1, 1), (1, 1), head_dim=2, value_dim=1),
    Case((1, 5), (1, 5)),
    Case((1, 20), (1, 20), batch=1),  # a line longer than a block of tokens
    Case((2, 3), (2, 3)),
    Case((6, 40), (3, 20), (1, 10), 1, 1),
    Case((7, 7), (7, 7), (0, 0), 1, 3, 32, 16),
    Case((8, 8), (8, 8), (0, 0), 1, 1),
    Case((14, 14), (7, 7), (3, 3), 1, 1, 24, 32),
    Case((14, 14), (7, 7), (0, 6), 1, 1),
    Case((16, 16), (8, 8), (4, 4), 1, 1),
    Case((17, 9), (7, 3), (3, 1), 1, 1),
    Case((17, 9), (7, 7), (0, 0), 1, 1),
    Case((9, 17), (3, 8), (2, 7), 1, 1, 16, 24),
)


@pytest.fixture
def narrow_tiles(monkeypatch):
    """The tiles of bfloat16 inputs, whose products the interpreter cannot form, for float32 inputs."""
    monkeypatch.setattr(triton_retention, "WIDE", triton_retention.NARROW)


@pytest.mark.parametrize(("case", "options"), zip(SIZES, cycle(("softmax", "sigmoid-clamp-signed"))), ids=str)
def test_sizes(case, options):
    check(make_inputs(case), "triton", **arguments(case, OPTIONS[options]))


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options):
    case = Case((6, 7), (3, 4), (2, 1), 1, 2)
    check(make_inputs(case), "triton", **arguments(case, OPTIONS[options]))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(2, 5), (16, 1), (24, 70), (96, 48)])
@pytest.mark.parametrize("tiles", ["wide", "narrow"])
def test_channels(head_dim, value_dim, tiles, request):
    if tiles == "narrow":
        request.getfixturevalue("narrow_tiles")
    case = replace(SMALL, head_dim=head_dim, value_dim=value_dim)
    check(make_inputs(case), "triton", **arguments(case, {}))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 1), (5, 3), (33, 16)])
def test_odd_channels_without_rotation(head_dim, value_dim):
    case = replace(SMALL, head_dim=head_dim, value_dim=value_dim)
    check(make_inputs(case), "triton", **arguments(case, {"rotary": False}))


@pytest.mark.parametrize("log_decay", EXTREME_DECAYS)
@pytest.mark.parametrize("options", ["softmax", "sigmoid-clamp", "sigmoid-sum-signed"])
def test_extreme_decays(options, log_decay):
    check(make_inputs(SMALL), "triton", **arguments(SMALL, {**OPTIONS[options], "log_decay": [log_decay] * 2}))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy, in the interpreter: 1 / (1 + exp(100)) = 0
@pytest.mark.parametrize("options", ["softmax", "sigmoid-clamp", "sigmoid-sum", "sigmoid-none"])
def test_saturated_scores(options):
    """Scores up to a few hundred: of whole numbers, so that float32 holds them exactly."""
    query, key, value = make_inputs(SMALL)
    inputs = [(12 * query).round(), (12 * key).round(), value]
    check(inputs, "triton", **arguments(SMALL, {**OPTIONS[options], "rotary": False, "log_decay": [-0.25, -1.0]}))


def test_float16_and_mixed_dtypes():
    """Each gradient in its tensor's dtype. (The interpreter truncates to bfloat16 where GPUs round.)"""
    inputs = [
        x.to(dtype) for x, dtype in zip(make_inputs(SMALL), (torch.float32, torch.float16, torch.float16), strict=True)
    ]
    leaves = [x.requires_grad_() for x in inputs]
    output = window_retention(*leaves, backend="triton", **arguments(SMALL, {}))
    actual = [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]
    assert [x.dtype for x in actual] == [torch.float16, torch.float32, torch.float16, torch.float16]
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    output = window_retention(*leaves, backend="reference", **arguments(SMALL, {}))
    compare(actual, [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))], (5e-4, 5e-4))


def test_strided_and_broadcast_inputs_give_the_bits_of_copies():
    views, settings = strided_views(SMALL), arguments(SMALL, {})
    actual = outputs_and_gradients(views, torch.float32, "triton", **settings)
    expected = outputs_and_gradients([x.contiguous() for x in views], torch.float32, "triton", **settings)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    check(views, "triton", **settings)


def test_same_bits_every_time():
    inputs, settings = make_inputs(SMALL), arguments(SMALL, OPTIONS["sigmoid-clamp-slopes"])
    first, second = (outputs_and_gradients(inputs, torch.float32, "triton", **settings) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "case",
    [replace(SMALL, batch=0), replace(SMALL, value_dim=0), Case((0, 3), (1, 3)), replace(SMALL, head_dim=0)],
    ids=["no-maps", "no-values", "no-rows", "no-head-channels"],
)
def test_empty(case):
    check(make_inputs(case), "triton", **arguments(case, {"rotary": False}))


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_float64_is_refused(name):
    inputs = dict(zip(("query", "key", "value"), make_inputs(SMALL), strict=True))
    inputs[name] = inputs[name].double()
    with pytest.raises(ValueError, match=f"{name} is float64; the triton backend takes float32, bfloat16 and float16"):
        window_retention(**inputs, backend="triton", **arguments(SMALL, {}))


def test_large_windows_are_refused():
    case = Case((5, 13), (5, 13), batch=1, heads=1)
    settings = arguments(case, {})
    with pytest.raises(RuntimeError, match="takes windows of up to 64 tokens, not 65"):
        window_retention(*make_inputs(case), backend="triton", **settings)
    settings = Settings((-0.1,), (), case.window, (0, 0), "softmax", "clamp", False, True, 0.25)
    with pytest.raises(ValueError, match=r"window is \(5, 13\), 65 tokens; the triton backend takes up to 64"):
        triton_retention.forward(*make_inputs(case), settings)
