"""Spiking neurons in every backend: the authors' outputs, the definition's spikes and gradients, the operators."""

import itertools
import math
import random
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses import FakeTensorMode

from kernels.spiking_neuron import operators, spiking_neuron
from kernels.spiking_neuron.arguments import RESETS, SURROGATES, Settings

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "spiking" / "neuron.safetensors")
GOLDEN_CASES = {
    "if_hard": {},
    "if_hard_detach": {"detach_reset": True},
    "if_soft": {"reset": "soft"},
    "lif_hard_decay": {"tau": 2.0},
    "lif_hard_nodecay": {"tau": 2.0, "decay_input": False},
    "if_hard_th997": {"threshold": 0.997},
}
BACKENDS = ("torch", "native")
DTYPES = (torch.float64, torch.float32)
LEAKS = {"if": {}, "lif": {"tau": 3.0}, "lif-input-stays": {"tau": 3.0, "decay_input": False}}
OPTIONS = {
    f"{leak}-{reset}-{surrogate}{'-detached' if detach else ''}": {
        **LEAKS[leak], "reset": reset, "surrogate": surrogate, "detach_reset": detach, "alpha": 1.5,
        "threshold": 0.8, "reset_value": -0.1 if reset == "hard" else 0.0,
    }
    for leak, reset, detach, surrogate in itertools.product(LEAKS, RESETS, (False, True), SURROGATES)
}  # fmt: skip
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

each_backend = pytest.mark.parametrize("backend", BACKENDS)
every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_golden_case = pytest.mark.parametrize("case", GOLDEN_CASES)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def results(current: Tensor, state: Tensor | None, backend: str, **options) -> list[Tensor]:
    """Spikes, last membrane and the gradients of all inputs, from both outputs; the same upstream each time."""
    leaves = [x.detach().requires_grad_() for x in (current, state) if x is not None]
    initial = leaves[1] if state is not None else None
    outputs = spiking_neuron(leaves[0], initial_state=initial, return_state=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def check(current: Tensor, state: Tensor | None, backend: str, against: str = "reference", **options) -> None:
    """Against another backend: spikes and membrane to the bit, gradients by their largest absolute value."""
    actual, expected = (results(current, state, name, **options) for name in (backend, against))
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    assert all(torch.equal(a, e) for a, e in zip(actual[:2], expected[:2], strict=True))
    for a, e in zip(actual[2:], expected[2:], strict=True):
        scale = max(e.abs().max().item(), 1e-3) if e.numel() else 1.0
        torch.testing.assert_close(a, e, rtol=0, atol=TOLERANCES[current.dtype] * scale)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype), torch.randn(shape[1:]).to(dtype)


@each_golden_case
@every_backend
@each_dtype
def test_spikes_of_the_authors_code(case, backend, dtype):
    golden = {key.split(".")[1]: tensor for key, tensor in GOLDEN.items() if key.startswith(f"{case}.")}
    current, options = golden["x"].to(dtype), {**GOLDEN_CASES[case], "backend": backend}
    tolerances = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 3e-6}
    state = None
    for suffix, given in (("", current), ("_second_call", current.flip(0))):
        leaf = given.requires_grad_()
        spikes, last = spiking_neuron(leaf, initial_state=state, return_state=True, **options)
        assert torch.equal(spikes.double(), golden[f"s{suffix}"])
        [gradient] = torch.autograd.grad(spikes, leaf, golden["grad_s"].to(dtype))
        torch.testing.assert_close(gradient.double(), golden[f"grad_x{suffix}"], **tolerances)
        if state is None:
            torch.testing.assert_close(last.double(), golden["v_last"], **tolerances)
        state = last.detach()


@each_golden_case
@every_backend
def test_step_by_step_with_the_state_of_the_authors_code(case, backend):
    state = None
    for x, spikes, membrane in zip(*(GOLDEN[f"{case}.{key}"] for key in ("x", "s", "v_seq")), strict=True):
        options = {**GOLDEN_CASES[case], "initial_state": state, "return_state": True, "backend": backend}
        fired, state = spiking_neuron(x[None], **options)
        assert torch.equal(fired[0], spikes)
        torch.testing.assert_close(state, membrane, rtol=0, atol=1e-12)


