"""Work that goes on in a thread while its page hears of it, and that stops soon after the page has lost interest.

A handler is a generator: while it waits for the thread it says several times a second how far the work is. Gradio
closes the generator when a cancel button is pressed, a client cancels or a page is left; the work is then told to stop,
and ends at its next report.
"""

import html
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import gradio as gr

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.1
LEAST_LOADING = 0.1  # seconds
Loaded = TypeVar("Loaded")
LOADING = threading.Lock()  # imports of large packages in two threads at once may meet half of a module


class Stopped(Exception):
    """Nobody waits for this work any more."""


class Work:
    """What a function that works in the background says, and whether it shall go on.

    Attributes:
        words: what is being done.
        part: of the work that is done, from 0 to 1; None if that is not known.
        preview: values of the handler's outputs so far, or None.
        seconds_of_loading: that went into models.
    """

    def __init__(self) -> None:
        self.words, self.part = "Waiting for its turn", None
        self.preview: tuple | None = None
        self.seconds_of_loading = 0.0
        self._stop = threading.Event()

    def stop(self) -> None:
        """Let the next `check` or `report` raise `Stopped`."""
        self._stop.set()

    def check(self, *_: Any) -> None:
        """Raises `Stopped` if the work shall stop."""
        if self._stop.is_set():
            raise Stopped

    def report(self, words: str, part: float | None = None, preview: tuple | None = None) -> None:
        """Say how far the work is; raises `Stopped` if it shall stop."""
        self.check()
        self.words, self.part, self.preview = words, part, preview or self.preview

    def loaded(self, load: Callable[..., Loaded], *arguments: Any) -> Loaded:
        """What `load` returns; the time it takes is told apart from the work's."""
        self.report("Loading the model")
        began = time.perf_counter()
        with LOADING:
            model = load(*arguments)
        self.seconds_of_loading += time.perf_counter() - began
        return model

    @contextmanager
    def stops(self, *modules: "nn.Module") -> Iterator[None]:
        """Each of `modules` checks, whenever it is called inside, whether the work shall go on."""
        hooks = [module.register_forward_pre_hook(self.check) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


_under_way: set[Work] = set()


def stop_all() -> None:
    """Stop all work of the process."""
    for work in tuple(_under_way):
        work.stop()


class Worker:
    """One thread, for which work waits in order; it starts with the first.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def follow(self, function: Callable[[Work], tuple[str, tuple]], results: int) -> Iterator[tuple]:
        """Values of a handler's outputs again and again: a line about the work, and what it results in.

        Args:
            function: the work; returns what was done, in words, and the results.
            results: how many there are.

        Raises:
            gr.Error: with its words, if the function raises a `ValueError`; of any other exception the page learns no
                more than that it happened, and the console has its traceback.
        """
        work, began = Work(), time.perf_counter()
        nothing_new = (gr.skip(),) * results
        _under_way.add(work)
        future = self._thread.submit(function, work)
        try:
            while wait([future], SECONDS_BETWEEN_LOOKS).not_done:
                preview, work.preview = work.preview, None
                yield under_way(work, time.perf_counter() - began), *(preview or nothing_new)
            seconds = time.perf_counter() - began
            try:
                words, values = future.result()
            except Stopped:
                yield STOPPED, *nothing_new
                return
            except ValueError as error:
                message = str(error)
            except Exception as error:
                logger.exception("a demo failed")
                message = f"an error that nobody expected ({type(error).__name__}); the console has the details"
            else:
                yield line(f"{words} {latency(seconds, work.seconds_of_loading)}."), *values
                return
            yield line(f"Not done: {message}"), *nothing_new
            raise gr.Error(message, print_exception=False, title="This did not work")
        finally:
            work.stop()
            future.cancel()
            _under_way.discard(work)


def latency(seconds: float, loading: float) -> str:
    """How long work took and on what, in words; loading of models, if it took any time to speak of, by itself."""
    from torch import get_num_threads  # by now some work has imported it

    count = get_num_threads()
    taken = f"{seconds - loading:.2f} s on {count} CPU thread{'s' * (count > 1)}"
    return taken if loading < LEAST_LOADING else f"{taken}, and {loading:.1f} s to load the model"


def line(words: str) -> str:
    """A line about the work, as HTML."""
    return f'<div class="work" role="status">{html.escape(words)}</div>'


def under_way(work: Work, seconds: float) -> str:
    """A line about work that goes on, with a bar."""
    value = "" if work.part is None else f' value="{work.part:.3f}"'
    words = html.escape(f"{work.words}, {seconds:.1f} s")
    return f'<div class="work" role="status"><progress max="1"{value}></progress> {words}</div>'


STOPPED = line("Stopped.")
