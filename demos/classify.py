"""Classify a picture, and see what the model looked at: `python -m demos.classify`."""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
from PIL import Image

from demos import fields
from demos.background_work import Work, Worker
from demos.page import buttons, cancel_on_click, page, run_on_click, serve

if TYPE_CHECKING:
    from torch import Tensor

    from vision.model_insight import Insight
    from vision.predict import Classifier

TITLE = "Classify"
INTRODUCTION = (
    "ViG and Gated-SwinRMT tell what is in a picture; the overlays show what their gates let through. These are small "
    "models: one reads hand-written digits, two sort emoji-like pictures into nine categories (61 to 63 % right)."
)
EXPLANATION = (
    "Dark is a map's least value, bright its greatest; gates and decay are means over heads and channels. A scan's "
    "gates say how much of its memory outlives a patch, forward and backward. The receptive field is the gradient of "
    "the framed patch's features by the picture. Decay is what is left of a patch's value at the framed one; in "
    "retention it falls with the distance alone."
)
ATTRIBUTION = "Emojis designed by [OpenMoji](https://openmoji.org). License: CC BY-SA 4.0."
PICTURES = Path(__file__).parent / "pictures"
MODELS = (
    ("Digits: ViG-nano", "vig_nano_patch4_28.mnist5k"),
    ("Pictures: ViG-nano", "vig_nano_patch4_28.openmoji"),
    ("Pictures: Gated-SwinRMT-nano", "gated_swin_rmt_nano_swat.openmoji"),
)
EXAMPLES = [
    ["seven.png", MODELS[0][1]],
    ["apple.png", MODELS[2][1]],
    ["dog.png", MODELS[1][1]],
    ["bicycle.png", MODELS[2][1]],
]
GATES, RECEPTIVE_FIELD, DECAY = OVERLAYS = ("gates", "receptive field", "decay")
SHOWN_SIDE = 280  # pixels
SHOWN_CLASSES = 5
FAINTEST = 1e-3  # of the receptive field, relative to its largest value
WORKER = Worker("classify")


@lru_cache(maxsize=len(MODELS))
def load(model: str) -> "Classifier":
    """A shipped classifier."""
    from vision.model_files import load_model
    from vision.predict import Classifier

    return Classifier(load_model(model))


def classify(picture: str, model: str, overlays: list[str], across: float, down: float) -> Iterator[tuple]:
    """Handler: classes, and pictures of what the model looked at."""
    yield from WORKER.follow(partial(look, Path(picture), model, overlays, (down / 100, across / 100)), results=2)


def look(
    picture: Path, model: str, overlays: Sequence[str], place: tuple[float, float], work: Work
) -> tuple[str, tuple[dict[str, float], list[tuple[Image.Image, str]]]]:
    """Classify a file.

    Args:
        picture: the file.
        model: one of `MODELS`.
        overlays: some of `OVERLAYS`.
        place: of the patch that is looked at, parts of the height and the width from 0 to 1.

    Returns:
        Words; the probability of each class; pictures with captions.

    Raises:
        ValueError: the file is damaged.
    """
    classifier = work.loaded(load, model)
    from vision.image_files import ImageFileError
    from vision.model_insight import look_inside

    work.report("Reading the picture")
    try:
        seen = classifier.read(picture)
    except ImageFileError:
        raise ValueError("Picture cannot be decoded: it is cut short or damaged; send a whole file.") from None
    work.report("Classifying")
    values = classifier.probabilities(seen[None])[0].tolist()
    classes = dict(zip(classifier.labels, values, strict=True))
    best = max(classes, key=classes.get)
    shown = []
    if overlays:
        work.report("Looking inside")
        height, width = seen.shape[1:]
        pixel = (min(int(place[0] * height), height - 1), min(int(place[1] * width), width - 1))
        insight = look_inside(classifier.model, seen, pixel)
        shown = list(drawn(insight, as_seen(classifier, seen), overlays))
    return f"{best} with {classes[best]:.1%},", (classes, shown)


def as_seen(classifier: "Classifier", seen: "Tensor") -> Image.Image:
    """What the model saw, `[C, H, W]`, as a picture in RGB of `SHOWN_SIDE` pixels."""
    description = classifier.model.pretrained_cfg
    mean, std = (np.reshape(description[name], (-1, 1, 1)) for name in ("mean", "std"))
    pixels = (255 * np.clip(seen.numpy() * std + mean, 0, 1)).round().astype(np.uint8).transpose(1, 2, 0)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    return picture.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.NEAREST)


