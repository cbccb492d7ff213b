"""Window retention in every backend against the float64 definition (Triton's has its own file), and the operators.

What the definition itself must satisfy is in `test_window_retention_definition.py`.
"""

import pytest
import torch

from kernels.window_retention import operators, window_retention
from kernels.window_retention.arguments import Settings
from tests.kernels.retention_cases import (
    CHANNELS,
    EXTREME_DECAYS,
    LARGE_MAPS,
    MAPS,
    ODD_CHANNELS,
    OPTIONS,
    TOLERANCES,
    Case,
    arguments,
    check,
    compare,
    make_inputs,
    outputs_and_gradients,
    strided_views,
)

BACKENDS = ("torch", "native")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SMALL = Case((5, 7), (3, 4), (2, 1), 2, 3, 8, 6)
TINY = Case((2, 3), (2, 2), (1, 1), 1, 2, 2, 3)
BOTH = ("softmax", "sigmoid-clamp-slopes")

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
both_activations = pytest.mark.parametrize("options", [OPTIONS[name] for name in BOTH], ids=BOTH)


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tiny_settings(**changes) -> Settings:
    kept = {"normalization": "clamp", "rotary": True, "signed_slopes": False, "activation": "softmax", "slopes": ()}
    made = kept | arguments(TINY, changes)
    sequences = {name: tuple(made[name]) for name in ("log_decay", "slopes", "window", "shift")}
    return Settings(**made | sequences, scale=0.5)


@each_dtype
@each_backend
@both_activations
@pytest.mark.parametrize("case", [*MAPS, *LARGE_MAPS], ids=str)
def test_maps(case, options, backend, dtype):
    check(make_inputs(case), backend, dtype, **arguments(case, options))


@each_dtype
@each_backend
@each_option
def test_options(options, backend, dtype):
    check(make_inputs(SMALL), backend, dtype, **arguments(SMALL, options))


@each_dtype
@each_backend
@both_activations
@pytest.mark.parametrize(
    ("case", "rotary"),
    [*[(case, True) for case in CHANNELS], *[(case, False) for case in ODD_CHANNELS]],
    ids=lambda value: f"d{value.head_dim}-v{value.value_dim}" if isinstance(value, Case) else "",
)
def test_channels(case, rotary, options, backend, dtype):
    check(make_inputs(case), backend, dtype, **arguments(case, options), rotary=rotary)


@each_backend
@pytest.mark.parametrize("shift", [(down, right) for down in range(3) for right in range(4)], ids=str)
def test_shifts(shift, backend):
    case = Case((5, 7), (3, 4), shift, 1, 1, 4, 4)
    check(make_inputs(case), backend, torch.float64, **arguments(case, {}))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["softmax", "sigmoid-clamp", "sigmoid-sum", "sigmoid-none-signed"])
@pytest.mark.parametrize("decay", EXTREME_DECAYS)
def test_extreme_decays(decay, name, dtype, backend):
    case = Case((14, 14), (7, 7), (3, 3), 1)
    check(make_inputs(case), backend, dtype, **arguments(case, OPTIONS[name] | {"log_decay": [decay] * case.heads}))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@each_option
def test_extreme_scores_stay_finite(options, backend):
    query, key, value = make_inputs(SMALL)
    results = outputs_and_gradients(
        [100 * query, 100 * key, value], torch.float32, backend, **arguments(SMALL, options)
    )
    assert all(tensor.isfinite().all() for tensor in results)
    assert results[0].abs().max() > 0.1


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["query", "key", "value"])
@both_activations
def test_nan_stays_nan_where_it_reaches(options, place, backend):
    case = Case((4, 6), (2, 3), batch=1, heads=1)
    inputs = make_inputs(case)
    inputs[place][0, 1, 2, 0, 0] = torch.nan
    output = window_retention(*inputs, backend=backend, **arguments(case, options))
    reached = torch.zeros(4, 6, dtype=torch.bool)
    # A query spoils its token, then that token's column; a key or a value its whole window.
    reached[:2, 2 if place == 0 else slice(0, 3)] = True
    spoilt = output.isnan().any(-1)[0, :, :, 0]
    if backend == "torch":  # its weights of zero, for all pairs of the window, spread it further
        assert spoilt[reached].all()
    else:
        assert torch.equal(spoilt, reached)


