"""Paths of cameras: what poses are, where they look, and which cameras they pass."""

import math

import pytest
import torch
from torch import Tensor

from generation.radiance_field.camera_paths import PATHS, camera_path, look_at
from generation.radiance_field.cameras import Cameras, check_poses
from generation.radiance_field.district_city import BOX, City
from tests.generation.written_scenes import DRB

BOX = torch.tensor(BOX)


def taken(count: int = 5) -> Cameras:
    return City(train_views=count, test_views=0, image_size=50).cameras.to(torch.float32)


def placed(*positions: tuple[float, float, float]) -> Cameras:
    """Cameras that look down, each a third of a turn on from the one before."""
    turn = 2 * math.pi / 3 * torch.arange(len(positions))
    zero, one = torch.zeros_like(turn), torch.ones_like(turn)
    axes = torch.stack([turn.cos(), -turn.sin(), zero, turn.sin(), turn.cos(), zero, zero, zero, one], -1)
    c2w = torch.cat([axes.view(-1, 3, 3), torch.tensor(positions)[..., None]], -1)
    sizes = torch.full((len(positions),), 8)
    return Cameras(c2w, torch.tensor([[9.0, 9.0, 4.0, 4.0]]).repeat(len(positions), 1), sizes, sizes)


def check(cameras: Cameras, count: int) -> None:
    assert len(cameras) == count
    check_poses(cameras.c2w, [str(i) for i in range(count)])
    identity = cameras.c2w[:, :, :3].mT @ cameras.c2w[:, :, :3]
    torch.testing.assert_close(identity, torch.eye(3).expand(count, 3, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("views", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 60])
@pytest.mark.parametrize("path", PATHS)
def test_poses_are_poses(path, count, views):
    check(camera_path(path, count, taken(views), BOX, 32, 24), count)


@pytest.mark.parametrize("path", ["orbit", "spiral"])
def test_circles_look_at_the_middle_of_the_ground(path):
    cameras = camera_path(path, 12, taken(), BOX, 33, 21)
    middle = torch.tensor([0.0, 0.0, -0.15]).expand(12, 3)
    x, y, depth = cameras.project(torch.arange(12), middle)
    torch.testing.assert_close(x, torch.full((12,), 16.5), atol=1e-3, rtol=0)
    torch.testing.assert_close(y, torch.full((12,), 10.5), atol=1e-3, rtol=0)
    assert (depth > 0).all()
    above = cameras.project(torch.arange(12), middle + torch.tensor([0.0, 0.0, 0.5]))
    assert (above[1] < 10).all()  # z is upward in the pictures
    torch.testing.assert_close(above[0], torch.full((12,), 16.5), atol=1e-3, rtol=0)


def turned(cameras: Cameras, rotation: Tensor) -> Cameras:
    """The same cameras in a world that is turned."""
    return Cameras(rotation @ cameras.c2w, cameras.intrinsics, cameras.width, cameras.height)


# Rows are the new world's axes in the city's.
WORLDS = {
    "z up": torch.eye(3),
    "y up": torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "x down (Mega-NeRF)": DRB,
    "z down": torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]]),
    "x up": torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]),
}


@pytest.mark.parametrize("of", ["oblique", "downward"])
@pytest.mark.parametrize("path", ["orbit", "spiral"])
@pytest.mark.parametrize("world", WORLDS)
def test_circles_are_level_whichever_axis_is_up(world, path, of):
    above = placed(*[(x, y, 5.0) for x in (-2.0, 0.0, 2.0) for y in (-2.0, 0.0, 2.0)])
    given, rotation = taken() if of == "oblique" else above, WORLDS[world]
    box = (BOX @ rotation.T).aminmax(dim=0)
    found = turned(camera_path(path, 12, turned(given, rotation), torch.stack(box), 32, 24), rotation.T)
    check(found, 12)
    wanted = camera_path(path, 12, given, BOX, 32, 24)
    torch.testing.assert_close(found.c2w[:, 2, 3], wanted.c2w[:, 2, 3])
    reach = wanted.c2w[:, :2, 3].norm(dim=1)
    torch.testing.assert_close(found.c2w[:, :2, 3].norm(dim=1), reach)
    x, y, _ = found.project(torch.arange(12), torch.tensor([0.0, 0.0, -0.15]).expand(12, 3))
    torch.testing.assert_close(torch.stack([x, y]), torch.tensor([[16.0], [12.0]]).expand(2, 12), atol=1e-3, rtol=0)
    assert (found.c2w[:, 2, 1] > 0).all()  # the pictures' up is the city's


def test_a_camera_that_only_moves_tells_up_by_its_own():
    """The stereo pair, whose world is the left camera's."""
    c2w = torch.eye(3, 4).repeat(2, 1, 1)
    c2w[1, 0, 3] = 0.2
    pair = Cameras(c2w, torch.tensor([[9.0, 9.0, 4.0, 4.0]]).repeat(2, 1), torch.tensor([8, 8]), torch.tensor([8, 8]))
    found = camera_path("orbit", 4, pair, torch.tensor([[-1.0, -1, -5], [1, 1, 0]]), 8, 8)
    torch.testing.assert_close(found.c2w[:, 1, 3], torch.zeros(4))
    assert (found.c2w[:, 1, 1] > 0).all()


