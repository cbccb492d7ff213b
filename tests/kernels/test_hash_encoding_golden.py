"""Hash encodings against outputs of the authors' code and references written from it; a mixture with its networks."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from kernels.hash_encoding import HashGrid, hash_encoding
from kernels.hash_encoding.grid import Level
from kernels.hash_encoding.reference import slot

FOLDER = Path(__file__).parent.parent / "golden" / "nerf"
BACKENDS = ("reference", "torch", "native")
TCNN_CASES = ("c0", "c1", "c2", "c3", "c4", "c5")

every_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
each_tcnn_case = pytest.mark.parametrize("case", TCNN_CASES)
each_nerfstudio_case = pytest.mark.parametrize("case", ["c0", "c1", "c2"])
each_set_of_points = pytest.mark.parametrize("case", ["exact", "oob"])


def read(name: str) -> tuple[dict[str, Tensor], dict[str, dict]]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        settings = {key: json.loads(text) for key, text in file.metadata().items() if text.startswith("{")}
        return {key: file.get_tensor(key) for key in file.keys()}, settings  # noqa: SIM118 - no mapping


TCNN, TCNN_SETTINGS = read("tcnn_hash_f64")
NERFSTUDIO, NERFSTUDIO_SETTINGS = read("nerfstudio_hash")
MIXTURE, MIXTURE_SETTINGS = read("hmohe_f64")


def tcnn_grid(case: str) -> HashGrid:
    settings = TCNN_SETTINGS[case]
    return HashGrid.growing(
        settings["Nmin"], settings["b"], dims=settings["D"], levels=settings["L"], features=settings["F"],
        log2_table_size=settings["log2T"], interpolation=settings["interp"].lower(),
    )  # fmt: skip


def nerfstudio_grid(case: str) -> HashGrid:
    settings = NERFSTUDIO_SETTINGS[case]
    return HashGrid(
        (settings["min_res"], settings["max_res"]), levels=settings["num_levels"],
        features=settings["features_per_level"], log2_table_size=settings["log2_hashmap_size"], convention="nerfstudio",
    )  # fmt: skip


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


def same_scales(rows: tuple[Level, ...], scales: Tensor) -> None:
    """But for the last bit, in which NumPy's exp2, by which the files' scales were computed, is not always rounded."""
    assert [row.scale for row in rows] == pytest.approx(scales.tolist(), rel=1.3e-7, abs=0)


@pytest.mark.parametrize("case", [*TCNN_CASES, "exact"])
def test_levels_of_tiny_cuda_nn(case):
    grid = tcnn_grid(case)
    golden = {key: TCNN[f"{case}.{key}"].tolist() for key in ("resolution", "offsets", "hashed")}
    same_scales(grid.rows, TCNN[f"{case}.scale"])
    assert [row.resolution for row in grid.rows] == golden["resolution"]
    assert [*(row.offset for row in grid.rows), grid.entries] == golden["offsets"]
    assert [row.hashed for row in grid.rows] == [bool(hashed) for hashed in golden["hashed"]]


@pytest.mark.parametrize("case", [*TCNN_CASES, "exact", "oob"])
def test_rows_of_tiny_cuda_nn(case):
    grid = tcnn_grid("exact" if case == "oob" else case)
    index = TCNN[f"{case}.idx64" if case in TCNN_CASES else f"{case}.idx"]
    points = TCNN[f"{case}.x"][: len(index)].double()
    for level, row in enumerate(grid.rows):
        cell = (points * row.scale + 0.5).floor().long()
        for corner in range(index.shape[2]):
            vertex = cell + torch.tensor([corner >> d & 1 for d in range(grid.dims)])
            assert torch.equal(slot(vertex, row) + row.offset, index[:, level, corner].long())


def has_the_scales_of(case: str) -> bool:
    return [row.scale for row in tcnn_grid(case).rows] == TCNN[f"{case}.scale"].tolist()


def check_tcnn(case: str, backend: str, dtype: torch.dtype) -> None:
    """Features and gradients, within the tolerances of the files' README."""
    grid, golden = tcnn_grid(case), {k.split(".")[1]: x for k, x in TCNN.items() if k.startswith(f"{case}.")}
    points, table = (golden[name].to(dtype).requires_grad_() for name in ("x", "table"))
    features = hash_encoding(points, table, grid, backend=backend)
    of_points, of_table = torch.autograd.grad(features, (points, table), golden["grad_out"].to(dtype))
    finest = max(row.scale for row in grid.rows)
    exact = dtype == torch.float64 and has_the_scales_of(case)
    close(features, golden["out"], 1e-12 if exact else max(4e-7 * finest, 2e-6))
    close(of_table, golden["grad_table"], 2e-6 if exact else max(4e-7 * finest, 2e-6))  # stored in float32
    expected = golden.get("grad_x", torch.zeros_like(points))
    close(of_points, expected, (1e-12 if exact else 2e-7 * finest) * expected.abs().max().item())