@each_option
@each_backend
@each_dtype
def test_options(options, backend, dtype):
    current, state = inputs(5, 3, 23, dtype=dtype)
    current = 2 * current + 0.5
    assert 0.1 < spiking_neuron(current, backend="reference", **options).mean() < 0.6  # of all, some after a reset
    check(current, state, backend, **options)
    check(current, None, backend, **options)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 197, 9000])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 33])
@each_backend
@each_dtype
def test_sizes(count, steps, backend, dtype):
    check(*inputs(steps, count, dtype=dtype), backend, tau=1.7)


@each_backend
@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 0, 3), (3,), (0,)], ids=str)
def test_empty_and_single(shape, backend):
    current, state = inputs(*shape)
    check(current, state, backend)
    spikes, last = spiking_neuron(current, return_state=True, reset_value=0.25, backend=backend)
    assert spikes.shape == shape
    assert last.shape == shape[1:]
    if shape[0] == 0:
        assert (last == 0.25).all()
        assert torch.equal(spiking_neuron(current, initial_state=state, return_state=True, backend=backend)[1], state)


VIEWS = {
    "channels-last": lambda: torch.randn(8, 6, 5, 7).to(memory_format=torch.channels_last).unflatten(0, (4, 2)),
    "batch-first": lambda: torch.randn(3, 4, 50).transpose(0, 1),
    "time-last": lambda: torch.randn(3, 50, 4).movedim(-1, 0),
    "matrix-transposed": lambda: torch.randn(50, 4).T,
    "every-second": lambda: torch.randn(4, 6, 20)[..., ::2],
    "constant-in-time": lambda: torch.randn(3, 50).expand(4, 3, 50),
    "constant-in-space": lambda: torch.randn(4, 3, 1).expand(4, 3, 50),
    "backwards-in-time": lambda: torch.randn(8, 3, 50)[::2],
}


@each_backend
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_strides(view, backend, dtype):
    current = VIEWS[view]().to(dtype)
    check(current, torch.randn(current.shape[1:]).to(dtype), backend, tau=2.5)
    check(current, torch.randn(current.shape[1:][::-1]).permute(*range(current.dim() - 2, -1, -1)), backend)


@pytest.mark.parametrize(("view", "strides"), [("channels-last", (420, 210, 1, 42, 6)), ("batch-first", (150, 50, 1))])
def test_spikes_and_states_keep_the_layout_of_the_neurons(view, strides):
    spikes, state = spiking_neuron(VIEWS[view](), return_state=True, backend="native")
    assert (spikes.stride(), state.stride()) == (strides, strides[1:])


def strided(chosen: random.Random, sizes: list[int]) -> Tensor:
    """Dimensions in any order, with gaps or without, some of them repeated."""
    strides, span = [0] * len(sizes), 1
    for place in chosen.sample(range(len(sizes)), len(sizes)):
        strides[place] = chosen.choice((0, span, span, span + 1))
        span += strides[place] * (sizes[place] - 1)
    return torch.randn(span).as_strided(sizes, strides)


def currents_of_random_strides() -> list[tuple[Tensor, Tensor]]:
    chosen = random.Random(0)
    shapes = [[chosen.choice((1, 1, 2, 3)), *chosen.choices(range(1, 5), k=min(i % 12, 5))] for i in range(150)]
    # Of this current and of its one step, PyTorch lays out copies in different orders.
    unlike = torch.randn(8).as_strided((1, 2, 3, 4, 1), (1, 1, 0, 2, 8)), torch.randn(2, 3, 4, 1)
    return [unlike, *((strided(chosen, sizes), strided(chosen, sizes[1:])) for sizes in shapes)]


@each_backend
def test_random_strides(backend):
    for current, state in currents_of_random_strides():
        check(current, state, backend, tau=2.5)


