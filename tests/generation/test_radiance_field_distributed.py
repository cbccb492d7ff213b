"""Radiance fields on several processes: rays shared out, and experts shared out; both against one process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from generation.radiance_field import expert_sharding
from generation.radiance_field.expert_sharding import owned
from tests.generation import test_outside_of_ellipsoid as outside
from tests.generation import test_proposal_sampling as proposals
from tests.generation import test_radiance_field_training as small
from tests.generation.test_radiance_field_training import cache  # noqa: F401 - a fixture of the module

ROOT = Path(__file__).parents[2]
CASES = {
    "all rays": {"samples": 1 << 14},
    "rays of the budget": {"samples": 512},
    "one ray": {"samples": 1},  # the other process has none
    "single grid": {"kind": "single_grid", "samples": 1 << 14},
    "proposals": proposals.SAMPLER | {"samples": 512},
    "proposals of one ray": proposals.SAMPLER | {"samples": 1},
    "background field": {"background": "field", "background_field": outside.FIELD, "samples": 512},
    "switch_nerf": {"kind": "switch_nerf", "field": {"capacity_factor": 0.0, "density_noise": 0.0}, "samples": 2048},
}
STEPS = 6  # the occupancy grid is looked at twice
SCRIPT = """
import sys
from pathlib import Path

import torch

from generation.radiance_field import city_scene
from tests.generation import test_radiance_field_distributed as here

folder = Path(sys.argv[1])
city_scene.cache_folder = lambda: folder
torch.set_num_threads(1)
results = {name: here.run(folder, case, devices=2, strategy="ddp") for name, case in here.CASES.items()}
torch.save(results, folder / f"{results['all rays']['rank']}.pt")
"""


def run(folder: Path, case: dict, **options) -> dict:
    """Weights, what was logged and scores of a training in float32."""
    module, watch = small.training(**case), small.Watch()
    data = small.rays(batch_size=64, rays_per_epoch=64 * STEPS, validated=1)
    options = {"callbacks": [watch], "limit_val_batches": 1.0, "num_sanity_val_steps": 0, **options}
    trainer = small.fit(module, folder, STEPS, data, **options)
    scores = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return {"rank": trainer.global_rank, "state": state, "logged": watch.logged, "scores": scores}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    script = folder / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(folder)], check=True, env=environment, timeout=300)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name, of_two, tmp_path):
    """Losses to 1e-4 of them, weights to 1e-4 of what the steps may change: sums are rounded in another order.

    (On the machine this was written on they differ by 1e-7 of the loss, and by 5e-7.)
    """
    one = run(tmp_path, CASES[name])
    first, second = (results[name] for results in of_two)
    assert small.differing(first["state"], second["state"]) == []
    assert len(one["logged"]) == STEPS
    assert max(logged["train/samples"] for logged in one["logged"]) > 0
    for ours, theirs in zip(first["logged"], one["logged"], strict=True):
        assert ours["train/rays"] == theirs["train/rays"]
        assert ours["train/samples"] == theirs["train/samples"]
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
    assert second["scores"] == first["scores"] == pytest.approx(one["scores"], rel=1e-3)
    for key, value in one["state"].items():
        torch.testing.assert_close(
            first["state"][key], value, atol=1e-4 * STEPS * small.OPTIONS["grid_learning_rate"], rtol=1e-4, msg=key
        )


@pytest.mark.parametrize(("experts", "processes"), [(8, 4), (6, 4), (5, 5), (7, 1)])
def test_every_expert_has_one_owner(experts, processes):
    shares = [owned(experts, rank, processes) for rank in range(processes)]
    assert [expert for share in shares for expert in share] == list(range(experts))
    assert min(map(len, shares)) >= 1


def test_fewer_experts_than_processes():
    with pytest.raises(ValueError, match="experts are 3; they must be as many as the 4 processes, or more"):
        owned(3, 0, 4)


def sharded(capfd, *arguments: str) -> tuple[list[float], list[tuple[int, int]]]:
    """Differences, and bytes by count and formula, that the command prints."""
    expert_sharding.main(arguments)
    said = capfd.readouterr().out
    differences = [float(number) for number in re.findall(r"relative to the largest: (\S+)", said)]
    counts = re.findall(r"(?:forward|backward): ([\d,]+) bytes between processes; by the formula ([\d,]+)", said)
    return differences, [tuple(int(number.replace(",", "")) for number in pair) for pair in counts]


def test_experts_in_pieces_are_the_whole(capfd):
    """Outputs and gradients of 4 processes in float64; and what moves is what the formula says."""
    differences, traffic = sharded(capfd, "--processes", "4", "--samples", "4096")
    assert len(differences) == 3
    assert max(differences) < 1e-12
    for counted, expected in traffic:
        assert counted == pytest.approx(expected, rel=0.05)


def test_a_process_without_points_and_uneven_experts(capfd):
    differences, _ = sharded(capfd, "--processes", "2", "--samples", "1", "--experts", "3")
    assert max(differences) < 1e-12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--experts", "3"], "--experts is 3; it must be at least --processes, 4"),
        (["--processes", "0"], "--processes is 0; it must be from 1 to 64"),
        (["--samples", "0"], "--samples is 0; it must be from 1 to"),
    ],
)
def test_bad_options(arguments, words, capsys):
    with pytest.raises(SystemExit):
        expert_sharding.main(arguments)
    assert words in capsys.readouterr().err
