"""What the spiking U-Net is made of. Activations are `[T B, C, H, W]`, time steps first.

Residual blocks are pre-spike: the neuron comes before the convolution, and the residual stream, its concatenations and
the 1 x 1 shortcuts carry real values.

Sources: SDDPM, arXiv 2306.17046; Spiking Diffusion Models, arXiv 2408.16467 (temporal-wise scales, eq. 16), and their
published code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.spiking_neuron import spiking_neuron

ACTIVATIONS = ("if", "lif", "silu")


def check_threshold(threshold: float) -> None:
    """Raises `ValueError` unless a neuron can have this threshold."""
    number = isinstance(threshold, Real) and not isinstance(threshold, bool)
    if not (number and math.isfinite(threshold) and threshold > 0):
        raise ValueError(f"threshold is {threshold!r}; it must be a finite number above 0")


def neurons_named(neurons: Mapping[str, nn.Module], name: str, argument: str) -> list[nn.Module]:
    """Those in the part of a network with this name: "up_blocks.1" is not the beginning of "up_blocks.10".

    Args:
        neurons: by their full names.
        name: of a part, or of one of them.
        argument: in which it was given, for the error.

    Raises:
        ValueError: none is there.
    """
    found = [neuron for own, neuron in neurons.items() if isinstance(name, str) and f"{own}.".startswith(f"{name}.")]
    if not found:
        raise ValueError(
            f"{argument} names {name!r}; valid are names, whole or up to a dot, of {', '.join(neurons) or 'no neurons'}"
        )
    return found


@dataclass(frozen=True)
class Firing:
    """How neurons fire in one call of a network.

    Args:
        steps: T, for how many time steps.
        thresholds: of neurons that have another one than they were trained with; None for none.
    """

    steps: int
    thresholds: "Mapping[Activation, float] | None" = None

    def threshold_of(self, neuron: "Activation") -> float:
        return neuron.threshold if self.thresholds is None else self.thresholds.get(neuron, neuron.threshold)


class Activation(nn.Module):
    """Spiking neurons, or SiLU in the artificial twin of a spiking network.

    The membranes start anew with every call: nothing is carried from one batch to the next.

    Args:
        kind: "if" (integrate and fire), "lif" (leaky) or "silu".
        options: further arguments of `kernels.spiking_neuron`.
    """

    def __init__(self, kind: str, threshold: float = 1.0, **options):
        super().__init__()
        self.kind, self.threshold, self.options = kind, threshold, options

    @property
    def spiking(self) -> bool:
        return self.kind != "silu"

    def forward(self, x: Tensor, firing: Firing) -> Tensor:
        """`[T B, ...]` currents to spikes, 0 or 1."""
        if not self.spiking:
            return F.silu(x)
        currents, threshold = x.unflatten(0, (firing.steps, -1)), firing.threshold_of(self)
        return spiking_neuron(currents, threshold=threshold, **self.options).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"{self.kind}, threshold={self.threshold}"


class SpikingConv2d(nn.Conv2d):
    """A convolution of every time step, optionally with a scale of each step (temporal-wise spiking mechanism).

    Args:
        arguments: of `nn.Conv2d`.
        scaled_steps: T, the number of learned scales, which begin as ones; 0 for none. They scale the bias too.
    """

    def __init__(self, *arguments, scaled_steps: int = 0, **options):
        super().__init__(*arguments, **options)
        self.step_scale = nn.Parameter(torch.ones(scaled_steps)) if scaled_steps else None

    def forward(self, x: Tensor, steps: int) -> Tensor:
        """`[T B, C, H, W]` -> `[T B, C', H', W']`."""
        return self.scale(super().forward(x), steps)

    def scale(self, y: Tensor, steps: int) -> Tensor:
        """`[T B, C', H', W']`, each step by its number."""
        if self.step_scale is None:
            return y
        return (y.unflatten(0, (steps, -1)) * self.step_scale[:steps, None, None, None, None]).flatten(0, 1)


class ResidualBlock(nn.Module):
    """Neuron, 3 x 3 convolution, norm; the time embedding is added; the same again; and the shortcut."""

    def __init__(self, channels: int, out_channels: int, time_channels: int, activation, convolution):
        super().__init__()
        self.neuron1 = activation()
        self.conv1 = convolution(channels, out_channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.time_projection = nn.Linear(time_channels, out_channels)
        self.neuron2 = activation()
        self.conv2 = convolution(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = convolution(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor, embedding: Tensor, firing: Firing) -> Tensor:
        """`[T B, channels, H, W]`, `[B, time_channels]` -> `[T B, out_channels, H, W]`."""
        y = self.norm1(self.conv1(self.neuron1(x, firing), firing.steps))
        y = y + self.time_projection(F.silu(embedding)).repeat(firing.steps, 1)[:, :, None, None]
        y = self.norm2(self.conv2(self.neuron2(y, firing), firing.steps))
        return y + (x if self.shortcut is None else self.shortcut(x, firing.steps))


class Downsample(nn.Module):
    """Neuron, 3 x 3 convolution of stride 2, norm."""

    def __init__(self, channels: int, activation, convolution):
        super().__init__()
        self.neuron = activation()
        self.conv = convolution(channels, channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, embedding: Tensor, firing: Firing) -> Tensor:
        """`[T B, C, H, W]` -> `[T B, C, ceil(H / 2), ceil(W / 2)]`; the embedding is not used."""
        return self.norm(self.conv(self.neuron(x, firing), firing.steps))


class Upsample(nn.Module):
    """Neuron, nearest neighbours to twice the size, 3 x 3 convolution, norm."""

    def __init__(self, channels: int, activation, convolution):
        super().__init__()
        self.neuron = activation()
        self.conv = convolution(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, embedding: Tensor, firing: Firing) -> Tensor:
        """`[T B, C, H, W]` -> `[T B, C, 2 H, 2 W]`; the embedding is not used."""
        return self.norm(self.conv(F.interpolate(self.neuron(x, firing), scale_factor=2.0), firing.steps))


class TimeEmbedding(nn.Module):
    """Rows of a fixed sinusoidal table, through two linear layers.

    The table is a frozen parameter, since it is one in published checkpoints and counts.
    """

    def __init__(self, timesteps: int, channels: int, out_channels: int):
        super().__init__()
        wanted = torch.get_default_dtype()
        precise = torch.promote_types(wanted, torch.float32)
        frequency = torch.exp(-torch.arange(0, channels, 2, dtype=precise) / channels * math.log(10_000))
        angle = torch.arange(timesteps, dtype=precise)[:, None] * frequency
        table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
        # Of the data type of all weights: by the first one diffusers tells whether it must convert what it loads.
        self.table = nn.Parameter(table.to(wanted), requires_grad=False)
        self.linear1 = nn.Linear(channels, out_channels)
        self.linear2 = nn.Linear(out_channels, out_channels)

    def forward(self, timestep: Tensor) -> Tensor:
        """`[B]` integers -> `[B, out_channels]`."""
        return self.linear2(F.silu(self.linear1(self.rows(timestep))))

    def rows(self, timestep: Tensor) -> Tensor:
        """`[B]` integers -> `[B, channels]`; not by `[]`, which takes -1 for the last row, compiled networks too."""
        return F.embedding(timestep, self.table)
