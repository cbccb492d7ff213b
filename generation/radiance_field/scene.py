"""A scene: pictures, the cameras that took them, and what is known of the place."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from generation.radiance_field.cameras import Cameras, check_poses, similarity_scale
from generation.radiance_field.image_files import DepthFiles, ImageFiles, MaskFiles

SPLITS = ("train", "val", "test")
WHITE = (1.0, 1.0, 1.0)
MOST_NAMES = 4  # of held-out pictures in a summary


@dataclass(frozen=True)
class Scene:
    """N pictures of a place. What is a tensor may also be files, which are read when one is asked for by its number.

    Attributes:
        name: of the scene.
        images: uint8 `[N, H, W, 3]`, or `[N, H, W, 4]` with alpha (not premultiplied).
        cameras: N of them.
        names: of the N frames.
        splits: the frames of "train", "val" and "test", int64 `[n]` each. A format that holds out one set has it in
            both of "val" and "test".
        box: `[2, 3]`, the least and greatest corner of what is of interest.
        near, far: distances between which a ray is worth sampling.
        background: colour in [0, 1] behind everything, where that is known (it is what alpha was composited on).
        masks: bool `[N, H, W]`, the pixels that count, in training of a training frame, in metrics of another.
        depths: float32 `[N, H, W]`, the distance along the ray of the pixel's centre; inf is the sky, NaN unknown.
        districts: int8 `[N, H, W]`, the district seen by the ray of the pixel's centre; -1 is the sky.
        normals: float32 `[N, H, W, 3]` unit normals, 0 in the sky.
        appearance_ids: int64 `[N]`, frames of one exposure share a number; 0 to N-1 if None is given.
        transform: `[3, 4]`, the similarity from the source's world to this one.
        altitude_range: the first coordinate (down) of the highest and lowest point of interest, between which the box
            lies; None where down is not the first axis, or nothing is known.

    Raises:
        ValueError: a pose is none, counts differ, or a split is empty of training frames or names none.
    """

    name: str
    images: Tensor | ImageFiles
    cameras: Cameras
    names: tuple[str, ...]
    splits: Mapping[str, Tensor]
    box: Tensor
    near: float
    far: float
    background: tuple[float, float, float] | None = None
    masks: Tensor | MaskFiles | None = None
    depths: Tensor | DepthFiles | None = None
    districts: Tensor | None = None
    normals: Tensor | None = None
    appearance_ids: Tensor | None = None
    transform: Tensor = field(default_factory=lambda: torch.eye(3, 4))
    altitude_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        count = len(self.cameras)
        if self.appearance_ids is None:
            object.__setattr__(self, "appearance_ids", torch.arange(count))
        for name in ("images", "names", "masks", "depths", "districts", "normals", "appearance_ids"):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(f"{name} of scene {self.name!r} are {len(value)}; there are {count} cameras")
        check_poses(self.cameras.c2w, self.names)
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"splits are {sorted(self.splits)}; expected {', '.join(SPLITS)}")
        if len(self.splits["train"]) == 0:
            raise ValueError(f"scene {self.name!r} has no training frame")

    def __len__(self) -> int:
        return len(self.cameras)

    @property
    def summary(self) -> str:
        """How many pictures there are, which of them are held out, and in what box and units, in a few lines."""
        train, held_out = self.splits["train"], torch.cat([self.splits["val"], self.splits["test"]]).unique().tolist()
        if held_out:
            names = [self.names[frame] for frame in held_out[:MOST_NAMES]]
            shown = ", ".join(names) + (", ..." if len(held_out) > MOST_NAMES else "")
            others = f"{len(held_out)} held out ({shown})"
        else:
            others = "none held out: nothing is validated"
        least, greatest = (", ".join(f"{value:.4g}" for value in corner) for corner in self.box.tolist())
        lines = [
            f"scene {self.name!r}: {len(train)} pictures to train on, {others}",
            f"box [{least}] to [{greatest}], rays from {self.near:.4g} to {self.far:.4g}",
        ]
        unit = 1 / similarity_scale(self.transform)
        if abs(unit - 1) > 1e-4:
            lines[1] += f"; one unit is {unit:.4g} of the source's"
        return "\n".join(lines)

    def training_appearance(self, frame: int) -> int | None:
        """The number, among those of the training pictures in order, of a frame's appearance; None if it is of none."""
        known = self.appearance_ids[self.splits["train"]].unique()
        found = (known == self.appearance_ids[frame]).nonzero()
        return int(found[0]) if len(found) else None


def every_eighth_held_out(count: int) -> dict[str, Tensor]:
    """Splits as mip-NeRF 360 makes them: the first of every eight frames is for validation and test."""
    frames = torch.arange(count)
    held_out = (frames % 8 == 0) & (count > 1)
    return {"train": frames[~held_out], "val": frames[held_out], "test": frames[held_out]}


def tenth_held_out(count: int) -> dict[str, Tensor]:
    """Splits as nerfstudio makes them: nine tenths, rounded up, evenly spaced, are for training, the rest for tests."""
    train = np.linspace(0, count - 1, -(-count * 9 // 10), dtype=int)
    held_out = torch.from_numpy(np.setdiff1d(np.arange(count), train))
    return {"train": torch.from_numpy(train), "val": held_out, "test": held_out}
