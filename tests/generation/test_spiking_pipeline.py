"""The pipeline of spiking diffusion on a tiny model: seeds, guidance, schedulers, saving, and what it refuses."""

import re

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
)
from torch import Tensor
from torch.testing import assert_close

from generation.spiking_diffusion.analytic_ddpm_scheduler import AnalyticDDPMScheduler
from generation.spiking_diffusion.pipeline import SpikingDiffusionPipeline, ddim_scheduler, ddpm_scheduler
from generation.spiking_diffusion.unet import SpikingUNet2DModel

TIMESTEPS = 50
SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "channels": 8,
    "channel_multipliers": (1, 2),
    "layers_per_block": 1,
    "num_train_timesteps": TIMESTEPS,
}
STEPS = 4
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def make(scheduler: SchedulerMixin | None = None, **options) -> SpikingDiffusionPipeline:
    """A pipeline whose every weight matters; in float64, where no spike depends on how a batch is cut."""
    torch.manual_seed(0)
    unet = SpikingUNet2DModel(**SMALL | options)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, mean=float(parameter.dim() == 1), std=0.2)
    pipeline = SpikingDiffusionPipeline(unet.double().eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline() -> SpikingDiffusionPipeline:
    return make()


@pytest.fixture
def by_class() -> SpikingDiffusionPipeline:
    return make(num_class_embeds=3)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipeline: SpikingDiffusionPipeline, *arguments, seed: int = 0, **options) -> Tensor:
    options = {"generator": seeds(seed)[0], "output_type": "pt", "num_inference_steps": STEPS} | options
    return pipeline(*arguments, **options).images


def analytic() -> AnalyticDDPMScheduler:
    return AnalyticDDPMScheduler(
        noise_statistic=np.linspace(0.1, 0.9, TIMESTEPS).tolist(), num_train_timesteps=TIMESTEPS
    )


def multistep(**options) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(num_train_timesteps=TIMESTEPS, **BETAS, **options)