@each_backend
@each_dtype
def test_strided_and_broadcast_inputs(dtype, backend):
    case = Case((9, 10), (4, 5), (2, 3), 2, 3, 8, 8)
    options = arguments(case, {})
    views = strided_views(case, dtype)
    assert not any(x.is_contiguous() for x in views)
    check(views, backend, dtype, **options)
    leaves = [x.detach().requires_grad_() for x in views]
    copies = [x.detach().contiguous().requires_grad_() for x in views]
    grad = torch.randn(2, 9, 10, 3, 1, dtype=dtype).expand(2, 9, 10, 3, 8)
    of_views = torch.autograd.grad(window_retention(*leaves, backend=backend, **options), leaves, grad)
    of_copies = torch.autograd.grad(window_retention(*copies, backend=backend, **options), copies, grad.contiguous())
    if backend == "native":
        assert all(torch.equal(a, b) for a, b in zip(of_views, of_copies, strict=True))
    compare([of_views[0], *of_views], [of_copies[0], *of_copies], (TOLERANCES[dtype][1],) * 2)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    "shape",
    [
        (0, 4, 4, 2, 8, 4), (2, 0, 4, 2, 8, 4), (2, 4, 0, 2, 8, 4), (2, 4, 4, 0, 8, 4), (2, 4, 4, 2, 8, 0),
        (2, 4, 4, 2, 0, 4),
    ],
    ids=["no-batch", "no-rows", "no-columns", "no-heads", "no-values", "no-channels"],
)  # fmt: skip
def test_nothing_to_attend(shape, backend):
    *sizes, heads, head_dim, value_dim = shape
    inputs = [torch.randn(*sizes, heads, channels) for channels in (head_dim, head_dim, value_dim)]
    check(inputs, backend, log_decay=[-0.5] * heads, window=(1, 1) if 0 in sizes[1:] else (2, 2))


@each_backend
def test_float16_inputs(backend):
    check(make_inputs(SMALL), backend, torch.float16, **arguments(SMALL, {}))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_dtypes_may_differ_and_the_output_has_that_of_the_values(backend):
    query, key, value = make_inputs(SMALL)
    options = arguments(SMALL, {"backend": backend})
    leaves = [x.requires_grad_() for x in (query.double(), key.bfloat16(), value)]
    output = window_retention(*leaves, **options)
    assert output.dtype == torch.float32
    expected = window_retention(*(x.double() for x in leaves), **arguments(SMALL, {"backend": "reference"}))
    compare([output], [expected], (1e-7, 0))
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert [g.dtype for g in gradients] == [torch.float64, torch.bfloat16, torch.float32]


@pytest.mark.usefixtures("restore_threads")
@both_activations
@pytest.mark.parametrize(
    "case", [Case((9, 10), (4, 5), (2, 3), 3, 3), Case((9, 10), (9, 10), batch=1, heads=2)], ids=str
)
def test_any_thread_count_gives_the_same_bits(case, options):
    inputs = make_inputs(case)
    runs = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        runs.append(outputs_and_gradients(inputs, torch.float32, "native", **arguments(case, options)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@each_backend
def test_batch_position_does_not_matter(backend):
    case = Case((9, 10), (4, 5), (2, 3), 5, 2)
    inputs = make_inputs(case)
    whole = window_retention(*inputs, **arguments(case, {"backend": backend}))
    for i in (0, 2, 4):
        one = window_retention(*(x[i : i + 1] for x in inputs), **arguments(case, {"backend": backend}))
        compare([one], [whole[i : i + 1]], (1e-6, 0))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@each_option
def test_gradcheck(options, backend):
    inputs = [x.double().requires_grad_() for x in make_inputs(TINY)]
    options = arguments(TINY, options)
    assert torch.autograd.gradcheck(lambda *x: window_retention(*x, backend=backend, **options), inputs)


@pytest.mark.parametrize("name", ["softmax", "sigmoid-clamp-signed", "sigmoid-none"])
def test_operators_pass_opcheck(name):
    options = tiny_settings(**OPTIONS[name]).as_arguments()
    leaves = [x.requires_grad_() for x in make_inputs(TINY)]
    torch.library.opcheck(operators.window_retention, (*leaves, *options, "native"))
    inputs = [x.detach() for x in leaves]
    torch.library.opcheck(
        operators.window_retention_backward, (torch.randn_like(inputs[2]), *inputs, *options, "native")
    )


def test_compiles_without_graph_breaks():
    inputs = make_inputs(SMALL)
    options = arguments(SMALL, OPTIONS["sigmoid-clamp-slopes"])
    compiled = torch.compile(window_retention, fullgraph=True, backend="aot_eager")
    leaves, copies = ([x.detach().clone().requires_grad_() for x in inputs] for _ in range(2))
    output, expected = compiled(*leaves, **options), window_retention(*copies, **options)
    assert torch.equal(output, expected)
    for a, b in zip(
        torch.autograd.grad(output.sum(), leaves), torch.autograd.grad(expected.sum(), copies), strict=True
    ):
        assert torch.equal(a, b)


class _Retention(torch.nn.Module):
    def forward(self, *tensors):
        return window_retention(*tensors, **arguments(SMALL, {}))


def test_exports_as_plain_operations():
    inputs = tuple(make_inputs(SMALL))
    program = torch.export.export(_Retention(), inputs)
    assert not any("gated_vision" in str(node.target) for node in program.graph.nodes)
    compare([program.module()(*inputs)], [_Retention()(*inputs)], TOLERANCES[torch.float32])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast_follows_the_values_and_rounds_no_sum(backend):
    inputs = make_inputs(SMALL)
    options = arguments(SMALL, {})
    expected = window_retention(*(x.double() for x in inputs), backend="reference", **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare([window_retention(*inputs, backend=backend, **options)], [expected], TOLERANCES[torch.float32])
        query, key = (x @ torch.randn(8, 8) for x in inputs[:2])
        value = inputs[2] @ torch.randn(6, 6)
        assert window_retention(query, key, value, backend=backend, **options).dtype == torch.bfloat16
