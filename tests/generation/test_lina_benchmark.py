"""What `benchmark lina` counts, its correctness gates, and the form of its report; no times."""

import json

import pytest
import torch

from generation import benchmark as dispatcher
from generation.lina import benchmark, benchmark_counts, benchmark_rivals
from generation.lina.sampling_settings import SamplingSettings

FEW = SamplingSettings(num_inference_steps=3, num_diffusion_steps=2, guidance_scale=3.0)
TINY = {"width": 32, "heads": 2, "depth": 2, "denoiser_depth": 2, "text_dim": 12}


def small_case() -> benchmark_rivals.SamplingCase:
    return benchmark_rivals.SamplingCase(4, **TINY)


def test_launches_of_a_block():
    counts = benchmark_counts.count_block(width=64, heads=2, side=4)
    assert (counts["eager"], counts["softmax"]) == (39, 10)
    assert counts["ours"] <= 16
    assert counts["ours, on CPU"] == 10


def test_launches_of_a_diffusion_step():
    counts = benchmark_counts.count_diffusion(width=64)
    assert counts["eager"] == 106
    assert counts["ours"] <= 60


def test_operators_count_as_many_kernels_as_they_are_on_a_gpu():
    launches = benchmark_counts.launches_on_a_gpu(64, 2, 4, 2)
    assert launches["gated_vision::linear_attention"] == 4
    assert launches["gated_vision::add_image_convolution_"] == 3  # convolution, a copy to token order, addition


def test_bytes_of_an_attention_module():
    """A fifth of the eager form's is out of reach while qkv and output projections are products of their own."""
    sizes = benchmark_counts.count_bytes(1536, 16)
    assert sizes["eager"] == pytest.approx(289.9, abs=0.1)
    assert sizes["projections alone"] > sizes["eager"] / 5
    assert sizes["ours"] < 1.25 * sizes["projections alone"]


@pytest.mark.parametrize(("side", "saved"), [(16, 6.3), (32, 27.0), (64, 61.2)])
def test_flops_saved_by_linear_attention(side, saved):
    counts = benchmark_counts.attention_gmacs(1536, 16, side)
    assert 100 * (1 - counts["linear"] / counts["softmax"]) == pytest.approx(saved, abs=0.05)
    image, tokens, width = side * side, side * side * 5 // 4, 1536
    least = 4 * tokens * width**2 + tokens * width + 2 * tokens * width * 96 + 25 * width * image
    assert counts["linear"] == pytest.approx(least / 1e9, rel=1e-9)


def test_the_gates_pass():
    benchmark.check_attention()
    assert benchmark.check_sampling(small_case(), FEW) < 1e-5


def test_nothing_is_timed_if_the_sampler_is_wrong():
    case = small_case()
    with torch.no_grad():
        case.ours.image_decoder.head.bias.add_(0.1)
    with pytest.raises(SystemExit, match="sampling is wrong: latents differ by"):
        benchmark.check_sampling(case, FEW)


def test_parts_add_up(monkeypatch):
    monkeypatch.setitem(benchmark.SMALL, "depth", 2)
    case = small_case()
    rows = {row["part"]: row for row in benchmark.measure_parts(case, 1, FEW)}
    for column in ("eager, seconds", "ours, seconds"):
        parts = sum(row[column] for part, row in rows.items() if part != "all")
        assert parts == pytest.approx(rows["all"][column])
        assert rows["denoiser"][column] > 0
    assert not case.ours.image_encoder.blocks[0]._forward_hooks


def test_whole_images_are_timed_after_a_tiny_one():
    drawn = []
    samplers = {name: (lambda settings, name=name: drawn.append((name, settings)), FEW) for name in ("one", "other")}
    timings = benchmark.time_images(samplers, 1)
    assert [(name, settings.num_inference_steps) for name, settings in drawn[:2]] == [("one", 2), ("other", 2)]
    assert drawn[2:] == 2 * [("one", FEW), ("other", FEW)]
    assert [len(timing.seconds) for timing in timings.values()] == [2, 2]


def test_samplers_and_their_times(monkeypatch):
    monkeypatch.setattr(benchmark, "SETTINGS", FEW)
    rows = benchmark.measure_sampling(small_case(), 1)
    assert [row["steps"] for row in rows] == [3, 3, 1, 1]
    monkeypatch.setattr(benchmark, "FEWER", FEW)
    monkeypatch.setattr(benchmark, "SMALL", TINY)
    assert [row["model"] for row in benchmark.measure_softmax(1)] == ["linear", "softmax"]


def test_command(tmp_path, capsys):
    output = tmp_path / "lina.json"
    dispatcher.main(["lina", "--only", "flops", "--output", str(output)])
    assert "GMACs of an attention module" in capsys.readouterr().out
    report = json.loads(output.read_text())
    assert [row["tokens"] for row in report["flops"]] == [320, 1280, 5120]
    assert report["threads"] == 1


def test_an_unknown_system_is_named():
    with pytest.raises(SystemExit, match="unknown system 'swin'; valid are lina"):
        dispatcher.main(["swin"])


def test_without_a_checkout_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_rivals, "REFERENCES", tmp_path)
    benchmark_rivals.reference.cache_clear()
    with pytest.raises(SystemExit, match="compares with the eager reference of a checkout"):
        benchmark_rivals.reference("eager_lina")
