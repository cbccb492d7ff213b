"""What a call of a spiking network costs: synaptic operations, and three models of energy with their limits.

    with EnergyMeter(unet) as meter:
        unet(sample, timestep)
    report = meter.report(); print(report)

All counts are means of one image and one call of the network, all its T time steps together. With class guidance a call
predicts twice for an image, with its class and for any, and both count.

    MACs (usual count)   input channels x output channels x kernel area x output positions x runs, padding included
    connections          the same without padding: pairs of an input that exists and an output
    synaptic operations  connections whose input is not 0, counted exactly
    rate                 share of a layer's inputs that is not 0

A layer is spike-driven if all its inputs came from spiking neurons, at most upsampled in between, and were 0 or one
magnitude (1; the threshold, in converted networks: a factor of the weights). Then it accumulates; else it multiplies.

Energy of arithmetic, float32, 45 nm: 4.6 pJ a MAC, 0.9 pJ an accumulate (Horowitz, ISSCC 2014).

    paper      4.6 MACs(first convolution, one step) + 0.9 sum rate T MACs(layer, one step) of all other layers:
               Spiking Diffusion Models, arXiv 2408.16467. Real-valued layers pass for spike-driven. An artificial
               network: 4.6 MACs.
    corrected  0.9 synaptic operations of spike-driven layers + 4.6 connections of all others (stem, shortcuts,
               read-out, time embedding), as often as they really run. An artificial network: 4.6 connections.
    bits       Bit Budget T b_w b_s, S-ACE = sum T b_w b_s MACs(layer, one step), NS-ACE = the same with rates: b_w bits
               of a weight, b_s of an input, 1 of a spike. After arXiv 2311.10802, from memory, not verified in its
               text. Also with the 32 bits that real-valued inputs have.

Left out by all: memory traffic, neuron updates, norms, other element-wise work. They may well decide on real hardware.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from generation.argument_checks import check_whole

MAC_PJ, ACCUMULATE_PJ = 4.6, 0.9  # float32, 45 nm: M. Horowitz, "Computing's energy problem", ISSCC 2014
FLOAT_BITS = 32
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")  # arguments of F.conv2d, in order
KEEPS_SPIKES = (F.interpolate, F.dropout)  # what may be done to spikes; the values are looked at afterwards
LEFT_OUT = "Left out everywhere: memory traffic, neuron updates, norms and other element-wise work."
BITS = (
    "Bit Budget: T x bits of a weight x bits of an input, 1 of a spike. S-ACE: multiply-adds of a step times the Bit "
    "Budget; NS-ACE: of inputs that are not 0 alone."
)
UNVERIFIED = "Bit Budget and ACE: formulas from memory, not verified in the text of arXiv 2311.10802."


def is_spikes(x: Tensor) -> bool:
    """Whether all values are 0 or of one finite magnitude."""
    magnitude = x.detach().abs()
    largest = magnitude.max() if x.numel() else magnitude.new_zeros(())
    return bool(largest.isfinite() & ((magnitude == 0) | (magnitude == largest)).all())


def reached(size: int, out_size: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """How many outputs, along one axis, each input position has a weight to.

    Args:
        size: of the input, positions along the axis.
        out_size: of the output.
        kernel: of the convolution along the axis, as are the others.

    Returns:
        `[size]` whole numbers.
    """
    positions = torch.arange(out_size)[:, None] * stride - padding + torch.arange(kernel) * dilation
    return torch.bincount(positions[(positions >= 0) & (positions < size)], minlength=size)


@dataclass(frozen=True)
class LayerEnergy:
    """One convolution or linear layer; counts are means of one image and one call.

    Args:
        name: of the module that has the weights.
        kind: "convolution" or "linear".
        spike_driven: it accumulates spikes.
        runs: how often it is applied: T, or 1 where all steps share a result; twice that with class guidance.
        macs_per_run: the usual count.
        connections: MACs without padding, of all runs.
        synaptic_operations: connections whose input is not 0, of all runs.
        activity: share of inputs that is not 0, in [0, 1].
    """

    name: str
    kind: str
    spike_driven: bool
    runs: float
    macs_per_run: float
    connections: float
    synaptic_operations: float
    activity: float

    @property
    def rate(self) -> float | None:
        """Firing rate of the input, in [0, 1]; None if it is no spikes."""
        return self.activity if self.spike_driven else None

    @property
    def macs(self) -> float:
        return self.runs * self.macs_per_run

    @property
    def accumulates(self) -> float:
        return self.synaptic_operations if self.spike_driven else 0.0

    @property
    def multiplications(self) -> float:
        return 0.0 if self.spike_driven else self.connections

    @property
    def corrected_pj(self) -> float:
        return ACCUMULATE_PJ * self.accumulates + MAC_PJ * self.multiplications


@dataclass(frozen=True)
class BitBudget:
    """Effort in bits: `budget` T b_w b_s; `s_ace` and `ns_ace` sums over layers, the latter with rates."""

    network: str
    budget: int
    s_ace: float
    ns_ace: float


@dataclass(frozen=True)
class EnergyReport:
    """Layers in the order in which they first ran, and what they add up to, for one image and one call.

    Args:
        layers: of the network.
        steps: T, the time steps.
        spiking: the network has neurons that spike.
        calls: of the network, over which counts are means.
        evaluations: predictions for an image in a call: 2 with class guidance.
    """

    layers: tuple[LayerEnergy, ...]
    steps: int
    spiking: bool
    calls: int
    evaluations: int = 1

    def total(self, count: str) -> float:
        """The sum over layers of one of their numbers, such as "macs" or "accumulates"."""
        return math.fsum(getattr(layer, count) for layer in self.layers)

    def macs_where(self, spike_driven: bool) -> float:
        """The usual count, of all runs of the layers that are spike-driven, or of the others."""
        return math.fsum(layer.macs for layer in self.layers if layer.spike_driven == spike_driven)

    @property
    def rate(self) -> float:
        """Firing rate of the spike-driven layers, weighted by MACs, in [0, 1]; 0 if there are none."""
        driven = [layer for layer in self.layers if layer.spike_driven]
        return math.fsum(layer.activity * layer.macs for layer in driven) / max(self.macs_where(True), 1e-300)

    def paper_pj_of(self, layer: LayerEnergy) -> float:
        """Of one of the layers."""
        if not self.spiking:
            return MAC_PJ * layer.macs
        if layer is next((own for own in self.layers if own.kind == "convolution"), None):
            return MAC_PJ * self.evaluations * layer.macs_per_run
        return ACCUMULATE_PJ * self.evaluations * self.steps * layer.activity * layer.macs_per_run

    @property
    def paper_pj(self) -> float:
        return math.fsum(map(self.paper_pj_of, self.layers))

    @property
    def corrected_pj(self) -> float:
        return self.total("corrected_pj")

    def as_artificial(self) -> "EnergyReport":
        """The twin with the same layers that runs each once, on real values."""
        layers, runs = [], self.evaluations
        for layer in self.layers:
            dense = runs * layer.connections / layer.runs
            real = {"spike_driven": False, "activity": 1.0, "connections": dense, "synaptic_operations": dense}
            layers.append(replace(layer, runs=float(runs), **real))
        return EnergyReport(tuple(layers), 1, False, self.calls, self.evaluations)

    def bit_budgets(self, weight_bits: int = FLOAT_BITS) -> tuple[BitBudget, ...]:
        """Of this network, by the formula and with the bits of its real-valued inputs; the quantised ANN of the same
        budget, which runs each layer once on activations of T bits; and the ANN in float. Of an ANN only the last.

        Raises:
            ValueError: `weight_bits` is below 1.
        """
        if weight_bits < 1:
            raise ValueError(f"weight_bits is {weight_bits}; it must be at least 1")
        effort = weight_bits * self.evaluations
        once = effort * self.total("macs_per_run")
        floating = BitBudget(f"ANN A{FLOAT_BITS}W{weight_bits}", FLOAT_BITS * weight_bits, *2 * [FLOAT_BITS * once])
        if not self.spiking:
            return (floating,)
        budget, name = self.steps * weight_bits, f"SNN T={self.steps} W{weight_bits}"
        active = effort * math.fsum(layer.activity * layer.macs_per_run for layer in self.layers)
        spikes, real = weight_bits * self.macs_where(True), FLOAT_BITS * weight_bits * self.macs_where(False)
        return (
            BitBudget(name, budget, self.steps * once, self.steps * active),
            BitBudget(f"{name}, real-valued inputs A{FLOAT_BITS}", budget, spikes + real, self.rate * spikes + real),
            BitBudget(f"ANN A{self.steps}W{weight_bits}", budget, *2 * [self.steps * once]),
            floating,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: layers, and totals in pJ."""
        totals = ("macs", "connections", "synaptic_operations", "accumulates", "multiplications")
        derived = ("rate", "macs", "accumulates", "multiplications", "corrected_pj")
        return {
            "steps": self.steps,
            "spiking": self.spiking,
            "calls": self.calls,
            "evaluations": self.evaluations,
            "layers": [asdict(layer) | {name: getattr(layer, name) for name in derived} for layer in self.layers],
            "totals": {name: self.total(name) for name in totals},
            "spike_driven_macs": self.macs_where(True),
            "real_valued_macs": self.macs_where(False),
            "rate": self.rate,
            "paper_pj": self.paper_pj,
            "corrected_pj": self.corrected_pj,
            "bit_budgets": [asdict(budget) for budget in self.bit_budgets()],
        }

    def table(self) -> str:
        """A line for each layer and one for all, with the three models of energy, in Markdown."""
        columns = ("layer", "runs", "MACs", "rate", "accumulates", "multiplications")
        columns += ("paper, nJ", "corrected, nJ", f"S-ACE, W{FLOAT_BITS}")
        effort = FLOAT_BITS * self.evaluations * (self.steps if self.spiking else FLOAT_BITS)  # for a MAC of one step
        rows = [
            (
                layer.name,
                f"{layer.runs:g}",
                f"{layer.macs:,.0f}",
                "real" if layer.rate is None else f"{layer.rate:.3f}",
                f"{layer.accumulates:,.0f}",
                f"{layer.multiplications:,.0f}",
                f"{self.paper_pj_of(layer) / 1e3:,.1f}",
                f"{layer.corrected_pj / 1e3:,.1f}",
                f"{effort * layer.macs_per_run:,.0f}",
            )
            for layer in self.layers
        ]
        sums = [f"{self.total(name):,.0f}" for name in ("macs", "accumulates", "multiplications")]
        rate = f"{self.rate:.3f}" if self.macs_where(True) else "real"
        energies = (f"{self.paper_pj / 1e3:,.1f}", f"{self.corrected_pj / 1e3:,.1f}")
        rows.append(("all", "", sums[0], rate, *sums[1:], *energies, f"{effort * self.total('macs_per_run'):,.0f}"))
        return markdown(columns, rows)

    def __str__(self) -> str:
        return f"{self.table()}\n\n{totals(self)}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of these columns, the first to the left; a row has a cell for each."""
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def totals(report: EnergyReport, twin: EnergyReport | None = None) -> str:
    """The three models of energy beside the artificial twin's, and what they leave out, in Markdown.

    Args:
        report: of a network.
        twin: of its artificial twin; made from the same layers if None.
    """
    twin = twin or report.as_artificial()
    energies = []
    for name, pj, theirs in (
        ("paper's formula", report.paper_pj, twin.paper_pj),
        ("corrected", report.corrected_pj, twin.corrected_pj),
    ):
        energies.append((name, f"{pj / 1e6:,.3f}", f"{theirs / 1e6:,.3f}", f"{100 * pj / theirs:.1f} %"))
    budgets = [*report.bit_budgets()[:-1], *twin.bit_budgets()[-1:]]
    bits = [(b.network, f"{b.budget:,}", f"{b.s_ace:,.0f}", f"{b.ns_ace:,.0f}") for b in budgets]
    guided = "" if report.evaluations == 1 else f" ({report.evaluations} evaluations, for class guidance)"
    counted = (
        f"One image, one call of the network{guided}, T = {report.steps}, mean of {report.calls} calls: "
        f"{report.macs_where(True) / 1e6:,.2f} M MACs spike-driven (rate {report.rate:.3f}, "
        f"{report.total('accumulates') / 1e6:,.2f} M synaptic operations), "
        f"{report.macs_where(False) / 1e6:,.2f} M real-valued."
    )
    basis = (
        f"{MAC_PJ} pJ a MAC, {ACCUMULATE_PJ} pJ an accumulate (float32, 45 nm, Horowitz 2014). The paper's formula "
        "takes all layers but the first convolution for spike-driven and counts padding; corrected, real-valued layers "
        "multiply and padding is not counted, in both networks."
    )
    energy = markdown(("energy, uJ", "this network", "ANN twin", "of the twin's"), energies)
    effort = markdown(("network", "Bit Budget", "S-ACE", "NS-ACE"), bits)
    return "\n\n".join((counted, energy, effort, f"{basis}\n{BITS}\n{UNVERIFIED}\n{LEFT_OUT}"))


