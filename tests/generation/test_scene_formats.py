"""Every format there and back: the city is photographed, written in the format's own axes, loaded, and traced again."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from generation.radiance_field.cameras import similarity_scale
from generation.radiance_field.district_city import trace
from generation.radiance_field.scene_data import load_scene
from tests.generation.written_scenes import (
    CITY,
    DRB,
    HEIGHT,
    LENSES,
    ORIGIN,
    VALUES,
    WIDTH,
    WRITERS,
    photograph,
    write_blender,
    write_colmap,
    write_mega_nerf,
    write_nerfstudio,
)


@pytest.fixture(scope="module")
def taken():
    return photograph()


def agreement(scene, to_city, frames=None):
    """The share of pixels that tracing the loaded rays reproduces, once they are taken back to the city's world."""
    same = []
    for frame in range(len(scene)) if frames is None else frames:
        origins, directions = (rays.double().reshape(-1, 3) for rays in scene.cameras.image_rays(frame))
        here, towards = to_city(origins), to_city(origins + directions) - to_city(origins)
        colour = trace(CITY, here, towards / towards.norm(dim=-1, keepdim=True)).colour
        off = (colour * 255 - scene.images[frame][..., :3].reshape(-1, 3)).abs().amax(-1)
        same.append((off < 2).double().mean())
    return torch.stack(same).min().item()


def undone(scene):
    """From the scene's world to the source's."""
    matrix, shift = scene.transform[:, :3].double(), scene.transform[:, 3].double()
    return lambda points: (points - shift) @ torch.linalg.inv(matrix).T


