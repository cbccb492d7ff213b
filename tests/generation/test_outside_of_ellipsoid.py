"""Background fields outside of an ellipsoid: where it lies, what is drawn behind the foreground, trained and saved."""

import json
import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from generation.radiance_field.contraction import Ellipsoid
from generation.radiance_field.district_city import BOX
from generation.radiance_field.outside_of_ellipsoid import OutsideOfEllipsoid
from generation.radiance_field.render import frames_of
from generation.radiance_field.renderer import Renderer
from generation.radiance_field.saved_renderer import load, save
from tests.generation import test_radiance_field_training as small
from tests.generation.test_radiance_field_renderer import assert_same, scene, some_rays
from tests.generation.test_radiance_field_training import cache  # noqa: F401 - a fixture of the module

FIELD = {"samples": 8, "width": 8, "layers": 3, "skips": [1], "position_octaves": 2, "direction_octaves": 1}
FIELD |= {"density_noise": 0.0}
PROPOSAL = {"samples": [12], "final_samples": 8, "resolutions": [[8, 32]], "levels": 2, "log2_table_size": 8}
SAMPLERS = {"occupancy": {}, "proposal": {"sampler": "proposal", "proposal": PROPOSAL}}


def renderer(sampler: str = "occupancy", **background) -> Renderer:
    torch.manual_seed(0)
    own = small.FIELDS["single_grid"] | {"table_bound": 1.0, "density_bias": -1.5}
    chosen = SAMPLERS[sampler] | {"background": "field", "background_field": FIELD | background}
    made = Renderer("single_grid", own, {"resolution": [8, 8, 4]}, 0.5, **chosen).eval()
    made.place(scene())
    torch.nn.init.normal_(made.outside.field.colour[1].weight)
    torch.nn.init.constant_(made.outside.field.raw_density.bias, 2.0)
    return made


def training(kind: str = "hash_experts", **options) -> small.RadianceFieldTraining:
    return small.training(kind, **{"background": "field", "background_field": FIELD} | options)


def within(ellipsoid: Ellipsoid, points: Tensor) -> Tensor:
    return ((points - ellipsoid.centre) / ellipsoid.radius).norm(dim=-1)


def test_the_ellipsoid_holds_cameras_and_box():
    made = renderer()
    corners = torch.cartesian_prod(*torch.tensor(BOX).T)
    points = torch.cat([scene().cameras.c2w[:, :, 3], corners])
    assert within(made.outside.ellipsoid, points).max() == pytest.approx(1 / 1.1, abs=1e-5)
    for box in (made.field.space.box, made.occupancy.box):
        assert torch.equal(box, made.outside.ellipsoid.box)
    assert torch.equal(made.box, torch.tensor(BOX))


def test_the_ellipsoid_of_a_scene_with_altitudes_is_mega_nerfs():
    taken = scene(altitude_range=(1.0, 9.0))
    made = OutsideOfEllipsoid(**FIELD)
    made.place(taken)
    expected = Ellipsoid.around(taken.cameras.c2w[:, :, 3], (1.0, 9.0))
    assert torch.equal(made.centre, expected.centre)
    assert torch.equal(made.radius, expected.radius)
    assert float(made.centre[0]) == pytest.approx(5)


