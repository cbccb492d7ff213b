"""Bins of rays and the losses of their weights: nerfstudio's and Mega-NeRF's outputs, and what can be said by hand."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from generation.radiance_field.ray_samplers import (
    RayBins,
    annealed,
    distortion_loss,
    from_spacing,
    interlevel_loss,
    inverse_cdf,
    stratified_bins,
    to_spacing,
)

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "nerf" / "volrend.safetensors")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def coarse_bins() -> RayBins:
    return stratified_bins(GOLDEN["ns.near"][:, 0], GOLDEN["ns.far"][:, 0], 24, spacing="piecewise")


def test_piecewise_bins_of_nerfstudio():
    bins = coarse_bins()
    close(bins.edges[:, :-1], GOLDEN["ns.spacing_starts"])
    close(bins.edges[:, 1:], GOLDEN["ns.spacing_ends"])
    close(bins.start, GOLDEN["ns.piecewise_starts"])
    close(bins.end, GOLDEN["ns.piecewise_ends"])


@pytest.mark.parametrize(("keep_edges", "name"), [(False, "excl"), (True, "incl")])
def test_resampled_bins_of_nerfstudio(keep_edges, name):
    bins = coarse_bins().resampled(GOLDEN["ns.weights"], 16, keep_edges=keep_edges)
    close(bins.edges, GOLDEN[f"ns.pdf_{name}_spacing_edges"])
    close(bins.distances, GOLDEN[f"ns.pdf_{name}_euclid_edges"])


def test_inverse_cdf_of_mega_nerf():
    expected = GOLDEN["mega.sample_pdf_det"]
    positions = torch.linspace(0, 1, expected.shape[1]).expand_as(expected)
    close(
        inverse_cdf(GOLDEN["mega.sample_pdf_bins"], GOLDEN["mega.sample_pdf_weights"], positions, padding=1e-8),
        expected,
    )


def test_losses_of_nerfstudio():
    coarse = coarse_bins()
    fine = coarse.resampled(GOLDEN["ns.weights"], 16)
    proposals = [(coarse.edges, GOLDEN["ns.weights"])]
    close(interlevel_loss(fine.edges, GOLDEN["ns.fine_weights"], proposals), GOLDEN["ns.interlevel_loss"])
    close(distortion_loss(fine.edges, GOLDEN["ns.fine_weights"]), GOLDEN["ns.distortion_loss"])


@pytest.mark.parametrize("spacing", ["linear", "piecewise"])
def test_spacings_have_inverses(spacing):
    distance = torch.tensor([0.0, 0.05, 0.5, 0.999, 1.0, 1.001, 2.0, 1000.0], dtype=torch.float64)
    value = to_spacing(distance, spacing)
    assert (value.diff() > 0).all()
    torch.testing.assert_close(from_spacing(value, spacing), distance, rtol=1e-9, atol=1e-12)
    distance.requires_grad_()
    from_spacing(to_spacing(distance, spacing), spacing).sum().backward()
    torch.testing.assert_close(distance.grad, torch.ones_like(distance), rtol=1e-9, atol=0)


@pytest.mark.parametrize("jitter", ["single", "each"])
def test_jitter_moves_edges_by_half_a_bin_at_most(jitter):
    near, far = torch.full((200,), 1.0), torch.full((200,), 3.0)
    even = stratified_bins(near, far, 8).edges
    bins = stratified_bins(near, far, 8, jitter=jitter, generator=torch.Generator().manual_seed(3))
    moved = (bins.edges - even) * 8
    assert moved.abs().max() <= 0.5 + 1e-5
    assert moved[:, 1:-1].std() > 0.2
    assert (bins.edges.diff(dim=1) >= 0).all()
    assert ((bins.start >= 1) & (bins.end <= 3 + 1e-6)).all()
    alike = (moved[:, 1:-1] - moved[:, 1:2]).abs().amax()
    assert (alike < 1e-5) == (jitter == "single")
    again = stratified_bins(near, far, 8, jitter=jitter, generator=torch.Generator().manual_seed(3))
    assert torch.equal(bins.edges, again.edges)


@pytest.mark.parametrize("jitter", ["none", "single", "each"])
def test_resampled_bins_go_where_the_weight_is(jitter):
    bins = stratified_bins(torch.zeros(50), torch.ones(50), 10)
    weights = torch.zeros(50, 10)
    weights[:, 3] = 1
    weights.requires_grad_()
    drawn = bins.resampled(weights, 40, padding=1e-4, jitter=jitter, generator=torch.Generator().manual_seed(0))
    assert drawn.edges.shape == (50, 41)
    assert not drawn.edges.requires_grad
    assert (drawn.edges.diff(dim=1) >= 0).all()
    within = (drawn.edges >= 0.3) & (drawn.edges <= 0.4)
    assert within.float().mean() > 0.95
    kept = bins.resampled(weights, 40, keep_edges=True)
    assert kept.edges.shape == (50, 52)
    assert all((kept.edges == edge).any(1).all() for edge in bins.edges[0])


@pytest.mark.parametrize("padding", [0.0, 0.01])
def test_without_weight_all_bins_count_alike(padding):
    edges = torch.tensor([[0.0, 0.1, 0.7, 1.0]])
    positions = torch.tensor([[0.0, 1 / 6, 0.5, 5 / 6, 1.0]])
    found = inverse_cdf(edges, torch.zeros(1, 3), positions, padding=padding)
    close(found, torch.tensor([[0.0, 0.05, 0.4, 0.85, 1.0]]))


def test_annealing():
    weights = torch.tensor([0.0, 0.25, 1.0])
    assert annealed(weights, 0).tolist() == [1, 1, 1]
    close(annealed(weights, 100), weights ** (1 / 1.9))
    assert torch.equal(annealed(weights, 1000), weights)
    assert torch.equal(annealed(weights, 5000), weights)


def test_distortion_is_the_double_sum():
    edges = torch.rand(7, 20, dtype=torch.float64).sort(1).values
    weights = torch.rand(7, 19, dtype=torch.float64, requires_grad=True)
    middle, length = (edges[:, 1:] + edges[:, :-1]) / 2, edges.diff(dim=1)
    between = weights[:, :, None] * weights[:, None] * (middle[:, :, None] - middle[:, None]).abs()
    expected = (between.sum((1, 2)) + (weights.square() * length).sum(1) / 3).mean()
    actual = distortion_loss(edges, weights)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, weights)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_interlevel_loss_reaches_the_proposals_alone():
    edges, outer = torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[0.0, 0.25, 1.0]])
    weights, bound = torch.tensor([[0.9, 0.1]], requires_grad=True), torch.tensor([[0.1, 0.2]], requires_grad=True)
    loss = interlevel_loss(edges, weights, [(outer, bound)])
    # The first bin touches both of the proposal's, 0.3 together, and lacks 0.6; the second one is below its bound.
    assert loss.item() == pytest.approx(0.6**2 / 0.9 / 2, rel=1e-5)
    loss.backward()
    assert weights.grad is None
    assert (bound.grad < 0).all()
    assert interlevel_loss(edges, weights, []).item() == 0


def test_far_away_bins_are_even_in_inverse_distance():
    bins = stratified_bins(torch.full((1,), 1.0), torch.full((1,), math.inf), 4, spacing="piecewise")
    close(1 / bins.distances, torch.tensor([[1.0, 0.75, 0.5, 0.25, 0.0]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"near": torch.zeros(2, 1)}, r"near has shape \(2, 1\) and far \(2,\); both must be \(R,\)"),
        ({"spacing": "log"}, "spacing is 'log'; valid are 'linear', 'piecewise'"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"jitter": "some"}, "jitter is 'some'; valid are 'none', 'single', 'each'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        stratified_bins(**{"near": torch.zeros(2), "far": torch.ones(2), "samples": 3} | changes)


def test_weights_must_fit_the_bins():
    with pytest.raises(ValueError, match=r"with weights \(1, 3\) they must be \(1, 4\) and \(1, P\)"):
        inverse_cdf(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, 2), padding=0.0)
