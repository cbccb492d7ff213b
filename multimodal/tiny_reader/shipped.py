"""The tiny reader that ships with the suite, with its trained branches."""

from pathlib import Path

from multimodal.q_zoom import QZoom
from multimodal.tiny_reader import model  # noqa: F401  transformers knows the model from here on

READER = str(Path(__file__).parents[1] / "checkpoints" / "tiny_reader")


def load_reader() -> QZoom:
    """The shipped Q-Zoom around the shipped tiny reader, in float32 on the CPU."""
    return QZoom.from_pretrained(READER, heads=READER)