@each_tcnn_case
@every_backend
@each_dtype
def test_tiny_cuda_nn(case, backend, dtype):
    check_tcnn(case, backend, dtype)


@pytest.mark.parametrize("case", [case for case in TCNN_CASES if f"{case}.v" in TCNN])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_second_derivatives_of_tiny_cuda_nn(case, backend):
    names = ("x", "table", "grad_out", "v", "grad2_table")
    points, table, upstream, v, expected = (TCNN[f"{case}.{name}"].double() for name in names)
    points.requires_grad_()
    table.requires_grad_()
    grid = tcnn_grid(case)
    features = hash_encoding(points, table, grid, backend=backend)
    [of_points] = torch.autograd.grad(features, points, upstream, create_graph=True)
    [of_table] = torch.autograd.grad(of_points, table, v)
    finest = max(row.scale for row in grid.rows)
    close(of_table, expected, (2e-7 if has_the_scales_of(case) else 2e-7 * finest) * expected.abs().max().item())


def check_points(case: str, backend: str, dtype: torch.dtype) -> None:
    points, table = TCNN[f"{case}.x"].to(dtype), TCNN["exact.table"].to(dtype)
    features = hash_encoding(points, table, tcnn_grid("exact"), backend=backend)
    close(features, TCNN[f"{case}.out"], 1e-6 if case == "exact" else 4e-7 * 511)


@each_set_of_points
@every_backend
@each_dtype
def test_points_on_vertices_and_outside(case, backend, dtype):
    check_points(case, backend, dtype)


def check_nerfstudio(case: str, backend: str) -> None:
    grid, golden = nerfstudio_grid(case), {k.split(".")[1]: x for k, x in NERFSTUDIO.items() if k.startswith(case)}
    assert [row.scale for row in grid.rows] == golden["scalings"].tolist()
    points, table = (golden[name].requires_grad_() for name in ("x", "table"))
    features = hash_encoding(points, table, grid, backend=backend)
    of_points, of_table = torch.autograd.grad(features, (points, table), golden["grad_out"])
    close(features, golden["out"], 1e-5)
    close(of_table, golden["grad_table"], 1e-5)
    close(of_points, golden["grad_x"], 1e-4 * golden["grad_x"].abs().max().item())


@each_nerfstudio_case
@every_backend
def test_nerfstudio(case, backend):
    check_nerfstudio(case, backend)


def check_mixture(backend: str, dtype: torch.dtype) -> None:
    """The field of the file, its networks in plain PyTorch; in float64 to the last bit of the finest scale."""
    config = MIXTURE_SETTINGS["config"]
    gate_config = config["gate"]
    sizes = {"levels": config["L"], "features": config["F"], "log2_table_size": config["log2T"]}
    grid = HashGrid(config["expert_res"], **sizes)
    gate_grid = HashGrid(
        (gate_config["Nmin"], gate_config["Nmax"]), levels=gate_config["L"], features=gate_config["F"],
        log2_table_size=gate_config["log2T"],
    )  # fmt: skip
    assert list(grid.expert_base) == MIXTURE["expert_base"].tolist()
    for index in range(config["E"]):
        same_scales(grid.rows_of(index), MIXTURE[f"expert{index}.scale"])
    leaves = {k: x.to(dtype).requires_grad_() for k, x in MIXTURE.items() if k.startswith("param.") or k == "x"}
    x, parameters = leaves["x"], {key.removeprefix("param."): tensor for key, tensor in leaves.items()}

    gate_features = hash_encoding(x, parameters["gate_table"], gate_grid, backend=backend)
    hidden = F.linear(gate_features, parameters["gate_w1"], parameters["gate_b1"]).relu()
    probabilities = F.linear(hidden, parameters["gate_w2"]).softmax(-1)
    value, expert = probabilities.max(-1)
    features = hash_encoding(x, parameters["expert_table"], grid, expert=expert, gate=value, backend=backend)
    hidden = F.linear(features, parameters["head_w1"], parameters["head_b1"]).relu()
    output = F.linear(hidden, parameters["head_w2"], parameters["head_b2"])
    share = torch.bincount(expert, minlength=config["E"]) / len(x)
    auxiliary = config["E"] * (probabilities.mean(0) * share).sum()

    tolerance = 3e-4 if dtype == torch.float32 else 5e-5
    assert torch.equal(expert.int(), MIXTURE["expert_index"])
    for name, actual in (("gate_features", gate_features), ("features", features), ("out", output)):
        close(actual, MIXTURE[name], tolerance)
    close(auxiliary, MIXTURE["l_aux"], tolerance)
    loss = (output * MIXTURE["grad_out"].to(dtype)).sum() + config["aux_weight"] * auxiliary
    for (key, leaf), gradient in zip(leaves.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
        expected = MIXTURE["grad_x" if key == "x" else key.replace("param", "grad")]
        assert gradient.shape == leaf.shape
        close(gradient, expected, tolerance * max(1.0, expected.abs().max().item()))


@every_backend
@each_dtype
def test_mixture_of_hash_experts(backend, dtype):
    check_mixture(backend, dtype)
