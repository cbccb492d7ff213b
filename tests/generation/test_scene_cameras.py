"""Cameras against nerfstudio's and Mega-NeRF's, lens distortion undone, poses that are none, upright worlds."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from generation.radiance_field.cameras import Cameras, check_poses, orient_and_scale, similarity_scale
from generation.radiance_field.lens_distortion import distort, undistort
from generation.radiance_field.proposal_sampling import through_box

GOLDEN = Path(__file__).parents[1] / "golden" / "nerf" / "volrend.safetensors"
LENSES = {
    "none": [0.0, 0, 0, 0, 0],
    "barrel": [-0.25, 0.08, 0, 0, 0],
    "pincushion": [0.15, 0.02, 0.003, 0, 0],
    "tangential": [0, 0, 0, 0.01, -0.02],
    "all": [-0.2, 0.05, -0.004, 0.003, -0.002],
}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


def golden_cameras(c2w, intrinsics):
    count = len(c2w)
    return Cameras(c2w, intrinsics.expand(count, 4), torch.full((count,), 8), torch.full((count,), 6))


def turned(generator, count):
    """Random rotations `[count, 3, 3]`, float64."""
    rotations = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator, dtype=torch.float64)).Q
    return rotations * torch.linalg.det(rotations)[:, None, None]


def some_cameras(lens="none", count=3):
    generator = torch.Generator().manual_seed(0)
    position = torch.randn(count, 3, 1, generator=generator, dtype=torch.float64)
    intrinsics = torch.tensor([[30.0, 33, 18.3, 13.1], [25, 24, 20, 15], [40, 40, 21, 14]], dtype=torch.float64)
    return Cameras(
        torch.cat([turned(generator, count), position], 2),
        intrinsics[:count],
        torch.full((count,), 40),
        torch.full((count,), 30),
        torch.tensor([LENSES[lens]], dtype=torch.float64).expand(count, 5),
    )


@pytest.mark.parametrize("index", range(3))
def test_pinhole_rays_are_nerfstudios(golden, index):
    cameras = golden_cameras(golden["cam.c2w"], golden["cam.intrinsics_fx_fy_cx_cy"])
    origins, directions = cameras.image_rays(index)
    torch.testing.assert_close(origins, golden[f"cam.ray_o{index}"], atol=1e-5, rtol=0)
    torch.testing.assert_close(directions, golden[f"cam.ray_d{index}"], atol=1e-5, rtol=0)
    areas = cameras.pixel_areas(index)[..., None]
    torch.testing.assert_close(areas, golden[f"cam.pixel_area{index}"], atol=1e-5, rtol=0)


def test_altitude_clipped_rays_are_mega_nerfs(golden):
    """A box whose upper and lower faces lie at the altitudes, as that of a scene has, clips descending rays so."""
    cameras = golden_cameras(golden["mega.c2w"][None], golden["cam.intrinsics_fx_fy_cx_cy"])
    origins, directions = (rays.reshape(-1, 3) for rays in cameras.image_rays(0))
    near, far, highest, lowest = golden["mega.ray_args"].tolist()
    box = torch.tensor([[highest, -9, -9], [lowest, 9, 9]])
    enter, leave = through_box(origins, directions, box)
    bounds = torch.stack([enter.clamp(min=near), leave.clamp(max=far)], -1)
    rays, wanted = torch.cat([origins, directions, bounds], -1), golden["mega.rays"].flatten(0, -2)
    empty = bounds[:, 0] >= bounds[:, 1]
    torch.testing.assert_close(rays[~empty], wanted[~empty], atol=1e-5, rtol=1e-5)
    assert torch.equal(empty, wanted[:, 6] >= wanted[:, 7])
    assert 0 < empty.sum() < len(empty) / 2


@pytest.mark.parametrize("lens", LENSES)
def test_distortion_is_undone(lens):
    coefficients = torch.tensor(LENSES[lens], dtype=torch.float64)
    y, x = torch.meshgrid(*[torch.linspace(-0.7, 0.7, 15, dtype=torch.float64)] * 2, indexing="ij")
    back = undistort(*distort(x, y, coefficients), coefficients)
    torch.testing.assert_close(torch.stack(back), torch.stack([x, y]), atol=1e-9, rtol=0)


@pytest.mark.parametrize("lens", ["barrel", "all"])
def test_distortion_is_opencvs(lens):
    cv2 = pytest.importorskip("cv2")
    cameras = some_cameras(lens, count=1)
    fx, fy, cx, cy = cameras.intrinsics[0].tolist()
    k1, k2, k3, p1, p2 = LENSES[lens]
    points = torch.tensor([[0.3, 0.2, 2.0], [-0.5, 0.4, 1.5], [0.1, -0.6, 1.2]], dtype=torch.float64)  # OpenCV's axes
    matrix = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64).numpy()
    nothing = torch.zeros(3, dtype=torch.float64).numpy()
    coefficients = torch.tensor([k1, k2, p1, p2, k3], dtype=torch.float64).numpy()
    expected, _ = cv2.projectPoints(points.numpy(), nothing, nothing, matrix, coefficients)
    in_world = (points * torch.tensor([1.0, -1, -1])) @ cameras.c2w[0, :, :3].T + cameras.c2w[0, :, 3]
    x, y, depth = cameras.project(0, in_world)
    torch.testing.assert_close(torch.stack([x, y], -1), torch.from_numpy(expected[:, 0]))
    torch.testing.assert_close(depth, points[:, 2])


@pytest.mark.parametrize("lens", LENSES)
def test_points_on_rays_are_seen_in_their_pixels(lens):
    cameras = some_cameras(lens)
    index, column, row = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 39, 7, 20, 3]), torch.tensor([0, 29, 15, 2, 9])
    origins, directions = cameras.rays(index, column, row)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(5, dtype=torch.float64))
    x, y, depth = cameras.project(index, origins + 2.5 * directions)
    torch.testing.assert_close(x, column + 0.5, check_dtype=False, atol=1e-6, rtol=0)
    torch.testing.assert_close(y, row + 0.5, check_dtype=False, atol=1e-6, rtol=0)
    assert (depth > 0).all()
    behind = cameras.project(index, origins - directions)[2]
    assert (behind < 0).all()


def test_resized_cameras_see_the_same():
    cameras = some_cameras("all")
    half = cameras.resized(cameras.width // 2, cameras.height // 2)
    point = cameras.c2w[1, :, 3] - 2 * cameras.c2w[1, :, 2]
    x, y, _ = cameras.project(1, point)
    half_x, half_y, _ = half.project(1, point)
    torch.testing.assert_close(torch.stack([half_x, half_y]), torch.stack([x, y]) / 2)


def changed(change):
    poses = some_cameras().c2w.clone()
    change(poses[1])
    return poses


BAD_POSES = {
    "nan": (lambda pose: pose[0, 3].fill_(math.nan), r"frame 'b' holds NaN"),
    "infinite": (lambda pose: pose[2, 1].fill_(math.inf), r"frame 'b' holds infinity"),
    "scaled": (lambda pose: pose[:, :3].mul_(2), r"frame 'b' is not orthonormal: RᵀR is 3 away"),
    "sheared": (lambda pose: pose[:, 0].add_(0.1 * pose[:, 1]), r"frame 'b' is not orthonormal"),
    "left-handed": (lambda pose: pose[:, 0].neg_(), r"frame 'b' is left-handed"),
}


@pytest.mark.parametrize("case", BAD_POSES)
def test_poses_that_are_none_are_named(case):
    change, message = BAD_POSES[case]
    with pytest.raises(ValueError, match=message):
        check_poses(changed(change), ["a", "b", "c"])


def test_rounded_poses_pass():
    check_poses((some_cameras().c2w * 1e4).round() / 1e4, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("intrinsics", torch.ones(2, 4), r"intrinsics has shape \(2, 4\); 3 cameras need \(3, 4\)"),
        ("intrinsics", torch.tensor([[0.0, 1, 1, 1]]).expand(3, 4), r"fx of camera 0 is 0.0; it must be above 0"),
        ("intrinsics", torch.tensor([[1.0, 1, math.nan, 1]]).expand(3, 4), r"intrinsics hold NaN"),
        ("height", torch.tensor([4, 4, 0]), r"height of camera 2 is 0; it must be above 0"),
        ("distortion", torch.ones(3, 4), r"distortion has shape \(3, 4\); 3 cameras need \(3, 5\)"),
    ],
    ids=["count", "focal-length", "principal-point", "size", "coefficients"],
)
def test_cameras_say_what_does_not_fit(field, value, message):
    good = {"c2w": torch.eye(3, 4).expand(3, 3, 4), "intrinsics": torch.ones(3, 4)}
    sizes = {"width": torch.ones(3, dtype=torch.int64), "height": torch.ones(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        Cameras(**{**good, **sizes, field: value})


def test_world_is_set_upright_centred_and_scaled():
    cameras = some_cameras("all")
    moved, transform = orient_and_scale(cameras)
    up = moved.c2w[:, :, 1].mean(0)
    torch.testing.assert_close(up / up.norm(), torch.tensor([0.0, 0, 1], dtype=torch.float64))
    positions = moved.c2w[:, :, 3]
    torch.testing.assert_close(positions.mean(0), torch.zeros(3, dtype=torch.float64))
    assert positions.abs().max().item() == pytest.approx(1)
    check_poses(moved.c2w, ["a", "b", "c"])
    # The transform takes points of the old world to where the new cameras see them in the same pixels.
    origins, directions = cameras.rays(torch.arange(3), torch.tensor([3, 20, 37]), torch.tensor([2, 11, 28]))
    points = (origins + 3 * directions) @ transform[:, :3].T + transform[:, 3]
    x, y, _ = moved.project(torch.arange(3), points)
    torch.testing.assert_close(x, torch.tensor([3.5, 20.5, 37.5], dtype=torch.float64))
    torch.testing.assert_close(y, torch.tensor([2.5, 11.5, 28.5], dtype=torch.float64))
    assert (points - moved.c2w[:, :, 3]).norm(dim=-1).tolist() == pytest.approx([3 * similarity_scale(transform)] * 3)


@pytest.mark.parametrize(
    ("orient", "centre", "scale"), [(False, True, False), (False, False, True), (True, False, False)]
)
def test_parts_of_the_normalisation_can_be_left_out(orient, centre, scale):
    cameras = some_cameras()
    moved, transform = orient_and_scale(cameras, orient, centre, scale)
    assert (similarity_scale(transform) == pytest.approx(1)) == (not scale)
    assert torch.allclose(moved.c2w[:, :, :3], cameras.c2w[:, :, :3]) == (not orient)
    assert torch.equal(transform[:, 3], torch.zeros(3, dtype=torch.float64)) == (not centre)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["upright", "upside-down"])
def test_level_worlds_turn_by_nothing_or_half_a_turn(sign):
    pose = torch.eye(3, 4)
    pose[:, :3] = torch.tensor([[1.0, 0, 0], [0, 0, -sign], [0, sign, 0]])  # up is z, or -z
    cameras = Cameras(pose[None], torch.ones(1, 4), torch.ones(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    moved, _ = orient_and_scale(cameras)
    torch.testing.assert_close(moved.c2w[0, :, 1], torch.tensor([0.0, 0, 1]))
    check_poses(moved.c2w, ["only"])


def test_up_axes_that_cancel_are_refused():
    poses = torch.eye(3, 4).repeat(2, 1, 1)
    poses[1, :, :2] *= -1
    sizes = torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="up axes of the cameras cancel"):
        orient_and_scale(Cameras(poses, torch.ones(2, 4), sizes, sizes))
