"""What `benchmark radiance-field` writes, and that it times nothing that is wrong; no times."""

import json

import pytest
import torch

from generation import benchmark as dispatcher
from generation.radiance_field import benchmark
from generation.radiance_field.district_city import City
from kernels.hash_encoding import HashGrid


@pytest.fixture(autouse=True)
def small(monkeypatch):
    threads = torch.get_num_threads()
    sizes = {"experts": 2, "width": 8, "layers": 2, "skips": (1,)}
    small = {"LEVELS": 3, "SMALL_POINTS": 64, "SWITCH_NERF": sizes, "SWITCH_POINTS": 16, "RAYS": 50}
    city = City(image_size=8, train_views=2, test_views=1, samples=1)
    for name, value in (small | {"CITY": city}).items():
        monkeypatch.setattr(benchmark, name, value)
    yield
    torch.set_num_threads(threads)


def command(output, *more):
    options = ["--seconds", "0.01", "--threads", "1", "--points", "70", "--tables", "9", "8", "--samples", "100"]
    dispatcher.main(["radiance-field", *options, *more, "--output", str(output)])
    return json.loads(output.read_text())


def test_command(tmp_path, capsys):
    report = command(tmp_path / "new/radiance_field.json")
    assert report.keys() == {"machine", "threads", "points", *benchmark.SECTIONS, "bars"}
    assert (report["threads"], report["points"]) == (1, 70)
    passes = [(f"2^{size}", of) for size in (9, 8) for of in ("forward", "forward and backward")]
    for name in ("encoding", "encoding-kept"):
        assert [(row["rows a level"], row["of"]) for row in report[name]] == passes
        assert all(row["ours_ms"] > 0 and row["times faster"] > 0 for row in report[name])
    assert [row["table_MiB"] > 0 for row in report["mixture"]] == [True] * 3
    assert all(row[f"{experts}_ns"] > 0 for row in report["experts"] for experts in (1, 2, 4, 8, 16))
    assert [row["of"].split(",")[0] for row in report["rendering"]] == ["marching", "compositing"]
    assert all(row["percent"] > 0 for row in report["dispatch"])
    *parts, whole = report["step"]
    assert sum(row["ms"] for row in parts) == pytest.approx(whole["ms"])
    assert all((bar["met"] == "yes") == met(bar) for bar in report["bars"])
    assert f"written to {tmp_path / 'new/radiance_field.json'}" in capsys.readouterr().out


def met(bar):
    limit = float(bar["bar"].split()[-1])
    return bar["found"] >= limit if bar["bar"].startswith("at least") else bar["found"] <= limit


def test_sections_alone(tmp_path):
    report = command(tmp_path / "one.json", "--only", "mixture")
    assert report.keys() == {"machine", "threads", "points", "mixture", "bars"}


def test_the_step_has_the_loss_of_the_citys_recipe():
    step = benchmark.CityStep(100)
    off = torch.full_like(step.wanted, 0.06)
    wanted = torch.tensor(0.06 - 0.5 * 0.03)  # smooth L1 of 0.06 with the transition at 0.03
    torch.testing.assert_close(step._error(step.wanted + off), wanted, atol=1e-5, rtol=0)


def test_indexing_reads_the_corners_of_a_cell():
    """A table that holds x of every vertex interpolates to x, whatever the hash, if no two vertices share a row."""
    grid = HashGrid((4, 4), levels=1, log2_table_size=20, convention="nerfstudio")
    vertices = torch.cartesian_prod(*[torch.arange(5)] * 3)
    slots = (vertices[:, 0] ^ vertices[:, 1] * 2654435761 ^ vertices[:, 2] * 805459861) % (1 << 20)
    assert len(slots.unique()) == len(slots)
    table = torch.zeros(1 << 20, 2).index_copy(0, slots, vertices[:, :2].float())
    points = torch.rand(50, 3)
    torch.testing.assert_close(benchmark.indexing(points, table, grid), 4 * points[:, :2])


@pytest.mark.parametrize("wrong", ["features", "gradients", "one convention"])
def test_no_grid_is_timed_that_is_wrong(wrong, monkeypatch, tmp_path):
    right = benchmark.hash_encoding

    def encode(points, table, grid, backend=None, **options):
        if backend is not None or (wrong == "one convention" and not grid.staggered):
            return right(points, table, grid, backend=backend, **options)
        given = table * 1.01 if wrong == "features" else (table * 2 - table.detach())
        return right(points, given if wrong != "one convention" else table.roll(1, 0), grid, **options)

    monkeypatch.setattr(benchmark, "hash_encoding", encode)
    convention = "tiny-cuda-nn's" if wrong == "one convention" else "nerfstudio's"
    with pytest.raises(SystemExit, match=f"hash encoding in {convention} convention: the numbers are not those"):
        command(tmp_path / "none.json", "--only", "encoding")
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize("wrong", ["march", "composite"])
def test_no_rendering_is_timed_that_is_wrong(wrong, monkeypatch, tmp_path):
    right = getattr(benchmark.CityStep, wrong)

    def other(self, backend=None):
        made = right(self, backend)
        return made if backend != "native" else type(made)([made[0] * 1.01, *made[1:]]) if wrong == "composite" else (
            made._replace(start=made.start + 0.01))  # fmt: skip

    monkeypatch.setattr(benchmark.CityStep, wrong, other)
    with pytest.raises(SystemExit, match=f"{wrong.removesuffix('e')}ing: the numbers are not those of the rival"):
        command(tmp_path / "none.json", "--only", "rendering")


@pytest.mark.parametrize("arguments", [["--points", "0"], ["--tables", "7"], ["--only", "all"], ["--threads", "0"]])
def test_bad_options(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(tmp_path / "none.json", *arguments)
    assert arguments[0] in capsys.readouterr().err
