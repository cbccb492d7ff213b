"""The U-Net of ANN2SNN: its activations are quantised, so that neurons which spike for T time steps can replace them.

    quantised:  y = clip * round(n * min(relu(x) / clip, 1)) / n,  n = 2**bits - 1
    spiking:    v[t] = v[t-1] + x[t],  s[t] = v[t] >= clip,  v[t] -= clip * s[t],  v[-1] = clip / 2;  y[t] = clip * s[t]

For a constant current and T = n steps, the mean of the spikes is the quantised value. The network is DDPM's without
attention. A spiking one is the same network with other activations, and has the same state dict; its activations are
`[T B, ...]`, time steps first, and its prediction is the mean over T.

Sources: Spiking Diffusion Models, arXiv 2408.16467, section on conversion, and its published code (ANN2SNN, which has
the batch first), after Fast-SNN, arXiv 2305.19868.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from generation.argument_checks import check_whole
from generation.spiking_diffusion.blocks import TimeEmbedding, neurons_named
from generation.spiking_diffusion.unet import TAIL_GAIN, SpikingUNet2DModel, check_sample, check_unet_sizes
from kernels.spiking_neuron import spiking_neuron

NORMS = ("group", "batch")
UNQUANTIZED = 32  # bits of a plain ReLU
FIRST_CLIP = 6.0
NEGATIVE_THRESHOLD = -1e-3  # at which a membrane takes back a spike


class QuantizedReLU(nn.Module):
    """ReLU in 2**bits levels from 0 to a learned clip; the gradient passes the rounding unchanged."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits
        self.clip = nn.Parameter(torch.tensor(FIRST_CLIP))

    def forward(self, x: Tensor) -> Tensor:
        fraction, levels = F.relu(x / self.clip).clamp(max=1), 2**self.bits - 1
        return self.clip * (fraction + ((fraction * levels).round() / levels - fraction).detach())

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class ConvertedNeuron(nn.Module):
    """Integrate and fire in place of a `QuantizedReLU`: soft reset, and half a threshold in the membrane to begin with.

    Args:
        steps: T.
        signed: let a neuron take back a spike that it has fired when its membrane falls below 0. The mean over T is
            then closer to the quantised value where currents change, but -1 is a spike no hardware of plain
            integrate-and-fire neurons has.
    """

    def __init__(self, steps: int, signed: bool = False):
        super().__init__()
        self.steps, self.signed = steps, signed
        self.clip = nn.Parameter(torch.tensor(FIRST_CLIP))

    def forward(self, x: Tensor) -> Tensor:
        """`[T B, ...]` currents to spikes times the clip: 0, clip, or -clip if signed."""
        currents = x.unflatten(0, (self.steps, -1)) / self.clip
        membrane = torch.full_like(currents[0], 0.5)
        if not self.signed:
            return self.clip * spiking_neuron(currents, reset="soft", initial_state=membrane).flatten(0, 1)
        spikes, fired = [], torch.zeros_like(membrane)
        for current in currents:
            membrane = membrane + current
            taken_back = (membrane * self.clip <= NEGATIVE_THRESHOLD) & (fired > 0)
            spikes.append((membrane >= 1).to(x.dtype) - taken_back.to(x.dtype))
            membrane, fired = membrane - spikes[-1], fired + spikes[-1]
        return self.clip * torch.cat(spikes)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, signed={self.signed}"


class QuantizedTimeEmbedding(TimeEmbedding):
    """The embedding's first layer gives currents, to which those of a class may be added; `spread` does the rest."""

    def __init__(self, timesteps: int, channels: int, out_channels: int, activation):
        super().__init__(timesteps, channels, out_channels)
        self.activation = activation()

    def forward(self, timestep: Tensor) -> Tensor:
        """`[B]` integers -> `[B, out_channels]`."""
        return self.linear1(self.rows(timestep))

    def spread(self, current: Tensor, steps: int) -> Tensor:
        """`[B, out_channels]`, the same in all time steps -> `[T B, out_channels]`."""
        return self.linear2(self.activation(current.repeat(steps, 1)))


