"""The pretrained EfficientNet-Lite0 that the linear probe stands on."""

import pytest
import torch
from PIL import Image
from timm.data import create_transform

from vision.in_memory_images import TensorImages
from vision.linear_probe import efficientnet_lite0, pooled_features


@pytest.fixture(scope="module")
def model():
    return efficientnet_lite0()


@pytest.mark.parametrize(("photo", "classes"), [("chelsea", {281, 282, 285}), ("coffee", {504, 967})])
def test_it_recognises_photographs(photo, classes, model):
    """ImageNet's cats (tabby, tiger, Egyptian), and a mug or espresso."""
    from skimage import data

    transform = create_transform(224, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.875)
    with torch.inference_mode():
        logits = model(transform(Image.fromarray(getattr(data, photo)()))[None])
    assert int(logits.argmax()) in classes


def test_features_are_those_before_the_classifier(model):
    pictures = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = TensorImages(pictures, torch.arange(5), (0.5,) * 3, (0.5,) * 3)
    features, labels = pooled_features(model, dataset, batch_size=2)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    with torch.inference_mode():
        expected = model(dataset.__getitems__([0, 1, 2, 3, 4])[0])
        torch.testing.assert_close(model.classifier(features), expected, rtol=1e-4, atol=1e-4)
