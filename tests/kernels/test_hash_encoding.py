"""Hash encodings in every backend: the definition's features and all gradients, and what is not a point of a grid."""

import math

import pytest
import torch
from torch import Tensor

from kernels.hash_encoding import HashGrid, hash_encoding, operators
from kernels.hash_encoding.grid import CONVENTIONS, INTERPOLATIONS

BACKENDS = ("torch", "native")
SMALL = {"levels": 4, "log2_table_size": 9}
GRIDS = {
    **{f"{dims}d-{n}": HashGrid((4, 30), dims, 4, n, 9) for dims in (2, 3, 4) for n in (1, 2, 4, 8)},
    **{f"{dims}d-{kind}": HashGrid((4, 30), dims, **SMALL, interpolation=kind)
       for dims in (2, 3, 4) for kind in ("smoothstep", "nearest")},
    "nerfstudio": HashGrid((4, 30), **SMALL, convention="nerfstudio"),
    "nerfstudio-4d": HashGrid((4, 30), 4, **SMALL, convention="nerfstudio"),
    "one-level": HashGrid((16, 16), levels=1, log2_table_size=9),
    "one-vertex": HashGrid((1, 8), **SMALL),
    "all-dense": HashGrid((2, 6), levels=3, log2_table_size=12),
    "mixture": HashGrid(((4, 8), (4, 30), (2, 16)), **SMALL),
    "mixture-smoothstep": HashGrid(((4, 8), (4, 30)), 2, **SMALL, interpolation="smoothstep"),
}  # fmt: skip
MIXTURE = GRIDS["mixture"]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

