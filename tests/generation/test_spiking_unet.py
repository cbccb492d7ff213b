"""The spiking U-Net as a model: sizes, official checkpoints, state, limits, compiling and saving."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from generation.spiking_diffusion.blocks import SpikingConv2d
from generation.spiking_diffusion.unet import SpikingUNet2DModel

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "channels": 8,
    "channel_multipliers": (1, 2),
    "layers_per_block": 1,
    "num_train_timesteps": 50,
}
KINDS = {
    "if": {},
    "lif": {"neuron": "lif"},
    "soft reset": {"reset_value": None},
    "tsm": {"tsm": True},
    "official": {"official": True},
    "official tsm": {"official": True, "tsm": True},
    "classes": {"num_class_embeds": 3},
    "silu": {"neuron": "silu", "snn_timesteps": 1},
}


def make(**options) -> SpikingUNet2DModel:
    """A model whose every weight matters, in evaluation mode."""
    torch.manual_seed(0)
    model = SpikingUNet2DModel(**SMALL | options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, mean=float(parameter.dim() == 1), std=0.2)
    return model.eval()


def inputs(count: int = 2, classes: int | None = None, channels: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    sample = torch.randn(count, channels, 8, 8, generator=generator)
    labels = None if classes is None else torch.arange(count) % (classes + 1)
    return sample, torch.arange(count) * 7 % 50, labels


def predict(model: SpikingUNet2DModel, *arguments, **firing) -> Tensor:
    with torch.no_grad():
        return model(*arguments, **firing).sample


SIZES = {
    "SDDPM": ({}, 66_696_413),
    "TSM of 4 steps": ({"tsm": True}, 66_696_413 + 67 * 4),
    "TSM of 8 steps": ({"tsm": True, "snn_timesteps": 8}, 66_696_413 + 67 * 8),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    options, expected = SIZES[name]
    with torch.device("meta"):
        model = SpikingUNet2DModel(official=True, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    frozen = [parameter.numel() for parameter in model.parameters() if not parameter.requires_grad]
    assert frozen == [128_000]


def test_the_artificial_twin_has_as_many_parameters():
    spiking, twin = make(), make(**KINDS["silu"])
    assert {k: v.shape for k, v in spiking.state_dict().items()} == {k: v.shape for k, v in twin.state_dict().items()}
    assert not any(neuron.spiking for neuron in twin.neurons().values())
    with pytest.raises(ValueError, match="snn_timesteps is 4 and tsm is False; with neuron='silu' they are 1 and Fa"):
        make(neuron="silu")


THEIRS = [
    (r"^time_embedding.table", "time_embedding.timembedding.0.weight"),
    (r"^time_embedding.linear1", "time_embedding.timembedding.1"),
    (r"^time_embedding.linear2", "time_embedding.timembedding.3"),
    ("stem_conv", "conv"),
    ("stem_norm", "bn"),
    ("entry_conv", "conv_identity"),
    ("entry_norm", "bn_identity"),
    ("mid_blocks", "middleblocks"),
    ("out_norm", "tail_bn"),
    ("out_conv", "tail_conv"),
    ("out_step_conv", "T_output_layer"),
    ("out_step_norm", "last_bn"),
]


def official_state(model: SpikingUNet2DModel) -> dict[str, Tensor]:
    """The state dict of an official model under the authors' names."""
    names = {ours.strip("^"): theirs for ours, theirs in THEIRS}
    state = {}
    for name, value in model.state_dict().items():
        layer = name.rpartition(".")[0]
        head = next((ours for ours in names if name == ours or name.startswith(f"{ours}.")), None)
        name = name if head is None else names[head] + name.removeprefix(head)
        name = name.replace("down_blocks", "downblocks").replace("up_blocks", "upblocks")
        name = name.replace(".norm", ".bn").replace(".time_projection.", ".temb_proj.1.")
        if name.endswith("step_scale"):
            name, value = name.replace("step_scale", "tsmp"), value.view(-1, 1, 1, 1, 1)
        elif name == "T_output_layer.weight":
            value = value[..., None]
        elif model.config.tsm and isinstance(model.get_submodule(layer), SpikingConv2d):
            name = f"{name.rpartition('.')[0]}.tsmconv.{name.rpartition('.')[2]}"
        state[name] = value
    return state


