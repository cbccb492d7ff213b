"""Draw digits with neurons that spike, and see the spikes and what they cost: `python -m demos.spiking`."""

from collections.abc import Iterator
from functools import lru_cache, partial
from io import BytesIO
from types import SimpleNamespace
from typing import TYPE_CHECKING

import gradio as gr
from PIL import Image

from demos import fields
from demos.background_work import Work, Worker
from demos.page import buttons, cancel_on_click, page, run_on_click, seed_field, serve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from generation.spiking_diffusion.energy import EnergyReport
    from generation.spiking_diffusion.pipeline import SpikingDiffusionPipeline

TITLE = "Spiking diffusion"
INTRODUCTION = (
    "A diffusion model whose neurons say nothing but 0 or 1, a few times for each noisy image, draws digits of 8 x 8 "
    "pixels, as written by hand. A threshold of 1 is the trained one; 1.3 gave better digits."
)
MODEL, TWIN = "digits", "digits-ann"
ANY = "any"
LABELS = tuple((name, name) for name in (*map(str, range(10)), ANY))
MOST_STEPS, MOST_IMAGES, MOST_TIME_STEPS = 100, 64, 16
MAGNIFY = 6
DOTS_PER_INCH = 90
WORKER = Worker("spiking")


@lru_cache(maxsize=2)
def load(model: str) -> "SpikingDiffusionPipeline":
    """A shipped pipeline, with DDIM; spiking unless it is the twin."""
    from generation.spiking_diffusion import energy_report

    return energy_report.load("model", model, spiking=model != TWIN)


@lru_cache(maxsize=1)
def twin_report() -> "EnergyReport":
    """What the artificial twin costs, which is the same for all images."""
    from generation.spiking_diffusion.energy_report import measure

    return measure(load(TWIN), images=1, steps=1)


def draw(label: str, seed: int, threshold: float, time_steps: int, steps: int, images: int) -> Iterator[tuple]:
    """Handler: digits, spikes, firing rates and energies."""
    yield from WORKER.follow(partial(drawn, label, seed, threshold, time_steps, steps, images), results=6)


def drawn(
    label: str, seed: int, threshold: float, time_steps: int, steps: int, images: int, work: Work
) -> tuple[str, tuple[Image.Image, Image.Image, Image.Image, Image.Image, str, str]]:
    """Draw digits.

    Args:
        label: a digit, or `ANY` for all in turn.
        seed: of the first image; the next ones count on.
        threshold: at which neurons fire.
        time_steps: for which they fire.
        steps: of denoising.
        images: how many.

    Returns:
        Words; pictures of the digits, the spikes, the firing rates and the energies, a table of these, the seeds.
    """
    pipeline, twin = work.loaded(load, MODEL), work.loaded(twin_report)
    import torch

    from generation.spiking_diffusion.energy import totals
    from generation.spiking_diffusion.energy_report import plot_energy, plot_raster, plot_rates, recorded_spikes
    from generation.spiking_diffusion.sample import picture

    unet = pipeline.unet
    # Neurons spike for other time steps than the model was trained with, which the recorder must know.
    recorded = SimpleNamespace(neurons=unet.neurons, config=SimpleNamespace(snn_timesteps=time_steps))

    def hear(pipeline: "SpikingDiffusionPipeline", step: int, timestep: int, tensors: dict) -> dict:
        work.report(f"Drawing, step {step + 1} of {steps}", (step + 1) / steps)
        return {}

    with recorded_spikes(recorded, steps // 2) as spikes, work.stops(*unet.neurons().values()):
        output = pipeline(
            images,
            [number % 10 if label == ANY else int(label) for number in range(images)],
            num_inference_steps=steps,
            threshold=threshold,
            snn_timesteps=time_steps,
            generator=[torch.Generator().manual_seed(seed + number) for number in range(images)],
            output_type="pt",
            collect_energy=True,
            callback_on_step_end=hear,
        )
    work.report("Plotting", 1.0)
    report = output.energy
    plots = []
    for figure in (plot_raster(spikes), plot_rates(report), plot_energy(report, twin)):
        plots.append(as_picture(figure))
        work.check()
    last = f"{seed} to {seed + images - 1}" if images > 1 else str(seed)
    table = f"{totals(report, twin)}\n\nA generated image takes {steps} calls."
    words = f"{images} image{'s' * (images > 1)} in {steps} steps,"
    return words, (picture(output.images, magnify=MAGNIFY), *plots, table, last)


def as_picture(figure: "Figure") -> Image.Image:
    """A plot, drawn."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    return Image.open(file)


def build() -> None:
    """Add the demo to the page that is being built."""
    gr.Markdown(INTRODUCTION)
    with gr.Row():
        with gr.Column():
            label = fields.choice("Digit", LABELS)
            threshold = fields.slider("Threshold of the neurons", 0.5, 2.0, 1.3, step=0.05)
            time_steps = fields.slider("Time steps of the neurons (trained: 4)", 1, MOST_TIME_STEPS, 4)
            with gr.Row():
                steps = fields.slider("Denoising steps", 1, MOST_STEPS, 10, min_width=140)
                images = fields.slider("Images", 1, MOST_IMAGES, 16, min_width=140)
            seed = seed_field()
            go, stop, status = buttons("Draw")
        with gr.Column():
            digits = gr.Image(label="Digits", format="png", height=300, elem_classes="pixels", buttons=["download"])
            seeds = gr.Textbox(label="Seeds of these images", interactive=False, buttons=["copy"])
    plots = {}
    for name, height in (
        ("Spikes of the first image, half way through the denoising", None),
        ("Firing rate of each layer's input", None),
        ("Energy, beside the artificial twin", 380),
    ):
        gr.Markdown(f"**{name}**")
        plots[name] = gr.Image(label=name, show_label=False, height=height, format="png", buttons=["fullscreen"])
    with gr.Accordion("The three models of energy in numbers", open=True):
        table = gr.Markdown(label="Energy", elem_classes="tables")
    event = run_on_click(
        go,
        draw,
        [label, seed, threshold, time_steps, steps, images],
        [status, digits, *plots.values(), table, seeds],
        "spiking",
        "draw_spiking",
    )
    cancel_on_click(stop, status, [event], "spiking")


if __name__ == "__main__":
    serve("spiking", lambda: page(TITLE, "", {TITLE: build}))
