"""Schedulers of spiking diffusion: against the official sampler (tests/golden/spiking), and Analytic-DPM's formulas."""

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from generation.spiking_diffusion.analytic_ddpm_scheduler import AnalyticDDPMScheduler, noise_statistic
from generation.spiking_diffusion.official_checkpoints import load
from generation.spiking_diffusion.pipeline import ddim_scheduler, ddpm_scheduler

GOLDEN = Path(__file__).parent.parent / "golden" / "spiking" / "sampler.safetensors"
STEPS = [(999, 50), (500, 50), (50, 49), (1, 1)]  # (t, stride)
# The official tables are float64 and read as float32; those of diffusers are summed up in float32.
TOLERANCES = {
    "float32 tables": {999: 1e-6, 500: 1e-6, 50: 2e-6, 1: 2e-4},
    "float64 tables": {999: 2e-7, 500: 2e-7, 50: 2e-7, 1: 2e-7},
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def posterior_variance(signal: Tensor, timestep: int, previous: int) -> float:
    earlier = signal[previous].item() if previous >= 0 else 1.0
    return (1 - earlier) / (1 - signal[timestep].item()) * (1 - signal[timestep].item() / earlier)


def exact_signal(timesteps: int = 1000) -> Tensor:
    return (1 - torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)).cumprod(0)


def with_tables(scheduler: SchedulerMixin, tables: str) -> SchedulerMixin:
    if tables == "float64 tables":
        scheduler.alphas_cumprod = exact_signal(scheduler.config.num_train_timesteps)
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 1000])
def test_ddim_visits_the_official_timesteps(golden, steps):
    scheduler = ddim_scheduler()
    scheduler.set_timesteps(steps)
    grid = scheduler.timesteps.tolist()
    assert [*grid, 0] == golden[f"t_list.S{steps}"].tolist() + [0] * (steps == 1000)


