"""`python -m generation compare-fields`: every variant with every seed, once."""

import json

import pytest
import yaml

from generation.radiance_field import comparison

FIELD = {"levels": 2, "log2_table_size": 8, "hidden_width": 8, "direction_levels": 1}
PROTOCOL = {
    "model": {"occupancy": {"resolution": [8, 8, 4], "warmup_steps": 32}, "step": 0.3, "samples": 512},
    "data": {"source": "city", "city": {"image_size": 16, "train_views": 3, "test_views": 2, "samples": 1}},
    "variants": {
        "mixture": {
            "kind": "hash_experts",
            "field": FIELD | {"expert_resolutions": [[4, 8], [4, 16]], "gate_levels": 2, "gate_log2_table_size": 6},
        },
        "single": {"kind": "single_grid", "field": FIELD | {"resolutions": [4, 16]}},
    },
    "seeds": [0, 1],
    "steps": 4,
    "judged_every": 2,
    "reference": "single",
}


@pytest.fixture
def protocol(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GATED_VISION_BACKEND", "torch")

    def write(**changes):
        path = tmp_path / "protocol.yaml"
        path.write_text(yaml.safe_dump(PROTOCOL | {"output": str(tmp_path / "results")} | changes))
        return ["--config", str(path)]

    return write


def test_every_variant_and_seed_is_trained_once(protocol, tmp_path, monkeypatch, capsys):
    comparison.main(protocol())
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "results/comparison.json").read_text())
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("mixture", 0), ("single", 0), ("mixture", 1), ("single", 1)
    ]  # fmt: skip
    for row in rows:
        assert [point["step"] for point in row["curve"]] == [2, 4]
        assert row["psnr"] == row["curve"][-1]["psnr"] > 3
        assert ("least_load" in row) == (row["variant"] == "mixture")
    assert {path.name for path in (tmp_path / "results").glob("*.png")} == {
        "mixture.png", "single.png", "quality.png", "loads.png"
    }  # fmt: skip
    assert "| mixture |" in said
    monkeypatch.setattr(comparison, "run", lambda *_: pytest.fail("trained again"))
    comparison.main(protocol())


def test_results_of_other_settings_are_not_taken(protocol, capsys):
    comparison.main(protocol(seeds=[0], variants={"single": PROTOCOL["variants"]["single"]}))
    with pytest.raises(SystemExit) as stop:
        comparison.main(protocol(seeds=[0], variants={"single": PROTOCOL["variants"]["single"]}, steps=5))
    assert "steps differ" in str(stop.value.code)


def test_training_stops_when_its_time_is_used_up(protocol, tmp_path):
    comparison.main(protocol(seeds=[0], cpu_seconds=1e-6, steps=1000))
    assert [row["steps"] for row in json.loads((tmp_path / "results/comparison.json").read_text())] == [1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {}}, "variants and seeds must not be empty"),
        ({"steps": 0}, "steps is 0; it must be above 0"),
        ({"reference": "third"}, "reference is 'third'; valid are mixture, single"),
    ],
)
def test_bad_protocol(changes, message):
    with pytest.raises(ValueError, match=message):
        comparison.Comparison(**PROTOCOL | changes)


def test_seconds_until_a_quality_was_reached():
    rows = [{"curve": [{"psnr": 10, "cpu_seconds": 1}, {"psnr": 20, "cpu_seconds": s}]} for s in (2, 4)]
    assert comparison.seconds_until(rows, 15) == 3
    assert comparison.seconds_until(rows, 21) is None
