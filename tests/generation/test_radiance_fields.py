"""Radiance fields: what they return, what reaches their parameters, and what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from generation.radiance_field.contraction import Ellipsoid, SceneSpace, contract
from generation.radiance_field.directions import spherical_harmonics
from generation.radiance_field.hash_experts import ColumnNorm, HashExpertField
from generation.radiance_field.heads import Perceptron, density_of, truncated_exp
from generation.radiance_field.single_grid import SingleGridField
from generation.radiance_field.switch_nerf import BackgroundField, SwitchNeRFField

BOX = ((-1.0, -2.0, 0.0), (3.0, 1.0, 1.0))
SMALL_GRID = {"levels": 3, "log2_table_size": 8, "hidden_width": 8, "geometry_features": 5, "direction_levels": 2}
SMALL_GATE = {"gate_resolutions": (4, 8), "gate_levels": 2, "gate_log2_table_size": 7, "gate_width": 6}
SMALL_EXPERTS = [(4, 16), (4, 24), (4, 32)]
SMALL_SWITCH = {"width": 8, "experts": 3, "expert_layers": 3, "skips": (1,), "position_octaves": 2, "colour_width": 6}
SMALL = {
    HashExpertField: SMALL_GRID | SMALL_GATE | {"box": BOX, "expert_resolutions": SMALL_EXPERTS, "table_bound": 1.0},
    SingleGridField: SMALL_GRID | {"box": BOX, "resolutions": (4, 24), "table_bound": 1.0},
    SwitchNeRFField: SMALL_SWITCH,
    BackgroundField: {"width": 8, "layers": 3, "skips": (1,), "position_octaves": 2},
}

every_field = pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.__name__)
mixtures = pytest.mark.parametrize("kind", [HashExpertField, SwitchNeRFField], ids=lambda kind: kind.__name__)


def small(kind: type[nn.Module], **options) -> nn.Module:
    torch.manual_seed(0)
    return kind(**SMALL[kind] | {"appearances": 4, "appearance_features": 3} | options)


def samples(kind: type[nn.Module], count: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Points, directions and appearances."""
    generator = torch.Generator().manual_seed(1)
    least, greatest = torch.tensor(BOX)
    points = least + (greatest - least) * torch.rand(count, 3, generator=generator)
    if kind is BackgroundField:
        points = torch.cat([F.normalize(points, dim=1), torch.rand(count, 1, generator=generator)], 1)
    directions = F.normalize(torch.randn(count, 3, generator=generator), dim=1)
    return points, directions, torch.randint(4, (count,), generator=generator)


@every_field
def test_what_is_returned(kind):
    field, (points, directions, appearance) = small(kind), samples(kind)
    output = field(points, directions, appearance)
    assert output.density.shape == (60,)
    assert output.colour.shape == (60, 3)
    assert output.density.dtype == output.colour.dtype == torch.float32
    assert (output.density >= 0).all()
    assert ((output.colour > 0) & (output.colour < 1)).all()
    if kind in (HashExpertField, SwitchNeRFField):
        assert output.expert.shape == (60,)
        assert output.expert.dtype == torch.int64
        assert output.loads.tolist() == output.expert.bincount(minlength=3).tolist()
        assert output.load_fractions.sum() == pytest.approx(1)
        assert output.mean_probabilities.sum() == pytest.approx(1)
        assert 0 < output.balance_loss < 3
    else:
        nothing = (output.expert, output.loads, output.load_fractions, output.mean_probabilities, output.dropped)
        assert nothing == (None,) * 5
        assert output.balance_loss is None


@every_field
def test_no_points(kind):
    field, (points, directions, appearance) = small(kind), samples(kind, 0)
    output = field(points, directions, appearance)
    assert output.density.shape == (0,)
    assert output.colour.shape == (0, 3)


@every_field
def test_gradients_reach_every_parameter(kind):
    field, (points, directions, appearance) = small(kind), samples(kind, 400)
    output = field(points, directions, appearance)
    (output.density.square().mean() + output.colour.square().mean()).backward()
    for name, parameter in field.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", [HashExpertField, SingleGridField, SwitchNeRFField], ids=lambda kind: kind.__name__)
def test_groups_hold_every_parameter_once(kind):
    field = small(kind)
    grouped = [id(parameter) for group in field.parameter_groups().values() for parameter in group]
    assert sorted(grouped) == sorted(map(id, field.parameters()))


