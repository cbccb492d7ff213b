"""Samples as batches, in an order that depends on the seed alone: a run resumed in mid-epoch goes on in it."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from multimodal.argument_checks import check_whole
from multimodal.q_zoom.training.samples import SampleFolder, ZoomSample


class SampleBatches(Dataset):
    """Batches of a run by number, lists of samples: pass after pass through all samples, each in an order of its own.

    Args:
        samples: to draw from.
        batch_size: over all processes.
        batches: of an epoch.
        share: (rank, processes): this process takes every so-many-th sample of a batch.
        seed: of the orders; `None` keeps that of `samples`.
    """

    def __init__(
        self, samples: Sequence[ZoomSample], batch_size: int, batches: int, share: tuple[int, int], seed: int | None
    ) -> None:
        self.samples, self.batch_size, self.batches, self.share, self.seed = samples, batch_size, batches, share, seed
        self._order: tuple[int, np.ndarray] | None = None  # of the pass in progress

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number: int) -> list[ZoomSample]:
        places = range(number * self.batch_size, (number + 1) * self.batch_size)[self.share[0] :: self.share[1]]
        if self.seed is None:
            return [self.samples[place] for place in places if place < len(self.samples)]
        return [self.samples[self._drawn(place)] for place in places]

    def _drawn(self, place: int) -> int:
        number, place = divmod(place, len(self.samples))
        if self._order is None or self._order[0] != number:
            self._order = number, np.random.default_rng([self.seed, number]).permutation(len(self.samples))
        return int(self._order[1][place])


class NumbersToCome(DistributedSampler):
    """Numbers of the batches to come, asked for when an epoch begins; the same in every process.

    It is a DistributedSampler so that Lightning does not put its own, which would share out batches, in its place.
    """

    def __init__(self, dataset: Dataset, numbers: Callable[[], range]) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=False)
        self.numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers())


class ZoomData(pl.LightningDataModule):
    """Samples of a stage; subclasses say where they come from.

    Args:
        batch_size: samples of an optimiser step, over all processes together and before accumulation.
        evaluation_batch_size: of a validation batch, per process.
        num_workers: processes that read images; 0 reads in the main one.
        seed: of the order.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, batch_size: int, evaluation_batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        self.batch_size = check_whole("batch_size", batch_size, 1)
        self.evaluation_batch_size = check_whole("evaluation_batch_size", evaluation_batch_size, 1)
        self.num_workers = check_whole("num_workers", num_workers, 0)
        self.seed = check_whole("seed", seed, 0)
        self._resumed_step = 0

    @property
    def keeps_samples(self) -> bool:
        """Whether every epoch has the same objects as samples; what other processes read is new each time."""
        return self.num_workers == 0

    @abstractmethod
    def samples(self, *, validation: bool) -> Sequence[ZoomSample]:
        """Samples to train with, or to validate with, of which there may be none."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # of PIL images and texts; what is made of them is made on the model's device

    def state_dict(self) -> dict[str, int]:
        return {"step": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._resumed_step = state_dict["step"]

    def train_dataloader(self) -> DataLoader:
        samples, trainer = self.samples(validation=False), self.trainer
        if self.batch_size > len(samples):
            raise ValueError(f"batch_size is {self.batch_size}; there are only {len(samples)} samples to train with")
        if self.batch_size % trainer.world_size:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of the {trainer.world_size} processes"
            )
        length, limit = len(samples) // self.batch_size, trainer.limit_train_batches
        used = min(limit, length) if isinstance(limit, int) else int(limit * length)
        accumulated = trainer.accumulate_grad_batches
        if used % accumulated:  # Lightning ends the epoch with a smaller step, or never, in a run that is resumed
            raise ValueError(f"accumulate_grad_batches is {accumulated}; it must divide an epoch's {used} batches")
        share = (trainer.global_rank, trainer.world_size)
        batches = SampleBatches(samples, self.batch_size, length, share, self.seed)

        def to_come() -> range:
            # The step alone tells: the trainer does not know its epoch yet when workers prefetch the first batches, and
            # where a run resumes not even its step, if batches were asked for to count them.
            epoch, step = divmod(max(trainer.global_step, self._resumed_step), used // accumulated)
            return range(epoch * length + step * accumulated, (epoch + 1) * length)

        return self._loader(batches, to_come)

    def val_dataloader(self) -> DataLoader | list:
        samples, processes = self.samples(validation=True), self.trainer.world_size
        if not samples:
            return []
        size = self.evaluation_batch_size * processes
        count = -(-len(samples) // size)
        batches = SampleBatches(samples, size, count, (self.trainer.global_rank, processes), None)
        return self._loader(batches, lambda: range(count))

    def _loader(self, batches: SampleBatches, numbers: Callable[[], range]) -> DataLoader:
        return DataLoader(
            batches,
            batch_size=None,  # an item is a batch
            sampler=NumbersToCome(batches, numbers),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


class FolderData(ZoomData):
    """Samples of folders (see `samples`).

    Args:
        folder: to train with.
        validation_folder: to validate with; `None` for none.
        in_memory: read all attention at the beginning and keep the same samples through all epochs (with `num_workers`
            above 0 each epoch gets copies of them).
        batch_size, evaluation_batch_size, num_workers, seed: see `ZoomData`.

    Raises:
        ValueError: a folder cannot be read.
    """

    def __init__(
        self,
        folder: str,
        validation_folder: str | None = None,
        in_memory: bool = False,
        batch_size: int = 32,
        evaluation_batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, num_workers, seed)
        sets = [SampleFolder(folder), [] if validation_folder is None else SampleFolder(validation_folder)]
        self.training, self.validation = map(list, sets) if in_memory else sets
        self.in_memory = in_memory

    @property
    def keeps_samples(self) -> bool:
        return super().keeps_samples and self.in_memory

    def samples(self, *, validation: bool) -> Sequence[ZoomSample]:
        return self.validation if validation else self.training
