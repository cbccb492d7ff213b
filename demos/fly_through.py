"""Fly through a city that a mixture of hash grids has learned: `python -m demos.fly_through`."""

import math
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import gradio as gr
import numpy as np

from demos import fields
from demos.background_work import Work, Worker
from demos.page import cancel_on_click, page, run_on_click, serve

if TYPE_CHECKING:
    from generation.radiance_field.cameras import Cameras
    from generation.radiance_field.renderer import Renderer

TITLE = "Fly through"
INTRODUCTION = (
    "A radiance field: four hash grids and small networks tell colour and density of every point; a pixel is their sum "
    "along its ray. A gate sends each point to one of the four; the last picture shows which of them owns a pixel."
)
MODEL = "city"
PATHS = (("Orbit", "orbit"), ("Spiral", "spiral"))
NAMES = ("colour", "depth", "expert")
LEAST_SIDE, MOST_SIDE, MOST_FRAMES = 32, 256, 120
FRAMES_A_SECOND = 12
MEMORY = 1 << 26  # bytes of activations: less than a second of work between two looks at whether it shall stop
WORKER = Worker("fly-through")


@lru_cache(maxsize=1)
def load() -> "tuple[Renderer, Cameras]":
    """The shipped field, and the cameras it was trained with."""
    from generation.radiance_field.shipped_fields import load_field

    return load_field(MODEL)


def look(turn: int, height: int, distance: float, side: int) -> Iterator[tuple]:
    """Handler: what a camera sees."""
    yield from WORKER.follow(partial(seen, turn, height, distance, side), results=3)


def fly(path: str, frames: int, side: int) -> Iterator[tuple]:
    """Handler: a video along a path; while it is made, each picture of it."""
    with TemporaryDirectory() as folder:
        yield from WORKER.follow(partial(flown, path, frames, side, Path(folder) / "flight.webm"), results=4)


def seen(turn: int, height: int, distance: float, side: int, work: Work) -> tuple[str, tuple[np.ndarray, ...]]:
    """What a camera sees that looks at the middle of the city's ground.

    Args:
        turn: degrees around the city.
        height: degrees above the ground.
        distance: in mean distances of the training cameras.
        side: of the picture, in pixels.

    Returns:
        Words; colours, depths and experts, uint8 `[side, side, 3]`.
    """
    work.loaded(load)
    work.report("Drawing")
    pictures = frame(orbit_camera(turn, height, distance, side), 0, work)
    return f"{side} x {side} pixels,", tuple(pictures[name] for name in NAMES)


def flown(path: str, frames: int, side: int, file: Path, work: Work) -> tuple[str, tuple]:
    """Write a video of colours, depths and experts beside each other.

    Args:
        path: one of `PATHS`.
        frames: of the video.
        side: of each of its pictures, in pixels.
        file: ends in .webm.

    Returns:
        Words; the last pictures, and the file.
    """
    renderer, cameras = work.loaded(load)
    from generation.radiance_field.camera_paths import camera_path

    way = camera_path(path, frames, cameras, renderer.box, side, side)
    drawn = []
    for index in range(frames):
        work.report(
            f"Drawing, frame {index + 1} of {frames}", index / frames, (*drawn[-1], gr.skip()) if drawn else None
        )
        pictures = frame(way, index, work)
        drawn.append([pictures[name] for name in NAMES])
    write_webm(file, [np.concatenate(pictures, axis=1) for pictures in drawn], FRAMES_A_SECOND)
    return f"{frames} frames of {side} x {side} pixels,", (*drawn[-1], str(file))


def frame(cameras: "Cameras", index: int, work: Work) -> dict[str, np.ndarray]:
    """Pictures of one of the cameras."""
    import torch

    from generation.radiance_field.render import frames_of

    renderer, _ = load()
    with torch.inference_mode(), work.stops(renderer.field):
        return frames_of(renderer, cameras, index, MEMORY)


def orbit_camera(turn: float, height: float, distance: float, side: int) -> "Cameras":
    """A camera that looks at the middle of the ground; arguments as of `seen`."""
    import torch

    from generation.radiance_field.camera_paths import look_at
    from generation.radiance_field.cameras import Cameras

    renderer, taken = load()
    box = renderer.box.double()
    middle = torch.stack([*(box[0] + box[1])[:2] / 2, box[0, 2]])
    reach = distance * (taken.c2w[:, :, 3].double() - middle).norm(dim=1).mean()
    around, up = math.radians(turn), math.radians(height)
    direction = (math.cos(up) * math.cos(around), math.cos(up) * math.sin(around), math.sin(up))
    c2w = look_at((middle + reach * torch.tensor(direction, dtype=torch.float64))[None], middle)
    focal = (taken.intrinsics[0, :2] * side / taken.width[0]).tolist()
    intrinsics = torch.tensor([[*focal, side / 2, side / 2]], dtype=taken.intrinsics.dtype)
    size = torch.tensor([side])
    return Cameras(c2w.to(taken.c2w.dtype), intrinsics, size, size)


def write_webm(file: Path, pictures: list[np.ndarray], rate: int) -> None:
    """A video of pictures, uint8 `[H, W, 3]`, in VP8: of what OpenCV's wheels can write, browsers play that.

    Raises:
        OSError: OpenCV cannot write it.
    """
    import cv2

    height, width = pictures[0].shape[:2]
    video = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"VP80"), rate, (width, height))
    if not video.isOpened():
        raise OSError(f"OpenCV cannot write {file}")
    for picture in pictures:
        video.write(np.ascontiguousarray(picture[..., ::-1]))
    video.release()


def build() -> None:
    """Add the demo to the page that is being built."""
    gr.Markdown(INTRODUCTION)
    with gr.Row():
        with gr.Column():
            turn = fields.slider("Turn, degrees", 0, 360, 40)
            height = fields.slider("Height, degrees above the ground", 5, 85, 35)
            distance = fields.slider("Distance, of the training cameras'", 0.3, 1.5, 0.9, step=0.05)
            side = fields.slider("Size, pixels", LEAST_SIDE, MOST_SIDE, 128, step=2)
        with gr.Column():
            path = fields.choice("Path of the video", PATHS)
            frames = fields.slider("Frames of the video", 1, MOST_FRAMES, 16)
            video_side = fields.slider("Size of the video's pictures", LEAST_SIDE, MOST_SIDE, 96, step=2)
    with gr.Row():
        go = gr.Button("Look", variant="primary", min_width=90)
        go_flying = gr.Button("Fly", variant="primary", min_width=90)
        stop = gr.Button("Cancel", variant="stop", min_width=90)
    status = gr.HTML("", padding=False, label="Status")
    with gr.Row():
        options = {"format": "png", "height": 300, "min_width": 200, "buttons": ["download"]}
        shown = [
            gr.Image(label=words, elem_classes="pixels", **options) for words in ("Colour", "Depth", "Which expert")
        ]
    video = gr.Video(
        label="Flight: colour, depth, which expert", autoplay=True, loop=True, height=320, buttons=["download"]
    )
    events = [
        run_on_click(go, look, [turn, height, distance, side], [status, *shown], "fly-through", "look"),
        run_on_click(go_flying, fly, [path, frames, video_side], [status, *shown, video], "fly-through", "fly"),
    ]
    cancel_on_click(stop, status, events, "fly-through")


if __name__ == "__main__":
    serve("fly_through", lambda: page(TITLE, "", {TITLE: build}))
