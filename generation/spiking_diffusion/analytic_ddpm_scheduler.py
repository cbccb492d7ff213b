"""Analytic-DPM: stochastic sampling with the variance that is optimal for the model at hand.

Mathematics, for a step from t to an earlier s, with a^2 the share of signal (`alphas_cumprod`) and sigma^2 = 1 - a^2:

    beta     = 1 - a_t^2 / a_s^2
    mean     = (a_s beta x0 + sqrt(1 - beta) sigma_s^2 x_t) / sigma_t^2
    variance = sigma_s^2 beta / sigma_t^2 + (a_s beta / sigma_t^2)^2 spread
    spread   = min(sigma_t^2 / a_t^2 (1 - statistic_t), largest)

The first term is DDPM's `fixed_small`; the spread is the variance of a clean pixel given x_t, which the mean squared
prediction, statistic_t = E |eps|^2 / d, tells. It is 0 (statistic 1) for a single picture, sigma_t^2, which makes the
variance beta, DDPM's `fixed_large`, for data of unit variance, and at most 1 for numbers from -1 to 1.

Sources: Analytic-DPM, arXiv 2201.06503, theorem 1 and appendices; Spiking Diffusion Models, arXiv 2408.16467.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn


class AnalyticDDPMScheduler(SchedulerMixin, ConfigMixin):
    """DDPM over any grid of timesteps, with the variance of Analytic-DPM.

    Timesteps are spaced as "trailing": the first is the noisiest, and the last step, without noise, ends in a clean
    picture. The noise of the step before it is what is left in a picture and is limited.

    Args:
        noise_statistic: E |eps|^2 / d at each timestep, of which the variance is made: see `noise_statistic`.
        num_train_timesteps: of the diffusion.
        beta_start: of betas that rise evenly.
        beta_end: of betas that rise evenly.
        clip_sample: limit predicted pictures, and their spread, to numbers from -1 to 1.
        last_noise: most that the last noise changes a pixel by, on average, in 255ths of the range -1 to 1; None for
            no limit.

    Raises:
        ValueError: the statistic is not one finite number of at least 0 for each timestep.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        *,
        noise_statistic: Sequence[float],
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        clip_sample: bool = True,
        last_noise: float | None = 2.0,
    ):
        if len(noise_statistic) != num_train_timesteps:
            raise ValueError(f"noise_statistic has {len(noise_statistic)} numbers; {num_train_timesteps} are needed")
        if wrong := [value for value in noise_statistic if not (math.isfinite(value) and value >= 0)]:
            raise ValueError(f"noise_statistic holds {wrong[0]}; all must be finite numbers of at least 0")
        self.register_to_config(noise_statistic=[float(value) for value in noise_statistic])  # as JSON has it
        self.betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        self.statistic = torch.tensor(list(noise_statistic), dtype=torch.float64)
        self.init_noise_sigma = 1.0
        self.set_timesteps(num_train_timesteps)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: Tensor, timestep: int | None = None) -> Tensor:
        """`sample`: the model sees it as it is."""
        return sample

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the grid of a run.

        Raises:
            ValueError: the number of steps is not from 1 to `num_train_timesteps`.
        """
        count = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= count:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be from 1 to {count}")
        grid = [round(count - k * count / num_inference_steps) - 1 for k in range(num_inference_steps)]
        self.num_inference_steps, self._grid = num_inference_steps, grid
        self.timesteps = torch.tensor(grid, device=device)

    def previous_timestep(self, timestep: int) -> int:
        """The timestep after `timestep` in a run; -1 is the clean picture.

        Raises:
            ValueError: the run has no such timestep.
        """
        if (timestep := int(timestep)) not in self._grid:
            raise ValueError(f"timestep is {timestep}; those of this run are {self._grid}")
        return [*self._grid, -1][self._grid.index(timestep) + 1]

    def _signal(self, timestep: int) -> float:
        """a^2."""
        return self.alphas_cumprod[timestep].item() if timestep >= 0 else 1.0

    def variance(self, timestep: int) -> float:
        """Of the noise in the step from `timestep`: optimal, 0 in the last step, limited in the step before it."""
        previous = self.previous_timestep(timestep)
        if previous < 0:
            return 0.0
        signal, earlier = self._signal(timestep), self._signal(previous)
        beta = 1 - signal / earlier
        spread = max((1 - signal) / signal * (1 - self.statistic[timestep].item()), 0.0)
        if self.config.clip_sample:
            spread = min(spread, 1.0)
        variance = (1 - earlier) * beta / (1 - signal) + earlier * (beta / (1 - signal)) ** 2 * spread
        if self.config.last_noise is not None and self.previous_timestep(previous) < 0:
            # A normal number of deviation 1 is sqrt(2 / pi) large on average.
            variance = min(variance, (self.config.last_noise * 2 / 255) ** 2 * math.pi / 2)
        return variance

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step towards the picture.

        Args:
            model_output: predicted noise, as `sample`.
            timestep: of the run.
            sample: `[B, C, H, W]`.
            generator: of the noise, one or one for each image.
            return_dict: or a tuple of the earlier sample and the predicted picture.

        Raises:
            ValueError: the run has no such timestep.
        """
        timestep = int(timestep)
        previous = self.previous_timestep(timestep)
        signal, earlier = self._signal(timestep), self._signal(previous)
        alpha = signal / earlier
        picture = (sample - (1 - signal) ** 0.5 * model_output) / signal**0.5
        if self.config.clip_sample:
            picture = picture.clamp(-1, 1)
        mean = (earlier**0.5 * (1 - alpha) * picture + alpha**0.5 * (1 - earlier) * sample) / (1 - signal)
        if previous >= 0:
            like = {"device": model_output.device, "dtype": model_output.dtype}
            mean = mean + self.variance(timestep) ** 0.5 * randn_tensor(sample.shape, generator=generator, **like)
        return DDPMSchedulerOutput(mean, picture) if return_dict else (mean, picture)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Pictures `[B, ...]` as they are at `timesteps` `[B]`."""
        signal = self.alphas_cumprod.to(original_samples.device)[timesteps]
        signal = signal.view(-1, *[1] * (original_samples.dim() - 1))
        return signal.sqrt().to(original_samples) * original_samples + (1 - signal).sqrt().to(original_samples) * noise


@torch.no_grad()
def noise_statistic(
    unet: nn.Module,
    images: Tensor,
    num_train_timesteps: int = 1000,
    *,
    class_labels: Tensor | None = None,
    images_per_timestep: int = 64,
    every: int = 1,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    seed: int = 0,
) -> list[float]:
    """E |eps|^2 / d of a model's predictions for noisy images, at each timestep; in evaluation mode.

    Args:
        unet: called as `unet(sample, timestep, class_labels=...)`, the last if there are any.
        images: of the data set, `[N, C, H, W]` from -1 to 1.
        num_train_timesteps: of the diffusion.
        class_labels: `[N]`, of a class-conditional model.
        images_per_timestep: drawn anew for each timestep; the error falls with its square root.
        every: measure only so many timesteps apart, and the last; between them it is taken to be straight.
        beta_start: of betas that rise evenly.
        beta_end: of betas that rise evenly.
        seed: of images and noise.

    Returns:
        `num_train_timesteps` numbers.

    Raises:
        ValueError: there are no images, or numbers below 1.
    """
    if images.dim() != 4 or not len(images):
        raise ValueError(f"images has the shape {tuple(images.shape)}; expected [at least 1, channels, rows, columns]")
    if class_labels is not None and len(class_labels) != len(images):
        raise ValueError(f"class_labels are {len(class_labels)}; there are {len(images)} images")
    counts = {"num_train_timesteps": num_train_timesteps, "images_per_timestep": images_per_timestep, "every": every}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1")
    signal = (1 - torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)).cumprod(0).tolist()
    generator = torch.Generator().manual_seed(seed)
    measured = sorted({*range(0, num_train_timesteps, every), num_train_timesteps - 1})
    values, training = [], unet.training
    unet.eval()
    try:
        for timestep in measured:
            chosen = torch.randint(len(images), (images_per_timestep,), generator=generator)
            noise = torch.randn((images_per_timestep, *images.shape[1:]), generator=generator).to(images)
            sample = signal[timestep] ** 0.5 * images[chosen.to(images.device)] + (1 - signal[timestep]) ** 0.5 * noise
            labels: dict[str, Any] = {}
            if class_labels is not None:
                labels["class_labels"] = class_labels[chosen.to(class_labels.device)].to(images.device)
            values.append(unet(sample, timestep, **labels).sample.double().square().mean().item())
    finally:
        unet.train(training)
    return np.interp(range(num_train_timesteps), measured, values).tolist()
