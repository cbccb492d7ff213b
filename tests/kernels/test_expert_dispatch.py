"""Expert dispatch in every backend: Switch-NeRF's routing and gradients, the definition, the operators."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from kernels.expert_dispatch import (
    Routing,
    assign,
    combine,
    dispatch,
    grouped,
    grouped_linear,
    load_balance_loss,
    load_importance_loss,
    operators,
    reference,
    route,
)

GOLDEN_FILE = Path(__file__).parent.parent / "golden" / "nerf" / "switchnerf_moe_gate.safetensors"
GOLDEN = load_file(GOLDEN_FILE)
GOLDEN_CASES = sorted({key.rpartition(".")[0] for key in GOLDEN if "_bpr" in key})
BACKENDS = ("torch", "native")
DTYPES = (torch.float64, torch.float32)
SIZES = (0, 1, 2, 63, 65, 197)
CAPACITY_FACTORS = (0.0, 1.0, 1.25, 0.4, -1.0, -0.5)
PLACES = ("locations", "positions", "order", "starts", "loads", "capacity")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}

each_backend = pytest.mark.parametrize("backend", BACKENDS)
every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def mixture(tokens: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One linear expert each."""
    dispatched = dispatch(tokens, routing)
    return combine(grouped_linear(dispatched.tokens, weight, bias, dispatched.starts), dispatched)


