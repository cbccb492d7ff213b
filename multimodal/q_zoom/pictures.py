"""Pictures of where Q-Zoom looked."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from multimodal.q_zoom.model import ZoomInfo

BOX_COLOUR = (255, 60, 60)
LEAST_SIDE, MOST_SIDE = 480, 2000  # pixels of an image when shown


def heat_overlay(picture: Image.Image, heat_map: np.ndarray, strength: float = 0.6) -> Image.Image:
    """`picture` with probabilities `[rows, columns]` laid over it: dark where they are 0, bright at their highest."""
    import cv2

    heat = np.clip(np.asarray(heat_map, dtype=np.float32), 0, 1)
    heat = heat / max(float(heat.max()), np.finfo(np.float32).tiny)
    heat = cv2.resize(heat, picture.size, interpolation=cv2.INTER_LINEAR)
    colours = cv2.applyColorMap((255 * heat).round().astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    mixed = (1 - strength) * np.asarray(picture, dtype=np.float32) + strength * colours
    return Image.fromarray(mixed.round().astype(np.uint8))


def with_boxes(picture: Image.Image, info: ZoomInfo, scale: float) -> Image.Image:
    """`picture`, which is `scale` times the source image, with the boxes that were looked at."""
    drawn = picture.copy()
    pen = ImageDraw.Draw(drawn)
    width = max(2, round(min(drawn.size) / 150))
    for box in info.boxes:
        left, top, right, bottom = (edge * scale for edge in box)
        pen.rectangle((left, top, right - 1, bottom - 1), outline=BOX_COLOUR, width=width)
    return drawn


def zoom_picture(picture: Image.Image, info: ZoomInfo) -> Image.Image:
    """The image with its boxes, beside it the heat map, and what the closer look saw."""
    scale = max(1.0, min(LEAST_SIDE / min(picture.size), MOST_SIDE / max(picture.size)))
    if max(picture.size) > MOST_SIDE:
        scale = MOST_SIDE / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    large = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    parts = [with_boxes(large, info, scale)]
    if info.heat_map is not None:
        parts.append(with_boxes(heat_overlay(large, info.heat_map.float().cpu().numpy()), info, scale))
    for box in info.boxes:
        crop = picture.crop(box)
        fit = min(size[1] / crop.height, MOST_SIDE / crop.width)
        parts.append(
            crop.resize((max(1, round(crop.width * fit)), max(1, round(crop.height * fit))), Image.Resampling.BICUBIC)
        )
    gap = 8
    sheet = Image.new("RGB", (sum(part.width for part in parts) + gap * (len(parts) - 1), size[1]), "white")
    left = 0
    for part in parts:
        sheet.paste(part, (left, 0))
        left += part.width + gap
    return sheet


def show(picture: Image.Image, info: ZoomInfo, path: Path, title: str) -> None:
    """Write what was looked at, under a title, as a picture."""
    sheet = zoom_picture(picture, info)
    whole = Image.new("RGB", (sheet.width, sheet.height + 28), "white")
    whole.paste(sheet, (0, 28))
    ImageDraw.Draw(whole).text((6, 5), title, fill="black", font_size=16)
    whole.save(path)
