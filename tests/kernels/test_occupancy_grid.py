"""Marching through an occupancy grid: every backend takes the definition's samples, and those are what is meant."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.occupancy_grid import Marched, march, operators

BACKENDS = ("torch", "native")
BOX = torch.tensor([[-2.0, -1.0, -0.5], [2.0, 1.5, 1.0]])
GRIDS = {"one-level": (1, 12, 9, 7), "odd": (3, 5, 6, 3), "blocks": (2, 16, 8, 4), "one-cell": (4, 1, 1, 1)}

each_backend = pytest.mark.parametrize("backend", BACKENDS)
every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
each_grid = pytest.mark.parametrize("shape", GRIDS.values(), ids=GRIDS)
each_cone = pytest.mark.parametrize("cone_angle", [0.0, 0.03], ids=["even", "growing"])


def inputs(rays: int, shape: tuple[int, ...], share: float = 0.3, dtype: torch.dtype = torch.float32) -> dict:
    """Rays from within and from without, some along axes, one without a direction."""
    directions = F.normalize(torch.randn(rays, 3), dim=1)
    directions[1::5, 1] = 0
    directions[2::7] = torch.tensor([0.0, 0.0, -1.0])
    directions[3:4] = 0
    far = torch.where(torch.arange(rays) % 3 == 0, 4.0, math.inf)
    return {
        "origins": (3 * torch.randn(rays, 3)).to(dtype),
        "directions": directions.to(dtype),
        "near": torch.rand(rays).to(dtype),
        "far": far.to(dtype),
        "occupied": torch.rand(shape) < share,
        "box": BOX.to(dtype),
        "jitter": torch.rand(rays).to(dtype),
        "step": 0.07,
    }


def same(actual: Marched, expected: Marched) -> None:
    assert torch.equal(actual.offsets, expected.offsets)
    for a, e in zip(actual[:2], expected[:2], strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=1e-6 if a.dtype == torch.float32 else 1e-13, atol=0)


@pytest.mark.parametrize("rays", [1, 2, 63, 65, 197])
@each_grid
@each_cone
@each_backend
def test_samples_of_the_definition(rays, shape, cone_angle, backend):
    given = inputs(rays, shape) | {"cone_angle": cone_angle, "step": 0.2 if shape[1] == 1 else 0.07}
    same(march(**given, backend=backend), march(**given, backend="reference"))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.9, 1.0])
@each_grid
@each_cone
@each_backend
def test_shares_of_occupied_cells(share, shape, cone_angle, backend):
    given = inputs(40, shape, share) | {"cone_angle": cone_angle}
    found = march(**given, backend=backend)
    same(found, march(**given, backend="reference"))
    if share in (0, 1):
        assert (len(found.start) > 0) == (share == 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
@each_backend
def test_dtypes(dtype, backend):
    given = inputs(40, GRIDS["odd"], dtype=dtype)
    found = march(**given, backend=backend)
    assert found.start.dtype == torch.promote_types(dtype, torch.float32)
    assert found.offsets.dtype == torch.int64
    same(found, march(**given, backend="reference"))


@each_backend
def test_strides(backend):
    given = inputs(40, (2, 6, 7, 8))
    views = {
        "origins": given["origins"].t().contiguous().t(),
        "directions": given["directions"].repeat_interleave(2, 0)[::2],
        "near": given["near"][:1].expand(40),
        "occupied": given["occupied"].transpose(1, 3).contiguous().transpose(1, 3),
    }
    same(march(**given | views, backend=backend), march(**given | views, backend="reference"))


@every_backend
def test_numbers_stand_for_all_rays(backend):
    given = inputs(20, GRIDS["odd"])
    one = march(**given | {"near": 0.5, "far": 3.0, "jitter": None}, backend=backend)
    each = {"near": torch.full((20,), 0.5), "far": torch.full((20,), 3.0), "jitter": torch.zeros(20)}
    assert all(torch.equal(a, b) for a, b in zip(one, march(**given | each, backend=backend), strict=True))


@every_backend
def test_no_rays(backend):
    found = march(**inputs(0, GRIDS["odd"]), backend=backend)
    assert [x.tolist() for x in found] == [[], [], [0]]


def along_x(occupied: list[int], **changes) -> dict:
    """One ray through the middles of four cells of length 1, from x = -1."""
    cells = torch.tensor(occupied, dtype=torch.bool).view(1, -1, 1, 1)
    return {
        "origins": torch.tensor([[-1.0, 0.5, 0.5]]), "directions": torch.tensor([[1.0, 0.0, 0.0]]),
        "near": 0.0, "far": math.inf, "occupied": cells, "box": torch.tensor([[0.0, 0.0, 0.0], [4.0, 1.0, 1.0]]),
        "step": 0.5,
    } | changes  # fmt: skip


X, Y, Z, STILL = torch.cat([torch.eye(3), torch.zeros(1, 3)])[:, None]
BY_HAND = {
    "even": ({}, [1.0, 1.5, 3.0, 3.5, 4.0, 4.5]),
    "far-at-a-mid-point": ({"far": 3.25}, [1.0, 1.5]),
    "far-behind-it": ({"far": 3.26}, [1.0, 1.5, 3.0]),
    # Mid points on borders belong to the cell above, and the last one, at the end of the grid, to the last cell.
    "near": ({"near": 1.25}, [1.25, 2.75, 3.25, 3.75, 4.25, 4.75]),
    "jitter": ({"jitter": torch.tensor([0.5])}, [0.75, 1.25, 2.75, 3.25, 3.75, 4.25, 4.75]),
    "growing": ({"step": 1.0, "cone_angle": 0.5}, [1.0, 3.0]),  # edges 0, 1, 2, 3, 4.5, 6.75
    "behind": ({"near": 6.0}, []),
    "in-front": ({"far": 0.5}, []),
    "far-before-near": ({"near": 2.0, "far": 1.0}, []),
    "away": ({"directions": -X}, []),
    "beside": ({"directions": Y}, []),
    "no-direction": ({"directions": STILL, "origins": torch.full((1, 3), 0.5)}, []),
    "along-z-within": ({"directions": Z, "origins": torch.tensor([[2.5, 0.5, -1.0]])}, [1.0, 1.5]),
    "along-z-in-an-empty-cell": ({"directions": Z, "origins": torch.tensor([[1.5, 0.5, -1.0]])}, []),
    "slow-ray": ({"directions": X / 2, "step": 1.0}, [2.0, 3.0, 6.0, 7.0, 8.0, 9.0]),
}


@every_backend
@pytest.mark.parametrize("case", BY_HAND)
def test_samples_by_hand(case, backend):
    changes, starts = BY_HAND[case]
    given = along_x([1, 0, 1, 1]) | changes
    found = march(**given, backend=backend)
    assert found.start.tolist() == starts
    assert found.offsets.tolist() == [0, len(starts)]
    if "cone_angle" not in changes:
        assert found.end.tolist() == [start + given["step"] for start in starts]


@every_backend
def test_a_point_is_in_the_finest_level_that_contains_it(backend):
    """Two levels of one cell each: the smaller box from x = 0 to 4, the larger one from -2 to 6."""
    given = along_x([1]) | {"origins": torch.tensor([[-3.0, 0.5, 0.5]]), "step": 1.0}
    for fine, coarse in itertools.product([False, True], repeat=2):
        cells = torch.tensor([fine, coarse]).view(2, 1, 1, 1)
        found = march(**given | {"occupied": cells}, backend=backend)
        around = [1.0, 2.0, 7.0, 8.0] if coarse else []
        assert found.start.tolist() == sorted([*around, *([3.0, 4.0, 5.0, 6.0] if fine else [])])


@each_backend
@each_cone
def test_any_chunk_or_thread_count_gives_the_same_samples(backend, cone_angle, monkeypatch):
    given = inputs(300, GRIDS["blocks"]) | {"cone_angle": cone_angle, "backend": backend}
    expected, threads = march(**given), torch.get_num_threads()
    monkeypatch.setattr("kernels.occupancy_grid.lattice.INTERVALS", 5000)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(march(**given), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_there_is_no_gradient():
    given = inputs(20, GRIDS["odd"])
    found = march(**given | {"origins": given["origins"].requires_grad_()})
    assert not any(x.requires_grad for x in found)


def arguments_of_the_operator(given: dict) -> tuple[Tensor | float, ...]:
    names = ("origins", "directions", "near", "far", "jitter", "occupied", "box", "step")
    wide = (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in map(given.get, names))
    return *wide, 0.0


def test_operator_passes_opcheck():
    torch.library.opcheck(operators.occupancy_march, arguments_of_the_operator(inputs(20, GRIDS["odd"])))


def test_compiles_without_graph_breaks():
    given = inputs(20, GRIDS["odd"])
    compiled = torch.compile(lambda origins: march(**given | {"origins": origins}), fullgraph=True, backend="aot_eager")
    same(compiled(given["origins"]), march(**given))


WRONG = {
    "origins": ({"origins": torch.ones(2)}, r"origins has shape \(2,\); it must be \(R, 3\)"),
    "directions": ({"directions": torch.ones(1, 3)}, r"directions has shape \(1, 3\); it must be that of origins"),
    "levels": ({"occupied": torch.ones(3, 3, 3).bool()}, r"occupied has shape \(3, 3, 3\); it must be \(levels, X"),
    "no-cells": ({"occupied": torch.ones(1, 3, 0, 3).bool()}, r"occupied has shape \(1, 3, 0, 3\)"),
    "numbers": ({"occupied": torch.ones(1, 3, 3, 3)}, "occupied has dtype torch.float32; it must be torch.bool"),
    "box": ({"box": torch.ones(3)}, r"box has shape \(3,\); it must be \(2, 3\)"),
    "empty-box": ({"box": torch.ones(2, 3)}, "its upper corner must be above its lower one on every axis"),
    "near": ({"near": torch.ones(3)}, r"near has shape \(3,\); it must be one number a ray, \(R,\)"),
    "jitter": ({"jitter": torch.ones(2, 1)}, r"jitter has shape \(2, 1\)"),
    "jitter-value": ({"jitter": torch.tensor([0.0, 1.5])}, r"jitter\[1\] is 1.5; it must be from 0 to 1"),
    "device": ({"box": torch.ones(2, 3, device="meta")}, "box is on meta and origins on cpu"),
    "integers": ({"far": torch.ones(2, dtype=torch.int64)}, "far has dtype torch.int64"),
    "no-step": ({"step": 0.0}, "step is 0.0; it must be positive and finite"),
    "nan-step": ({"step": math.nan}, "step is nan"),
    "cone": ({"cone_angle": -0.1}, "cone_angle is -0.1; it must be 0 at least and finite"),
    "nan-origin": ({"origins": torch.tensor([[0.0] * 3, [math.nan] * 3])}, r"origins\[1\] is \[nan, nan, nan\]"),
    "endless-near": ({"near": math.inf}, r"near\[0\] is inf; it must be finite"),
    "nan-far": ({"far": math.nan}, r"far\[0\] is nan; it must be a number or infinity"),
    "backend": ({"backend": "cuda"}, "backend is 'cuda'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named(case):
    changes, message = WRONG[case]
    given = inputs(2, (1, 2, 2, 2)) | {"jitter": None}
    with pytest.raises(ValueError, match=message):
        march(**given | changes)


def test_triton_is_refused_with_the_reason():
    with pytest.raises(RuntimeError, match="marching has no triton kernel: PyTorch finds all samples at once on a GPU"):
        march(**inputs(2, (1, 2, 2, 2)), backend="triton")
