"""Image files: deliberate decoding, and the refusal of bad ones.

A file that is unreadable, cut short, not an image or a decompression bomb raises `ImageFileError` with its path; it is
never replaced by another sample. `check_images` names and counts all of them before training starts.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageOps
from tqdm import tqdm

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MAXIMUM_PIXELS = 89_478_485  # a quarter of a gigabyte as RGB: Pillow's own limit, which by itself only warns
BAD_FILE_BUDGET = 0.01
_FILES_QUEUED = 4096


Result = TypeVar("Result")


class ImageFileError(ValueError):
    """A file that cannot be used as an image; the message begins with its path."""


def open_image(path: str | os.PathLike, mode: Literal["RGB", "L"] = "RGB") -> Image.Image:
    """Decode one image file to 8-bit RGB or grey.

    The EXIF rotation is applied; 16-bit grey is scaled by its full range; transparent pixels lie on white; palettes,
    CMYK and bilevel images are converted; of an animation the first frame is taken.

    Raises:
        ImageFileError: not an image, cut short, of more than `MAXIMUM_PIXELS` pixels (refused from the header, before
            decoding), or of a number format without a known range.
    """
    return _read(path, lambda image: _to_8_bit(ImageOps.exif_transpose(image)).convert(mode))


def check_header(path: str | os.PathLike) -> None:
    """Raise `ImageFileError` unless the file starts as an image of allowed size (a later cut goes unseen)."""
    _read(path, Image.Image.verify)


def _read(path: str | os.PathLike, use: Callable[[Image.Image], Result]) -> Result:
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAXIMUM_PIXELS:
                raise ImageFileError(
                    f"{path}: {image.width} x {image.height} pixels; at most {MAXIMUM_PIXELS} are decoded"
                )
            return use(image)
    except ImageFileError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageFileError(f"{path}: {error}") from None
    # Decoders raise whatever their parsers meet in broken data: OSError mostly, SyntaxError for PNG, struct.error...
    except Exception as error:
        raise ImageFileError(f"{path}: {type(error).__name__}: {error}") from error


def _to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey opens as I;16 or, from some formats, as 32-bit I
        levels = np.asarray(image)
        if levels.size and not (levels.min() >= 0 and levels.max() <= 65535):
            raise ValueError(f"32-bit grey levels from {levels.min()} to {levels.max()}; at most 16 bits are known")
        return Image.fromarray((levels.astype(np.uint32) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point grey levels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def find_images(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """The image files among `paths`, folders searched through, in sorted order within each folder.

    A file named explicitly is returned whatever its extension.

    Raises:
        ValueError: a path does not exist, or a folder holds no image.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
            if not inside:
                raise ValueError(f"{path} holds no image ({', '.join(sorted(EXTENSIONS))})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"{path} does not exist")
    return found


def check_images(
    paths: Sequence[Path], check: Literal["decode", "header"] = "decode", progress: bool = True
) -> list[Path]:
    """Return the usable files among `paths`; name the others in a warning.

    Args:
        check: `decode` reads every file whole (about 3 ms for a photo of half a megapixel); `header` sees neither
            truncation nor damage, which then stop the training with the file's name.
        progress: show a progress bar.

    Raises:
        ValueError: more than 1 % of the files are bad; the message lists the first ten.
    """
    if check not in ("decode", "header"):
        raise ValueError(f"check is {check!r}; valid are 'decode' and 'header'")

    def fault_of(path: Path) -> str | None:
        try:
            open_image(path) if check == "decode" else check_header(path)
        except ImageFileError as error:
            return str(error)
        return None

    faults: list[str | None] = []
    bar = tqdm(desc="checking images", total=len(paths), disable=not progress, leave=False)
    with bar, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # Pillow's decoders release the interpreter lock
        for start in range(0, len(paths), _FILES_QUEUED):  # all of ImageNet queued at once would take gigabytes
            for fault in pool.map(fault_of, paths[start : start + _FILES_QUEUED]):
                faults.append(fault)
                bar.update()
    bad = [fault for fault in faults if fault is not None]
    if bad:
        listed = "\n  ".join(bad[:10]) + (f"\n  and {len(bad) - 10} more" if len(bad) > 10 else "")
        summary = f"{len(bad)} of {len(paths)} image files cannot be used:\n  {listed}"
        if len(bad) > BAD_FILE_BUDGET * len(paths):
            raise ValueError(f"{summary}\nMore than {BAD_FILE_BUDGET:.0%} are bad: repair or remove them")
        rank_zero_warn(f"{summary}\nThey are skipped", stacklevel=2)
    return [path for path, fault in zip(paths, faults, strict=True) if fault is None]