@pytest.mark.parametrize("normalise", [None, False], ids=["normalised", "as-is"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-frame"])
def test_nerfstudio(taken, tmp_path, shared, normalise):
    write_nerfstudio(taken, tmp_path, shared)
    scene = load_scene(tmp_path, normalise=normalise)
    assert scene.names == tuple(f"images/{i:03d}.png" for i in range(10))  # sorted
    assert torch.equal(scene.images, taken.images)
    assert agreement(scene, undone(scene)) > 0.98
    furthest = 1 if normalise is None else taken.cameras.c2w[:, :, 3].abs().max().item()
    assert scene.cameras.c2w[:, :, 3].abs().max().item() == pytest.approx(furthest)
    assert (len(scene.splits["train"]), scene.splits["test"].tolist()) == (9, [8])


def test_wrong_axes_would_be_seen(taken, tmp_path):
    """What the tests of axes rest on: another convention does not reproduce the pictures."""
    data = write_nerfstudio(taken, tmp_path)
    for frame in data["frames"]:
        frame["transform_matrix"] = (torch.tensor(frame["transform_matrix"]) * torch.tensor([1, -1, -1, 1])).tolist()
    (tmp_path / "transforms.json").write_text(json.dumps(data))
    scene = load_scene(tmp_path)
    assert agreement(scene, undone(scene)) < 0.7


def test_nerfstudio_names_splits_and_applied_transform(taken, tmp_path):
    names = [f"images/{i:03d}.png" for i in range(10)]
    applied = [[0.0, 1, 0, 3], [0, 0, 1, 4], [1, 0, 0, 5]]
    write_nerfstudio(
        taken,
        tmp_path,
        train_filenames=[names[4], names[1]],
        val_filenames=[names[0]],
        test_filenames=names[7:],
        applied_transform=applied,
        orientation_override="none",
    )
    scene = load_scene(tmp_path)
    assert {name: frames.tolist() for name, frames in scene.splits.items()} == {
        "train": [4, 1],
        "val": [0],
        "test": [7, 8, 9],
    }
    turn = torch.tensor(applied)
    rotation = scene.transform[:, :3] / similarity_scale(scene.transform)
    torch.testing.assert_close(rotation, turn[:, :3])  # the applied turn alone, for the orientation is "none"
    undo = undone(scene)  # to the world before the applied transform
    assert agreement(scene, lambda points: undo(points) @ turn[:, :3].double().T + turn[:, 3].double()) > 0.98


def test_nerfstudio_masks_and_depths(taken, tmp_path):
    data = write_nerfstudio(taken, tmp_path)
    frames = {frame["file_path"]: frame for frame in data["frames"]}
    cameras, sky = taken.cameras, taken.sky
    along_view = taken.distances[0] * -(cameras.image_rays(0)[1] @ cameras.c2w[0, :, 2])
    millimetres = torch.where(sky[0], 0, along_view * 1000).round().to(torch.int32)
    Image.fromarray(millimetres.numpy().astype(np.uint16)).save(tmp_path / "depth.png")
    Image.fromarray((~sky[0]).numpy().astype(np.uint8) * 255).save(tmp_path / "mask.png")
    np.save(tmp_path / "depth.npy", np.full((HEIGHT, WIDTH), 2500.0))
    frames["images/000.png"] |= {"depth_file_path": "depth.png", "mask_path": "mask.png"}
    frames["images/001.png"] |= {"depth_file_path": "depth.npy"}
    (tmp_path / "transforms.json").write_text(json.dumps(data))
    scene = load_scene(tmp_path)
    assert torch.equal(scene.masks[0], ~sky[0])
    assert scene.masks[1:].all()
    expected = (taken.distances[0] * similarity_scale(scene.transform)).float()
    assert torch.equal(scene.depths[0].isnan(), sky[0])
    torch.testing.assert_close(scene.depths[0][~sky[0]], expected[~sky[0]], atol=1e-3, rtol=0)
    assert scene.depths[1].min() >= 2.5 * similarity_scale(scene.transform) - 1e-5
    assert scene.depths[2:].isnan().all()
    again = load_scene(tmp_path, lazy=True)
    assert torch.equal(again.depths[0].nan_to_num(), scene.depths[0].nan_to_num())
    assert torch.equal(again.masks[0], scene.masks[0])


def test_nerfstudio_lens(tmp_path):
    taken = photograph("OPENCV")
    write_nerfstudio(taken, tmp_path, **{name: VALUES[name] for name in ("k1", "k2", "p1", "p2")})
    scene = load_scene(tmp_path)
    assert scene.cameras.model == "OPENCV"
    assert agreement(scene, undone(scene)) > 0.98


@pytest.mark.parametrize(
    ("options", "known"),
    [({}, None), ({"background": "white"}, (1, 1, 1)), ({"background": "black"}, (0, 0, 0))],
    ids=["not given", "white", "black"],
)
def test_background_of_pictures_without_alpha_is_what_is_said_of_it(options, known, taken, tmp_path):
    write_nerfstudio(taken, tmp_path)
    scene = load_scene(tmp_path, **options)
    assert scene.background == known
    assert torch.equal(scene.images, load_scene(tmp_path).images)


@pytest.mark.parametrize("normalise", [None, False], ids=["normalised", "as it is"])
def test_near_and_box_are_in_the_scene_s_units(normalise, taken, tmp_path):
    write_nerfstudio(taken, tmp_path)
    corners = [[-1.0, -0.5, -0.25], [0.5, 1.0, 0.125]]
    own = load_scene(tmp_path, normalise=normalise)
    scene = load_scene(tmp_path, normalise=normalise, near=0.25, box=corners)
    assert (scene.near, scene.far, scene.box.tolist()) == (0.25, own.far, corners)
    assert torch.equal(scene.cameras.c2w, own.cameras.c2w)


@pytest.mark.parametrize("background", ["white", "black"])
def test_blender(tmp_path, background):
    taken = photograph("SIMPLE_PINHOLE", cx=WIDTH / 2, cy=HEIGHT / 2)
    write_blender(taken, tmp_path)
    scene = load_scene(tmp_path, background=background)
    assert [len(scene.splits[split]) for split in ("train", "val", "test")] == [6, 1, 3]
    assert scene.background == ((1, 1, 1) if background == "white" else (0, 0, 0))
    if background == "white":
        assert torch.equal(scene.images, taken.images)
        assert agreement(scene, undone(scene)) > 0.98
    else:
        assert (scene.images[taken.sky] == 0).all()
    with_alpha = load_scene(tmp_path, alpha=True)
    assert torch.equal(with_alpha.images[..., 3] == 0, taken.sky)
    torch.testing.assert_close(scene.cameras.c2w, taken.cameras.c2w.float())  # the world of Blender as it is
    assert (scene.near, scene.far, scene.box.tolist()) == (2, 6, [[-1.5] * 3, [1.5] * 3])


@pytest.mark.parametrize("missing", ["val", "test"])
def test_blender_needs_no_two_sets_to_hold_out(taken, tmp_path, missing):
    write_blender(taken, tmp_path, [("train", 2), ("test" if missing == "val" else "val", 2)])
    splits = load_scene(tmp_path).splits
    assert splits["val"].tolist() == splits["test"].tolist() == [2, 3]


@pytest.mark.parametrize("normalise", [None, False], ids=["normalised", "as-is"])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "text"])
@pytest.mark.parametrize("model", LENSES)
def test_colmap(tmp_path, model, binary, normalise):
    taken = photograph(model, count=9)
    write_colmap(taken, tmp_path, model, binary)
    scene = load_scene(tmp_path, normalise=normalise)
    assert scene.names == tuple(f"photo {i:02d}.png" for i in range(9))
    assert torch.equal(scene.images, taken.images)
    assert agreement(scene, undone(scene)) > 0.98
    if normalise is False:  # nerfstudio's turn of COLMAP's world alone
        assert scene.transform.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]]
    assert scene.splits["test"].tolist() == [0, 8]
    assert scene.splits["train"].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_colmap_sees_points_where_its_own_formula_does(tmp_path):
    taken = photograph("RADIAL", count=3)
    write_colmap(taken, tmp_path, "RADIAL")
    scene = load_scene(tmp_path)
    point = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)
    for i, matrix in enumerate(taken.world_to_camera):
        x, y, z = (matrix[:3, :3] @ point + matrix[:3, 3]).tolist()
        squared = (x * x + y * y) / z**2
        radial = 1 + VALUES["k1"] * squared + VALUES["k2"] * squared**2
        expected = (20 * radial * x / z + VALUES["cx"], 20 * radial * y / z + VALUES["cy"])
        here = scene.transform[:, :3] @ point.float() + scene.transform[:, 3]
        assert [value.item() for value in scene.cameras.project(i, here)[:2]] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("place", ["sparse", "colmap/sparse/0", "."])
