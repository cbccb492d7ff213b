"""What only the Triton scan has: its tile sizes, exact repetition, its limits. The rest is in `test_gated_scan.py`."""

import pytest
import torch

from kernels.gated_scan import bidirectional_gated_scan, gated_scan
from tests.kernels.scan_cases import TOLERANCES, check, make_inputs, relative_error, strided_views

pytest.importorskip("triton")

from kernels.gated_scan import triton as triton_scan


@pytest.fixture
def narrow_tiles(monkeypatch):
    """The tiles of bfloat16 inputs, whose products the interpreter cannot form, for float32 inputs."""
    monkeypatch.setattr(triton_scan, "WIDE", triton_scan.NARROW)


@pytest.mark.parametrize(
    ("tokens", "key_dim", "value_dim"),
    [
        (1, 8, 16), (2, 16, 16), (15, 24, 32), (16, 32, 48), (17, 48, 24), (63, 16, 96), (64, 96, 8), (65, 32, 64),
        (130, 48, 16), (197, 16, 32),
    ],
    ids=lambda size: str(size),
)  # fmt: skip
def test_bidirectional_sizes(tokens, key_dim, value_dim):
    check(bidirectional_gated_scan, make_inputs(1, tokens, 1, key_dim, value_dim), "triton")


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("tokens", [63, 130])
def test_tiles_of_bfloat16(tokens):
    check(bidirectional_gated_scan, make_inputs(1, tokens, 1, 24, 40), "triton")
    check(gated_scan, make_inputs(1, tokens, 1, 24, 40, "mixed")[:4], "triton")


def test_strided_and_broadcast_inputs_give_the_bits_of_copies():
    views = strided_views(2, 33, 1, 16)
    grad = torch.randn(2, 33, 1, 1).expand(2, 33, 1, 16)
    output = triton_scan.bidirectional_forward(*views, 0.25, 0.0)
    copies = [x.contiguous() for x in views]
    assert torch.equal(output, triton_scan.bidirectional_forward(*copies, 0.25, 0.0))
    expected = bidirectional_gated_scan(*(x.double() for x in views), scale=0.25, backend="reference")
    assert relative_error(output, expected) < TOLERANCES[torch.float32][0]
    gradients = triton_scan.bidirectional_backward(grad, *views, 0.25, 0.0)
    expected = triton_scan.bidirectional_backward(grad.contiguous(), *copies, 0.25, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("key_dim", [0, 8])
def test_no_key_channels_give_zeros(key_dim):
    inputs = make_inputs(1, 3, 1, key_dim, 4)
    output = bidirectional_gated_scan(*inputs, backend="triton")
    assert output.any() == (key_dim > 0)


def test_same_bits_every_time():
    inputs = make_inputs(1, 35, 1, 16, 16)
    grad = torch.randn(1, 35, 1, 16)
    first, second = (
        (triton_scan.bidirectional_forward(*inputs, 0.25, 0.0),
         *triton_scan.bidirectional_backward(grad, *inputs, 0.25, 0.0))
        for _ in range(2)
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_float64_is_refused():
    inputs = [x.double() for x in make_inputs(1, 3, 1, 16, 16)]
    with pytest.raises(ValueError, match="query is float64; the triton backend takes float32"):
        bidirectional_gated_scan(*inputs, backend="triton")
