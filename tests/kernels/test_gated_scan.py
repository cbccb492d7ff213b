"""The gated scan in every backend (Triton's in its interpreter), the operators, bad arguments.

What only the Triton backend has is in `test_gated_scan_triton.py`.
"""

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from kernels.backend import unavailable_reason
from kernels.gated_scan import bidirectional_gated_scan, gated_scan, operators
from tests.kernels.scan_cases import (
    EXTREME_GATES,
    GOLDEN,
    TOLERANCES,
    check,
    make_inputs,
    relative_error,
    strided_views,
)

BACKENDS = ("torch", "native")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")
TRITON = pytest.param("triton", marks=needs_triton)
DTYPES = (torch.float64, torch.float32)
DTYPES_OF = {"reference": DTYPES, "torch": DTYPES, "native": DTYPES, "triton": (torch.float32,)}
dtype_id = {"ids": lambda dtype: str(dtype).removeprefix("torch.")}


def backends_and_dtypes(*backends: str):
    pairs = [
        pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}", marks=marks)
        for backend in backends
        for marks in [needs_triton if backend == "triton" else ()]
        for dtype in DTYPES_OF[backend]
    ]
    return pytest.mark.parametrize(("backend", "dtype"), pairs)


def tokens_and_heads(backend: str) -> tuple[int, int]:
    """More than a chunk of tokens, but few where the interpreter runs."""
    return (40, 1) if backend == "triton" else (70, 2)


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def scan_with_state(query, key, value, log_decay, initial_state, **options):
    return gated_scan(query, key, value, log_decay, initial_state=initial_state, **options)


def test_native_kernels_run_on_this_machine():
    assert unavailable_reason("native", "cpu") is None


@backends_and_dtypes("reference", *BACKENDS, "triton")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_files(path, backend, dtype):
    golden = {name: tensor.transpose(1, 2) for name, tensor in load_file(path).items()}  # to (B, N, H, D)
    leaves = [golden[name].detach().to(dtype).requires_grad_() for name in ("q", "k", "v", "gk_fwd", "gk_bwd")]
    output = bidirectional_gated_scan(*leaves, backend=backend)
    output_tolerance, gradient_tolerance = TOLERANCES[dtype]
    assert relative_error(output, golden["o"]) < output_tolerance
    gradients = torch.autograd.grad(output, leaves, golden["do"].to(dtype))
    for name, gradient in zip(("dq", "dk", "dv", "dgk_fwd", "dgk_bwd"), gradients, strict=True):
        assert relative_error(gradient, golden[name]) < gradient_tolerance, name
    if len(golden["q"]):
        assert not gradients[3][:, 0].any(), "the first token has nothing to decay in the forward direction"
        assert not gradients[4][:, -1].any(), "the last token has nothing to decay in the backward direction"


def test_there_are_golden_files():
    assert len(GOLDEN) == 7


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_golden_directions(reverse):
    golden = load_file(GOLDEN[0])
    names = ("q", "k", "v", "gk_bwd" if reverse else "gk_fwd")
    inputs = [golden[name].transpose(1, 2).double() for name in names]
    for backend in ("reference", *BACKENDS):
        output, _ = gated_scan(*inputs, reverse=reverse, backend=backend)
        assert relative_error(output, golden["o_bwd" if reverse else "o_fwd"].transpose(1, 2)) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES, **dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "key_dim", "value_dim"),
    [
        (1, 1, 1), (2, 8, 16), (15, 24, 33), (32, 32, 64), (33, 16, 32), (63, 5, 96), (65, 32, 48), (130, 64, 7),
        (197, 40, 80),
    ],
    ids=lambda size: str(size),
)  # fmt: skip
def test_bidirectional_sizes(tokens, key_dim, value_dim, backend, dtype):
    check(bidirectional_gated_scan, make_inputs(2, tokens, 3, key_dim, value_dim), backend, dtype)


