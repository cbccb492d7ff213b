"""All demos on one page: `python -m demos.app`."""

import gradio as gr

from demos import classify, fly_through, spiking, text_to_image, zoom_question
from demos.page import page, serve

TITLE = "Gated Vision Suite"
INTRODUCTION = "Five systems, small enough for the CPU of this machine; nothing leaves it."
DEMOS = (classify, text_to_image, spiking, zoom_question, fly_through)


def build() -> gr.Blocks:
    """The page; nothing is started and no model is loaded."""
    return page(TITLE, INTRODUCTION, {demo.TITLE: demo.build for demo in DEMOS})


if __name__ == "__main__":
    serve("app", build)