def test_fake_results_lie_as_the_real_ones():
    settings = Settings(1.0, 2.0, True, "hard", 0.0, "atan", 2.0, False).as_arguments()
    for given in currents_of_random_strides():
        layouts = []
        for mode in (nullcontext(), FakeTensorMode()):
            with mode:
                current, state = (mode.from_tensor(x) for x in given) if layouts else given
                made = operators.spiking_neuron(current, state, *settings, True, "native")
                made += operators.spiking_neuron_backward(current, state, current, state, *settings, "native")
            layouts.append([[n for n, size in zip(x.stride(), x.shape, strict=True) if size > 1] for x in made])
        assert layouts[0] == layouts[1]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("beyond", [0, 16, 3])
@each_dtype
def test_results_stored_past_the_caches(dtype, beyond, steps):
    """Of 4 MiB and more (kernels/native/streaming.h); neurons fill whole blocks, whole vectors of one, or neither."""
    neurons = (4 << 20) // (steps * dtype.itemsize) + beyond
    check(*inputs(steps, neurons, dtype=dtype), "native", "torch", tau=2.0)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_narrow_dtypes_keep_their_membranes_in_float32(backend, dtype):
    current, state = inputs(6, 70, dtype=dtype)
    check(current, state, backend, tau=2.0)
    spikes, last = spiking_neuron(current, return_state=True, backend=backend)
    assert (spikes.dtype, last.dtype) == (dtype, torch.float32)
    first, between = spiking_neuron(current[:3], return_state=True, backend=backend)
    second = spiking_neuron(current[3:], initial_state=between, backend=backend)
    assert torch.equal(torch.cat([first, second]), spikes)


@each_backend
def test_a_wider_state_widens_the_arithmetic(backend):
    current, state = inputs(3, 20)
    for narrow in (current, current.bfloat16()):
        check(narrow, state.double(), backend)
        last = spiking_neuron(narrow, initial_state=state.double(), return_state=True, backend=backend)[1]
        assert last.dtype == torch.float64


@each_backend
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_extreme_currents(surrogate, reset, backend):
    current = torch.tensor([1e4, -1e4, 0.0, -0.0, 1.0, 1e-30]).repeat(4, 11)
    current[2:] *= -1
    check(current, None, backend, surrogate=surrogate, reset=reset)
    assert all(torch.isfinite(x).all() for x in results(current, None, backend, surrogate=surrogate, reset=reset))


def check_infinite_currents(backend: str) -> None:
    """What fires at infinity is reset to rest by a hard reset; a soft one takes nothing from infinity."""
    inf, current = math.inf, torch.tensor([[math.inf, -math.inf], [0.5, 0.5], [0.6, 0.6]])
    for options, fired, last in (
        ({}, [[1, 0], [0, 0], [1, 0]], [0, -inf]),
        ({"tau": 2.0, "decay_input": False, "reset_value": 0.5}, [[1, 0], [1, 0], [1, 0]], [0.5, torch.nan]),
        ({"reset": "soft"}, [[1, 0], [1, 0], [1, 0]], [inf, -inf]),
    ):
        spikes, state = spiking_neuron(current, return_state=True, backend=backend, **options)
        assert spikes.tolist() == fired
        torch.testing.assert_close(state, torch.tensor(last, dtype=state.dtype), rtol=0, atol=0, equal_nan=True)


@every_backend
def test_infinite_currents(backend):
    check_infinite_currents(backend)


@every_backend
def test_thresholds(backend):
    current = torch.full((3, 20), 0.5)
    fired = spiking_neuron(current, backend=backend)
    assert fired[:, 0].tolist() == [0, 1, 0]  # equality fires
    just_below = torch.nextafter(torch.ones(1, 20), torch.zeros(1, 20))
    assert not spiking_neuron(just_below, backend=backend).any()
    assert not spiking_neuron(current, threshold=1e30, backend=backend).any()
    assert spiking_neuron(current, threshold=1e-30, backend=backend).all()


@every_backend
def test_nan_never_fires_and_stays_with_its_neuron(backend):
    current, _ = inputs(4, 40)
    expected, clean = spiking_neuron(current, return_state=True, backend=backend)
    current[1, 7] = torch.nan
    spikes, state = spiking_neuron(current, return_state=True, backend=backend)
    expected[1:, 7] = 0
    assert torch.equal(spikes, expected)
    assert state.isnan().nonzero().tolist() == [[7]]
    assert torch.equal(state[8:], clean[8:])


