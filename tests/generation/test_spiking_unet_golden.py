"""The spiking U-Net against tensors computed by the official SDDPM and SDM (tests/golden/spiking), in float64."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from generation.spiking_diffusion.blocks import Activation, Downsample, Firing, ResidualBlock, SpikingConv2d, Upsample
from generation.spiking_diffusion.official_checkpoints import load, rename
from generation.spiking_diffusion.unet import SpikingUNet2DModel

GOLDEN = Path(__file__).parent.parent / "golden" / "spiking"
UNETS = ("unet_sddpm", "unet_tsm")
THRESHOLDS = (0.997, 1.003, 0.95)
CLOSE = {"atol": 1e-10, "rtol": 0}
STORED = 1e-6  # of parameter gradients and running statistics, which are stored as float32


def golden(name: str, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a file by name, without `prefix`, and the state dict among them."""
    tensors = {key.removeprefix(prefix): value for key, value in load_file(GOLDEN / f"{name}.safetensors").items()}
    return tensors, under(tensors, "sd.")


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def official(name: str, dtype: torch.dtype = torch.float64) -> tuple[SpikingUNet2DModel, dict[str, Tensor]]:
    tensors, state = golden(name)
    return load(state).to(dtype), tensors


def predict(model: SpikingUNet2DModel, tensors: dict[str, Tensor], **firing) -> Tensor:
    with torch.no_grad():
        return model(tensors["x"].to(model.dtype), tensors["t"], **firing).sample


def assert_gradients(module: nn.Module, expected: dict[str, Tensor], tolerance: float) -> None:
    """All of them, to a share of the largest: those of biases before a norm are 0 but for rounding."""
    largest = max(value.abs().max().item() for value in expected.values())
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert set(parameters) == set(expected)
    for name, value in expected.items():
        assert_close(parameters[name].grad, value.double(), atol=tolerance * largest, rtol=0)


@pytest.mark.parametrize("name", UNETS)
def test_evaluation(name):
    model, tensors = official(name)
    assert_close(predict(model, tensors), tensors["y_eval"], **CLOSE)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_threshold_guidance(threshold):
    model, tensors = official("unet_tsm")
    assert_close(predict(model, tensors, threshold=threshold), tensors[f"y_eval_th{threshold}"], **CLOSE)
    assert_close(predict(model, tensors), tensors["y_eval"], **CLOSE)


@pytest.mark.parametrize("name", UNETS)
def test_training(name):
    model, tensors = official(name)
    model.train()
    x = tensors["x"].requires_grad_()
    y = model(x, tensors["t"]).sample
    assert_close(y, tensors["y_train"], **CLOSE)
    y.backward(tensors["grad_y"])
    assert_close(x.grad, tensors["grad_x"], **CLOSE)
    assert_gradients(model, rename(under(tensors, "grad.")), STORED)
    buffers = dict(model.named_buffers())
    after = rename(under(tensors, "after."))
    assert len(after) == 2 * sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for key, value in after.items():
        assert_close(buffers[key], value.double(), atol=STORED, rtol=0)


@pytest.mark.parametrize("name", UNETS)
def test_input_gradient_on_running_statistics(name):
    model, tensors = official(name)
    x = tensors["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, tensors["t"]).sample, x, tensors["grad_y"])
    assert_close(gradient, tensors["grad_x_bn_eval"], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_spikes(dtype):
    model, tensors = official("unet_sddpm", dtype)
    names = {
        "neuron": "stem_neuron",
        "downblocks.0.neuron1": "down_blocks.0.neuron1",
        "middleblocks.1.neuron2": "mid_blocks.1.neuron2",
        "upblocks.4.neuron2": "up_blocks.4.neuron2",
    }
    assert set(under(tensors, "spk.")) == set(names)
    seen = {}
    for theirs, ours in names.items():
        model.get_submodule(ours).register_forward_hook(lambda _, __, spikes, name=theirs: seen.update({name: spikes}))
    output = predict(model, tensors)
    for name, spikes in seen.items():
        expected = tensors[f"spk.{name}"]
        assert torch.equal(spikes.to(torch.uint8), expected.flatten(0, 1))
        assert 0 < expected.float().mean() < 1
    assert_close(output.double(), tensors["y_eval"], atol=1e-10 if dtype == torch.float64 else 1e-5, rtol=0)


def test_sddpm_to_tsm():
    tensors, _ = golden("sddpm_to_tsm")
    state = under(tensors, "sd_sddpm.")
    plain, scaled = load(state).double(), load(state, tsm=True).double()
    assert scaled.config.tsm
    assert sum("step_scale" in name for name in scaled.state_dict()) == 26
    for model in (plain, scaled):
        assert_close(predict(model, tensors), tensors["y_eval"], **CLOSE)


CONVOLUTIONS = {"k3": (3, 5, 3, 1, 1), "k3s2": (4, 4, 3, 2, 1), "k1": (6, 2, 1, 1, 0)}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_scaled_convolution(name):
    tensors, state = golden("tsm_conv", f"{name}.")
    layer = SpikingConv2d(*CONVOLUTIONS[name], scaled_steps=4)
    state = {key.removeprefix("tsmconv.").replace("tsmp", "step_scale"): value for key, value in state.items()}
    layer.load_state_dict({key: value.flatten() if key == "step_scale" else value for key, value in state.items()})
    layer.double()
    x = tensors["x"].requires_grad_()
    y = layer(x, 4)
    assert_close(y, tensors["y"], **CLOSE)
    y.backward(tensors["grad_y"])
    assert_close(x.grad, tensors["grad_x"], **CLOSE)
    assert_close(layer.step_scale.grad, tensors["grad.tsmp"].flatten(), **CLOSE)
    for parameter in ("weight", "bias"):
        assert_close(getattr(layer, parameter).grad, tensors[f"grad.tsmconv.{parameter}"], **CLOSE)


def build(block: type[nn.Module], *channels: int, scaled_steps: int = 0) -> nn.Module:
    return block(*channels, partial(Activation, "if"), partial(SpikingConv2d, scaled_steps=scaled_steps))


BLOCKS = {
    "resblock_sddpm": partial(build, ResidualBlock, 6, 8, 16),
    "resblock_sddpm_same": partial(build, ResidualBlock, 8, 8, 16),
    "resblock_tsm": partial(build, ResidualBlock, 6, 8, 16, scaled_steps=4),
    "downsample_sddpm": partial(build, Downsample, 6),
    "upsample_tsm": partial(build, Upsample, 6, scaled_steps=4),
}


def rename_in_block(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = rename({f"block.{name}": value for name, value in state.items()})
    return {name.removeprefix("block."): value for name, value in renamed.items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    tensors, state = golden(name)
    block = BLOCKS[name]()
    block.load_state_dict(rename_in_block(state))
    block.double().eval()
    x, embedding = tensors["x"].requires_grad_(), tensors["temb"].requires_grad_()
    with torch.no_grad():
        assert_close(block(x.flatten(0, 1), embedding, Firing(4)), tensors["y_eval"].flatten(0, 1), **CLOSE)
    y = block.train()(x.flatten(0, 1), embedding, Firing(4))
    assert_close(y, tensors["y_train"].flatten(0, 1), **CLOSE)
    y.backward(tensors["grad_y"].flatten(0, 1))
    assert_close(x.grad, tensors["grad_x"], **CLOSE)
    if "grad_temb" in tensors:
        assert_close(embedding.grad, tensors["grad_temb"], **CLOSE)
    assert_gradients(block, rename_in_block(under(tensors, "grad.")), STORED)