SCHEDULERS = {
    "ddim": lambda: ddim_scheduler(TIMESTEPS),
    "ddpm": lambda: ddpm_scheduler(TIMESTEPS),
    "ddpm, fixed_large": lambda: ddpm_scheduler(TIMESTEPS, "fixed_large"),
    "analytic": analytic,
    "dpmsolver++": multistep,
    "dpmsolver": lambda: multistep(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "stochastic dpmsolver++": lambda: multistep(algorithm_type="sde-dpmsolver++"),
    "euler": lambda: EulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, **BETAS, timestep_spacing="trailing"),
    "pndm": lambda: PNDMScheduler(num_train_timesteps=TIMESTEPS, **BETAS, skip_prk_steps=True),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_image_depends_on_its_generator_alone(name):
    pipeline = make(SCHEDULERS[name](), num_class_embeds=3)
    options = {"num_inference_steps": 6, "guidance_scale": 2.0}
    together = draw(pipeline, 3, [0, 1, 2], generator=seeds(0, 1, 2), **options)
    assert together.shape == (3, 1, 8, 8)
    assert together.isfinite().all()
    for k in range(3):
        assert_close(draw(pipeline, 1, k, generator=seeds(k)[0], **options)[0], together[k], atol=1e-8, rtol=0)
    assert len({image.sum().item() for image in together}) == 3


def test_one_generator_for_all(pipeline):
    first = draw(pipeline, 2)
    assert torch.equal(first, draw(pipeline, 2))
    assert not torch.equal(first, draw(pipeline, 2, seed=1))
    assert not torch.equal(first[0], first[1])
    assert draw(pipeline, generator=None).isfinite().all()


def test_default_scheduler(pipeline):
    assert pipeline.scheduler.config == ddim_scheduler(TIMESTEPS).config
    assert not torch.equal(draw(pipeline, eta=1.0), draw(pipeline))


@pytest.mark.parametrize("stock", [DDPMPipeline, DDIMPipeline], ids=lambda stock: stock.__name__)
@pytest.mark.parametrize("channels", [1, 3])
def test_pipelines_of_diffusers_run_the_model(stock, channels):
    scheduler = ddim_scheduler(TIMESTEPS) if stock is DDIMPipeline else ddpm_scheduler(TIMESTEPS)
    ours = make(scheduler, in_channels=channels)
    ours.unet.float()
    theirs = stock(unet=ours.unet, scheduler=ours.scheduler)
    theirs.set_progress_bar_config(disable=True)
    options = {"batch_size": 2, "num_inference_steps": STEPS, "output_type": "np"}
    images = theirs(generator=seeds(0)[0], **options).images
    if stock is DDPMPipeline:
        images = images.astype(np.float32)
    assert_close(images, ours(generator=seeds(0)[0], **options).images, atol=1e-5, rtol=0)
    assert theirs(num_inference_steps=2).images[0].size == (8, 8)


def test_threshold_guidance_for_one_call(pipeline):
    plain = draw(pipeline)
    assert draw(pipeline, threshold=1.0).equal(plain)
    for threshold in (0.9, {"up_blocks": 0.9}):
        assert (draw(pipeline, threshold=threshold) - plain).abs().max() > 1e-3
    assert torch.equal(draw(pipeline), plain)
    assert (draw(pipeline, snn_timesteps=2) - plain).abs().max() > 1e-3
    assert torch.equal(draw(pipeline, snn_timesteps=4), plain)


def test_classes_and_their_guidance(by_class):
    plain, anything = draw(by_class, class_labels=1), draw(by_class)
    assert not torch.equal(plain, anything)
    assert_close(draw(by_class, class_labels=3), anything)
    assert_close(draw(by_class, class_labels=1, guidance_scale=0.0), anything)
    assert not torch.equal(draw(by_class, class_labels=1, guidance_scale=3.0), plain)
    for labels in ([1], torch.tensor(1), torch.tensor([1]), np.int64(1)):
        assert torch.equal(draw(by_class, class_labels=labels), plain)
    assert draw(by_class, 2, 1).shape == (2, 1, 8, 8)
    assert draw(by_class, class_labels=[0, 1, 2]).shape == (3, 1, 8, 8)


def test_guidance_is_of_predictions(by_class):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 8, 8, generator=generator, dtype=torch.float64)
    unet, scheduler = by_class.unet, ddim_scheduler(TIMESTEPS)
    scheduler.set_timesteps(1)
    with torch.no_grad():
        one, anything = (unet(noise, TIMESTEPS - 1, torch.tensor([label])).sample for label in (1, 3))
    expected = scheduler.step(anything + 2.5 * (one - anything), TIMESTEPS - 1, noise).prev_sample
    drawn = draw(by_class, class_labels=1, guidance_scale=2.5, latents=noise, num_inference_steps=1)
    assert_close(drawn, (expected / 2 + 0.5).clamp(0, 1))


def test_no_guidance_costs_nothing(by_class):
    batches = []
    by_class.unet.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    draw(by_class, class_labels=1)
    draw(by_class, class_labels=1, guidance_scale=2.0)
    assert batches == [1] * STEPS + [2] * STEPS


def test_starting_noise(pipeline):
    noise = torch.randn(1, 1, 8, 8, generator=seeds(0)[0])
    assert torch.equal(draw(pipeline, latents=noise, generator=None), draw(pipeline))
    assert draw(pipeline, 2, latents=torch.zeros(2, 1, 12, 6)).shape == (2, 1, 12, 6)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types(channels, mode):
    pipeline = make(in_channels=channels)
    tensor, array = draw(pipeline, 2), draw(pipeline, 2, output_type="np")
    assert (tensor.min() >= 0, tensor.max() <= 1) == (True, True)
    assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), tensor.to(torch.from_numpy(array).dtype))
    pictures = draw(pipeline, 2, output_type="pil")
    assert [(picture.mode, picture.size) for picture in pictures] == [(mode, (8, 8))] * 2
    assert np.array_equal(np.asarray(pictures[1]).reshape(8, 8, channels), (array[1] * 255).round().astype("uint8"))
    images, energy = pipeline(num_inference_steps=1, return_dict=False)
    assert (len(images), energy) == (1, None)


def test_it_draws_in_evaluation_mode(pipeline):
    plain = draw(pipeline, 2)
    pipeline.unet.train()
    before = {name: buffer.clone() for name, buffer in pipeline.unet.named_buffers()}
    assert torch.equal(draw(pipeline, 2), plain)
    assert pipeline.unet.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in pipeline.unet.named_buffers())


