"""From images to tokens with positions: ViG's convolutional patch embedding, and position embeddings for any grid."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from timm.models import checkpoint, register_notrace_function
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.recomputation import can_recompute
from vision.gated_linear_attention import RECOMPUTE_FROM, ChannelsLastConv2d


@torch.fx.wrap
@register_notrace_function
def check_images(images: Tensor, in_chans: int, smallest: int) -> Tensor:
    """Return `images`, or raise `ValueError` unless they are (B, in_chans, H, W) with H and W >= `smallest`."""
    if images.dim() != 4 or images.shape[1] != in_chans:
        raise ValueError(f"images have shape {tuple(images.shape)}; the model takes (batch, {in_chans}, height, width)")
    if images.shape[2] < smallest or images.shape[3] < smallest:
        raise ValueError(f"images are {images.shape[2]}x{images.shape[3]}; the smallest side possible is {smallest}")
    return images


class PatchEmbed(nn.Module):
    """Two overlapping strided convolutions: (B, in_chans, H, W) -> (B, H', W', C), a side of L to ceil(a / 2) with
    a = floor((L + 1 - patch / 2) / (patch / 2)) + 1; that is L / patch where the patch size divides L."""

    def __init__(self, patch_size: int, in_chans: int, dim: int, *, device=None, dtype=None):
        if patch_size < 4 or patch_size % 2:
            raise ValueError(f"patch_size is {patch_size}; it must be an even number of at least 4")
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.stride = patch_size // 2
        self.in_chans = in_chans
        self.proj = nn.Sequential(
            ChannelsLastConv2d(in_chans, dim // 2, self.stride + 1, stride=self.stride, padding=1, **dd),
            nn.LayerNorm(dim // 2, **dd),
            nn.SiLU(),
            ChannelsLastConv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
            nn.LayerNorm(dim, **dd),
        )

    def grid_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in tokens of images of this height and width."""
        height, width = (((side + 1 - self.stride) // self.stride + 2) // 2 for side in image_size)
        return height, width

    def forward(self, images: Tensor) -> Tensor:
        images = check_images(images, self.in_chans, self.stride - 1)
        if can_recompute():
            height, width = self.grid_size(images.shape[2:])
            if height * width >= RECOMPUTE_FROM:
                return checkpoint(self._embed, images, preserve_rng_state=False)
        return self._embed(images)

    def _embed(self, images: Tensor) -> Tensor:
        return self.proj(images.permute(0, 2, 3, 1).contiguous())


def resize_position_embedding(position: Tensor, source_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Resample position embeddings to another grid, bicubic in float32 without antialiasing, as the authors do.

    Args:
        position: (1, source height * source width, C).
        source_grid: height and width of the grid it is for.
        grid: height and width wanted.

    Returns:
        (1, height * width, C) in the dtype of `position`.
    """
    as_map = position.reshape(1, *source_grid, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(as_map.float(), size=grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(position.dtype)


# Resampled position embeddings by parameter: the copy they were made from, and one (1, N, C) tensor a grid.
_resized_positions = WeakTensorKeyDictionary()
_GRIDS_KEPT = 16


@register_notrace_function
def position_for_grid(position: Tensor, native_grid: tuple[int, int], height: int, width: int) -> Tensor:
    """Return `position` (1, N, C) as (1, height, width, C), resampled if the grid is not the native one.

    On CPU, where no gradient is wanted, the result is kept and reused as long as the values of `position` stay what
    they were, which is compared (a few microseconds) because writes through `.data` leave no other trace. On a GPU a
    comparison would wait for the device and the resampling is one small kernel, so it is done each time.
    """
    if (height, width) == native_grid:
        return position.unflatten(1, native_grid)
    wants_gradient = torch.is_grad_enabled() and position.requires_grad
    plain = type(position) in (Tensor, nn.Parameter) and position.device.type == "cpu"
    if wants_gradient or torch.compiler.is_compiling() or not plain:
        return resize_position_embedding(position, native_grid, (height, width)).unflatten(1, (height, width))
    kept = _resized_positions.get(position)
    with torch.inference_mode(False), torch.no_grad():
        if kept is None or kept[0].dtype != position.dtype or not torch.equal(kept[0], position):
            kept = _resized_positions[position] = (position.detach().clone(), OrderedDict())
        source, by_grid = kept
        resized = by_grid.get((height, width))
        if resized is None:
            resized = resize_position_embedding(source, native_grid, (height, width)).unflatten(1, (height, width))
            if len(by_grid) >= _GRIDS_KEPT:
                by_grid.popitem(last=False)
            by_grid[height, width] = resized
    return resized
