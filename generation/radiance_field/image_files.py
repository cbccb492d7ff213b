"""Pictures, masks and depths of a scene in files: found and measured at once, read when asked for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from generation.radiance_field.cameras import Cameras

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0)}
MILLIMETRES = 1e-3


@dataclass(frozen=True)
class ImageFiles:
    """Pictures: the i-th is uint8 `[H, W, 3]`, or `[H, W, 4]` with alpha, read when asked for.

    Attributes:
        paths: the files.
        width, height: `[N]`, to which the pictures are scaled down (Lanczos) if they are larger.
        alpha: keep alpha, rather than composite on `background`.
        background: a name in `COLOURS`.
    """

    paths: Sequence[Path]
    width: Tensor
    height: Tensor
    alpha: bool = False
    background: str = "white"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        with _opened(self.paths[i]) as opened:
            image = opened.convert("RGBA" if self.alpha or _has_alpha(opened) else "RGB")
        size = (int(self.width[i]), int(self.height[i]))
        if image.size != size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        if image.mode == "RGBA" and not self.alpha:
            behind = Image.new("RGBA", image.size, (*COLOURS[self.background], 255))
            image = Image.alpha_composite(behind, image).convert("RGB")
        return torch.from_numpy(np.array(image))


@dataclass(frozen=True)
class MaskFiles:
    """Masks: the i-th is bool `[H, W]`, True where a pixel counts.

    Attributes:
        paths: files of grey pictures, black where pixels do not count; None where all do.
        width, height: `[N]`, to which the masks are scaled (nearest).
        halves: of each frame, "left" or "right" if only that half counts, else "".
    """

    paths: Sequence[Path | None]
    width: Tensor
    height: Tensor
    halves: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        width, height = int(self.width[i]), int(self.height[i])
        mask = torch.ones(height, width, dtype=torch.bool)
        if self.paths[i] is not None:
            with _opened(self.paths[i]) as opened:
                grey = opened.convert("L").resize((width, height), Image.Resampling.NEAREST)
            mask = torch.from_numpy(np.array(grey)) > 0
        if self.halves[i] == "left":
            mask[:, width // 2 :] = False
        elif self.halves[i] == "right":
            mask[:, : width // 2] = False
        return mask


@dataclass(frozen=True)
class DepthFiles:
    """Depths: the i-th is float32 `[H, W]`, the distance along the ray, NaN where it is not known.

    Attributes:
        paths: of 16-bit pictures or .npy; the depth is along the view, 0 where it is not known. None: no depth of this
            frame is known.
        cameras: of the frames.
        scale: by which the scene is larger than the source.
        unit: of the depths in the files, in the source's units.
    """

    paths: Sequence[Path | None]
    cameras: Cameras
    scale: float = 1.0
    unit: float = MILLIMETRES

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        width, height = int(self.cameras.width[i]), int(self.cameras.height[i])
        path = self.paths[i]
        if path is None:
            return torch.full((height, width), torch.nan)
        if path.suffix == ".npy":
            try:
                units = np.load(path, allow_pickle=False).astype(np.float32)
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"depth {str(path)!r} cannot be read: {error}") from error
        else:
            with _opened(path) as opened:
                units = np.asarray(opened).astype(np.float32)
        if units.ndim != 2:
            raise ValueError(f"depth {str(path)!r} has shape {units.shape}; it must be (height, width)")
        resized = Image.fromarray(units).resize((width, height), Image.Resampling.NEAREST)
        return along_rays(torch.from_numpy(np.array(resized)), self.cameras, i) * (self.unit * self.scale)


def along_rays(depth: Tensor, cameras: Cameras, index: int) -> Tensor:
    """Distances along the rays of depths `[H, W]` along the view; NaN where the depth is not a number above 0."""
    backward = cameras.c2w[index, :, 2]
    distance = depth / -(cameras.image_rays(index)[1] @ backward)
    return distance.where(depth.isfinite() & (depth > 0), torch.nan).float()


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A decoded picture; whatever goes wrong with it, until it is closed, is a `ValueError` that names the file."""
    try:
        with Image.open(path) as image:
            image.load()
            yield image
    except UNREADABLE as error:
        raise ValueError(f"image {str(path)!r} cannot be read: {error}") from error


@dataclass(frozen=True)
class Measured:
    """Sizes of pictures, `[N]` int64 each, and whether any has alpha."""

    width: Tensor
    height: Tensor
    has_alpha: bool


def measure(paths: Sequence[Path]) -> Measured:
    """Look at the head of every file.

    Raises:
        ValueError: files are missing, or one is no picture; they are named.
    """
    check_exist("image", paths)
    sizes, has_alpha = [], False
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes.append(image.size)
                has_alpha |= _has_alpha(image)
        except UNREADABLE as error:
            raise ValueError(f"image {str(path)!r} cannot be read: {error}") from error
    width, height = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2).unbind(-1)
    return Measured(width, height, has_alpha)


def check_exist(what: str, paths: Sequence[Path | None]) -> None:
    """Raise a `ValueError` that names the files that are missing, the first five of them."""
    missing = [str(path) for path in paths if path is not None and not path.is_file()]
    if missing:
        shown = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{len(missing)} of {len(paths)} {what} files are missing: {shown}")


def check_sizes(paths: Sequence[Path], measured: Measured, width: Tensor, height: Tensor) -> None:
    """Raise a `ValueError` that names the first picture whose size is not the one, `[N]` each, that its camera has."""
    for i, path in enumerate(paths):
        found, expected = (measured.width[i], measured.height[i]), (width[i], height[i])
        if found != expected:
            raise ValueError(
                f"image {str(path)!r} is {int(found[0])} x {int(found[1])} pixels; "
                f"its camera says {int(expected[0])} x {int(expected[1])}"
            )


def read_all(files: ImageFiles | MaskFiles | DepthFiles, cameras: Cameras, names: Sequence[str]) -> Tensor:
    """All of them in memory, `[N, H, W, ...]`.

    Raises:
        ValueError: a file cannot be read, or the sizes of frames differ.
    """
    for i in range(1, len(cameras)):
        first, other = ((int(cameras.width[j]), int(cameras.height[j])) for j in (0, i))
        if first != other:
            raise ValueError(
                f"frame {names[0]!r} is {first[0]} x {first[1]} pixels and frame {names[i]!r} {other[0]} x {other[1]}; "
                "pictures in memory must have one size: load the scene with lazy=True"
            )
    return torch.stack([files[i] for i in range(len(files))])
