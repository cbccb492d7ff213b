"""Linear attention in every backend against the float64 definition (Triton's has its own file), and the operators."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels.linear_attention import linear_attention, operators

BACKENDS = ("torch", "native")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# (output, gradients), of the largest absolute value of each tensor
TOLERANCES = {
    torch.float64: (1e-11, 1e-10),
    torch.float32: (5e-6, 3e-5),
    torch.bfloat16: (4e-3, 8e-3),
    torch.float16: (5e-4, 1e-3),
}


@dataclass(frozen=True)
class Case:
    """One size; `gates` are those of the keys and of the values: "" for none, "heads" or "shared"."""

    queries: int = 5
    keys: int = 7
    head_dim: int = 8
    value_dim: int = 6
    gates: tuple[str, str] = ("heads", "shared")
    batch: int = 2
    heads: int = 3

    def __str__(self) -> str:
        """For the ids of tests."""
        gates = "-".join(gate or "none" for gate in self.gates)
        return f"m{self.queries}-n{self.keys}-b{self.batch}-h{self.heads}-d{self.head_dim}-v{self.value_dim}-{gates}"

    def inputs(self) -> list[Tensor | None]:
        """Query, key, value and the gates: of the keys positive, of the values of either sign."""
        batch, heads = self.batch, self.heads
        sizes = ((self.queries, self.head_dim), (self.keys, self.head_dim), (self.keys, self.value_dim))
        tensors = [torch.randn(batch, tokens, heads, width) for tokens, width in sizes]
        rows = [{"": 0, "heads": heads, "shared": 1}[gate] for gate in self.gates]
        key_gate = torch.rand(rows[0], self.keys) + 0.5 if rows[0] else None
        return [*tensors, key_gate, torch.randn(rows[1], self.keys) if rows[1] else None]


SMALL = Case()
TOKENS = [
    *(Case(n, n, 16, 16) for n in (1, 2, 63, 65, 197)),
    Case(1, 130), Case(65, 3), Case(700, 1300, 16, 16, batch=1, heads=2), Case(1, 1100, batch=1, heads=1),
    Case(3000, 40, batch=1, heads=1), Case(20, 20, 32, 32, batch=30),
]  # fmt: skip
DIMS = [Case(9, 70, d, v) for d, v in ((1, 1), (7, 7), (32, 32), (64, 64), (96, 96), (1, 5), (16, 33), (130, 4))]
GATES = [replace(SMALL, gates=(k, v)) for k in ("", "heads", "shared") for v in ("", "heads", "shared")]

each_backend = pytest.mark.parametrize("backend", BACKENDS)
every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_normalization = pytest.mark.parametrize("normalization", ["division", "subtraction"])


def attend(inputs: list[Tensor | None], **options) -> Tensor:
    query, key, value, key_gate, value_gate = inputs
    return linear_attention(query, key, value, key_gate=key_gate, value_gate=value_gate, **options)


def outputs_and_gradients(inputs: list[Tensor | None], dtype: torch.dtype, backend: str, **options) -> list[Tensor]:
    """Output and the gradients of all tensors in `dtype`, against the same random tensor each time."""
    leaves = [x if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    output = attend(leaves, backend=backend, **options)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # exact in every dtype
    return [output.detach(), *torch.autograd.grad(output, [x for x in leaves if x is not None], grad.to(output.dtype))]


def compare(actual: list[Tensor], expected: list[Tensor], tolerances: tuple[float, float]) -> None:
    """Compare output and gradients, each by its largest absolute value."""
    largest = max((g.abs().max().item() for g in expected[1:] if g.numel()), default=0.0)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        if e.numel():
            # One key's weight is 1 whatever the query: gradients that cancel are compared with the others' size.
            scale = max(e.abs().max().item(), 0.1 * largest if i else 0.0, 1e-30)
            error = (a.double() - e.double()).abs().max().item() / scale
            assert error < tolerances[i > 0], f"tensor {i} of {len(expected)}: {error:.1e}"


def check(inputs: list[Tensor | None], backend: str, dtype: torch.dtype = torch.float32, **options) -> None:
    """Compare output and every gradient of `backend` in `dtype` with the float64 reference on the same numbers."""
    inputs = [x if x is None else x.to(dtype) for x in inputs]
    expected = outputs_and_gradients(inputs, torch.float64, "reference", **options)
    actual = outputs_and_gradients(inputs, dtype, backend, **options)
    assert all(tensor.dtype == dtype for tensor in actual)
    compare(actual, expected, TOLERANCES[dtype])


def strided_inputs(tokens: int = 70, width: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """None contiguous: a slice of a fused projection, permuted, expanded; transposed and expanded gates."""
    fused = torch.randn(2, tokens, 3, 3, width).to(dtype)
    permuted = torch.randn(2, 3, width, tokens).to(dtype).permute(0, 3, 1, 2)
    expanded = torch.randn(1, tokens, 1, width).to(dtype).expand(2, tokens, 3, width)
    gates = torch.rand(tokens, 3).to(dtype).T, torch.randn(1, tokens).to(dtype).expand(3, tokens)
    return [fused[:, :, 1], permuted, expanded, *gates]


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_definition_by_hand():
    """Two keys, one head, one channel: plain numbers."""
    query, key, value = (
        torch.tensor(x, dtype=torch.float64).view(1, -1, 1, 1) for x in ([2.0], [3.0, -1.0], [5.0, 7.0])
    )
    gates = [torch.tensor([x], dtype=torch.float64) for x in ([0.5, 2.0], [1.0, -1.0])]
    eps = 1e-3
    weights = [(2 + eps) * 0.5 * (3 + eps), (2 + eps) * 2 * eps]
    divided = (weights[0] * 5 - weights[1] * 7) / (sum(weights) + 2 * eps)
    actual = attend([query, key, value, *gates], eps=eps, backend="reference").item()
    assert math.isclose(actual, divided, rel_tol=1e-12)
    subtracted = 0.5 * (2 * 1.5) * 5 + (1 - 0.5 * 3) * (5 - 7) / 2
    actual = attend([query, key, value, *gates], normalization="subtraction", backend="reference").item()
    assert math.isclose(actual, subtracted, rel_tol=1e-12)


@each_dtype
@each_backend
@each_normalization
@pytest.mark.parametrize("case", TOKENS, ids=str)
def test_tokens(case, normalization, backend, dtype):
    check(case.inputs(), backend, dtype, normalization=normalization)


@each_dtype
@each_backend
@each_normalization
@pytest.mark.parametrize("case", DIMS, ids=str)
def test_dims(case, normalization, backend, dtype):
    check(case.inputs(), backend, dtype, normalization=normalization)


@each_dtype
@each_backend
@each_normalization
@pytest.mark.parametrize("case", GATES, ids=str)
def test_gates(case, normalization, backend, dtype):
    check(case.inputs(), backend, dtype, normalization=normalization)


@each_backend
@each_normalization
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_mapped_already(dtype, normalization, backend):
    query, key, *others = SMALL.inputs()
    check([query.exp(), key.exp(), *others], backend, dtype, normalization=normalization, feature_map=None)
    check([query, key, *others], backend, torch.float64, normalization=normalization, feature_map=None)


@each_backend
@each_normalization
def test_negative_gates(normalization, backend):
    *tensors, key_gate, value_gate = replace(SMALL, keys=65, gates=("heads", "heads")).inputs()
    key_gate[:, ::3] *= -1
    check([*tensors, key_gate, value_gate], backend, torch.float64, normalization=normalization)


@each_backend
@each_normalization
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_eps(eps, normalization, backend):
    check(SMALL.inputs(), backend, normalization=normalization, eps=eps)


@each_backend
@each_normalization
@pytest.mark.parametrize("kind", ["large", "zeros", "negative-keys", "negative-queries", "tiny"])
def test_extreme_values(kind, normalization, backend):
    query, key, value, *gates = SMALL.inputs()
    if kind == "large":
        query, key, value = (x * 1e4 for x in (query, key, value))
    elif kind == "zeros":
        query, key, value = (torch.zeros_like(x) for x in (query, key, value))
    elif kind == "negative-keys":
        key = -key.abs()
    elif kind == "negative-queries":
        query = -query.abs()
    else:
        query, key = query * 1e-8, key * 1e-8
    check([query, key, value, *gates], backend, normalization=normalization)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["query", "key", "value"])
@every_backend
def test_nan_stays_nan(backend, place):
    inputs = SMALL.inputs()
    inputs[place][0, 2, 1, 3] = torch.nan
    spoilt = attend(inputs, backend=backend).isnan()
    expected = torch.zeros_like(spoilt)
    expected[0, 2 if place == 0 else slice(None), 1, 3 if place == 2 else slice(None)] = True
    assert torch.equal(spoilt, expected)


@each_backend
@each_dtype
def test_strided_and_broadcast_inputs(dtype, backend):
    views = strided_inputs(dtype=dtype)
    assert not any(x.is_contiguous() for x in views)
    check(views, backend, dtype)
    query, key, value = torch.randn(2, 70, 3, 3, 16).to(dtype).unbind(2)
    check([query, key, value, *views[3:]], backend, dtype)
    check([x.transpose(1, 2) for x in (query[:, :3], key[:, :3], value[:, :3])] + [None, None], backend, dtype)


@every_backend
@each_normalization
@pytest.mark.parametrize("name", ["batch", "queries", "keys", "heads", "head_dim", "value_dim"])
def test_empty(name, normalization, backend):
    inputs = replace(SMALL, **{name: 0}, gates=("", "shared")).inputs()
    check(inputs, backend, normalization=normalization)
    if name == "keys":
        assert torch.equal(attend(inputs, backend=backend), torch.zeros(2, 5, 3, 6))


@each_backend
def test_float16_inputs(backend):
    check(SMALL.inputs(), backend, torch.float16)


@every_backend
def test_dtypes_may_differ_and_the_output_has_that_of_the_values(backend):
    query, key, value, key_gate, value_gate = SMALL.inputs()
    inputs = [query.bfloat16(), key, value.bfloat16(), key_gate, value_gate.double()]
    leaves = [x.requires_grad_() for x in inputs]
    output = attend(leaves, backend=backend)
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output.float().sum(), leaves)
    assert [g.dtype for g in gradients] == [x.dtype for x in inputs]
    compare([output], [attend([x.double() for x in leaves], backend="reference")], (4e-3, 0))


@pytest.mark.usefixtures("restore_threads")
@each_normalization
@pytest.mark.parametrize("case", [Case(700, 1300, 64, 64, batch=1, heads=2), Case(65, 65, 32, 32, batch=5)], ids=str)
def test_any_thread_count_gives_the_same_bits(case, normalization):
    inputs, runs = case.inputs(), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        runs.append(outputs_and_gradients(inputs, torch.float32, "native", normalization=normalization))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@every_backend
@each_normalization
@pytest.mark.parametrize("feature_map", ["relu", None])
def test_gradcheck(feature_map, normalization, backend):
    inputs = Case(2, 3, 2, 3, batch=2, heads=2).inputs()
    inputs[:2] = [x.abs() + 0.1 if feature_map is None else x for x in inputs[:2]]
    leaves = [x.double().requires_grad_() for x in inputs]
    options = {"normalization": normalization, "feature_map": feature_map, "backend": backend}
    assert torch.autograd.gradcheck(lambda *x: attend(list(x), **options), leaves)


def test_derivative_of_relu_at_zero_is_zero():
    for backend in BACKENDS:
        query, key, value = (torch.zeros(1, 2, 1, 3, requires_grad=True) for _ in range(3))
        output = linear_attention(query, key, value + 1, backend=backend)
        assert not any(g.any() for g in torch.autograd.grad(output.sum(), (query, key)))


@each_normalization
@pytest.mark.parametrize("gates", [("heads", "shared"), ("", "heads"), ("", "")], ids=str)
def test_operators_pass_opcheck(gates, normalization):
    leaves = [x if x is None else x.requires_grad_() for x in replace(SMALL, gates=gates).inputs()]
    options = ("relu", normalization, 1e-6, "native")
    torch.library.opcheck(operators.linear_attention, (*leaves, *options))
    inputs = [x if x is None else x.detach() for x in leaves]
    output, state, sums = operators.linear_attention(*inputs, *options)
    backward = (torch.randn_like(output), state, sums, *inputs, *options)
    torch.library.opcheck(operators.linear_attention_backward, backward)


def test_compiles_without_graph_breaks():
    inputs = SMALL.inputs()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    leaves, copies = ([x.detach().clone().requires_grad_() for x in inputs] for _ in range(2))
    output, expected = compiled(leaves), attend(copies)
    assert torch.equal(output, expected)
    gradients = (torch.autograd.grad(y.sum(), x) for y, x in ((output, leaves), (expected, copies)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class _Attention(torch.nn.Module):
    def forward(self, *tensors):
        return attend(list(tensors))


def test_exports_as_plain_operations_for_any_number_of_tokens():
    inputs = tuple(SMALL.inputs())
    queries, keys = torch.export.Dim("queries"), torch.export.Dim("keys")
    shapes = (({1: queries}, {1: keys}, {1: keys}, {1: keys}, {1: keys}),)
    program = torch.export.export(_Attention(), inputs, dynamic_shapes=shapes)
    assert not any("gated_vision" in str(node.target) for node in program.graph.nodes)
    others = replace(SMALL, queries=11, keys=13).inputs()
    compare([program.module()(*others)], [attend(others)], TOLERANCES[torch.float32])


@every_backend
def test_autocast_follows_the_values_and_rounds_no_sum(backend):
    inputs = SMALL.inputs()
    expected = attend([x.double() for x in inputs], backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare([attend(inputs, backend=backend)], [expected], TOLERANCES[torch.float32])
        value = inputs[2] @ torch.randn(6, 6)
        assert attend([*inputs[:2], value, *inputs[3:]], backend=backend).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.ones(2, 5, 8)}, r"query has shape \(2, 5, 8\); it must be \(batch, queries, heads, .*\)"),
        ({"key": torch.ones(2, 7, 3, 9)}, r"key has shape \(2, 7, 3, 9\); with query .* it must be \(2, 7, 3, 8\)"),
        ({"value": torch.ones(2, 6, 3, 6)}, r"value has shape \(2, 6, 3, 6\); with key .* it must be \(2, 7, 3, 6\)"),
        ({"key_gate": torch.ones(2, 7)}, r"key_gate has shape \(2, 7\); .* \(3, 7\), or \(1, 7\) for all heads"),
        ({"value_gate": torch.ones(7)}, r"value_gate has shape \(7,\)"),
        ({"value_gate": torch.ones(1, 7, device="meta")}, "value_gate is on meta and query on cpu"),
        ({"query": torch.ones(2, 5, 3, 8, dtype=torch.int64)}, "query has dtype torch.int64"),
        ({"feature_map": "elu"}, "feature_map is 'elu'; valid are 'relu', None"),
        ({"normalization": "sum"}, "normalization is 'sum'; valid are 'division', 'subtraction'"),
        ({"eps": 0.0}, "eps is 0.0; it must be positive and finite"),
        ({"eps": math.nan}, "eps is nan"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_does_not_fit_is_named(changes, message):
    names = ("query", "key", "value", "key_gate", "value_gate")
    arguments = dict(zip(names, SMALL.inputs(), strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments)
