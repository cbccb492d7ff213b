"""Batches of rays for training, and whole pictures for validation."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from generation.numbered_batches import EndlessOrder, NumberedBatches
from generation.radiance_field.district_city import City
from generation.radiance_field.scene import Scene
from generation.radiance_field.scene_data import load_scene


class RayBatches(Dataset):
    """Batches of rays by number: {"origin", "direction", "colour": `[R, 3]`, "appearance", "jitter": `[R]`}.

    Pixels are drawn from all of the training pictures, in proportion to their sizes; those that a mask leaves out are
    not drawn. Of more pictures in files than can be held at once, a batch has pixels of `pictures_at_once`; the next
    batch has one other in place of one of them, so that each is read once in a pass through all. What is transparent
    has the scene's background behind it. Appearances are numbered among those of the training pictures; the jitter in
    [0, 1) shifts a ray's samples, and is part of the batch so that processes which share it take the samples that one
    alone would.

    Args:
        scene: of which the training pictures are taken.
        length: batches.
        batch_size: rays of a batch, over all processes together.
        seed: of the batches.
        share: (rank, processes): this process takes every so-many-th ray of a batch.
        pictures_at_once: of pictures in files, how many are decoded at a time.

    Raises:
        ValueError: masks leave nothing.
    """

    def __init__(
        self,
        scene: Scene,
        length: int,
        batch_size: int,
        seed: int,
        share: tuple[int, int],
        pictures_at_once: int = 32,
    ) -> None:
        self.scene, self.length, self.batch_size, self.seed, self.share = scene, length, batch_size, seed, share
        self.frames = scene.splits["train"]
        self.appearances = scene.appearance_ids[self.frames].unique(return_inverse=True)[1]
        counts = (scene.cameras.width[self.frames] * scene.cameras.height[self.frames]).numpy()
        self.rows = None
        if scene.masks is not None:  # of each picture, how many pixels are kept up to the end of each row
            masks = (torch.as_tensor(scene.masks[int(frame)]) for frame in self.frames)
            self.rows = [mask.sum(1).cumsum(0) for mask in masks]
            counts = np.array([int(ends[-1]) for ends in self.rows])
            if not counts.any():
                raise ValueError(f"the masks of scene {scene.name!r} leave no pixel to train on")
        self.counts, self.places = counts, counts.nonzero()[0]
        self.order, self.at_once = None, pictures_at_once
        if not isinstance(scene.images, Tensor) and len(self.places) > pictures_at_once:
            self.order = EndlessOrder(len(self.places), seed)
        self.held: dict[int, tuple[Tensor, Tensor | None]] = {}  # pictures and masks by their frame

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        rank, processes = self.share
        places = self._places(number)
        ends = self.counts[places].cumsum()
        generator = np.random.default_rng([self.seed, number])
        drawn = generator.integers(ends[-1], size=self.batch_size)
        jitter = torch.from_numpy(generator.random(self.batch_size, dtype=np.float32)[rank::processes].copy())
        drawn = drawn[rank::processes]
        which = np.searchsorted(ends, drawn, side="right")
        within = torch.from_numpy(drawn - np.where(which, ends[which - 1], 0))
        place = torch.from_numpy(places[which])
        frame = self.frames[place]
        if not isinstance(self.scene.images, Tensor):
            self._hold(places, frame.unique().tolist())
        if self.rows is None:
            width = self.scene.cameras.width[frame]
            column, row = within % width, within // width
        else:
            column, row = self._kept(place, within)
        origin, direction = self.scene.cameras.rays(frame, column, row)
        return {
            "origin": origin,
            "direction": direction,
            "colour": self._colours(frame, column, row),
            "appearance": self.appearances[place],
            "jitter": jitter,
        }

    def _places(self, number: int) -> np.ndarray:
        """Among the training pictures, those of whom a batch has pixels, in ascending order."""
        if self.order is None:
            return self.places
        return self.places[np.unique([self.order[number + i] for i in range(self.at_once)])]

    def _hold(self, places: np.ndarray, frames: list[int]) -> None:
        """Read the pictures, with their masks, of frames that are not held yet; let go of all but those in `places`."""
        stay = set(self.frames[places].tolist())
        self.held = {frame: held for frame, held in self.held.items() if frame in stay}
        for frame in frames:
            if frame not in self.held:
                mask = None if self.rows is None else torch.as_tensor(self.scene.masks[frame])
                self.held[frame] = torch.as_tensor(self.scene.images[frame]), mask

    def _kept(self, place: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Columns and rows of pixels by their number among those of their pictures that masks keep."""
        column, row = torch.empty_like(number), torch.empty_like(number)
        for i in place.unique().tolist():
            own, ends, frame = place == i, self.rows[i], int(self.frames[i])
            mask = self.held[frame][1] if frame in self.held else torch.as_tensor(self.scene.masks[frame])
            row[own] = rows = torch.searchsorted(ends, number[own], right=True)
            kept = mask[rows].cumsum(1)
            nth = number[own] - ends[rows] + kept[:, -1]  # in its row, from 0
            column[own] = (kept > nth[:, None]).byte().argmax(1)
        return column, row

    def _colours(self, frame: Tensor, column: Tensor, row: Tensor) -> Tensor:
        """float32 `[R, 3]` in [0, 1]."""
        if isinstance(self.scene.images, Tensor):
            return on_background(self.scene.images[frame, row, column].float() / 255, self.scene.background)
        colours = torch.empty(len(frame), 3)
        for number in frame.unique().tolist():
            own = frame == number
            seen = self.held[number][0][row[own], column[own]].float() / 255
            colours[own] = on_background(seen, self.scene.background)
        return colours


