"""Draw a caption with LINA, or paint it into a picture: `python -m demos.text_to_image`."""

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image, ImageChops

from demos import fields
from demos.background_work import Work, Worker
from demos.page import buttons, cancel_on_click, page, run_on_click, seed_field, serve

if TYPE_CHECKING:
    from generation.lina.pipeline import LinaPipeline

TITLE = "Text to image"
INTRODUCTION = (
    "LINA draws token by token, on attention whose cost grows with the number of tokens and not with its square. The "
    "model of shapes knows 22 words: one or two circles, squares or triangles, six colours, places, relations. The "
    "model of OpenMoji is a sketch: colours and outlines, smudged."
)
ATTRIBUTION = (
    "Pictures of the second model are made after [OpenMoji](https://openmoji.org): all emojis designed by OpenMoji, "
    "the open-source emoji and icon project. License: CC BY-SA 4.0."
)
MODELS = (("Shapes, 32 x 32", "shapes"), ("OpenMoji, 48 x 48", "openmoji"))
EXAMPLES = [
    ["a red circle above a blue square", "shapes"],
    ["a green triangle at the top left", "shapes"],
    ["a yellow square left of a purple circle", "shapes"],
    ["red apple", "openmoji"],
]
DIFFUSION_STEPS = 10  # with which the shipped models were measured
MOST_STEPS, MOST_IMAGES = 64, 8
SHOWN_SIDE = 256  # pixels
CANVAS = 288  # pixels, of the picture to paint on
PAINTED = 64  # of 255: a pixel of a smaller picture is painted if that much of it is
ANIMATION_SECONDS = 3.0
WORKER = Worker("text-to-image")


@lru_cache(maxsize=len(MODELS))
def load(model: str) -> "LinaPipeline":
    """A shipped pipeline."""
    from generation.lina.shipped_models import load_pipeline

    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(prompt: str, model: str, seed: int, guidance: float, steps: int, images: int) -> Iterator[tuple]:
    """Handler: pictures of a caption."""
    yield from followed(prompt, model, seed, guidance, steps, images, None)


def paint(
    painting: dict | None, prompt: str, model: str, seed: int, guidance: float, steps: int, images: int
) -> Iterator[tuple]:
    """Handler: a picture whose painted part is drawn anew."""
    layers = (painting or {}).get("layers") or []
    if not painting or painting.get("background") is None:
        raise fields.refusal("Painting is empty; take the first picture, or upload one.")
    if not any(layer.getchannel("A").getbbox() for layer in layers):
        raise fields.refusal("Painting has no painted part; paint over what is to be drawn anew.")
    yield from followed(prompt, model, seed, guidance, steps, images, (painting["background"], layers))


def followed(
    prompt: str, model: str, seed: int, guidance: float, steps: int, images: int, painting: Any
) -> Iterator[tuple]:
    settings = {"guidance_scale": guidance, "num_inference_steps": steps, "num_diffusion_steps": DIFFUSION_STEPS}
    seeds = list(range(seed, seed + images))
    with TemporaryDirectory() as folder:
        work = partial(drawn, prompt, model, seeds, settings, painting, Path(folder))
        yield from WORKER.follow(work, results=3)


