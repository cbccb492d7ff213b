"""Drawing into pictures and around them, and showing how a picture came about."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from training_runs.atomic_files import write_atomically


@dataclass(frozen=True)
class Canvas:
    """Pictures into which is drawn.

    Args:
        pictures: `[B, 3, H, W]` in [-1, 1], float32: in bfloat16 they would not come back as they were.
        mask: `[B, 1, H, W]`, 1 where to draw, else 0.
        unknown: `[B, N]` booleans, the tokens of which any pixel is to be drawn; equally many in each picture.
    """

    pictures: Tensor
    mask: Tensor
    unknown: Tensor

    def without_the_hidden(self) -> Tensor:
        """The pictures, `[B, 3, H, W]`, with the nearest visible pixel in the place of each that is to be drawn.

        An autoencoder looks around: what is about to vanish must not colour the tokens beside it.
        """
        filled = self.pictures.clone()
        for picture, mask in zip(filled, self.mask[:, 0].expand(len(filled), -1, -1), strict=True):
            hidden = mask > 0.5
            if hidden.all():
                picture.zero_()
                continue
            options = {"distanceType": cv2.DIST_L2, "maskSize": 5, "labelType": cv2.DIST_LABEL_PIXEL}
            _, labels = cv2.distanceTransformWithLabels(hidden.to(torch.uint8).numpy(), **options)
            labels = torch.from_numpy(labels).long()
            visible = torch.zeros(3, int(labels.max()) + 1)
            visible[:, labels[~hidden]] = picture[:, ~hidden]
            picture[:, hidden] = visible[:, labels[hidden]]
        return filled

    def keep(self, drawn: Tensor) -> Tensor:
        """`drawn` where the mask says so, elsewhere the picture."""
        mask, pictures = self.mask.to(drawn.device), self.pictures.to(drawn.device)
        return torch.where(mask > 0.5, drawn.float(), pictures)


def _read(name: str, image: Any, processor: VaeImageProcessor) -> Tensor:
    several = isinstance(image, list | tuple)
    given = list(image) if several else [image]
    kinds = (Image.Image, np.ndarray, Tensor)
    if not given or not any(all(isinstance(one, kind) for one in given) for kind in kinds):
        raise ValueError(
            f"{name} is {reprlib.repr(image)}; it must be a PIL image, an array or a tensor, or a list of one of these "
            f"kinds (PIL.Image.open reads a file)"
        )
    try:
        return processor.preprocess(given if several else image)
    except (ValueError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name} cannot be read as pictures of one size: {error}") from error


def read_painting(image: Any, mask_image: Any) -> tuple[Tensor, Tensor] | None:
    """Read what a user gives as picture and mask: PIL images, arrays or tensors in [0, 1], or lists of them.

    Args:
        image: one or several; None, with `mask_image` None too, for none.
        mask_image: accordingly.

    Returns:
        Pictures `[b, 3, H, W]` in [-1, 1] and masks `[b', 1, H', W']` of zeros and ones.

    Raises:
        ValueError: one is missing, of another kind, or out of range.
    """
    if (image is None) != (mask_image is None):
        missing = "image" if image is None else "mask_image"
        raise ValueError(f"{missing} is None; image and mask_image belong together")
    if image is None:
        return None
    pictures = _read("image", image, VaeImageProcessor(do_resize=False, do_convert_rgb=True))
    if getattr(mask_image, "ndim", None) == 2:
        mask_image = mask_image[None]
    options = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}
    masks = _read("mask_image", mask_image, VaeImageProcessor(do_resize=False, **options)).float()
    if pictures.shape[1] != 3 or not pictures.abs().max() <= 1:
        raise ValueError(
            f"image has shape {tuple(pictures.shape)} and values up to {pictures.max().item():.3g}; it must have 3 "
            f"channels, and arrays and tensors hold numbers from 0 to 1"
        )
    if not masks.isfinite().all():
        raise ValueError("mask_image holds numbers that are not finite; it must be white, 1, where to draw, and else 0")
    return pictures.float(), masks[:, :1]


def prepare_canvas(pictures: Tensor, masks: Tensor, count: int, size: tuple[int, int], stride: int) -> Canvas:
    """The canvas of what `read_painting` read.

    Args:
        pictures: one, or one for each of `count`.
        masks: accordingly.
        count: how many pictures are drawn.
        size: their height and width.
        stride: pixels along the side of a token.

    Raises:
        ValueError: their number or size is another, or the masks ask for none or different numbers of tokens.
    """
    for name, tensor in (("image", pictures), ("mask_image", masks)):
        if tensor.shape[0] not in (1, count) or tuple(tensor.shape[2:]) != tuple(size):
            raise ValueError(
                f"{name} has {tensor.shape[0]} pictures of {tensor.shape[2]} x {tensor.shape[3]} pixels (height x "
                f"width); needed is one, or one for each of {count}, of {size[0]} x {size[1]}"
            )
    unknown = F.max_pool2d(masks, stride).flatten(1) > 0.5
    counts = unknown.sum(1)
    if black := int((counts == 0).sum()):
        raise ValueError(f"mask_image is black in {black} of {len(counts)} masks; white says where to draw")
    if counts.min() != counts.max():
        raise ValueError(f"mask_image asks for {counts.tolist()} tokens of its pictures; the numbers must be equal")
    return Canvas(*(x.expand(count, *x.shape[1:]) for x in (pictures, masks, unknown)))


def outpainting_canvas(
    image: Image.Image, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """`image` and `mask_image` for drawing what lies around a picture.

    Args:
        image: the picture.
        left: pixels to draw at its left; `top`, `right` and `bottom` accordingly.

    Raises:
        ValueError: a margin is negative, or all are zero.
    """
    margins = {"left": left, "top": top, "right": right, "bottom": bottom}
    if min(margins.values()) < 0 or not any(margins.values()):
        raise ValueError(f"margins are {margins}; none may be negative and one must be above 0")
    size = (image.width + left + right, image.height + top + bottom)
    canvas, mask = Image.new("RGB", size, (128, 128, 128)), Image.new("L", size, 255)
    canvas.paste(image.convert("RGB"), (left, top))
    mask.paste(0, (left, top, left + image.width, top + image.height))
    return canvas, mask


def save_animation(steps: Sequence[Image.Image], path: str | Path, seconds: float = 3.0, magnify: int = 1) -> None:
    """Write the pictures after each step as an animated GIF or WebP that pauses at its end, whole or not at all.

    Args:
        steps: of one image, `LinaPipelineOutput.steps[i]`.
        path: ends in .gif or .webp.
        seconds: that the steps take together.
        magnify: whole factor on their size.

    Raises:
        ValueError: there are no steps or the name ends in something else.
    """
    path = Path(path)
    if not steps or path.suffix.lower() not in (".gif", ".webp"):
        raise ValueError(f"path is {str(path)!r} and there are {len(steps)} steps; needed are .gif or .webp, and steps")
    frames = [step.resize((step.width * magnify, step.height * magnify), Image.Resampling.NEAREST) for step in steps]
    duration = [max(20, round(1000 * seconds / len(frames)))] * len(frames)
    duration[-1] += 1500
    options = {"save_all": True, "append_images": frames[1:], "duration": duration, "loop": 0}
    write_atomically(path, lambda partial: frames[0].save(partial, **options))
