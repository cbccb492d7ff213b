"""PyBullet's objects: poses and depths against shapes that are known, pictures, what is kept, and what is refused."""

import dataclasses
import sys

import pytest
import torch
from torch import Tensor

from generation.radiance_field import pybullet_scenes
from generation.radiance_field.pybullet_scenes import BulletObject, load_bullet
from generation.radiance_field.scene import Scene
from generation.radiance_field.scene_data import load_scene
from generation.radiance_field.scene_rays import SceneRays

SMALL = {"image_size": 24, "train_views": 6, "test_views": 2}


@pytest.fixture
def installed() -> None:
    pytest.importorskip("pybullet", reason="the package pybullet of the extra pybullet has the objects")


def points_seen(scene: Scene) -> Tensor:
    points = []
    for index, depth in enumerate(scene.depths):
        origins, directions = scene.cameras.image_rays(index)
        points.append((origins + depth[..., None] * directions)[depth.isfinite()])
    return torch.cat(points)


@pytest.mark.parametrize("source", ["pybullet:duck_vhacd.urdf", BulletObject()], ids=["name", "object"])
def test_without_the_package_the_extra_is_named(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "pybullet", None)
    with pytest.raises(ImportError, match=r"pip install 'gated-vision-suite\[pybullet\]'"):
        load_scene(source)


def test_other_scenes_do_not_import_it():
    assert "pybullet" not in vars(pybullet_scenes)


@pytest.mark.usefixtures("installed")
def test_points_lie_on_a_cube(tmp_path):
    """Poses, intrinsics, centres of pixels and depths together: half a sample beside its place it would be 0.01."""
    scene = load_bullet(BulletObject("cube.urdf", **SMALL), tmp_path)
    points = points_seen(scene)
    assert len(points) > 1000
    assert (points.abs().amax(1) - 1).abs().max() < 1e-5
    torch.testing.assert_close(scene.box, torch.tensor([[-1.05] * 3, [1.05] * 3]), atol=2e-3, rtol=0)
    torch.testing.assert_close(scene.transform, torch.cat([2 * torch.eye(3), torch.zeros(3, 1)], 1))


@pytest.mark.usefixtures("installed")
def test_pictures_show_the_object_on_white(tmp_path):
    scene = load_bullet(BulletObject("duck_vhacd.urdf", **SMALL), tmp_path)
    assert scene.images.shape == (8, 24, 24, 3)
    assert {split: len(frames) for split, frames in scene.splits.items()} == {"train": 6, "val": 2, "test": 2}
    seen = scene.depths.isfinite()
    colours = scene.images.float() / 255
    corner = colours[:, :3, :3]
    assert (corner == 1).all()
    red, green, blue = colours[seen].median(0).values
    assert min(red, green) > blue + 0.3  # it is yellow
    assert 0.1 < seen.float().mean() < 0.5
    assert scene.background == (1.0, 1.0, 1.0)
    distances = scene.depths[seen]
    assert ((distances > scene.near) & (distances < scene.far)).all()
    points = points_seen(scene)
    assert ((points > scene.box[0]) & (points < scene.box[1])).all()


@pytest.mark.usefixtures("installed")
def test_pictures_are_kept_and_found_again(tmp_path, monkeypatch):
    first = load_bullet(BulletObject("cube.urdf", **SMALL), tmp_path)
    monkeypatch.setattr(pybullet_scenes, "_picture", None)  # to draw again would fail
    again = load_bullet(BulletObject("cube.urdf", **SMALL), tmp_path)
    for name in ("images", "depths", "box", "transform"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    with pytest.raises(TypeError):
        load_bullet(BulletObject("cube.urdf", **SMALL | {"samples": 1}), tmp_path)


@pytest.mark.usefixtures("installed")
def test_a_training_takes_it_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(pybullet_scenes, "cache_folder", lambda: tmp_path)
    data = SceneRays("pybullet:random_urdfs/042/042.urdf", batch_size=64, rays_per_epoch=64)
    data.setup()
    assert len(data.scene) == 42
    assert data.batches_of(1, (0, 1))[0]["colour"].shape == (64, 3)
    with pytest.raises(ValueError, match=r"downscale is given, but source is 'pybullet:cube\.urdf'; it is for folders"):
        load_scene("pybullet:cube.urdf", downscale=2)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["nothing.urdf", "", "../../nothing/cube.urdf", "duck.obj", "random_urdfs"])
def test_there_is_no_such_object(name, tmp_path):
    with pytest.raises(ValueError, match=r"urdf is '.*'; it must be a \.urdf file in pybullet_data"):
        load_bullet(f"pybullet:{name}", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"train_views": 0}, "train_views is 0"),
        ({"test_views": -1}, "test_views is -1"),
        ({"samples": 2}, "samples is 2; it must be odd"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_numbers_out_of_range(changes, words):
    with pytest.raises(ValueError, match=words):
        BulletObject(**changes)


def test_cameras_look_at_the_middle_from_all_around():
    cameras = BulletObject().cameras
    position = cameras.c2w[:, :, 3]
    torch.testing.assert_close(position, pybullet_scenes.DISTANCE * cameras.c2w[:, :, 2])
    quadrant = (position[:, 0] > 0).long() + 2 * (position[:, 1] > 0).long()
    assert quadrant.bincount(minlength=4).min() >= 8
    assert position[:, 2].min() < -0.5
    assert position[:, 2].max() > 3
    assert dataclasses.replace(BulletObject(), urdf="r2d2.urdf").cameras.c2w.equal(cameras.c2w)