@every_field
def test_chunks_give_what_the_whole_gives(kind):
    field, given = small(kind).eval(), samples(kind)
    with torch.no_grad():
        whole = field(*given)
        parts = [field(*chunk) for chunk in zip(*(x.split(17) for x in given), strict=True)]
    assert_close(torch.cat([part.density for part in parts]), whole.density)
    assert_close(torch.cat([part.colour for part in parts]), whole.colour)
    if whole.expert is not None:
        assert torch.equal(torch.cat([part.expert for part in parts]), whole.expert)


@every_field
def test_order_of_points_does_not_matter(kind):
    field, given = small(kind).eval(), samples(kind)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    one, other = field(*given), field(*(x[order] for x in given))
    assert_close(one.density[order], other.density)
    assert_close(one.colour[order], other.colour)


@pytest.mark.parametrize("kind", [HashExpertField, SingleGridField, SwitchNeRFField], ids=lambda kind: kind.__name__)
def test_density_alone(kind):
    field, given = small(kind).eval(), samples(kind)
    assert_close(field.density(given[0]).density, field(*given).density)


@every_field
def test_appearance(kind):
    field, (points, directions, appearance) = small(kind).eval(), samples(kind)
    each = field(points, directions, torch.full_like(appearance, 2)).colour
    assert_close(field(points, directions, 2).colour, each)
    assert not torch.allclose(field(points, directions, 1).colour, each)
    mean = field(points, directions).colour
    with torch.no_grad():
        field.appearance.weight[:] = field.appearance.weight.mean(0)
    assert_close(field(points, directions, appearance).colour, mean)
    without = small(kind, appearances=0)
    assert without.appearance is None
    assert without(points, directions, appearance).colour.shape == (60, 3)


@every_field
@pytest.mark.filterwarnings("ignore:.*In CPU autocast:UserWarning")
def test_under_autocast(kind):
    field, given = small(kind), samples(kind)
    field.eval()
    expected = field(*given)
    field.train()
    if hasattr(field, "density_noise"):
        field.density_noise = field.capacity_factor = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        output = field(*given)
    assert output.density.dtype == output.colour.dtype == torch.float32
    assert_close(output.colour, expected.colour, atol=0.02, rtol=0)
    output.colour.sum().backward()
    if kind is HashExpertField:
        assert torch.equal(output.expert, expected.expert)


def test_gradients_in_float64():
    field = small(HashExpertField).double()
    points, directions, appearance = samples(HashExpertField, 7)
    parameters = dict(field.named_parameters())
    points = points.double().requires_grad_()

    def outputs(points: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        given = (points, directions.double(), appearance)
        output = torch.func.functional_call(field, dict(zip(parameters, values, strict=True)), given)
        return output.density, output.colour, output.balance_loss

    inputs = (points, *(parameter.detach().requires_grad_() for parameter in parameters.values()))
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)


def test_gradients_of_gradients():
    """Normals are gradients of the density; a loss on them needs the `torch` backend."""
    field = small(HashExpertField, backend="torch").double()
    points = samples(HashExpertField, 9)[0].double().requires_grad_()

    def normals(points: Tensor) -> Tensor:
        return torch.autograd.grad(field.density(points).density.sum(), points, create_graph=True)[0]

    assert torch.autograd.gradcheck(normals, (points,), fast_mode=True)


@mixtures
def test_capacity_counts_in_training_alone(kind):
    field = small(kind, capacity_factor=1.0)
    given = samples(kind, 61)
    output = field(*given)
    most = math.ceil(61 / 3)
    dropped = sum(max(int(load) - most, 0) for load in output.loads)
    assert int(output.dropped) == dropped > 0
    assert int(field.eval()(*given).dropped) == 0


def test_dropped_points_have_no_features():
    field = small(HashExpertField, capacity_factor=0.5)
    given = samples(HashExpertField)
    output = field(*given)
    nothing = field.density_of(field.base(torch.zeros(1, field.experts.grid.width)))
    lost = ~output.routing.kept[0]
    assert 0 < int(lost.sum()) < 60
    assert_close(output.density[lost], nothing.expand(int(lost.sum())))
    confidence = output.routing.gates[0].detach()
    for e in range(3):
        of_expert = output.expert == e
        if (lost & of_expert).any():
            assert confidence[lost & of_expert].max() <= confidence[~lost & of_expert].min()


