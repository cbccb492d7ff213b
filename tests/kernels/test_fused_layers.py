"""The layers around the scan: every backend against the definitions in float64, outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fused_layers import (
    depthwise_convolution,
    gated_norm_mix,
    gated_product,
    gelu_depthwise_residual,
    native,
    operators,
    rms_norm,
    swiglu,
)

CHANNELS = (2, 16, 63, 65)


def rms_norm_inputs(channels: int) -> list[Tensor]:
    return [torch.randn(3, 7, channels), torch.randn(channels)]


def swiglu_inputs(channels: int) -> list[Tensor]:
    return [3 * torch.randn(2, 5, 2 * channels)]


def product_inputs(channels: int) -> list[Tensor]:
    return [torch.randn(2, 5, channels), 3 * torch.randn(2, 5, channels)]


def convolution_inputs(channels: int) -> list[Tensor]:
    return [torch.randn(2, 5, 4, channels), torch.randn(channels, 1, 3, 3)]


def biased_inputs(channels: int, kernel: int = 5, size: tuple[int, ...] = (2, 5, 9)) -> list[Tensor]:
    return [torch.randn(*size, channels), torch.randn(channels, 1, kernel, kernel) / kernel, torch.randn(channels)]


def residual_inputs(channels: int) -> list[Tensor]:
    return [*biased_inputs(channels, kernel=7), torch.randn(2, 5, 9, channels)]


def mix_inputs(channels: int) -> list[Tensor]:
    return [*(torch.randn(2, 9, 3, channels) for _ in range(3)), torch.randn(channels), torch.randn(channels)]


def with_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, **options) -> Tensor:
    return depthwise_convolution(x, weight, bias, residual=residual, **options)


def with_own_residual(x: Tensor, weight: Tensor, bias: Tensor, **options) -> Tensor:
    return depthwise_convolution(x, weight, bias, residual=x, **options)


LAYERS = {
    "rms_norm": (rms_norm, rms_norm_inputs, {}),
    "swiglu": (swiglu, swiglu_inputs, {}),
    "gated_product-sigmoid": (gated_product, product_inputs, {"kind": "sigmoid"}),
    "gated_product-silu": (gated_product, product_inputs, {"kind": "silu"}),
    "depthwise_convolution": (depthwise_convolution, convolution_inputs, {}),
    "depthwise_convolution-silu": (depthwise_convolution, convolution_inputs, {"activation": "silu"}),
    "depthwise_convolution-bias": (depthwise_convolution, biased_inputs, {}),
    "depthwise_convolution-residual": (with_residual, residual_inputs, {}),
    "depthwise_convolution-residual-silu": (with_residual, residual_inputs, {"activation": "silu"}),
    "depthwise_convolution-own-residual": (with_own_residual, biased_inputs, {}),
    "depthwise_convolution-own-residual-silu": (with_own_residual, biased_inputs, {"activation": "silu"}),
    "gelu_depthwise_residual": (gelu_depthwise_residual, biased_inputs, {}),
    "gelu_depthwise_residual-no-bias": (gelu_depthwise_residual, convolution_inputs, {}),
    "gated_norm_mix": (gated_norm_mix, mix_inputs, {}),
    "gated_norm_mix-silu": (gated_norm_mix, mix_inputs, {"activation": "silu"}),
}
# Heights and widths: single pixels, lines, less than a tile, tiles of eight and of seven, more than one tile.
MAPS = ((1, 1), (2, 3), (63, 1), (1, 63), (4, 8), (5, 14), (3, 17))


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


@pytest.mark.parametrize("channels", [1, 7, 65, 96])
@pytest.mark.parametrize("size", MAPS, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("layer", ["plain", "silu", "gelu"])
def test_convolutions_of_any_size_are_exact_to_rounding(layer, kernel, size, channels):
    def function(x, weight, bias, backend):
        if layer == "gelu":
            return gelu_depthwise_residual(x, weight, bias, backend=backend)
        activation = "silu" if layer == "silu" else None
        return depthwise_convolution(x, weight, bias, residual=x, activation=activation, backend=backend)

    def run(dtype, backend):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        output = function(*leaves, backend)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))]

    inputs = biased_inputs(channels, kernel, (2, *size))
    grad = 1 + torch.rand(2, *size, channels)  # of one sign, so that the few terms of a bias' gradient do not cancel
    actual, expected = run(torch.float32, "native"), run(torch.float64, "reference")
    assert_close(actual[:1], expected[:1], 2e-6)
    assert_close(actual, expected, 1e-5)


def view_of_wider(x: Tensor) -> Tensor:
    """The values of `x` as a slice of the channels of a wider tensor."""
    return torch.cat((torch.randn(*x.shape[:-1], 5), x, torch.randn(*x.shape[:-1], 3)), dim=-1)[..., 5:-3]


def view_of_swapped(x: Tensor) -> Tensor:
    """The values of `x` as a view of a tensor whose first two dimensions are swapped."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("layer", [name for name in LAYERS if name.startswith(("gated_product", "depthwise", "gelu"))])
