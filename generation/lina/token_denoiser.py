"""The head of LINA: draws one token at a time of its own diffusion, given what the image encoder says about it.

Flow matching: at sigma a token is x = sigma noise + (1 - sigma) x0, and the head predicts noise - x0. Sigmas descend;
the head is fed 1000 sigma as time.

`TokenDenoiser` is the network, `SamplingDenoiser` the sampling loop, which computes once what does not change in it:
time embeddings for a whole image, the projection of the conditions for one step of autoregression. Scales, shifts and
gates depend on condition and time, and not on what is drawn: those of several diffusion steps come from one matrix
product, because for the few tokens of a step of autoregression it is the reading of its weights that takes the time.

Sources: MAR, arXiv 2406.11838 (diffusion loss); NOVA, arXiv 2412.14169; AdaLN-zero: DiT, arXiv 2212.09748.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.lina.embeddings import TIME_FREQUENCIES, PatchEmbedding, frequencies
from kernels.packed_linear import activated_linear, packed_twin

TIME_SCALE = 1000.0


class TwoLayers(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width_in, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activated_linear(self.fc1, x, F.silu))


class Modulation(nn.Module):
    """Linear map of the condition to scale, shift and, of a block, gate; its norm has no parameters of its own."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts = parts
        self.proj = nn.Linear(width, parts * width)

    def forward(self, x: Tensor, activated: Tensor) -> tuple[Tensor, ...]:
        """Modulated norm of x `[..., W]`, and the gate if there is one; `activated` is SiLU of the condition."""
        scale, shift, *gate = self.proj(activated).chunk(self.parts, -1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift, *gate


class DenoiserBlock(nn.Module):
    """x + gate * norm(MLP(modulated norm(x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = Modulation(width, 3)
        self.proj = TwoLayers(width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        hidden, gate = self.norm1(x, activated)
        return x + gate * self.norm2(self.proj(hidden))


class TimeAndCondition(nn.Module):
    """Embeds the time and the image encoder's word; the two are added."""

    def __init__(self, condition_width: int, width: int):
        super().__init__()
        self.timestep_proj = TwoLayers(TIME_FREQUENCIES, width)
        self.condition_proj = TwoLayers(condition_width, width)

    def embed_time(self, time: Tensor) -> Tensor:
        """`[...]` times to `[..., W]`."""
        angles = time.unsqueeze(-1) * frequencies(TIME_FREQUENCIES // 2, time)
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return self.timestep_proj(waves.to(self.timestep_proj.fc1.weight.dtype))


class TokenDenoiser(nn.Module):
    """Velocity of a noisy token.

    Args:
        depth: blocks.
        width: W.
        condition_width: of the image encoder.
        channels: of the latents.
        patch_size: p, of the image's tokens.
    """

    def __init__(self, depth: int, width: int, condition_width: int, channels: int, patch_size: int):
        super().__init__()
        self.patch_embed = PatchEmbedding(channels, patch_size, width)
        self.time_cond_embed = TimeAndCondition(condition_width, width)
        self.blocks = nn.ModuleList([DenoiserBlock(width) for _ in range(depth)])
        self.norm = Modulation(width, 2)
        self.head = nn.Linear(width, patch_size * patch_size * channels)

    def initialize(self) -> None:
        """Start as a head that predicts zero."""
        for modulation in (*(block.norm1 for block in self.blocks), self.norm):
            nn.init.zeros_(modulation.proj.weight)
            nn.init.zeros_(modulation.proj.bias)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        nn.init.zeros_(self.patch_embed.proj.bias)
        for layer in (self.time_cond_embed.timestep_proj.fc1, self.time_cond_embed.timestep_proj.fc2):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, noisy: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        """Velocity, noise - x0.

        Args:
            noisy: `[B, N, p p C]`.
            condition: `[B, N, condition_width]`.
            time: `[B, N]` or `[B, 1]`, in (0, 1000]: 1000 sigma.

        Returns:
            `[B, N, p p C]`.
        """
        embed = self.time_cond_embed
        activated = F.silu(embed.condition_proj(condition) + embed.embed_time(time))
        x = self.patch_embed(noisy)
        for block in self.blocks:
            x = block(x, activated)
        return self.head(self.norm(x, activated)[0])


@dataclass(frozen=True)
class FlowSchedule:
    """Noise levels of flow matching.

    Args:
        shift: above 1 it moves steps towards noise: sigma = shift s / (1 + (shift - 1) s).
        levels: of training.
    """

    shift: float = 1.0
    levels: int = 1000

    def shifted(self, s: Tensor) -> Tensor:
        return self.shift * s / (1 + (self.shift - 1) * s)

    def training_sigmas(self) -> Tensor:
        """`[levels]`, from 1 down to `1 / levels` (both shifted)."""
        return self.shifted(1 - torch.arange(self.levels, dtype=torch.float64) / self.levels).float()

    def sampling_sigmas(self, steps: int, spacing: str = "official") -> Tensor:
        """`[steps + 1]`, descending to 0.

        "official": evenly from 1 to `1 / levels`, then 0, so that the last step hardly moves; "trailing": evenly from
        1 to 0, all steps alike.
        """
        if spacing == "trailing":
            return self.shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).float()
        first, last = self.training_sigmas()[[0, -1]].double()
        s = torch.linspace(first.item(), last.item(), steps, dtype=torch.float64)
        return F.pad(self.shifted(s), (0, 1)).float()


class SamplingDenoiser:
    """A `TokenDenoiser` prepared for sampling: the weights of all modulations in one matrix, on CPU packed weights.

    It holds copies: made anew for each image, it never lags behind a training.
    """

    ROWS = 128  # tokens times diffusion steps whose modulations are made at once: enough to be bound by arithmetic

    def __init__(self, denoiser: TokenDenoiser):
        width = denoiser.head.weight.shape[1]
        modulations = [*(block.norm1 for block in denoiser.blocks), denoiser.norm]
        weight = torch.cat([modulation.proj.weight.detach() for modulation in modulations])
        one = torch.ones(width, device=weight.device, dtype=weight.dtype)
        # The 1 of `1 + scale` goes into the bias.
        bias = torch.cat([F.pad(one, (0, (m.parts - 1) * width)) + m.proj.bias.detach() for m in modulations])
        modulation = nn.Linear(*weight.shape[::-1], device="meta")
        modulation.weight, modulation.bias = (nn.Parameter(x, requires_grad=False) for x in (weight, bias))
        self.modulation = packed_twin(modulation)
        self.denoiser = packed_twin(denoiser)
        self.embedding = denoiser.patch_embed.token_weight().contiguous()
        self._times: dict[tuple[float, ...], Tensor] = {}

    def __call__(
        self,
        noise: Tensor,
        condition: Tensor,
        sigmas: tuple[float, ...],
        guidance: float = 1.0,
        least_guided: float = 0.0,
    ) -> Tensor:
        """Draw tokens.

        Args:
            noise: `[B, k, p p C]`.
            condition: `[B, k, W]`; with guidance `[2 B, k, W]`, the unconditional ones behind.
            sigmas: noise levels, descending from 1 to 0; their embeddings are kept.
            guidance: g in v_unconditional + g (v_conditional - v_unconditional); unused if `condition` is not doubled.
            least_guided: below this noise level there is no guidance.

        Returns:
            `[B, k, p p C]`.
        """
        if sigmas not in self._times:
            time = TIME_SCALE * torch.tensor(sigmas[:-1], device=noise.device)
            self._times[sigmas] = self.denoiser.time_cond_embed.embed_time(time)
        times = self._times[sigmas]
        projected = self.denoiser.time_cond_embed.condition_proj(condition)
        x, steps = noise, len(sigmas) - 1
        guided = sum(sigma >= least_guided for sigma in sigmas[:-1]) if len(projected) > len(noise) else 0
        for first, last in ((0, guided), (guided, steps)):
            projected = projected if first < guided else projected[: len(noise)]
            at_once = max(1, self.ROWS // max(projected.shape[:2].numel(), 1))
            for step in range(first, last, at_once):
                activated = F.silu(projected + times[step : min(step + at_once, last), None, None])
                for i, modulations in enumerate(self.modulation(activated), step):
                    velocity = self._velocity(x, modulations)
                    if len(velocity) > len(x):
                        conditional, unconditional = velocity.chunk(2)
                        velocity = torch.lerp(unconditional, conditional, guidance)
                    x = torch.add(x, velocity, alpha=sigmas[i + 1] - sigmas[i])
        return x

    def _velocity(self, x: Tensor, modulations: Tensor) -> Tensor:
        """Of `[B, k, p p C]`, given all scales, shifts and gates, `[B or 2 B, k, ...]`."""
        denoiser = self.denoiser
        parts = iter(modulations.chunk(3 * len(denoiser.blocks) + 2, -1))
        x = F.linear(x, self.embedding, denoiser.patch_embed.proj.bias)
        if len(modulations) > len(x):
            x = x.repeat(2, 1, 1)
        for block in denoiser.blocks:
            scale, shift, gate = (next(parts) for _ in range(3))
            hidden = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale)
            x = torch.addcmul(x, gate, block.norm2(block.proj(hidden)))
        scale, shift = parts
        return denoiser.head(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale))
