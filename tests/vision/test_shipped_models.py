"""The checkpoints that the suite ships reach the accuracy their configurations state."""

from functools import partial

import pytest
import timm
import torch

import vision  # noqa: F401  registers the models
from vision.in_memory_images import Mnist5k, OpenMoji


@pytest.mark.parametrize(
    ("name", "data", "least"),
    [
        ("vig_nano_patch4_28.mnist5k", Mnist5k, 0.98),
        ("vig_nano_patch4_28.openmoji", OpenMoji, 0.6),
        ("gated_swin_rmt_nano_swat.openmoji", partial(OpenMoji, image_size=48), 0.6),
    ],
)
def test_shipped_checkpoint_keeps_its_accuracy(name, data, least):
    """On the test images of the split, which training never saw."""
    model = timm.create_model(name, pretrained=True).eval()
    images = data()
    images.setup("test")
    assert tuple(model.pretrained_cfg["mean"]) == images.mean
    assert tuple(model.pretrained_cfg["std"]) == images.std
    pixels, labels = images.test_set.__getitems__(list(range(len(images.test_set))))
    with torch.inference_mode():
        predicted = torch.cat([model(batch).argmax(1) for batch in pixels.split(250)])
    assert float((predicted == labels).float().mean()) >= least
