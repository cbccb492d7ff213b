"""The judge of drawn images: what it says of real images, worse ones and noise, and that it is repeatable."""

import pytest
import torch
from torchvision.transforms.v2.functional import gaussian_blur

from generation.lina.openmoji import to_signed
from generation.spiking_diffusion.evaluation import qualities
from generation.spiking_diffusion.image_sets import LabelledImages, load
from generation.spiking_diffusion.quality import FEATURES, Judge
from generation.spiking_diffusion.shipped_models import load_pipeline

STEPS = 150


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(load("digits"), steps=STEPS)


def real(count: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    data = load("digits")
    return to_signed(data.images[:count]), data.labels[:count]


def test_features_of_real_images_are_standardised(judge):
    features = judge.features(to_signed(load("digits").images))
    assert features.shape == (1797, FEATURES)
    torch.testing.assert_close(features.mean(0), torch.zeros(FEATURES), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(FEATURES), atol=1e-4, rtol=0)


def test_real_images_are_near_and_noise_is_far(judge):
    floor, ceiling = judge.floor(), judge.ceiling(400, 8, 1)
    assert judge.quality(*real(1797)).distance < 0.01
    assert 0 < floor.distance < 0.1 * ceiling.distance
    assert floor.accuracy == judge.test_accuracy > 0.9
    assert judge.quality(*real()).accuracy > 0.95
    assert ceiling.accuracy < 0.3


def test_an_image_of_another_class_is_seen(judge):
    images, labels = real()
    assert judge.quality(images, (labels + 1) % 10).accuracy < 0.05
    assert judge.quality(images).accuracy is None


WORSE = {
    "noise": lambda images, degree: images + degree * torch.randn(images.shape, generator=torch.Generator()),
    "blur": lambda images, degree: gaussian_blur(images, [5, 5], [degree, degree]),
    "one class": lambda images, degree: torch.cat([images, images[:1].repeat(int(400 * degree), 1, 1, 1)]),
}


@pytest.mark.parametrize("how", WORSE)
def test_distance_grows_the_worse_images_are(how, judge):
    images = real()[0]
    distances = [judge.quality(WORSE[how](images, degree)).distance for degree in (0.5, 1.0, 2.0)]
    assert judge.quality(images).distance < distances[0] < distances[1] < distances[2]


def test_a_judge_depends_on_its_seed_alone(judge):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = Judge(load("digits"), steps=STEPS)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, judge.classifier.state_dict().values(), again.classifier.state_dict().values()))
    assert again.floor() == judge.floor()
    assert again.ceiling(100, 8, 1) == judge.ceiling(100, 8, 1)
    assert again.quality(*real(100)) == judge.quality(*real(100))
    other, short = Judge(load("digits"), seed=1, steps=2), Judge(load("digits"), steps=2)
    assert not torch.equal(other.classifier.features[0].weight, short.classifier.features[0].weight)


def test_small_sets():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    judge = Judge(LabelledImages(images, torch.zeros(2, dtype=torch.long), ("all",)), steps=1)
    assert judge.quality(to_signed(images)).distance >= 0
    with pytest.raises(ValueError, match="data holds 1 image; a classifier needs at least 2"):
        Judge(LabelledImages(images[:1], torch.zeros(1, dtype=torch.long), ("all",)), steps=1)


def test_images_that_are_all_the_same(judge):
    assert judge.quality(torch.zeros(20, 1, 8, 8)).distance > judge.floor().distance
    same = LabelledImages(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.zeros(10, dtype=torch.long), ("all",))
    assert Judge(same, steps=1).ceiling(20, 8, 1).distance > 0
    with pytest.raises(ValueError, match="images hold numbers that are not finite"):
        judge.quality(torch.full((20, 1, 8, 8), torch.nan))


def test_the_shipped_model_draws_digits(judge):
    """Measured are 1.5 to 1.7 and 96 to 98.5 %; at a threshold of 0.9, as of a model with a fault, 4.7."""
    [quality], _ = qualities(judge, load_pipeline("digits"), 200, [0], num_inference_steps=10)
    assert quality.distance < 2.3
    assert quality.accuracy > 0.92
