"""Folders of classes that come without a division into training, validation and test: Mini-ImageNet's layout."""

import random
from functools import cached_property
from itertools import islice
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from vision.image_data import ImageFiles, ImageFolder
from vision.image_files import check_images, find_images


class ClassFolders(ImageFolder):
    """Folders `<class>/...`, divided here: of every class so many images train, validate and test.

    Which image falls where depends on `split_seed` and on the sorted names of its class's files, not on the run's
    seed: runs of several seeds are tested on the same images. The defaults are for the 600 images of each class of
    Mini-ImageNet, whose own division keeps whole classes apart (it is for few-shot learning) and is of no use here.

    Bad files are found after the division, named and skipped, or the run is refused, as in `ImageFolder`.

    Args:
        path: the folder that holds the classes' folders.
        counts: training, validation and test images of each class. What a class has beyond them is left out, and
            said so.
        split_seed: of the division.

    Raises:
        ValueError: in `setup`, a class has fewer files than `counts` ask for.
    """

    def __init__(
        self, path: str, counts: tuple[int, int, int] = (480, 60, 60), split_seed: int = 0, **settings: Any
    ) -> None:
        super().__init__(path, **settings)
        if min(counts) < 1:
            raise ValueError(f"counts is {counts}; each part (training, validation, test) has at least 1 image a class")
        self.counts, self.split_seed = counts, split_seed

    @cached_property
    def label_names(self) -> list[str]:
        return self._classes_in(self.path, "<class>/<image>")

    def setup(self, stage: str) -> None:
        if hasattr(self, "train_set"):
            return
        parts, wanted, left_out = ([], [], []), sum(self.counts), 0
        for label, name in enumerate(self.label_names):
            paths = find_images([self.path / name])
            if len(paths) < wanted:
                raise ValueError(
                    f"class {name} in {self.path} has {len(paths)} images; counts is {self.counts}, {wanted} in all"
                )
            left_out += len(paths) - wanted
            random.Random(self.split_seed).shuffle(paths)
            shuffled = iter(paths)
            for part, count in zip(parts, self.counts, strict=True):
                part += [(path, label) for path in sorted(islice(shuffled, count))]
        if left_out:
            rank_zero_warn(f"{left_out} images of {self.path} are beyond counts ({self.counts} a class) and left out")
        usable = set(check_images([path for part in parts for path, _ in part], self.check))
        train, validation, test = (ImageFiles([sample for sample in part if sample[0] in usable]) for part in parts)
        self.train_set = self.transformed(train, training=True)
        self.validation_set, self.test_set = self.transformed(validation), self.transformed(test)