@pytest.mark.parametrize("tables", TOLERANCES)
@pytest.mark.parametrize(("timestep", "stride"), [(999, 50), (500, 50), (1, 1)])
def test_ddim_step(golden, timestep, stride, tables):
    scheduler = with_tables(ddim_scheduler(), tables)
    scheduler.set_timesteps(1000 // stride)
    earlier = scheduler.step(golden["eps"], timestep, golden["x_t"]).prev_sample
    expected = golden[f"ddim.fixedlarge.epsilon.t{timestep}.r{stride}.x_prev"]
    # The official coefficients are float32, and 1 - alphas_cumprod is almost 0 at timestep 1.
    assert_close(earlier, expected, atol=3e-6 if timestep == 1 else TOLERANCES[tables][timestep], rtol=0)


class Recorded:
    """Stands in for random numbers: one picture of ones, so that a step shows its standard deviation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str):
        self.draws = []
        monkeypatch.setattr(f"{module}.randn_tensor", self)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, **_) -> Tensor:
        return self.draws.pop(0) if self.draws else torch.zeros(tuple(shape), dtype=dtype)


@pytest.fixture
def ddpm_noise(monkeypatch) -> Recorded:
    return Recorded(monkeypatch, "diffusers.schedulers.scheduling_ddpm")


@pytest.mark.parametrize("tables", TOLERANCES)
@pytest.mark.parametrize(("timestep", "stride"), STEPS)
@pytest.mark.parametrize(
    ("variance", "prediction"), [("fixedlarge", "epsilon"), ("fixedlarge", "xstart"), ("fixedsmall", "epsilon")]
)
def test_ddpm_step(golden, ddpm_noise, timestep, stride, variance, prediction, tables):
    """Means in strides are the official `ddpm2`'s; variances of single steps the official `ddpm`'s."""
    name = f"{variance}.{prediction}.t{timestep}.r{stride}"
    options = {"prediction_type": "sample", "clip_sample": False} if prediction == "xstart" else {}
    config = ddpm_scheduler(variance_type=variance.replace("fixed", "fixed_")).config
    scheduler = with_tables(DDPMScheduler.from_config(config, **options), tables)
    tolerance = {"atol": TOLERANCES[tables][timestep], "rtol": 0}
    for sampler, previous in (("ddpm2", timestep - stride), ("ddpm", timestep - 1)):
        scheduler.set_timesteps(timesteps=[timestep, previous])
        if f"{sampler}.{name}.mean" in golden:
            mean = scheduler.step(golden["eps"], timestep, golden["x_t"]).prev_sample
            assert_close(mean, golden[f"{sampler}.{name}.mean"], **tolerance)
    deviation = scheduler._get_variance(timestep).sqrt().item()
    official = math.exp(golden[f"ddpm.{name}.log_var"].flatten()[0].item() / 2)
    assert deviation == pytest.approx(official, abs=tolerance["atol"])


def test_ddpm_ends_in_the_predicted_picture(golden):
    scheduler = ddpm_scheduler()
    picture = scheduler.step(golden["eps"], 0, golden["x_t"]).prev_sample
    assert_close(picture, golden["ddpm.final_t0.x0"], atol=5e-6, rtol=0)


def test_strided_ddpm_has_the_variance_of_its_stride(golden):
    """The authors' `ddpm2` takes that of a single timestep: far too small a noise."""
    scheduler, signal = ddpm_scheduler(), exact_signal()
    scheduler.set_timesteps(20)
    for timestep, previous in zip(scheduler.timesteps.tolist(), [*scheduler.timesteps.tolist()[1:], -1], strict=True):
        expected = posterior_variance(signal, timestep, previous)
        assert scheduler._get_variance(timestep).item() == pytest.approx(expected, abs=1e-5)
    deviation = scheduler._get_variance(999).sqrt().item()
    official = math.exp(golden["ddpm2.fixedlarge.epsilon.t999.r50.log_var"].flatten()[0].item() / 2)
    assert (round(official, 3), round(deviation, 2)) == (0.141, 0.79)


def test_training_noise(golden):
    noised = ddim_scheduler().add_noise(golden["train.x0"], golden["train.noise"], golden["train.t"])
    assert_close(noised, golden["train.x_t"], atol=1e-6, rtol=0)
    assert_close((golden["eps"] - golden["train.noise"]).square(), golden["train.loss"], atol=1e-10, rtol=0)


CHAINS = {"ddim": (5, ddim_scheduler), "ddpm": (50, lambda count: ddpm_scheduler(count, "fixed_large"))}


@pytest.mark.parametrize("name", CHAINS)
def test_official_chain(golden, ddpm_noise, name):
    """A whole run of the official sampler and model, with its noise. The official coefficients are float32."""
    state = {key.removeprefix("chain.sd."): value for key, value in golden.items() if key.startswith("chain.sd.")}
    unet = load(state).double()
    steps, make = CHAINS[name]
    scheduler = with_tables(make(50), "float64 tables")
    scheduler.set_timesteps(steps)
    ddpm_noise.draws = list(golden[f"chain.{name}.S{steps}.noise"])
    x = golden["chain.x_T"]
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(unet(x, timestep).sample, timestep, x).prev_sample
    assert_close(x, golden[f"chain.{name}.S{steps}.x0"], atol=1e-5, rtol=0)


class Predictor(nn.Module):
    """Predicts the noise in pictures that are normal numbers of `deviation`: exactly, and pixel by pixel."""

    def __init__(self, deviation: float | None):
        super().__init__()
        self.deviation = deviation

    def forward(self, sample: Tensor, timestep: int, class_labels: Tensor | None = None) -> SimpleNamespace:
        if self.deviation is None:
            return SimpleNamespace(sample=torch.zeros_like(sample))
        signal = exact_signal()[timestep].item()
        share = (1 - signal) ** 0.5 / (signal * self.deviation**2 + 1 - signal)
        return SimpleNamespace(sample=share * sample)


def closed_form(timestep: int, previous: int, kind: str) -> float:
    """Variances that theory gives: of beta, of beta / (1 - beta), and of the posterior."""
    signal = exact_signal()
    beta = 1 - signal[timestep].item() / signal[previous].item()
    small = posterior_variance(signal, timestep, previous)
    return {"unit": beta, "zero": beta / (1 - beta), "one": small}[kind]


STATISTICS = {
    "unit": (1 - exact_signal()).tolist(),  # data of unit variance: fixed_large
    "zero": [0.0] * 1000,
    "one": [1.0] * 1000,  # one picture: fixed_small
}


@pytest.mark.parametrize("steps", [7, 50, 1000])
@pytest.mark.parametrize("kind", STATISTICS)
def test_analytic_variance(kind, steps):
    scheduler = AnalyticDDPMScheduler(noise_statistic=STATISTICS[kind], clip_sample=False, last_noise=None)
    scheduler.set_timesteps(steps)
    grid = scheduler.timesteps.tolist()
    for timestep, previous in pairwise(grid):
        assert scheduler.variance(timestep) == pytest.approx(closed_form(timestep, previous, kind), rel=1e-9)
    assert scheduler.variance(grid[-1]) == 0
    assert (grid[0], len(grid)) == (999, steps)


def test_analytic_variance_lies_between_its_bounds():
    """Above the posterior's; below that of pixels from -1 to 1; the last is limited."""
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)).tolist()
    scheduler, signal = AnalyticDDPMScheduler(noise_statistic=values), exact_signal()
    scheduler.set_timesteps(40)
    grid = scheduler.timesteps.tolist()
    for timestep, previous in pairwise(grid[:-1]):
        small, t, s = posterior_variance(signal, timestep, previous), signal[timestep].item(), signal[previous].item()
        largest = small + s * ((1 - t / s) / (1 - t)) ** 2 * min(1.0, (1 - t) / t)
        assert small * (1 - 1e-9) <= scheduler.variance(timestep) <= largest * (1 + 1e-9)
    assert scheduler.variance(grid[-2]) <= (4 / 255) ** 2 * math.pi / 2
    free = AnalyticDDPMScheduler(noise_statistic=values, last_noise=None)
    free.set_timesteps(40)
    assert free.variance(grid[-2]) > scheduler.variance(grid[-2])


