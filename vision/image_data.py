"""Data modules of the image sets.

Folders and torchvision's sets, read image by image through timm's transforms, are here; the sets that lie in memory
(MNIST-5k, digits, OpenMoji) in `vision.in_memory_images`.

Every sampler hands out (index, epoch) pairs, so that the random distortion of an image depends on the seed, the epoch
and its index alone: a run gives the same batches with any number of processes or workers, and again when resumed.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import datasets
from torchvision.transforms import RandomCrop

from vision.image_files import check_images, find_images, open_image

Key = int | tuple[int, int]  # an index, or an index and the epoch of its distortion


class EpochSampler(DistributedSampler):
    """Shuffled (index, epoch) pairs. Process r of W takes every W-th, so W batches of B/W make the one batch of B.

    Args:
        skip: asked when an epoch begins for how many of its samples a run resumed in mid-epoch has already seen.
    """

    def __init__(self, dataset: Dataset, *arguments: Any, skip: Callable[[], int] = lambda: 0, **settings: Any) -> None:
        super().__init__(dataset, *arguments, **settings)
        self.skip = skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((index, self.epoch) for index in itertools.islice(super().__iter__(), self.skip(), None))


class ImageDataModule(pl.LightningDataModule):
    """What every image set shares: its description and its loaders.

    Subclasses set `train_set`, `validation_set` and, where there is one, `test_set` in `setup`.

    Args:
        batch_size: images of an optimiser step, over all processes together.
        evaluation_batch_size: images of a batch in validation and test, per process.
        num_workers: processes that load; 0 loads in the main one.
        seed: of the order, the distortions and, where the set has no split of its own, the split.
    """

    label_names: Sequence[str]
    in_chans: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    test_set: Dataset | None = None

    def __init__(self, batch_size: int, evaluation_batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("evaluation_batch_size", evaluation_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it is at least {least}")
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.num_workers = num_workers
        self.seed = seed

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    def train_dataloader(self) -> DataLoader:
        processes = self.trainer.world_size
        if self.batch_size % processes:
            raise ValueError(f"batch_size is {self.batch_size}; it must be a multiple of the {processes} processes")
        if len(self.train_set) < self.batch_size:
            raise ValueError(f"batch_size is {self.batch_size}, but the training set has {len(self.train_set)} images")
        share = self.batch_size // processes
        sampler = EpochSampler(
            self.train_set,
            processes,
            self.trainer.global_rank,
            shuffle=True,
            seed=self.seed,
            drop_last=True,
            skip=lambda: share * self._batches_done(),
        )
        return self._loader(self.train_set, share, sampler, drop_last=True)

    def _batches_done(self) -> int:
        """Batches of the current epoch before the trainer's step: not 0 only where a run resumes in mid-epoch."""
        steps = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        return self.trainer.global_step % steps * self.trainer.accumulate_grad_batches

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.validation_set)

    def test_dataloader(self) -> DataLoader:
        if self.test_set is None:
            raise ValueError(f"{type(self).__name__} has no test set here; `validate` uses the validation set")
        return self._evaluation_loader(self.test_set)

    def _evaluation_loader(self, dataset: Dataset) -> DataLoader:
        sampler = UnrepeatedDistributedSampler(
            dataset, self.trainer.world_size, self.trainer.global_rank, shuffle=False
        )
        return self._loader(dataset, self.evaluation_batch_size, sampler)

    def _loader(self, dataset: Dataset, batch_size: int, sampler: DistributedSampler, drop_last: bool = False):
        return DataLoader(
            dataset,
            batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=getattr(dataset, "collate", None),
        )


