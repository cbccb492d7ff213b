"""`python -m generation render`: fly through a radiance field; colours, depths and experts as videos and pictures.

Frames are pictures in `<output without suffix>/`, and the videos are made of them. A frame whose pictures are there,
whole, is not drawn again, so that what was stopped goes on, and several processes (`torchrun`) share the frames.
"""

import argparse
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from generation.finished_runs import differences
from generation.lina.sample import device_of
from generation.radiance_field.camera_paths import camera_path
from generation.radiance_field.cameras import Cameras
from generation.radiance_field.pictures import colour_picture, depth_picture, expert_picture
from generation.radiance_field.renderer import Renderer
from generation.radiance_field.saved_renderer import WEIGHTS, load
from generation.radiance_field.shipped_fields import check_field
from training_runs.atomic_files import write_atomically, write_json

SETTINGS = "settings.json"
PARTIAL = ".partial-"  # what is written atomically is called so before it is whole


def frames_of(renderer: Renderer, cameras: Cameras, index: int, memory: int) -> dict[str, np.ndarray]:
    """uint8 `[H, W, 3]` pictures of a camera: colour, depth, and of a mixture expert."""
    drawn = renderer.draw_image(cameras, index, memory=memory)
    corner = (renderer.box[1] - renderer.box[0]).norm()
    middle = (cameras.c2w[index, :, 3] - renderer.box.mean(0)).norm()
    nearest = max(float(renderer.near), float(middle - corner / 2))
    pictures = {"colour": colour_picture(drawn), "depth": depth_picture(drawn, nearest, float(middle + corner / 2))}
    experts = expert_picture(drawn)
    return pictures if experts is None else pictures | {"expert": experts}


def is_drawn(frame: Mapping[str, Path], size: tuple[int, int]) -> bool:
    """Whether all pictures of a frame are there, whole, and (width, height) large."""
    try:
        for path in frame.values():
            with Image.open(path) as picture:
                picture.load()
                if picture.size != size:
                    return False
    except (OSError, SyntaxError, ValueError):  # the second as Pillow says of some damaged PNG
        return False
    return True


def write_video(path: Path, frames: Sequence[Path], rate: int) -> None:
    """An mp4 of pictures, which are there.

    Raises:
        OSError: OpenCV cannot write it.
    """
    first = cv2.imread(str(frames[0]))

    def write(partial: str) -> None:
        video = cv2.VideoWriter(partial, cv2.VideoWriter.fourcc(*"mp4v"), rate, first.shape[1::-1])
        if not video.isOpened():
            raise OSError(f"OpenCV cannot write {path}")
        for frame in frames:
            video.write(cv2.imread(str(frame)))
        video.release()

    write_atomically(path, write)


def main(options: argparse.Namespace) -> None:
    """Of `commands.render_options`."""
    model, device = check_field(options.model), device_of(options)
    renderer, taken = load(model)
    size = (int(taken.width[0]), int(taken.height[0]))
    width, height = options.size or tuple(max(2, round(side * 2 / max(size) * 160) // 2 * 2) for side in size)
    box = renderer.box
    cameras = camera_path(options.path, options.frames, taken, box, width, height)
    folder = options.output.with_suffix("")
    names = ["colour", "depth", *(["expert"] if renderer.experts else [])]
    videos = {name: options.output.with_stem(f"{options.output.stem}-{name}") for name in names}
    videos["colour"] = options.output
    told = {"model": str(options.model), "path": options.path, "frames": options.frames, "size": [width, height]}
    # A model that is trained anew may be in the same place.
    told |= {"weights": f"{zlib.crc32((model / WEIGHTS).read_bytes()):08x}"}
    prepare_frames(folder, told, list(videos.values()))
    renderer, cameras = renderer.to(device), cameras.to(device)
    frames = [{name: folder / f"{name}-{index:04d}.png" for name in names} for index in range(len(cameras))]
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    memory, mine = options.memory << 20, range(rank, len(cameras), processes)
    for index in tqdm(mine, desc="frames", unit="frame", disable=rank > 0):
        if not is_drawn(frames[index], (width, height)):
            with torch.inference_mode():
                pictures = frames_of(renderer, cameras, index, memory)
            for name, path in frames[index].items():
                write_atomically(path, Image.fromarray(pictures[name]).save)
    missing = sum(not is_drawn(frame, (width, height)) for frame in frames)
    if missing:
        print(f"{missing} frames are with other processes; the last one to end makes the videos")
        return
    for name, video in videos.items():
        write_video(video, [frame[name] for frame in frames], options.rate)
    print(f"written to {', '.join(map(str, videos.values()))}; pictures: {folder}")


def prepare_frames(folder: Path, settings: dict, videos: Sequence[Path] = ()) -> None:
    """See that pictures in a folder, and videos that are to be made of them, are of the same flight.

    Raises:
        ValueError: they are of another.
    """
    theirs = [str(video) for video in videos if video.exists()]
    if theirs and not (folder / SETTINGS).exists():
        whose = f"not of the frames in {str(folder)!r}, where there are none"
        raise ValueError(f"--output: {theirs[0]!r} is there already, {whose}; remove it, or name another output")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    # Another process may be writing the settings: it is looked for other files first, so that they are not its.
    others = any(not entry.name.startswith(PARTIAL) for entry in folder.iterdir())
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"--output: {str(path)!r} is damaged; remove {str(folder)!r}: {error}") from error
        if different := differences(settings, before):
            held = before if isinstance(before, dict) else {}
            which = ", ".join(f"{name} is {held.get(name)!r}, not {settings.get(name)!r}" for name in different)
            words = f"{str(folder)!r} holds frames of another flight, whose {which}"
            raise ValueError(f"--output: {words}; remove it, or name another output")
    elif others:
        raise ValueError(f"--output: {str(folder)!r} is a folder with other files; name another output")
    else:
        write_json(path, settings)
