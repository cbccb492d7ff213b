"""Linear attention with an image's convolution in its read-out, against the float64 definition."""

import pytest
import torch
from torch import Tensor

from kernels.linear_attention import linear_attention_with_convolution, operators
from tests.kernels.test_linear_attention import each_dtype, each_normalization, every_backend, restore_threads

__all__ = ["restore_threads"]

TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
NAMES = ("query", "key", "value", "x", "weight", "bias", "key_gate", "value_gate")
SMALL = {"grid": (4, 5), "before": 3}
CASES = {  # what differs from `inputs`
    "one pixel": {"grid": (1, 1), "before": 0},
    "no tokens before": {"grid": (9, 8), "before": 0},
    "head of 64": {"grid": (8, 32), "before": 64, "head_dim": 64, "value_dim": 64, "batch": 1, "heads": 2},
    "head of 96": {"grid": (7, 14), "before": 11, "head_dim": 96, "value_dim": 96},
    "odd dims": {"grid": (5, 9), "before": 2, "head_dim": 7, "value_dim": 33},
    "one channel": {"grid": (5, 9), "head_dim": 1, "value_dim": 1},
    "several ranges": {"grid": (35, 40), "before": 100, "batch": 1, "heads": 2},
    "as many heads as ranges": {"grid": (6, 7), "batch": 33, "heads": 2},
    "a column": {"grid": (130, 1)},
    "a row": {"grid": (1, 130)},
    "wider than a block": {"grid": (3, 100), "before": 5},
    "window over all": {"grid": (2, 2), "kernel": 9},
    "3 x 3": {"grid": (5, 9), "kernel": 3},
    "1 x 1": {"grid": (5, 9), "kernel": 1},
    "other number of keys": {"grid": (5, 9), "keys": 70},
    "no keys": {"grid": (5, 9), "keys": 0},
    "no image": {"grid": (0, 4), "before": 6},
    "no batch": {"grid": (4, 5), "batch": 0},
}


def inputs(
    grid: tuple[int, int],
    before: int = 3,
    head_dim: int = 8,
    value_dim: int = 6,
    batch: int = 2,
    heads: int = 3,
    kernel: int = 5,
    keys: int | None = None,
) -> dict[str, Tensor]:
    """All tensors, by their names."""
    queries, channels = before + grid[0] * grid[1], heads * value_dim
    keys = queries if keys is None else keys
    of_heads = ((queries, head_dim), (keys, head_dim), (keys, value_dim))
    shapes = (
        *((batch, tokens, heads, width) for tokens, width in of_heads),
        *((batch, queries, channels), (channels, 1, kernel, kernel), (channels,), (heads, keys), (1, keys)),
    )
    tensors = dict(zip(NAMES, (torch.randn(shape) for shape in shapes), strict=True))
    return tensors | {"weight": tensors["weight"] / kernel, "key_gate": torch.rand(heads, keys) + 0.5}


def attend(tensors: dict[str, Tensor | None], grid: tuple[int, int], **options) -> Tensor:
    return linear_attention_with_convolution(**tensors, grid=grid, **options)


def expected_of(tensors: dict[str, Tensor | None], grid: tuple[int, int], **options) -> Tensor:
    wide = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
    return attend(wide, grid, backend="reference", **options)


def check(tensors: dict[str, Tensor | None], grid: tuple[int, int], backend: str, **options) -> None:
    """Compare, without gradients, with the float64 reference on the same numbers."""
    with torch.no_grad():
        actual, expected = attend(tensors, grid, backend=backend, **options), expected_of(tensors, grid, **options)
    dtype = tensors["value"].dtype
    assert (actual.dtype, actual.shape) == (dtype, expected.shape)
    if expected.numel():
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        roundings = 1 if backend == "native" else 3  # the plain form rounds both operations and their sum
        assert error < roundings * TOLERANCES[dtype]


@each_dtype
@pytest.mark.parametrize("backend", ["native", "torch"])
@each_normalization
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values(case, normalization, backend, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in inputs(**case).items()}
    check(tensors, case["grid"], backend, normalization=normalization)
    without = tensors | {"bias": None, "key_gate": None, "value_gate": None}
    check(without, case["grid"], backend, normalization=normalization)


def test_definition_by_hand():
    """One head of one channel, so that attention by division among equal keys is the mean of the values."""
    value, x = torch.arange(5.0).view(1, 5, 1, 1), torch.tensor([9.0, 1, 2, 3, 4]).view(1, 5, 1)
    ones, weight = torch.ones(1, 5, 1, 1), torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 2], weight[0, 0, 0, 1] = 10, 100  # the pixel on the right, the pixel above
    expected = torch.tensor([2.0, 2 + 20, 2, 2 + 40 + 100, 2 + 200]).view(1, 5, 1)
    for backend in ("native", "torch", "reference"):
        with torch.no_grad():
            output = linear_attention_with_convolution(ones, ones, value, x, weight, grid=(2, 2), backend=backend)
        torch.testing.assert_close(output, expected)


@each_dtype
@every_backend
def test_strided_inputs(dtype, backend):
    """A slice of a fused projection; channels and tokens of wider or transposed memory; an expanded bias."""
    tensors = {name: tensor.to(dtype) for name, tensor in inputs((5, 9), head_dim=6).items()}
    query, key, value = torch.randn(2, 48, 3, 3, 6).to(dtype).unbind(2)
    x = torch.randn(2, 50, 24).to(dtype)[:, 1:-1, 4:22]
    weight = tensors["weight"].permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    bias = torch.randn(1).to(dtype).expand(18)
    tensors |= {"query": query, "key": key, "value": value, "x": x, "weight": weight, "bias": bias}
    check(tensors, (5, 9), backend)
    check(tensors | {"x": x.transpose(1, 2).contiguous().transpose(1, 2)}, (5, 9), backend)
    check(tensors | {"x": x[:1].expand(2, -1, -1)}, (5, 9), backend)