def test_analytic_mean_and_noise(monkeypatch):
    """Its mean is DDPM's; its noise has its variance."""
    noise = Recorded(monkeypatch, "generation.spiking_diffusion.analytic_ddpm_scheduler")
    Recorded(monkeypatch, "diffusers.schedulers.scheduling_ddpm")
    generator = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    analytic, plain = AnalyticDDPMScheduler(noise_statistic=STATISTICS["unit"]), ddpm_scheduler()
    for steps in (10, 30):
        analytic.set_timesteps(steps)
        plain.set_timesteps(steps)
        assert analytic.timesteps.tolist() == plain.timesteps.tolist()
        for timestep in analytic.timesteps:
            noise.draws = []
            mean = analytic.step(eps, timestep, x).prev_sample
            assert_close(mean, plain.step(eps, timestep, x).prev_sample, atol=1e-5, rtol=0)
            noise.draws = [torch.ones_like(x)]
            moved = analytic.step(eps, timestep, x, return_dict=False)[0] - mean
            assert_close(moved, torch.full_like(x, analytic.variance(timestep) ** 0.5))
    picture = analytic.step(eps, analytic.timesteps[-1], x).pred_original_sample
    assert_close(analytic.step(eps, analytic.timesteps[-1], x).prev_sample, picture)


def test_analytic_sampling_of_normal_numbers():
    """Of normal numbers, exactly predicted, samples have the right variance, with 10 steps: DDPM's are too narrow."""
    deviation, generator = 0.5, torch.Generator().manual_seed(0)
    images = deviation * torch.randn(4000, 1, 2, 2, generator=generator)
    unet = Predictor(deviation)
    statistic = noise_statistic(unet, images, images_per_timestep=500)
    scheduler = AnalyticDDPMScheduler(noise_statistic=statistic, clip_sample=False, last_noise=None)
    drawn = {}
    for name, sampler in (("analytic", scheduler), ("ddpm", ddpm_scheduler())):
        sampler.set_timesteps(10)
        x = torch.randn(4000, 1, 2, 2, generator=generator)
        for timestep in sampler.timesteps:
            x = sampler.step(unet(x, timestep).sample, timestep, x, generator=generator).prev_sample
        drawn[name] = x.std().item()
    signal = exact_signal()
    scheduler.set_timesteps(10)
    last = signal[scheduler.timesteps[-1]].item()
    left = deviation**2 * (1 - last) / (deviation**2 * last + 1 - last)  # of the last step, which adds no noise
    assert drawn["analytic"] == pytest.approx((deviation**2 - left) ** 0.5, abs=0.02)
    assert drawn["ddpm"] < drawn["analytic"] - 0.03