@pytest.mark.parametrize("case", GOLDEN_CASES)
@every_backend
def test_routing_of_the_authors_code(case, backend):
    group, _, options = case.partition(".")
    choices, factor, prioritized = (part.lstrip("kcfbpr") for part in options.split("_"))
    of_group = {key.split(".")[1]: x for key, x in GOLDEN.items() if key.startswith(f"{group}.") and "_bpr" not in key}
    golden = {key.rpartition(".")[2]: x for key, x in GOLDEN.items() if key.startswith(f"{case}.")}
    logits, x, weight = (of_group[name].clone().requires_grad_() for name in ("logits", "x", "expert_weight"))
    routing = route(
        logits,
        experts_per_token=int(choices),
        capacity_factor=float(factor),
        batch_prioritized=prioritized == "1",
        backend=backend,
    )
    for name in ("indices", "locations", "capacity"):
        assert torch.equal(getattr(routing, name), golden[name].long()), name
    assert routing.dropped == (golden["locations"] >= golden["capacity"]).sum()
    torch.testing.assert_close(routing.gates, golden["gates"], rtol=0, atol=1e-6)
    balance = load_balance_loss(routing.probabilities, routing.indices[0])
    torch.testing.assert_close(balance, golden["l_aux"], rtol=0, atol=1e-6)
    if "out" not in golden:
        return
    output = mixture(x, routing, weight, of_group["expert_bias"].squeeze(1))
    torch.testing.assert_close(output, golden["out"], rtol=0, atol=1e-5)
    gradients = torch.autograd.grad((output * of_group["grad_out"]).sum() + balance, (logits, x, weight))
    for name, gradient in zip(("grad_logits", "grad_x", "grad_weight"), gradients, strict=True):
        if name in golden:
            torch.testing.assert_close(gradient, golden[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", ["g0", "g1"])
def test_load_and_importance_of_the_authors_code(group):
    logits = GOLDEN[f"{group}.logits"]
    loss = load_importance_loss(logits, logits.amax(1), 0.5)
    torch.testing.assert_close(loss, GOLDEN[f"{group}.load_importance_loss_noise0.5"], rtol=0, atol=1e-6)


@every_backend
def test_layer_of_the_authors_code(backend):
    """Experts are three layers with an additive skip; the gate sees an input of its own."""
    golden = {key.removeprefix("moelayer."): x for key, x in GOLDEN.items() if key.startswith("moelayer.")}
    with safe_open(GOLDEN_FILE, "pt") as file:
        settings = json.loads(file.metadata()["moelayer"])
    parameters = {
        key.removeprefix("param."): x.clone().requires_grad_() for key, x in golden.items() if key.startswith("param.")
    }
    x, gate_input = (golden[name].clone().requires_grad_() for name in ("x", "gate_input"))
    routing = route(gate_input @ parameters["gates.0.wg.weight"].T, backend=backend)
    dispatched = dispatch(x, routing)

    def stacked(layer: int, name: str) -> Tensor:
        return torch.stack([parameters[f"experts.0.experts.{e}.layers.{layer}.{name}"] for e in range(settings["E"])])

    hidden = residual = dispatched.tokens
    for layer in range(settings["layer_num"]):
        weight = stacked(layer, "weight").transpose(1, 2)
        hidden = grouped_linear(hidden, weight, stacked(layer, "bias"), dispatched.starts)
        if layer in settings["skips"]:
            hidden = hidden + residual
        if layer < settings["layer_num"] - 1:
            hidden = hidden.relu()
        residual = hidden if layer in settings["skips"] else residual
    output = combine(hidden, dispatched)
    torch.testing.assert_close(output, golden["out"], rtol=0, atol=1e-5)
    leaves = {"grad_x": x, "grad_gate_input": gate_input, **{f"grad.{key}": leaf for key, leaf in parameters.items()}}
    gradients = torch.autograd.grad(output, list(leaves.values()), golden["grad_out"])
    for name, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(gradient, golden[name], rtol=1e-5, atol=1e-5)


def check_same_routing(actual: Routing, expected: Routing, dtype: torch.dtype) -> None:
    assert torch.equal(actual.indices, expected.indices)
    for name in PLACES:
        a, e = getattr(actual.places, name), getattr(expected.places, name)
        assert a.dtype == torch.int64
        assert torch.equal(a, e), name
    for name in ("gates", "probabilities"):
        a, e = getattr(actual, name), getattr(expected, name)
        torch.testing.assert_close(a, e, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("experts", [1, 2, 8, 300])
@pytest.mark.parametrize("tokens", SIZES)
@each_backend
@each_dtype
def test_routing_is_that_of_the_definition(tokens, experts, backend, dtype):
    scores = torch.randn(tokens, experts, dtype=dtype)
    for choices, factor in itertools.product({1, min(2, experts), min(3, experts)}, CAPACITY_FACTORS):
        options = {"experts_per_token": choices, "capacity_factor": factor}
        actual, expected = (route(scores, **options, backend=name) for name in (backend, "reference"))
        check_same_routing(actual, expected, dtype)
        priority = torch.randn(tokens).round(decimals=1)  # with equals
        options = {"gates": expected.gates, "priority": priority, "capacity_factor": factor}
        actual, expected = (
            assign(expected.indices, experts, **options, backend=name) for name in (backend, "reference")
        )
        assert all(torch.equal(a, e) for a, e in zip(actual.places, expected.places, strict=True))


SKEWED = {
    "all-to-one": lambda: torch.full((65,), 5),
    "some-empty": lambda: torch.randint(2, 4, (65,)),
    "already-sorted": lambda: torch.arange(8).repeat_interleave(9),
    "second-choices": lambda: torch.stack([torch.randint(4, (65,)), torch.randint(4, 7, (65,))]),
    "strided": lambda: torch.randint(8, (65, 3)).T,
}


@each_backend
@pytest.mark.parametrize("indices", SKEWED.values(), ids=SKEWED)
@pytest.mark.parametrize("factor", CAPACITY_FACTORS)
def test_skewed_loads(indices, factor, backend):
    indices = indices().to(torch.int32)
    routings = [assign(indices, 8, capacity_factor=factor, backend=name) for name in (backend, "reference")]
    assert all(torch.equal(a, e) for a, e in zip(routings[0].places, routings[1].places, strict=True))
    assert routings[0].loads.tolist() == indices.flatten().bincount(minlength=8).tolist()
    assert routings[0].dropped == (~routings[0].kept).sum()


@each_backend
@pytest.mark.parametrize("factor", CAPACITY_FACTORS)
def test_order_and_positions_are_inverse_permutations(factor, backend):
    tokens = torch.randn(197, 5)
    routing = route(torch.randn(197, 8), experts_per_token=2, capacity_factor=factor, backend=backend)
    dispatched = dispatch(tokens, routing)
    everyone = torch.arange(2 * 197)
    assert torch.equal(dispatched.order[dispatched.positions.flatten()], everyone)
    assert torch.equal(dispatched.order.sort().values, everyone)
    assert torch.equal(dispatched.tokens[dispatched.positions], tokens.expand(2, -1, -1))
    for e, (start, end) in enumerate(itertools.pairwise(dispatched.starts.tolist())):
        own = dispatched.order[start:end]
        assert (routing.indices.flatten()[own] == e).all()
        assert torch.equal(routing.locations.flatten()[own], torch.arange(end - start))
    kept = routing.kept[..., None]
    returned = combine(dispatched.tokens, dispatched, torch.ones(2, 197))
    assert torch.equal(returned, (tokens * kept).sum(0))


def test_dropped_tokens_are_counted_and_give_zero():
    routing = assign(torch.zeros(10, dtype=torch.int64), 2, capacity_factor=0.5, priority=torch.arange(10.0))
    assert (routing.capacity, routing.dropped) == (2, 8)
    assert routing.kept.nonzero()[:, 1].tolist() == [8, 9]  # the surest
    dispatched = dispatch(torch.ones(10, 3), routing)
    output = dispatched.tokens.clone()
    output[dispatched.starts[-1] :] = math.nan  # nobody looks at them
    assert combine(output, dispatched).sum(1).tolist() == [0] * 8 + [3, 3]
    assert route(torch.randn(4, 8), capacity_factor=0.5).dropped == 4  # a capacity of 0


@every_backend
@pytest.mark.parametrize(("choices", "factor"), [(1, 0.0), (2, 0.0), (2, 0.6), (1, 0.6)])
@each_dtype
def test_the_mixture_is_that_of_the_definition(choices, factor, backend, dtype):
    scores, tokens, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((23, 4), (23, 5), (4, 5, 3), (4, 3)))
    leaves = [x.requires_grad_() for x in (scores, tokens, weight, bias)]
    routing = route(scores, experts_per_token=choices, capacity_factor=factor, backend=backend)
    output = mixture(tokens, routing, weight, bias)
    experts = [lambda x, e=e: x @ weight[e] + bias[e] for e in range(4)]
    expected = reference.mixture(tokens, routing.indices, routing.kept, routing.gates, experts)
    upstream = torch.randn_like(output)
    tolerances = {"rtol": 0, "atol": 10 * TOLERANCES[dtype]}
    torch.testing.assert_close(output, expected, **tolerances)
    with torch.no_grad():
        assert torch.equal(mixture(tokens, routing, weight, bias), output)
    pairs = [torch.autograd.grad(y, leaves, upstream, retain_graph=True) for y in (output, expected)]
    for actual, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(actual, wanted, **tolerances)


@each_backend
@pytest.mark.parametrize(("choices", "factor"), [(1, 0.0), (2, 0.0), (2, 0.6)])
def test_gradients_and_theirs(choices, factor, backend):
    shapes = ((5, 3), (5, 2), (3, 2, 2), (3, 2))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(scores, tokens, weight, bias):
        routing = route(scores, experts_per_token=choices, capacity_factor=factor, backend=backend)
        balance = load_balance_loss(routing.probabilities, routing.indices[0])
        return mixture(tokens, routing, weight, bias), balance

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("sizes", [(0, 0), (3, 0, 4), (0, 5, 0, 0), (7,)], ids=str)
@pytest.mark.parametrize("tail", [0, 2])
@each_dtype
def test_grouped_linear(sizes, tail, dtype):
    starts = torch.tensor([0, *itertools.accumulate(sizes)])
    rows = torch.randn(5, sum(sizes) + tail, dtype=dtype).T.requires_grad_()
    weight = torch.randn(len(sizes), 3, 5, dtype=dtype).transpose(1, 2).requires_grad_()
    bias = torch.randn(len(sizes), 3, dtype=dtype, requires_grad=True)
    output = grouped_linear(rows, weight, bias, starts)
    assert output.shape == (len(rows), 3)
    assert not output[starts[-1] :].any()
    if len(rows):
        expected, leaves = reference.grouped_linear(rows, weight, bias, starts), (rows, weight, bias)
        pairs = [(output, expected)]
        upstream = torch.randn_like(output)
        pairs += zip(
            *(torch.autograd.grad(y, leaves, upstream, materialize_grads=True) for y in (output, expected)), strict=True
        )
        for actual, wanted in pairs:
            torch.testing.assert_close(actual, wanted, rtol=0, atol=10 * TOLERANCES[dtype])
    assert torch.equal(grouped_linear(rows, weight, None, starts), grouped_linear(rows, weight, 0 * bias, starts))


@each_backend
def test_chunks_give_what_the_whole_gives_unless_capacity_is_bounded(backend):
    scores, tokens, weight = torch.randn(197, 4), torch.randn(197, 8), torch.eye(8).repeat(4, 1, 1)
    weight *= torch.tensor([1.0, 2, -1, 4])[:, None, None]
    for factor, equal in ((0.0, True), (1.0, False)):
        chunks = [
            mixture(x, route(z, experts_per_token=2, capacity_factor=factor, backend=backend), weight, None)
            for x, z in zip(tokens.split(31), scores.split(31), strict=True)
        ]
        whole = mixture(
            tokens, route(scores, experts_per_token=2, capacity_factor=factor, backend=backend), weight, None
        )
        assert torch.equal(torch.cat(chunks), whole) == equal


@every_backend
@each_dtype
def test_extreme_scores(backend, dtype):
    scores = torch.tensor([[1e4, -1e4, 0], [-1e4, -1e4, -1e4], [-math.inf, 0, -math.inf], [0, 1e-30, 200]], dtype=dtype)
    scores.requires_grad_()
    routing = route(scores, experts_per_token=3, backend=backend)
    assert routing.indices.T.tolist() == [[0, 2, 1], [0, 1, 2], [1, 0, 2], [2, 1, 0]]
    expected = torch.tensor([[1, 0, 0], [1 / 3] * 3, [0, 1, 0], [0, 0, 1]], dtype=dtype)
    torch.testing.assert_close(routing.probabilities, expected, rtol=0, atol=1e-7)
    [gradient] = torch.autograd.grad(routing.gates.square().sum(), scores)
    assert gradient.isfinite().all()


@every_backend
@pytest.mark.parametrize("choices", [1, 2, 4])
def test_of_equals_the_lowest_index(choices, backend):
    scores = torch.randint(2, (65, 4)).float()
    indices = route(scores, experts_per_token=choices, backend=backend).indices
    for row, chosen in zip(scores.tolist(), indices.T.tolist(), strict=True):
        assert chosen == sorted(range(4), key=lambda e, row=row: (-row[e], e))[:choices]


@every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_scores_without_an_order_are_refused(bad, backend):
    scores = torch.randn(65, 3)
    scores[7] = bad if bad < 0 else torch.tensor([0, bad, 1])
    with pytest.raises(ValueError, match=r"scores have a row with a NaN, \+inf or no finite number"):
        route(scores, backend=backend)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_narrow_dtypes_and_autocast(backend, dtype):
    scores, tokens = torch.randn(65, 4).to(dtype), torch.randn(65, 8).to(dtype).requires_grad_()
    weight = torch.randn(4, 8, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        routing = route(scores, experts_per_token=2, backend=backend)
        output = mixture(tokens, routing, weight, None)
        assert route(scores.double(), backend=backend).gates.dtype == torch.float64
    check_same_routing(routing, route(scores.float(), experts_per_token=2, backend="reference"), torch.float32)
    assert (routing.gates.dtype, output.dtype) == (torch.float32, torch.bfloat16)
    exact = mixture(tokens.float(), routing, weight, None)
    torch.testing.assert_close(output.float(), exact, rtol=0.03, atol=0.03)
    output.float().square().sum().backward()
    assert (tokens.grad.dtype, weight.grad.dtype) == (dtype, torch.float32)


@each_backend
def test_noise(backend):
    scores = torch.zeros(4000, 4)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    noisy, again = (route(scores, noise=2.0, generator=g, backend=backend) for g in generators)
    assert torch.equal(noisy.indices, again.indices)
    assert math.isclose(noisy.scores.std(), 2.0 / 4, rel_tol=0.03)
    assert (noisy.loads > 800).all()
    assert torch.equal(noisy.indices[0], noisy.scores.argmax(1))
    assert route(scores, noise=0.0, backend=backend).loads.tolist() == [4000, 0, 0, 0]


def test_balance_and_its_gradient():
    even = torch.full((8, 4), 0.25)
    assert load_balance_loss(even, torch.arange(8) % 4) == 1
    assert load_balance_loss(torch.eye(4)[[1] * 8], torch.ones(8, dtype=torch.int64)) == 4
    assert load_balance_loss(torch.empty(0, 4), torch.empty(0, dtype=torch.int64)) == 0
    leaf = even.clone().requires_grad_()
    load_balance_loss(leaf, torch.tensor([0] * 6 + [2] * 2)).backward()
    assert torch.equal(leaf.grad, torch.tensor([[6.0, 0, 2, 0]]).expand(8, -1) * 4 / 64)
    assert load_balance_loss(even.bfloat16(), torch.zeros(8, dtype=torch.int64)).dtype == torch.float32


def test_any_thread_count_gives_the_same_bits():
    scores, threads, runs = torch.randn(20000, 5), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            routing = route(scores, experts_per_token=2, backend="native")
            runs.append([routing.probabilities, routing.indices, *routing.places])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_operators_pass_opcheck():
    scores = torch.randn(9, 4, requires_grad=True)
    torch.library.opcheck(operators.expert_choice, (scores, 2, True))
    torch.library.opcheck(operators.expert_choice, (scores.detach(), 2, False))
    indices = torch.randint(4, (2, 9))
    torch.library.opcheck(operators.expert_places, (indices, None, 4, 3, False))
    torch.library.opcheck(operators.expert_places, (indices, torch.randperm(9), 4, 18, True))
    rows, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((9, 4), (3, 4, 2), (3, 2)))
    starts = torch.tensor([0, 2, 2, 8])
    torch.library.opcheck(grouped.expert_linear, (rows, weight, bias, starts))
    torch.library.opcheck(grouped.expert_linear, (rows, weight, None, starts))
    torch.library.opcheck(grouped.expert_outer, (rows, torch.randn(9, 2, requires_grad=True), starts))


@each_backend
@pytest.mark.parametrize(("choices", "factor"), [(1, 0.0), (2, 1.0)])
def test_compiles_without_graph_breaks(choices, factor, backend):
    def run(scores, tokens, weight):
        routing = route(scores, experts_per_token=choices, capacity_factor=factor, backend=backend)
        balance = load_balance_loss(routing.probabilities, routing.indices[0])
        return mixture(tokens, routing, weight, None), balance, routing.dropped

    tensors = torch.randn(33, 4), torch.randn(33, 8), torch.randn(4, 8, 3)
    compiled, outcomes = torch.compile(run, fullgraph=True, backend="aot_eager"), []
    for function in (compiled, run):
        leaves = [x.clone().requires_grad_() for x in tensors]
        output, balance, dropped = function(*leaves)
        outcomes.append([output, balance, dropped, *torch.autograd.grad(output.square().sum() + balance, leaves)])
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


class _Mixture(torch.nn.Module):
    def forward(self, scores, tokens):
        dispatched = dispatch(tokens, route(scores, experts_per_token=2))
        return combine(dispatched.tokens.relu(), dispatched)


def test_routing_exports_as_plain_operations():
    program = torch.export.export(_Mixture(), (torch.randn(9, 4), torch.randn(9, 3)))
    assert not any("gated_vision" in str(node.target) for node in program.graph.nodes)
    inputs = torch.randn(9, 4), torch.randn(9, 3)
    torch.testing.assert_close(program.module()(*inputs), _Mixture()(*inputs))