@every_backend
def test_dtypes_may_differ_and_the_output_has_that_of_the_values(backend):
    tensors = inputs(**SMALL)
    for dtypes in ({"value": torch.bfloat16}, {"x": torch.bfloat16, "weight": torch.float64}, {"bias": torch.float16}):
        mixed = tensors | {name: tensors[name].to(dtype) for name, dtype in dtypes.items()}
        with torch.no_grad():
            output, expected = attend(mixed, (4, 5), backend=backend), expected_of(mixed, (4, 5))
        assert output.dtype == mixed["value"].dtype
        torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=3e-2)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_float16_inputs(backend):
    check({name: tensor.half() for name, tensor in inputs(**SMALL).items()}, (4, 5), backend)


@every_backend
def test_nan_of_a_pixel_spreads_over_its_window_only(backend):
    tensors = inputs((9, 11))
    tensors["x"][1, 3 + 4 * 11 + 2, 7] = torch.nan
    expected = torch.zeros(2, 102, 18, dtype=torch.bool)
    expected[1, 3:, 7].view(9, 11)[2:7, :5] = True
    with torch.no_grad():
        assert torch.equal(attend(tensors, (9, 11), backend=backend).isnan(), expected)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("case", [CASES["several ranges"], CASES["as many heads as ranges"]], ids=["ranges", "heads"])
def test_any_thread_count_gives_the_same_bits(case):
    tensors, runs = inputs(**case), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        with torch.no_grad():
            runs.append(attend(tensors, case["grid"]))
    assert all(torch.equal(runs[0], run) for run in runs[1:])


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_gradients(backend):
    """Those of the two operations, one after the other."""
    tensors = {name: tensor.double().requires_grad_() for name, tensor in inputs(**SMALL).items()}
    grad = torch.randn(2, 23, 18, dtype=torch.float64)
    leaves = list(tensors.values())
    actual, expected = (
        torch.autograd.grad(attend(tensors, (4, 5), backend=name), leaves, grad) for name in (backend, "reference")
    )
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() < 1e-10 * e.abs().max()


@each_normalization
@pytest.mark.parametrize("absent", [(), ("bias",), ("bias", "key_gate", "value_gate")], ids=str)
def test_the_operator_passes_opcheck(absent, normalization):
    tensors = inputs(**SMALL) | dict.fromkeys(absent)
    names = ("query", "key", "value", "key_gate", "value_gate", "x", "weight", "bias")
    arguments = (*(tensors[name] for name in names), 4, 5, "relu", normalization, 1e-6)
    torch.library.opcheck(operators.linear_attention_with_convolution, arguments)


def test_compiles_without_graph_breaks():
    torch.compiler.reset()
    tensors = inputs(**SMALL)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(tensors, (4, 5)), attend(tensors, (4, 5)))
    torch.testing.assert_close(compiled(tensors, (4, 5)), attend(tensors, (4, 5)))


class _Attention(torch.nn.Module):
    def forward(self, *tensors):
        return attend(dict(zip(NAMES, tensors, strict=True)), (4, 5))


def test_exports_as_plain_operations():
    tensors = inputs(**SMALL)
    with torch.no_grad():
        program = torch.export.export(_Attention(), tuple(tensors.values()))
        assert not any("gated_vision" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(*tensors.values()), attend(tensors, (4, 5)))


def test_autocast_rounds_no_sum():
    tensors = inputs(**SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(tensors, (4, 5), "native")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.ones(2, 5, 8)}, r"query has shape \(2, 5, 8\)"),
        ({"x": torch.ones(2, 22, 18)}, r"x has shape \(2, 22, 18\); with query .* it must be \(2, 23, 18\)"),
        ({"x": torch.ones(2, 23, 3, 6)}, r"x has shape \(2, 23, 3, 6\)"),
        ({"x": torch.ones(2, 23, 18, dtype=torch.int32)}, "x has dtype torch.int32; it must be a floating-point"),
        ({"x": torch.ones(2, 23, 18, device="meta")}, "x is on meta and query on cpu"),
        ({"weight": torch.ones(18, 1, 4, 4)}, r"weight has shape \(18, 1, 4, 4\); .* with K odd"),
        ({"weight": torch.ones(18, 1, 3, 5)}, r"weight has shape \(18, 1, 3, 5\); with .* it must be \(18, 1, 5, 5\)"),
        ({"weight": torch.ones(6, 1, 5, 5)}, r"weight has shape \(6, 1, 5, 5\)"),
        ({"weight": torch.tensor(1.0)}, r"weight has shape \(\)"),
        ({"bias": torch.ones(6)}, r"bias has shape \(6,\); with .* it must be \(18,\)"),
        ({"bias": torch.ones(18, device="meta")}, "bias is on meta"),
        ({"grid": (4, 6)}, r"grid is \(4, 6\); it must be \(rows, columns\) of at most 23 pixels"),
        ({"grid": (-1, -1)}, r"grid is \(-1, -1\)"),
        ({"grid": (4,)}, r"grid is \(4,\)"),
        ({"normalization": "sum"}, "normalization is 'sum'"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_does_not_fit_is_named(changes, message):
    arguments = {**inputs(**SMALL), "grid": (4, 5)} | changes
    with pytest.raises(ValueError, match=message):
        linear_attention_with_convolution(**arguments)
