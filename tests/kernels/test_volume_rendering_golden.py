"""Volume rendering against outputs of nerfacc, nerfstudio and Switch-NeRF (Mega-NeRF)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kernels.volume_rendering import Composited, composite, expected_depth, median_depth

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "nerf" / "volrend.safetensors")
BACKENDS = ("reference", "torch", "native")
RAYS, SAMPLES = GOLDEN["sigmas"].shape
OFFSETS = torch.arange(0, RAYS * SAMPLES + 1, SAMPLES)

every_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    expected = expected.double().reshape(actual.shape)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def flat(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """One row a sample."""
    return GOLDEN[name].to(dtype).flatten(0, 1)


def check_nerfacc(backend: str, dtype: torch.dtype) -> None:
    density, colour = (flat(name, dtype).requires_grad_() for name in ("sigmas", "rgbs"))
    distances, background = [flat(name, dtype) for name in ("t_starts", "t_ends")], GOLDEN["bkgd"].to(dtype)
    out = composite(density, colour, *distances, OFFSETS, background=background, backend=backend)
    depth = expected_depth(out.depth, out.opacity)
    close(out.weights, GOLDEN["nerfacc.weights"])
    close(out.colour, GOLDEN["nerfacc.colors"])
    close(out.opacity, GOLDEN["nerfacc.opacities"])
    close(out.depth, GOLDEN["nerfacc.depths_accumulated"])
    close(depth, GOLDEN["nerfacc.depths_expected"])
    loss = (out.colour * GOLDEN["grad_color"].to(dtype)).sum()
    loss = loss + (depth[3:] * GOLDEN["grad_depth"][3:, 0].to(dtype)).sum()
    of_density, of_colour = torch.autograd.grad(loss, (density, colour))
    # An error of float32 is one of the largest numbers that cancel.
    scale = GOLDEN["nerfacc.grad_sigmas"].abs().max().clamp(min=1)
    close(of_density / scale, GOLDEN["nerfacc.grad_sigmas"] / scale)
    close(of_colour, GOLDEN["nerfacc.grad_rgbs"])


def check_packed(backend: str, dtype: torch.dtype) -> None:
    """Rays of any lengths, one of them empty, over black."""
    names = ("sigmas", "rgbs", "t_starts", "t_ends")
    counts = torch.bincount(GOLDEN["packed.ray_indices"], minlength=RAYS)
    assert not counts.all()
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    given = [GOLDEN[f"packed.{name}"].to(dtype) for name in names]
    out = composite(*given, offsets, backend=backend)
    close(out.weights, GOLDEN["packed.weights"])
    close(out.colour, GOLDEN["packed.colors"])
    close(out.opacity, GOLDEN["packed.opacities"])
    close(expected_depth(out.depth, out.opacity), GOLDEN["packed.depths"])


@every_backend
@each_dtype
def test_nerfacc(backend, dtype):
    check_nerfacc(backend, dtype)


@every_backend
@each_dtype
def test_packed_nerfacc(backend, dtype):
    check_packed(backend, dtype)


@every_backend
def test_nerfstudio(backend):
    start, end = flat("ns.piecewise_starts"), flat("ns.piecewise_ends")
    colour, middle = flat("rgbs"), (start + end) / 2
    last = colour.view(RAYS, SAMPLES, 3)[:, -1]
    for name, background in (("black", torch.zeros(3)), ("white", torch.ones(3)), ("last_sample", last)):
        out = composite(flat("sigmas"), colour, start, end, OFFSETS, background=background, backend=backend)
        close(out.colour, GOLDEN[f"ns.rgb_{name}"])
    close(out.weights, GOLDEN["ns.weights"])
    close(out.opacity, GOLDEN["ns.accumulation"])
    depth = expected_depth(out.depth, out.opacity, convention="nerfstudio", middle=middle)
    close(depth, GOLDEN["ns.depth_expected"])
    close(median_depth(out.weights, start, end, OFFSETS), GOLDEN["ns.depth_median"])


def mega_nerf(last: str, backend: str) -> tuple[Composited, Tensor]:
    """Intervals that begin at the samples, the last one of a given length."""
    start = GOLDEN["mega.z_vals"]
    length = torch.cat([start.diff(dim=1), GOLDEN[f"mega.last_delta_{last}"]], 1)
    ends = (start + length).flatten()
    return composite(flat("sigmas"), flat("rgbs"), start.flatten(), ends, OFFSETS, backend=backend), start


@every_backend
@pytest.mark.parametrize("last", ["fg", "inf"])
def test_mega_nerf(last, backend):
    """Its transmittance is a product of 1 - alpha + 1e-8, and its depth that of where samples begin."""
    out, start = mega_nerf(last, backend)
    weights = out.weights.view(RAYS, SAMPLES)
    close(weights, GOLDEN[f"mega.{last}.weights_coarse"])
    close(out.colour, GOLDEN[f"mega.{last}.rgb_coarse"])
    close((weights * start).sum(1), GOLDEN[f"mega.{last}.depth_coarse"])
    close(1 - out.opacity, GOLDEN[f"mega.{last}.bg_lambda_coarse"])
