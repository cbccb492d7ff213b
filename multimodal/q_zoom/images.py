"""Images as users give them: PIL images or files, checked before anything is computed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from multimodal.q_zoom.regions import LONGEST_STRIP

ImageLike = Image.Image | str | Path

MOST_PIXELS = 100_000_000  # of a file; larger ones are refused unread


def opened(image: ImageLike, name: str = "image") -> Image.Image:
    """`image` in RGB, read if it is a file, turned as its EXIF orientation says.

    Raises:
        ValueError: the file cannot be read as an image, or is larger than 100 megapixels.
    """
    if not isinstance(image, (Image.Image, str, Path)):
        raise ValueError(f"{name} is a {type(image).__name__}; it must be a PIL image or the path of an image file")
    try:
        picture = image if isinstance(image, Image.Image) else Image.open(image)
        if picture.width * picture.height > MOST_PIXELS:
            raise ValueError(
                f"{name} has {picture.width} x {picture.height} pixels; at most {MOST_PIXELS:,} can be worked with"
            )
        picture.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} ({image}) cannot be read as an image: {error}") from error
    return ImageOps.exif_transpose(picture).convert("RGB")


def opened_images(images: Any, rows: int, least_side: int) -> list[Image.Image]:
    """One image for each of `rows` questions.

    Args:
        images: an image, or a sequence of images.
        least_side: sides shorter than this, in pixels, are refused: not one visual token of it would be whole.

    Raises:
        ValueError: their number is not `rows`, or one cannot be used.
    """
    if images is None:
        raise ValueError("images is None; zooming crops the original image, so give it (or gate='never')")
    listed = [images] if isinstance(images, (Image.Image, str, Path)) else images
    if not isinstance(listed, Sequence) or len(listed) != rows:
        count = len(listed) if isinstance(listed, Sequence) else type(listed).__name__
        raise ValueError(f"images holds {count} for {rows} questions; each must have one image")
    pictures = [opened(image, f"images[{row}]") for row, image in enumerate(listed)]
    for row, picture in enumerate(pictures):
        if min(picture.size) < least_side:
            raise ValueError(
                f"images[{row}] has {picture.width} x {picture.height} pixels; both sides must have {least_side}, "
                f"what one visual token covers"
            )
        if max(picture.size) > LONGEST_STRIP * min(picture.size):
            raise ValueError(
                f"images[{row}] has {picture.width} x {picture.height} pixels; "
                f"the longer side may be {LONGEST_STRIP} times the shorter at most"
            )
    return pictures
