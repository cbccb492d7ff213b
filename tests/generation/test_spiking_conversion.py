"""ANN2SNN: quantised activations and the neurons in their place, against the authors' code; conversion and tuning."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from generation.spiking_diffusion.conversion import OFFICIALLY_SIGNED, conversion_error, convert
from generation.spiking_diffusion.conversion_tuning import tune
from generation.spiking_diffusion.quantized_unet import ConvertedNeuron, QuantizedReLU, QuantizedUNet2DModel

GOLDEN = Path(__file__).parent.parent / "golden" / "spiking"
SCHEDULER = DDPMScheduler(num_train_timesteps=20, beta_end=0.3)
EXACT = {"rtol": 0, "atol": 1e-12}
TOLERANCES = {torch.float64: {"rtol": 0, "atol": 1e-9}, torch.float32: {"rtol": 0, "atol": 1e-5}}
SIGNED = {"signed": True, "unsigned_official": OFFICIALLY_SIGNED, "unsigned_all": False}
SMALL = {
    "sample_size": 4,
    "in_channels": 1,
    "channels": 8,
    "channel_multipliers": (1, 2),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "num_train_timesteps": 20,
}


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"ann2snn_{name}.safetensors")


def official_state() -> dict[str, Tensor]:
    return {name.removeprefix("sd."): value for name, value in golden("unet").items() if name.startswith("sd.")}


def with_clip(activation: QuantizedReLU | ConvertedNeuron, clip: Tensor) -> QuantizedReLU | ConvertedNeuron:
    activation.double().clip.data.copy_(clip)
    return activation


def batch_first(value: Tensor, steps: int) -> Tensor:
    """`[T B, ...]` -> `[B, T, ...]`, as the authors have it."""
    return value.unflatten(0, (steps, -1)).transpose(0, 1)


def converted_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that a quantised network's weights have in the authors' converted one."""
    plain = ("main", "shortcut", "head")
    return {
        name if any(word in name for word in plain) else re.sub(r"(\.[^.]+\.[^.]+)$", r".block\1", name): value
        for name, value in state.items()
    }


def small_network(seed: int = 0, **options) -> QuantizedUNet2DModel:
    """Of random weights with a say, and of norms that have seen something."""
    torch.manual_seed(seed)
    model = QuantizedUNet2DModel(**SMALL | options)
    for name, parameter in model.named_parameters():
        if name.endswith("clip"):
            parameter.data.uniform_(1.5, 2.5)
        elif name.endswith(("conv2.weight", "read_out.conv.weight")):
            torch.nn.init.xavier_uniform_(parameter)
        elif ".norm" in name:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    if model.config.norm == "batch":
        model.train()
        for _ in range(30):
            model(torch.randn(16, 1, 4, 4), torch.randint(20, (16,)))
    return model.eval()


def with_bad_clip(ann: QuantizedUNet2DModel) -> QuantizedUNet2DModel:
    ann.mid_blocks[0].activation1.clip.data.fill_(-1)
    return ann