@pytest.mark.parametrize("channels", [16, 7])
@pytest.mark.parametrize("rearrange", [view_of_wider, view_of_swapped], ids=["slice-of-channels", "swapped"])
def test_views_are_read_as_they_are(layer, channels, rearrange):
    function, make, options = LAYERS[layer]
    inputs = make(channels)
    views = [rearrange(x) if x.dim() > 2 and x.shape[0] == 2 else x for x in inputs]
    assert not views[0].is_contiguous()
    expected = outputs_and_gradients(function, inputs, torch.float32, backend="native", **options)
    actual = outputs_and_gradients(function, views, torch.float32, backend="native", **options)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert all(a.is_contiguous() for a in actual)


@pytest.mark.parametrize(
    ("make", "stride"),
    [
        (lambda x: x, 6),
        (lambda x: x[..., 1:5], 6),
        (lambda x: x[:, :, 1:2, :4], 30),
        (lambda x: x[1:2, 3:4, 2:3], 6),
        (lambda x: x[:, 1:3], None),
        (lambda x: x.transpose(1, 2), None),
        (lambda x: x[..., ::2], None),
        (lambda x: x[..., :1].expand(-1, -1, -1, 4), None),
    ],
    ids=["whole", "channels", "column", "pixel", "rows", "transposed", "every-other-channel", "expanded"],
)
def test_only_unevenly_spaced_maps_are_copied(make, stride):
    tensor = make(torch.randn(2, 4, 5, 6))
    spaced, between = native._evenly_spaced(tensor)
    assert torch.equal(spaced, tensor)
    assert (spaced.data_ptr() == tensor.data_ptr()) == (stride is not None)
    assert between == (spaced.shape[-1] if stride is None or spaced.numel() == spaced.shape[-1] else stride)


def test_own_residual_gets_both_gradients():
    x, weight, bias = biased_inputs(9)
    own = outputs_and_gradients(with_own_residual, [x, weight, bias], torch.float64, backend="native")
    apart = outputs_and_gradients(with_residual, [x, weight, bias, x], torch.float64, backend="native")
    assert_close(own, [apart[0], apart[1] + apart[4], *apart[2:4]], 1e-12)


def test_the_gradient_of_a_residual_is_the_incoming_one():
    leaves = [x.requires_grad_() for x in residual_inputs(4)]
    grad = torch.randn(leaves[0].shape)
    *_, of_residual = torch.autograd.grad(with_residual(*leaves, backend="native"), leaves, grad)
    assert of_residual.data_ptr() == grad.data_ptr()


def test_gelu_residual_keeps_its_input_alone():
    x, weight, bias = (t.requires_grad_() for t in biased_inputs(4))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        gelu_depthwise_residual(x, weight, bias, backend="native")
    assert kept == [x.data_ptr(), weight.data_ptr()]


def test_gelu_is_exact_to_rounding_everywhere():
    x = torch.cat((torch.linspace(-15, 15, 299_996), torch.tensor([-1e30, 1e30, 1e-30, float("nan")])))
    weight = torch.zeros(16, 1, 1, 1)
    x.requires_grad_()
    hidden = gelu_depthwise_residual(x.view(1, 1, -1, 16), weight, backend="native").flatten()
    (slope,) = torch.autograd.grad(hidden.sum(), x)
    wide = x.detach().double().requires_grad_()
    (wide_slope,) = torch.autograd.grad(F.gelu(wide).sum(), wide)
    scale = wide.detach().abs().clamp(min=1)
    assert ((hidden.double() - F.gelu(wide)).abs() / scale)[:-1].max() < 3e-7
    assert (slope.double() - wide_slope).abs()[:-1].max() < 1e-6
    assert torch.equal(hidden[-4:-1].detach(), torch.tensor([0.0, 1e30, 5e-31]))
    assert hidden[-1].isnan()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)], ids=["no-rows", "no-tokens"])
def test_empty_inputs(shape):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(4, requires_grad=True)
    output = rms_norm(x, weight, backend="native")
    output.sum().backward()
    assert output.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros(4))
    assert swiglu(x, backend="native").shape == (*shape[:-1], 2)
    assert gated_product(x, x, "silu", backend="native").shape == x.shape


