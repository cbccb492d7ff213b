"""Proposal sampling: where samples lie, what the proposals learn, what is drawn, trained, saved and refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from generation.radiance_field import renderer as renderer_module
from generation.radiance_field.contraction import SceneSpace
from generation.radiance_field.district_city import BOX
from generation.radiance_field.proposal_sampling import ProposalSampler, Proposed, through_box
from generation.radiance_field.ray_samplers import RayBins, stratified_bins, weights_of
from generation.radiance_field.render import frames_of
from generation.radiance_field.renderer import FIELDS, Renderer
from generation.radiance_field.saved_renderer import CONFIG, load, save
from kernels.occupancy_grid import Marched
from kernels.volume_rendering import composite
from tests.generation import test_radiance_field_training as small
from tests.generation.test_radiance_field_renderer import assert_same, scene, some_rays
from tests.generation.test_radiance_field_training import cache  # noqa: F401 - a fixture of the module

GRIDS = {"resolutions": [[8, 32], [8, 64]], "levels": 4, "log2_table_size": 11, "table_bound": 1e-2}
PROPOSAL = GRIDS | {"samples": [24, 16], "final_samples": 12, "density_bias": 0.0, "spacing": "linear"}
SAMPLER = {"sampler": "proposal", "proposal": PROPOSAL | {"anneal_steps": 50}}


def renderer(kind: str = "hash_experts", proposal: dict | None = None, **field) -> Renderer:
    """Of a field and proposals that are dense in some places, with a coloured background."""
    torch.manual_seed(0)
    wide = {} if kind == "switch_nerf" else {"table_bound": 1.0, "density_bias": -0.5}
    chosen = {"sampler": "proposal", "proposal": PROPOSAL | {"table_bound": 1.0} | (proposal or {})}
    made = Renderer(kind, small.FIELDS[kind] | wide | field, **chosen).eval()
    made.place(scene())
    made.background.copy_(torch.tensor([0.9, 0.5, 0.1]))
    return made


def training(kind: str = "hash_experts", field: dict | None = None, **options) -> small.RadianceFieldTraining:
    torch.manual_seed(0)
    options = small.OPTIONS | {"occupancy": None, "step": None} | SAMPLER | options
    return small.RadianceFieldTraining(kind, small.FIELDS[kind] | (field or {}), **options)


def test_distances_through_a_box():
    box = torch.tensor([[0.0, 0, 0], [2, 2, 2]])
    cases = [
        ([-1.0, 1, 1], [1.0, 0, 0], (1, 3)),
        ([1.0, 1, 1], [0.0, 0, -1], (-1, 1)),
        ([1.0, 1, 5], [0.6, 0, -0.8], (15 / 4, 5 / 3)),  # misses
        ([1.0, 3, 1], [1.0, 0, 0], (math.inf, -math.inf)),  # beside it, and parallel to it
        ([0.0, 0, -1], [0.0, 0, 1], (1, 3)),  # along an edge
        ([-1.0, 0, 1], [0.8, 0.6, 0], (1.25, 10 / 3)),
    ]
    origins, directions, expected = (torch.tensor(column) for column in zip(*cases, strict=True))
    torch.testing.assert_close(torch.stack(through_box(origins, directions, box), 1), expected)


def test_weights_are_those_of_compositing():
    density, lengths = 3 * torch.rand(5, 7), torch.rand(5, 7)
    end = lengths.cumsum(1)
    flat = (density.flatten(), torch.ones(35, 1), (end - lengths).flatten(), end.flatten())
    expected = composite(*flat, torch.arange(0, 36, 7)).weights.reshape(5, 7)
    torch.testing.assert_close(weights_of(density, lengths), expected)


def test_rays_that_meet_the_box_have_as_many_samples():
    made, (origins, directions) = renderer(), some_rays()
    origins[4] += 100
    directions[7] = 0
    samples = made.march(origins, directions)
    counts = samples.offsets.diff().tolist()
    assert counts == [0 if ray in (4, 7) else 12 for ray in range(12)]
    middle = ((samples.start + samples.end) / 2).reshape(-1, 12)
    assert (middle.diff(dim=1) > 0).all()
    assert torch.equal(samples.start.reshape(-1, 12)[:, 1:], samples.end.reshape(-1, 12)[:, :-1])
    hit = torch.tensor(counts) > 0
    points = origins[hit, None] + middle[..., None] * directions[hit, None]
    least, greatest = torch.tensor(BOX)
    assert ((points >= least - 1e-4) & (points <= greatest + 1e-4)).all()
    assert (middle >= made.near).all()
    assert (middle <= made.far).all()


def test_a_contracted_space_has_no_end_but_far():
    made, rays = renderer("single_grid", contraction="l_inf"), some_rays()
    spans = made.spans(*rays)
    assert torch.equal(spans.far, made.far.expand(12))
    assert torch.equal(spans.near, made.near.expand(12))


def test_jitter_and_annealing_move_samples():
    made, rays = renderer(proposal={"anneal_steps": 10}), some_rays()
    spans, jitter = made.spans(*rays), torch.linspace(0, 0.99, 12)
    still, moved, again = (made.propose(*rays, spans, own) for own in (None, jitter, jitter))
    assert torch.equal(moved.samples.start, again.samples.start)
    assert (moved.samples.start - still.samples.start).abs().max() > 1e-2
    dull, sharp = (made.propose(*rays, spans, None, step) for step in (0, 10))
    assert torch.equal(sharp.samples.start, still.samples.start)
    lengths = dull.bins.edges.diff(dim=1)  # of weights that all count alike
    torch.testing.assert_close(lengths, lengths[:, :1].expand_as(lengths), atol=1e-5, rtol=1e-4)
    assert sharp.bins.edges.diff(dim=1).std() > 1e-2


def wall(points: Tensor) -> Tensor:
    """Density of a wall across the unit cube."""
    return 80.0 * ((points[:, 0] - 0.55).abs() < 0.05)


def test_proposals_learn_where_a_wall_is():
    """From even samples to more than nine tenths of them within the wall and a fifth of it before or behind."""
    torch.manual_seed(0)
    sampler = ProposalSampler(**PROPOSAL | {"anneal_steps": 0, "density_bias": 1.0})
    space = SceneSpace()
    optimizer = torch.optim.Adam(sampler.parameters(), lr=3e-2, eps=1e-15)

    def samples(count: int = 256) -> tuple[Proposed, Tensor]:
        origins = torch.cat([torch.zeros(count, 1), torch.rand(count, 2)], 1)
        directions = torch.tensor([1.0, 0, 0]).expand(count, 3)
        spans = sampler.spans(origins, directions, 0.0, 1.0, space)
        return sampler(origins, directions, spans, space, torch.rand(count)), origins

    def near_the_wall(proposed: Proposed) -> float:
        middle = (proposed.samples.start + proposed.samples.end) / 2
        return ((middle > 0.44) & (middle < 0.66)).float().mean().item()

    assert near_the_wall(samples()[0]) < 0.4
    for _ in range(150):
        proposed, _ = samples()
        middle = (proposed.samples.start + proposed.samples.end) / 2
        density = wall(torch.stack([middle] * 3, 1)).reshape(256, -1)
        weights = weights_of(density, proposed.bins.distances.diff(dim=1))
        optimizer.zero_grad()
        (proposed.losses(weights.flatten())[0] / 256).backward()
        optimizer.step()
    assert near_the_wall(samples()[0]) > 0.9


def test_losses_reach_whom_they_should():
    torch.manual_seed(0)
    bins = stratified_bins(torch.zeros(3), torch.ones(3), 6)
    learnt, weights = torch.rand(3, 4, requires_grad=True), torch.rand(18, requires_grad=True)
    proposed = Proposed(
        Marched(bins.start.flatten(), bins.end.flatten(), torch.arange(0, 19, 6)),
        bins,
        [(torch.linspace(0, 1, 5).expand(3, 5), 0.1 * learnt)],
    )
    interlevel, distortion = proposed.losses(weights)
    gradients = torch.autograd.grad(interlevel, [learnt, weights], allow_unused=True)
    assert gradients[0].any()
    assert gradients[1] is None
    gradients = torch.autograd.grad(distortion, [learnt, weights], allow_unused=True)
    assert gradients[0] is None
    assert gradients[1].any()
    parts = []
    for ray in range(3):  # what processes have adds up
        own = RayBins(bins.edges[ray : ray + 1], bins.near[:1], bins.far[:1])
        part = Proposed(proposed.samples, own, [(edges[ray : ray + 1], w[ray : ray + 1]) for edges, w in proposed[2]])
        parts.append(torch.stack(part.losses(weights[6 * ray : 6 * ray + 6])))
    torch.testing.assert_close(torch.stack(parts).sum(0), torch.stack([interlevel, distortion]))
    none = Proposed(proposed.samples, RayBins(*(x[:0] for x in (bins.edges, bins.near, bins.far))), [(learnt[:0],) * 2])
    assert [loss.item() for loss in none.losses(weights[:0])] == [0, 0]


@pytest.mark.parametrize("kind", FIELDS)
def test_what_is_drawn_of_a_ray(kind):
    """Against the sums of volume rendering, sample by sample."""
    made, (origins, directions) = renderer(kind), some_rays()
    drawn, samples = made.draw(origins, directions), made.march(origins, directions)
    assert (drawn.opacity > 0.05).any()
    for i in range(len(origins)):
        light, colour, depth = 1.0, torch.zeros(3), 0.0
        for k in range(int(samples.offsets[i]), int(samples.offsets[i + 1])):
            start, end = samples.start[k], samples.end[k]
            middle = (start + end) / 2
            said = made.field((origins[i] + middle * directions[i])[None], directions[i][None])
            alpha = (1 - torch.exp(-said.density[0] * (end - start))).item()
            colour += light * alpha * said.colour[0].detach()
            depth += light * alpha * middle.item()
            light *= 1 - alpha
        torch.testing.assert_close(drawn.opacity[i].item(), 1 - light, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(drawn.colour[i], colour + light * made.background, atol=1e-5, rtol=1e-4)
        if light < 1 - 1e-6:
            torch.testing.assert_close(drawn.depth[i].item(), depth / (1 - light), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("samples", [1, 30, 200])
def test_portions_make_the_whole(samples, monkeypatch):
    made, rays = renderer(), some_rays(40)
    whole, asked = made.draw(*rays), []
    forward = made.proposal.forward
    monkeypatch.setattr(made.proposal, "forward", lambda o, *rest: asked.append(len(o)) or forward(o, *rest))
    monkeypatch.setattr(renderer_module, "RAYS_AT_ONCE", 16)
    assert_same(made.draw(*rays, memory=2 * samples * made.bytes_a_sample), whole)
    assert max(asked) == max(1, samples // 24)


def test_rays_that_meet_nothing():
    made = renderer()
    origins = torch.tensor([[0.0, 0, 50], [0, 0, 3], [0, 0, 3]])
    directions = torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 0, 0]])  # far above, upward, without direction
    drawn = made.draw(origins, directions)
    assert torch.equal(drawn.colour, made.background.expand(3, 3))
    assert drawn.opacity.tolist() == [0, 0, 0]
    assert drawn.depth.isposinf().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda o, d: (o.index_fill(0, torch.tensor([3]), torch.nan), d), r"origins\[3\] is \[nan, nan, nan\]"),
        (lambda o, d: (o, d.index_fill(0, torch.tensor([2]), torch.inf)), r"directions\[2\] is \[inf, inf, inf\]"),
        (lambda o, d: (o[:0], d[:0]), r"shapes \(0, 3\) and \(0, 3\); both must be \(R, 3\), of one ray at least"),
        (lambda o, d: (o.long(), d.long()), "origins has dtype torch.int64; it must be a floating-point tensor"),
    ],
    ids=["nan", "inf", "none", "integers"],
)
def test_bad_rays(change, words):
    with pytest.raises(ValueError, match=words):
        renderer().draw(*change(*some_rays()))


@pytest.mark.parametrize("kind", FIELDS)
def test_a_saved_renderer_is_the_same(kind, tmp_path):
    made = renderer(kind)
    save(made, tmp_path, scene())
    loaded, cameras = load(tmp_path)
    assert loaded.settings == json.loads(json.dumps(made.settings))
    assert small.differing(loaded.state_dict(), made.state_dict()) == []
    for name, value in vars(made.draw(*some_rays())).items():
        assert value is None or torch.equal(value, getattr(loaded.draw(*some_rays()), name))
    pictures = frames_of(loaded, cameras, 0, 1 << 26)
    assert {picture.shape for picture in pictures.values()} == {(4, 4, 3)}


def test_a_renderer_saved_before_there_were_samplers_loads(tmp_path):
    torch.manual_seed(0)
    made = Renderer("single_grid", small.FIELDS["single_grid"], {"resolution": [8, 8, 4]}, 0.5).eval()
    made.place(scene())
    save(made, tmp_path, scene())
    told = json.loads((tmp_path / CONFIG).read_text())
    for name in ("sampler", "proposal", "background", "background_field"):
        del told["renderer"][name]
    (tmp_path / CONFIG).write_text(json.dumps(told))
    assert_same(load(tmp_path)[0].draw(*some_rays()), made.draw(*some_rays()))


def test_proposals_learn_a_city(tmp_path):
    """From 9.4 to 20.6 dB on the rays of 4 pictures; with proposals that stay as they begin it is 19.8."""
    watch, module = small.Watch(), training()
    before = {name: value.clone() for name, value in module.renderer.proposal.named_parameters()}
    small.fit(module, tmp_path, 100, callbacks=[watch])
    assert watch.mean("train/psnr", slice(0, 5)) < 11
    assert watch.mean("train/psnr", slice(-10, None)) > 20.2
    assert all(logged["train/samples"] <= 4096 for logged in watch.logged)
    after = dict(module.renderer.proposal.named_parameters())
    assert small.differing(after, before) == list(before)
    assert module.renderer.occupancy is None


@pytest.mark.parametrize("kind", ["single_grid", "switch_nerf"])
def test_other_fields_train(kind, tmp_path):
    watch = small.Watch()
    small.fit(training(kind, {"appearances": 4}), tmp_path, 20, callbacks=[watch])
    assert watch.mean("train/loss", slice(-3, None)) < 0.8 * watch.mean("train/loss", slice(0, 3))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_training_resumed_in_mid_epoch_ends_with_the_same_weights(accumulated, tmp_path):
    def run(folder: str, **options) -> small.RadianceFieldTraining:
        module = training(field={"gate_noise": 1.0})
        keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        options |= {"callbacks": [keep], "enable_checkpointing": True, "accumulate_grad_batches": accumulated}
        torch.manual_seed(len(options))
        small.fit(module, tmp_path / folder, 13, small.rays(batch_size=64, rays_per_epoch=64 * 20), **options)
        return module

    straight = run("straight")
    resumed = run("resumed", resume=tmp_path / "straight/step=6.ckpt")
    assert small.differing(straight.state_dict(), resumed.state_dict()) == []


def test_a_run_leaves_its_renderer(tmp_path, cache: Path):  # noqa: F811 - the fixture
    module = training()
    small.fit(module, tmp_path, 3, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    loaded, _ = load(tmp_path / "renderer")
    assert small.differing(loaded.state_dict(), module.renderer.state_dict()) == []
    assert loaded.proposal.anneal_steps == 50


def test_groups_of_parameters():
    with_grid = Renderer("single_grid", small.FIELDS["single_grid"], {"resolution": [1, 1, 1]}, 0.1)
    own, fields = with_grid.parameter_groups(), with_grid.field.parameter_groups()
    assert {name: list(map(id, group)) for name, group in own.items()} == {
        name: list(map(id, group)) for name, group in fields.items()
    }
    for kind in FIELDS:
        groups = renderer(kind).parameter_groups()
        listed = [id(parameter) for group in groups.values() for parameter in group]
        assert sorted(listed) == sorted(id(parameter) for parameter in renderer_of(groups, kind))


def renderer_of(groups: dict[str, list], kind: str) -> list:
    """All different parameters of groups, which must be as many as a renderer of that kind has."""
    found = {id(parameter): parameter for group in groups.values() for parameter in group}
    assert len(found) == len(list(renderer(kind).parameters()))
    return list(found.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": "even"}, "sampler is 'even'; valid are 'occupancy', 'proposal'"),
        ({"sampler": "occupancy"}, "proposal is {.*}, but sampler is 'occupancy'; it is for sampler 'proposal'"),
        ({"sampler": "occupancy", "proposal": None}, "occupancy is None; sampler 'occupancy' needs it"),
        (
            {"sampler": "occupancy", "proposal": None, "occupancy": {"resolution": [1, 1, 1]}},
            "step is None; sampler 'occupancy' needs it",
        ),
        ({"cone_angle": -1.0}, "cone_angle is -1.0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_choices_that_do_not_fit(changes, words):
    with pytest.raises(ValueError, match=words):
        Renderer(**{"kind": "single_grid", "field": {}, "sampler": "proposal", "proposal": PROPOSAL} | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": [24]}, "proposal.samples is .24. and proposal.resolutions .* an entry for each proposal"),
        ({"samples": [], "resolutions": []}, "of whom there is one at least"),
        ({"samples": [24, 0]}, "proposal.samples is 0; it must be a whole number of at least 1"),
        ({"final_samples": 1.5}, "proposal.final_samples is 1.5"),
        ({"resolutions": [[8, 32], [64, 8]]}, r"proposal.resolutions"),
        ({"resolutions": [8, 32]}, r"proposal.resolutions is 8; it must be \(coarsest, finest\)"),
        ({"resolutions": [[[8, 32], [8, 64]], [8, 64]]}, r"it must be a list of \(coarsest, finest\)"),
        ({"levels": 0}, "proposal.levels is 0"),
        ({"features": 0}, "proposal.features is 0"),
        ({"log2_table_size": 40}, "proposal.log2_table_size is 40"),
        ({"hidden_width": 0}, "proposal.hidden_width is 0"),
        ({"table_bound": -1.0}, "proposal.table_bound is -1.0"),
        ({"density_bias": math.nan}, "proposal.density_bias is nan"),
        ({"spacing": "log"}, "proposal.spacing is 'log'; valid are 'linear', 'piecewise'"),
        ({"padding": -0.1}, "proposal.padding is -0.1"),
        ({"anneal_steps": -1}, "proposal.anneal_steps is -1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_settings_out_of_range(changes, words):
    with pytest.raises(ValueError, match=words):
        ProposalSampler(**PROPOSAL | changes)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("interlevel_weight", 0.0, "interlevel_weight is 0.0; it must be above 0"),
        ("distortion_weight", -1.0, "distortion_weight is -1.0; it must be at least 0"),
    ],
)
def test_weights_out_of_range(name, value, words):
    with pytest.raises(ValueError, match=words):
        training(**{name: value})


def test_jitter_of_rays_is_one_number_each():
    with pytest.raises(ValueError, match=r"jitter has shape \(3,\); it must be one number a ray, \(4,\)"):
        stratified_bins(torch.zeros(4), torch.ones(4), 2, jitter=torch.zeros(3))
    edges = stratified_bins(torch.zeros(2), torch.ones(2), 2, jitter=torch.tensor([0.0, 0.5])).edges
    torch.testing.assert_close(edges, torch.tensor([[0.0, 0.25, 0.75], [0.125, 0.5, 0.875]]))
