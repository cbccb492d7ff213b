"""What the energy meter counts, against loops and counts by hand, and the command that reports it."""

import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.__main__ import main
from generation.spiking_diffusion import commands, energy_report
from generation.spiking_diffusion.blocks import Activation, Firing
from generation.spiking_diffusion.energy import EnergyMeter, EnergyReport, is_spikes, reached, totals
from generation.spiking_diffusion.pipeline import SpikingDiffusionPipeline
from generation.spiking_diffusion.quantized_unet import QuantizedUNet2DModel
from generation.spiking_diffusion.unet import SpikingUNet2DModel

PROTOTYPE = {"sample_size": 8, "in_channels": 1, "channels": 16, "channel_multipliers": (1, 2), "layers_per_block": 1}
TINY = PROTOTYPE | {"channels": 4, "num_class_embeds": 3}
TWIN = {"neuron": "silu", "snn_timesteps": 1}


def make(**options) -> SpikingUNet2DModel:
    torch.manual_seed(0)
    return SpikingUNet2DModel(**{**TINY, **options}).eval()


@torch.no_grad()
def measure(unet: SpikingUNet2DModel, images: int = 2, calls: int = 1, side: int = 8, **firing) -> EnergyReport:
    torch.manual_seed(1)
    with EnergyMeter(unet) as meter:
        for call in range(calls):
            unet(torch.randn(images, unet.config.in_channels, side, side), 500 - call, **firing)
    return meter.report()


@cache
def spiking() -> EnergyReport:
    return measure(make())


class Layers(nn.Module):
    """A convolution or linear layer of spikes, for the meter alone."""

    def __init__(self, layer: nn.Module, threshold: float = 1.0, upsampled: bool = False):
        super().__init__()
        self.neuron, self.layer = Activation("if", threshold), layer
        self.upsampled = upsampled

    def neurons(self) -> dict[str, nn.Module]:
        return {"neuron": self.neuron}

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.neuron(x, Firing(1))
        return self.layer(F.interpolate(spikes, scale_factor=2.0) if self.upsampled else spikes)


