"""Images from captions or classes with LINA, as a diffusers pipeline."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

from generation.lina.embeddings import patchify, unpatchify
from generation.lina.sampling import (
    ORDERS,
    Plan,
    draw_tokens,
    generation_order,
    guidance_ramp,
    predictions_per_step,
)
from generation.lina.text_features import encode_prompts, load_text_encoder
from generation.lina.token_denoiser import FlowSchedule
from generation.lina.transformer import LinaTransformer

logger = logging.getLogger(__name__)

FAST_SHARE, FAST_DIFFUSION_STEPS, FAST_LEAST_GUIDED = 2, 8, 0.25
MOST_STEPS = 100_000


@dataclass
class LinaPipelineOutput(BaseOutput):
    """What `LinaPipeline` returns.

    Args:
        images: as `output_type` says.
        steps: for each image its pictures after each step, if they were asked for.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    steps: list[list[Image.Image]] | None = None


class LinaPipeline(DiffusionPipeline):
    """Text-to-image or class-to-image, and painting into images.

    Args:
        transformer: the model.
        vae: `AutoencoderKL` or `TinyAutoencoder`.
        scheduler: holds the shift of the noise levels.
        text_encoder: a `WordTextEncoder`, a `PackagedTextEncoder`, or a model of transformers with `tokenizer`; None for
            class-conditional models, or if embeddings of prompts are given.
        tokenizer: of a text encoder of transformers.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ("text_encoder", "tokenizer")
    _callback_tensor_inputs = ("tokens",)

    def __init__(
        self,
        transformer: LinaTransformer,
        vae: nn.Module,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        blocks = getattr(vae.config, "block_out_channels", None)
        self.vae_scale_factor = 2 ** (len(blocks) - 1) if blocks else vae.config.patch_size
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_resize=False)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor,
            do_resize=False,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )
        self.text_encoder_folder: Path | None = None
        self._finite: tuple[int, ...] = ()
        self.interrupt = False  # a callback sets it to stop after the step, with what was drawn so far

    @classmethod
    def from_official(cls, path: str | Path, **options: Any) -> "LinaPipeline":
        """Load a folder in the authors' format: see `generation.lina.official_checkpoints.load_pipeline`."""
        from generation.lina.official_checkpoints import load_pipeline

        return load_pipeline(path, **options)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        class_labels: int | Sequence[int] | None = None,
        prompt_embeds: Sequence[Tensor] | None = None,
        negative_prompt_embeds: Sequence[Tensor] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 64,
        num_diffusion_steps: int = 25,
        last_diffusion_steps: int | None = None,
        guidance_scale: float = 5.0,
        min_guidance_scale: float | None = None,
        guidance_above: float = 0.0,
        spacing: str = "official",
        order: str = "random",
        order_strength: float = 1.0,
        fast: bool = False,
        image: Any = None,
        mask_image: Any = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_steps: bool = False,
        callback_on_step_end: Callable[["LinaPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
    ) -> LinaPipelineOutput | tuple:
        """Draw images.

        Args:
            prompt: what to draw, one or several; "" for anything at all.
            negative_prompt: what guidance leads away from; nothing in particular by default.
            class_labels: instead of `prompt`, of a class-conditional model.
            prompt_embeds: instead of `prompt`, features `[length, text_dim]` of each.
            negative_prompt_embeds: instead of `negative_prompt`; one for all or one each.
            num_images_per_prompt: of each prompt.
            height: in pixels; the model's own by default, as is `width`. Other sizes work, on interpolated gates.
            width: in pixels.
            num_inference_steps: steps of autoregression; of a few tokens, some are skipped.
            num_diffusion_steps: steps in which a token is drawn.
            last_diffusion_steps: of the last step of autoregression, towards which the number goes evenly (DiSA, arXiv
                2505.20297, from 25 to 5); None keeps it.
            guidance_scale: 1 is none.
            min_guidance_scale: guidance rises evenly from it; None for the same in all steps. Official: 1 for classes,
                None for captions.
            guidance_above: tokens are guided at noise levels of at least this; 0 is exact.
            spacing: of noise levels: "official", or "trailing", which is better with few steps.
            order: in which tokens are drawn: "random", "raster", "spiral".
            order_strength: 0 makes any order random, 1 strict.
            fast: trade some quality for speed: half the steps of autoregression, 8 trailing diffusion steps,
                guidance above 0.25. Arguments given beside it are kept as they are where they ask for less.
            image: a picture, or one for each image, in which only what `mask_image` shows is drawn anew; known tokens
                are what the others are drawn from. `outpainting_canvas` makes both for a larger picture.
            mask_image: white where to draw; a token of which any pixel is white is drawn.
            generator: one for all images, or one for each: then an image depends on its own generator alone.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple.
            return_steps: keep the pictures after each step.
            callback_on_step_end: called with the pipeline, the step, the number of known tokens and a dict of tensors;
                what it returns under "tokens" is gone on with.
            callback_on_step_end_tensor_inputs: of `tokens`, `[B, N, D]`.

        Raises:
            ValueError: an argument is out of range or two do not fit, or weights are not finite; nothing is drawn.
        """
        config = self.transformer.config
        height, width = self._check_size(height, width)
        if fast:
            num_inference_steps = -(-num_inference_steps // FAST_SHARE)
            num_diffusion_steps = min(num_diffusion_steps, FAST_DIFFUSION_STEPS)
            spacing, guidance_above = "trailing", max(guidance_above, FAST_LEAST_GUIDED)
        self._check_arguments(
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            num_diffusion_steps=num_diffusion_steps,
            last_diffusion_steps=num_diffusion_steps if last_diffusion_steps is None else last_diffusion_steps,
            guidance_scale=guidance_scale,
            min_guidance_scale=guidance_scale if min_guidance_scale is None else min_guidance_scale,
            guidance_above=guidance_above,
            order_strength=order_strength,
            spacing=spacing,
            order=order,
            output_type=output_type,
        )
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; valid are {self._callback_tensor_inputs}"
            )
        self._check_weights()
        condition = self._condition(prompt, class_labels, prompt_embeds, "prompt")
        prompts = len(condition)
        images = prompts * num_images_per_prompt
        if isinstance(generator, Sequence) and len(generator) != images:
            raise ValueError(f"generator is a list of {len(generator)}; there are {images} images")
        generator = list(generator) if isinstance(generator, Sequence) else generator
        guided = guidance_scale != 1 or (min_guidance_scale or 1) != 1
        negative = self._negative_condition(negative_prompt, negative_prompt_embeds, prompts) if guided else None
        self.interrupt = False

        device, dtype = self._execution_device, self.transformer.dtype
        grid = self.transformer.grid_of((height // self.vae_scale_factor, width // self.vae_scale_factor))
        tokens, known, original = self._known_tokens(image, mask_image, images, (height, width), grid)
        count = int((~known[0]).sum())

        encode = self.transformer.encode_condition
        embed = self.transformer.embed_condition
        context = encode(embed(condition), grid).repeat_interleave(num_images_per_prompt, 0)
        unconditional = None
        if guided:
            unconditional = encode(embed(negative), grid)
            copies = images if len(negative) == 1 else num_images_per_prompt
            unconditional = unconditional.repeat_interleave(copies, 0)

        def normal(*shape: int) -> Tensor:
            return randn_tensor((images, *shape), generator=generator, device=device, dtype=dtype)

        uniform = torch.special.ndtr(normal(grid[0] * grid[1]).float())
        ranked = generation_order(grid, order, order_strength, uniform)
        # Known tokens first, the others in their order.
        drawn_order = ranked.gather(1, (~known.gather(1, ranked)).int().argsort(dim=1, stable=True))
        predictions = [n for n in predictions_per_step(num_inference_steps, count) if n]
        schedule = FlowSchedule(float(self.scheduler.config.shift))
        last = num_diffusion_steps if last_diffusion_steps is None else last_diffusion_steps
        diffusion_steps = torch.linspace(num_diffusion_steps, last, len(predictions)).round().int().tolist()
        plan = Plan(
            order=drawn_order,
            known=grid[0] * grid[1] - count,
            predictions=predictions,
            guidance=guidance_ramp(guidance_scale, len(predictions), min_guidance_scale),
            sigmas=[tuple(schedule.sampling_sigmas(steps, spacing).tolist()) for steps in diffusion_steps],
            least_guided=guidance_above,
        )
        frames: list[Tensor] = []
        drawing = draw_tokens(
            self.transformer,
            context,
            unconditional,
            tokens,
            plan,
            lambda step, wanted: normal(wanted.shape[1], tokens.shape[2]),
            grid=grid,
            images_per_prompt=num_images_per_prompt,
        )
        done = plan.known
        with self.progress_bar(total=len(predictions)) as progress:
            for step, tokens in enumerate(drawing):
                done += predictions[step]
                if return_steps:
                    frames.append(self._frame(tokens, drawn_order, done, grid, original))
                if callback_on_step_end is not None:
                    returned = callback_on_step_end(self, step, done, {"tokens": tokens}) or {}
                    if returned.get("tokens", tokens) is not tokens:
                        tokens.copy_(returned["tokens"])
                progress.update()
                if self.interrupt:
                    break
        latents = unpatchify(tokens, grid, config.patch_size)
        if output_type != "latent":
            drawn = self._decode(latents)
            drawn = drawn if original is None else torch.where(original[1] > 0.5, drawn, original[0])
            latents = self.image_processor.postprocess(drawn, output_type)
        steps = [list(each) for each in zip(*map(self._as_pictures, frames), strict=True)] if return_steps else None
        self.maybe_free_model_hooks()
        return LinaPipelineOutput(latents, steps) if return_dict else (latents, steps)

    def _check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        own = [side * self.vae_scale_factor for side in self.transformer.latent_size]
        multiple = 2 * self.vae_scale_factor * self.transformer.config.patch_size
        sizes = []
        for name, given, default in (("height", height, own[0]), ("width", width, own[1])):
            size = default if given is None else given
            if not isinstance(size, int) or size < multiple or size % multiple:
                raise ValueError(f"{name} is {size}; it must be a multiple of {multiple} pixels")
            sizes.append(size)
        return sizes[0], sizes[1]

    @staticmethod
    def _check_arguments(*, spacing: str, order: str, output_type: str, **numbers: float) -> None:
        for name, value, choices in (
            ("spacing", spacing, ("official", "trailing")),
            ("order", order, ORDERS),
            ("output_type", output_type, ("pil", "np", "pt", "latent")),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; valid are {', '.join(map(repr, choices))}")
        for name, value in numbers.items():
            if name.startswith("num_") or name == "last_diffusion_steps":
                if not isinstance(value, int) or not 1 <= value <= MOST_STEPS:
                    raise ValueError(f"{name} is {value}; it must be a whole number from 1 to {MOST_STEPS}")
            elif name in ("order_strength", "guidance_above"):
                if not 0 <= value <= 1:
                    raise ValueError(f"{name} is {value}; it lies between 0 and 1")
            elif not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} is {value}; it must be a finite number, at least 0")

    def _check_weights(self) -> None:
        """Look for weights that are not finite, once as long as none is changed."""
        parameters = dict(self.transformer.named_parameters())
        stamp = tuple(0 if p.is_inference() else p._version for p in parameters.values())
        stamp += tuple(p.data_ptr() for p in parameters.values())
        if stamp == self._finite:
            return
        for name, parameter in parameters.items():
            if not parameter.isfinite().all():
                raise ValueError(f"transformer: the weights {name} are not finite; the checkpoint is damaged")
        self._finite = stamp

    def _condition(
        self, prompt: Any, labels: Any, embeddings: Sequence[Tensor] | None, name: str
    ) -> Sequence[Tensor] | Tensor:
        """What the transformer embeds, of one of the three ways to say what to draw."""
        given = [way for way in (prompt, labels, embeddings) if way is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {name}, class_labels and {name}_embeds, and not {len(given)} of them")
        classes = self.transformer.config.num_classes
        if (labels is not None) != (classes is not None):
            raise ValueError(f"{name}: this model is conditioned on {'classes' if classes else 'captions'}")
        if labels is not None:
            labels = torch.as_tensor(labels, device=self._execution_device).reshape(-1)
            if labels.is_floating_point() or not len(labels) or labels.min() < 0 or labels.max() >= classes:
                raise ValueError(
                    f"class_labels is {labels.tolist()}; classes are whole numbers from 0 to {classes - 1}"
                )
            return labels
        if embeddings is not None:
            dim = self.transformer.config.text_dim
            embeddings = list(embeddings)
            if not embeddings or any(e.dim() != 2 or e.shape[1] != dim for e in embeddings):
                raise ValueError(
                    f"{name}_embeds has shapes {[tuple(e.shape) for e in embeddings]}; each is [length, {dim}]"
                )
            return [e.to(self._execution_device) for e in embeddings]
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"{name} is {prompt!r}; it must be a string or a list of strings")
        return self.encode_prompt(prompts)

    def _negative_condition(self, prompt: Any, embeddings: Any, prompts: int) -> Sequence[Tensor] | Tensor:
        """One for all prompts or one each."""
        if prompt is None and embeddings is None:
            return self.transformer.unconditional(1)
        condition = self._condition(prompt, None, embeddings, "negative_prompt")
        if len(condition) not in (1, prompts):
            raise ValueError(f"negative_prompt has {len(condition)} entries; it has one, or one for each of {prompts}")
        return condition

    def encode_prompt(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features `[length, text_dim]` of each prompt; none, `[0, text_dim]`, of an empty one, which is unconditional.

        The text encoder of an official checkpoint is loaded for this and freed again.

        Raises:
            ValueError: there is no text encoder.
        """
        if empty := sum(not prompt.strip() for prompt in prompts):
            logger.warning("%d of %d prompts are empty: these images are drawn unconditionally", empty, len(prompts))
        encoder, tokenizer = self.text_encoder, self.tokenizer
        if encoder is None and self.text_encoder_folder is not None:
            encoder, tokenizer = load_text_encoder(self.text_encoder_folder, self.transformer.dtype)
            encoder.to(self._execution_device)
        if encoder is None:
            raise ValueError("text_encoder is None; give prompt_embeds instead of prompt")
        length = self.transformer.config.text_length
        return [features.to(self._execution_device) for features in encode_prompts(encoder, tokenizer, prompts, length)]

    def _known_tokens(
        self, image: Any, mask_image: Any, images: int, size: tuple[int, int], grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Tokens `[B, N, D]`, which of them are known `[B, N]`, and the picture and mask they come from."""
        config, device, dtype = self.transformer.config, self._execution_device, self.transformer.dtype
        count, dim = grid[0] * grid[1], config.latent_channels * config.patch_size**2
        if (image is None) != (mask_image is None):
            raise ValueError("image and mask_image belong together; one of them is missing")
        if image is None:
            tokens = torch.zeros(images, count, dim, device=device, dtype=dtype)
            return tokens, torch.zeros(images, count, dtype=torch.bool, device=device), None
        pictures = self.image_processor.preprocess(image).to(device, dtype)
        masks = self.mask_processor.preprocess(mask_image).to(device, dtype)[:, :1]
        for name, tensor in (("image", pictures), ("mask_image", masks)):
            if tensor.shape[0] not in (1, images) or tuple(tensor.shape[2:]) != size:
                raise ValueError(
                    f"{name} has {tensor.shape[0]} pictures of {tuple(tensor.shape[2:])} pixels; needed are 1 or "
                    f"{images} of {size}"
                )
        stride = self.vae_scale_factor * config.patch_size
        drawn = F.max_pool2d(masks, stride).flatten(1) > 0.5
        counts = drawn.sum(1)
        if not counts.min() or counts.min() != counts.max():
            raise ValueError(
                f"mask_image asks for {counts.tolist()} tokens of each picture; they must be equal, and at least 1"
            )
        distribution = self.vae.encode(pictures.to(self.vae.dtype)).latent_dist
        latents = (distribution.mode() - self._shift) * self.vae.config.scaling_factor
        tokens = patchify(latents.to(dtype), config.patch_size)
        expanded = [x.expand(images, *x.shape[1:]) for x in (tokens, ~drawn, pictures, masks)]
        return expanded[0], expanded[1], (expanded[2], expanded[3])

    @property
    def _shift(self) -> float:
        return self.vae.config.get("shift_factor", None) or 0.0

    def _decode(self, latents: Tensor) -> Tensor:
        """`[B, 3, h, w]` pictures of latents, about [-1, 1]."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self._shift
        return self.vae.decode(latents, return_dict=False)[0]

    def _frame(
        self, tokens: Tensor, order: Tensor, done: int, grid: tuple[int, int], original: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Pictures of the tokens drawn so far, grey where there are none."""
        drawn = torch.zeros_like(order, dtype=tokens.dtype).scatter_(1, order[:, :done], 1.0).unflatten(1, grid)
        stride = self.vae_scale_factor * self.transformer.config.patch_size
        drawn = drawn.repeat_interleave(stride, 1).repeat_interleave(stride, 2)[:, None]
        pictures = self._decode(unpatchify(tokens, grid, self.transformer.config.patch_size)) * drawn
        return pictures if original is None else torch.where(original[1] > 0.5, pictures, original[0])

    def _as_pictures(self, frame: Tensor) -> list[Image.Image]:
        return self.image_processor.postprocess(frame, "pil")


def outpainting_canvas(
    image: Image.Image, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """`image` and `mask_image` for drawing what lies around a picture.

    Args:
        image: the picture.
        left: pixels to draw at its left; `top`, `right` and `bottom` accordingly.

    Raises:
        ValueError: a margin is negative, or all are zero.
    """
    margins = {"left": left, "top": top, "right": right, "bottom": bottom}
    if min(margins.values()) < 0 or not any(margins.values()):
        raise ValueError(f"margins are {margins}; none may be negative and one must be above 0")
    size = (image.width + left + right, image.height + top + bottom)
    canvas, mask = Image.new("RGB", size, (128, 128, 128)), Image.new("L", size, 255)
    canvas.paste(image.convert("RGB"), (left, top))
    mask.paste(0, (left, top, left + image.width, top + image.height))
    return canvas, mask


def save_animation(steps: Sequence[Image.Image], path: str | Path, seconds: float = 3.0, magnify: int = 1) -> None:
    """Write the pictures after each step as an animated GIF or WebP that pauses at its end.

    Args:
        steps: of one image, `LinaPipelineOutput.steps[i]`.
        path: ends in .gif or .webp.
        seconds: that the steps take together.
        magnify: whole factor on their size.

    Raises:
        ValueError: there are no steps or the name ends in something else.
    """
    path = Path(path)
    if not steps or path.suffix.lower() not in (".gif", ".webp"):
        raise ValueError(f"path is {str(path)!r} and there are {len(steps)} steps; needed are .gif or .webp, and steps")
    frames = [step.resize((step.width * magnify, step.height * magnify), Image.Resampling.NEAREST) for step in steps]
    duration = [max(20, round(1000 * seconds / len(frames)))] * len(frames)
    duration[-1] += 1500
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)
