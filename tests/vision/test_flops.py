"""The counter reproduces known counts: GMACs of the official code at 224 by torch's counter, and the scan's formula."""

import pytest
import timm
from torch import nn

import vision  # noqa: F401  registers the models
from vision.flops import count_macs


@pytest.mark.parametrize(
    ("name", "dense", "total"),
    [
        ("vig_tiny_patch16_224", 1.110, 1.197),
        ("vig_small_patch16_224", 4.366, 4.539),
        ("vig_base_patch16_224", 17.315, 17.662),
        ("vig_h_tiny", 4.408, 4.538),
        ("vig_h_small", 8.607, 8.823),
        ("vig_h_base", 15.364, 15.653),
        ("rmt_tiny", 2.363, 2.637),
        ("rmt_small", 4.536, 4.777),
        ("rmt_base", 9.928, 10.373),
        ("rmt_large", 18.868, 19.488),
        ("gated_swin_rmt_tiny_retention", 2.542, 2.570),
        ("swin_tiny_patch4_window7_224", 4.491, 4.491),
    ],
)
def test_published_sizes(name, dense, total):
    macs = count_macs(timm.create_model(name, device="meta"), (3, 224, 224))
    assert macs.dense / 1e9 == pytest.approx(dense, abs=6e-4)
    assert macs.total / 1e9 == pytest.approx(total, abs=6e-4)


@pytest.mark.parametrize(("side", "total"), [(512, 6.25)])
def test_cost_is_linear_in_pixels(side, total):
    macs = count_macs(timm.create_model("vig_tiny_patch16_224", device="meta"), (3, side, side))
    assert macs.total / 1e9 == pytest.approx(total, rel=2e-3)


def test_model_without_mixing():
    macs = count_macs(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Flatten(), nn.Linear(16, 5)), (3, 2, 2))
    assert (macs.dense, macs.mixing) == (3 * 4 * 4 + 16 * 5, 0)