def test_a_dead_expert_is_seen():
    field = small(HashExpertField)
    with torch.no_grad():
        field.gate.mlp[1].weight.zero_()
        field.gate.mlp[1].weight[1] = 1.0
        field.gate.mlp[0].bias.fill_(50.0)
    output = field(*samples(HashExpertField))
    assert output.load_fractions.tolist() == [0, 1, 0]
    assert output.balance_loss.item() == pytest.approx(3)
    assert output.mean_probabilities[1] > 0.99


def test_gate_is_a_factor_of_features():
    """s p_i H_i(x), with s = E unless it is given."""
    points = samples(HashExpertField)[0]
    for scale, factor in ((None, 3.0), (1.0, 1.0)):
        field = small(HashExpertField, gate_scale=scale)
        unit = field.space(points)
        routing = field.route(points)
        order = routing.places.order
        features = field._features(unit, routing)
        plain = field.experts(unit[order], routing.indices[0][order])
        assert_close(features, plain * (factor * routing.gates[0][order])[:, None])


def test_gate_noise_is_for_training():
    field, points = small(HashExpertField, gate_noise=100.0), samples(HashExpertField)[0]
    torch.manual_seed(0)
    one, other = field.route(points), field.route(points)
    assert not torch.equal(one.indices, other.indices)
    field.eval()
    assert torch.equal(field.route(points).scores, field.route(points).scores)


def test_density_noise_is_for_training():
    given = samples(SwitchNeRFField)
    field = small(SwitchNeRFField)
    assert not torch.equal(field(*given).density, field(*given).density)
    field.eval()
    assert torch.equal(field(*given).density, field(*given).density)


def test_box_of_switch_nerf():
    """Twice as large a box of points twice as far apart is the same; without one, points are taken as they are."""
    points, directions, appearance = samples(SwitchNeRFField)
    plain, field = small(SwitchNeRFField).eval(), small(SwitchNeRFField, box=((-1, -2, -2), (3, 2, 2))).eval()
    moved = points * 2 + torch.tensor([1.0, 0, 0])
    assert_close(field(moved, directions, appearance).density, plain(points, directions, appearance).density)
    assert torch.equal(plain.space.centred(points), points)


def test_mixture_without_drops_is_each_expert_alone():
    field, (points, directions, appearance) = small(SwitchNeRFField).eval(), samples(SwitchNeRFField)
    output = field(points, directions, appearance)
    embedded = field.position(
        torch.cat([points] + [f(points * 2**k) for k in (0, 1) for f in (torch.sin, torch.cos)], 1)
    )
    probabilities = field.gate(embedded).softmax(1)
    for n in range(8):
        e = int(probabilities[n].argmax())
        h = skipped = embedded[n]
        for layer in range(3):
            h = h @ field.experts.weights[layer][e] + field.experts.biases[layer][e]
            h = h + skipped if layer == 1 else h
            h = h.relu() if layer < 2 else h
        expected = F.softplus(field.raw_density((h * probabilities[n, e]).relu()) - 1)
        assert_close(output.density[n], expected[0])


def test_state_dict():
    names = {
        "space.box", "appearance.weight", "gate.grid.table", "gate.norm.weight", "gate.norm.bias", "gate.mlp.0.weight",
        "gate.mlp.0.bias", "gate.mlp.1.weight", "experts.table", "experts.base", "base.0.weight", "base.0.bias",
        "base.1.weight", "base.1.bias", "colour.0.weight", "colour.0.bias", "colour.1.weight", "colour.1.bias",
        "colour.2.weight", "colour.2.bias",
    }  # fmt: skip
    field = small(HashExpertField)
    assert set(field.state_dict()) == names
    assert field.experts.base.tolist() == [0, *field.experts.grid.expert_base[1:]]


def test_column_norm_is_layer_norm():
    torch.manual_seed(0)
    ours, theirs = ColumnNorm(6).double(), nn.LayerNorm(6).double()
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    rows = torch.randn(6, 20, dtype=torch.float64).t().requires_grad_()
    assert_close(ours(rows), theirs(rows))
    assert torch.autograd.gradcheck(ours, (rows,))
    assert torch.autograd.gradgradcheck(ours, (rows,))