def small_batch(count: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(count, 1, 4, 4, generator=generator, dtype=dtype)
    return sample, torch.randint(20, (count,), generator=generator)


def stripes(count: int, seed: int = 0) -> Tensor:
    """`[count, 1, 4, 4]` images of rows that are black or white."""
    rows = torch.randint(2, (count, 1, 4, 1), generator=torch.Generator().manual_seed(seed))
    return (2.0 * rows - 1).repeat(1, 1, 1, 4)


def striped_batch(count: int = 256, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    timestep = torch.randint(20, (count,), generator=generator)
    noise = torch.randn(count, 1, 4, 4, generator=generator)
    return SCHEDULER.add_noise(stripes(count, seed), noise, timestep), timestep


@cache
def trained_network(norm: str, bits: int) -> QuantizedUNet2DModel:
    torch.manual_seed(0)
    model = QuantizedUNet2DModel(**SMALL | {"channel_multipliers": (1,), "dropout": 0.0, "norm": norm, "bits": bits})
    for activation in model.modules():
        if isinstance(activation, QuantizedReLU):
            activation.clip.data.fill_(2)
    optimizer, images = torch.optim.Adam(model.parameters(), 5e-3), stripes(64)
    for _ in range(60):
        noise, timestep = torch.randn(64, 1, 4, 4), torch.randint(20, (64,))
        loss = F.mse_loss(model(SCHEDULER.add_noise(images, noise, timestep), timestep).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def networks(norm: str, bits: int) -> tuple[QuantizedUNet2DModel, QuantizedUNet2DModel]:
    """A fresh conversion of the trained network, and that network."""
    ann = trained_network(norm, bits)
    return convert(ann), ann


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_quantized_relu_is_the_authors(bits):
    expected = {name.removeprefix(f"qrelu.b{bits}."): value for name, value in golden("quant").items()}
    activation = with_clip(QuantizedReLU(bits), expected["alpha"])
    x = expected["x"].requires_grad_()
    y = activation(x)
    y.backward(expected["grad_y"])
    assert_close(y, expected["y"], **EXACT)
    assert_close(x.grad, expected["grad_x"], **EXACT)
    assert_close(activation.clip.grad, expected["grad_alpha"], **EXACT)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("current", ["const", "varying"])
@pytest.mark.parametrize("steps", [3, 7], ids="T{}".format)
def test_neurons_are_the_authors(steps, current, signed):
    expected = golden("if")
    neuron = with_clip(ConvertedNeuron(steps, signed), expected[f"if.T{steps}.alpha"])
    spikes = neuron(expected[f"if.T{steps}.{current}.x"].transpose(0, 1).flatten(0, 1))
    assert_close(batch_first(spikes, steps), expected[f"if.T{steps}.{current}.spikes_scaled.signed{signed:d}"], **EXACT)
    mean = spikes.unflatten(0, (steps, -1)).mean(0)
    if signed:
        assert_close(mean, expected[f"if.T{steps}.{current}.last_mean.signed1"], **EXACT)
    if current == "const":
        assert_close(mean, expected[f"if.T{steps}.const.quant_ann"], **EXACT)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_the_mean_of_spikes_of_a_constant_current_is_the_quantized_value(bits, signed):
    current = 4 * torch.randn(500, dtype=torch.float64)
    clip, steps = torch.tensor(2.7), 2**bits - 1
    spikes = with_clip(ConvertedNeuron(steps, signed), clip)(current.repeat(steps))
    quantized = with_clip(QuantizedReLU(bits), clip)(current)
    assert_close(spikes.unflatten(0, (steps, -1)).mean(0), quantized, **EXACT)
    assert len(quantized.unique()) == 2**bits


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_quantized_network_is_the_authors(dtype):
    expected, ann = golden("unet"), QuantizedUNet2DModel.from_official(official_state(), 2).to(dtype)
    with torch.no_grad():
        (_, embedding, _), *_, (_, _, prediction) = ann.trace(expected["x"].to(dtype), expected["t"])
    assert_close(prediction, expected["y_ann"].to(dtype), **TOLERANCES[dtype])
    assert_close(embedding, expected["ann.temb"].to(dtype), **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("signed", SIGNED)
def test_converted_network_is_the_authors(signed, dtype):
    expected = golden("unet")
    ann = QuantizedUNet2DModel.from_official({"ema_model": official_state(), "net_model": {}}, 2).to(dtype)
    with torch.no_grad():
        trace = list(convert(ann, signed=SIGNED[signed]).trace(expected["x"].to(dtype), expected["t"]))
    assert_close(trace[-1][2], expected[f"y_snn.{signed}"].to(dtype), **TOLERANCES[dtype])
    if signed == "signed":
        assert_close(batch_first(trace[0][1], 3), expected["snn.temb"].to(dtype), **TOLERANCES[dtype])
        assert_close(batch_first(trace[0][2], 3), expected["snn.down0"].to(dtype), **TOLERANCES[dtype])


@pytest.mark.parametrize("kind", ["converted", "quantized"])
def test_official_files_are_told_apart(tmp_path, kind):
    state = official_state()
    names = {
        f"module.{name}": value for name, value in (converted_names(state) if kind == "converted" else state).items()
    }
    torch.save({"ema_model": names}, tmp_path / "converted_snn.pt")
    model = QuantizedUNet2DModel.from_official(tmp_path / "converted_snn.pt", 2)
    assert model.config.snn_timesteps == (3 if kind == "converted" else None)
    assert (model.config.channels, model.config.channel_multipliers) == (32, (1,))
    for name, value in QuantizedUNet2DModel.from_official(state, 2).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("multipliers", "parameters"), [((1, 2, 2, 2), 34_292_295), ((1, 2, 2, 4), 66_551_111)], ids=["1222", "1224"]
)
def test_parameters_are_as_many_as_published(multipliers, parameters):
    with torch.device("meta"):
        model = QuantizedUNet2DModel(channel_multipliers=multipliers)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("options", [{}, {"norm": "batch", "num_class_embeds": 3}], ids=["group", "batch, classes"])
@pytest.mark.parametrize(
    ("pipeline", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)], ids=["ddpm", "ddim"]
)
def test_stock_pipelines_draw_with_a_saved_conversion(tmp_path, pipeline, scheduler, options):
    spiking = convert(small_network(**options), signed=("time_embedding", "up_blocks.0"))
    spiking.save_pretrained(tmp_path)
    loaded = QuantizedUNet2DModel.from_pretrained(tmp_path)
    assert [name for name, neuron in loaded.neurons().items() if neuron.signed] == [
        "time_embedding.activation",
        *(f"up_blocks.0.{part}" for part in ("activation1", "time_activation", "activation2")),
    ]
    drawn = [
        pipeline(unet, scheduler(num_train_timesteps=20))(
            num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
        for unet in (spiking, loaded)
    ]
    assert drawn[0].shape == (1, 4, 4, 1)
    assert (drawn[0] == drawn[1]).all()


def test_a_name_of_signed_neurons_ends_at_a_dot():
    model = QuantizedUNet2DModel(**SMALL | {"layers_per_block": 5}, snn_timesteps=3, signed=("up_blocks.1",))
    assert len(model.up_blocks) > 10
    signed = {name.rpartition(".")[0] for name, neuron in model.neurons().items() if neuron.signed}
    assert signed == {"up_blocks.1"}


@pytest.mark.parametrize("steps", [None, 3], ids=["quantised", "converted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loaded_in_another_data_type(dtype, steps, tmp_path):
    QuantizedUNet2DModel(**SMALL | {"norm": "batch", "snn_timesteps": steps}).save_pretrained(tmp_path)
    loaded = QuantizedUNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=False).eval()
    assert {value.dtype for value in loaded.state_dict().values()} == {dtype, torch.int64}
    assert loaded(torch.zeros(1, 1, 4, 4, dtype=dtype), 3).sample.dtype == dtype


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_batch_norm_commutes_with_the_mean_over_time(bits, norm):
    """The first spikes are of constant currents, and so exact; then comes the first norm of a current that varies."""
    ann = small_network(norm=norm, bits=bits).double()
    ann.time_embedding.linear2.weight.data.zero_()
    normed = []
    for network in (ann, convert(ann)):
        network.down_blocks[0].norm2.register_forward_hook(lambda module, given, output: normed.append(output))
        network(*small_batch(dtype=torch.float64))
    error = (normed[1].unflatten(0, (2**bits - 1, -1)).mean(0) - normed[0]).abs().max()
    assert error < 1e-12 if norm == "batch" or bits == 1 else error > 1e-3


def test_batch_norm_converts_better_than_group_norm():
    errors = {norm: conversion_error(*networks(norm, 3), *striped_batch()) for norm in ("batch", "group")}
    assert errors["batch"] < 0.75 * errors["group"]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_more_time_steps_than_levels_lessen_the_error(norm):
    ann = small_network(norm=norm, bits=4)
    errors = [conversion_error(convert(ann, steps), ann, *small_batch()) for steps in (3, 15)]
    assert errors[1] < 0.5 * errors[0]


def test_converting_copies_the_weights_and_their_type():
    ann = small_network(norm="batch", num_class_embeds=3).double()
    spiking = convert(ann)
    assert spiking.dtype == torch.float64
    assert not spiking.time_embedding.table.requires_grad
    sample, timestep = small_batch(dtype=torch.float64)
    labels = torch.arange(16) % 3
    before = ann(sample, timestep, labels).sample
    spiking.stem_conv.weight.data.zero_()
    assert torch.equal(ann(sample, timestep, labels).sample, before)
    assert not torch.equal(ann(sample, timestep).sample, before)


def test_plain_relu_is_the_limit_of_many_bits():
    plain, fine = small_network(bits=32), small_network(bits=16)
    fine.load_state_dict(plain.state_dict(), strict=False)
    for name, parameter in fine.named_parameters():
        if name.endswith("clip"):
            parameter.data.fill_(20)
    assert_close(fine(*small_batch()).sample, plain(*small_batch()).sample, rtol=0, atol=0.02)


@pytest.mark.parametrize("gradient", ["surrogate", "twin"])
def test_tuning_brings_the_networks_closer(gradient):
    spiking, ann = networks("group", 3)
    before = conversion_error(spiking, ann, *striped_batch())
    clips = {name: value.clone() for name, value in spiking.state_dict().items() if name.endswith("clip")}
    options = {"learning_rate": 2e-3, "scheduler": SCHEDULER, "progress": False}
    errors = tune(spiking, ann, stripes(256), 8, gradient=gradient, **options)
    assert [error.name for error in errors] == list(ann.blocks())
    assert sum(error.after < error.before for error in errors) >= len(errors) - 1
    assert conversion_error(spiking, ann, *striped_batch()) < 0.85 * before
    assert all(torch.equal(value, spiking.state_dict()[name]) for name, value in clips.items())
    assert all(parameter.grad is None for parameter in spiking.parameters())


def test_tuning_is_repeatable():
    ann = small_network(channel_multipliers=(1,))
    tuned = [convert(ann), convert(ann)]
    errors = [tune(network, ann, stripes(4), 2, batch_size=4, progress=False) for network in tuned]
    assert errors[0] == errors[1]
    assert all(map(torch.equal, *(network.state_dict().values() for network in tuned)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 17}, "bits is 17; it must be from 1 to 16, or 32"),
        ({"norm": "layer"}, "norm is 'layer'; valid are 'group', 'batch'"),
        ({"norm_num_groups": 3}, "norm_num_groups is 3; it must divide channels, 8"),
        ({"channels": 7}, "channels is 7; it must be even"),
        ({"channel_multipliers": ()}, "channel_multipliers is empty"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"layers_per_block": 0}, "layers_per_block is 0"),
        ({"signed": True}, "signed is True; without snn_timesteps"),
        ({"snn_timesteps": 0}, "snn_timesteps is 0; it must be a whole number of at least 1"),
        ({"snn_timesteps": 3, "bits": 32}, "snn_timesteps is 3 and bits is 32"),
        (
            {"snn_timesteps": 3, "signed": ("tail",)},
            "signed names 'tail'; valid are names, whole or up to a dot, of tim",
        ),
        (
            {"snn_timesteps": 3, "signed": "up_blocks"},
            "signed is 'up_blocks'; it must be True, False or a tuple of name",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(map(str, value.values())),
)
def test_arguments_of_the_network(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        QuantizedUNet2DModel(**SMALL | options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda ann: convert(convert(ann)), "ann spikes for 3 steps already"),
        (lambda ann: convert(small_network(bits=32)), "ann has bits=32"),
        (lambda ann: convert(ann, 0), "steps is 0; it is at least 1"),
        (lambda ann: convert(with_bad_clip(ann)), "ann has mid_blocks.0.activation1.clip = -1.0"),
        (lambda ann: ann(torch.zeros(1, 1, 3, 4), 0), "sample has the shape (1, 1, 3, 4)"),
        (lambda ann: ann(torch.zeros(1, 1, 4, 4), 20), "timestep is 20; it must be a whole number from 0 to 19"),
        (
            lambda ann: ann(torch.zeros(1, 1, 4, 4).double(), 1),
            "sample is of torch.float64; it must be of torch.float32",
        ),
        (lambda ann: ann(torch.zeros(1, 1, 4, 4), "a"), "timestep is 'a'; it must be a whole number from 0 to 19"),
        (lambda ann: QuantizedUNet2DModel.from_official({"a": torch.zeros(1)}, 2), "is not one of ANN2SNN: it lacks"),
        (lambda ann: QuantizedUNet2DModel.from_official(official_state(), 32), "bits is 32, but the checkpoint has"),
        (lambda ann: tune(ann, ann, torch.zeros(1, 1, 4, 4), 1), "spiking must be a spiking network"),
        (lambda ann: tune(convert(ann), ann, torch.zeros(1, 1, 4, 4), 0), "steps_per_block is 0; it must be above 0"),
        (
            lambda ann: tune(convert(ann), ann, torch.zeros(1, 1, 4, 4), 1, class_labels=torch.zeros(2)),
            "class_labels has the shape (2,); there are 1 images",
        ),
        (
            lambda ann: tune(convert(ann), ann, torch.zeros(1, 1, 4, 4), 1, gradient="exact"),
            "gradient is 'exact'; valid are 'surrogate', 'twin'",
        ),
        (
            lambda ann: tune(convert(ann, signed=True), ann, torch.zeros(1, 1, 4, 4), 1),
            "gradient is 'surrogate', which signed neurons do not have",
        ),
        (lambda ann: tune(convert(ann), ann, torch.zeros(0, 1, 4, 4), 1), "the number of images is 0"),
        (
            lambda ann: tune(convert(ann), small_network(layers_per_block=2), torch.zeros(1, 1, 4, 4), 1),
            "has the blocks",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_say_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call(small_network())
