"""What `python -m multimodal benchmark` writes, and that it times nothing that is wrong; no times."""

import json
from dataclasses import replace

import pytest
import torch

from multimodal.q_zoom import benchmark
from multimodal.q_zoom.benchmark import MeasuredRow, Rivals, bars_of, build_model

QUICK = ["--quick", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def untimed(monkeypatch):
    """Numbers must be found wrong before anything is timed."""

    def timed(*arguments):
        raise AssertionError("measured in spite of wrong numbers")

    monkeypatch.setattr(benchmark, "measure", timed)


@pytest.mark.parametrize("more", [[], ["--share-first-layer"]], ids=["own layers", "shared first layer"])
def test_report(tmp_path, capsys, more):
    output = tmp_path / "new" / "q_zoom.json"
    benchmark.main([*QUICK, *more, "--output", str(output)])
    report = json.loads(output.read_text())
    assert (report["threads"], report["clock"], report["share first layer"]) == (1, "process_time", bool(more))
    assert [(row["coarse"], row["region"], row["base"]) for row in report["rows"]] == list(benchmark.QUICK_ROWS)
    for row in report["rows"]:
        assert row["closed_measured"] == pytest.approx(row["base_ms"] / row["closed_ms"])
        assert row["open_measured"] == pytest.approx(row["base_ms"] / row["open_ms"])
        assert row["closed_predicted"] > row["open_predicted"] > 0
    assert len(report["bars"]) == 2 * 4 + 2
    for name, table in report["published"].items():
        for row in table:
            if row["coarse"] == row["base"]:
                assert row["open x"] < row["expected x"] < row["closed x"] < 1, name
            else:
                assert row["expected x"] > 1, name
            assert row["two passes_T"] > row["open_T"] > row["closed_T"], name
    printed = capsys.readouterr().out
    assert f"written to {output}" in printed
    assert "At the same budget a zoom costs time" in printed


def test_wrong_closed_logits_are_found(tmp_path, monkeypatch, untimed):
    stock = benchmark.read_on

    def nearly(*arguments, **options):
        read = stock(*arguments, **options)
        return replace(read, logits=read.logits.nextafter(torch.tensor(torch.inf)))

    monkeypatch.setattr(benchmark, "read_on", nearly)
    with pytest.raises(SystemExit, match="closed, 36 tokens: the logits are not the stock model's bit for bit"):
        benchmark.main([*QUICK, "--output", str(tmp_path / "none.json")])
    assert not (tmp_path / "none.json").exists()


def test_wrong_reuse_is_found(tmp_path, monkeypatch, untimed):
    stock = benchmark.reread

    def worse(*arguments, reuse):
        tap = stock(*arguments, reuse=reuse)
        return replace(tap, hidden=tap.hidden * (1.001 if reuse else 1))

    monkeypatch.setattr(benchmark, "reread", worse)
    with pytest.raises(SystemExit, match=r"open, 36 \+ 36 tokens, reused and read again: logits differ by"):
        benchmark.main([*QUICK, "--output", str(tmp_path / "none.json")])


@pytest.mark.parametrize(
    ("method", "check", "found"),
    [
        ("open", lambda rivals: benchmark.check_closed(rivals, 36), "the gate was not asked, or opened"),
        ("closed", lambda rivals: benchmark.check_open(rivals, 36, 36), "differ|the tokens are others"),
    ],
    ids=["open where closed is timed", "closed where open is timed"],
)
def test_the_other_path_is_found(monkeypatch, method, check, found):
    torch.manual_seed(0)
    rivals = Rivals(build_model(192, 4), 1)
    closed, opened = rivals.closed, rivals.open
    if method == "open":
        # The answer is the closed one, so that only what was done tells.
        monkeypatch.setattr(rivals, "closed", lambda n, **o: (closed(n, **o)[0], opened(n, n, **o)[1]))
    else:
        monkeypatch.setattr(rivals, "open", lambda n, region, **o: closed(n, **o))
    with pytest.raises(SystemExit, match=found):
        check(rivals)


AS_PREDICTED = (
    "closed, measured by predicted",
    "open, measured by predicted",
    "closed, measured by the published form's count",
    "open, measured by the published form's count",
)
SAME_BUDGET = (*AS_PREDICTED, "closed, time by the base's", "open, time by the base's")
LARGER_BASE = (*AS_PREDICTED, "open, times faster than the base")


@pytest.mark.parametrize(
    ("row", "milliseconds", "asked", "met"),
    [
        ((144, 144, 1024), (1000, 140, 280), LARGER_BASE, "yes yes no yes yes"),
        ((144, 144, 1024), (1000, 140, 300), LARGER_BASE, "yes yes no yes no"),
        ((256, 144, 1024), (1000, 500, 500), AS_PREDICTED, "no no no no"),
        ((144, 144, 144), (100, 112, 220), SAME_BUDGET, "no no no no yes yes"),
        ((144, 144, 144), (100, 113, 221), SAME_BUDGET, "no no no no no no"),
        ((144, 100, 144), (100, 113, 221), SAME_BUDGET[:5], "no no no no no"),
    ],
    ids=["all met", "too slow against the larger base", "not as predicted", "at the bars", "beyond the bars", "uneven"],
)
def test_bars(row, milliseconds, asked, met):
    base, closed, opened = milliseconds
    bars = bars_of(MeasuredRow(*row, *milliseconds, base / closed, 7.0, 6.0, base / opened, 3.5, 3.4))
    assert tuple(bar["of"] for bar in bars) == asked
    assert " ".join(bar["met"] for bar in bars) == met


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads is 0"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--output", "."], "that is a folder"),
        (["--output", f"{__file__}/q_zoom.json"], "its folder cannot be made"),
    ],
    ids=["threads", "rounds", "output a folder", "output below a file"],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark.main(arguments)