CONFIGURATIONS = {
    "two levels": {},
    "one level": {"channel_multipliers": (1,), "layers_per_block": 2},
    "three levels": {"channel_multipliers": (1, 2, 2), "in_channels": 3},
    "wide first level": {"channel_multipliers": (2, 1), "channels": 6, "layers_per_block": 3},
    "TSM": {"tsm": True, "snn_timesteps": 3},
    "another table": {"num_train_timesteps": 20, "in_channels": 2},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_official_checkpoints_tell_the_configuration(name):
    model = make(official=True, **CONFIGURATIONS[name])
    loaded = SpikingUNet2DModel.from_official(official_state(model))
    told = {key: loaded.config[key] for key in (*SMALL, "snn_timesteps", "tsm", "official") if key != "sample_size"}
    assert told == {key: model.config[key] for key in told} | {"channel_multipliers": told["channel_multipliers"]}
    assert tuple(told["channel_multipliers"]) == tuple(model.config.channel_multipliers)
    arguments = (inputs(channels=model.config.in_channels)[0], torch.tensor(5))
    assert torch.equal(predict(loaded, *arguments), predict(model, *arguments))
    assert not loaded.training


@pytest.mark.parametrize("packing", ["prefix", "net_model", "ema_model", "pt", "safetensors"])
def test_how_official_checkpoints_are_packed(packing, tmp_path):
    model = make(official=True)
    state = official_state(model)
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-4}]}
    checkpoint = {
        "prefix": {f"module.{name}": value for name, value in state.items()},
        "net_model": {"net_model": state, "optim": optimizer, "step": 3, "x_T": torch.zeros(1)},
        "ema_model": {"ema_model": state},
        "pt": tmp_path / "model.pt",
        "safetensors": str(tmp_path / "model.safetensors"),
    }[packing]
    torch.save({"net_model": state, "optim": optimizer, "step": 3}, tmp_path / "model.pt")
    save_file({name: value.contiguous().clone() for name, value in state.items()}, tmp_path / "model.safetensors")
    arguments = inputs()
    assert torch.equal(predict(SpikingUNet2DModel.from_official(checkpoint), *arguments), predict(model, *arguments))


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_foreign_checkpoints_are_refused(tmp_path):
    state = official_state(make(official=True))
    scaled = official_state(make(official=True, tsm=True))
    wrong_shape = state | {"downblocks.0.conv2.weight": torch.zeros(8, 8, 1, 1)}
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "letters.pt").write_text("letters of which the unpickler makes a KeyError")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "text.safetensors").write_text("weights")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"net_model": Evil()}, protocol=2))
    torch.save([1, 2], tmp_path / "list.pt")
    refused = {
        "is not one of SDDPM or SDM: it has no stem_conv.weight": {"layer.weight": torch.zeros(2, 2)},
        "it has no down_blocks.0.conv1.weight": {k: v for k, v in state.items() if "downblocks" not in k},
        "holds no state dict": {"epoch": 3},
        "missing .*'mid_blocks.0": {k: v for k, v in state.items() if "middle" not in k},
        "unexpected .*'other.weight'": state | {"other.weight": torch.zeros(3)},
        "is one of ANN2SNN; QuantizedUNet2DModel.from_official loads it": state | {"head.weight": torch.zeros(3)},
        r"down_blocks.0.conv2.weight is \(8, 8, 1, 1\); others ask for \(8, 8, 3, 3\)": wrong_shape,
        "holds no state dict: expected": {0: torch.zeros(3)},
        "checkpoint does not fit: stem_conv.weight has 1 axes; it must have 4": state | {"conv.weight": torch.zeros(3)},
        "checkpoint is a int; it must be a file or a state dict": 5,
        "there is no such file": tmp_path / "none.pt",
        "a folder; it must be a .pt or .safetensors file": tmp_path,
        r"text.pt' cannot be read as tensors: it must be a file of `torch.save`$": tmp_path / "text.pt",
        "text.safetensors' cannot be read as tensors: it must be a file of safetensors$": tmp_path / "text.safetensors",
        "letters.pt' cannot be read as tensors: it must be a file of `torch.save`$": tmp_path / "letters.pt",
        r"module.pt' cannot .* it holds a torch.nn.modules.linear.Linear, and code .*; save its state dict$": tmp_path
        / "module.pt",
        r"evil.pt' cannot be read as tensors: it holds a \S*print, and code of a file is not run": tmp_path / "evil.pt",
        "list.pt' holds a list; a dict is needed": tmp_path / "list.pt",
    }
    for words, checkpoint in refused.items():
        with pytest.raises(ValueError, match=words) as caught:
            SpikingUNet2DModel.from_official(checkpoint)
        assert "weights_only" not in str(caught.value)
    for steps, words in (
        (0, "snn_timesteps is 0; it must be a whole"),
        (True, "snn_timesteps is True; it must be a whole"),
        (8, "snn_timesteps is 8; the checkpoint has 4"),
    ):
        with pytest.raises(ValueError, match=words):
            SpikingUNet2DModel.from_official(scaled, snn_timesteps=steps)
    assert SpikingUNet2DModel.from_official(state, snn_timesteps=8).config.snn_timesteps == 8