def test_up_need_not_be_an_axis():
    angle = math.radians(40)
    rotation = torch.tensor(
        [[1.0, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]]
    )
    found = turned(camera_path("orbit", 12, turned(taken(), rotation), BOX, 32, 24), rotation.T)
    check(found, 12)
    torch.testing.assert_close(found.c2w[:, 2, 3], taken().c2w[:, 2, 3].mean().expand(12))


def test_an_orbit_is_a_level_circle_at_the_mean_of_the_cameras():
    positions = camera_path("orbit", 12, taken(), BOX, 32, 24).c2w[:, :, 3]
    given = taken().c2w[:, :, 3]
    torch.testing.assert_close(positions[:, 2], given[:, 2].mean().expand(12))
    torch.testing.assert_close(positions[:, :2].norm(dim=1), given[:, :2].norm(dim=1).mean().expand(12))
    steps = (positions - positions.roll(1, 0)).norm(dim=1)  # from the last to the first, too
    torch.testing.assert_close(steps, steps[0].expand(12))


def test_a_spiral_comes_down_and_nearer():
    distance = camera_path("spiral", 12, taken(), BOX, 32, 24).c2w[:, :, 3].norm(dim=1)
    assert (distance.diff() < 0).all()
    assert distance[-1] < 0.6 * distance[0]


@pytest.mark.parametrize("count", [5, 9, 17])
def test_views_pass_through_the_given_cameras(count):
    given, found = taken(), camera_path("views", count, taken(), BOX, 32, 24)
    torch.testing.assert_close(found.c2w[:: (count - 1) // 4], given.c2w, atol=1e-5, rtol=0)
    if count == 9:
        halfway = (given.c2w[:-1, :, 3] + given.c2w[1:, :, 3]) / 2
        torch.testing.assert_close(found.c2w[1::2, :, 3], halfway)
        turned = (found.c2w[1::2, :, :3] * given.c2w[:-1, :, :3]).sum((1, 2))  # 1 + 2 cos of the angle between them
        torch.testing.assert_close(turned, (found.c2w[1::2, :, :3] * given.c2w[1:, :, :3]).sum((1, 2)))


def test_one_of_one_camera_is_that_camera():
    given = taken(1)
    for count in (1, 3):
        found = camera_path("views", count, given, BOX, 32, 24)
        torch.testing.assert_close(found.c2w, given.c2w.expand(count, 3, 4), atol=1e-6, rtol=0)


def opposite() -> Cameras:
    """Two cameras that look away from each other: the mean of their axes has rank 1."""
    c2w = torch.stack([look_at(torch.tensor([[1.0, 0, 0]]), torch.zeros(3))[0] for _ in range(2)])
    c2w[1, :, (0, 2)] *= -1
    return Cameras(c2w, torch.tensor([[9.0, 9.0, 4.0, 4.0]]).repeat(2, 1), torch.tensor([8, 8]), torch.tensor([8, 8]))


def up_and_down() -> Cameras:
    """One looks down and one up, and their heads are opposite."""
    cameras = placed((0.0, 0.0, 5.0), (0.0, 0.0, 5.0))
    cameras.c2w[1, :, :3] = torch.eye(3) * torch.tensor([1.0, -1.0, -1.0])
    return cameras


def test_views_between_opposite_cameras_are_poses():
    check(camera_path("views", 5, opposite(), BOX, 8, 8), 5)


@pytest.mark.parametrize("path", ["orbit", "spiral"])
def test_a_camera_above_the_middle_looks_straight_down(path):
    cameras = camera_path(path, 3, placed(*[(0.0, 0.0, 5.0)] * 3), BOX, 8, 8)
    check(cameras, 3)
    torch.testing.assert_close(cameras.c2w[:, :, 2], torch.tensor([0.0, 0.0, 1.0]).expand(3, 3))


def test_pictures_have_the_first_cameras_field_of_view():
    cameras = camera_path("orbit", 3, taken(), BOX, 100, 60)
    assert cameras.width.tolist() == [100] * 3
    assert cameras.height.tolist() == [60] * 3
    focal = 0.5 * 60 / math.tan(math.radians(30))  # 60 degrees, of the shorter side
    torch.testing.assert_close(cameras.intrinsics, torch.tensor([focal, focal, 50, 30]).repeat(3, 1))


def arguments(**changes) -> dict[str, str | int | Cameras | Tensor]:
    return {"path": "orbit", "count": 3, "cameras": taken(), "box": BOX, "width": 8, "height": 8} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "line"}, "path is 'line'; valid are 'orbit', 'spiral', 'views'"),
        ({"count": 0}, "count is 0; it must be a whole number of at least 1"),
        ({"width": 0}, "width is 0"),
        ({"height": 2.5}, "height is 2.5"),
        (
            {"cameras": placed(*[(0.0, 0.0, -0.15)] * 3)},
            r"path is 'orbit', but the cameras are in the middle of the ground, \[0.0, 0.0, -0.15",
        ),
        ({"cameras": up_and_down()}, "path is 'orbit', but the cameras do not tell which way is up; use path 'views'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_bad_arguments(changes, words):
    with pytest.raises(ValueError, match=words):
        camera_path(**arguments(**changes))
