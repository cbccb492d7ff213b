"""Input fields that say what is wrong with a value: which field, which value, and what would be valid.

Gradio's own checks do not name the field, and its picture fields decode a file before a demo sees it. These fields
check by themselves, and of a picture no more than the header is read here.
"""

import math
import reprlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

MOST_PIXELS = 40_000_000  # of a picture; larger ones are refused before they are decoded
MOST_LETTERS = 500
MOST_SEED = 4_000_000_000  # a few more are still seeds of PyTorch's generator, which takes 32 bits


def refusal(message: str) -> gr.Error:
    """What a page shows of a value that cannot be used; no traceback goes to the console."""
    return gr.Error(message, print_exception=False, title="This cannot be used")


def checked_number(label: str, given: Any, least: float, most: float, whole: bool) -> float | int:
    """`given` as a number.

    Raises:
        gr.Error: it is none from `least` to `most`, or not whole if it must be.
    """
    valid = f"it must be a {'whole ' * whole}number from {least:,} to {most:,}"
    if isinstance(given, bool) or not isinstance(given, int | float):
        shown = "empty, or not a number" if given is None else reprlib.repr(given)
        raise refusal(f"{label} is {shown}; {valid}.")
    if not math.isfinite(given) or not least <= given <= most or (whole and given != round(given)):
        raise refusal(f"{label} is {given:,}; {valid}.")
    return round(given) if whole else float(given)


def checked_text(label: str, given: Any) -> str:
    """`given` without spaces around it.

    Raises:
        gr.Error: it is no text, has no letters or more than `MOST_LETTERS`.
    """
    text = given.strip() if isinstance(given, str) else ""
    if not text:
        raise refusal(f"{label} is empty; write a few words.")
    if len(text) > MOST_LETTERS:
        raise refusal(f"{label} has {len(text):,} letters; at most {MOST_LETTERS} are read.")
    return text


def checked_choice(label: str, given: Any, choices: Sequence[str]) -> str:
    """`given`.

    Raises:
        gr.Error: it is none of `choices`.
    """
    if not isinstance(given, str) or given not in choices:
        raise refusal(f"{label} is {reprlib.repr(given)}; valid are {', '.join(choices)}.")
    return given


def checked_choices(label: str, given: Any, choices: Sequence[str]) -> list[str]:
    """`given`, some of `choices` or none.

    Raises:
        gr.Error: one of them is something else.
    """
    return [checked_choice(label, one, choices) for one in given or ()]


def checked_file(label: str, given: Any) -> str:
    """The path of a picture that was sent, by its header an image of at most `MOST_PIXELS`.

    Args:
        given: what Gradio knows of the file, with its `path`.

    Raises:
        gr.Error: there is none, it is no image, or it is too large.
    """
    path = getattr(given, "path", None)
    if not path:
        raise refusal(f"{label} is empty; choose an image file, or one of the examples.")
    check_header(label, path)
    return path


def check_header(label: str, file: Any) -> None:
    """Raises `gr.Error` unless a file, by its header, is an image of at most `MOST_PIXELS`; nothing is decoded."""
    largest = f"at most {MOST_PIXELS:,} pixels are decoded"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        raise refusal(f"{label} has far too many pixels; {largest}.") from None
    except Exception:  # parsers raise whatever they meet in broken headers
        raise refusal(f"{label} is not an image that can be read; send a PNG, JPEG, WebP, GIF, BMP or TIFF.") from None
    if width * height > MOST_PIXELS:
        raise refusal(f"{label} has {width:,} x {height:,} pixels; {largest}.")


def _checking(component: Component, check: Callable[[Any], Any]) -> Any:
    # Not a subclass: for each one Gradio writes a stub file beside the source.
    component.preprocess = check
    return component


def slider(label: str, least: float, most: float, value: float, step: float = 1, **options: Any) -> gr.Slider:
    """A number between two; a whole one if `step` is."""
    field = gr.Slider(least, most, value, step=step, label=label, **options)
    whole = isinstance(step, int)
    return _checking(field, partial(checked_number, label, least=least, most=most, whole=whole))


def whole_number(label: str, value: int, most: int, **options: Any) -> gr.Number:
    """A whole number from 0."""
    field = gr.Number(value, precision=0, minimum=0, maximum=most, label=label, **options)
    return _checking(field, partial(checked_number, label, least=0, most=most, whole=True))


def text(label: str, value: str = "", **options: Any) -> gr.Textbox:
    """A few words."""
    return _checking(gr.Textbox(value, label=label, **options), partial(checked_text, label))


def choice(label: str, choices: Sequence[tuple[str, str]], **options: Any) -> gr.Radio:
    """One of `choices`, which are (words, value); the first if nothing else is said."""
    values = [value for _, value in choices]
    field = gr.Radio(list(choices), value=values[0], label=label, **options)
    return _checking(field, partial(checked_choice, label, choices=values))


def choices(label: str, values: Sequence[str], **options: Any) -> gr.CheckboxGroup:
    """Any of `values`; all if nothing else is said."""
    field = gr.CheckboxGroup(list(values), value=list(values), label=label, **options)
    return _checking(field, partial(checked_choices, label, choices=values))


def picture(label: str, **options: Any) -> gr.Image:
    """An image file; the handler gets its path."""
    options = {"sources": ["upload", "clipboard"], "format": "png", "buttons": []} | options
    return _checking(gr.Image(type="filepath", label=label, **options), partial(checked_file, label))


def painting(label: str, side: int, **options: Any) -> gr.ImageEditor:
    """A square picture to paint on; the handler gets Gradio's dict of `background` and `layers`, PIL images in RGBA."""
    field = gr.ImageEditor(
        label=label,
        type="pil",
        image_mode="RGBA",
        canvas_size=(side, side),
        fixed_canvas=True,
        transforms=(),
        sources=("upload", "clipboard"),
        **options,
    )
    decode = field.convert_and_format_image

    def checked(file: Any, flatten_on_white: bool = False) -> Image.Image | None:
        if file is None:
            return None
        if isinstance(file, bytes | bytearray | memoryview):
            from io import BytesIO

            check_header(label, BytesIO(file))
        else:
            checked_file(label, file)
        try:
            return decode(file, flatten_on_white)
        except Exception:
            raise refusal(f"{label} is an image that is cut short or damaged; send a whole one.") from None

    field.convert_and_format_image = checked
    return field
