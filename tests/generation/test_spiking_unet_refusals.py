"""What the spiking U-Net refuses: calls, sizes, and other thresholds and time steps."""

import pytest
import torch

from generation.spiking_diffusion.unet import SpikingUNet2DModel

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "channels": 8,
    "channel_multipliers": (1, 2),
    "layers_per_block": 1,
    "num_train_timesteps": 50,
}
SAMPLE = torch.zeros(2, 1, 8, 8)
REFUSED_CALLS = {
    "timestep after the table": ((SAMPLE, 50), "timestep is 50; it must be a whole number from 0 to 49"),
    "negative timestep": ((SAMPLE, torch.tensor([0, -1])), r"timestep is \[0, -1\]; it must be a whole number from 0"),
    "fraction": ((SAMPLE, 1.5), "timestep is 1.5; it must be a whole number from 0 to 49, or one for each of 2 images"),
    **{f"timestep {value}": ((SAMPLE, value), f"timestep is '?{value}'?; it must be a whole number from 0 to 49")
       for value in ("a", None, float("nan"), True)},
    "three timesteps": ((SAMPLE, torch.arange(3)), r"timestep has the shape \(3,\); .* one for each of 2 images"),
    "label after the last": (
        (SAMPLE, 1, torch.tensor([0, 4])),
        r"class_labels is \[0, 4\]; it must be a whole number from 0 to 2, or 3 for any, or one for each of 2 images",
    ),
    "negative label": ((SAMPLE, 1, torch.tensor([0, -1])), r"class_labels is \[0, -1\]"),
    "number after the last": ((SAMPLE, 1, 4), "class_labels is 4; it must be"),
    "three labels": ((SAMPLE, 1, [0, 1, 2]), r"class_labels has the shape \(3,\); .* one for each of 2 images"),
    "floating labels": ((SAMPLE, 1, torch.zeros(2)), r"class_labels is tensor\(\[0., 0.\]\); it must be a whole"),
    "half a label": ((SAMPLE, 1, 0.5), "class_labels is 0.5; it must be"),
    "true labels": ((SAMPLE, 1, [True, False]), r"class_labels is \[True, False\]; it must be"),
    "label's name": ((SAMPLE, 1, "cat"), "class_labels is 'cat'; it must be"),
    "other type": ((SAMPLE.double(), 1), "sample is of torch.float64; it must be of torch.float32, as the weights"),
    "whole numbers": ((SAMPLE.long(), 1), "sample is of torch.int64; it must be of torch.float32"),
    "no tensor": (([[0.0]], 1), r"sample is \[\[0.0\]\]; it must be a tensor"),
    "channels": ((torch.zeros(2, 3, 8, 8), 1), r"sample has the shape \(2, 3, 8, 8\); expected \[batch, 1, rows"),
    "odd side": ((torch.zeros(2, 1, 8, 7), 1), "rows and columns multiples of 2"),
    "no batch": ((torch.zeros(1, 8, 8), 1), r"sample has the shape \(1, 8, 8\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_refused_calls(name):
    arguments, words = REFUSED_CALLS[name]
    with pytest.raises(ValueError, match=words):
        SpikingUNet2DModel(**SMALL, num_class_embeds=3)(*arguments)


REFUSED_MODELS = {
    "neuron": ({"neuron": "izhikevich"}, "neuron is 'izhikevich'; valid are 'if', 'lif', 'silu'"),
    "threshold": ({"threshold": 0.0}, "threshold is 0.0; it must be a finite number above 0"),
    "half a step": ({"snn_timesteps": 2.5}, "snn_timesteps is 2.5; it must be a whole number"),
    "unknown surrogate": ({"surrogate": "step"}, "surrogate is 'step'; valid are 'atan'"),
    "no sharpness": ({"alpha": -1.0}, "alpha is -1.0"),
    "short time constant": ({"neuron": "lif", "tau": 0.5}, "tau is 0.5"),
    "time constant of none": ({"neuron": "if", "tau": 0}, "tau is 0"),
    "reset to no number": ({"reset_value": float("nan")}, "reset_value is nan"),
    "negative classes": ({"num_class_embeds": -3}, "num_class_embeds is -3; it must be a whole number of at least 1"),
    "no outputs": ({"out_channels": 0}, "out_channels is 0; it must be a whole number of at least 1"),
    "odd size": (
        {"sample_size": 7, "channel_multipliers": (1, 2)},
        "sample_size is 7; the levels need a multiple of 2",
    ),
    "no steps": ({"snn_timesteps": 0}, "snn_timesteps is 0; it must be a whole number of at least 1"),
    "odd channels": ({"channels": 7}, "channels is 7; it must be even"),
    "no levels": ({"channel_multipliers": ()}, "channel_multipliers is empty"),
    "decay": ({"readout_decay": 1.5}, "readout_decay is 1.5"),
}


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_refused_models(name):
    options, words = REFUSED_MODELS[name]
    with pytest.raises(ValueError, match=words):
        SpikingUNet2DModel(**SMALL | options)


KINDS = {"if": {}, "tsm": {"tsm": True}, "silu": {"neuron": "silu", "snn_timesteps": 1}}
REFUSED_CHANGES = {
    **{f"threshold {value}": ("if", "threshold", value, f"threshold is '?{value}'?; it must be a finite number abo")
       for value in (0, -0.5, float("nan"), float("inf"), True, "high")},
    **{f"name of no neuron, {name!r}": ("if", "threshold", {name: 1.0}, f"threshold names {name!r}; valid are names,")
       for name in ("head", "stem", "", "up_blocks.", 0)},
    "threshold by name": ("if", "threshold", {"stem_neuron": 0.0}, "threshold is 0.0"),
    "threshold of the twin": ("silu", "threshold", 0.9, "threshold is 0.9; a model with neuron='silu' has none"),
    "no steps": ("if", "snn_timesteps", 0, "snn_timesteps is 0; it must be a whole number of at least 1"),
    "half a step": ("if", "snn_timesteps", 1.5, "snn_timesteps is 1.5; it must be a whole number"),
    "more steps than scales": ("tsm", "snn_timesteps", 5, "snn_timesteps is 5; it must be a whole number from 1 to 4"),
    "steps of the twin": ("silu", "snn_timesteps", 2, "snn_timesteps is 2; it must be a whole number from 1 to 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_CHANGES)
def test_refused_changes(name):
    kind, what, value, words = REFUSED_CHANGES[name]
    model = SpikingUNet2DModel(**SMALL, **KINDS[kind])
    with pytest.raises(ValueError, match=words):
        model(SAMPLE, 7, **{what: value})