def test_perceptron_of_columns():
    torch.manual_seed(0)
    network, rows = Perceptron([5, 7, 3], final_bias=False), torch.randn(11, 5)
    assert_close(network.of_columns(rows.t()), network(rows).t())
    assert network[1].bias is None


def test_truncated_exp():
    x = torch.tensor([-3.0, 2.0, 20.0, 40.0], requires_grad=True)
    y = truncated_exp(x)
    assert_close(y, x.exp())
    y.sum().backward()
    assert_close(x.grad, x.detach().clamp(max=15).exp())
    assert density_of(x.to(torch.bfloat16), "truncated_exp", -1.0).dtype == torch.float32
    steep = truncated_exp(torch.tensor([79.0, 81.0, 1e6, torch.nan]))
    assert_close(steep[:1], torch.tensor([79.0]).exp())
    assert steep[1] == steep[2] < torch.inf
    assert steep[3].isnan()


def test_harmonics_are_orthonormal():
    """Integrated over the sphere by a product rule that is exact for their degrees."""
    nodes, weights = (torch.tensor(values, dtype=torch.float64) for values in zip(*gauss_legendre(), strict=True))
    angles = torch.arange(12, dtype=torch.float64) * (2 * math.pi / 12)
    z, angle = nodes.repeat_interleave(12), angles.repeat(len(nodes))
    ring = (1 - z * z).sqrt()
    values = spherical_harmonics(torch.stack([ring * angle.cos(), ring * angle.sin(), z], 1), 5)
    weights = weights.repeat_interleave(12) * (2 * math.pi / 12)
    assert_close(values.t() @ (values * weights[:, None]), torch.eye(25, dtype=torch.float64))


def gauss_legendre() -> list[tuple[float, float]]:
    """Six nodes and weights: eigenvalues of the Jacobi matrix."""
    off = torch.tensor([n / math.sqrt(4 * n * n - 1) for n in range(1, 6)], dtype=torch.float64)
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return [(float(node), 2 * float(first) ** 2) for node, first in zip(nodes, vectors[0], strict=True)]


def test_box_keeps_proportions():
    space = SceneSpace(BOX)
    assert_close(space(torch.tensor(BOX)), torch.tensor([[0, 0, 0], [1, 0.75, 0.25]]))


@pytest.mark.parametrize("norm", ["l2", "l_inf"])
def test_contracted_space_is_in_the_cube(norm):
    space = SceneSpace(BOX, norm)
    points = torch.randn(200, 3) * 10.0 ** torch.arange(-3, 7).repeat(20)[:, None]
    assert ((space(points) >= 0) & (space(points) <= 1)).all()
    middle = torch.tensor(BOX).mean(0, keepdim=True).requires_grad_()
    assert_close(space(middle), torch.full((1, 3), 0.5))
    assert torch.autograd.grad(space(middle).sum(), middle)[0].isfinite().all()
    assert_close(contract(torch.tensor([[0.0, 0, 4]]), norm), torch.tensor([[0, 0, 1.75]]))


def test_ellipsoid_around_cameras():
    positions = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 2.0, 3.0])
    ellipsoid = Ellipsoid.around(positions, margin=1.0)
    assert ((positions - ellipsoid.centre) / ellipsoid.radius).norm(dim=1).max() == pytest.approx(1)
    with_altitudes = Ellipsoid.around(positions, altitude_range=(-0.5, 0.7))
    assert with_altitudes.centre[0] == pytest.approx(0.1)
    assert with_altitudes.radius[0] > 0.6
    with pytest.raises(ValueError, match="ranges"):
        Ellipsoid.around(positions * torch.tensor([0.0, 1, 1]))
    with pytest.raises(ValueError, match="1 of 1 rays miss"):
        ellipsoid.exit_distances(torch.tensor([[9.0, 9, 9]]), torch.tensor([[1.0, 0, 0]]))
    with pytest.raises(ValueError, match="inverse_radius"):
        ellipsoid.inverted_points(positions, positions, torch.zeros(3, 2))