def test_colmap_is_found_where_people_put_it(taken, tmp_path, place):
    write_colmap(taken, tmp_path, place=place)
    assert len(load_scene(tmp_path)) == 10


def test_mega_nerf(taken, tmp_path):
    folder = tmp_path / "rubble-pixsfm"
    write_mega_nerf(taken, folder)
    scene = load_scene(folder)
    assert torch.equal(scene.images[:10], taken.images)
    undo = undone(scene)
    assert agreement(scene, lambda points: (undo(points) - ORIGIN) @ DRB.double()) > 0.98
    assert scene.cameras.model == "PINHOLE"
    # Frames of val/ come twice: their left halves train the appearance that their right halves are measured with.
    assert scene.names[:4] == ("DJI_0.JPG", "DJI_1.JPG", "DJI_2.JPG", "DJI_3.JPG")
    assert scene.names[10:] == ("DJI_3.JPG", "DJI_7.JPG")
    assert scene.appearance_ids.tolist() == [*range(10), 3, 7]
    assert scene.splits["train"].tolist() == list(range(10))
    assert scene.splits["val"].tolist() == scene.splits["test"].tolist() == [10, 11]
    half = WIDTH // 2
    assert scene.masks[0].all()
    assert (scene.masks[3][:, :half].all(), scene.masks[3][:, half:].any()) == (True, False)
    assert torch.equal(scene.masks[10], ~scene.masks[3])
    # Of Rubble are known the altitudes 11 to 38 m downward; the origin lies at 2 m, and 7 m are one unit.
    assert scene.altitude_range == pytest.approx((9 / 7, 36 / 7))
    assert (scene.near, scene.far) == (pytest.approx(1 / 7), 2)
    assert scene.box[:, 0].tolist() == pytest.approx([9 / 7, 36 / 7])  # so that rays are clipped at both altitudes
    assert (scene.transform @ torch.tensor([*ORIGIN.tolist(), 1])).abs().max() < 1e-6  # the origin


def test_mega_nerf_altitudes(taken, tmp_path):
    write_mega_nerf(taken, tmp_path)
    assert load_scene(tmp_path).altitude_range is None
    assert load_scene(tmp_path, altitude_range=(2.0, 9.0)).altitude_range == pytest.approx((0.0, 1.0))
    assert load_scene(tmp_path, altitude_range=(2.0, 9.0), normalise=True).altitude_range is None  # down is not x there
    with pytest.raises(ValueError, match=r"altitude_range is \(9, 2\); it must be \(highest, lowest\)"):
        load_scene(tmp_path, altitude_range=(9, 2))


