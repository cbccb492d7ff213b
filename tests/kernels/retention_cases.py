"""Inputs of window retentions for tests, and their comparison with the float64 definition."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.window_retention import window_retention

# (output, gradients), of the largest absolute value of each tensor
TOLERANCES = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (2e-6, 1e-5),
    torch.bfloat16: (4e-3, 4e-3),  # half a unit in the last place: only results are rounded
    torch.float16: (5e-4, 5e-4),
}
EXTREME_DECAYS = (0.0, -1e-6, -30.0, -1e4)


@dataclass(frozen=True)
class Case:
    """One size of map, window and channels."""

    size: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    batch: int = 2
    heads: int = 2
    head_dim: int = 16
    value_dim: int = 16

    def __str__(self) -> str:
        """For the ids of tests."""
        size, window, shift = (f"{rows}x{columns}" for rows, columns in (self.size, self.window, self.shift))
        return f"{size}-w{window}-s{shift}-b{self.batch}-h{self.heads}-d{self.head_dim}-v{self.value_dim}"

    @property
    def tokens(self) -> int:
        """Of one window."""
        return self.window[0] * self.window[1]


MAPS = (
    Case((1, 1), (1, 1)),
    Case((1, 5), (1, 5)),
    Case((1, 5), (1, 3), (0, 1)),
    Case((2, 3), (2, 3)),
    Case((2, 3), (2, 2), (1, 1)),
    Case((7, 7), (7, 7)),
    Case((8, 8), (8, 8), (0, 0), 1, 3),
    Case((14, 14), (7, 7), (3, 3)),
    Case((14, 14), (7, 7), (0, 6), 1),
    Case((14, 14), (7, 7), (1, 0), 1, 1),
    Case((17, 9), (7, 7)),
    Case((17, 9), (7, 7), (3, 3)),
    Case((17, 9), (7, 4), (6, 1), 1),
    Case((9, 17), (3, 8), (2, 7), 1),
    Case((16, 16), (8, 8), (4, 4), 1),
)
LARGE_MAPS = (
    Case((63, 2), (7, 2), (3, 0), 1, 1),
    Case((65, 3), (7, 3), (3, 0), 1, 1),
    Case((65, 3), (65, 3), (0, 0), 1, 2),
    Case((2, 130), (2, 130), (0, 0), 1, 1),
    Case((20, 33), (20, 33), (0, 0), 1, 2, 32, 32),
    Case((20, 33), (10, 17), (4, 9), 1, 1),
    Case((56, 56), (7, 7), (3, 3), 1, 3, 32, 32),
)
CHANNELS = tuple(
    Case((5, 6), (3, 4), (1, 2), 1, 2, head_dim, value_dim)
    for head_dim, value_dim in (
        (2, 1), (2, 5), (16, 1), (16, 32), (24, 24), (24, 5), (32, 16), (32, 32), (64, 64), (64, 5), (96, 48),
        (16, 130),
    )
)  # fmt: skip
ODD_CHANNELS = tuple(  # rotary=False
    Case((5, 6), (3, 4), (1, 2), 1, 2, head_dim, value_dim)
    for head_dim, value_dim in ((1, 1), (1, 16), (5, 3), (63, 63), (33, 16))
)
OPTIONS = {
    "softmax": {},
    "softmax-still": {"rotary": False},
    **{
        f"sigmoid-{normalization}": {"activation": "sigmoid", "normalization": normalization}
        for normalization in ("clamp", "sum", "none")
    },
    **{
        f"sigmoid-{normalization}-{kind}": {
            "activation": "sigmoid", "normalization": normalization, "slopes": "balanced",
            "signed_slopes": kind == "signed",
        }
        for normalization in ("clamp", "sum", "none")
        for kind in ("slopes", "signed")
    },
    "sigmoid-clamp-still": {"activation": "sigmoid", "rotary": False},
}  # fmt: skip


def log_decays(heads: int) -> list[float]:
    """RMT's: gamma = 1 - 2^(-2 - 4 k / heads)."""
    return [math.log(1 - 2 ** (-2 - 4 * head / heads)) for head in range(heads)]


def balanced_slopes(heads: int) -> list[float]:
    """SWAT's: half of the heads look near, half far."""
    return [(-1) ** (head + 1) * 2.0 ** -(head // 2 + 1) for head in range(heads)]


def arguments(case: Case, options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `window_retention`; `options` come last, "balanced" slopes made for the case's heads."""
    made = {"log_decay": log_decays(case.heads), "window": case.window, "shift": case.shift} | options
    if made.get("slopes") == "balanced":
        made["slopes"] = balanced_slopes(case.heads)
    return made


def make_inputs(case: Case) -> list[Tensor]:
    """Query, key and value."""
    shape = (case.batch, *case.size, case.heads)
    return [torch.randn(*shape, channels) for channels in (case.head_dim, case.head_dim, case.value_dim)]


def strided_views(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value (of equal width), none contiguous: slices of one projection, permuted, expanded."""
    (height, width), heads, channels = case.size, case.heads, case.head_dim
    fused = torch.randn(case.batch, height, width, 2, heads, channels).to(dtype)
    return [
        fused[..., 0, :, :],
        torch.randn(case.batch, heads, channels, height, width).to(dtype).permute(0, 3, 4, 1, 2),
        torch.randn(1, height, width, 1, channels).to(dtype).expand(case.batch, height, width, heads, channels),
    ]


def outputs_and_gradients(inputs: list[Tensor], dtype: torch.dtype, backend: str, **options) -> list[Tensor]:
    """Output and the gradients of query, key and value in `dtype`, against the same random tensor each time."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    output = window_retention(*leaves, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator).bfloat16()  # exact in every dtype
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def compare(actual: list[Tensor], expected: list[Tensor], tolerances: tuple[float, float]) -> None:
    """Compare output and gradients, each by its largest absolute value."""
    gradients = [g.abs().max().item() for g in expected[1:] if g.numel()]
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        name = ("output", "grad_query", "grad_key", "grad_value")[i]
        assert a.shape == e.shape, name
        if e.numel():
            # A gradient that decays away altogether is compared with the other gradients' size.
            scale = max(e.abs().max().item(), 1e-3 * max(gradients) if i else 0.0, 1e-30)
            error = (a.double() - e.double()).abs().max().item() / scale
            assert error < tolerances[i > 0], f"{name}: {error:.1e}"


def check(inputs: list[Tensor], backend: str, dtype: torch.dtype = torch.float32, **options) -> None:
    """Compare output and every gradient of `backend` in `dtype` with the float64 reference on the same numbers."""
    inputs = [x.to(dtype) for x in inputs]
    expected = outputs_and_gradients(inputs, torch.float64, "reference", **options)
    actual = outputs_and_gradients(inputs, dtype, backend, **options)
    assert all(tensor.dtype == dtype for tensor in actual)
    compare(actual, expected, TOLERANCES[dtype])
