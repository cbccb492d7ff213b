"""Answers a question about an image, looking closer at a part of it where that is needed (Q-Zoom).

    python -m multimodal answer scene:7 "What is the code at red?" --show out.png
    python -m multimodal answer photo.jpg "What does the sign say?" --model Qwen/Qwen2.5-VL-3B-Instruct --heads HEADS

prints the answer, how sure the gate was, where it looked and how many visual tokens that took. Without --model the
shipped tiny model answers: it knows drawn scenes only, `scene:SEED` being one, and asks of them: the code at a colour,
what shape a colour is, where it is, and what the background is."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from multimodal.q_zoom import QZoom, ZoomInfo

SCENE = "scene"
GATES = ("auto", "always", "never", "separability")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m multimodal answer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("image", help="an image file, or scene:SEED for a drawn scene")
    add("question")
    add("--model", help="folder or name of a model of transformers (default: the shipped tiny reader)")
    add("--heads", help="folder of trained branches (default: those in the model's own checkpoint)")
    add("--gate", choices=GATES, default="auto", help="when to look closer (default: %(default)s)")
    add("--box", type=float, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help="where to look, in pixels")
    add("--gate-threshold", type=float, help="of the gate, 0 to 1 (default: the model's)")
    add("--region-threshold", type=float, help="of the region proposal, 0 to 1 (default: the model's)")
    add("--max-new-tokens", type=int, default=64, help="of the answer (default: %(default)s)")
    add("--show", type=Path, help="also draw the heat map and the box into this .png picture")
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {options.max_new_tokens}; it must be at least 1")
    if options.show is not None and options.show.suffix.lower() != ".png":
        parser.error(f"--show is {options.show}; it must end in .png")
    if options.show is not None and (options.show.is_dir() or not os.access(options.show.resolve().parent, os.W_OK)):
        parser.error(f"--show is {options.show}; no file can be written there")
    if options.heads is not None and options.model is None:
        parser.error("--heads is given without --model; the shipped model has its own")
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    picture = image_of(options.image)
    zoom = load(options.model, options.heads, options.device)
    inputs = zoom.ask(picture, options.question)
    sequences, (info,) = zoom.generate(
        inputs,
        picture,
        gate=options.gate,
        box=options.box,
        gate_threshold=options.gate_threshold,
        region_threshold=options.region_threshold,
        return_zoom_info=True,
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
    )
    answer = zoom.processor.tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"answer         {answer.strip()}")
    for line in report(info, picture.size, separability=options.gate == "separability"):
        print(line)
    if options.show is not None:
        from multimodal.q_zoom.pictures import show

        if info.heat_map is None:
            info = with_heat_map(zoom, info, picture, options.question)
        try:
            show(picture, info, options.show, f"{options.question}  {answer.strip()}")
        except OSError as error:
            raise ValueError(f"--show is {options.show}; it cannot be written: {error}") from error
        print(f"picture        {options.show}")


def image_of(name: str) -> "Image":
    """A drawn scene, or the image of a file."""
    if name != SCENE and not name.startswith(f"{SCENE}:"):
        from multimodal.q_zoom.images import opened

        return opened(name, "image")
    from multimodal.tiny_reader.scenes import draw_scene

    seed = name.partition(":")[2] or "0"
    if not seed.isdecimal():
        raise ValueError(f"image is {name!r}; a drawn scene is scene:SEED with a whole number of at least 0")
    return draw_scene(int(seed)).picture()


def load(model: str | None, heads: str | None, device: str | None) -> "QZoom":
    """The Q-Zoom asked for, on the device asked for."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from multimodal.q_zoom import QZoom
    from multimodal.tiny_reader.shipped import load_reader

    disable_progress_bar()
    zoom = load_reader() if model is None else QZoom.from_pretrained(model, heads, dtype="auto")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return zoom.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device is {device!r}, which cannot be used: {error}") from error


def report(info: "ZoomInfo", size: tuple[int, int], *, separability: bool = False) -> list[str]:
    """What was done, in lines; with `separability` the gate was that of the answer itself."""
    gate = "not asked" if info.gate_probability is None else f"{info.gate_probability:.3f}"
    if info.gate_probability is not None and separability:
        gate = f"the answer's tokens stand out by {gate} (looks closer below the threshold)"
    boxes = [f"left {left}, top {top}, right {right}, bottom {bottom}" for left, top, right, bottom in info.boxes]
    tokens = f"{info.visual_tokens} ({info.source_tokens} of the whole image, {info.region_tokens} of the closer look)"
    share = f"{info.full_tokens} at full resolution, {info.full_tokens / info.visual_tokens:.1f} times as many"
    return [
        f"gate           {gate}{', looked closer' if info.opened else f', {info.note}' if info.note else ''}",
        f"box            {'; '.join(boxes) or 'none'} (image: {size[0]} x {size[1]} pixels)",
        f"visual tokens  {tokens}",
        f"               {share}",
    ]


def with_heat_map(zoom: "QZoom", info: "ZoomInfo", picture: "Image", question: str) -> "ZoomInfo":
    """`info` with the map that the region proposal would have looked at."""
    import dataclasses

    return dataclasses.replace(info, heat_map=zoom.propose(picture, question).heat_map)
