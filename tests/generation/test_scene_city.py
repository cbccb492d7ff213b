"""The city of four districts: exact depth, districts, light and shadow, pictures that are kept and found again."""

import dataclasses
import math
import time

import pytest
import torch

from generation.radiance_field import city_scene
from generation.radiance_field.city_scene import load_city
from generation.radiance_field.district_city import AMBIENT, BOX, FAR, NEAR, City, trace
from generation.radiance_field.scene_data import load_scene

SMALL = City(image_size=16, train_views=5, test_views=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return load_city(SMALL, tmp_path_factory.mktemp("cache"))


def look(city, origin, direction):
    direction = torch.tensor(direction, dtype=torch.float64)
    return trace(city, torch.tensor([origin], dtype=torch.float64), direction[None] / direction.norm())


@pytest.mark.parametrize(
    ("x", "y", "district"),
    [(-0.05, -0.05, 0), (0.05, -0.05, 1), (-0.05, 0.05, 2), (0.05, 0.05, 3), (-3.95, 3.95, 2)],
    ids=["0", "1", "2", "3", "corner"],
)
def test_straight_down_on_the_ground(x, y, district):
    seen = look(SMALL, [x, y, 3.0], [0.0, 0, -1])
    assert seen.depth.item() == pytest.approx(3.0, abs=1e-12)
    assert seen.district.item() == district
    assert seen.normal.tolist() == [[0, 0, 1]]


def test_slanted_ray_to_the_ground():
    seen = look(SMALL, [-3.0, -4.0, 0.1], [-3.0, 0, -1])  # between the buildings and the edge
    assert seen.depth.item() == pytest.approx(0.1 * math.sqrt(10), abs=1e-12)


@pytest.mark.parametrize(
    ("origin", "direction"),
    [([0.0, 0, 3], [1.0, 0, 0]), ([0.0, 0, 3], [0.0, 0, 1]), ([4.01, 0, 3], [0.0, 0, -1]), ([0.0, 0, 3], [2.0, 0, -1])],
    ids=["level", "up", "beside", "over-the-edge"],
)
def test_sky(origin, direction):
    seen = look(SMALL, origin, direction)
    assert seen.colour.tolist() == [[1, 1, 1]]
    assert (seen.depth.item(), seen.district.item(), seen.normal.abs().sum().item()) == (math.inf, -1, 0)


@pytest.mark.parametrize("number", range(12))
def test_every_box_has_a_top(number):
    buildings = SMALL.buildings
    low, high = buildings.box_least[number], buildings.box_greatest[number]
    assert (low[:2] > -4).all()
    assert (high[:2] < 4).all()
    above = look(SMALL, [*((low + high) / 2)[:2], 3.0], [0.0, 0, -1])
    assert above.district.item() == number // 3
    assert above.depth.item() <= 3 - high[2] + 1e-12  # a higher neighbour may stand in it
    assert above.normal.tolist()[0][2] > 0


@pytest.mark.parametrize("number", range(4))
def test_spheres_are_round(number):
    buildings = SMALL.buildings
    nothing = {name: getattr(buildings, name)[:0] for name in ("box_least", "box_greatest")}
    colours = {name: getattr(buildings, name)[12:] for name in ("dark", "light")}
    city = City()
    city.__dict__["buildings"] = dataclasses.replace(buildings, **nothing, **colours)
    centre, radius = buildings.centre[number], buildings.radius[number]
    seen = look(city, [centre[0], centre[1], 3.0], [0.0, 0, -1])
    assert seen.depth.item() == pytest.approx(3 - 2 * radius, abs=1e-12)
    assert seen.normal.tolist()[0] == pytest.approx([0, 0, 1], abs=1e-12)
    assert seen.district.item() == number


def test_depths_lie_on_surfaces(small):
    """Points at the traced depth lie on the ground, a box's face or a sphere, and never inside of a building."""
    buildings = SMALL.buildings
    origins, directions = SMALL.cameras.image_rays(0)
    seen = trace(SMALL, origins.reshape(-1, 3), directions.reshape(-1, 3))
    solid = seen.depth.isfinite()
    points = (origins.reshape(-1, 3) + seen.depth[:, None] * directions.reshape(-1, 3))[solid]
    low, high = torch.from_numpy(buildings.box_least), torch.from_numpy(buildings.box_greatest)
    inside = torch.minimum(points[:, None] - low, high - points[:, None]).amin(-1)  # (P, 12), 0 on a face
    from_sphere = (points[:, None] - torch.from_numpy(buildings.centre)).norm(dim=-1) - torch.from_numpy(
        buildings.radius
    )
    off = torch.cat([points[:, 2:].abs(), inside.abs(), from_sphere.abs()], 1).amin(1)
    assert off.max() < 1e-9
    assert inside.max() < 1e-9
    assert from_sphere.min() > -1e-9
    least, greatest = torch.tensor(BOX, dtype=torch.float64)
    assert ((points > least) & (points < greatest)).all()
    torch.testing.assert_close(small.depths[0].flatten(), seen.depth.float())
    assert torch.equal(small.districts[0].flatten(), seen.district)


def test_normals_face_the_camera(small):
    _, directions = small.cameras.image_rays(0)
    towards = -(directions * small.normals[0]).sum(-1)[small.districts[0] >= 0]
    assert towards.min() > 0


def test_shadow_behind_a_box():
    """Just beyond the side of a box that the sun does not see lies ground that only the ambient light reaches."""
    low, high = SMALL.buildings.box_least[0], SMALL.buildings.box_greatest[0]
    x, y = low[0] - 0.05, (low[1] + high[1]) / 2
    shaded = look(SMALL, [x, y, 0.01], [0.0, 0, -1])
    albedo = shaded.colour / AMBIENT
    lit = look(dataclasses.replace(SMALL, seed=99), [x, y, 0.01], [0.0, 0, -1])
    assert albedo.max() < 1
    assert (lit.colour / shaded.colour).min() > 2  # 0.4 + 0.65 * 0.86 against 0.4


def test_all_districts_are_seen_and_depths_are_within_bounds(small):
    assert small.districts.unique().tolist() == [-1, 0, 1, 2, 3]
    depths = small.depths[small.depths.isfinite()]
    assert NEAR < depths.min() < depths.max() < FAR
    assert (small.splits["train"].tolist(), small.splits["test"].tolist()) == ([0, 1, 2, 3, 4], [5, 6])
    assert small.splits["val"].tolist() == small.splits["test"].tolist()
    assert small.images.shape == (7, 16, 16, 3)
    assert small.background == (1, 1, 1)


def test_sky_is_exactly_the_background(small):
    above = City(image_size=16, train_views=1, test_views=0, samples=1)
    scene_colours = small.images[small.districts == -1]
    assert (scene_colours == 255).all(-1).float().mean() > 0.8  # the others are mixed with an edge, within their pixel
    origins, directions = above.cameras.image_rays(0)
    seen = trace(above, origins.reshape(-1, 3), directions.reshape(-1, 3))
    assert (seen.colour[seen.district == -1] == 1).all()


def test_more_samples_average(tmp_path):
    one = dataclasses.replace(SMALL, image_size=48, train_views=1, test_views=0, samples=1)
    fine = load_city(one, tmp_path).images[0].double().reshape(16, 3, 16, 3, 3).mean((1, 3))
    coarse = load_city(dataclasses.replace(one, image_size=16, samples=3), tmp_path).images[0].double()
    assert (fine - coarse).abs().max() <= 1  # 3 x 3 pixels of a third of the size are the samples of one


@pytest.mark.parametrize("texture", ["waves", "checker", "stripes"])
def test_detail_is_the_frequency_of_the_texture(texture):
    """Along 3.2 m of bare ground, a texture of twice the detail changes twice as often."""

    def changes(detail):
        city = City(detail=(detail,) * 4, textures=(texture,) * 4)
        x = torch.linspace(0.01, 3.99, 2000, dtype=torch.float64)
        origins = torch.stack([x, torch.full_like(x, -0.001), torch.full_like(x, 0.1)], -1)
        colour = trace(city, origins, torch.tensor([0.0, 0, -1]).expand_as(origins)).colour
        ratio = colour[:, 0] / colour[:, 1]  # of the albedo alone, without shadows
        return ((ratio > (ratio.max() + ratio.min()) / 2).int().diff() != 0).sum().item()

    assert changes(2.0) == pytest.approx(2 * changes(1.0), abs=1)
    assert changes(4.0) == pytest.approx(4 * changes(1.0), abs=3)


def test_pictures_are_kept_and_found_again(tmp_path, small, monkeypatch):
    first = load_city(SMALL, tmp_path)
    (kept,) = tmp_path.iterdir()
    assert not kept.name.startswith(".")
    monkeypatch.setattr(city_scene, "picture", None)  # tracing again would fail
    again = load_city(SMALL, tmp_path)
    for name in ("images", "depths", "districts", "normals"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert torch.equal(getattr(first, name), getattr(small, name))  # and traced elsewhere, the same


def test_other_cities_are_kept_apart(tmp_path):
    least = City(image_size=2, train_views=1, test_views=0, samples=1)
    for change in ({}, {"seed": 1}, {"detail": (1, 2, 4, 8)}, {"textures": ("checker",) * 4}, {"field_of_view": 50.0}):
        load_city(dataclasses.replace(least, **change), tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_damaged_file_is_traced_again(tmp_path, small, caplog):
    load_city(SMALL, tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    assert torch.equal(load_city(SMALL, tmp_path).images, small.images)
    assert "damaged" in caplog.text


def test_cache_that_cannot_be_written_is_no_obstacle(tmp_path, small, caplog):
    (tmp_path / "file").write_text("")
    assert torch.equal(load_city(SMALL, tmp_path / "file").images, small.images)
    assert "made each time" in caplog.text


def test_cache_folder_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_scene(City(image_size=2, train_views=1, test_views=0))
    assert [path.parent.name for path in tmp_path.rglob("city-*.safetensors")] == ["gated-vision-suite"]


def test_small_city_is_quick(tmp_path):
    start = time.process_time()
    load_city(City(image_size=16), tmp_path)
    assert time.process_time() - start < 5  # 0.5 on a quiet core


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"detail": (1, 2, 3)}, "detail are 3; there are 4 districts"),
        ({"detail": (1, 2, 3, 0)}, "each must be a finite number above 0"),
        ({"textures": ("bricks",) * 4}, "textures is 'bricks'; valid are 'waves'"),
        ({"image_size": 0}, "image_size is 0; it must be a whole number from 1"),
        ({"train_views": 0}, "train_views is 0"),
        ({"samples": 2}, "samples is 2; it must be odd"),
        ({"field_of_view": 180}, "field_of_view is 180"),
        ({"seed": -1}, "seed is -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_cities_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        City(**arguments)
