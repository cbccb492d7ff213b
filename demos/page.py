"""The page around the demos, and the server on this machine that shows it."""

import argparse
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gradio as gr

from demos.background_work import STOPPED, stop_all
from demos.fields import MOST_SEED

PORT = 7860
MOST_WAITING = 16  # requests of all pages
MOST_SENT = "64mb"  # of a file
KEPT_FOR = 3600  # seconds that files of a page stay on disk
STYLE = """
.gradio-container { max-width: 1200px !important; margin: auto; }
.work { min-height: 1.6em; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.work progress { width: 8em; vertical-align: middle; accent-color: var(--primary-500); }
.pixels img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain; }
.whole .grid-wrap { max-height: none !important; }
.whole .caption-label { max-width: 100% !important; white-space: normal !important; }
.beside { align-self: center; }
.tables table { font-size: min(1em, 2.5vw); }
.tables :is(th, td) { overflow-wrap: normal !important; word-break: normal !important; }
.tables :is(th, td) { padding: 0.3em 0.4em !important; }
footer { display: none !important; }
"""
Build = Callable[[], None]  # adds a demo to the page that is being built


def page(title: str, introduction: str, tabs: Mapping[str, Build]) -> gr.Blocks:
    """A page with a tab for each demo, or without tabs if there is one only; nothing is started."""
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(KEPT_FOR, KEPT_FOR)) as blocks:
        gr.Markdown(f"# {title}\n{introduction}")
        if len(tabs) == 1:
            next(iter(tabs.values()))()
        else:
            with gr.Tabs():
                for name, build in tabs.items():
                    with gr.Tab(name, id=name):
                        build()
    return blocks.queue(default_concurrency_limit=1, max_size=MOST_WAITING)


def start(blocks: gr.Blocks, port: int | None, block: bool) -> str:
    """Serve a page on this machine alone.

    Args:
        port: None for the first free one from `PORT` on.
        block: wait until the process is interrupted.

    Returns:
        The address.
    """
    # Gradio switches matplotlib's backend before and after each step of a handler, which fails while another thread is
    # in the middle of importing pyplot.
    import matplotlib.pyplot  # noqa: F401

    _, address, _ = blocks.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        quiet=not block,
        prevent_thread_lock=not block,
        max_file_size=MOST_SENT,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        css=STYLE,
    )
    return address


def serve(name: str, blocks: Callable[[], gr.Blocks], arguments: Sequence[str] | None = None) -> None:
    """Parse the command line of `python -m demos.<name>` and serve a page."""
    parser = argparse.ArgumentParser(prog=f"python -m demos.{name}", description="Opens a page on 127.0.0.1.")
    parser.add_argument("--port", type=int, help=f"(default: the first free one from {PORT} on)")
    options = parser.parse_args(arguments)
    if options.port is not None and not 1 <= options.port <= 65535:
        parser.error(f"--port is {options.port}; it must be from 1 to 65535")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        start(blocks(), options.port, block=True)
    except OSError as error:
        parser.error(f"--port is {options.port}: {error}")
    finally:
        stop_all()  # the process ends no sooner than its threads


def run_on_click(
    button: gr.Button,
    handler: Callable,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    tab: str,
    name: str,
) -> Any:
    """Let a button call a handler by way of the queue, one at a time of a tab, known to clients by a name."""
    return button.click(
        handler,
        inputs=inputs,
        outputs=outputs,
        api_name=name,
        concurrency_limit=1,
        concurrency_id=tab,
        show_progress="hidden",
    )


def cancel_on_click(button: gr.Button, status: gr.HTML, events: Iterable[Any], tab: str) -> None:
    """Let a button stop what is under way.

    That is outside of the queue, in which it would wait for what it is to stop. The words come by way of the queue, or
    a last line about the work might come after them.
    """
    quiet = {"api_visibility": "private", "show_progress": "hidden"}
    stopping = button.click(lambda: None, cancels=list(events), queue=False, **quiet)
    stopping.then(lambda: STOPPED, outputs=status, concurrency_limit=1, concurrency_id=tab, **quiet)


def buttons(words: str) -> tuple[gr.Button, gr.Button, gr.HTML]:
    """What starts a tab's work, what stops it, and the line about it."""
    with gr.Row():
        go = gr.Button(words, variant="primary", min_width=120)
        stop = gr.Button("Cancel", variant="stop", min_width=120)
    return go, stop, gr.HTML("", padding=False, label="Status")


def seed_field() -> gr.Number:
    """A seed, and a button that takes another one."""
    from demos.fields import whole_number

    with gr.Row():
        seed = whole_number("Seed", 7, MOST_SEED, min_width=120)
        another = gr.Button("Another seed", min_width=120, elem_classes="beside")
    another.click(
        lambda: random.randrange(MOST_SEED), outputs=seed, queue=False, api_visibility="private", show_progress="hidden"
    )
    return seed
