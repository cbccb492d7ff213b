"""Random distortion of whole batches of small images held in memory.

Per-image PIL work would cost more than training on such images, so a batch is distorted at once by one `grid_sample`.
What happens to an image depends on the seed, the epoch and its index only, never on the batch or the process it falls
in: `draw` makes one row of numbers per image of the set, `apply` reads the rows of a batch.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_CONTROL_POINTS = 5  # a side of the grid that carries the elastic displacements
_SCALARS = 16


@dataclass
class RandomDistortion:
    """Ranges of the distortion; every draw is uniform in plus or minus the range unless said otherwise.

    Args:
        rotation: degrees.
        scale: log2 of the magnification of each side, so that 0.2 means from 0.87 to 1.15.
        stretch: log2 of the ratio of width to height.
        shear: degrees.
        shift: in fractions of the side.
        elastic: standard deviation of the displacement of a 5 x 5 mesh, in fractions of the side; normal draws
            (elastic distortion after Simard et al., 2003, with a mesh in place of smoothed noise).
        flip: mirror half of the images left to right.
        brightness: in fractions of the full range.
        contrast: log2 of the factor about the mid-grey.
        colour: log2 of the factor of each channel.
        erase: largest side of the erased rectangle in fractions of the side; half of the images are erased.
    """

    rotation: float = 0.0
    scale: float = 0.0
    stretch: float = 0.0
    shear: float = 0.0
    shift: float = 0.0
    elastic: float = 0.0
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    colour: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; a range is a number >= 0")
        for name, value, limit in (("shear", self.shear, 80), ("erase", self.erase, 1)):
            if value > limit:
                raise ValueError(f"{name} is {value}; the largest range is {limit}")

    def draw(self, images: int, seed: int, epoch: int) -> Tensor:
        """The epoch's numbers for each of the set's images, (images, numbers), the same for the same arguments."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        uniform = torch.rand(images, _SCALARS, generator=generator) * 2 - 1
        mesh = torch.randn(images, 2 * _CONTROL_POINTS**2, generator=generator)
        return torch.cat([uniform, mesh], dim=1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Distort float `images` (B, C, H, W) in [0, 1] by their rows of `draw`; same shape and range.

        What lies outside the picture continues its border.
        """
        uniform, mesh = draws[:, :_SCALARS], draws[:, _SCALARS:]
        grid = F.affine_grid(self._matrices(uniform), list(images.shape), align_corners=False)
        if self.elastic:
            mesh = mesh.view(-1, 2, _CONTROL_POINTS, _CONTROL_POINTS) * (2 * self.elastic)
            displacement = F.interpolate(mesh, images.shape[-2:], mode="bicubic", align_corners=True)
            grid = grid + displacement.permute(0, 2, 3, 1)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        images = self._recolour(images, uniform)
        return self._erase(images, uniform) if self.erase else images

    def _matrices(self, uniform: Tensor) -> Tensor:
        """Output to input coordinates, (B, 2, 3): rotation x shear x scale, then the shift."""
        angle, shear = torch.deg2rad(uniform[:, 0] * self.rotation), torch.deg2rad(uniform[:, 1] * self.shear).tan()
        scale, stretch = uniform[:, 2] * self.scale, uniform[:, 3] * self.stretch / 2
        width, height = torch.exp2(-scale - stretch), torch.exp2(-scale + stretch)
        if self.flip:
            width = torch.where(uniform[:, 6] < 0, -width, width)
        cosine, sine = angle.cos(), angle.sin()
        across = torch.stack([cosine * width, (cosine * shear - sine) * height, uniform[:, 4] * self.shift * 2], dim=1)
        down = torch.stack([sine * width, (sine * shear + cosine) * height, uniform[:, 5] * self.shift * 2], dim=1)
        return torch.stack([across, down], dim=1)

    def _recolour(self, images: Tensor, uniform: Tensor) -> Tensor:
        if not (self.brightness or self.contrast or self.colour):
            return images
        factor = torch.exp2(uniform[:, 7, None] * self.contrast + uniform[:, 9:12] * self.colour)  # (B, 3)
        factor = factor[:, : images.shape[1], None, None]
        offset = uniform[:, 8, None, None, None] * self.brightness
        return ((images - 0.5) * factor + 0.5 + offset).clamp(0, 1)

    def _erase(self, images: Tensor, uniform: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        top, left, side, chosen = (uniform[:, i] / 2 + 0.5 for i in range(12, 16))
        rows = torch.arange(height, device=images.device) / height
        columns = torch.arange(width, device=images.device) / width
        side = side * self.erase
        in_rows = (rows >= top[:, None]) & (rows < (top + side)[:, None])
        in_columns = (columns >= left[:, None]) & (columns < (left + side)[:, None])
        erased = (in_rows[:, :, None] & in_columns[:, None, :]) & (chosen < 0.5)[:, None, None]
        return images.masked_fill(erased[:, None], 0.5)