@backends_and_dtypes(*BACKENDS, "triton")
@pytest.mark.parametrize("gate", EXTREME_GATES)
def test_extreme_gates(gate, backend, dtype):
    tokens, heads = tokens_and_heads(backend)
    check(bidirectional_gated_scan, make_inputs(1, tokens, heads, 16, 16, gate), backend, dtype)
    *inputs, _ = make_inputs(1, tokens, heads, 16, 16, gate)
    check(scan_with_state, [*inputs, torch.randn(1, heads, 16, 16)], backend, dtype)


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
def test_a_decay_of_minus_infinity_forgets(backend):
    query, key, value, *decays = make_inputs(1, 20, 1, 8, 8)
    for decay in decays:
        decay[:, 10] = -torch.inf
    output = bidirectional_gated_scan(query, key, value, *decays, backend=backend)
    expected = bidirectional_gated_scan(query, key, value, *decays, backend="reference")
    assert relative_error(output, expected) < 2e-6


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("with_state", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("tokens", [1, 20, 67])
def test_one_direction(tokens, with_state, reverse, backend):
    batch = heads = 1 if backend == "triton" and tokens > 1 else 2
    *inputs, _ = make_inputs(batch, tokens, heads, 16, 24)
    states = [torch.randn(batch, heads, 16, 24)] if with_state else []
    function = scan_with_state if with_state else gated_scan
    for dtype in DTYPES_OF[backend]:
        check(function, [*inputs, *states], backend, dtype, reverse=reverse, scale=0.3)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy, in the interpreter: 1 / (1 + exp(100)) = 0
@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["usual", "saturated"])
def test_gate_logits(spread, backend):
    query, key, value, _, _ = make_inputs(1, *tokens_and_heads(backend), 16, 16)
    logits = [spread * torch.randn(query.shape) for _ in range(2)]
    for dtype in DTYPES_OF[backend]:
        check(bidirectional_gated_scan, [query, key, value, *logits], backend, dtype, logit_normalizer=16.0)
        check(gated_scan, [query, key, value, logits[0]], backend, dtype, logit_normalizer=2.0)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("batch", "heads", "tokens"),
    [(1, 1, 1100), (1, 3, 600), (3, 8, 40)],
    ids=["segments", "directions", "heads"],
)
def test_native_work_is_divided_in_every_way(batch, heads, tokens, threads, restore_threads):
    torch.set_num_threads(threads)
    inputs = make_inputs(batch, tokens, heads, 8, 16)
    assert relative_error(
        bidirectional_gated_scan(*inputs, backend="native"),
        bidirectional_gated_scan(*(x.double() for x in inputs), backend="torch"),
    ) < 2e-6  # fmt: skip
    *one_direction, _ = make_inputs(batch, tokens, heads, 8, 16, "mixed")
    for dtype in DTYPES:
        check(scan_with_state, [*one_direction, torch.randn(batch, heads, 8, 16)], "native", dtype, reverse=True)


