"""`python -m generation compare-fields`: every variant with every seed, once."""

import json
from types import SimpleNamespace

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
        if row["variant"] == "mixture":
            assert len(row["curve"][-1]["loads"]) == 2
            assert row["least_load"] == min(row["curve"][-1]["loads"]) <= 0.5
        assert 0 < row["cpu_seconds"] == row["curve"][-1]["cpu_seconds"]
        assert 0 < row["wall_seconds"] == row["curve"][-1]["wall_seconds"]
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
        ({"variants": {"a b": {}, "a, b": {}}}, "variants has 'a b', whose files' name, 'a-b', is .* another's"),
        ({"variants": {", ": {}}}, "variants has ', ', whose files' name, '', is empty"),
    ],
)
def test_bad_protocol(changes, message):
    with pytest.raises(ValueError, match=message):
        comparison.Comparison(**PROTOCOL | changes)


def test_files_have_names_that_need_no_quotes(protocol, tmp_path):
    variants = {"single grid, 4 to 16": PROTOCOL["variants"]["single"]}
    comparison.main(protocol(seeds=[0], reference=None, variants=variants))
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"single-grid-4-to-16-0.json", "single-grid-4-to-16.png", "quality.png", "comparison.json"}


def test_time_of_judging_is_not_that_of_training(monkeypatch):
    """By clocks that go on by one a step, and by a thousand whenever pictures are looked at."""
    now = [5.0, 7.0]
    monkeypatch.setattr(comparison, "CLOCKS", {"cpu_seconds": lambda: now[0], "wall_seconds": lambda: now[1]})

    def judge(module):
        now[0], now[1] = now[0] + 1000, now[1] + 3000
        return {"psnr": 20.0}

    monkeypatch.setattr(comparison, "judge", judge)
    monkeypatch.setattr(comparison, "judged_frames", lambda scene: [0])
    judged = comparison.Judged(every=2, cpu_seconds=4.5)
    trainer = SimpleNamespace(global_step=0, max_steps=100, should_stop=False, callback_metrics={})
    module = SimpleNamespace(train=lambda: None, scene=None)
    judged.on_train_start(trainer, module)
    while not trainer.should_stop:
        trainer.global_step += 1
        now[0], now[1] = now[0] + 1, now[1] + 2
        judged.on_train_batch_end(trainer, module)
    assert [(point["step"], point["cpu_seconds"], point["wall_seconds"]) for point in judged.points] == [
        (2, 2, 4), (4, 4, 8), (5, 5, 10)
    ]  # fmt: skip


def row(variant: str, seed: int, curve: list[tuple[float, float]], **more) -> dict:
    """Of a run with a curve of (CPU seconds, PSNR)."""
    seconds, psnr = curve[-1]
    points = [{"cpu_seconds": s, "psnr": p} for s, p in curve]
    times = {"cpu_seconds": seconds, "wall_seconds": 2 * seconds, "picture_seconds": 0.25}
    return {"variant": variant, "seed": seed, "parameters": 1234, "steps": 10, "psnr": psnr, "ssim": 0.5} | times | {
        "curve": points, **more
    }  # fmt: skip


def test_table():
    """A reference that is as good as the other after a quarter of its time."""
    rows = [
        row("mixture", 0, [(20, 15), (40, 20)], least_load=0.25),
        row("mixture", 1, [(20, 15), (40, 22)], least_load=0.35),
        row("single", 0, [(0.04, 10), (8, 21), (16, 30)]),
        row("single", 1, [(0.04, 10), (12, 21), (16, 30)]),
    ]
    head, _, mixture, single = comparison.table(rows, comparison.Comparison(**PROTOCOL))
    assert head == (
        "| variant | parameters | steps | psnr | ssim | cpu_seconds | wall_seconds | picture_seconds | least_load | "
        "single was as good after |"
    )
    assert mixture == "| mixture | 1,234 | 10 | 21.00 ± 1.41 | 0.500 | 40.0 | 80.0 | 0.250 | 0.30 | 10.0 s, 4.0x |"
    assert single == "| single | 1,234 | 10 | 30.00 ± 0.00 | 0.500 | 16.0 | 32.0 | 0.250 |  |  |"


def test_seconds_until_a_quality_was_reached():
    rows = [{"curve": [{"psnr": 10, "cpu_seconds": 1}, {"psnr": 20, "cpu_seconds": s}]} for s in (2, 4)]
    assert comparison.seconds_until(rows, 15) == 3
    assert comparison.seconds_until(rows, 21) is None
