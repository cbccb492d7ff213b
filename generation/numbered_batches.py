"""Training data without an end, drawn by number: a batch depends on the seed and on its number in the run alone.

So a run gives the same batches with any number of processes or workers, and again when it is resumed in mid-epoch.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

SEED_STRIDE = 0x7F4A7C15  # between the noise of two runs


class BatchNumbers(DistributedSampler):
    """Numbers of the batches to come, asked for when an epoch begins; the same in every process.

    It is a DistributedSampler so that Lightning does not put its own, which would share out batches, in its place.
    """

    def __init__(self, dataset: Dataset, numbers: Callable[[], range]) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=False)
        self.numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers())


class NumberedBatches(pl.LightningDataModule):
    """Data whose training batches are drawn by number; `batches_of` says how.

    Args:
        batch_size: images of an optimiser step, over all processes together.
        evaluation_batch_size: images of a batch in validation and test, per process.
        images_per_epoch: an epoch's length, since there is no end of images; rounded down to whole batches.
        num_workers: processes that draw; 0 draws in the main one.
        seed: of the training batches.
    """

    def __init__(
        self, batch_size: int, evaluation_batch_size: int, images_per_epoch: int, num_workers: int, seed: int
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("evaluation_batch_size", evaluation_batch_size, 1),
            ("images_per_epoch", images_per_epoch, batch_size),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it is at least {least}")
        self.batch_size, self.evaluation_batch_size = batch_size, evaluation_batch_size
        self.images_per_epoch, self.num_workers, self.seed = images_per_epoch, num_workers, seed

    @abstractmethod
    def batches_of(self, length: int, share: tuple[int, int]) -> Dataset:
        """A dataset of `length` batches whose item i is batch i of the run.

        Args:
            share: (rank, processes): this process takes every so-many-th image of each batch.
        """

    def train_dataloader(self) -> DataLoader:
        processes = self.trainer.world_size
        if self.batch_size % processes:
            raise ValueError(f"batch_size is {self.batch_size}; it must be a multiple of the {processes} processes")
        batches, accumulated = self._batches_of_an_epoch(), self.trainer.accumulate_grad_batches
        if batches % accumulated:  # Lightning ends the epoch with a smaller step, or never, in a run that is resumed
            raise ValueError(f"accumulate_grad_batches is {accumulated}; it must divide an epoch's {batches} batches")
        share = (self.trainer.global_rank, processes)
        return self.loader(self.batches_of(self.images_per_epoch // self.batch_size, share), self._numbers_to_come)

    def _batches_of_an_epoch(self) -> int:
        length, limit = self.images_per_epoch // self.batch_size, self.trainer.limit_train_batches
        return min(limit, length) if isinstance(limit, int) else int(limit * length)

    def _numbers_to_come(self) -> range:
        """Of this epoch, counted from the beginning of the run; less than an epoch where a run resumes in the midst.

        The step alone tells: the trainer does not know its epoch yet when workers prefetch the first batches.
        """
        length, accumulated = self.images_per_epoch // self.batch_size, self.trainer.accumulate_grad_batches
        epoch, step = divmod(self.trainer.global_step, self._batches_of_an_epoch() // accumulated)
        return range(epoch * length + step * accumulated, (epoch + 1) * length)

    def loader(self, batches: Dataset, numbers: Callable[[], range]) -> DataLoader:
        """Of a dataset whose items are whole batches."""
        return DataLoader(
            batches,
            batch_size=None,  # an item is a batch
            sampler=BatchNumbers(batches, numbers),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def generator_of_batch(module: pl.LightningModule, seed: int, batch_index: int) -> torch.Generator:
    """For the noise of a training step, of seed, number of the batch in the run, and process alone: a resumed run draws
    what it would have drawn.

    Args:
        module: in training.
        seed: of the run, less than 2^31.
        batch_index: as `training_step` is told.
    """
    accumulated = module.trainer.accumulate_grad_batches
    number = module.global_step * accumulated + batch_index % accumulated
    # The CPU's generator takes no more than 32 bits: 2^20 batches of 4,096 processes. Of single processes whose seeds
    # differ by less than 4,096 none has a stream of another, since SEED_STRIDE is odd.
    return torch.Generator(module.device).manual_seed((seed * SEED_STRIDE + number * 4096 + module.global_rank) % 2**32)


class EndlessOrder:
    """`order[i]` is the image at position i of the run, which goes through `count` images in one order after another,
    each drawn from the seed."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._drawn: tuple[int, np.ndarray] | None = None  # of the pass in progress

    def __getitem__(self, position: int) -> int:
        number, place = divmod(position, self.count)
        if self._drawn is None or self._drawn[0] != number:
            # Passes and batches must not draw from the same stream, hence the third number.
            self._drawn = number, np.random.default_rng([self.seed, number, 1]).permutation(self.count)
        return int(self._drawn[1][place])


class BatchesInOrder(Dataset):
    """Batches of images as they are, for evaluation.

    Args:
        batch_of: a batch, from indices of its images.
        count: of the images.
        batch_size: of all batches but the last.
        share: (rank, processes): this process takes every so-many-th image.
    """

    def __init__(
        self, batch_of: Callable[[list[int]], dict[str, Any]], count: int, batch_size: int, share: tuple[int, int]
    ) -> None:
        mine = range(share[0], count, share[1])
        self.batch_of = batch_of
        self.batches = [list(mine[start : start + batch_size]) for start in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.batch_of(self.batches[number])
