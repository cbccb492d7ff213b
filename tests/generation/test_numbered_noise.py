"""The noise of training steps: of seed, batch and process, and of nothing else."""

from types import SimpleNamespace

import pytest
import torch

from generation.numbered_batches import generator_of_batch

FIRST = {"seed": 0, "step": 0, "rank": 0}


def noise(seed: int, step: int, rank: int) -> torch.Tensor:
    trainer = SimpleNamespace(accumulate_grad_batches=1)
    module = SimpleNamespace(trainer=trainer, global_step=step, device="cpu", global_rank=rank)
    return torch.rand(4, generator=generator_of_batch(module, seed, step))


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"seed": 2**31 - 1}, {"seed": 4095}, {"step": 1}, {"step": 2**20 - 1}, {"rank": 1}, {"rank": 4095}],
    ids=str,
)
def test_other_runs_batches_and_processes_have_other_noise(other):
    """PyTorch's generator on CPU ignores all but the low 32 bits of its seed."""
    assert not torch.equal(noise(**FIRST), noise(**FIRST | other))
    assert torch.equal(noise(**FIRST | other), noise(**FIRST | other))


def test_no_two_of_many_are_the_same():
    streams = {tuple(noise(seed, step, 0).tolist()) for seed in range(20) for step in range(50)}
    assert len(streams) == 20 * 50