def test_energy(pipeline):
    metered = pipeline(2, num_inference_steps=2, collect_energy=True, generator=seeds(0)[0], output_type="pt")
    assert metered.energy.calls == 2
    assert {layer.name for layer in metered.energy.layers} >= {"stem_conv", "entry_conv", "out_conv"}
    assert torch.equal(metered.images, draw(pipeline, 2, num_inference_steps=2))
    assert pipeline(num_inference_steps=2).energy is None


def test_class_guidance_costs_both_evaluations(by_class):
    options = {"class_labels": [1, 2], "num_inference_steps": 1, "collect_energy": True, "output_type": "pt"}
    options["latents"] = torch.zeros(2, 1, 8, 8)
    plain, guided = (by_class(guidance_scale=scale, **options).energy for scale in (1.0, 2.0))
    assert (plain.evaluations, guided.evaluations) == (1, 2)
    assert (plain.steps, guided.steps) == (4, 4)
    assert guided.total("macs") == 2 * plain.total("macs")
    assert guided.total("connections") == 2 * plain.total("connections")
    # Not exactly, since neurons fire for another class.
    assert guided.corrected_pj == pytest.approx(2 * plain.corrected_pj, rel=0.2)
    assert guided.paper_pj == pytest.approx(2 * plain.paper_pj, rel=0.2)
    assert guided.as_artificial().paper_pj == pytest.approx(2 * plain.as_artificial().paper_pj)
    assert guided.as_artificial().corrected_pj == pytest.approx(2 * plain.as_artificial().corrected_pj)
    for ours, theirs in zip(guided.bit_budgets(), plain.bit_budgets(), strict=True):
        assert (ours.budget, ours.s_ace) == (theirs.budget, pytest.approx(2 * theirs.s_ace))
    assert "2 evaluations, for class guidance" in str(guided)


def test_callbacks(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, timestep, tuple(tensors["latents"].shape)))
        pipe.interrupt = step == 2
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else None

    assert (draw(pipeline, callback_on_step_end=callback) == 0.5).all()
    assert seen == [(step, timestep, (1, 1, 8, 8)) for step, timestep in enumerate((49, 37, 24))]
    names = []
    draw(pipeline, callback_on_step_end=lambda *a: names.append(list(a[3])), callback_on_step_end_tensor_inputs=[])
    assert names == [[]] * STEPS


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (5, "returned 5; it must be None or a dict with no key but 'latents'"),
        ({"tokens": 1}, "with no key but 'latents'"),
        ({"latents": torch.zeros(1, 1, 4, 4)}, r"latents of shape \(1, 1, 4, 4\), torch.float32; .*\(1, 1, 8, 8\)"),
        ({"latents": torch.full((1, 1, 8, 8), torch.nan)}, "they must be finite"),
        ({"latents": [1]}, "returned latents as a list"),
    ],
    ids=["number", "other key", "shape", "NaN", "list"],
)
def test_what_a_callback_returns_is_checked(pipeline, returned, words):
    with pytest.raises(ValueError, match=f"callback_on_step_end .*{words}"):
        draw(pipeline, callback_on_step_end=lambda *_: returned)


def test_progress_bar(pipeline, capsys):
    pipeline.set_progress_bar_config(disable=False, desc="drawing")
    draw(pipeline)
    assert "drawing: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ddim", "ddpm", "analytic", "pndm"])
def test_saved_and_loaded(name, tmp_path, caplog):
    pipeline = make(SCHEDULERS[name](), num_class_embeds=3, tsm=True)
    pipeline.unet.float()
    pipeline.save_pretrained(tmp_path)
    loaded = SpikingDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is type(pipeline.scheduler)
    assert torch.equal(draw(loaded, 2, [0, 2]), draw(pipeline, 2, [0, 2]))
    assert "accelerate" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_loaded_in_another_data_type(dtype, tmp_path):
    pipeline = make(num_class_embeds=3)
    pipeline.unet.float()
    pipeline.save_pretrained(tmp_path)
    loaded = SpikingDiffusionPipeline.from_pretrained(tmp_path, dtype=dtype)
    assert {value.dtype for value in loaded.unet.state_dict().values()} == {dtype, torch.int64}
    assert draw(loaded, 2, [0, 2]).dtype == dtype