@pytest.mark.parametrize("size", [(0, 5, 4), (2, 0, 4), (2, 5, 0)], ids=["no-images", "no-rows", "no-columns"])
@pytest.mark.parametrize("layer", [with_own_residual, gelu_depthwise_residual])
def test_empty_maps(layer, size):
    leaves = [x.requires_grad_() for x in biased_inputs(6, size=size)]
    output = layer(*leaves, backend="native")
    output.sum().backward()
    assert output.shape == (*size, 6)
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in leaves)


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
    torch.compiler.reset()
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
        (operators.gated_product, (*product_inputs(5), True)),
        (operators.depthwise_convolution, (*convolution_inputs(5), None, None, False, True, torch.float32)),
        (operators.depthwise_convolution, (*residual_inputs(5), False, False, torch.float32)),
        (operators.depthwise_convolution, (*biased_inputs(5), None, True, False, torch.float32)),
        (operators.gelu_depthwise_residual, (*biased_inputs(5), torch.float32)),
        (operators.gated_norm_mix, (*mix_inputs(5), 1e-6, True)),
    ],
    ids=["rms_norm", "swiglu", "product", "convolution", "residual", "own-residual", "gelu", "mix"],
)
def test_operators_pass_opcheck(operator, arguments):
    leaves = tuple(x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in arguments)
    torch.library.opcheck(operator, leaves)


def test_autocast_rounds_norm_and_convolution_for_the_products_that_follow():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rms_norm(*rms_norm_inputs(8), backend="native").dtype == torch.bfloat16
        assert depthwise_convolution(*convolution_inputs(8), backend="native").dtype == torch.bfloat16
        assert gelu_depthwise_residual(*biased_inputs(8), backend="native").dtype == torch.bfloat16
        assert rms_norm(torch.randn(2, 8).double(), torch.ones(8), backend="native").dtype == torch.float64


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autocast_does_not_round_residuals(backend):
    leaves = [x.requires_grad_() for x in residual_inputs(8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        apart, own = with_residual(*leaves, backend=backend), with_own_residual(*leaves[:3], backend=backend)
    assert apart.dtype == own.dtype == torch.float32
    gradients = torch.autograd.grad(apart.sum() + own.sum(), leaves)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize(
    ("x", "other"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float64)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_dtypes_may_differ(x, other):
    inputs = [tensor.to(x) for tensor in residual_inputs(17)]
    inputs[3] = inputs[3].to(other)
    for layer, tensors in ((with_residual, inputs), (lambda a, b, **o: gated_product(a, b, "silu", **o), inputs[::3])):
        leaves = [tensor.requires_grad_() for tensor in tensors]
        output, expected = layer(*leaves, backend="native"), layer(*leaves, backend="reference")
        assert output.dtype == expected.dtype
        gradients = torch.autograd.grad(output.sum(), leaves)
        assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]
        tolerance = 1e-2 if torch.bfloat16 in (x, other) else 1e-5
        assert_close([output, *gradients], [expected, *torch.autograd.grad(expected.sum(), leaves)], tolerance)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(torch.randn(2, 4), torch.ones(3)), r"weight has shape \(3,\)"),
        (lambda: depthwise_convolution(torch.randn(2, 4), torch.ones(4, 1, 3, 3)), r"x has shape \(2, 4\)"),
        (
            lambda: depthwise_convolution(torch.randn(1, 2, 2, 4), torch.ones(4, 1, 3, 3), activation="gelu"),
            "activation is 'gelu'; valid are None and 'silu'",
        ),
        (
            lambda: depthwise_convolution(torch.randn(1, 2, 2, 4), torch.ones(4, 1, 2, 2)),
            r"weight has shape \(4, 1, 2, 2\); it must be \(channels, 1, K, K\) with K odd",
        ),
        (
            lambda: gelu_depthwise_residual(torch.randn(1, 2, 2, 4), torch.ones(4, 1, 3, 5)),
            r"weight has shape \(4, 1, 3, 5\); with x of \(1, 2, 2, 4\) it must be \(4, 1, 5, 5\)",
        ),
        (
            lambda: depthwise_convolution(torch.randn(1, 2, 2, 4), torch.ones(4, 1, 3, 3), torch.ones(5)),
            r"bias has shape \(5,\)",
        ),
        (
            lambda: with_residual(*biased_inputs(4), torch.randn(2, 5, 9, 3)),
            r"residual has shape \(2, 5, 9, 3\)",
        ),
        (lambda: swiglu(torch.randn(2, 5)), "x has 5 channels"),
        (lambda: gated_product(torch.tensor(1.0), torch.tensor(1.0), "silu"), "x is a scalar"),
        (lambda: gated_product(*product_inputs(4), "tanh"), "kind is 'tanh'; valid are 'sigmoid' and 'silu'"),
        (
            lambda: gated_product(torch.randn(2, 4), torch.randn(4), "silu"),
            r"logits has shape \(4,\); with x of \(2, 4\) it must be \(2, 4\)",
        ),
        (
            lambda: gated_norm_mix(*[torch.randn(1, 2, 3, 4)] * 2, torch.randn(1, 2, 3, 5), *[torch.ones(4)] * 2),
            r"gate_logits has shape \(1, 2, 3, 5\)",
        ),
    ],
    ids=[
        "weight",
        "map",
        "activation",
        "even-kernel",
        "oblong-kernel",
        "bias",
        "residual",
        "odd-channels",
        "scalar",
        "kind",
        "logits",
        "gate",
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
