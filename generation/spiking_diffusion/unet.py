"""The spiking U-Net of SDDPM and SDM: predicts the noise in an image by neurons that spike for T time steps.

The image drives the first layer as a constant current in every step. What the last layer says in the steps is summed
with weights `readout_decay ** (T - 1 - t)`, as the membrane of a leaky neuron that never fires; the weights are
normalised to 1, unless the model is the official one.

Sources: SDDPM, arXiv 2306.17046; Spiking Diffusion Models, arXiv 2408.16467, and their published code, whose
`Spk_UNet` and `Spk_UNet_TSM` are `official=True` without and with `tsm=True`.
"""

import reprlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from generation.argument_checks import check_whole, whole_numbers
from generation.spiking_diffusion.blocks import (
    ACTIVATIONS,
    Activation,
    Downsample,
    Firing,
    ResidualBlock,
    SpikingConv2d,
    TimeEmbedding,
    Upsample,
    check_threshold,
    neurons_named,
)
from kernels.spiking_neuron.arguments import Settings, check_settings

TAIL_GAIN = 1e-5  # of the last convolution's first weights: the untrained model predicts almost nothing


def stride_of(config: Mapping[str, Any]) -> int:
    """What the sides of images must be multiples of: each level but the first halves them."""
    return 2 ** (len(config["channel_multipliers"]) - 1)