def drawn(
    prompt: str,
    model: str,
    seeds: list[int],
    settings: dict[str, Any],
    painting: tuple[Image.Image, list[Image.Image]] | None,
    folder: Path,
    work: Work,
) -> tuple[str, tuple[list[tuple[Image.Image, str]], str, str]]:
    """Draw a picture for each seed.

    Args:
        prompt: what to draw.
        model: one of `MODELS`.
        seeds: of the pictures.
        settings: arguments of the pipeline.
        painting: the picture to paint into and the layers painted over it; None for a whole picture.
        folder: for the animation.

    Returns:
        Words; pictures with captions, the path of the first one's animation, the seeds.
    """
    pipeline = work.loaded(load, model)
    import torch

    from generation.lina.pipeline import save_animation

    side = pipeline.transformer.latent_size[0] * pipeline.vae_scale_factor
    if painting is not None:
        settings = settings | dict(zip(("image", "mask_image"), for_model(*painting, side), strict=True))

    def hear(pipeline: "LinaPipeline", step: int, known: int, tensors: dict) -> dict:
        steps = pipeline.num_timesteps
        work.report(f"Drawing, step {step + 1} of {steps}, {known} tokens", (step + 1) / steps)
        return {}

    work.report("Reading the caption")
    output = pipeline(
        prompt,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        return_steps=True,
        callback_on_step_end=hear,
        **settings,
    )
    work.report("Making the animation", 1.0)
    magnify = max(1, SHOWN_SIDE // side)
    size = (side * magnify,) * 2
    shown = [
        (picture.resize(size, Image.Resampling.NEAREST), f"seed {seed}")
        for picture, seed in zip(output.images, seeds, strict=True)
    ]
    animation = folder / "steps.gif"
    save_animation(output.steps[0], animation, ANIMATION_SECONDS, magnify)
    count = f"{len(seeds)} picture{'s' * (len(seeds) > 1)}"
    return f"{count} in {pipeline.num_timesteps} steps,", (shown, str(animation), ", ".join(map(str, seeds)))


def for_model(background: Image.Image, layers: list[Image.Image], side: int) -> tuple[Image.Image, Image.Image]:
    """A picture and the mask of what is painted, of `side` pixels each: white where any layer is painted."""
    mask = Image.new("L", background.size)
    for layer in layers:
        mask = ImageChops.lighter(mask, layer.getchannel("A").resize(background.size, Image.Resampling.NEAREST))
    opaque = Image.alpha_composite(Image.new("RGBA", background.size, "white"), background.convert("RGBA"))
    picture, mask = (image.resize((side, side), Image.Resampling.BOX) for image in (opaque.convert("RGB"), mask))
    mask = mask.point(lambda value: 255 * (value >= PAINTED))
    if mask.getbbox() is None:
        raise ValueError("Painting has a painted part smaller than a pixel of the model; paint with a larger brush.")
    return picture, mask


def first_of(gallery: list[tuple[str, str | None]] | None) -> Image.Image:
    """The first picture of a gallery, as large as the canvas."""
    if not gallery:
        raise fields.refusal("There is no picture yet; draw one first, or upload one.")
    with Image.open(gallery[0][0]) as picture:
        return picture.convert("RGB").resize((CANVAS, CANVAS), Image.Resampling.NEAREST)


def build() -> None:
    """Add the demo to the page that is being built."""
    gr.Markdown(INTRODUCTION)
    with gr.Row():
        with gr.Column():
            prompt = fields.text("Prompt", EXAMPLES[0][0], lines=2, max_lines=4)
            model = fields.choice("Model", MODELS)
            seed = seed_field()
            with gr.Row():
                guidance = fields.slider("Guidance", 0.0, 20.0, 3.0, step=0.5, min_width=140)
                steps = fields.slider("Steps", 1, MOST_STEPS, 16, min_width=140)
            images = fields.slider("Images", 1, MOST_IMAGES, 4)
            go, stop, status = buttons("Draw")
            gr.Examples(EXAMPLES, [prompt, model], cache_examples=False, label="Examples")
        with gr.Column():
            gallery = gr.Gallery(
                label="Pictures",
                interactive=False,
                elem_classes="whole",
                columns=2,
                height="auto",
                object_fit="contain",
                format="png",
                type="filepath",
                buttons=["download"],
            )
            seeds = gr.Textbox(label="Seeds of these pictures", interactive=False, buttons=["copy"])
            animation = gr.Image(
                label="The first picture, step by step", type="filepath", height=300, buttons=["download"]
            )
    with gr.Accordion("Paint into a picture", open=False):
        gr.Markdown("Paint over a part of a picture: that part alone is drawn anew, as the prompt says.")
        with gr.Row():
            take = gr.Button("Take the first picture", min_width=140)
            go_painting = gr.Button("Draw the painted part", variant="primary", min_width=140)
        painting = fields.painting(
            "Painting",
            CANVAS,
            brush=gr.Brush(default_size=40, colors=["#ff2d2d"], color_mode="fixed"),
            layers=False,
            height=440,
        )
    gr.Markdown(ATTRIBUTION)
    take.click(first_of, gallery, painting, queue=False, api_visibility="private", show_progress="hidden")
    settings, outputs = [prompt, model, seed, guidance, steps, images], [status, gallery, animation, seeds]
    events = [
        run_on_click(go, draw, settings, outputs, "text-to-image", "draw"),
        run_on_click(go_painting, paint, [painting, *settings], outputs, "text-to-image", "paint"),
    ]
    cancel_on_click(stop, status, events, "text-to-image")


if __name__ == "__main__":
    serve("text_to_image", lambda: page(TITLE, "", {TITLE: build}))