def test_which_rays_reach_it():
    ellipsoid = Ellipsoid(torch.tensor([1.0, 0, 0]), torch.tensor([2.0, 1, 1]))
    cases = [
        ([1.0, 0, 0], [0.0, 0, 1], True),  # from within
        ([-3.0, 0, 0], [1.0, 0, 0], True),  # towards it
        ([-3.0, 0, 0], [-1.0, 0, 0], False),  # away from it
        ([-3.0, 0, 1.5], [1.0, 0, 0], False),  # past it
        ([1.0, 0, 0], [0.0, 0, 0], False),  # without direction
    ]
    origins, directions = (torch.tensor(column) for column in list(zip(*cases, strict=True))[:2])
    assert ellipsoid.reached_by(origins, directions).tolist() == [case[2] for case in cases]
    made = renderer().outside
    made.centre.copy_(ellipsoid.centre)
    made.radius.copy_(ellipsoid.radius)
    torch.testing.assert_close(made.ends(origins, directions, 0.5, 5.5), torch.tensor([1.0, 5.5, 0.5, 0.5, 0.5]))
    colours = made(origins, directions, torch.tensor([0.1, 0.2, 0.3]))
    assert (colours == torch.tensor([0.1, 0.2, 0.3])).all(1).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_foreground_ends_with_the_ellipsoid(sampler):
    made, (origins, directions) = renderer(sampler), some_rays()
    samples = made.march(origins, directions)
    ray = torch.repeat_interleave(samples.offsets.diff())
    middle = (samples.start + samples.end)[:, None] / 2
    distances = within(made.outside.ellipsoid, origins[ray] + middle * directions[ray])
    assert 0.7 < distances.max() < 1
    away = made.march(torch.tensor([[0.0, 0, 500]]), torch.tensor([[0.0, 0, 1]]))
    assert away.offsets.tolist() == [0, 0]


def test_colours_of_the_background():
    """Against the sums of volume rendering in 1 - 1 / r, bin by bin, of points that lie on the rays."""
    made, (origins, directions) = renderer(), some_rays()
    found = made.behind(origins, directions)
    ellipsoid = made.outside.ellipsoid
    exits = ellipsoid.exit_distances(origins, directions)
    for i in range(12):
        light, colour = 1.0, torch.zeros(3)
        for k in range(8):
            inverse = 1 - (k + 0.5) / 8
            least, most = exits[i].item(), 1e6  # where 1 / r has that value, by bisection
            for _ in range(80):
                half = (least + most) / 2
                outside = within(ellipsoid, origins[i] + half * directions[i]) > 1 / inverse
                least, most = (least, half) if outside else (half, most)
            unit = (origins[i] + least * directions[i] - ellipsoid.centre) / ellipsoid.radius * inverse
            said = made.outside.field(torch.cat([unit, torch.tensor([inverse])])[None], directions[i][None])
            alpha = 1.0 if k == 7 else 1 - math.exp(-said.density.item() / 8)
            colour += light * alpha * said.colour[0].detach()
            light *= 1 - alpha
        torch.testing.assert_close(found[i], colour, atol=1e-3, rtol=1e-3)
    assert found.std(0).max() > 0.02


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_is_behind_the_foreground(sampler):
    made, rays = renderer(sampler), some_rays()
    drawn, behind = made.draw(*rays), made.behind(*rays)
    made.outside.field.colour[1].weight.data.zero_()
    made.outside.field.colour[1].bias.data.fill_(-100.0)  # black
    black = made.draw(*rays)
    assert torch.equal(black.opacity, drawn.opacity)
    assert torch.equal(black.depth, drawn.depth)
    assert 0.02 < drawn.opacity.mean() < 0.98
    torch.testing.assert_close(drawn.colour, black.colour + (1 - drawn.opacity)[:, None] * behind)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_portions_make_the_whole(sampler):
    made, rays = renderer(sampler), some_rays(40)
    assert_same(made.draw(*rays, memory=2 * 20 * made.bytes_a_sample), made.draw(*rays))


def test_jitter_moves_the_bins():
    made, rays = renderer(), some_rays()
    still, moved = made.behind(*rays), made.behind(*rays, torch.full((12,), 0.9))
    assert (still - moved).abs().max() > 1e-4
    torch.testing.assert_close(made.behind(*rays, torch.full((12,), 0.5)), still, atol=0.02, rtol=0)