@every_backend
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("leak", LEAKS)
def test_true_derivative_where_nothing_fires(leak, reset, backend):
    """The surrogate is no derivative: only where it vanishes, far from the threshold, can differences be compared."""
    options = {**LEAKS[leak], "reset": reset, "reset_value": -0.1 if reset == "hard" else 0.0}
    options |= {"surrogate": "rectangular", "threshold": 100.0, "backend": backend, "return_state": True}
    leaves = [x.double().requires_grad_() for x in inputs(3, 2)]
    assert torch.autograd.gradcheck(lambda x, v: spiking_neuron(x, initial_state=v, **options)[1], leaves)


@every_backend
def test_gradients_of_gradients_are_right_or_raise(backend):
    """Of a neuron that fires in its first step: the second spike's slope moves with the current of the first."""
    current = torch.tensor([1.2, 0.7], dtype=torch.float64, requires_grad=True)
    spikes = spiking_neuron(current, reset="soft", backend=backend)
    [gradient] = torch.autograd.grad(spikes[1], current, create_graph=True)
    if backend != "reference":
        with pytest.raises(RuntimeError):
            torch.autograd.grad(gradient[1], current)
        return
    [second] = torch.autograd.grad(gradient[1], current)
    turned = math.pi * (1.2 - 1 + 0.7 - 1)
    bend, passed = -2 * math.pi * turned / (1 + turned**2) ** 2, 1 - 1 / (1 + (math.pi * 0.2) ** 2)
    torch.testing.assert_close(second, torch.tensor([bend * passed, bend], dtype=torch.float64))


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_surrogates_by_hand(surrogate):
    slopes = {
        "atan": lambda u: 1 / (1 + (math.pi * u) ** 2),
        "sigmoid": lambda u: 2 / (math.exp(u) + math.exp(-u)) ** 2,
        "rectangular": lambda u: 0.5 if abs(u) < 1 else 0.0,
    }
    for current in (-0.5, 0.25, 1.0, 1.75, 2.5):
        leaf = torch.tensor([current], dtype=torch.float64, requires_grad=True)
        [gradient] = torch.autograd.grad(spiking_neuron(leaf, surrogate=surrogate, backend="reference"), leaf)
        assert math.isclose(gradient.item(), slopes[surrogate](current - 1), rel_tol=1e-12)


@each_backend
def test_calls_share_nothing(backend):
    current, _ = inputs(4, 6, 10)
    first = spiking_neuron(current, backend=backend)
    spiking_neuron(torch.randn(4, 2, 10) + 3, backend=backend)
    assert torch.equal(spiking_neuron(current, backend=backend), first)


def check_gradients_of_one_output(chosen: int, backend: str) -> None:
    """The other output is left out of the loss."""
    tensors, gradients = inputs(3, 20), []
    for name in ("reference", backend):
        leaves = [x.clone().requires_grad_() for x in tensors]
        outputs = spiking_neuron(leaves[0], initial_state=leaves[1], return_state=True, backend=name)
        gradients.append(torch.autograd.grad(outputs[chosen].exp().sum(), leaves))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


each_output = pytest.mark.parametrize("chosen", [0, 1], ids=["spikes", "state"])


@each_backend
@each_output
def test_either_output_may_lack_a_gradient(chosen, backend):
    check_gradients_of_one_output(chosen, backend)