def check_unet_sizes(config: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless a U-Net can have these sizes."""
    for name in ("sample_size", "in_channels", "channels", "layers_per_block", "num_train_timesteps"):
        check_whole(name, config[name], 1)
    for name in ("out_channels", "num_class_embeds"):
        if config[name] is not None:
            check_whole(name, config[name], 1)
    if config["channels"] % 2:
        raise ValueError(f"channels is {config['channels']}; it must be even")
    if not config["channel_multipliers"]:
        raise ValueError("channel_multipliers is empty; it has a number for each level")
    for multiplier in config["channel_multipliers"]:
        check_whole("channel_multipliers", multiplier, 1)
    stride = stride_of(config)
    if config["sample_size"] % stride:
        raise ValueError(f"sample_size is {config['sample_size']}; the levels need a multiple of {stride}")


def check_sample(sample: Tensor, config: Mapping[str, Any], weight: Tensor) -> None:
    """Raises `ValueError` unless a U-Net with this configuration and these weights can take the sample."""
    if not isinstance(sample, Tensor):
        raise ValueError(f"sample is {reprlib.repr(sample)}; it must be a tensor")
    channels, stride = config["in_channels"], stride_of(config)
    if sample.dim() != 4 or sample.shape[1] != channels or any(side % stride for side in sample.shape[2:]):
        raise ValueError(
            f"sample has the shape {tuple(sample.shape)}; expected [batch, {channels}, rows, columns], rows and "
            f"columns multiples of {stride}"
        )
    cast = torch.is_autocast_enabled(weight.device.type) and sample.is_floating_point()
    if sample.dtype != weight.dtype and not cast:
        raise ValueError(f"sample is of {sample.dtype}; it must be of {weight.dtype}, as the weights are")


class SpikingUNet2DModel(ModelMixin, ConfigMixin):
    """Noise prediction, in the form that diffusers' pipelines call.

    Args:
        sample_size: side of the images that pipelines draw; the model takes any that its levels divide.
        in_channels: of the images.
        out_channels: of the prediction; `in_channels` if None.
        channels: of the first layer; the time embedding has four times as many.
        channel_multipliers: of each level, from the finest.
        layers_per_block: residual blocks of a level.
        snn_timesteps: T, the time steps in which neurons spike.
        tsm: learn a scale of each time step in each convolution (temporal-wise spiking mechanism).
        neuron: "if", "lif", or "silu" for the artificial twin of the network (`snn_timesteps` is 1).
        threshold: at which neurons fire, above 0.
        tau: time constant of "lif", in time steps.
        reset_value: of the membrane after a spike; None subtracts the threshold instead (soft reset).
        detach_reset: no gradient through the reset.
        surrogate: "atan", "sigmoid" or "rectangular", in place of the derivative of a spike.
        alpha: sharpness of the surrogate.
        readout_decay: of the weights of the output's time steps.
        official: the read-out of the authors' code: real-valued layers for every time step, weights that do not sum
            to 1.
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
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 4),
        layers_per_block: int = 2,
        snn_timesteps: int = 4,
        tsm: bool = False,
        neuron: str = "if",
        threshold: float = 1.0,
        tau: float = 2.0,
        reset_value: float | None = 0.0,
        detach_reset: bool = False,
        surrogate: str = "atan",
        alpha: float = 2.0,
        readout_decay: float = 0.8,
        official: bool = False,
        num_train_timesteps: int = 1000,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        self._check_arguments()
        activation = partial(Activation, neuron, threshold, **self._neuron_options())
        convolution = partial(SpikingConv2d, scaled_steps=snn_timesteps if tsm else 0)
        time_channels, out_channels = 4 * channels, out_channels or in_channels

        self.time_embedding = TimeEmbedding(num_train_timesteps, channels, time_channels)
        self.class_embedding = nn.Embedding(num_class_embeds + 1, time_channels) if num_class_embeds else None
        self.stem_conv = convolution(in_channels, channels, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.stem_neuron = activation()
        self.entry_conv = convolution(channels, channels, 3, padding=1)
        self.entry_norm = nn.BatchNorm2d(channels)

        residual = partial(ResidualBlock, time_channels=time_channels, activation=activation, convolution=convolution)
        widths = [channels * multiplier for multiplier in channel_multipliers]
        self.down_blocks, skipped, width = nn.ModuleList(), [channels], channels
        for level, level_width in enumerate(widths):
            for _ in range(layers_per_block):
                self.down_blocks.append(residual(width, level_width))
                width = level_width
                skipped.append(width)
            if level < len(widths) - 1:
                self.down_blocks.append(Downsample(width, activation, convolution))
                skipped.append(width)
        self.mid_blocks = nn.ModuleList(residual(width, width) for _ in range(2))
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(layers_per_block + 1):
                self.up_blocks.append(residual(width + skipped.pop(), widths[level]))
                width = widths[level]
            if level:
                self.up_blocks.append(Upsample(width, activation, convolution))

        self.out_norm = nn.BatchNorm2d(width)
        self.out_conv = convolution(width, out_channels, 3, padding=1)
        self.out_step_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1) if official else None
        self.out_step_norm = nn.BatchNorm2d(out_channels) if official else None
        self._initialize()

    def _neuron_options(self) -> dict[str, Any]:
        """Arguments of `kernels.spiking_neuron`, but for the threshold."""
        config, soft = self.config, self.config.reset_value is None
        return {
            "tau": config.tau if config.neuron == "lif" else None,
            "decay_input": True,
            "reset": "soft" if soft else "hard",
            "reset_value": 0.0 if soft else config.reset_value,
            "surrogate": config.surrogate,
            "alpha": config.alpha,
            "detach_reset": config.detach_reset,
        }

    def _check_arguments(self) -> None:
        config = self.config
        if config.neuron not in ACTIVATIONS:
            raise ValueError(f"neuron is {config.neuron!r}; valid are {', '.join(map(repr, ACTIVATIONS))}")
        check_unet_sizes(config)
        check_whole("snn_timesteps", config.snn_timesteps, 1)
        if config.neuron == "silu" and (config.snn_timesteps != 1 or config.tsm):
            raise ValueError(
                f"snn_timesteps is {config.snn_timesteps} and tsm is {config.tsm}; "
                "with neuron='silu' they are 1 and False"
            )
        if not 0 < config.readout_decay <= 1:
            raise ValueError(f"readout_decay is {config.readout_decay}; it must be above 0 and at most 1")
        check_threshold(config.threshold)
        # The time constant too where the neurons have none: a typing error shall not wait for another `neuron`.
        check_settings(Settings(threshold=config.threshold, **self._neuron_options() | {"tau": config.tau}))

    def _initialize(self) -> None:
        """The authors' first weights: the entry's are PyTorch's own, except with temporal-wise scales."""
        for name, module in self.named_modules():
            kept = name == "out_step_conv" or (name == "entry_conv" and not self.config.tsm)
            if isinstance(module, nn.Conv2d | nn.Linear) and not kept:
                small = name == "out_conv" and not self.config.tsm
                nn.init.xavier_uniform_(module.weight, gain=TAIL_GAIN if small else 1.0)
                nn.init.zeros_(module.bias)

    @classmethod
    def from_official(cls, checkpoint: str | Path | Mapping, **options: Any) -> "SpikingUNet2DModel":
        """Load a checkpoint of the authors' SDDPM or SDM: see `official_checkpoints.load`, of which the options are."""
        from generation.spiking_diffusion.official_checkpoints import load

        return load(checkpoint, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "SpikingUNet2DModel":
        """Load what `save_pretrained` wrote; options as of `ModelMixin.from_pretrained`, settings of the model too.

        Raises:
            ValueError: `snn_timesteps` is not the number of temporal-wise scales of the saved model, or it has such
                scales and `tsm` is False.
        """
        if "snn_timesteps" in options:
            where = {name: options[name] for name in ("subfolder", "local_files_only", "revision") if name in options}
            saved, wanted = cls.load_config(pretrained_model_name_or_path, **where), options["snn_timesteps"]
            if saved.get("tsm") and wanted != saved["snn_timesteps"]:
                raise ValueError(
                    f"snn_timesteps is {wanted}; the checkpoint has scales of {saved['snn_timesteps']} time steps"
                )
        told = options.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **options)
        except (RuntimeError, ValueError) as error:
            # diffusers says it once for each convolution, or of one of them, by whether it has accelerate.
            if "step_scale" not in str(error):
                raise
            raise ValueError(
                f"snn_timesteps is not the number of temporal-wise scales that {str(pretrained_model_name_or_path)!r} "
                "holds: its config.json and its weights do not fit together"
            ) from error
        if any(name.endswith("step_scale") for name in info["unexpected_keys"]):
            raise ValueError("tsm is False; the checkpoint has temporal-wise scales, with which it must be True")
        return (model, info) if told else model

    def neurons(self) -> dict[str, Activation]:
        """All layers of neurons, by name; those of the artificial twin are not `spiking`."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Activation)}

    def firing(self, threshold: float | Mapping[str, float] | None = None, snn_timesteps: int | None = None) -> Firing:
        """How neurons fire in a call with these arguments, which are those of `forward`.

        Raises:
            ValueError: a threshold is not above 0, a name is that of no part with neurons, or the number of time steps
                is below 1 or above the number of temporal-wise scales.
        """
        made_for = self.config.snn_timesteps
        if snn_timesteps is not None:
            most = made_for if self.config.tsm or self.config.neuron == "silu" else None
            check_whole("snn_timesteps", snn_timesteps, 1, most)
        steps = made_for if snn_timesteps is None else snn_timesteps
        if threshold is None:
            return Firing(steps)
        neurons = self.neurons()
        if not all(neuron.spiking for neuron in neurons.values()):
            raise ValueError(f"threshold is {threshold}; a model with neuron='silu' has none")
        if not isinstance(threshold, Mapping):
            check_threshold(threshold)
            return Firing(steps, dict.fromkeys(neurons.values(), float(threshold)))
        thresholds: dict[Activation, float] = {}
        for name, value in sorted(threshold.items(), key=lambda item: len(str(item[0]))):
            check_threshold(value)
            thresholds |= dict.fromkeys(neurons_named(neurons, name, "threshold"), float(value))
        return Firing(steps, thresholds)

    def embed(self, count: int, timestep: Tensor | int, class_labels: Tensor | Sequence[int] | int | None) -> Tensor:
        """`[count, 4 channels]`, of the time and of the class."""
        device, most = self.stem_conv.weight.device, self.config.num_train_timesteps - 1
        # Schedulers of diffusers have floating-point times; the embedding table has whole numbers only.
        timestep = whole_numbers("timestep", timestep, most, f"from 0 to {most}", count, device, floating=True)
        embedding = self.time_embedding(timestep)
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels are given, but the model was made without num_class_embeds")
            return embedding
        most = self.config.num_class_embeds
        class_labels = most if class_labels is None else class_labels
        valid = f"from 0 to {most - 1}, or {most} for any"
        return embedding + self.class_embedding(whole_numbers("class_labels", class_labels, most, valid, count, device))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        class_labels: Tensor | Sequence[int] | int | None = None,
        return_dict: bool = True,
        *,
        threshold: float | Mapping[str, float] | None = None,
        snn_timesteps: int | None = None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict the noise.

        Args:
            sample: `[B, in_channels, H, W]`.
            timestep: of the diffusion: one, or `[B]`.
            class_labels: one for all images, or `[B]`, whole numbers; `num_class_embeds` is any class, as is None.
            return_dict: in diffusers' output class, or in a tuple.
            threshold: threshold guidance: at which neurons fire in this call, all of them, or by their names, whole or
                up to a dot ("stem_neuron", "up_blocks", "up_blocks.1", "mid_blocks.0.neuron1"; the longest counts);
                None as they were trained.
            snn_timesteps: for which neurons spike in this call; None as they were trained.

        Raises:
            ValueError: sides are not divided by the model's levels, the sample is of another data type than the
                weights, or times, labels, thresholds or steps are out of range.
        """
        check_sample(sample, self.config, self.stem_conv.weight)
        firing = self.firing(threshold, snn_timesteps)
        steps, embedding = firing.steps, self.embed(sample.shape[0], timestep, class_labels)
        x = self.entry_norm(self.entry_conv(self.stem_neuron(self._stem(sample, steps), firing), steps))
        skipped = [x]
        for block in self.down_blocks:
            x = block(x, embedding, firing)
            skipped.append(x)
        for block in self.mid_blocks:
            x = block(x, embedding, firing)
        for block in self.up_blocks:
            if isinstance(block, ResidualBlock):
                x = torch.cat([x, skipped.pop()], 1)
            x = block(x, embedding, firing)
        output = self._read_out(F.silu(self.out_norm(x)), steps)
        return UNet2DOutput(output) if return_dict else (output,)

    def _stem(self, sample: Tensor, steps: int) -> Tensor:
        """`[T B, channels, H, W]` currents. All steps see one image, so that it is convolved once.

        Normalised before it is repeated it would be the same, but for the count in the running variance's correction,
        which an official model keeps.
        """
        current = F.conv2d(sample, self.stem_conv.weight, self.stem_conv.bias, padding=1)
        if self.config.official or self.config.tsm:
            return self.stem_norm(self.stem_conv.scale(current.repeat(steps, 1, 1, 1), steps))
        return self.stem_norm(current).repeat(steps, 1, 1, 1)

    def readout_weights(self, steps: int) -> Tensor:
        """`[T]`; in float32 arithmetic, as the official code's are."""
        ages = torch.arange(steps - 1, -1, -1, dtype=torch.float32, device=self.stem_conv.weight.device)
        weights = torch.full_like(ages, self.config.readout_decay) ** ages
        return weights if self.config.official else weights / weights.sum()

    def _read_out(self, x: Tensor, steps: int) -> Tensor:
        """`[T B, C, H, W]` -> `[B, out_channels, H, W]`."""
        weights = self.readout_weights(steps).to(x.dtype)
        if self.config.official:
            x = self.out_conv(x, steps)
            x = F.silu(self.out_step_norm(self.out_step_conv(x))) + x
            return torch.einsum("t,tbchw->bchw", weights, x.unflatten(0, (steps, -1)))
        # The convolution is linear: it is of the weighted sum, once.
        if self.out_conv.step_scale is not None:
            weights = weights * self.out_conv.step_scale[:steps]
        x = torch.einsum("t,tbchw->bchw", weights, x.unflatten(0, (steps, -1)))
        bias = self.out_conv.bias[:, None, None] * weights.sum()
        return F.conv2d(x, self.out_conv.weight, padding=1) + bias