def test_noise_statistic():
    images = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert noise_statistic(Predictor(None), images, 10) == [0.0] * 10
    unit = noise_statistic(Predictor(1.0), images, images_per_timestep=200)
    assert_close(torch.tensor(unit), torch.tensor(STATISTICS["unit"]), atol=0.1, rtol=0)
    coarse = noise_statistic(Predictor(1.0), images, images_per_timestep=200, every=99)
    assert len(coarse) == 1000
    assert coarse[0] == unit[0]
    assert_close(torch.tensor(coarse), torch.tensor(STATISTICS["unit"]), atol=0.1, rtol=0)
    assert noise_statistic(Predictor(1.0), images, 20) == noise_statistic(Predictor(1.0), images, 20)
    assert noise_statistic(Predictor(1.0), images, 20) != noise_statistic(Predictor(1.0), images, 20, seed=1)


def test_noise_statistic_leaves_the_model_as_it_was():
    model, labels = Predictor(1.0).train(), []
    model.register_forward_pre_hook(lambda m, a, k: labels.append((m.training, k["class_labels"])), with_kwargs=True)
    images = torch.zeros(3, 1, 2, 2)
    noise_statistic(model, images, 5, class_labels=torch.tensor([7, 8, 9]), images_per_timestep=4)
    assert model.training
    assert not any(training for training, _ in labels)
    assert {label for _, drawn in labels for label in drawn.tolist()} <= {7, 8, 9}


def test_analytic_scheduler_is_saved_with_its_statistic(tmp_path):
    scheduler = AnalyticDDPMScheduler(
        noise_statistic=torch.tensor(STATISTICS["unit"])[:50], num_train_timesteps=50, last_noise=1.0
    )
    scheduler.save_pretrained(tmp_path)
    loaded = AnalyticDDPMScheduler.from_pretrained(tmp_path)
    assert all(loaded.config[name] == value for name, value in scheduler.config.items() if name[0] != "_")
    assert torch.equal(loaded.statistic, scheduler.statistic)
    assert torch.equal(AnalyticDDPMScheduler.from_config(loaded.config).statistic, scheduler.statistic)
    assert torch.equal(AnalyticDDPMScheduler.from_config(scheduler.config).statistic, scheduler.statistic)
    assert len(loaded) == 50
    images, noise, timesteps = torch.rand(2, 1, 2, 2), torch.rand(2, 1, 2, 2), torch.tensor([3, 49])
    expected = ddpm_scheduler(50).add_noise(images, noise, timesteps)
    assert_close(loaded.add_noise(images, noise, timesteps), expected, atol=1e-6, rtol=0)
    assert loaded.scale_model_input(images, 3) is images


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: AnalyticDDPMScheduler(noise_statistic=[0.5] * 3), "noise_statistic has 3 numbers; 1000 are needed"),
        (
            lambda: AnalyticDDPMScheduler(noise_statistic=[0.5, -1.0], num_train_timesteps=2),
            "noise_statistic holds -1.0; all must be finite numbers",
        ),
        (
            lambda: AnalyticDDPMScheduler(noise_statistic=[0.5, math.nan], num_train_timesteps=2),
            "noise_statistic holds nan",
        ),
        (
            lambda: AnalyticDDPMScheduler(noise_statistic=[0.5] * 4, num_train_timesteps=4).set_timesteps(5),
            "num_inference_steps is 5; it must be from 1 t",
        ),
        (
            lambda: AnalyticDDPMScheduler(noise_statistic=[0.5] * 4, num_train_timesteps=4).set_timesteps(0),
            "num_inference_steps is 0",
        ),
        (
            lambda: AnalyticDDPMScheduler(noise_statistic=[0.5] * 4, num_train_timesteps=4).variance(4),
            r"timestep is 4; those of this run are \[3, 2, 1, 0",
        ),
        (lambda: noise_statistic(nn.Identity(), torch.zeros(0, 1, 2, 2)), "images has the shape"),
        (lambda: noise_statistic(nn.Identity(), torch.zeros(1, 1, 2, 2), every=0), "every is 0; it must be at least 1"),
        (
            lambda: noise_statistic(nn.Identity(), torch.zeros(1, 1, 2, 2), class_labels=torch.zeros(2)),
            "class_labels are 2; there are 1 images",
        ),
    ],
    ids=["length", "negative", "NaN", "many steps", "no steps", "timestep", "no images", "every", "labels"],
)
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
