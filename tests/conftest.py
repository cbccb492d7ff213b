"""What every test runs under: fixed seeds, no hub, Triton in its interpreter, uninitialised memory full of NaN.

The environment is set while this file is imported, before anything imports torch, triton, transformers or matplotlib:
each of them reads it once.
"""

import os

os.environ |= {
    "TRITON_INTERPRET": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MPLBACKEND": "Agg",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
}

import random
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

ROOT = Path(__file__).resolve().parent.parent
ROOMS = tuple(
    f"{ROOT / room}{os.sep}" for room in ("kernels", "training_runs", "vision", "generation", "multimodal", "demos")
)
ALLOCATORS = [
    *((torch, name) for name in ("empty", "empty_like", "empty_strided", "empty_permuted")),
    *((torch.Tensor, name) for name in ("new_empty", "new_empty_strided")),
]


class _InterpreterDriver:
    """Stands in for a GPU driver: an autotuner asks it to time each configuration, and all come out equal.

    The interpreter has no use for a driver, but `triton.autotune` looks for one and fails without a GPU. The first
    configuration wins, so that what runs does not depend on the machine.
    """

    def get_benchmarker(self) -> Callable:
        return lambda kernel_call, quantiles=(0.5,), **_: [0.0] * len(quantiles)


if find_spec("triton") is not None:
    import triton

    triton.runtime.driver.set_active(_InterpreterDriver())


# `with torch.device(...)` lists the allocators when it is first used: it shall find the real ones, not those below.
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from this generator
    torch.manual_seed(0)


def _poisoned(allocate: Callable) -> Callable:
    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta:
            return tensor
        if sys._getframe(1).f_code.co_filename.startswith(ROOMS):
            with torch.no_grad():
                if tensor.is_floating_point() or tensor.is_complex():
                    tensor.fill_(float("nan"))
                elif tensor.dtype != torch.bool:
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return allocate_poisoned


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the suite's own code allocates uninitialised with NaN (integers: their maximum).

    An element that a kernel forgets to write, or reads before it is written, then shows in every comparison instead of
    passing by luck with a fresh page of zeros.
    """
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