def test_native_gives_the_same_bits_every_time():
    inputs = [x.requires_grad_() for x in make_inputs(2, 197, 3, 32, 64)]
    grad = torch.randn(2, 197, 3, 64)
    runs = []
    for _ in range(2):
        output = bidirectional_gated_scan(*inputs, backend="native")
        runs.append((output, *torch.autograd.grad(output, inputs, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_position_does_not_matter(backend):
    inputs = make_inputs(9, 50, 2, 16, 16)
    whole = bidirectional_gated_scan(*inputs, backend=backend)
    for i in (0, 4, 8):
        one = bidirectional_gated_scan(*(x[i : i + 1] for x in inputs), backend=backend)
        assert relative_error(one, whole[i : i + 1]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_broadcast_inputs(backend):
    views = strided_views(2, 35, 2, 16)
    output = bidirectional_gated_scan(*views, backend=backend)
    assert relative_error(output, bidirectional_gated_scan(*(x.double() for x in views), backend="reference")) < 2e-6
    leaves = [x.detach().requires_grad_() for x in views]
    grad = torch.randn(2, 35, 2, 1).expand(2, 35, 2, 16)
    gradients = torch.autograd.grad(bidirectional_gated_scan(*leaves, backend=backend), leaves, grad)
    copies = [x.detach().contiguous().requires_grad_() for x in views]
    expected = torch.autograd.grad(bidirectional_gated_scan(*copies, backend=backend), copies, grad.contiguous())
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS, TRITON])
@pytest.mark.parametrize("shape", [(2, 0, 2), (0, 5, 2), (1, 5, 0)], ids=["N0", "B0", "H0"])
def test_nothing_to_scan(shape, backend):
    batch, tokens, heads = shape
    inputs = make_inputs(batch, tokens, heads, 8, 4)
    check(bidirectional_gated_scan, inputs, backend)
    state = torch.randn(batch, heads, 8, 4, requires_grad=True)
    check(scan_with_state, [*inputs[:4], state], backend)
    output, final_state = scan_with_state(*inputs[:4], state, backend=backend)
    assert output.shape == (*shape, 4)
    assert torch.equal(final_state, state)
    assert torch.equal(*torch.autograd.grad(final_state, state, grad := torch.randn_like(state)), grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], **dtype_id)
@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
def test_half_precision_inputs_keep_float32_sums(backend, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in make_inputs(1, *tokens_and_heads(backend), 16, 16)]
    output = bidirectional_gated_scan(*leaves, backend=backend)
    gradients = torch.autograd.grad(output.float().sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = bidirectional_gated_scan(*exact, backend="reference")
    expected_gradients = torch.autograd.grad(expected.sum(), exact)
    rounding = torch.finfo(dtype).eps  # Triton's interpreter multiplies in float32 too: only results are rounded
    assert output.dtype == dtype
    assert relative_error(output, expected) < rounding
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, expected) < rounding


def test_dtypes_may_differ_and_the_state_stays_wide():
    query, key, value, decay, _ = make_inputs(1, 10, 1, 8, 8)
    output, state = gated_scan(query.bfloat16(), key.bfloat16(), value.bfloat16(), decay, backend="native")
    assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    _, state = gated_scan(query, key, value, decay.double(), backend="native")
    assert state.dtype == torch.float64


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("normalizer", [None, 16.0], ids=["log-decays", "logits"])
def test_gradcheck(backend, normalizer):
    inputs = [x.double().requires_grad_() for x in make_inputs(1, 5, 1, 2, 3)]
    options = {"logit_normalizer": normalizer, "backend": backend}
    if normalizer is None:  # finite differences must not step above 0
        inputs[3:] = [(x.detach() - 0.1).requires_grad_() for x in inputs[3:]]
    assert torch.autograd.gradcheck(lambda *x: bidirectional_gated_scan(*x, **options), inputs)
    state = torch.randn(1, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: scan_with_state(*x, reverse=True, **options), [*inputs[:4], state])


@pytest.mark.parametrize("backend", ["native", TRITON])
def test_operators_pass_opcheck(backend):
    leaves = [x.requires_grad_() for x in make_inputs(1, 5, 1, 8, 8)]
    torch.library.opcheck(operators.bidirectional_gated_scan, (*leaves, 0.3, 16.0, backend))
    state = torch.randn(1, 1, 8, 8, requires_grad=True)
    for normalizer in (0.0, 16.0):
        torch.library.opcheck(operators.gated_scan, (*leaves[:4], state, 0.3, normalizer, True, backend))
    torch.library.opcheck(operators.gated_scan, (*leaves[:4], None, 0.3, 16.0, False, backend))


def test_compiles_without_graph_breaks():
    inputs = make_inputs(1, 20, 2, 8, 8)
    compiled = torch.compile(bidirectional_gated_scan, fullgraph=True, backend="aot_eager")
    check(lambda *x, backend: (compiled if backend == "native" else bidirectional_gated_scan)(*x), inputs, "native")


class _Scan(torch.nn.Module):
    def forward(self, *tensors):
        return bidirectional_gated_scan(*tensors, logit_normalizer=16.0)


@pytest.mark.parametrize("tokens", [1, 20, 203])
def test_exports_as_plain_operations(tokens):
    inputs = tuple(make_inputs(1, tokens, 2, 8, 8))
    program = torch.export.export(_Scan(), inputs)
    assert not any("gated_vision" in str(node.target) for node in program.graph.nodes)
    assert relative_error(program.module()(*inputs), _Scan()(*inputs)) < 2e-6


def test_exported_graphs_grow_with_the_logarithm_of_the_tokens():
    nodes = [len(torch.export.export(_Scan(), tuple(make_inputs(1, n, 1, 2, 2))).graph.nodes) for n in (256, 512, 1024)]
    assert nodes[2] - nodes[1] == nodes[1] - nodes[0] < 60


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_autocast_follows_the_values_and_rounds_no_sum(backend):
    inputs = make_inputs(1, 40, 2, 8, 8)
    expected = bidirectional_gated_scan(*(x.double() for x in inputs), backend="reference")
    weight = torch.randn(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(bidirectional_gated_scan(*inputs, backend=backend), expected) < 2e-6
        query, key, value = (x @ weight for x in inputs[:3])
        assert bidirectional_gated_scan(query, key, value, *inputs[3:], backend=backend).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": (1, 4, 2)}, r"query has shape \(1, 4, 2\); it must be \(batch, tokens, heads, key_dim\)"),
        ({"key": (1, 5, 2, 8)}, r"key has shape \(1, 5, 2, 8\).*must be \(1, 4, 2, 8\)"),
        ({"value": (1, 4, 3, 8)}, r"value has shape \(1, 4, 3, 8\)"),
        ({"log_decay_backward": (1, 4, 2, 7)}, r"log_decay_backward has shape"),
    ],
    ids=["query", "key", "value", "decay"],
)
def test_mismatched_shapes_are_named(changes, message):
    names = ("query", "key", "value", "log_decay_forward", "log_decay_backward")
    inputs = {name: -torch.rand(changes.get(name, (1, 4, 2, 8))) for name in names}
    with pytest.raises(ValueError, match=message):
        bidirectional_gated_scan(**inputs)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1e-3, "log_decay_forward holds 0.001; log decays must be <= 0"),
        (float("nan"), "log_decay_forward holds NaN"),
    ],
    ids=["positive", "nan"],
)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS, TRITON])
def test_impossible_decays_are_named(value, message, backend):
    inputs = make_inputs(1, 4, 1, 8, 8)
    inputs[3][0, 2, 0, 5] = value
    with pytest.raises(ValueError, match=message):
        bidirectional_gated_scan(*inputs, backend=backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("nan")}, "scale is NaN"),
        ({"logit_normalizer": 0.0}, "logit_normalizer is 0.0; it must be positive"),
        ({"logit_normalizer": -1.0}, "logit_normalizer is -1.0"),
        ({"logit_normalizer": float("inf")}, "logit_normalizer is inf"),
        ({"backend": "cuda"}, "backend is 'cuda'; valid backends are reference, torch, native, triton"),
    ],
    ids=["scale", "zero-normalizer", "negative-normalizer", "endless-normalizer", "backend"],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bidirectional_gated_scan(*make_inputs(1, 4, 1, 8, 8), **options)


def test_devices_must_agree():
    inputs = make_inputs(1, 4, 1, 8, 8)
    inputs[2] = inputs[2].to("meta")
    with pytest.raises(ValueError, match="value is on meta and query on cpu"):
        bidirectional_gated_scan(*inputs)