def on_background(colours: Tensor, background: tuple[float, float, float] | None) -> Tensor:
    """`[..., 3]` of `[..., 3 or 4]`: by its alpha a colour hides the background, black if that is None."""
    if colours.shape[-1] == 3:
        return colours
    behind = colours.new_tensor(background or (0.0, 0.0, 0.0))
    return torch.lerp(behind, colours[..., :3], colours[..., 3:])


class Frames(Dataset):
    """Numbers of a scene's frames, each an item {"frame": number}."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> dict[str, int]:
        return {"frame": int(self.numbers[number])}


class SceneRays(NumberedBatches):
    """Rays of a scene's training pictures, and its held-out frames.

    Args:
        source: "city", "stereo_motorcycle", "pybullet:" and a file of PyBullet's, or a folder: see `load_scene`.
        city: arguments of the `City` in place of the default one; with source "city" alone.
        options: further arguments of `load_scene`.
        batch_size: rays that are drawn for an optimiser step, over all processes together; a training may use fewer.
        rays_per_epoch: an epoch's length, rounded down to whole batches.
        pictures_at_once: of pictures in files (with the option lazy), how many are held in memory, and have rays in a
            batch; with more workers each holds as many.
        validated: frames of the held-out ones that are validated on, evenly spaced. Where processes are more than
            these, some frames count twice.
        num_workers: processes that draw; 0 draws in the main one.
        seed: of the batches.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        source: str = "city",
        city: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        batch_size: int = 4096,
        rays_per_epoch: int = 4096 * 250,
        pictures_at_once: int = 32,
        validated: int = 6,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if rays_per_epoch < batch_size:
            raise ValueError(f"rays_per_epoch is {rays_per_epoch}; it must be at least batch_size, {batch_size}")
        super().__init__(batch_size, 1, rays_per_epoch, num_workers, seed)
        if city is not None and source != "city":
            raise ValueError(f"city is {city}, but source is {source!r}; it is for source 'city'")
        for name, value in (("validated", validated), ("pictures_at_once", pictures_at_once)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.source: str | Path | City = source if city is None else City(**city)
        self.options, self.validated, self.pictures_at_once = options or {}, validated, pictures_at_once

    def setup(self, stage: str | None = None) -> None:
        if not hasattr(self, "scene"):
            self.scene = load_scene(self.source, **self.options)

    def batches_of(self, length: int, share: tuple[int, int]) -> RayBatches:
        return RayBatches(self.scene, length, self.batch_size, self.seed, share, self.pictures_at_once)

    def val_dataloader(self) -> DataLoader:
        held_out = self.scene.splits["val"]
        chosen = torch.linspace(0, max(len(held_out) - 1, 0), min(len(held_out), self.validated)).long()
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        # A process without a frame would not take part in averaging the scores, and the others would wait for it.
        mine = chosen[rank % len(chosen) :: processes] if len(chosen) else chosen
        frames = Frames(held_out[mine])
        return self.loader(frames, lambda: range(len(frames)))
