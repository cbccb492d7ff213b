"""The layers around the scan: every backend against the definitions in float64, outputs and every gradient."""

import pytest
import torch
from torch import Tensor

from kernels.fused_layers import depthwise_convolution, gated_norm_mix, operators, rms_norm, swiglu

CHANNELS = (2, 16, 63, 65)


def rms_norm_inputs(channels: int) -> list[Tensor]:
    return [torch.randn(3, 7, channels), torch.randn(channels)]


def swiglu_inputs(channels: int) -> list[Tensor]:
    return [3 * torch.randn(2, 5, 2 * channels)]


def convolution_inputs(channels: int) -> list[Tensor]:
    return [torch.randn(2, 5, 4, channels), torch.randn(channels, 1, 3, 3)]


def mix_inputs(channels: int) -> list[Tensor]:
    return [*(torch.randn(2, 9, 3, channels) for _ in range(3)), torch.randn(channels), torch.randn(channels)]


LAYERS = {
    "rms_norm": (rms_norm, rms_norm_inputs, {}),
    "swiglu": (swiglu, swiglu_inputs, {}),
    "depthwise_convolution": (depthwise_convolution, convolution_inputs, {}),
    "depthwise_convolution-silu": (depthwise_convolution, convolution_inputs, {"activation": "silu"}),
    "gated_norm_mix": (gated_norm_mix, mix_inputs, {}),
    "gated_norm_mix-silu": (gated_norm_mix, mix_inputs, {"activation": "silu"}),
}


def outputs_and_gradients(function, inputs: list[Tensor], dtype: torch.dtype, **options) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    output = function(*leaves, **options)
    torch.manual_seed(1)
    grad = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = (a.double() - e.double()).abs().max() / e.double().abs().max()
        assert error < tolerance, f"{'output' if i == 0 else f'gradient {i}'}: {error:.1e}"


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("layer", LAYERS)
def test_native_matches_the_definition(layer, channels):
    function, make, options = LAYERS[layer]
    inputs = make(channels)
    expected = outputs_and_gradients(function, inputs, torch.float64, backend="reference", **options)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        rounded = [x.to(dtype) for x in inputs]
        if dtype == torch.bfloat16:
            expected = outputs_and_gradients(function, rounded, torch.float64, backend="reference", **options)
        actual = outputs_and_gradients(function, rounded, dtype, backend="native", **options)
        assert actual[0].dtype == dtype
        assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradcheck(layer, backend):
    function, make, options = LAYERS[layer]
    leaves = [x.double().requires_grad_() for x in make(3)]
    assert torch.autograd.gradcheck(lambda *tensors: function(*tensors, backend=backend, **options), leaves)


@pytest.mark.parametrize("layer", LAYERS)
def test_any_thread_count_gives_the_same_output(layer):
    function, make, options = LAYERS[layer]
    inputs = make(33)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(function(*inputs, backend="native", **options))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("layer", LAYERS)
def test_strided_inputs(layer):
    function, make, options = LAYERS[layer]
    inputs = make(16)
    strided = [torch.stack((x, x), dim=-1)[..., 0] for x in inputs]
    assert not strided[0].is_contiguous()
    expected = outputs_and_gradients(function, inputs, torch.float32, backend="native", **options)
    leaves = [x.requires_grad_() for x in strided]
    assert torch.equal(function(*leaves, backend="native", **options), expected[0])


def test_mix_reads_gate_logits_from_a_slice_of_channels():
    scan, local, _, scan_weight, local_weight = mix_inputs(16)
    projected = torch.randn(2, 9, 5 + 48)
    sliced = projected[..., 5:].unflatten(-1, (3, 16))
    weights = (scan_weight, local_weight)
    expected = gated_norm_mix(scan, local, sliced.contiguous(), *weights, backend="native")
    assert torch.equal(gated_norm_mix(scan, local, sliced, *weights, backend="native"), expected)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)], ids=["no-rows", "no-tokens"])
def test_empty_inputs(shape):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(4, requires_grad=True)
    output = rms_norm(x, weight, backend="native")
    output.sum().backward()
    assert output.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros(4))
    assert swiglu(x, backend="native").shape == (*shape[:-1], 2)


@pytest.mark.parametrize("layer", LAYERS)
def test_extreme_values_stay_finite(layer):
    function, make, options = LAYERS[layer]
    inputs = [torch.full_like(x, value) for x, value in zip(make(8), (1e4, -1e4, 1e4, 1.0, 1.0), strict=False)]
    results = outputs_and_gradients(function, inputs, torch.float32, backend="native", **options)
    assert all(result.isfinite().all() for result in results)


def test_nan_is_not_hidden():
    x = torch.randn(2, 4)
    x[1, 2] = float("nan")
    output = rms_norm(x, torch.ones(4), backend="native")
    assert output[0].isfinite().all()
    assert output[1].isnan().all()
    assert swiglu(torch.full((1, 4), float("nan")), backend="native").isnan().all()


@pytest.mark.parametrize("layer", LAYERS)
def test_compiles_without_graph_breaks(layer):
    function, make, options = LAYERS[layer]
    inputs = make(8)
    compiled = torch.compile(
        lambda *tensors: function(*tensors, backend="native", **options), fullgraph=True, backend="aot_eager"
    )
    expected = outputs_and_gradients(function, inputs, torch.float32, backend="native", **options)
    assert_close(outputs_and_gradients(compiled, inputs, torch.float32), expected, 1e-6)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (operators.rms_norm, (*rms_norm_inputs(5), 1e-6, torch.float32)),
        (operators.swiglu, swiglu_inputs(5)),
        (operators.depthwise_convolution, (*convolution_inputs(5), None, None, False, True, torch.float32)),
        (operators.gated_norm_mix, (*mix_inputs(5), 1e-6, True)),
    ],
    ids=["rms_norm", "swiglu", "depthwise_convolution", "gated_norm_mix"],
)
def test_operators_pass_opcheck(operator, arguments):
    leaves = tuple(x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in arguments)
    torch.library.opcheck(operator, leaves)


def test_autocast_rounds_norm_and_convolution_for_the_products_that_follow():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rms_norm(*rms_norm_inputs(8), backend="native").dtype == torch.bfloat16
        assert depthwise_convolution(*convolution_inputs(8), backend="native").dtype == torch.bfloat16
        assert rms_norm(torch.randn(2, 8).double(), torch.ones(8), backend="native").dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(torch.randn(2, 4), torch.ones(3)), r"weight has shape \(3,\)"),
        (lambda: depthwise_convolution(torch.randn(2, 4), torch.ones(4, 1, 3, 3)), r"x has shape \(2, 4\)"),
        (
            lambda: depthwise_convolution(torch.randn(1, 2, 2, 4), torch.ones(4, 1, 3, 3), activation="gelu"),
            "activation is 'gelu'; valid are None and 'silu'",
        ),
        (lambda: swiglu(torch.randn(2, 5)), "x has 5 channels"),
        (
            lambda: gated_norm_mix(*[torch.randn(1, 2, 3, 4)] * 2, torch.randn(1, 2, 3, 5), *[torch.ones(4)] * 2),
            r"gate_logits has shape \(1, 2, 3, 5\)",
        ),
    ],
    ids=["weight", "map", "activation", "odd-channels", "gate"],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