def test_mega_nerf_without_altitudes_says_so(taken, tmp_path, caplog):
    write_mega_nerf(taken, tmp_path / "myscene")
    load_scene(tmp_path / "myscene")
    assert "altitude_range is not given, and 'myscene' is called after no released scene" in caplog.text
    caplog.clear()
    load_scene(tmp_path / "myscene", altitude_range=(2.0, 9.0))
    assert caplog.text == ""


@pytest.mark.parametrize("source", ["nerfstudio", "colmap", "mega-nerf"])
def test_a_world_as_it_is_has_what_the_cameras_see_in_its_box(taken, tmp_path, source):
    """Not only the cameras: of a flight at one height, the ground lies below all of them."""
    WRITERS[source](taken, tmp_path)
    scene = load_scene(tmp_path, normalise=False)
    inside = []
    for frame in range(len(taken.cameras)):
        origins, directions = scene.cameras.image_rays(frame)
        met = taken.distances[frame].isfinite()
        distances = taken.distances[frame] * similarity_scale(scene.transform)
        points = (origins + distances[..., None] * directions)[met]
        inside.append(((points > scene.box[0]) & (points < scene.box[1])).all(-1).float().mean())
    assert torch.stack(inside).mean() > 0.9
    positions = scene.cameras.c2w[:, :, 3]
    assert ((positions >= scene.box[0] - 1e-5) & (positions <= scene.box[1] + 1e-5)).all()


def test_distances_grow_with_a_world_that_is_scaled(taken, tmp_path):
    write_blender(taken, tmp_path)
    scene = load_scene(tmp_path, normalise=True)
    factor = similarity_scale(scene.transform)
    assert factor < 0.5
    assert (scene.near, scene.far) == pytest.approx((2 * factor, 6 * factor))


def test_rays_that_miss_the_box_are_said(taken, tmp_path, caplog):
    """Blender's box is known, and so small that cameras in other units may look past it."""
    write_blender(taken, tmp_path)
    load_scene(tmp_path)
    assert caplog.text == ""
    for split in ("train", "val", "test"):
        path = tmp_path / f"transforms_{split}.json"
        data = json.loads(path.read_text())
        for frame in data["frames"]:
            for row in frame["transform_matrix"][:3]:
                row[3] += 50.0
        path.write_text(json.dumps(data))
    load_scene(tmp_path)
    assert "6 of 6 training cameras look past the box [-1.5, -1.5, -1.5] to [1.5, 1.5, 1.5]" in caplog.text


@pytest.mark.parametrize("source", WRITERS)
def test_lazy_is_the_same_and_downscale_halves(taken, tmp_path, source):
    WRITERS[source](taken, tmp_path)
    now, later = load_scene(tmp_path), load_scene(tmp_path, lazy=True)
    assert all(torch.equal(now.images[i], later.images[i]) for i in range(len(now)))
    half = load_scene(tmp_path, downscale=2)
    assert half.images.shape[1:] == (HEIGHT // 2, WIDTH // 2, 3)
    torch.testing.assert_close(half.cameras.intrinsics, now.cameras.intrinsics / 2)
    assert torch.equal(half.cameras.c2w, now.cameras.c2w)


def test_stereo_pair():
    pytest.importorskip("skimage")
    scene = load_scene("stereo_motorcycle")
    known = scene.depths[0].isfinite()
    row, column = known.nonzero().unbind(-1)
    origins, directions = scene.cameras.rays(0, column, row)
    x, y, _ = scene.cameras.project(1, origins + scene.depths[0][known][:, None] * directions)
    torch.testing.assert_close(y, row + 0.5, check_dtype=False, atol=1e-3, rtol=0)
    inside = (x > 8) & (x < scene.images.shape[2] - 8)
    left = scene.images[0][row, column][inside].float()

    def difference(shift):
        return (scene.images[1][row[inside], x[inside].long() + shift].float() - left).abs().mean().item()

    assert difference(0) < 10
    assert difference(-6) > 2 * difference(0) < difference(6)
    assert scene.near < scene.depths[0][known].min() < scene.depths[0][known].max() < scene.far