def drawn(insight: "Insight", picture: Image.Image, overlays: Sequence[str]) -> Iterator[tuple[Image.Image, str]]:
    """The picture with each map laid over it, means of all heads, and captions."""
    if GATES in overlays:
        for gate in insight.gates:
            values = gate.values.mean(0).numpy()
            yield overlay(picture, values, "cividis"), f"{short(gate.name)}: {span(values)}"
    if RECEPTIVE_FIELD in overlays:
        field = insight.receptive_field.numpy()
        relative = np.log10(np.maximum(field / max(field.max(), 1e-30), FAINTEST))
        marked = with_patch(overlay(picture, relative, "magma"), insight)
        yield marked, "receptive field of the framed patch, logarithmic"
    if DECAY in overlays:
        decay = insight.decay.mean(0).numpy()
        yield with_patch(overlay(picture, decay, "viridis"), insight), f"decay towards the framed patch: {span(decay)}"


def short(name: str) -> str:
    """The name of a map without what is meant over."""
    return name.partition(",")[0]


def span(values: np.ndarray) -> str:
    return f"{values.min():.3f} to {values.max():.3f}"


def overlay(picture: Image.Image, values: np.ndarray, colours: str, strength: float = 0.65) -> Image.Image:
    """`picture` with a map `[rows, columns]` laid over it, from its least to its greatest value."""
    from matplotlib import colormaps

    low, high = float(values.min()), float(values.max())
    relative = (values - low) / (high - low) if high > low else np.zeros_like(values)
    layer = Image.fromarray((255 * colormaps[colours](relative)[..., :3]).round().astype(np.uint8))
    return Image.blend(picture, layer.resize(picture.size, Image.Resampling.NEAREST), strength)


def with_patch(picture: Image.Image, insight: "Insight") -> Image.Image:
    """`picture` with a frame around the patch that was looked at."""
    from PIL import ImageDraw

    rows, columns = insight.size
    (row, column), (width, height) = insight.token, picture.size
    box = (
        column * width / columns,
        row * height / rows,
        (column + 1) * width / columns - 1,
        (row + 1) * height / rows - 1,
    )
    ImageDraw.Draw(picture).rectangle(box, outline=(255, 45, 45), width=3)
    return picture


def pointed_at(picture: str | None, event: gr.SelectData) -> tuple[Any, Any]:
    """Where in a picture was clicked, as parts of its width and height in percent."""
    if picture is None:
        return gr.skip(), gr.skip()
    with Image.open(picture) as image:
        width, height = image.size
    across, down = event.index
    return round(100 * min(across / width, 1)), round(100 * min(down / height, 1))


def build() -> None:
    """Add the demo to the page that is being built."""
    gr.Markdown(INTRODUCTION)
    with gr.Row():
        with gr.Column():
            picture = fields.picture("Picture", height=280)
            model = fields.choice("Model", MODELS)
            overlays = fields.choices("Overlays", OVERLAYS)
            gr.Markdown("Click into the picture to choose the patch whose receptive field and decay are shown.")
            with gr.Row():
                across = fields.slider("Patch, % from the left", 0, 100, 50, min_width=140)
                down = fields.slider("Patch, % from the top", 0, 100, 50, min_width=140)
            go, stop, status = buttons("Classify")
        with gr.Column():
            classes = gr.Label(num_top_classes=SHOWN_CLASSES, label="Classes")
            maps = gr.Gallery(
                label="What the model looked at",
                elem_classes="whole",
                columns=2,
                height="auto",
                object_fit="contain",
                format="png",
                buttons=[],
            )
    gr.Markdown(EXPLANATION)
    gr.Examples(
        [[str(PICTURES / file), name] for file, name in EXAMPLES],
        [picture, model],
        cache_examples=False,
        label="Examples",
    )
    gr.Markdown(ATTRIBUTION)
    picture.select(pointed_at, picture, [across, down], queue=False, api_visibility="private", show_progress="hidden")
    event = run_on_click(
        go, classify, [picture, model, overlays, across, down], [status, classes, maps], "classify", "classify"
    )
    cancel_on_click(stop, status, [event], "classify")


if __name__ == "__main__":
    serve("classify", lambda: page(TITLE, "", {TITLE: build}))