each_backend = pytest.mark.parametrize("backend", BACKENDS)
every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def points_inside_of_cells(grid: HashGrid, count: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Points that float32 too finds in their cells: gradients jump at the borders."""
    chosen = torch.empty(0, grid.dims)
    while len(chosen) < count:
        points = torch.rand(2 * count + 8, grid.dims) * (high - low) + low
        scales = torch.tensor([row.scale for row in grid.rows], dtype=torch.float64)
        position = points.double()[:, None] * scales[:, None] + (0.5 if grid.staggered else 0.0)
        fraction = position - position.floor()
        chosen = torch.cat([chosen, points[((fraction > 2e-3) & (fraction < 1 - 2e-3)).all(2).all(1)]])
    return chosen[:count]


def inputs(grid: HashGrid, count: int = 65, **limits) -> dict[str, Tensor]:
    """All that the operation takes, in float32."""
    tensors = {
        "points": points_inside_of_cells(grid, count, **limits),
        "table": torch.randn(grid.entries, grid.features),
        "gate": torch.rand(count) + 0.5,
    }
    return tensors | ({"expert": torch.randint(grid.experts, (count,))} if grid.experts > 1 else {})


def results(grid: HashGrid, tensors: dict[str, Tensor], backend: str, **options) -> list[Tensor]:
    """Features and the gradients of all inputs; the same upstream each time."""
    leaves = {n: x.detach().requires_grad_() for n, x in tensors.items() if x.is_floating_point()}
    features = hash_encoding(**(tensors | leaves), grid=grid, backend=backend, **options)
    upstream = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(features.dtype)
    gradients = torch.autograd.grad(features, list(leaves.values()), upstream)
    assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in leaves.values()]
    return [features.detach(), *gradients]


def check(
    grid: HashGrid, tensors: dict[str, Tensor], backend: str, dtype: torch.dtype = torch.float32, **options
) -> None:
    """Against the reference in float64, by the largest absolute value; what is compared is rounded alike."""
    tensors = {n: x.to(dtype) if x.is_floating_point() and n != "points" else x for n, x in tensors.items()}
    if dtype == torch.float64:
        tensors["points"] = tensors["points"].double()
    wide = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    actual, expected = results(grid, tensors, backend, **options), results(grid, wide, "reference", **options)
    assert actual[0].dtype == dtype
    for a, e in zip(actual, expected, strict=True):
        scale = max(e.abs().max().item(), 1e-3) if e.numel() else 1.0
        torch.testing.assert_close(a.double(), e, rtol=0, atol=TOLERANCES[dtype] * scale)


@each_grid
@each_backend
@each_dtype
def test_grids(grid, backend, dtype):
    check(grid, inputs(grid), backend, dtype)


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 197])
@pytest.mark.parametrize("name", ["3d-2", "mixture"])
@each_backend
@each_dtype
def test_sizes(count, name, backend, dtype):
    check(GRIDS[name], inputs(GRIDS[name], count), backend, dtype)


@pytest.mark.parametrize("max_level", [0, 1, 3, 4])
@pytest.mark.parametrize("name", ["3d-2", "mixture"])
@every_backend
def test_levels_beyond_the_last_are_zeros(max_level, name, backend):
    grid = GRIDS[name]
    tensors = inputs(grid)
    check(grid, tensors, backend, max_level=max_level)
    features, of_points, of_table, _ = results(grid, tensors, backend, max_level=max_level)
    begin = max_level * grid.features
    assert torch.equal(features[:, :begin], results(grid, tensors, backend)[0][:, :begin])
    assert not features[:, begin:].any()
    assert not any(of_table[row.offset : row.offset + row.size].any() for row in grid.rows_of(0)[max_level:])
    assert of_points.any() == (max_level > 0)


EXPERTS = {
    "all-of-one": [1] * 70,
    "one-empty": [0, 2] * 35,
    "first-empty": [2, 1] * 35,
    "sorted": sorted([0, 1, 2] * 23 + [2]),
    "backwards": sorted([0, 1, 2] * 23 + [2], reverse=True),
}


@pytest.mark.parametrize("expert", EXPERTS.values(), ids=EXPERTS)
@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.uint8], ids=lambda x: str(x).split(".")[1])
@each_backend
def test_experts(expert, integer, backend):
    check(MIXTURE, inputs(MIXTURE, 70) | {"expert": torch.tensor(expert, dtype=integer)}, backend)


@every_backend
def test_a_mixture_is_its_grids_chosen_by_point(backend):
    tensors = inputs(MIXTURE, 100)
    features = hash_encoding(**tensors, grid=MIXTURE, backend=backend)
    for index, resolutions in enumerate(MIXTURE.resolutions):
        grid, chosen = HashGrid(resolutions, **SMALL), tensors["expert"] == index
        begin, end = MIXTURE.expert_base[index : index + 2]
        alone = {"points": tensors["points"][chosen], "table": tensors["table"][begin:end]}
        expected = hash_encoding(**alone, grid=grid, backend=backend) * tensors["gate"][chosen, None]
        torch.testing.assert_close(features[chosen], expected, rtol=0, atol=1e-6)


@each_backend
def test_one_grid_may_be_given_experts(backend):
    grid, tensors = GRIDS["3d-2"], inputs(GRIDS["3d-2"])
    given = hash_encoding(**tensors, grid=grid, expert=torch.zeros(65, dtype=torch.int64), backend=backend)
    assert torch.equal(given, hash_encoding(**tensors, grid=grid, backend=backend))


VIEWS = {
    "transposed": {"points": lambda x: x.T.contiguous().T},
    "every-second": {"points": lambda x: x.repeat_interleave(2, 0)[::2]},
    "part-of-a-ray": {"points": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]]},
    "one-point": {"points": lambda x: x[:1].expand(x.shape)},
    "table-transposed": {"table": lambda x: x.T.contiguous().T},
    "one-feature": {"table": lambda x: x[:, :1].expand(x.shape)},
    "gate": {"gate": lambda x: x.repeat_interleave(3)[::3]},
    "one-gate": {"gate": lambda x: x[:1].expand(x.shape)},
    "expert": {"expert": lambda x: x.repeat_interleave(3)[::3]},
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@each_backend
def test_strides(view, backend):
    tensors = inputs(MIXTURE)
    check(MIXTURE, tensors | {name: make(tensors[name]) for name, make in view.items()}, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["3d-1", "3d-2", "3d-8", "mixture"])
@each_backend
def test_narrow_tables(name, dtype, backend):
    check(GRIDS[name], inputs(GRIDS[name]), backend, dtype)


@every_backend
def test_the_widest_input_is_the_arithmetic(backend):
    grid, tensors = GRIDS["3d-2"], inputs(GRIDS["3d-2"])
    exact = hash_encoding(**{n: x.double() for n, x in tensors.items()}, grid=grid, backend="reference")
    for name in tensors:
        features = hash_encoding(**tensors | {name: tensors[name].double()}, grid=grid, backend=backend)
        assert features.dtype == (torch.float64 if name == "table" else torch.float32)
        torch.testing.assert_close(features.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["2d-4", "3d-2", "3d-smoothstep", "nerfstudio", "mixture"])
@every_backend
def test_gradcheck(name, backend):
    grid = GRIDS[name]
    tensors = inputs(grid, 3)
    expert = tensors.pop("expert", None)
    leaves = [tensors[n].double().requires_grad_() for n in ("points", "gate")]
    table, scale = tensors["table"].double(), torch.ones(grid.entries, 1, dtype=torch.float64)

    def encode(points, gate, shift):  # of so large a table few numbers are asked for
        return hash_encoding(points, table + shift * scale, grid, expert=expert, gate=gate, backend=backend)

    shift = torch.zeros(grid.features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(encode, [*leaves, shift], eps=1e-5)


@pytest.mark.parametrize("name", ["3d-2", "3d-smoothstep", "mixture"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradgradcheck(name, backend):
    grid = GRIDS[name]
    tensors = inputs(grid, 2)
    expert = tensors.pop("expert", None)
    points, gate = (tensors[n].double().requires_grad_() for n in ("points", "gate"))
    table = tensors["table"].double()
    factor = torch.ones(grid.features, dtype=torch.float64, requires_grad=True)

    def encode(points, gate, factor):
        return hash_encoding(points, table * factor, grid, expert=expert, gate=gate, backend=backend)

    assert torch.autograd.gradgradcheck(encode, [points, gate, factor], eps=1e-5)


def test_second_derivatives_of_the_kernels_are_refused():
    grid, tensors = GRIDS["3d-2"], inputs(GRIDS["3d-2"])
    points = tensors["points"].requires_grad_()
    features = hash_encoding(points, tensors["table"].requires_grad_(), grid, backend="native")
    [normal] = torch.autograd.grad(features.square().sum(), points, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradients of gradients are defined by backend='torch'"):
        normal.square().sum().backward()


@pytest.mark.parametrize("asked", ["points", "table", "gate"])
@each_backend
def test_any_input_alone_may_ask_for_its_gradient(asked, backend):
    tensors = inputs(MIXTURE)
    index = ["points", "table", "gate"].index(asked) + 1
    expected = results(MIXTURE, tensors, backend)[index]
    leaf = tensors[asked].requires_grad_()
    features = hash_encoding(**tensors, grid=MIXTURE, backend=backend)
    upstream = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    [gradient] = torch.autograd.grad(features, leaf, upstream)
    # The gate's is another sum where no other part of it is needed.
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5 if asked == "gate" else 0)


@every_backend
def test_nearest_has_a_gradient_of_zeros_along_points(backend):
    grid = GRIDS["3d-nearest"]
    assert not results(grid, inputs(grid), backend)[1].any()


@pytest.mark.parametrize("name", ["3d-2", "2d-4", "4d-1", "nerfstudio", "mixture", "one-vertex"])
@each_backend
@each_dtype
def test_points_outside_wrap(name, backend, dtype):
    check(GRIDS[name], inputs(GRIDS[name], low=-3.0, high=4.0), backend, dtype)


@every_backend
@pytest.mark.parametrize("name", ["3d-2", "4d-1", "all-dense", "nerfstudio", "mixture"])
def test_far_points_read_rows_of_the_table(name, backend):
    """Where integers end, positions stay; so do the values, for rows' factors add up to one."""
    grid = GRIDS[name]
    points = torch.tensor([-1e38, -1e12, -(2.0**31), 2.0**31, 1e9, 3e38])[:, None].repeat(1, grid.dims)
    expert = torch.zeros(6, dtype=torch.int64) if grid.experts > 1 else None
    table = torch.ones(grid.entries, grid.features)
    features = hash_encoding(points, table, grid, expert=expert, backend=backend)
    torch.testing.assert_close(features, torch.ones(6, grid.width), rtol=0, atol=1e-6)
    row = torch.arange(grid.entries * grid.features, dtype=torch.float64).reshape(grid.entries, -1)
    expected = hash_encoding(points, row, grid, expert=expert, backend="reference")
    assert torch.equal(hash_encoding(points, row, grid, expert=expert, backend=backend), expected)


@every_backend
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("row", [0, 64, 196])
def test_points_that_are_not_finite_are_refused(number, row, backend):
    tensors = inputs(MIXTURE, 197)
    tensors["points"][row:, 1] = number
    with pytest.raises(ValueError, match=rf"points\[{row}\] is \[.*\]; points must be finite"):
        hash_encoding(**tensors, grid=MIXTURE, backend=backend)


@every_backend
@pytest.mark.parametrize("number", [-1, 3, 2**40], ids=str)
@pytest.mark.parametrize("row", [0, 64, 196])
def test_experts_that_do_not_exist_are_refused(number, row, backend):
    tensors = inputs(MIXTURE, 197)
    tensors["expert"][row:] = number
    with pytest.raises(ValueError, match=rf"expert\[{row}\] is {number}; with 3 it must be 0 to 2"):
        hash_encoding(**tensors, grid=MIXTURE, backend=backend)


def test_any_thread_count_gives_the_same_bits():
    tensors = inputs(MIXTURE, 3000)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(results(MIXTURE, tensors, "native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_features_of_one_kind_lie_side_by_side():
    grid, tensors = GRIDS["3d-2"], inputs(GRIDS["3d-2"])
    features = hash_encoding(**tensors, grid=grid, backend="native")
    assert features.t().is_contiguous()
    weight = torch.randn(5, grid.width)
    gradients = [
        torch.autograd.grad(features.mm(weight.T).sum(), features)[0] for features in [features.requires_grad_()]
    ]
    assert gradients[0].shape == features.shape


@pytest.mark.parametrize("name", ["3d-2", "mixture"])
def test_operators_pass_opcheck(name):
    grid = GRIDS[name]
    tensors = inputs(grid)
    expert, gate = tensors.get("expert"), tensors["gate"] if name == "mixture" else None
    settings = (*grid.as_arguments(), 3, "native")
    leaves = [None if x is None else x.requires_grad_() for x in (tensors["points"], tensors["table"], gate)]
    torch.library.opcheck(operators.hash_encoding, (*leaves[:2], expert, leaves[2], *settings))
    plain = [None if x is None else x.detach() for x in leaves]
    wanted = (True, True, gate is not None)
    upstream = torch.randn(65, grid.width)
    torch.library.opcheck(
        operators.hash_encoding_backward, (upstream, *plain[:2], expert, plain[2], *settings, *wanted)
    )


@each_backend
@pytest.mark.parametrize("name", ["3d-2", "mixture"])
def test_compiles_without_graph_breaks(name, backend):
    grid, tensors = GRIDS[name], inputs(GRIDS[name])
    expert = tensors.pop("expert", None)

    def run(points, table, gate):
        return hash_encoding(points, table, grid, expert=expert, gate=gate, max_level=3, backend=backend)

    outcomes = []
    for function in (torch.compile(run, fullgraph=True, backend="aot_eager"), run):
        leaves = [x.clone().requires_grad_() for x in tensors.values()]
        features = function(*leaves)
        outcomes.append([features, *torch.autograd.grad(features.square().sum(), leaves)])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@each_backend
def test_autocast_rounds_nothing(backend):
    grid, tensors = GRIDS["3d-2"], inputs(GRIDS["3d-2"])
    expected = hash_encoding(**tensors, grid=grid, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hash_encoding(**tensors, grid=grid, backend=backend), expected)


class _Encoding(torch.nn.Module):
    def forward(self, points, table):
        return hash_encoding(points, table, GRIDS["3d-2"])


def test_exports_as_plain_operations_for_any_number_of_points():
    tensors = [inputs(GRIDS["3d-2"], count) for count in (5, 9)]
    points = {0: torch.export.Dim("points")}
    arguments = [(x["points"], x["table"]) for x in tensors]
    program = torch.export.export(_Encoding(), arguments[0], dynamic_shapes=(points, None))
    assert not any("gated_vision" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*arguments[1]), _Encoding()(*arguments[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_tables_begin_small_and_the_same_by_seed(convention):
    grid = HashGrid((4, 30), **SMALL, convention=convention)
    first, second = (grid.initialize(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    bound = 1e-4 if convention == "tiny-cuda-nn" else 1e-3
    assert first.shape == (grid.entries, 2)
    assert 0.9 * bound < first.abs().max() <= bound


def test_sizes_of_the_published_grid():
    grid = HashGrid()
    assert grid.entries == 6098120
    assert [row.hashed for row in grid.rows] == [False] * 5 + [True] * 11
    resolutions = [16, 23, 31, 43, 59, 81, 112, 154, 213, 295, 407, 562, 777, 1073, 1483, 2048]
    assert [row.resolution for row in grid.rows] == resolutions
    assert grid.expert_base == (0, 6098120)
    assert HashGrid(convention="nerfstudio").entries == 16 << 19
    mixture = HashGrid(((16, 64), (16, 512)), levels=2, log2_table_size=14)
    assert mixture.expert_base == (0, 4096 + 16384, 2 * (4096 + 16384))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": 5}, "dims is 5; valid are 2, 3, 4"),
        ({"features": 3}, "features is 3; valid are 1, 2, 4, 8"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; valid are " + ", ".join(map(repr, INTERPOLATIONS))),
        ({"convention": "torch-ngp"}, "convention is 'torch-ngp'; valid are 'tiny-cuda-nn', 'nerfstudio'"),
        ({"levels": 0}, "levels is 0; it must be 1 at least"),
        ({"log2_table_size": 32}, "log2_table_size is 32; it must be 3 to 31"),
        ({"resolutions": (32, 16)}, r"resolutions holds \(32, 16\); .* 1 <= coarsest <= finest"),
        ({"resolutions": (16, math.nan)}, r"resolutions holds \(16, nan\)"),
        ({"resolutions": ()}, r"resolutions is \(\); it must be \(coarsest, finest\) or one such pair an expert"),
        ({"resolutions": ((16, 32), (16,))}, "resolutions is .*; it must be"),
        ({"convention": "nerfstudio", "interpolation": "nearest"}, "the nerfstudio convention has 'linear' only"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_grids_that_do_not_exist_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        HashGrid(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": torch.rand(7, 2)}, r"points has shape \(7, 2\); with 3 dims it must be \(P, 3\)"),
        ({"points": torch.rand(3)}, r"points has shape \(3,\)"),
        ({"points": torch.ones(7, 3, dtype=torch.int64)}, "points has dtype torch.int64"),
        ({"table": torch.rand(9, 2)}, r"table has shape \(9, 2\); with this grid it must be \(\d+, 2\)"),
        ({"table": torch.rand(MIXTURE.entries, 2, device="meta")}, "table is on meta and points on cpu"),
        ({"expert": torch.zeros(7)}, "expert has dtype torch.float32; it must be an integer tensor"),
        ({"expert": torch.zeros(6, dtype=torch.int64)}, r"expert has shape \(6,\); it must be one number a point"),
        ({"expert": None}, "expert is None; a mixture of 3 grids needs one for each point"),
        ({"gate": torch.ones(7, 1)}, r"gate has shape \(7, 1\); it must be one number a point"),
        ({"gate": torch.ones(7, dtype=torch.bool)}, "gate has dtype torch.bool"),
        ({"max_level": 5}, "max_level is 5; it must be 0 to 4, or None for all levels"),
        ({"max_level": -1}, "max_level is -1"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(changes, message):
    arguments = inputs(MIXTURE, 7) | {"grid": MIXTURE} | changes
    with pytest.raises(ValueError, match=message):
        hash_encoding(**arguments)