@dataclass
class _Counts:
    """Sums over all images and calls."""

    kind: str
    spike_driven: bool = True
    runs: int = 0
    macs: int = 0
    connections: int = 0
    synaptic_operations: int = 0
    inputs: int = 0
    nonzero: int = 0


@dataclass
class _Convolution:
    """A call of `F.conv2d`."""

    weight: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "_Convolution":
        geometry = []
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
            value = arguments.get(name, default)
            if isinstance(value, str):
                raise ValueError(f"{name} of a convolution is {value!r}; the energy meter takes numbers only")
            geometry.append((value, value) if isinstance(value, int) else (value[0], value[-1]))
        return cls(arguments["weight"], *geometry, arguments.get("groups", 1))

    def reached(self, x: Tensor, y: Tensor) -> Tensor:
        """`[H, W]`: the number of outputs that an input of one channel reaches, from each position."""
        rows, columns = (
            reached(x.shape[2 + i], y.shape[2 + i], self.weight.shape[2 + i], self.stride[i], self.padding[i], d)
            for i, d in enumerate(self.dilation)
        )
        return rows[:, None] * columns * (self.weight.shape[0] // self.groups)


class EnergyMeter(TorchFunctionMode):
    """Counts what a network's convolutions and linear layers do while it is open, wherever their weights are used.

    It sees the calls of `F.conv2d` and `F.linear` rather than modules, because a stem or a read-out may use the weights
    of its module in another way. It sees nothing of a compiled network.

    Args:
        network: its first argument is a batch of images, and `neurons()` its layers of neurons by name; those whose
            `spiking` is false are none.
        evaluations: rows of the batch for an image: 2 where class guidance predicts with its class and for any.
    """

    def __init__(self, network: nn.Module, evaluations: int = 1):
        super().__init__()
        self.network, self.evaluations = network, check_whole("evaluations", evaluations, 1)
        modules = network.named_modules()
        self._names = {id(m.weight): name for name, m in modules if isinstance(m, nn.Conv2d | nn.Linear)}
        neurons = network.neurons().values()
        self._neurons = [neuron for neuron in neurons if getattr(neuron, "spiking", True)]
        self._counts: dict[str, _Counts] = {}
        self._handles: list[Any] = []
        self._inside = False
        self._spikes = WeakTensorKeyDictionary()
        self._rows = self._calls = 0

    def __enter__(self) -> "EnergyMeter":
        self._handles = [
            self.network.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.network.register_forward_hook(self._end, always_call=True),
            *(neuron.register_forward_hook(self._fire) for neuron in self._neurons),
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def _begin(self, network: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        self._inside = True
        self._rows += len(arguments[0] if arguments else options["sample"])
        self._calls += 1

    def _end(self, *_: Any) -> None:
        self._inside = False

    def _fire(self, neuron: nn.Module, arguments: tuple, output: Tensor) -> None:
        self._spikes[output] = True

    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        result = function(*arguments, **(options or {}))
        if function in KEEPS_SPIKES and arguments and arguments[0] in self._spikes:
            self._spikes[result] = True
        if self._inside and function in (F.conv2d, F.linear):
            self._count(function, dict(zip(CONVOLUTION, arguments, strict=False)) | (options or {}), result)
        return result

    @torch.no_grad()
    def _count(self, function: Any, arguments: Mapping[str, Any], result: Tensor) -> None:
        x, weight = arguments["input"], arguments["weight"]
        kind = "convolution" if function is F.conv2d else "linear"
        name = self._names.get(id(weight), f"unnamed {kind} {list(weight.shape)}")
        counts = self._counts.setdefault(name, _Counts(kind))
        counts.spike_driven = counts.spike_driven and x in self._spikes and is_spikes(x)
        nonzero = x != 0
        counts.inputs += x.numel()
        counts.nonzero += int(nonzero.sum())
        counts.macs += result.numel() * weight[0].numel()
        if kind == "convolution":
            reach = _Convolution.of(arguments).reached(x, result).to(x.device)
            counts.runs += len(x)
            counts.connections += int(reach.sum()) * x.shape[0] * x.shape[1]
            counts.synaptic_operations += int((nonzero.sum((0, 1)) * reach).sum())
        else:
            counts.runs += result.numel() // weight.shape[0]
            counts.connections += x.numel() * weight.shape[0]
            counts.synaptic_operations += int(nonzero.sum()) * weight.shape[0]

    def report(self) -> EnergyReport:
        """Means of all calls that were seen.

        Raises:
            ValueError: there was none, or nothing in it was seen.
        """
        if not self._counts:
            raise ValueError(f"the meter saw {self._calls} calls and no layer; call the network, uncompiled, in `with`")
        images = self._rows / self.evaluations
        layers = tuple(
            LayerEnergy(
                name,
                counts.kind,
                counts.spike_driven,
                counts.runs / images,
                counts.macs / counts.runs,
                counts.connections / images,
                counts.synaptic_operations / images,
                counts.nonzero / counts.inputs,
            )
            for name, counts in self._counts.items()
        )
        steps = max(round(layer.runs / self.evaluations) for layer in layers)
        return EnergyReport(layers, steps, bool(self._neurons), self._calls, self.evaluations)
