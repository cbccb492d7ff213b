"""The Triton scan in the interpreter, against the float64 reference and ViG's golden files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kernels.gated_scan import bidirectional_gated_scan, gated_scan, operators
from kernels.gated_scan import triton as triton_scan

GOLDEN = sorted((Path(__file__).parent.parent / "golden" / "vig").glob("kernel_*.safetensors"))
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-6, 1e-5  # of the largest absolute value, float32


def relative_error(actual: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        assert actual.shape == expected.shape
        return 0.0
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def gates(kind: str, shape: tuple[int, ...]) -> Tensor:
    if kind == "usual":
        return torch.nn.functional.logsigmoid(torch.randn(shape)) / 16
    if kind == "mixed":
        return torch.tensor([0.0, -1e-6, -0.05, -30.0, -1e4])[torch.randint(5, shape)]
    return torch.full(shape, float(kind))


def make_inputs(batch: int, tokens: int, heads: int, key_dim: int, value_dim: int, gate: str = "usual") -> list[Tensor]:
    shape = (batch, tokens, heads)
    key_shape, value_shape = (*shape, key_dim), (*shape, value_dim)
    return [
        torch.randn(key_shape), torch.randn(key_shape), torch.randn(value_shape),
        gates(gate, key_shape), gates(gate, key_shape),
    ]  # fmt: skip


def check(function, inputs: list[Tensor], **options) -> None:
    """Compare outputs and every gradient of the Triton backend with the float64 reference."""
    results = {}
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        outputs = function(*leaves, backend=backend, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        grads = [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]
        results[backend] = outputs, torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    for i, (actual, expected) in enumerate(zip(results["triton"][0], results["reference"][0], strict=True)):
        assert relative_error(actual, expected) < OUTPUT_TOLERANCE, f"output {i}"
    largest = max((g.abs().max() for g in results["reference"][1] if g is not None and g.numel()), default=1.0)
    for i, (actual, expected) in enumerate(zip(results["triton"][1], results["reference"][1], strict=True)):
        if expected is None:
            expected = torch.zeros_like(actual)
        # A gradient that decays away altogether is compared with the other gradients' size.
        floor = torch.full((), 1e-3) * largest
        difference = (actual - expected).abs().max() if expected.numel() else torch.zeros(())
        scale = torch.maximum(expected.abs().max(), floor) if expected.numel() else floor
        assert not difference.isnan(), f"gradient {i}"
        assert difference / scale < GRADIENT_TOLERANCE, f"gradient {i}"


@pytest.fixture
def narrow_tiles(monkeypatch):
    """The tiles of bfloat16 inputs, whose products the interpreter cannot form, for float32 inputs."""
    monkeypatch.setattr(triton_scan, "WIDE", triton_scan.NARROW)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_files(path):
    golden = {name: tensor.transpose(1, 2) for name, tensor in load_file(path).items()}  # to (B, N, H, D)
    leaves = [golden[name].detach().float().requires_grad_() for name in ("q", "k", "v", "gk_fwd", "gk_bwd")]
    output = bidirectional_gated_scan(*leaves, backend="triton")
    assert relative_error(output, golden["o"]) < OUTPUT_TOLERANCE
    gradients = torch.autograd.grad(output, leaves, golden["do"].float())
    for name, gradient in zip(("dq", "dk", "dv", "dgk_fwd", "dgk_bwd"), gradients, strict=True):
        assert relative_error(gradient, golden[name]) < GRADIENT_TOLERANCE, name
    assert not gradients[3][:, 0].any(), "the first token has nothing to decay in the forward direction"
    assert not gradients[4][:, -1].any(), "the last token has nothing to decay in the backward direction"


def test_there_are_golden_files():
    assert len(GOLDEN) == 7


@pytest.mark.parametrize(
    ("tokens", "key_dim", "value_dim"),
    [
        (1, 8, 16), (2, 16, 16), (15, 24, 32), (16, 32, 48), (17, 48, 24), (63, 16, 96), (64, 96, 8), (65, 32, 64),
        (130, 48, 16), (197, 16, 32),
    ],
    ids=lambda size: str(size),
)  # fmt: skip
def test_bidirectional_sizes(tokens, key_dim, value_dim):
    check(bidirectional_gated_scan, make_inputs(1, tokens, 1, key_dim, value_dim))


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("tokens", [63, 130])
def test_tiles_of_bfloat16(tokens):
    check(bidirectional_gated_scan, make_inputs(1, tokens, 1, 24, 40))
    check(gated_scan, make_inputs(1, tokens, 1, 24, 40, "mixed")[:4])


@pytest.mark.parametrize("gate", ["0", "-1e-6", "-30", "-1e4", "mixed"])
def test_extreme_gates(gate):
    check(bidirectional_gated_scan, make_inputs(1, 40, 1, 16, 16, gate))
    q, k, v, g, _ = make_inputs(1, 40, 1, 16, 16, gate)
    check(lambda q, k, v, g, s, **options: gated_scan(q, k, v, g, initial_state=s, **options),
          [q, k, v, g, torch.randn(1, 1, 16, 16)])  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("with_state", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(2, 1, 2), (1, 67, 1)], ids=["B2-N1-H2", "B1-N67-H1"])
def test_one_direction(batch, tokens, heads, with_state, reverse):
    q, k, v, g, _ = make_inputs(batch, tokens, heads, 16, 24)
    states = [torch.randn(batch, heads, 16, 24)] if with_state else []

    def scan(q, k, v, g, state=None, **options):
        return gated_scan(q, k, v, g, initial_state=state, reverse=reverse, scale=0.3, **options)

    check(scan, [q, k, v, g, *states])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's word on 1 / (1 + exp(100)) = 0
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["usual", "saturated"])
def test_gate_logits(scale):
    q, k, v, _, _ = make_inputs(1, 40, 1, 16, 16)
    logits = [scale * torch.randn(q.shape), scale * torch.randn(q.shape)]
    check(bidirectional_gated_scan, [q, k, v, *logits], logit_normalizer=16.0)
    check(gated_scan, [q, k, v, logits[0]], logit_normalizer=2.0)


def test_strided_and_broadcast_inputs():
    batch, tokens, heads, dim = 2, 33, 1, 16
    fused = torch.randn(batch, tokens, heads, 2 * dim)
    q, k = fused[..., :dim], fused[..., dim:].flip(-1)[..., ::2].repeat_interleave(2, -1)
    v = torch.randn(batch, dim, heads, tokens).permute(0, 3, 2, 1)
    shared = gates("usual", (1, 1, heads, dim)).expand(batch, tokens, heads, dim)
    strided = gates("usual", (heads, dim, tokens, batch)).permute(3, 2, 0, 1)
    grad = torch.randn(batch, tokens, heads, 1).expand(batch, tokens, heads, dim)
    views = (q, k, v, shared, strided)
    output = triton_scan.bidirectional_forward(*views, 0.25, 0.0)
    copies = [x.contiguous() for x in views]
    assert torch.equal(output, triton_scan.bidirectional_forward(*copies, 0.25, 0.0))
    expected = bidirectional_gated_scan(*(x.double() for x in views), scale=0.25, backend="reference")
    assert relative_error(output, expected) < OUTPUT_TOLERANCE
    gradients = triton_scan.bidirectional_backward(grad, *views, 0.25, 0.0)
    expected = triton_scan.bidirectional_backward(grad.contiguous(), *copies, 0.25, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("shape", [(2, 0, 2), (0, 5, 2), (1, 5, 0)], ids=["N0", "B0", "H0"])
def test_nothing_to_scan(shape):
    batch, tokens, heads = shape
    leaves = [x.requires_grad_() for x in make_inputs(batch, tokens, heads, 8, 4)]
    output = bidirectional_gated_scan(*leaves, backend="triton")
    assert output.shape == (*shape, 4)
    assert [g.shape for g in torch.autograd.grad(output.sum(), leaves)] == [x.shape for x in leaves]
    state = torch.randn(batch, heads, 8, 4, requires_grad=True)
    output, final_state = gated_scan(*leaves[:4], initial_state=state, backend="triton")
    assert output.shape == (*shape, 4)
    assert torch.equal(final_state, state)
    assert torch.equal(*torch.autograd.grad(final_state, state, grad := torch.randn_like(state)), grad)


@pytest.mark.parametrize("key_dim", [0, 8])
def test_no_key_channels_give_zeros(key_dim):
    inputs = make_inputs(1, 3, 1, key_dim, 4)
    output = bidirectional_gated_scan(*inputs, backend="triton")
    assert output.any() == (key_dim > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_inputs_keep_float32_sums(dtype):
    leaves = [x.to(dtype).requires_grad_() for x in make_inputs(1, 40, 1, 16, 16)]
    output = bidirectional_gated_scan(*leaves, backend="triton")
    gradients = torch.autograd.grad(output.float().sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = bidirectional_gated_scan(*exact, backend="reference")
    expected_gradients = torch.autograd.grad(expected.sum(), exact)
    rounding = torch.finfo(dtype).eps  # the interpreter multiplies in float32: only results are rounded
    assert output.dtype == dtype
    assert relative_error(output, expected) < rounding
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, expected) < rounding


def test_same_bits_every_time():
    inputs = make_inputs(1, 35, 1, 16, 16)
    grad = torch.randn(1, 35, 1, 16)
    first, second = (
        (triton_scan.bidirectional_forward(*inputs, 0.25, 0.0),
         *triton_scan.bidirectional_backward(grad, *inputs, 0.25, 0.0))
        for _ in range(2)
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_float64_is_refused():
    inputs = [x.double() for x in make_inputs(1, 3, 1, 16, 16)]
    with pytest.raises(ValueError, match="query is float64; the triton backend takes float32"):
        bidirectional_gated_scan(*inputs, backend="triton")


def test_operators_pass_opcheck():
    leaves = [x.requires_grad_() for x in make_inputs(1, 5, 1, 8, 8)]
    torch.library.opcheck(operators.bidirectional_gated_scan, (*leaves, 0.3, 16.0, "triton"))
    state = torch.randn(1, 1, 8, 8, requires_grad=True)
    torch.library.opcheck(operators.gated_scan, (*leaves[:4], state, 0.3, 0.0, True, "triton"))