def pairs(x: Tensor, layer: nn.Conv2d) -> int:
    """Nonzero input, existing output: each output asks each of its inputs."""
    found, (rows, columns), groups = 0, x.shape[2:], layer.groups
    for image in range(len(x)):
        for out_channel, r, c in (
            (o, r, c) for o in range(layer.out_channels) for r in range(rows) for c in range(columns)
        ):
            bottom = r * layer.stride[0] - layer.padding[0]
            left = c * layer.stride[1] - layer.padding[1]
            height, width = (d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
            if bottom + height >= rows + layer.padding[0] or left + width >= columns + layer.padding[1]:
                continue  # no such output
            group = out_channel * groups // layer.out_channels
            for channel in range(layer.in_channels // groups):
                for i in range(bottom, bottom + height + 1, layer.dilation[0]):
                    for j in range(left, left + width + 1, layer.dilation[1]):
                        inside = 0 <= i < rows and 0 <= j < columns
                        found += inside and bool(x[image, group * layer.in_channels // groups + channel, i, j])
    return found


GEOMETRIES = {
    "3x3": ((2, 3, 3), {"padding": 1}),
    "unpadded": ((2, 3, 3), {}),
    "stride-2": ((2, 2, 3), {"stride": 2, "padding": 1}),
    "stride-2-kernel-2": ((2, 2, 2), {"stride": 2}),
    "1x1": ((3, 2, 1), {}),
    "oblong": ((1, 2, (1, 3)), {"padding": (0, 1), "stride": (2, 1)}),
    "dilated": ((1, 2, 3), {"padding": 2, "dilation": 2}),
    "grouped": ((4, 2, 3), {"padding": 1, "groups": 2}),
}


@pytest.mark.parametrize("upsampled", [False, True], ids=["as-is", "upsampled"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_operations_are_those_of_explicit_loops(geometry, upsampled):
    sizes, options = GEOMETRIES[geometry]
    network = Layers(nn.Conv2d(*sizes, **options), upsampled=upsampled)
    x = torch.rand(2, sizes[0], 5, 4, generator=torch.Generator().manual_seed(0)) + 0.6
    with torch.no_grad(), EnergyMeter(network) as meter:
        y = network(x)
    (layer,) = meter.report().layers
    spikes = (x >= 1).float()
    spikes = F.interpolate(spikes, scale_factor=2.0) if upsampled else spikes
    assert layer.spike_driven
    assert layer.activity == pytest.approx(spikes.mean().item())
    assert layer.synaptic_operations * 2 == pairs(spikes, network.layer)
    assert layer.connections * 2 == pairs(torch.ones_like(spikes), network.layer)
    assert layer.macs * 2 == y.numel() * network.layer.weight[0].numel()


def test_operations_of_a_linear_layer():
    network = Layers(nn.Linear(3, 5))
    with torch.no_grad(), EnergyMeter(network) as meter:
        network(torch.tensor([[1.0, 0, 2], [0, 0, 1]]))
    (layer,) = meter.report().layers
    assert (layer.accumulates, layer.connections, layer.macs, layer.rate, layer.runs) == (7.5, 15, 15, 0.5, 1)


def test_reached_positions():
    assert reached(5, 5, 3, 1, 1, 1).tolist() == [2, 3, 3, 3, 2]
    assert reached(4, 2, 3, 2, 1, 1).tolist() == [1, 2, 1, 1]
    assert reached(5, 2, 2, 2, 0, 1).tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0, 1, 1], True),
        ([0, 0, 0], True),
        ([], True),
        ([0, 0.7, 0.7], True),
        ([-0.7, 0, 0.7], True),
        ([0, 0.5, 1], False),
        ([0, float("nan")], False),
        ([0, float("inf")], False),
    ],
    ids=["zeros-ones", "silent", "empty", "scaled", "signed", "real", "nan", "infinite"],
)
def test_what_spikes_are(values, wanted):
    assert is_spikes(torch.tensor(values, dtype=torch.float32)) is wanted


@pytest.mark.parametrize("form", ["plain", "tsm", "official", "official-tsm"])
def test_layers_of_the_u_net(form):
    """Stem and read-out use the weights of their modules in their own way."""
    options = {"official": form.startswith("official"), "tsm": form.endswith("tsm")}
    unet = make(**options)
    report = measure(unet)
    layers = {layer.name: layer for layer in report.layers}
    assert set(layers) == {n for n, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert report.steps == 4
    steps = {name: 4 if options["official"] else 1 for name in ("out_conv", "out_step_conv")} | {"stem_conv": 1}
    for name, layer in layers.items():
        once = layer.kind == "linear" or name in steps
        assert layer.runs == (steps.get(name, 1) if once else 4), name
        assert layer.spike_driven == (not once and "shortcut" not in name), name
        assert 0 <= layer.activity <= 1


@pytest.mark.parametrize("timestep", [0, 500])
def test_a_table_row_of_zeros_and_ones_is_no_spikes(timestep):
    """That of timestep 0 is."""
    unet = make()
    with torch.no_grad(), EnergyMeter(unet) as meter:
        unet(torch.zeros(1, 1, 8, 8), timestep)
    driven = {layer.name: layer.spike_driven for layer in meter.report().layers}
    assert not driven["time_embedding.linear1"]
    assert not driven["stem_conv"]


@pytest.mark.parametrize(
    ("threshold", "count"), [(1e30, 0), (1e-30, None)], ids=["silent-accumulates-nothing", "firing-accumulates-all"]
)
def test_extreme_rates(threshold, count):
    network = Layers(nn.Conv2d(2, 3, 3, padding=1), threshold)
    with torch.no_grad(), EnergyMeter(network) as meter:
        network(torch.rand(2, 2, 6, 6) + 0.1)
    report = meter.report()
    dense = 2 * 3 * (3 * 6 - 2) ** 2
    assert report.total("connections") == dense
    assert report.total("accumulates") == (dense if count is None else count)
    assert report.rate == (count is None)
    unet = make()
    report = measure(unet, threshold=threshold)
    if count == 0:  # and no residual stream, which is 0 then, is taken for spikes
        assert report.total("accumulates") == 0
        assert report.macs_where(True) == spiking().macs_where(True)
    entry = next(layer for layer in report.layers if layer.name == "entry_conv")
    assert 0 <= entry.accumulates <= entry.connections < entry.macs


def test_prototype_as_published():
    """14.9 M spike-driven and 0.65 M real-valued MACs of four steps, with the authors' read-out."""
    report = measure(make(**PROTOTYPE, official=True, num_class_embeds=None))
    assert report.macs_where(True) == pytest.approx(14.9e6, rel=1e-3)
    assert report.macs_where(False) == pytest.approx(0.65e6, abs=1e4)


def test_full_size_as_published():
    """MACs of a step at 32 x 32, in G, of a quarter of the channels: as the square of the channels, or as they."""
    options = {"channel_multipliers": (1, 2, 2, 4), "layers_per_block": 2, "in_channels": 3, "num_class_embeds": None}
    report = measure(make(**options, channels=32, official=True, snn_timesteps=1), images=1, side=32)
    scale = {"stem_conv": 4, "out_conv": 4, "out_step_conv": 1}
    counts = dict.fromkeys(("driven", "shortcut", "stem", "out", "linear"), 0.0)
    for layer in report.layers:
        kinds = (name for name in ("shortcut", "stem", "out") if layer.name.split(".")[-1].startswith(name))
        kind = "linear" if layer.kind == "linear" else next(kinds, "driven")
        assert layer.spike_driven == (kind == "driven")
        counts[kind] += layer.macs * scale.get(layer.name, 16) / 1e9
    published = {"driven": 6.200, "shortcut": 0.273, "stem": 0.0035, "out": 0.0036, "linear": 0.0038}
    assert counts == pytest.approx(published, abs=5e-4)
    assert sum(counts.values()) == pytest.approx(6.484, abs=5e-4)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_other_numbers_of_steps(steps):
    unet = make()
    report = measure(unet, snn_timesteps=steps)
    assert report.steps == steps
    assert report.macs_where(True) == pytest.approx(spiking().macs_where(True) * steps / 4)


def test_means_of_images_and_calls():
    """Two calls of two images each count as four, each once."""
    unet, parts = make(), []
    samples = torch.randn(2, 2, 1, 8, 8)
    with torch.no_grad():
        with EnergyMeter(unet) as meter:
            for sample in samples:
                unet(sample, 300)
        for sample in samples.flatten(0, 1):
            with EnergyMeter(unet) as own:
                unet(sample=sample[None], timestep=300)
            parts.append(own.report())
    report = meter.report()
    assert report.calls == 2
    assert report.total("accumulates") == pytest.approx(sum(p.total("accumulates") for p in parts) / 4)
    assert report.total("macs") == parts[0].total("macs")
    assert not unet._forward_hooks
    assert not unet._forward_pre_hooks


def test_the_meter_changes_nothing():
    unet, sample = make(), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        wanted = unet(sample, 10).sample
        with EnergyMeter(unet):
            torch.testing.assert_close(unet(sample, 10).sample, wanted, rtol=0, atol=0)


def test_the_twin_accumulates_nothing():
    report = measure(make(**TWIN))
    assert report.total("accumulates") == 0
    assert not report.spiking
    assert report.rate == 0
    assert report.paper_pj == pytest.approx(4.6 * report.total("macs"))
    assert report.corrected_pj == pytest.approx(4.6 * report.total("connections"))
    assert [budget.network for budget in report.bit_budgets()] == ["ANN A32W32"]
    imagined = spiking().as_artificial()
    assert imagined.paper_pj == pytest.approx(report.paper_pj)
    assert imagined.corrected_pj == pytest.approx(report.corrected_pj)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_a_converted_network(signed):
    """Its spikes are of the size of the threshold, and its time embedding spikes too; its resampling is real-valued."""
    torch.manual_seed(0)
    unet = QuantizedUNet2DModel(**PROTOTYPE, norm_num_groups=4, snn_timesteps=3, signed=signed).eval()
    report = measure(unet)
    assert report.steps == 3
    driven = {layer.name.split(".")[-1] for layer in report.layers if layer.spike_driven}
    assert driven == {"conv1", "conv2", "time_projection", "linear2"}
    assert 0 < report.rate < 1


def test_columns_by_hand():
    report = spiking()
    paper = corrected = formula = active = real = 0.0
    for layer in report.layers:
        real_valued = "shortcut" in layer.name or layer.kind == "linear" or layer.name in ("stem_conv", "out_conv")
        paper += layer.macs_per_run * (4.6 if layer.name == "stem_conv" else 0.9 * 4 * layer.activity)
        corrected += 4.6 * layer.connections if real_valued else 0.9 * layer.synaptic_operations
        formula += 4 * 32 * layer.macs_per_run
        active += 4 * 32 * layer.activity * layer.macs_per_run
        real += 32 * 32 * layer.macs if real_valued else 0
    driven = 32 * report.macs_where(True)
    assert report.paper_pj == pytest.approx(paper)
    assert report.corrected_pj == pytest.approx(corrected)
    assert [(b.network, b.budget, b.s_ace, b.ns_ace) for b in report.bit_budgets()] == [
        ("SNN T=4 W32", 128, pytest.approx(formula), pytest.approx(active)),
        (
            "SNN T=4 W32, real-valued inputs A32",
            128,
            pytest.approx(driven + real),
            pytest.approx(report.rate * driven + real),
        ),
        ("ANN A4W32", 128, pytest.approx(formula), pytest.approx(formula)),
        ("ANN A32W32", 1024, pytest.approx(8 * formula), pytest.approx(8 * formula)),
    ]
    assert report.bit_budgets(8)[0].budget == 32


def test_totals_are_sums():
    report, written = spiking(), spiking().as_dict()
    for name, total in written["totals"].items():
        assert total == pytest.approx(sum(layer[name] for layer in written["layers"]))
    assert written["corrected_pj"] == pytest.approx(sum(layer["corrected_pj"] for layer in written["layers"]))
    assert written["spike_driven_macs"] + written["real_valued_macs"] == pytest.approx(written["totals"]["macs"])
    assert 0 < report.rate < 1
    assert json.loads(json.dumps(written)) == written


def test_what_is_printed():
    text = str(spiking())
    assert all(f"| {layer.name} |" in text for layer in spiking().layers)
    assert all(words in text for words in ("memory traffic", "not verified in the text", "45 nm", "Bit Budget"))
    assert "| corrected |" in totals(spiking(), measure(make(**TWIN)))


def test_wrong_use():
    unet = make()
    with pytest.raises(ValueError, match="saw 0 calls"), EnergyMeter(unet) as meter:
        meter.report()
    with pytest.raises(ValueError, match="weight_bits is 0"):
        spiking().bit_budgets(0)
    with pytest.raises(ValueError, match="evaluations is 0; it must be a whole number of at least 1"):
        EnergyMeter(unet, 0)
    network = Layers(nn.Conv2d(1, 1, 3, padding="same"))
    with pytest.raises(ValueError, match="padding of a convolution is 'same'"), EnergyMeter(network):
        network(torch.ones(1, 1, 4, 4))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, options in (
        ("spiking", {}),
        ("twin", TWIN),
        ("wide twin", TWIN | {"channels": 6, "layers_per_block": 2}),
    ):
        SpikingDiffusionPipeline(make(**options)).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("given", [("--threshold", "0.9"), ("--twin",)], ids=["threshold", "twin"])
def test_command(folders, tmp_path, capsys, given):
    twin = [str(folders / "twin")] if given == ("--twin",) else []
    output = tmp_path / "new" / "energy"
    arguments = [str(folders / "spiking"), *given, *twin, "--output", str(output), "--images", "2", "--steps", "3"]
    main(["energy", *arguments])
    printed = capsys.readouterr().out
    assert "| entry_conv | 4 |" in printed
    assert "mean of 3 calls" in printed
    assert {path.name for path in output.iterdir()} == {"energy.json", "firing_rates.png", "energy.png", "raster.png"}
    written = json.loads((output / "energy.json").read_text())
    assert written["settings"]["steps"] == 3
    assert written["model"]["spiking"]
    assert written["twin"]["totals"]["accumulates"] == 0
    assert written["twin"]["totals"]["macs"] == spiking().as_artificial().total("macs")


def test_recorded_spikes_are_of_one_call():
    unet, sample = make(), torch.randn(2, 1, 8, 8)
    with torch.no_grad(), energy_report.recorded_spikes(unet, call=1) as spikes:
        unet(torch.zeros_like(sample), 7)
        unet(sample, 7)
        unet(torch.zeros_like(sample), 7)
    assert len(spikes) == energy_report.SHOWN_LAYERS
    assert next(iter(spikes)) == "stem_neuron"
    wanted = unet.stem_neuron(unet._stem(sample, 4), Firing(4)).unflatten(0, (4, 2))[:, 0]
    assert torch.equal(spikes["stem_neuron"], wanted.bool())
    assert not any(neuron._forward_hooks for neuron in unet.neurons().values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{folders}/none"], "model is"),
        (["{folders}/spiking", "--twin", "{folders}"], "model is"),
        (["{folders}/spiking", "--twin", "{folders}/spiking"], "neuron='silu'"),
        (["{folders}/twin"], "must be a model with spiking neurons"),
        (
            ["{folders}/spiking", "--twin", "{folders}/wide twin"],
            "which is no twin of the model: it has channels 6 instead of 4, layers_per_block 2 instead of 1",
        ),
        (["{folders}/spiking", "--threshold", "0"], "--threshold is 0.0; it must be a finite number above 0"),
        (["{folders}/spiking", "--output", "{folders}/spiking/model_index.json"], "--output is"),
    ],
    ids=["no-model", "no-twin", "spiking-twin", "artificial-model", "other-layers", "threshold", "output"],
)
def test_wrong_options(folders, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words):
        main(["energy", *(argument.format(folders=folders) for argument in arguments)])


def test_wrong_numbers(folders, capsys):
    with pytest.raises(SystemExit):
        commands.energy_options([str(folders / "spiking"), "--images", "0"])
    assert "--images is 0" in capsys.readouterr().err
