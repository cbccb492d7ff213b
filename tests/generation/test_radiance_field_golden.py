"""Radiance fields against the authors' code and references written from papers (tests/golden/nerf)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.testing import assert_close

from generation.radiance_field.contraction import Ellipsoid, SceneSpace, contract
from generation.radiance_field.directions import frequency_embedding, spherical_harmonics
from generation.radiance_field.hash_experts import HashExpertField
from generation.radiance_field.heads import density_of
from generation.radiance_field.switch_nerf import ExpertPerceptrons
from kernels.expert_dispatch import combine, dispatch, load_balance_loss, route

FOLDER = Path(__file__).parent.parent / "golden" / "nerf"


def read(name: str, prefix: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors under a prefix, without it, and the configuration under that name."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
        settings = file.metadata().get(prefix.rstrip(".") or "config", "{}")
    return {key.removeprefix(prefix): value for key, value in tensors.items()}, json.loads(settings)


VOLUME, _ = read("volrend", "")


def mixture(dtype: torch.dtype) -> tuple[HashExpertField, dict[str, Tensor], dict]:
    """The field of the file: its gate has no layer norm, its head is the base of a field."""
    golden, settings = read("hmohe_f64", "")
    gate = settings["gate"]
    field = HashExpertField(
        expert_resolutions=settings["expert_res"],
        levels=settings["L"],
        features=settings["F"],
        log2_table_size=settings["log2T"],
        gate_resolutions=(gate["Nmin"], gate["Nmax"]),
        gate_levels=gate["L"],
        gate_features=gate["F"],
        gate_log2_table_size=gate["log2T"],
        gate_width=settings["gate_hidden"],
        gate_scale=1.0,
        hidden_width=settings["head_hidden"],
        geometry_features=3,
    ).to(dtype)
    field.gate.norm = torch.nn.Identity()
    with torch.no_grad():
        for name, parameter in parameters_of(field).items():
            parameter.copy_(golden[f"param.{name}"])
    return field, golden, settings


def parameters_of(field: HashExpertField) -> dict[str, Tensor]:
    return {
        "expert_table": field.experts.table, "gate_table": field.gate.grid.table,
        "gate_w1": field.gate.mlp[0].weight, "gate_b1": field.gate.mlp[0].bias, "gate_w2": field.gate.mlp[1].weight,
        "head_w1": field.base[0].weight, "head_b1": field.base[0].bias,
        "head_w2": field.base[1].weight, "head_b2": field.base[1].bias,
    }  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float32, 3e-4)])
def test_mixture_of_hash_experts(dtype, tolerance):
    """The file's scales differ in the last bit of float32 from C's exp2, so float64 does not agree to its own."""
    field, golden, settings = mixture(dtype)
    close = {"atol": tolerance, "rtol": 0, "check_dtype": False}
    points = golden["x"].to(dtype).requires_grad_()
    routing = field.route(points)
    assert torch.equal(routing.indices[0], golden["expert_index"].long())
    assert_close(routing.probabilities, golden["gate_probs"], **close)
    assert_close(routing.gates[0], golden["gate_value"], **close)
    features = field._features(field.space(points), routing)
    assert_close(combine(features, routing, torch.ones_like(routing.gates)), golden["features"], **close)
    output = combine(field.base(features), routing, torch.ones_like(routing.gates))
    assert_close(output, golden["out"], **close)
    balance = load_balance_loss(routing.probabilities, routing.indices[0])
    assert_close(balance, golden["l_aux"], **close)
    ((output * golden["grad_out"]).sum() + settings["aux_weight"] * balance).backward()
    for name, parameter in parameters_of(field).items():
        assert_close(parameter.grad, golden[f"grad.{name}"], **close)
    finest = max(high for _, high in settings["expert_res"])
    scale = golden["grad_x"].abs().max()
    assert_close(points.grad / scale, golden["grad_x"] / scale, atol=2e-7 * finest, rtol=0, check_dtype=False)


def test_bases_of_experts():
    field, golden, _ = mixture(torch.float32)
    assert torch.equal(field.experts.base, golden["expert_base"])


@pytest.mark.parametrize("levels", [4, 5])
def test_spherical_harmonics(levels):
    assert_close(spherical_harmonics(VOLUME["sh.dirs"], levels), VOLUME[f"sh.levels{levels}_raw_dirs"])


@pytest.mark.parametrize(("norm", "name"), [("l2", "l2"), ("l_inf", "linf")])
def test_contraction(norm, name):
    assert_close(contract(VOLUME["contract.x"], norm), VOLUME[f"contract.{name}"])
    space = SceneSpace(((-1, -1, -1), (1, 1, 1)), norm)
    assert_close(space(VOLUME["contract.x"]) * 4 - 2, VOLUME[f"contract.{name}"], atol=1e-6, rtol=1e-5)


def test_frequency_embedding():
    embedded = VOLUME["mega.embed_12"]
    assert_close(frequency_embedding(embedded[:, :3], 12), embedded)


def test_shifted_softplus():
    assert_close(density_of(10 * VOLUME["mega.embed_x"], "shifted_softplus", -1.0), VOLUME["mega.shifted_softplus"])


def test_ellipsoid():
    ellipsoid = Ellipsoid(VOLUME["mega.sphere_center"], VOLUME["mega.sphere_radius"])
    origins, directions = VOLUME["mega.o"], VOLUME["mega.d"]
    assert_close(ellipsoid.exit_distances(origins, directions), VOLUME["mega.intersect"])
    expected = VOLUME["mega.bg_pts"]
    points, distances = ellipsoid.inverted_points(origins, directions, expected[..., 3])
    assert_close(points, expected, atol=1e-5, rtol=0)
    finite = expected[..., 3] > 0
    assert finite.float().mean() > 0.8
    there = origins[:, None] + distances[..., None] * directions[:, None]
    radius = ((there - ellipsoid.centre) / ellipsoid.radius).norm(dim=-1)
    assert_close(radius[finite], 1 / expected[..., 3][finite], atol=0, rtol=1e-5)
    # The authors' distances, of which they make depths alone, leave out that a direction is shorter in the unit ball.
    nearest, _, length = ellipsoid._nearest(origins, directions)
    theirs = nearest + (distances - nearest) * length
    assert_close(theirs[finite], VOLUME["mega.bg_depth_real"][finite], atol=1e-5, rtol=1e-5)


def test_expert_layer_of_switch_nerf():
    golden, settings = read("switchnerf_moe_gate", "moelayer.")
    experts, layers = settings["E"], settings["layer_num"]
    ours = ExpertPerceptrons(experts, settings["M"], layers, settings["skips"])
    gate = golden["param.gates.0.wg.weight"].clone().requires_grad_()

    def of_layer(kind: str, layer: int, what: str) -> Tensor:
        names = [f"{kind}experts.0.experts.{e}.layers.{layer}.{what}" for e in range(experts)]
        stacked = torch.stack([golden[name] for name in names])
        return stacked.transpose(1, 2) if what == "weight" else stacked

    with torch.no_grad():
        for n in range(layers):
            ours.weights[n].copy_(of_layer("param.", n, "weight"))
            ours.biases[n].copy_(of_layer("param.", n, "bias"))
    tokens, gate_input = (golden[name].requires_grad_() for name in ("x", "gate_input"))
    sent = dispatch(tokens, route(gate_input @ gate.t()))
    output = combine(ours(sent.tokens, sent.starts), sent)
    assert_close(output, golden["out"], atol=1e-5, rtol=0)
    (output * golden["grad_out"]).sum().backward()
    close = {"atol": 1e-5, "rtol": 1e-5}
    for n in range(layers):
        assert_close(ours.weights[n].grad, of_layer("grad.", n, "weight"), **close)
        assert_close(ours.biases[n].grad, of_layer("grad.", n, "bias"), **close)
    assert_close(tokens.grad, golden["grad_x"], **close)
    assert_close(gate_input.grad, golden["grad_gate_input"], **close)
    assert_close(gate.grad, golden["grad.gates.0.wg.weight"], **close)
