"""Images of spiking diffusion models, as a diffusers pipeline, and the schedulers that agree with the authors' code."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

# Saved pipelines name this module, and diffusers takes classes only from modules that are imported already.
import generation.spiking_diffusion.analytic_ddpm_scheduler
import generation.spiking_diffusion.quantized_unet  # noqa: F401
from generation.argument_checks import (
    check_callback,
    check_choice,
    check_generator,
    check_real,
    check_whole,
    returned_tensor,
)
from generation.loaded_weights import align, not_finite, quiet_loading
from generation.spiking_diffusion.unet import SpikingUNet2DModel, stride_of

OUTPUT_TYPES = ("pil", "np", "pt")
MOST_IMAGES = 4096
LINEAR_BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def ddim_scheduler(num_train_timesteps: int = 1000) -> DDIMScheduler:
    """DDIM as in SDDPM: from the last timestep in even strides, to the noise level of timestep 0."""
    return DDIMScheduler(
        num_train_timesteps=num_train_timesteps,  # by name, or diffusers takes it for a default that may change
        **LINEAR_BETAS,
        clip_sample=True,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def ddpm_scheduler(num_train_timesteps: int = 1000, variance_type: str = "fixed_small") -> DDPMScheduler:
    """DDPM as in SDDPM, right in strides, too (the authors' `ddpm2` is not).

    Args:
        variance_type: "fixed_small", or "fixed_large" for runs of all timesteps: in strides it leaves the noise of the
            last step in the image.
    """
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        **LINEAR_BETAS,
        variance_type=variance_type,
        clip_sample=True,
        timestep_spacing="trailing",
    )


@dataclass
class SpikingDiffusionPipelineOutput(BaseOutput):
    """What `SpikingDiffusionPipeline` returns.

    Args:
        images: as `output_type` says.
        energy: the report of `generation.spiking_diffusion.energy.EnergyMeter`, if it was asked for.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    energy: Any = None


class SpikingDiffusionPipeline(DiffusionPipeline):
    """Images out of noise, of a class if the model knows classes.

    Args:
        unet: the model: a `SpikingUNet2DModel`, or a `QuantizedUNet2DModel`, converted or not. It draws in evaluation
            mode, whichever it is in.
        scheduler: of diffusers, or `AnalyticDDPMScheduler`; `ddim_scheduler()` if None.

    Raises:
        ValueError: the model predicts no noise for its own images, or the two know different timesteps.
    """

    model_cpu_offload_seq = "unet"
    # Its layers use weights directly, so that offloading must move it as a whole.
    _exclude_from_cpu_offload = ("unet",)
    _optional_components: ClassVar = ["scheduler"]
    _callback_tensor_inputs = ("latents",)

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin | None = None):
        super().__init__()
        config = unet.config
        if config.out_channels not in (None, config.in_channels):
            raise ValueError(f"unet has {config.out_channels} out_channels; needed are {config.in_channels}")
        scheduler = ddim_scheduler(config.num_train_timesteps) if scheduler is None else scheduler
        if scheduler.config.num_train_timesteps != config.num_train_timesteps:
            raise ValueError(
                f"scheduler has {scheduler.config.num_train_timesteps} num_train_timesteps; "
                f"the unet has {config.num_train_timesteps}"
            )
        if (predicted := scheduler.config.get("prediction_type", "epsilon")) != "epsilon":
            raise ValueError(f"scheduler has prediction_type {predicted!r}; the model predicts noise, 'epsilon'")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "SpikingDiffusionPipeline":
        """Load what `save_pretrained` wrote; options as of `DiffusionPipeline.from_pretrained`."""
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **quiet_loading() | options)
        align(pipeline.unet)
        return pipeline

    @property
    def interrupt(self) -> bool:
        """Whether to stop after this step, with what was drawn so far; a callback sets it."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | Sequence[int] | Tensor | None = None,
        *,
        num_inference_steps: int = 50,
        threshold: float | Mapping[str, float] | None = None,
        snn_timesteps: int | None = None,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        collect_energy: bool = False,
        callback_on_step_end: Callable[["SpikingDiffusionPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> SpikingDiffusionPipelineOutput | tuple:
        """Draw images.

        Args:
            batch_size: how many.
            class_labels: one for all images, or one each (`batch_size` may then be left out); None, as the number
                `num_class_embeds`, for any.
            num_inference_steps: calls of the model.
            threshold: threshold guidance: at which neurons fire in this call, all or by name as in
                `SpikingUNet2DModel.forward`; None as they were trained.
            snn_timesteps: for which neurons spike in this call; fewer are faster.
            eta: of DDIM, from 0 (no noise in the steps) to 1 (as DDPM).
            guidance_scale: of classes, against the prediction for any class; 1 is none.
            generator: one for all images, or one for each: then an image depends on its own generator alone, up to
                rounding, which differs with the number of images (about 1e-5 in float32).
            latents: the noise to begin with, `[B, in_channels, H, W]`; other sizes than `sample_size` work.
            output_type: "pil" (mode L if `in_channels` is 1), "np" `[B, H, W, C]` or "pt" `[B, C, H, W]`, from 0 to 1.
            return_dict: False returns a tuple.
            collect_energy: count operations and report their energy, for one image and one call of the model; with
                class guidance a call is two evaluations.
            callback_on_step_end: called with the pipeline, the step, the timestep and a dict of tensors; what it
                returns under "latents" is gone on with. It may set `interrupt` of the pipeline.
            callback_on_step_end_tensor_inputs: of `latents`, `[B, in_channels, H, W]`.

        Raises:
            ValueError: an argument is out of range or two do not fit, weights are not finite, or the scheduler has
                times that the model does not know; nothing is drawn.
        """
        unet, config = self.unet, self.unet.config
        check_whole("num_inference_steps", num_inference_steps, 1, config.num_train_timesteps)
        labels = self._check_labels(class_labels)
        images = check_whole("batch_size", batch_size, 1, MOST_IMAGES)
        if labels is not None and len(labels) > 1:
            if images not in (1, len(labels)):
                raise ValueError(f"batch_size is {batch_size}; there are {len(labels)} class_labels")
            images = check_whole("the number of class_labels", len(labels), 1, MOST_IMAGES)
        step_options = self._check_step_options(eta)
        firing = self._check_firing(threshold, snn_timesteps)
        guidance = check_real("guidance_scale", guidance_scale)
        if guidance != 1 and labels is None:
            raise ValueError(f"guidance_scale is {guidance_scale}; without class_labels it must be 1")
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if output_type == "pil" and config.in_channels not in (1, 3):
            raise ValueError(f"output_type is 'pil', for 1 or 3 channels; the model has {config.in_channels}")
        generator = check_generator(generator, images)
        offers = check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        latents = self._check_latents(latents, images)
        if wrong := not_finite(unet):
            raise ValueError(f"unet: the weights {wrong} are not finite; the checkpoint is damaged")

        device, self._interrupt = self._execution_device, False
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_options["generator"] = generator
        training = unet.training
        with self._meter(collect_energy, 1 if guidance == 1 else 2) as meter:
            if latents is None:
                shape = (images, config.in_channels, config.sample_size, config.sample_size)
                latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
            self._set_times(num_inference_steps, device)
            latents = latents.to(device, unet.dtype) * self.scheduler.init_noise_sigma
            labels = None if labels is None else labels.expand(images).to(device)
            try:
                unet.eval()
                with self.progress_bar(total=len(self.scheduler.timesteps)) as progress:
                    for step, timestep in enumerate(self.scheduler.timesteps):
                        model_input = self.scheduler.scale_model_input(latents, timestep)
                        noise = self._predict(model_input, timestep, labels, guidance, firing)
                        latents = self.scheduler.step(noise, timestep, latents, **step_options).prev_sample
                        latents = latents.to(unet.dtype)
                        if callback_on_step_end is not None:
                            returned = callback_on_step_end(self, step, int(timestep), dict.fromkeys(offers, latents))
                            latents = returned_tensor(returned, "latents", latents).to(latents)
                        progress.update()
                        if self._interrupt:
                            break
            finally:
                unet.train(training)
        energy = None if meter is None else meter.report()
        pictures = self.image_processor.postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        return SpikingDiffusionPipelineOutput(pictures, energy) if return_dict else (pictures, energy)

    def _predict(
        self, sample: Tensor, timestep: Tensor, labels: Tensor | None, guidance: float, firing: Mapping[str, Any]
    ) -> Tensor:
        """Noise, led away from that for any class; both are predicted in one batch."""
        if guidance == 1 or labels is None:
            return self.unet(sample, timestep, class_labels=labels, **firing).sample
        anything = torch.full_like(labels, self.unet.config.num_class_embeds)
        both = self.unet(torch.cat([sample] * 2), timestep, class_labels=torch.cat([labels, anything]), **firing).sample
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def _set_times(self, steps: int, device: torch.device) -> None:
        scheduler, most = self.scheduler, self.unet.config.num_train_timesteps - 1
        scheduler.set_timesteps(steps, device=device)
        times = torch.as_tensor(scheduler.timesteps).double()
        if wrong := times[(times != times.round()) | (times < 0) | (times > most)].tolist():
            raise ValueError(
                f"scheduler is {type(scheduler).__name__}, which has the time {wrong[0]:g} in {steps} steps; the model "
                f"knows whole numbers from 0 to {most}: give it timestep_spacing='trailing', or take another"
            )

    def _check_firing(self, threshold: float | Mapping[str, float] | None, steps: int | None) -> dict[str, Any]:
        """Arguments of the model."""
        options = {"threshold": threshold, "snn_timesteps": steps}
        given = {name: value for name, value in options.items() if value is not None}
        unet = getattr(self.unet, "_orig_mod", self.unet)  # in what torch.compile returns
        for name, value in given.items():
            if not isinstance(unet, SpikingUNet2DModel):
                raise ValueError(f"{name} is {value}; it must be None for a {type(unet).__name__}")
        if given:
            unet.firing(**given)
        return given

    def _meter(self, wanted: bool, evaluations: int) -> Any:
        if not wanted:
            return nullcontext()
        if hasattr(self.unet, "_orig_mod"):
            raise ValueError("collect_energy is True; nothing is seen of a compiled network, so it must be False")
        from generation.spiking_diffusion.energy import EnergyMeter

        return EnergyMeter(self.unet, evaluations)

    def _check_labels(self, labels: Any) -> Tensor | None:
        """`[1]` or `[B]`."""
        classes = self.unet.config.num_class_embeds
        if labels is None:
            return None
        if not classes:
            raise ValueError(f"class_labels is {labels!r}; this model knows no classes")
        try:
            tensor = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):
            tensor = torch.empty(0)
        whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
        if tensor.dim() > 1 or not whole or not tensor.numel() or tensor.min() < 0 or tensor.max() > classes:
            raise ValueError(
                f"class_labels is {labels!r}; they are one or a list of whole numbers from 0 to {classes - 1}, "
                f"or {classes} for any"
            )
        return tensor.reshape(-1).long()

    def _check_step_options(self, eta: float) -> dict[str, float]:
        eta = check_real("eta", eta, 1)
        if "eta" in inspect.signature(self.scheduler.step).parameters:
            return {"eta": eta}
        if eta:
            raise ValueError(f"eta is {eta}; {type(self.scheduler).__name__} takes none, so it must be 0")
        return {}

    def _check_latents(self, latents: Any, images: int) -> Tensor | None:
        config = self.unet.config
        if latents is None:
            return None
        if not isinstance(latents, Tensor) or not latents.is_floating_point():
            raise ValueError(f"latents are {latents!r}; they must be a floating-point tensor")
        stride = stride_of(config)
        sides = latents.shape[2:]
        if (
            latents.shape[:2] != (images, config.in_channels)
            or len(sides) != 2
            or any(s % stride or not s for s in sides)
        ):
            raise ValueError(
                f"latents have the shape {tuple(latents.shape)}; expected ({images}, {config.in_channels}, rows, "
                f"columns), rows and columns multiples of {stride}"
            )
        if not latents.isfinite().all():
            raise ValueError("latents hold numbers that are not finite")
        return latents