@dataclass
class Augmentation:
    """timm's augmentation of photographs (`timm.data.create_transform`); the defaults are ViG's ImageNet recipe.

    Args:
        scale: area of the random crop, in fractions of the image.
        ratio: width over height of the random crop.
        crop_padding: pixels put around the image, which is then cropped to size at random: CIFAR's custom. It takes
            the place of the random resized crop, so that `scale` and `ratio` mean nothing. None for the resized crop.
        horizontal_flip: probability.
        color_jitter: strength; used where `auto_augment` is None.
        auto_augment: timm's string of RandAugment, AutoAugment or AugMix; None for none.
        erase_probability: of random erasing.
        erase_mode: `const`, `rand` (one colour) or `pixel` (a colour a pixel).
        erase_count: rectangles at most.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int | None = None
    horizontal_flip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    erase_probability: float = 0.25
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    erase_count: int = 1

    def __post_init__(self) -> None:
        if self.crop_padding is not None and self.crop_padding < 0:
            raise ValueError(f"crop_padding is {self.crop_padding}; it is at least 0, or None for the resized crop")


class TransformedImages(Dataset):
    """A set of (PIL image, label) through a transform, whose randomness is seeded by (seed, epoch, index)."""

    def __init__(self, images: Sequence[tuple[Image.Image, int]], transform: Callable, seed: int = 0) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        if not isinstance(key, tuple):
            image, label = self.images[key]
            return self.transform(image), label
        index, epoch = key
        image, label = self.images[index]
        with isolate_rng():  # timm's transforms draw from all three global generators
            random.seed(f"{self.seed} {epoch} {index}")
            np.random.seed(random.getrandbits(32))  # noqa: NPY002
            torch.manual_seed(random.getrandbits(63))
            return self.transform(image), label


class ImageFiles(Sequence):
    """(RGB image, label) of labelled files, decoded when read."""

    def __init__(self, samples: list[tuple[Path, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return open_image(path), label


class PhotographData(ImageDataModule):
    """Sets whose images are decoded one by one and go through timm's transforms.

    Args:
        image_size: side of the square the model sees.
        augmentation: of the training images; None resizes and crops the centre, as in evaluation.
        crop_fraction: of the resized image that the centre crop keeps in evaluation.
        interpolation: `bicubic`, `bilinear` or `random`.
    """

    in_chans = 3
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    def __init__(
        self,
        image_size: int,
        augmentation: Augmentation | None,
        crop_fraction: float,
        interpolation: str,
        batch_size: int,
        evaluation_batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, num_workers, seed)
        self.image_size, self.augmentation = image_size, augmentation
        self.crop_fraction, self.interpolation = crop_fraction, interpolation

    def transformed(self, images: Sequence[tuple[Image.Image, int]], training: bool = False) -> TransformedImages:
        shared = {
            "mean": self.mean,
            "std": self.std,
            "crop_pct": self.crop_fraction,
            "interpolation": self.interpolation,
        }
        if not training or self.augmentation is None:
            return TransformedImages(images, create_transform(self.image_size, **shared), self.seed)
        augmentation = self.augmentation
        transform = create_transform(
            self.image_size,
            is_training=True,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.horizontal_flip,
            color_jitter=augmentation.color_jitter,
            auto_augment=augmentation.auto_augment,
            re_prob=augmentation.erase_probability,
            re_mode=augmentation.erase_mode,
            re_count=augmentation.erase_count,
            **shared,
        )
        if augmentation.crop_padding is not None:
            # An image of this size already is left alone by the resizing.
            fitted = ResizeKeepRatio(self.image_size, interpolation=self.interpolation)
            cropped = RandomCrop(self.image_size, augmentation.crop_padding)
            transform.transforms[:1] = [fitted, cropped]
        return TransformedImages(images, transform, self.seed)


class ImageFolder(PhotographData):
    """Folders `train/<class>/...`, `val/<class>/...` and, optionally, `test/<class>/...`: ImageNet's layout.

    Bad files are found in `setup`, named and skipped, or the run is refused (`vision.image_files.check_images`). A
    file that fails later stops the training with its name.

    Args:
        path: the folder that holds them.
        check: `decode` reads each file whole once before training; `header` only its first bytes, for large sets.
    """

    def __init__(
        self,
        path: str,
        image_size: int = 224,
        augmentation: Augmentation | None = None,
        check: Literal["decode", "header"] = "decode",
        crop_fraction: float = 0.875,
        interpolation: str = "bicubic",
        batch_size: int = 64,
        evaluation_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            image_size,
            augmentation,
            crop_fraction,
            interpolation,
            batch_size,
            evaluation_batch_size,
            num_workers,
            seed,
        )
        self.path, self.check = Path(path), check

    @cached_property
    def label_names(self) -> list[str]:
        return self._classes_in(self.path / "train", "train/<class>/ and val/<class>/")

    def _classes_in(self, folder: Path, layout: str) -> list[str]:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
        if len(names) < 2:
            raise ValueError(f"path is {self.path}; expected {layout} in it, two classes or more")
        return names

    def setup(self, stage: str) -> None:
        if not hasattr(self, "train_set"):
            self.train_set = self.transformed(self._files("train"), training=True)
            self.validation_set = self.transformed(self._files("val"))
            self.test_set = self.transformed(self._files("test")) if (self.path / "test").is_dir() else None

    def _files(self, part: str) -> ImageFiles:
        label_of = {name: label for label, name in enumerate(self.label_names)}
        folder = self.path / part
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        classes = [entry for entry in found if entry.is_dir()]
        if unknown := [entry.name for entry in classes if entry.name not in label_of]:
            raise ValueError(f"{folder} holds classes that train/ does not: {', '.join(unknown[:5])}")
        if not classes:
            raise ValueError(f"{folder} holds no class folder; expected {folder}/<class>/<image>")
        paths = check_images(find_images(classes), self.check)
        return ImageFiles([(path, label_of[path.relative_to(folder).parts[0]]) for path in paths])


class Cifar(PhotographData):
    """CIFAR-10 or CIFAR-100 as torchvision stores them; never downloaded. Validation and test are its test part.

    Args:
        path: the folder that holds `cifar-10-batches-py` or `cifar-100-python`.
        classes: 10 or 100.
    """

    def __init__(
        self,
        path: str,
        classes: Literal[10, 100] = 10,
        image_size: int = 32,
        augmentation: Augmentation | None = None,
        batch_size: int = 128,
        evaluation_batch_size: int = 250,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(image_size, augmentation, 1.0, "bicubic", batch_size, evaluation_batch_size, num_workers, seed)
        self.path, self.classes = path, classes

    @property
    def label_names(self) -> list[str]:
        return self._parts[1].classes

    @cached_property
    def _parts(self) -> tuple[datasets.CIFAR10, datasets.CIFAR10]:
        of_size = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[self.classes]
        try:
            return of_size(self.path, train=True, download=False), of_size(self.path, train=False, download=False)
        except RuntimeError as error:
            raise ValueError(
                f"path is {self.path}; expected {of_size.base_folder}/ of CIFAR-{self.classes} in it"
            ) from error

    def setup(self, stage: str) -> None:
        if not hasattr(self, "train_set"):
            train, test = self._parts
            self.train_set = self.transformed(train, training=True)
            self.validation_set = self.test_set = self.transformed(test)
