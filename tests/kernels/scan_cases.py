"""Inputs of gated scans for tests, and their comparison with the float64 definition."""

from pathlib import Path

import torch
from torch import Tensor

GOLDEN = sorted((Path(__file__).parent.parent / "golden" / "vig").glob("kernel_*.safetensors"))
EXTREME_GATES = ("0", "-1e-6", "-30", "-1e4", "mixed")
# (output, gradients), of the largest absolute value of each tensor
TOLERANCES = {torch.float64: (1e-12, 1e-11), torch.float32: (2e-6, 1e-5)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        assert actual.shape == expected.shape
        return 0.0
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def gates(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Log decays: "usual" (ViG at its initialisation), "mixed" (from none to total, token by token) or one number."""
    if kind == "usual":
        return torch.nn.functional.logsigmoid(torch.randn(shape)) / 16
    if kind == "mixed":
        return torch.tensor([0.0, -1e-6, -0.05, -30.0, -1e4])[torch.randint(5, shape)]
    return torch.full(shape, float(kind))


def make_inputs(batch: int, tokens: int, heads: int, key_dim: int, value_dim: int, gate: str = "usual") -> list[Tensor]:
    """Query, key, value and the log decays of both directions."""
    shape = (batch, tokens, heads)
    key_shape, value_shape = (*shape, key_dim), (*shape, value_dim)
    return [
        torch.randn(key_shape), torch.randn(key_shape), torch.randn(value_shape),
        gates(gate, key_shape), gates(gate, key_shape),
    ]  # fmt: skip


def strided_views(batch: int, tokens: int, heads: int, dim: int) -> list[Tensor]:
    """Inputs of a scan, none contiguous: slices of one tensor, flipped, repeated, permuted, expanded."""
    fused = torch.randn(batch, tokens, heads, 2 * dim)
    return [
        fused[..., :dim],
        fused[..., dim:].flip(-1)[..., ::2].repeat_interleave(2, -1),
        torch.randn(batch, dim, heads, tokens).permute(0, 3, 2, 1),
        gates("usual", (1, 1, heads, dim)).expand(batch, tokens, heads, dim),
        gates("usual", (heads, dim, tokens, batch)).permute(3, 2, 0, 1),
    ]


def outputs_and_gradients(
    function, inputs: list[Tensor], dtype: torch.dtype, **options
) -> tuple[list[Tensor], list[Tensor]]:
    """Run `function(*inputs, **options)` in `dtype`; gradients are against the same random tensors each time."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(1)
    grads = [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return [o.detach() for o in outputs], [
        torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)
    ]


def check(function, inputs: list[Tensor], backend: str, dtype: torch.dtype = torch.float32, **options) -> None:
    """Compare outputs and every gradient of `backend` in `dtype` with the float64 reference."""
    expected_outputs, expected_gradients = outputs_and_gradients(
        function, inputs, torch.float64, backend="reference", **options
    )
    outputs, gradients = outputs_and_gradients(function, inputs, dtype, backend=backend, **options)
    output_tolerance, gradient_tolerance = TOLERANCES[dtype]
    for i, (actual, expected) in enumerate(zip(outputs, expected_outputs, strict=True)):
        assert relative_error(actual, expected) < output_tolerance, f"output {i}"
    largest = max((g.abs().max().item() for g in expected_gradients if g.numel()), default=1.0)
    for i, (actual, expected) in enumerate(zip(gradients, expected_gradients, strict=True)):
        if not expected.numel():
            assert actual.shape == expected.shape
            continue
        # A gradient that decays away altogether is compared with the other gradients' size.
        scale = max(expected.abs().max().item(), 1e-3 * largest)
        assert (actual.double() - expected).abs().max().item() / scale < gradient_tolerance, f"gradient {i}"
