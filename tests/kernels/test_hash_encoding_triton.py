"""Hash encodings' Triton kernels in their interpreter: golden files, grids, sizes, views, what is not a number."""

import math

import pytest
import torch

pytest.importorskip("triton")

from kernels.hash_encoding import hash_encoding
from tests.kernels.test_hash_encoding import (
    EXPERTS,
    GRIDS,
    MIXTURE,
    VIEWS,
    check,
    inputs,
    results,
)
from tests.kernels.test_hash_encoding_golden import (
    check_mixture,
    check_nerfstudio,
    check_points,
    check_tcnn,
    each_nerfstudio_case,
    each_set_of_points,
    each_tcnn_case,
)


@each_tcnn_case
def test_tiny_cuda_nn(case):
    check_tcnn(case, "triton", torch.float32)


@each_set_of_points
def test_points_on_vertices_and_outside(case):
    check_points(case, "triton", torch.float32)


@each_nerfstudio_case
def test_nerfstudio(case):
    check_nerfstudio(case, "triton")


def test_mixture_of_hash_experts():
    check_mixture("triton", torch.float32)


@pytest.mark.parametrize("name", [n for n in GRIDS if not n.startswith("4d") or n in ("4d-2", "4d-smoothstep")])
def test_grids(name):
    check(GRIDS[name], inputs(GRIDS[name], 30), "triton")


@pytest.mark.parametrize("count", [0, 1, 2, 63, 65, 300])
@pytest.mark.parametrize("name", ["3d-2", "mixture"])
def test_sizes(count, name):
    check(GRIDS[name], inputs(GRIDS[name], count), "triton")


@pytest.mark.parametrize("max_level", [0, 1, 3])
def test_levels_beyond_the_last_are_zeros(max_level):
    check(MIXTURE, inputs(MIXTURE), "triton", max_level=max_level)


@pytest.mark.parametrize("expert", EXPERTS.values(), ids=EXPERTS)
def test_experts(expert):
    check(MIXTURE, inputs(MIXTURE, 70) | {"expert": torch.tensor(expert, dtype=torch.int32)}, "triton")


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(view):
    tensors = inputs(MIXTURE)
    check(MIXTURE, tensors | {name: make(tensors[name]) for name, make in view.items()}, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_narrow_tables(dtype):
    check(MIXTURE, inputs(MIXTURE), "triton", dtype)


@pytest.mark.parametrize("asked", ["points", "table", "gate"])
def test_any_input_alone_may_ask_for_its_gradient(asked):
    tensors = inputs(MIXTURE)
    index = ["points", "table", "gate"].index(asked) + 1
    expected = results(MIXTURE, tensors, "triton")[index]
    leaf = tensors[asked].requires_grad_()
    features = hash_encoding(**tensors, grid=MIXTURE, backend="triton")
    upstream = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    torch.testing.assert_close(torch.autograd.grad(features, leaf, upstream)[0], expected, rtol=0, atol=1e-5)


def test_points_outside_wrap():
    check(MIXTURE, inputs(MIXTURE, low=-3.0, high=4.0), "triton")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("name", ["3d-2", "4d-1", "nerfstudio", "mixture"])
def test_far_points_read_rows_of_the_table(name):
    grid = GRIDS[name]
    points = torch.tensor([-1e38, -1e12, -(2.0**31), 2.0**31, 1e9, 3e38])[:, None].repeat(1, grid.dims)
    expert = torch.zeros(6, dtype=torch.int64) if grid.experts > 1 else None
    table = torch.arange(grid.entries * grid.features, dtype=torch.float32).reshape(grid.entries, -1)
    actual, expected = (hash_encoding(points, table, grid, expert=expert, backend=b) for b in ("triton", "native"))
    torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("number", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_stays_with_its_point(number):
    tensors = inputs(MIXTURE)
    expected = hash_encoding(**tensors, grid=MIXTURE, backend="triton")
    expected[7] = math.nan
    tensors["points"][7, 1] = number
    features = hash_encoding(**tensors, grid=MIXTURE, backend="triton")
    assert torch.equal(features.nan_to_num(), expected.nan_to_num())
    assert torch.equal(features.isnan(), expected.isnan())


@pytest.mark.parametrize("number", [-1, 3, 2**40], ids=str)
def test_experts_that_do_not_exist_give_nan_and_leave_the_table_alone(number):
    tensors = inputs(MIXTURE)
    clean = results(
        MIXTURE, {name: tensor[:64] if len(tensor) == 65 else tensor for name, tensor in tensors.items()}, "triton"
    )
    tensors["expert"][64] = number
    features, of_points, of_table, of_gate = results(MIXTURE, tensors, "triton")
    for x in (features, of_points, of_gate):
        assert x[64].isnan().all()
        assert not x[:64].isnan().any()
    assert not of_table.isnan().any()
    assert torch.equal(features[:64], clean[0])


@pytest.mark.parametrize("name", ["points", "table", "gate"])
def test_float64_is_refused(name):
    tensors = inputs(MIXTURE)
    with pytest.raises(RuntimeError, match="the triton kernels take float32, bfloat16 and float16"):
        hash_encoding(**tensors | {name: tensors[name].double()}, grid=MIXTURE, backend="triton")
