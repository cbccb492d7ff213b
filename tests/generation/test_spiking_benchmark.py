"""What `benchmark spiking` writes, and that it times nothing that is wrong; no times."""

import json

import pytest
import torch

from generation import benchmark as dispatcher
from generation.spiking_diffusion import benchmark

TINY = {"sample_size": 8, "in_channels": 1, "channels": 4, "channel_multipliers": (1,), "layers_per_block": 1}


@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (1, 2), (9, 33)], ids=str)
def test_the_gate_passes(shape):
    benchmark.check(shape)


@pytest.mark.parametrize("wrong", ["spikes", "gradients"])
def test_nothing_is_timed_if_neurons_are_wrong(wrong, monkeypatch):
    right = benchmark.spiking_neuron

    def neuron(current):
        return right(current * 1.5) if wrong == "spikes" else right(current, alpha=3.0)

    monkeypatch.setattr(benchmark, "spiking_neuron", neuron)
    with pytest.raises(SystemExit, match="spikes or gradients are not those of the loop"):
        benchmark.check((4, 3, 5, 7))


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SHAPES", ((2, 1, 2, 3, 3),))
    monkeypatch.setattr(benchmark, "SMALL", TINY)
    monkeypatch.setattr(benchmark, "BATCH", 2)
    monkeypatch.setattr(benchmark, "PROFILED_STEPS", 1)
    output, threads = tmp_path / "new/spiking.json", torch.get_num_threads()
    try:
        dispatcher.main(["spiking", "--seconds", "0.05", "--threads", "1", "--output", str(output)])
    finally:
        torch.set_num_threads(threads)
    report = json.loads(output.read_text())
    assert report.keys() == {"machine", "threads", "neurons", "neurons, memory kept", "training", "stem"}
    assert report["threads"] == 1
    assert [(row["shape"], row["of"]) for row in report["neurons"]] == [
        ("2x1x2x3x3", "forward"),
        ("2x1x2x3x3", "forward and backward"),
    ]
    keys = {"shape", "of", "ours_ms", "loop_ms", "faster than the loop", "over the floor"}
    rows = [*report["neurons"], *report["neurons, memory kept"]]
    assert all(row.keys() == keys and row["ours_ms"] > 0 for row in rows)
    shares = {row["network"]: row["percent in neurons"] for row in report["training"]}
    assert list(shares) == ["spiking, T = 4", "ANN twin"]
    assert 100 > shares["spiking, T = 4"] > shares["ANN twin"] == 0
    assert report["stem"] == [{"layer": "stem_conv", "runs": 1}]
    assert f"written to {output}" in capsys.readouterr().out
