"""Volume rendering's Triton kernels in their interpreter: golden outputs, sizes, strides, extremes, their limits."""

import pytest
import torch

pytest.importorskip("triton")

from kernels.volume_rendering import composite
from tests.kernels.test_volume_rendering import (
    VIEWS,
    check,
    check_extremes,
    check_gradients_of_one_output,
    each_output,
    inputs,
    results,
)
from tests.kernels.test_volume_rendering_golden import check_nerfacc, check_packed


def test_nerfacc():
    check_nerfacc("triton", torch.float32)


def test_packed_nerfacc():
    check_packed("triton", torch.float32)


@pytest.mark.parametrize("samples", [0, 1, 2, 65, 197])
@pytest.mark.parametrize("rays", [1, 4])
def test_sizes(samples, rays):
    check(inputs(samples, rays), "triton")


def test_no_rays():
    check(inputs(0, 0), "triton")


@pytest.mark.parametrize("channels", [0, 1, 5, 40])
def test_channels(channels):
    check(inputs(65, 3, channels), "triton")


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view):
    check({name: VIEWS[view](x) for name, x in inputs(65, 3).items()}, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_narrow_dtypes(dtype):
    check(inputs(65, 3, dtype=dtype), "triton")
    given = inputs(65, 3)
    check(given | {"colour": given["colour"].to(dtype)}, "triton")


def test_extremes():
    check_extremes("triton", torch.float32)


@each_output
def test_any_output_may_lack_a_gradient(chosen):
    check_gradients_of_one_output(chosen, "triton")


def test_same_bits_every_time():
    given = inputs(100, 3)
    first, second = (results(given, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("offsets", [[-5, 2, 4], [0, 9, 4], [0, 2, 99]], ids=str)
def test_wrong_offsets_touch_nothing_else(offsets):
    """Where to look at their values would be to wait for the GPU, they are kept within the samples."""
    memory = torch.full((3, 8, 3), 7.0)
    memory[1, 2:6] = torch.rand(4, 3)
    given = inputs(4, 2) | {"colour": memory[1, 2:6], "offsets": torch.tensor(offsets)}
    out = composite(**given, backend="triton")
    assert out.opacity.shape == (2,)
    assert ((out.opacity >= 0) & (out.opacity <= 1 + 1e-6)).all()


@pytest.mark.parametrize("name", ["density", "colour", "start", "end"])
def test_float64_is_refused(name):
    given = inputs(4, 2)
    given[name] = given[name].double()
    with pytest.raises(RuntimeError, match="the triton kernels take float32, bfloat16 and float16"):
        composite(**given, backend="triton")