@pytest.mark.parametrize("name", KINDS)
def test_saved_and_loaded(name, tmp_path):
    model = make(**KINDS[name])
    model.save_pretrained(tmp_path)
    loaded = SpikingUNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert loaded.config.neuron == model.config.neuron
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"}.keys() >= SMALL.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    arguments = inputs(classes=model.config.num_class_embeds)
    assert_close(predict(loaded, *arguments), predict(model, *arguments), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_calls_share_no_state(name):
    """The official sampler starts a batch with the membranes of the one before, and fails if its size is another."""
    model = make(**KINDS[name])
    classes = model.config.num_class_embeds
    first = predict(model, *inputs(2, classes))
    assert predict(model, *inputs(3, classes)).shape == (3, 1, 8, 8)
    assert torch.equal(predict(model, *inputs(2, classes)), first)
    assert first.std() > 0.01


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_learns(name):
    model = make(**KINDS[name]).train()
    model(*inputs(4, model.config.num_class_embeds)).sample.square().sum().backward()
    still = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert still == []
    assert model.time_embedding.table.grad is None


def test_one_step_of_time():
    model = make(snn_timesteps=1)
    assert model.readout_weights(1).tolist() == [1.0]
    output = predict(model, *inputs())
    longer = make(snn_timesteps=4)
    assert torch.equal(predict(longer, *inputs(), snn_timesteps=1), output)
    assert not torch.equal(predict(longer, *inputs()), output)


@pytest.mark.parametrize(("threshold", "rate"), [(1e30, 0.0), (1e-9, 1.0)], ids=["all silent", "all firing"])
def test_limits(threshold, rate):
    """Whatever the image, the same: nothing of it passes neurons that never, or always, fire."""
    model = make()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.bias.data.fill_(1000.0)  # currents above 0, and so are those through the shortcuts
    for block in (*model.down_blocks, *model.up_blocks):
        if getattr(block, "shortcut", None) is not None:
            block.shortcut.weight.data.abs_()
    rates = []
    for neuron in model.neurons().values():
        neuron.register_forward_hook(lambda _, __, spikes: rates.append(spikes.mean().item()))
    sample, timestep, _ = inputs()
    output = predict(model, sample / 100, timestep[:1], threshold=threshold)
    assert set(rates) == {rate}
    assert torch.equal(output[0], output[1])
    assert output.isfinite().all()


def test_threshold_guidance_by_name():
    model = make()
    plain, given = predict(model, *inputs()), {"up_blocks": 0.5, "up_blocks.0": 2.0, "stem_neuron": 0.9}
    assert predict(model, *inputs(), threshold=given).ne(plain).any()
    firing = model.firing(given)
    thresholds = {name: firing.threshold_of(neuron) for name, neuron in model.neurons().items()}
    assert {value for name, value in thresholds.items() if name.startswith("up_blocks.0")} == {2.0}
    assert thresholds["up_blocks.1.neuron1"] == 0.5
    assert (thresholds["stem_neuron"], thresholds["mid_blocks.0.neuron1"]) == (0.9, 1.0)
    assert torch.equal(predict(model, *inputs()), plain)


def test_a_name_ends_at_a_dot():
    model = SpikingUNet2DModel(**SMALL | {"layers_per_block": 5})
    assert len(model.up_blocks) > 10
    firing = model.firing({"up_blocks.1": 0.5, "mid_blocks.0.neuron1": 0.7})
    changed = {name for name, neuron in model.neurons().items() if firing.threshold_of(neuron) != 1}
    assert changed == {"up_blocks.1.neuron1", "up_blocks.1.neuron2", "mid_blocks.0.neuron1"}


def test_threshold_guidance_of_one_call_is_none_of_another():
    """Also of one that runs at the same time."""
    model, calls, inner = make(), [], []
    alone = {threshold: predict(model, *inputs(), threshold=threshold) for threshold in (0.9, 1.1)}

    def call_within(*_):
        if not calls:
            calls.append(1)
            inner.append(predict(model, *inputs(), threshold=1.1))

    model.mid_blocks[0].register_forward_hook(call_within)
    assert torch.equal(predict(model, *inputs(), threshold=0.9), alone[0.9])
    assert torch.equal(inner[0], alone[1.1])


def test_read_out_weights():
    weights = make(snn_timesteps=4).readout_weights(4)
    assert_close(weights, torch.tensor([0.512, 0.64, 0.8, 1.0]) / 2.952)
    assert_close(make(official=True).readout_weights(4), torch.tensor([0.512, 0.64, 0.8, 1.0]))


def test_class_labels():
    model = make(num_class_embeds=3)
    sample, timestep, _ = inputs(2)
    anything = predict(model, sample, timestep)
    assert torch.equal(predict(model, sample, timestep, torch.tensor([3, 3])), anything)
    one = predict(model, sample, timestep, torch.tensor([0, 1]))
    assert one.ne(anything).flatten(1).any(1).all()
    assert torch.equal(predict(model, sample, timestep, [0, 1]), one)
    for every in (1, [1], torch.tensor([1])):
        assert torch.equal(predict(model, sample, timestep, every), predict(model, sample, timestep, [1, 1]))


def test_ways_to_give_the_timestep():
    model = make()
    sample, _, _ = inputs()
    expected = predict(model, sample, torch.tensor([7, 7]))
    for timestep in (7, torch.tensor(7), torch.tensor([7]), torch.tensor(7.0)):
        assert torch.equal(predict(model, sample, timestep), expected)
    assert torch.equal(model(sample, 7, return_dict=False)[0], expected)


def test_compiled():
    torch._dynamo.reset()
    model = make(tsm=True, num_class_embeds=3, channel_multipliers=(1,))
    arguments = inputs(classes=3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    firing = {"threshold": 0.8, "snn_timesteps": 2}
    assert torch.equal(predict(compiled, *arguments, **firing), predict(model, *arguments, **firing))
    trained = copy.deepcopy(model).train()
    trained(*arguments).sample.sum().backward()
    compiled.train()(*arguments).sample.sum().backward()
    assert_close(model.stem_conv.weight.grad, trained.stem_conv.weight.grad)


@pytest.mark.parametrize("wrong", [-1, 50])
@pytest.mark.parametrize("what", ["timestep", "class_labels"])
def test_compiled_it_fails_rather_than_taking_another_row(what, wrong):
    torch._dynamo.reset()
    model, (sample, *_) = make(num_class_embeds=3, channel_multipliers=(1,)), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    given = {"timestep": torch.tensor([1, 2]), "class_labels": torch.tensor([1, 2])}
    assert torch.equal(predict(compiled, sample, **given), predict(model, sample, **given))
    with pytest.raises((IndexError, RuntimeError)):
        predict(compiled, sample, **given | {what: torch.tensor([1, wrong])})


@pytest.mark.parametrize("kind", ["if", "official tsm", "classes"])
@pytest.mark.parametrize("option", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_loaded_in_another_data_type(dtype, option, kind, tmp_path):
    model = make(**KINDS[kind])
    model.save_pretrained(tmp_path)
    loaded = SpikingUNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False, **{option: dtype})
    assert {value.dtype for value in loaded.state_dict().values()} == {dtype, torch.int64}
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(loaded.state_dict()[name].dtype))
    assert predict(loaded, inputs()[0].to(dtype), 3).dtype == dtype


def test_exported():
    model = make(num_class_embeds=3, channel_multipliers=(1,))
    batch = torch.export.Dim("batch", min=2)
    shapes = {"sample": {0: batch}, "timestep": {0: batch}, "class_labels": {0: batch}, "return_dict": None}
    program = torch.export.export(model, inputs(2, 3), {"return_dict": False}, dynamic_shapes=shapes)
    for count in (2, 5):
        (exported,) = program.module()(*inputs(count, 3), return_dict=False)
        assert_close(exported, predict(model, *inputs(count, 3)), atol=1e-5, rtol=0)


def test_other_steps_than_a_saved_model_has_scales_for(tmp_path):
    make(tsm=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="snn_timesteps is 8; the checkpoint has scales of 4 time steps"):
        SpikingUNet2DModel.from_pretrained(tmp_path, snn_timesteps=8, low_cpu_mem_usage=False)


def test_weights_and_configuration_of_a_saved_model_that_do_not_fit(tmp_path):
    make(tsm=True).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"snn_timesteps": 8}))
    with pytest.raises(ValueError, match=r"snn_timesteps is not the number of temporal-wise scales that .* holds"):
        SpikingUNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    path.write_text(json.dumps(saved | {"tsm": False}))
    with pytest.raises(ValueError, match="tsm is False; the checkpoint has temporal-wise scales"):
        SpikingUNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    path.write_text(json.dumps(saved))
    _, information = SpikingUNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False, output_loading_info=True)
    assert information["missing_keys"] == []