class QuantizedResidualBlock(nn.Module):
    """Norm, activation, 3 x 3 convolution; the time embedding is added; the same again; and the shortcut."""

    def __init__(self, channels: int, out_channels: int, time_channels: int, dropout: float, activation, norm):
        super().__init__()
        self.norm1 = norm(channels)
        self.activation1 = activation()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_activation = activation()
        self.time_projection = nn.Linear(time_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.activation2 = activation()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`[T B, channels, H, W]`, `[T B, time_channels]` -> `[T B, out_channels, H, W]`."""
        y = self.conv1(self.activation1(self.norm1(x)))
        y = y + self.time_projection(self.time_activation(embedding))[:, :, None, None]
        return self.conv2(self.dropout(self.activation2(self.norm2(y)))) + self.shortcut(x)


class Resample(nn.Module):
    """A 3 x 3 convolution, of stride 2 downwards; upwards, of nearest neighbours at twice the size."""

    def __init__(self, channels: int, upwards: bool):
        super().__init__()
        self.upwards = upwards
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if upwards else 2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`[T B, C, H, W]` -> `[T B, C, 2 H, 2 W]`, or half of them; the embedding is not used."""
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.upwards else x)


class ReadOut(nn.Module):
    """Norm, activation, mean over T, and a 3 x 3 convolution: it is linear, so that one of the mean is enough."""

    def __init__(self, channels: int, out_channels: int, steps: int, activation, norm):
        super().__init__()
        self.steps = steps
        self.norm = norm(channels)
        self.activation = activation()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`[T B, channels, H, W]` -> `[B, out_channels, H, W]`."""
        return self.conv(self.activation(self.norm(x)).unflatten(0, (self.steps, -1)).mean(0))


class QuantizedUNet2DModel(ModelMixin, ConfigMixin):
    """Noise prediction, in the form that diffusers' pipelines call.

    Args:
        sample_size: side of the images that pipelines draw; the model takes any that its levels divide.
        in_channels: of the images.
        out_channels: of the prediction; `in_channels` if None.
        channels: of the first layer; the time embedding has four times as many.
        channel_multipliers: of each level, from the finest.
        layers_per_block: residual blocks of a level.
        dropout: before the second convolution of residual blocks, from 0 to below 1.
        bits: of the activations, from 1 to 16, or 32 for plain ReLU.
        norm: "group", the official model's, which no spiking network repeats exactly, since it normalises each time
            step; or "batch", an affine map once the network is trained, the mean of which is that of the mean.
        norm_num_groups: of "group"; it divides `channels`.
        snn_timesteps: T, the time steps for which neurons spike in place of the activations; None for the quantised
            network. `conversion.convert` makes the one from the other.
        signed: whether neurons can take back spikes: all, none, or a tuple of names, whole or up to a dot
            ("time_embedding", "up_blocks.0").
        num_train_timesteps: of the diffusion, rows of the embedding table.
        num_class_embeds: classes of a class-conditional model. A further row, used without labels, is for any.

    Raises:
        ValueError: an argument is none of these.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 2),
        layers_per_block: int = 2,
        dropout: float = 0.1,
        bits: int = 2,
        norm: str = "group",
        norm_num_groups: int = 32,
        snn_timesteps: int | None = None,
        signed: bool | tuple[str, ...] = False,
        num_train_timesteps: int = 1000,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        self._check_arguments()
        self.steps = snn_timesteps or 1
        if snn_timesteps:
            activation = partial(ConvertedNeuron, snn_timesteps)
        else:
            activation = nn.ReLU if bits == UNQUANTIZED else partial(QuantizedReLU, bits)
        normalization = nn.BatchNorm2d if norm == "batch" else partial(nn.GroupNorm, norm_num_groups)
        time_channels = 4 * channels
        block = partial(
            QuantizedResidualBlock,
            time_channels=time_channels,
            dropout=dropout,
            activation=activation,
            norm=normalization,
        )
        self.time_embedding = QuantizedTimeEmbedding(num_train_timesteps, channels, time_channels, activation)
        self.class_embedding = nn.Embedding(num_class_embeds + 1, time_channels) if num_class_embeds else None
        self.stem_conv = nn.Conv2d(in_channels, channels, 3, padding=1)

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skipped = [channels]
        for level, multiplier in enumerate(channel_multipliers):
            if level:
                self.down_blocks.append(Resample(skipped[-1], upwards=False))
                skipped.append(skipped[-1])
            for _ in range(layers_per_block):
                self.down_blocks.append(block(skipped[-1], channels * multiplier))
                skipped.append(channels * multiplier)
        width = skipped[-1]
        self.mid_blocks = nn.ModuleList(block(width, width) for _ in range(2))
        for multiplier in reversed(channel_multipliers):
            if self.up_blocks:
                self.up_blocks.append(Resample(width, upwards=True))
            for _ in range(layers_per_block + 1):
                self.up_blocks.append(block(width + skipped.pop(), channels * multiplier))
                width = channels * multiplier

        self.read_out = ReadOut(width, out_channels or in_channels, self.steps, activation, normalization)
        self._choose_signed()
        self._initialize()

    def _check_arguments(self) -> None:
        config = self.config
        check_unet_sizes(config)
        if not 0 <= config.dropout < 1:
            raise ValueError(f"dropout is {config.dropout}; it must be from 0 to below 1")
        if not (1 <= config.bits <= 16 or config.bits == UNQUANTIZED):
            raise ValueError(f"bits is {config.bits}; it must be from 1 to 16, or {UNQUANTIZED} for plain ReLU")
        if config.norm not in NORMS:
            raise ValueError(f"norm is {config.norm!r}; valid are {', '.join(map(repr, NORMS))}")
        if config.norm == "group" and (config.norm_num_groups < 1 or config.channels % config.norm_num_groups):
            raise ValueError(f"norm_num_groups is {config.norm_num_groups}; it must divide channels, {config.channels}")
        if config.snn_timesteps is None:
            if config.signed:
                raise ValueError(f"signed is {config.signed}; without snn_timesteps no neuron spikes")
            return
        check_whole("snn_timesteps", config.snn_timesteps, 1)
        if config.bits == UNQUANTIZED:
            raise ValueError(
                f"snn_timesteps is {config.snn_timesteps} and bits is {config.bits}; spiking needs at most 16 bits"
            )

    def _choose_signed(self) -> None:
        signed, neurons = self.config.signed, self.neurons()
        chosen = list(neurons.values()) if signed is True else []
        if isinstance(signed, str) or not isinstance(signed, bool | Sequence):
            raise ValueError(f"signed is {signed!r}; it must be True, False or a tuple of names")
        for name in () if isinstance(signed, bool) else signed:
            chosen += neurons_named(neurons, name, "signed")
        for neuron in chosen:
            neuron.signed = True

    def _initialize(self) -> None:
        """DDPM's first weights: the untrained model predicts almost nothing, and so does each residual branch."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                small = name.endswith((".conv2", "read_out.conv"))
                nn.init.xavier_uniform_(module.weight, gain=TAIL_GAIN if small else 1.0)
                nn.init.zeros_(module.bias)

    @classmethod
    def from_official(cls, checkpoint: str | Path | Mapping, bits: int, **options) -> "QuantizedUNet2DModel":
        """Load a checkpoint of the authors' ANN2SNN, quantised or converted: see `conversion.load`."""
        from generation.spiking_diffusion.conversion import load

        return load(checkpoint, bits, **options)

    # Times and classes are looked up, and complained of, as in the other spiking U-Net.
    embed = SpikingUNet2DModel.embed

    def neurons(self) -> dict[str, ConvertedNeuron]:
        """All layers of spiking neurons, by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, ConvertedNeuron)}

    def blocks(self) -> dict[str, nn.Module]:
        """Residual blocks, changes of resolution and the read-out by name, in the order in which an image passes."""
        paths = {name: getattr(self, name) for name in ("down_blocks", "mid_blocks", "up_blocks")}
        blocks = {f"{name}.{index}": block for name, path in paths.items() for index, block in enumerate(path)}
        return blocks | {"read_out": self.read_out}

    def trace(
        self, sample: Tensor, timestep: Tensor | int, class_labels: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Run the network block by block, as far as the iterator is asked for; arguments are those of `forward`.

        Yields:
            For each of `blocks()` its input, `[T B, channels, H, W]`, the embedding, `[T B, 4 channels of the stem]`,
            and its output; that of the last is the prediction, `[B, out_channels, H, W]`.
        """
        embedding = self.time_embedding.spread(self.embed(len(sample), timestep, class_labels), self.steps)
        x = self.stem_conv(sample).repeat(self.steps, 1, 1, 1)
        skipped = [x]
        for name, block in self.blocks().items():
            if name.startswith("up_blocks") and isinstance(block, QuantizedResidualBlock):
                x = torch.cat([x, skipped.pop()], 1)
            y = block(x, embedding)
            yield x, embedding, y
            x = y
            if name.startswith("down_blocks"):
                skipped.append(x)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        class_labels: Tensor | Sequence[int] | int | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict the noise.

        Args:
            sample: `[B, in_channels, H, W]`.
            timestep: of the diffusion: one, or `[B]`.
            class_labels: one for all images, or `[B]`, whole numbers; `num_class_embeds` is any class, as is None.
            return_dict: in diffusers' output class, or in a tuple.

        Raises:
            ValueError: sides are not divided by the model's levels, the sample is of another data type than the
                weights, or times or labels are out of range.
        """
        check_sample(sample, self.config, self.stem_conv.weight)
        for *_, block_output in self.trace(sample, timestep, class_labels):
            output = block_output
        return UNet2DOutput(output) if return_dict else (output,)