NOISE = torch.zeros(1, 1, 8, 8)
REFUSED = {
    **{
        f"{name}={value}": ({name: value}, f"{name} is {value}; it must be a whole number from 1 to ")
        for name in ("batch_size", "num_inference_steps")
        for value in (0, -1, 10**6, True, 2.0, float("nan"))
    },
    **{
        f"{name}={value}": ({name: value, "class_labels": 0}, f"{name} is '?{value}'?; it must be a ")
        for name in ("guidance_scale", "eta")
        for value in (float("nan"), float("inf"), -1.0, True, "much")
    },
    **{
        f"class_labels={value}": ({"class_labels": value}, "class_labels is .*; they are one or a list of whole numb")
        for value in (4, -1, 1.5, [], True, "cat", [0, 9], [[1, 2]])
    },
    **{
        f"threshold={value}": ({"threshold": value}, f"threshold is '?{value}'?; it must be a finite number above 0")
        for value in (0.0, -1, float("nan"), True, "low")
    },
    "large eta": ({"eta": 1.5}, "eta is 1.5; it must be a number from 0 to 1"),
    "guidance alone": ({"guidance_scale": 2.0}, "guidance_scale is 2.0; without class_labels it must be 1"),
    "batch and labels": ({"batch_size": 3, "class_labels": [0, 1]}, "batch_size is 3; there are 2 class_labels"),
    "threshold of nothing": ({"threshold": {"head": 1.0}}, "threshold names 'head'; valid are names, whole or up"),
    **{
        f"snn_timesteps={value}": ({"snn_timesteps": value}, f"snn_timesteps is {value}; it must be a whole number")
        for value in (0, 1.5, True)
    },
    "output": ({"output_type": "jpg"}, "output_type is 'jpg'; valid are 'pil', 'np', 'pt'"),
    "generators": ({"batch_size": 2, "generator": seeds(0)}, "generator is a list of 1; there are 2 images"),
    "no generator": ({"generator": 5}, "generator is 5; it must be a torch.Generator"),
    "callback": ({"callback_on_step_end": 5}, "callback_on_step_end is 5; it must be callable, or None"),
    **{
        f"tensor inputs {value}": (
            {"callback_on_step_end_tensor_inputs": value},
            f"callback_on_step_end_tensor_inputs is {re.escape(repr(value))}; valid are lists of .*latents",
        )
        for value in (["tokens"], "latents", None)
    },
    "no tensor": ({"latents": 3}, "latents are 3; they must be a floating-point tensor"),
    "whole numbers": ({"latents": NOISE.long()}, "they must be a floating-point tensor"),
    "count": ({"latents": NOISE, "batch_size": 2}, r"latents have the shape \(1, 1, 8, 8\); expected \(2, 1, rows, c"),
    "odd side": ({"latents": NOISE[..., :7]}, "rows and columns multiples of 2"),
    "NaN": ({"latents": NOISE + torch.nan}, "latents hold numbers that are not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_drawn(by_class, name, monkeypatch):
    monkeypatch.setattr(by_class.unet, "forward", lambda *_, **__: pytest.fail("it began"))
    arguments, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        by_class(**arguments)


def test_schedulers_of_other_times_are_refused(pipeline, monkeypatch):
    fractions = SpikingDiffusionPipeline(pipeline.unet, EulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, **BETAS))
    monkeypatch.setattr(pipeline.unet, "forward", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(ValueError, match=r"scheduler is EulerDiscreteScheduler, which has the time 32\.\d+ in 4 steps"):
        draw(fractions)


def test_refused_for_what_the_model_or_the_scheduler_is(pipeline):
    with pytest.raises(ValueError, match="class_labels is 0; this model knows no classes"):
        pipeline(class_labels=0)
    with pytest.raises(ValueError, match=r"eta is 0\.5; DDPMScheduler takes none, so it must be 0"):
        SpikingDiffusionPipeline(pipeline.unet, ddpm_scheduler(TIMESTEPS))(eta=0.5)
    with pytest.raises(ValueError, match="scheduler has 1000 num_train_timesteps; the unet has 50"):
        SpikingDiffusionPipeline(pipeline.unet, DDPMScheduler(1000))
    with pytest.raises(ValueError, match="unet has 2 out_channels; needed are 1"):
        make(out_channels=2)
    with pytest.raises(ValueError, match="output_type is 'pil', for 1 or 3 channels; the model has 2"):
        make(in_channels=2)()
    pipeline.unet.state_dict()["mid_blocks.0.conv1.weight"].view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=r"unet: the weights mid_blocks\.0\.conv1\.weight are not finite"):
        draw(pipeline)
