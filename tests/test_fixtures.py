"""What `conftest.py` promises to every test: poisoned allocations, Triton's interpreter with autotuned kernels."""

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


def evaluate_in_package(expression: str, **names):
    """Evaluate as if the expression stood in a file of the package."""
    path = os.path.join(os.path.dirname(kernels.__file__), "imagined.py")
    return eval(compile(expression, path, "eval"), {"torch": torch, **names})


@pytest.mark.parametrize(
    "expression",
    [
        "torch.empty(3)", "torch.empty_like(x)", "torch.empty_strided((2, 2), (2, 1))", "x.new_empty(3)",
        "x.new_empty_strided((2,), (1,))", "torch.empty(3, dtype=torch.bfloat16)",
    ],
)  # fmt: skip
def test_uninitialised_memory_of_the_package_is_nan(expression):
    assert evaluate_in_package(expression, x=torch.zeros(2)).isnan().all()


def test_integers_are_poisoned_with_their_maximum():
    assert (evaluate_in_package("torch.empty(3, dtype=torch.int32)") == torch.iinfo(torch.int32).max).all()


def test_other_allocations_are_left_alone():
    assert not evaluate_in_package("torch.zeros(3)").isnan().any()
    with FakeTensorMode():
        assert evaluate_in_package("torch.empty(3)").shape == (3,)
    assert evaluate_in_package("torch.empty(3, device='meta')").is_meta


@triton.autotune(configs=[triton.Config({"BLOCK": 4}), triton.Config({"BLOCK": 8})], key=["count"])
@triton.jit
def doubling_kernel(x, y, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, 2 * tl.load(x + offsets, mask=offsets < count), mask=offsets < count)


def test_autotuned_kernels_run_in_the_interpreter():
    x = torch.randn(10)
    y = torch.full((10,), float("nan"))
    doubling_kernel[lambda constants: (triton.cdiv(10, constants["BLOCK"]),)](x, y, 10)
    assert torch.equal(y, 2 * x)


def test_hub_is_offline_and_seeds_are_fixed():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    expected = torch.rand(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(3), expected)
