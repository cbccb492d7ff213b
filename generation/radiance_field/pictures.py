"""Pictures of what a renderer draws: colours, depths, and which expert owns which pixel."""

import colorsys

import numpy as np
from matplotlib import colormaps
from torch import Tensor

from generation.radiance_field.renderer import Drawn

GOLDEN = 0.6180339887  # of the hues' circle, between one expert and the next


def expert_palette(count: int) -> np.ndarray:
    """float `[count, 3]` in [0, 1], colours that differ in hue."""
    return np.array([colorsys.hsv_to_rgb((0.58 + GOLDEN * e) % 1, 0.75, 0.95) for e in range(count)]).reshape(-1, 3)


def colour_picture(drawn: Drawn) -> np.ndarray:
    """uint8 `[H, W, 3]`"""
    return to_bytes(drawn.colour.cpu().numpy())


def depth_picture(drawn: Drawn, near: float, far: float) -> np.ndarray:
    """uint8 `[H, W, 3]`: near is bright, far dark, and white where most of the light passes by."""
    depth, opacity = drawn.depth.cpu().numpy(), drawn.opacity.cpu().numpy()[..., None].round()
    part = np.clip((np.where(np.isfinite(depth), depth, far) - near) / max(far - near, 1e-9), 0, 1)
    return to_bytes(colormaps["magma"](1 - part)[..., :3] * opacity + (1 - opacity))


def expert_picture(drawn: Drawn) -> np.ndarray | None:
    """uint8 `[H, W, 3]`: a pixel has the colours of its experts by their shares, shaded as the picture is; None of a
    field without experts."""
    if drawn.experts is None:
        return None
    shares = drawn.experts.cpu().numpy()
    mixed = shares @ expert_palette(shares.shape[-1]) + (1 - drawn.opacity.cpu().numpy()[..., None])
    lightness = drawn.colour.mean(-1, keepdim=True).cpu().numpy()
    return to_bytes(mixed * (0.35 + 0.65 * lightness))


def to_bytes(values: np.ndarray | Tensor) -> np.ndarray:
    return (np.clip(np.asarray(values), 0, 1) * 255).round().astype(np.uint8)