def test_appearance_is_that_of_a_picture():
    rays = some_rays()
    with pytest.raises(ValueError, match=r"background_field\.appearances is 3; of scene 'small' it must be 4, or 0"):
        Renderer("single_grid", {}, {"resolution": [1, 1, 1]}, 0.5, **chosen(appearances=3)).place(scene())
    own = Renderer("single_grid", {}, {"resolution": [1, 1, 1]}, 0.5, **chosen(appearances=4)).eval()
    own.place(scene())
    torch.nn.init.normal_(own.outside.field.appearance.weight, std=3.0)
    first, second, each = (own.behind(*rays, appearance=which) for which in (0, 1, torch.arange(12) % 2))
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(each, torch.where((torch.arange(12) % 2)[:, None] == 0, first, second))


def chosen(**background) -> dict:
    return {"background": "field", "background_field": FIELD | background}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_saved_renderer_is_the_same(sampler, tmp_path):
    made = renderer(sampler)
    save(made, tmp_path, scene())
    loaded, cameras = load(tmp_path)
    assert loaded.settings == json.loads(json.dumps(made.settings))
    assert small.differing(loaded.state_dict(), made.state_dict()) == []
    assert torch.equal(loaded.draw(*some_rays()).colour, made.draw(*some_rays()).colour)
    pictures = frames_of(loaded, cameras, 0, 1 << 26)
    assert {picture.shape for picture in pictures.values()} == {(4, 4, 3)}


def test_a_background_learns_a_sky():
    """Whose colour is that of a ray's direction; all that is between, the middle colour, has an error of 0.08."""
    torch.manual_seed(0)
    made = OutsideOfEllipsoid(**FIELD | {"width": 32})
    made.place(scene())
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    for _ in range(150):
        directions = torch.nn.functional.normalize(torch.randn(128, 3), dim=1)
        colours = made(torch.rand(128, 3), directions, torch.zeros(3), torch.rand(128))
        error = (colours - (directions + 1) / 2).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert error < 4e-3


def test_foreground_and_background_train_together(tmp_path):
    module, watch = training("single_grid"), small.Watch()
    before = {name: value.clone() for name, value in module.renderer.outside.named_parameters()}
    small.fit(module, tmp_path, 20, callbacks=[watch])
    assert watch.mean("train/loss", slice(-3, None)) < 0.8 * watch.mean("train/loss", slice(0, 3))
    assert small.differing(dict(module.renderer.outside.named_parameters()), before) == list(before)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_training_resumed_ends_with_the_same_weights(sampler, tmp_path):
    def run(folder: str, **options) -> small.RadianceFieldTraining:
        noisy = {"background_field": FIELD | {"density_noise": 1.0, "appearances": 4}}
        module = training(**noisy, **SAMPLERS[sampler])
        keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        options |= {"callbacks": [keep], "enable_checkpointing": True}
        torch.manual_seed(len(options))
        small.fit(module, tmp_path / folder, 9, small.rays(batch_size=64, rays_per_epoch=64 * 20), **options)
        return module

    straight = run("straight")
    resumed = run("resumed", resume=tmp_path / "straight/step=5.ckpt")
    assert small.differing(straight.state_dict(), resumed.state_dict()) == []
    assert straight.renderer.outside.field.appearance is not None


def test_cameras_without_range_are_refused():
    taken = scene(altitude_range=(1.0, 9.0))
    flat = taken.cameras.c2w.clone()
    flat[:, 1, 3] = 2.0
    with pytest.raises(ValueError, match="along the axes; none may be 0"):
        renderer().place(replace(taken, cameras=replace(taken.cameras, c2w=flat)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"background": "sky"}, "background is 'sky'; valid are 'none', 'field'"),
        ({"background": "none"}, "background_field is {.*}, but background is 'none'; it is for background 'field'"),
        ({"background_field": {"samples": 0}}, r"background_field\.samples is 0; it must be a whole number"),
        ({"background_field": {"width": 1}}, r"background_field\.width is 1"),
        ({"background_field": {"skips": [0]}}, r"background_field\.skips is 0"),
    ],
    ids=["background", "none", "samples", "width", "skips"],
)
def test_bad_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        Renderer("single_grid", {}, {"resolution": [1, 1, 1]}, 0.5, **chosen() | changes)