BAD_ARGUMENTS = [
    (HashExpertField, "box", ((0, 0, 0), (1, 0, 1)), "box is"),
    (HashExpertField, "box", (1, 2), "box is"),
    (HashExpertField, "contraction", "l3", "contraction is 'l3'; valid are 'none', 'l2', 'l_inf'"),
    (HashExpertField, "expert_resolutions", (16, 32), "expert_resolutions is"),
    (HashExpertField, "expert_resolutions", [], "expert_resolutions is"),
    (HashExpertField, "expert_resolutions", [(32, 16)], "expert_resolutions holds"),
    (HashExpertField, "levels", 0, "levels is 0"),
    (HashExpertField, "features", 3, "features is 3; valid are 1, 2, 4, 8"),
    (HashExpertField, "log2_table_size", 40, "log2_table_size is 40"),
    (HashExpertField, "gate_resolutions", 16, "gate_resolutions is 16"),
    (HashExpertField, "gate_resolutions", (32, 16), "gate_resolutions holds"),
    (HashExpertField, "gate_levels", 1.5, "gate_levels is 1.5"),
    (HashExpertField, "gate_features", 5, "gate_features is 5"),
    (HashExpertField, "gate_width", 0, "gate_width is 0"),
    (HashExpertField, "gate_scale", 0.0, "gate_scale is 0.0"),
    (HashExpertField, "gate_noise", -1.0, "gate_noise is -1.0"),
    (HashExpertField, "capacity_factor", -1.0, "capacity_factor is -1.0"),
    (HashExpertField, "table_bound", math.nan, "table_bound is nan"),
    (SingleGridField, "resolutions", [(4, 16), (4, 32)], "resolutions is"),
    (SingleGridField, "resolutions", "16", "resolutions"),
    (SingleGridField, "hidden_width", 0, "hidden_width is 0"),
    (SingleGridField, "geometry_features", 0, "geometry_features is 0"),
    (SingleGridField, "colour_layers", 0, "colour_layers is 0"),
    (SingleGridField, "direction_levels", 6, "direction_levels is 6"),
    (SingleGridField, "appearances", -1, "appearances is -1"),
    (SingleGridField, "appearance_features", 0, "appearance_features is 0"),
    (SingleGridField, "density_activation", "relu", "density_activation is 'relu'"),
    (SingleGridField, "density_bias", math.inf, "density_bias is inf"),
    (SwitchNeRFField, "box", ((0, 0, 0), (0, 0, 0)), "box is"),
    (SwitchNeRFField, "width", 0, "width is 0"),
    (SwitchNeRFField, "experts", 0, "experts is 0"),
    (SwitchNeRFField, "expert_layers", 0, "expert_layers is 0"),
    (SwitchNeRFField, "skips", (3,), "skips is 3"),
    (SwitchNeRFField, "position_octaves", -1, "position_octaves is -1"),
    (SwitchNeRFField, "capacity_factor", -2, "capacity_factor is -2"),
    (SwitchNeRFField, "density_noise", -2, "density_noise is -2"),
    (BackgroundField, "width", 1, "width is 1"),
    (BackgroundField, "layers", 0, "layers is 0"),
    (BackgroundField, "skips", (0,), "skips is 0"),
    (BackgroundField, "direction_octaves", 0.5, "direction_octaves is 0.5"),
]


@pytest.mark.parametrize(("kind", "name", "value", "words"), BAD_ARGUMENTS)
def test_bad_arguments(kind, name, value, words):
    with pytest.raises(ValueError, match="^" + words.replace("(", r"\(").replace(")", r"\)")):
        small(kind, **{name: value})


@every_field
def test_bad_calls(kind):
    field, (points, directions, appearance) = small(kind), samples(kind)
    for given, words in (
        ((points[:, :2], directions, appearance), "points have shape"),
        ((points, directions[:5], appearance), "directions have shape"),
        ((points, directions, appearance[:5]), "appearance has shape"),
        ((points, directions, appearance.float()), "appearance has shape"),
        ((points, directions, appearance + 1), "appearance is from"),
        ((points, directions, 4), "appearance is 4"),
    ):
        with pytest.raises(ValueError, match=words):
            field(*given)


def test_bad_directions_and_norms():
    with pytest.raises(ValueError, match="levels is 6"):
        spherical_harmonics(torch.zeros(2, 3), 6)
    with pytest.raises(ValueError, match="directions have shape"):
        spherical_harmonics(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="norm is 'none'"):
        contract(torch.zeros(2, 3), "none")
