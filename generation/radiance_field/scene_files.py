"""From what the reader of a format found in a folder to a `Scene`: sizes checked, scaled, set upright, and loaded."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from generation.argument_checks import check_choice, check_real, check_whole
from generation.radiance_field.cameras import Cameras, check_poses, orient_and_scale, similarity_scale
from generation.radiance_field.contraction import check_box
from generation.radiance_field.image_files import (
    COLOURS,
    MILLIMETRES,
    DepthFiles,
    ImageFiles,
    MaskFiles,
    check_exist,
    check_sizes,
    measure,
    read_all,
)
from generation.radiance_field.lens_distortion import distort, undistort
from generation.radiance_field.proposal_sampling import through_box
from generation.radiance_field.scene import Scene

logger = logging.getLogger(__name__)

MOST_MOVED = 3  # times the radius of a corner; wide lenses stay below 2


@dataclass(frozen=True)
class SceneFiles:
    """What the reader of a format found; the attributes mean what those of `Scene` do.

    Attributes:
        cameras: of the pictures as they lie in the files, in the source's world.
        paths: of the N pictures.
        mask_paths, depth_paths: of the frames that have one; see `MaskFiles` and `DepthFiles`.
        halves: of each frame, for `MaskFiles`.
        depth_unit: of the depths in the files, in units of the source's world.
        orient, centre, scale: for `orient_and_scale`; all False leaves the source's world as it is.
        transform: from the source's world to the one of the cameras here, before that.
        near, far: in units of the world that comes of `orient`, `centre` and `scale`.
        box: None is the cube [-1, 1]³ if the world is scaled; else a cube around the cameras, in which lies what they
            see as far as they are apart.
    """

    name: str
    cameras: Cameras
    names: tuple[str, ...]
    paths: Sequence[Path]
    splits: Mapping[str, Tensor]
    near: float
    far: float
    mask_paths: Sequence[Path | None] | None = None
    depth_paths: Sequence[Path | None] | None = None
    depth_unit: float = MILLIMETRES
    halves: Sequence[str] | None = None
    orient: bool = False
    centre: bool = False
    scale: bool = False
    transform: Tensor | None = None
    box: Tensor | None = None
    appearance_ids: Tensor | None = None
    altitude_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError(f"scene {self.name!r} has no frames")


def assemble(
    found: SceneFiles,
    lazy: bool,
    downscale: int,
    alpha: bool,
    background: str | None,
    normalise: bool | None,
    near: float | None,
    box: Sequence[Sequence[float]] | None,
) -> Scene:
    """The scene; arguments as of `load_scene`."""
    behind = "white" if background is None else check_choice("background", background, tuple(COLOURS))
    check_whole("downscale", downscale, 1, 64)
    given_box = None if box is None else check_box(box)
    if near is not None:
        check_real("near", near)
    check_poses(found.cameras.c2w, found.names)  # before any picture is read
    _check_meant(found)
    measured = measure(found.paths)
    check_sizes(found.paths, measured, found.cameras.width, found.cameras.height)
    for what, paths in (("mask", found.mask_paths), ("depth", found.depth_paths)):
        check_exist(what, paths or [])
    cameras = found.cameras
    if downscale > 1:
        cameras = cameras.resized(*((size // downscale).clamp(min=1) for size in (cameras.width, cameras.height)))
    _warn_of_lenses(cameras, found.names)
    transform = torch.eye(3, 4) if found.transform is None else found.transform
    wanted = (found.orient, found.centre, found.scale) if normalise is None else (normalise,) * 3
    factor, distances = 1.0, 1.0
    if any(wanted):
        cameras, applied = orient_and_scale(cameras, *wanted)
        transform = composed(applied, transform)
        factor = similarity_scale(applied)
        distances = 1.0 if found.scale else factor
    images = ImageFiles(found.paths, cameras.width, cameras.height, alpha, behind)
    masks = depths = None
    if found.mask_paths is not None or found.halves is not None:
        nothing = [None] * len(found.paths)
        masks = MaskFiles(
            found.mask_paths or nothing, cameras.width, cameras.height, found.halves or [""] * len(found.paths)
        )
    if found.depth_paths is not None:
        depths = DepthFiles(found.depth_paths, cameras, factor, found.depth_unit)
    if not lazy:
        images = read_all(images, cameras, found.names)
        masks = None if masks is None else read_all(masks, cameras, found.names)
        depths = None if depths is None else read_all(depths, cameras, found.names)
    nearest, farthest = found.near * distances if near is None else near, found.far * distances
    if nearest >= farthest:
        raise ValueError(f"near is {near}; rays of scene {found.name!r} end at {farthest:.4g}, it must be below")
    space = _box(found, cameras, scaled=wanted[2]) if given_box is None else given_box
    _warn_of_box(space, cameras[found.splits["train"]])
    return Scene(
        name=found.name,
        images=images,
        cameras=cameras,
        names=found.names,
        splits=found.splits,
        box=space,
        near=nearest,
        far=farthest,
        background=tuple(value / 255 for value in COLOURS[behind]) if background or measured.has_alpha else None,
        masks=masks,
        depths=depths,
        appearance_ids=found.appearance_ids,
        transform=transform,
        altitude_range=None if any(wanted) else found.altitude_range,
    )


def composed(outer: Tensor, inner: Tensor) -> Tensor:
    """The affine map `[3, 4]` that does `inner` first, then `outer`."""
    return torch.cat([outer[:, :3] @ inner[:, :3], outer[:, :3] @ inner[:, 3:] + outer[:, 3:]], 1)


def _box(found: SceneFiles, cameras: Cameras, scaled: bool) -> Tensor:
    if scaled:
        return torch.tensor([[-1.0] * 3, [1.0] * 3])
    if found.box is not None:
        return found.box
    positions = cameras.c2w[:, :, 3]
    middle = positions.mean(0)
    half = (positions - middle).abs().max()
    return torch.stack([middle - half, middle + half])


def _check_meant(found: SceneFiles) -> None:
    """Refuse what reads well but cannot be meant.

    Raises:
        ValueError: a frame is there twice, all frames have one pose, or a principal point lies further outside of
            its picture than that is large.
    """
    seen = set()
    pictures = zip(found.paths, found.halves or [""] * len(found.paths), strict=True)
    for name, picture in zip(found.names, pictures, strict=True):
        if picture in seen:  # halves of one picture are two
            raise ValueError(f"frame {name!r} is listed twice in scene {found.name!r}")
        seen.add(picture)
    cameras = found.cameras
    if len(cameras) > 1 and (cameras.c2w == cameras.c2w[0]).all():
        raise ValueError(
            f"all {len(cameras)} frames have one and the same pose; a scene is seen from several positions"
        )
    for name, centre, size in (
        ("x", cameras.intrinsics[:, 2], cameras.width),
        ("y", cameras.intrinsics[:, 3], cameras.height),
    ):
        if (bad := ((centre < -size) | (centre > 2 * size)).nonzero()).numel():
            frame = int(bad[0])
            x, y = (f"{value:g}" for value in cameras.intrinsics[frame, 2:].tolist())
            raise ValueError(
                f"the principal point of frame {found.names[frame]!r} is ({x}, {y}) pixels in a picture of "
                f"{int(cameras.width[frame])} x {int(cameras.height[frame])}: {name} is further outside than its size"
            )


def _warn_of_box(box: Tensor, cameras: Cameras) -> None:
    """Say how many cameras look past the box, in the middle of their pictures, for their rays meet nothing."""
    middle = torch.arange(len(cameras))
    origins, directions = cameras.rays(middle, cameras.width // 2, cameras.height // 2)
    enter, leave = through_box(origins, directions, box.to(origins.dtype))
    past = int((leave.clamp(min=0) <= enter.clamp(min=0)).sum())
    if past > len(cameras) // 2:
        least, greatest = ([round(value, 3) for value in corner] for corner in box.tolist())
        logger.warning(
            "%d of %d training cameras look past the box %s to %s, outside of which nothing is seen: are the poses in "
            "the units and axes that this format has?",
            past,
            len(cameras),
            least,
            greatest,
        )


def _warn_of_lenses(cameras: Cameras, names: Sequence[str]) -> None:
    """Say which lens cannot be undone at the corners of its picture, or moves them by more than can be meant."""
    if cameras.model == "PINHOLE":
        return
    fx, fy, cx, cy = cameras.intrinsics.double().unbind(-1)
    for right, bottom in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x, y = (right * cameras.width - cx) / fx, (bottom * cameras.height - cy) / fy
        straight_x, straight_y = undistort(x, y, cameras.distortion)
        back_x, back_y = distort(straight_x, straight_y, cameras.distortion)
        folded = ~(torch.hypot((back_x - x) * fx, (back_y - y) * fy) < 0.1)  # pixels
        moved = torch.hypot(x, y) / torch.hypot(straight_x, straight_y)
        for bad, words in (
            (folded, "cannot be undone at a corner of the picture; rays near that corner are wrong"),
            (moved > MOST_MOVED, f"moves a corner of the picture to more than {MOST_MOVED} times its radius"),
            (moved < 1 / MOST_MOVED, f"moves a corner of the picture to less than 1/{MOST_MOVED} of its radius"),
        ):
            if bad.any():
                name = names[int(bad.nonzero()[0])]
                advice = "Undistort the pictures, or fit a milder model."
                logger.warning(
                    "The lens distortion of frame %r and %d others %s. %s", name, int(bad.sum()) - 1, words, advice
                )
                return
