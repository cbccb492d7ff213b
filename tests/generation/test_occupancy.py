"""The occupancy grid of a radiance field: what updates look at and keep, rays through it, an empty grid."""

import logging

import pytest
import torch
from torch import Tensor

from generation.radiance_field.occupancy import OccupancyGrid

BOX = ((-1.0, -2.0, 0.0), (3.0, 2.0, 2.0))


def ball(points: Tensor) -> Tensor:
    """Dense around (1, 0, 1), the centre of the box."""
    return ((points - torch.tensor([1.0, 0.0, 1.0])).norm(dim=-1) < 0.6).float()


def new_grid(**changes) -> OccupancyGrid:
    return OccupancyGrid(**{"resolution": (8, 8, 4), "box": BOX, "every": 4, "warmup_steps": 8} | changes)


def points_of_an_update(grid: OccupancyGrid, step: int, seed: int = 0) -> Tensor:
    seen = []

    def density(points: Tensor) -> Tensor:
        seen.append(points)
        return ball(points)

    assert grid.update(step, density, torch.Generator().manual_seed(seed))
    return seen[0]


def test_warm_up_looks_at_a_random_point_of_every_cell():
    grid = new_grid(levels=2)
    points = points_of_an_update(grid, 0).view(2, 8, 8, 4, 3)
    corner = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in (8, 8, 4)), indexing="ij"), -1)
    for level, (lower, size) in enumerate([((-1.0, -2.0, 0.0), 0.5), ((-3.0, -4.0, -1.0), 1.0)]):
        within = (points[level] - torch.tensor(lower)) / size - corner
        assert ((within > -1e-4) & (within < 1 + 1e-4)).all()
        assert within.std() > 0.2
    again = points_of_an_update(new_grid(levels=2), 0).view_as(points)
    assert torch.equal(points, again)
    assert not torch.equal(points, points_of_an_update(new_grid(levels=2), 0, seed=1).view_as(points))


def test_updates_come_every_so_many_steps():
    grid = new_grid()
    looked = [grid.update(step, ball) for step in range(9)]
    assert looked == [step in (0, 4, 8) for step in range(9)]


def test_later_updates_look_at_some_cells_and_at_the_occupied_ones():
    grid = new_grid(uniform_fraction=0.125, occupied_fraction=1.0)
    points_of_an_update(grid, 0)
    occupied = int(grid.occupied.sum())
    assert 0 < occupied < 64
    count = len(points_of_an_update(grid, 8))
    assert occupied <= count <= occupied + 32
    assert len(points_of_an_update(new_grid(uniform_fraction=0.0, occupied_fraction=0.125), 8)) == 32
    assert len(points_of_an_update(new_grid(uniform_fraction=0.0, occupied_fraction=0.0), 8)) == 0


def test_estimates_fall_slowly_and_rise_at_once():
    grid = new_grid(decay=0.5, limit=10.0)
    grid.update(0, lambda points: torch.full((len(points),), 0.8))
    assert (grid.estimates == 0.8).all()
    grid.update(4, lambda points: (points[:, 0] < 0).float())
    assert grid.estimates.unique().tolist() == pytest.approx([0.4, 1.0])
    assert (grid.estimates[0, :2] == 1).all()  # of 8 cells from x = -1 to 3
    assert torch.equal(grid.occupied, grid.estimates > grid.estimates.mean())


def test_the_threshold_is_the_mean_but_not_above_the_limit():
    for limit, kept in ((0.05, 0.5), (0.7, 0.25)):  # the mean is 0.325
        grid = new_grid(limit=limit)
        grid.update(0, lambda points: torch.where(points[:, 0] < 0, 1.0, torch.where(points[:, 0] < 1, 0.3, 0.0)))
        assert grid.occupied_share == kept


def test_rays_take_samples_where_something_is():
    grid = new_grid()
    origins, directions = torch.tensor([[1.0, 0.0, 5.0], [-0.9, 0.0, 5.0]]), torch.tensor([[0.0, 0.0, -1.0]] * 2)
    everywhere = grid.march(origins, directions, 0.0, 10.0, step=0.1)
    assert everywhere.offsets.tolist() == [0, 20, 40]  # before the first update every cell counts
    for step in range(0, 8, 4):
        grid.update(step, ball, torch.Generator().manual_seed(step))
    found = grid.march(origins, directions, 0.0, 10.0, step=0.1)
    assert found.offsets[1] == found.offsets[2] > 0
    assert ((found.start > 3.0) & (found.end < 5.0)).all()


def test_an_empty_grid_gives_no_samples_warns_and_fills_again(caplog):
    grid = new_grid()
    with caplog.at_level(logging.WARNING, logger="generation"):
        grid.update(0, lambda points: torch.zeros(len(points)))
    assert "occupancy grid is empty after the update of step 0: rays get no samples" in caplog.text
    rays = (torch.zeros(3, 3), torch.tensor([[0.0, 0.0, 1.0]]).expand(3, 3))
    found = grid.march(*rays, 0.0, 10.0, step=0.1)
    assert [x.tolist() for x in found] == [[], [], [0, 0, 0, 0]]
    assert grid.occupied_share == 0
    assert grid.update(8, ball)  # after warming up: of the cells drawn evenly
    assert grid.estimates.any()


def test_state_is_saved_and_loaded():
    grid, other = new_grid(), new_grid()
    grid.update(0, ball)
    other.load_state_dict(grid.state_dict())
    assert {name for name, _ in grid.named_buffers()} == {"estimates", "occupied", "box"}
    assert all(torch.equal(a, b) for a, b in zip(grid.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize(
    ("density", "message"),
    [
        (lambda points: torch.full((len(points),), torch.nan), "the densities of 256 points are not all finite"),
        (lambda points: points, r"the densities of 256 points are of shape \(256, 3\); they must be \(256,\)"),
    ],
    ids=["nan", "shape"],
)
def test_densities_that_do_not_fit_change_nothing(density, message):
    grid = new_grid()
    with pytest.raises(ValueError, match=message):
        grid.update(0, density)
    assert not grid.estimates.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": (8, 8)}, r"resolution is \(8, 8\); it must be three numbers of cells"),
        ({"resolution": (8, 0, 8)}, r"resolution\[1\] is 0; it must be a whole number of at least 1"),
        ({"box": ((0, 0, 0), (1, 0, 1))}, r"it must be \(2, 3\), the upper corner above the lower one"),
        ({"levels": 0}, "levels is 0"),
        ({"decay": 1.5}, "decay is 1.5; it must be a number from 0 to 1"),
        ({"limit": -1.0}, "limit is -1.0"),
        ({"every": 0}, "every is 0"),
        ({"uniform_fraction": 2.0}, "uniform_fraction is 2.0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        new_grid(**changes)
