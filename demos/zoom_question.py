"""Ask about a picture, with and without a closer look: `python -m demos.zoom_question`."""

import dataclasses
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from demos import fields
from demos.background_work import Work, Worker
from demos.page import buttons, cancel_on_click, page, run_on_click, serve

if TYPE_CHECKING:
    from multimodal.q_zoom import QZoom, ZoomInfo

TITLE = "Zoom question"
INTRODUCTION = (
    "A small reader sees a picture coarsely; Q-Zoom decides from the question whether and where it looks closer. It "
    "knows drawn scenes only: coloured landmarks with codes, in print large and small. It is asked for the code at a "
    "colour, what shape a colour is, where it is, and what the background is."
)
GATES = (("Let the gate decide", "auto"), ("Always look closer", "always"), ("Never", "never"))
MOST_SCENE = 1_000_000
MOST_NEW_TOKENS = 16
ALL_QUESTIONS = ["What is the code at red?", "What shape is red?", "Where is red?", "What is the background?"]
WORKER = Worker("zoom-question")


@lru_cache(maxsize=1)
def load() -> "QZoom":
    """The shipped reader, with its gate and its region proposal.

    Raises:
        ValueError: its checkpoint is not there.
    """
    from multimodal.q_zoom.checkpoints import HEADS_FILE
    from multimodal.tiny_reader.shipped import READER, load_reader

    if not (Path(READER) / HEADS_FILE).is_file():
        raise ValueError("The reader is not there: this installation has no multimodal/checkpoints/tiny_reader.")
    return load_reader()


def draw_scene(scene: int) -> tuple[Image.Image, Any, str]:
    """Handler: a scene that was never trained with.

    Returns:
        The picture, an update of the questions that it answers, and one of them.
    """
    from multimodal.tiny_reader import scenes

    drawn = scenes.draw_scene(scenes.HELD_OUT_SEED + scene)
    questions = [question.text for question in drawn.questions()]
    code = next(question.text for question in drawn.questions() if question.kind == "code")
    return drawn.picture(), gr.Dataset(samples=[[text] for text in questions]), code


def ask(picture: str, question: str, gate: str) -> Iterator[tuple]:
    """Handler: the answers, and where the reader looked."""
    yield from WORKER.follow(partial(answered, picture, question, gate), results=4)


def answered(path: str, question: str, gate: str, work: Work) -> tuple[str, tuple[str, str, Image.Image, str]]:
    """Answer a question without a closer look, and then as the gate says.

    Args:
        path: of the picture.
        question: about it.
        gate: one of `GATES`.

    Returns:
        Words; both answers, a picture of where the reader looked, and what that took.

    Raises:
        ValueError: the file is damaged or too small.
    """
    zoom = work.loaded(load)
    from multimodal.q_zoom.images import opened
    from multimodal.q_zoom.pictures import zoom_picture

    try:
        picture = opened(path, "Picture")
    except ValueError:
        raise ValueError("Picture cannot be decoded: it is cut short or damaged; send a whole file.") from None
    if min(picture.size) < zoom.adapter.cell_pixels:
        raise ValueError(
            f"Picture has {picture.width} x {picture.height} pixels; both sides must have {zoom.adapter.cell_pixels}, "
            "what the reader's smallest patch covers."
        )
    with work.stops(zoom.adapter.decoder.layers[0]):
        work.report("Answering without a closer look", 0.1)
        plain, _ = answer(zoom, picture, question, "never")
        work.report("Answering with a closer look, if the gate wants one", 0.4)
        closer, info = answer(zoom, picture, question, gate)
        if info.heat_map is None:
            work.report("Looking where it would look", 0.8)
            info = dataclasses.replace(info, heat_map=zoom.propose(picture, question).heat_map)
    work.report("Drawing", 0.9)
    words = "Looked closer," if info.opened else "Answered without a closer look,"
    return words, (plain, closer, zoom_picture(picture, info), report(info, picture))


def answer(zoom: "QZoom", picture: Image.Image, question: str, gate: str) -> "tuple[str, ZoomInfo]":
    """An answer, and what was done for it."""
    inputs = zoom.ask(picture, question)
    sequences, (info,) = zoom.generate(
        inputs, picture, gate=gate, return_zoom_info=True, max_new_tokens=MOST_NEW_TOKENS, do_sample=False
    )
    tokens = sequences[0, inputs["input_ids"].shape[1] :]
    return zoom.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(), info


def report(info: "ZoomInfo", picture: Image.Image) -> str:
    """What was done, as a table in Markdown."""
    asked = "not asked" if info.gate_probability is None else f"{info.gate_probability:.3f}"
    boxes = "; ".join(f"({left}, {top}) to ({right}, {bottom})" for left, top, right, bottom in info.boxes)
    rows = {
        "gate's probability that a closer look is needed": asked,
        "looked closer": "yes" if info.opened else f"no{', ' * bool(info.note)}{info.note}",
        f"box, pixels of {picture.width} x {picture.height}": boxes or "none",
        "visual tokens of the whole picture": str(info.source_tokens),
        "visual tokens of the closer look": str(info.region_tokens),
        "visual tokens at full resolution would be": str(info.full_tokens),
    }
    return "\n".join(["| what was done | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def build() -> None:
    """Add the demo to the page that is being built."""
    gr.Markdown(INTRODUCTION)
    with gr.Row():
        with gr.Column():
            with gr.Row():
                scene = fields.whole_number("Scene, never trained with", 3, MOST_SCENE, min_width=140)
                draw = gr.Button("Draw this scene", min_width=140, elem_classes="beside")
            picture = fields.picture("Picture", height=320, elem_classes="pixels")
            question = fields.text("Question", ALL_QUESTIONS[0])
            asked = gr.Dataset(
                components=[question],
                samples=[[text] for text in ALL_QUESTIONS],
                label="Questions",
                type="values",
                samples_per_page=20,
            )
            gate = fields.choice("Closer look", GATES)
            go, stop, status = buttons("Ask")
        with gr.Column():
            with gr.Row():
                plain = gr.Textbox(label="Answer without a closer look", interactive=False, min_width=140)
                closer = gr.Textbox(label="Answer as chosen", interactive=False, min_width=140)
            looked = gr.Image(
                label="The box, where the reader would look (bright), and what the closer look saw",
                format="png",
                elem_classes="pixels",
                buttons=["fullscreen"],
            )
            facts = gr.Markdown(label="What was done", elem_classes="tables")

    draw.click(
        draw_scene,
        scene,
        [picture, asked, question],
        api_name="draw_scene",
        queue=False,
        show_progress="hidden",
    )
    asked.click(
        lambda sample: sample[0], asked, question, queue=False, api_visibility="private", show_progress="hidden"
    )
    event = run_on_click(
        go, ask, [picture, question, gate], [status, plain, closer, looked, facts], "zoom-question", "ask"
    )
    cancel_on_click(stop, status, [event], "zoom-question")


if __name__ == "__main__":
    serve("zoom_question", lambda: page(TITLE, "", {TITLE: build}))
