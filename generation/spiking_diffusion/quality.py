"""How good drawn images of a labelled set are: a Frechet distance, and whether they show the class they were asked for.

Both by a small convolutional classifier, trained here on four fifths of the set: its 64 features before the last
rectifier, standardised by the whole set, give the distance; its verdicts the accuracy. The distance is no FID: it
compares with nothing but itself, so that reports state it beside that of real images and of noise.

Training it takes seconds and depends on the seed alone.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.lina.openmoji import to_signed
from generation.picture_statistics import frechet_distance
from generation.spiking_diffusion.image_sets import LabelledImages

FEATURES = 64
TRAINED_SHARE = 0.8
LEAST_DEVIATION = 1e-6  # of a feature over the real images that is not the same for all
STEPS, BATCH_SIZE, LEARNING_RATE = 1500, 64, 2e-3


class Classifier(nn.Module):
    """`[N, C, S, S]` to `[N, classes]`; `features` to `[N, 64]`, before the last rectifier."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        widths = (in_channels, 16, 32, 64)
        layers: list[nn.Module] = []
        for width, following in pairwise(widths):
            layers += [nn.Conv2d(width, following, 3, padding=1), nn.BatchNorm2d(following), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, FEATURES))
        self.classify = nn.Sequential(nn.ReLU(), nn.Linear(FEATURES, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


@dataclass(frozen=True)
class Quality:
    """Of a set of images.

    Args:
        distance: Frechet distance to the real images, at least 0; small is good.
        accuracy: share of images that the classifier sorts into the class they were asked for; None without labels.
    """

    distance: float
    accuracy: float | None = None


class Judge:
    """A classifier of a labelled set, and the statistics of its features.

    Args:
        data: the set.
        seed: of the classifier: its split, weights and batches.
        steps: for which it is trained.

    Attributes:
        test_accuracy: of the classifier, on the images it was not trained on.

    Raises:
        ValueError: `data` holds less than two images.
    """

    def __init__(self, data: LabelledImages, seed: int = 0, steps: int = STEPS) -> None:
        if len(data) < 2:
            raise ValueError(f"data holds {len(data)} image; a classifier needs at least 2")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(data), generator=generator)
        self.trained, self.tested = order.tensor_split([int(TRAINED_SHARE * len(data))])
        images, labels = to_signed(data.images), data.labels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.classifier = Classifier(images.shape[1], len(data.names))
        optimizer = torch.optim.AdamW(self.classifier.parameters(), LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            chosen = self.trained[torch.randint(len(self.trained), (BATCH_SIZE,), generator=generator)]
            loss = F.cross_entropy(self.classifier(images[chosen]), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.classifier.eval().requires_grad_(False)
        self.test_accuracy = (self.verdicts(images[self.tested]) == labels[self.tested]).float().mean().item()
        features = self._raw_features(images)
        self.mean, deviation = features.mean(0), features.std(0)
        # Of images that are all the same; what is 0 cannot be divided by.
        self.deviation = torch.where(deviation > LEAST_DEVIATION, deviation, 1.0)
        self.real = self.features(images)

    def _raw_features(self, images: Tensor) -> Tensor:
        return torch.cat([self.classifier.features(part) for part in images.split(512)])

    def features(self, images: Tensor) -> Tensor:
        """`[N, C, S, S]` in [-1, 1] to `[N, 64]`, of mean 0 and deviation 1 over the real images."""
        return (self._raw_features(images.float()) - self.mean) / self.deviation

    def verdicts(self, images: Tensor) -> Tensor:
        """The class of each of `[N, C, S, S]` images."""
        return torch.cat([self.classifier(part).argmax(1) for part in images.split(512)])

    def quality(self, images: Tensor, labels: Tensor | None = None) -> Quality:
        """Of `[N, C, S, S]` images in [-1, 1], N at least 2, asked for as `labels`, `[N]`.

        Raises:
            ValueError: there are less than 2 images, or numbers in them that are not finite.
        """
        if not images.isfinite().all():
            raise ValueError("images hold numbers that are not finite; the model that drew them is damaged")
        distance = frechet_distance(self.features(images), self.real)
        if labels is None:
            return Quality(distance)
        return Quality(distance, (self.verdicts(images) == labels).float().mean().item())

    def floor(self) -> Quality:
        """Of the images that the classifier was not trained on, against the others, and its accuracy on them."""
        return Quality(frechet_distance(self.real[self.tested], self.real[self.trained]), self.test_accuracy)

    def ceiling(self, count: int, size: int, channels: int) -> Quality:
        """Of uniform noise; a class is guessed."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(count, channels, size, size, generator=generator) * 2 - 1
        return self.quality(noise, torch.arange(count) % self.classifier.classify[-1].out_features)