def test_any_thread_count_gives_the_same_bits():
    current, state = inputs(4, 20000)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(results(current, state, "native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("stateful", [False, True], ids=["spikes", "state"])
def test_operators_pass_opcheck(stateful):
    current = VIEWS["channels-last"]().requires_grad_()
    state = torch.randn(current.shape[1:], requires_grad=True) if stateful else None
    settings = Settings(1.0, 2.0 if stateful else None, True, "hard", 0.0, "atan", 2.0, False).as_arguments()
    torch.library.opcheck(operators.spiking_neuron, (current, state, *settings, stateful, "native"))
    current, state = current.detach(), None if state is None else state.detach()
    upstream = (torch.randn_like(current), state)
    torch.library.opcheck(operators.spiking_neuron_backward, (*upstream, current, state, *settings, "native"))


def test_operators_name_a_current_of_no_steps():
    settings = Settings(1.0, None, True, "hard", 0.0, "atan", 2.0, False).as_arguments()
    current, state = inputs(0, 3)
    with pytest.raises(ValueError, match=r"current has shape \(0, 3\); the kernels take one time step at least"):
        operators.spiking_neuron(current, state, *settings, True, "native")
    with pytest.raises(ValueError, match=r"current has shape \(0, 3\)"):
        operators.spiking_neuron_backward(current, state, current, state, *settings, "native")


@each_backend
@pytest.mark.parametrize("stateful", [False, True], ids=["spikes", "state"])
def test_compiles_without_graph_breaks(stateful, backend):
    def run(current, state):
        y = spiking_neuron(current, initial_state=state, return_state=stateful, tau=2.0, backend=backend)
        return y if stateful else (y,)

    current, state = inputs(4, 30)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    outcomes = []
    for function in (compiled, run):
        leaves = [x.clone().requires_grad_() for x in ((current, state) if stateful else (current,))]
        outputs = function(leaves[0], leaves[1] if stateful else None)
        outcomes.append([*outputs, *torch.autograd.grad([y.square().sum() for y in outputs], leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_numbers_are_checked_and_may_change_where_they_are_compiled():
    def run(current, **options):
        return spiking_neuron(current, backend="torch", **options)

    current, _ = inputs(3, 20)
    compiled = torch.compile(run, dynamic=True, backend="aot_eager")
    for threshold in (1.0, 0.9, 0.8, 2):
        assert torch.equal(compiled(current, threshold=threshold), run(current, threshold=threshold))
    for name, value in {"threshold": -1.0, "alpha": math.nan, "tau": 0.5, "reset_value": True}.items():
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be a number"):
            compiled(current, **{name: value})


class _Neurons(torch.nn.Module):
    def forward(self, current):
        return spiking_neuron(current, tau=2.0)


def test_exports_as_plain_operations_for_any_batch():
    program = torch.export.export(
        _Neurons(), (torch.randn(4, 3, 10),), dynamic_shapes=({1: torch.export.Dim("batch")},)
    )
    assert not any("gated_vision" in str(node.target) for node in program.graph.nodes)
    current = torch.randn(4, 7, 10)
    assert torch.equal(program.module()(current), _Neurons()(current))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"current": torch.tensor(1.0)}, r"current has shape \(\); it must be \(time steps, ...\)"),
        ({"current": torch.ones(4, 3, dtype=torch.int64)}, "current has dtype torch.int64"),
        ({"initial_state": torch.ones(4, 3)}, r"initial_state has shape \(4, 3\); with current \(4, 3\) .* \(3,\)"),
        ({"initial_state": torch.ones(3, device="meta")}, "initial_state is on meta and current on cpu"),
        ({"initial_state": torch.ones(3, dtype=torch.bool)}, "initial_state has dtype torch.bool"),
        ({"threshold": 0.0}, "threshold is 0.0; it must be a number, positive and finite"),
        ({"alpha": -1.0}, "alpha is -1.0; it must be a number, positive and finite"),
        ({"tau": 0.5}, "tau is 0.5; it must be a number, at least 1 and finite, or None for no leak"),
        ({"reset": "none"}, "reset is 'none'; valid are 'hard', 'soft'"),
        ({"surrogate": "arctan"}, "surrogate is 'arctan'; valid are 'atan', 'sigmoid', 'rectangular'"),
        ({"reset": "soft", "reset_value": 0.1}, "reset_value is 0.1; it must be 0 with reset='soft'"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_does_not_fit_is_named(changes, message):
    arguments = {"current": torch.ones(4, 3)} | changes
    with pytest.raises(ValueError, match=message):
        spiking_neuron(**arguments)


@pytest.mark.parametrize("value", ["a", None, True, torch.tensor(1.0), math.inf, math.nan], ids=str)
@pytest.mark.parametrize("name", ["threshold", "alpha", "tau", "reset_value"])
def test_what_is_no_finite_number_is_named(name, value):
    if (name, value) != ("tau", None):
        with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}; it must be a number")):
            spiking_neuron(torch.ones(4, 3), **{name: value})
