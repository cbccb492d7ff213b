"""Images from captions or classes with LINA, as a diffusers pipeline."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

# Saved pipelines name these modules, and diffusers takes classes only from modules that are imported already.
import generation.lina.autoencoder
import generation.lina.packaged_text_encoder
import generation.lina.text_encoder  # noqa: F401
from generation.argument_checks import check_callback, check_choice, check_generator, check_whole, returned_tensor
from generation.lina.embeddings import patchify, unpatchify
from generation.lina.painting import Canvas, outpainting_canvas, prepare_canvas, read_painting, save_animation
from generation.lina.sampling import draw_tokens
from generation.lina.sampling_settings import SamplingSettings, check_size
from generation.lina.text_features import encode_prompts, load_text_encoder
from generation.lina.transformer import LinaTransformer
from generation.loaded_weights import align, not_finite, quiet_loading

__all__ = ["LinaPipeline", "LinaPipelineOutput", "outpainting_canvas", "save_animation"]

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MOST_IMAGES = 4096


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
        text_encoder: a `WordTextEncoder`, or a model of transformers with `tokenizer`; None for class-conditional
            models, or if embeddings of prompts are given.
        tokenizer: of a text encoder of transformers.

    Raises:
        ValueError: the autoencoder's latents are not the transformer's.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    # Its layers use weights directly, so that offloading must move it as a whole.
    _exclude_from_cpu_offload = ("transformer",)
    _optional_components: ClassVar = ["text_encoder", "tokenizer"]  # diffusers adds a list to it
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
        if vae.config.latent_channels != transformer.config.latent_channels:
            raise ValueError(
                f"vae has {vae.config.latent_channels} latent channels; the transformer needs "
                f"{transformer.config.latent_channels}"
            )
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        blocks = getattr(vae.config, "block_out_channels", None)
        self.vae_scale_factor = 2 ** (len(blocks) - 1) if blocks else vae.config.patch_size
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_resize=False)
        self.text_encoder_folder: Path | None = None
        self._interrupt, self._guidance_scale, self._num_timesteps = False, 1.0, 0

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "LinaPipeline":
        """Load what `save_pretrained` wrote; options as of `DiffusionPipeline.from_pretrained`."""
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **quiet_loading() | options)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                align(component)
        return pipeline

    @classmethod
    def from_official(cls, path: str | Path, **options: Any) -> "LinaPipeline":
        """Load a folder in the authors' format: see `generation.lina.official_checkpoints.load_pipeline`."""
        from generation.lina.official_checkpoints import load_pipeline

        return load_pipeline(path, **options)

    @property
    def guidance_scale(self) -> float:
        """Of the last call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of autoregression of the last call: at most what was asked for."""
        return self._num_timesteps

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
        refresh_every: int = 1,
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
            height: in pixels; by default, as `width`, that of `image` or else the model's own. Other sizes work, on
                interpolated gates.
            width: in pixels.
            num_inference_steps: steps of autoregression; of a few tokens, some are skipped.
            num_diffusion_steps: steps in which a token is drawn.
            last_diffusion_steps: of the last step of autoregression, towards which the number goes evenly (DiSA, arXiv
                2505.20297, from 25 to 5); None keeps it.
            guidance_scale: 1 is none.
            min_guidance_scale: guidance rises evenly from it to `guidance_scale`; None for the same in all steps.
                Official: 1 for classes, None for captions.
            guidance_above: tokens are guided at noise levels of at least this; 0 is exact.
            spacing: of noise levels: "official", or "trailing", which is better with few steps.
            order: in which tokens are drawn: "random", "raster", "spiral".
            order_strength: 0 makes any order random, 1 strict.
            refresh_every: so many steps share the first half of the image encoder's work on known tokens; 1 is exact.
            fast: trade some quality for speed: a quarter of the steps of autoregression, 8 trailing diffusion steps,
                guidance above 0.25. Arguments given beside it are kept as they are where they ask for less.
            image: a picture, or one for each image, in which only what `mask_image` shows is drawn anew; known tokens
                are what the others are drawn from. `outpainting_canvas` makes both for a larger picture.
            mask_image: white where to draw, which may be everywhere; a token of which any pixel is white is drawn.
            generator: one for all images, or one for each: then an image depends on its own generator alone.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple.
            return_steps: keep the pictures after each step.
            callback_on_step_end: called with the pipeline, the step, the number of known tokens and a dict of tensors;
                what it returns under "tokens", if anything, is gone on with. It may set `interrupt` of the pipeline.
            callback_on_step_end_tensor_inputs: of `tokens`, `[B, N, D]`.

        Raises:
            ValueError: an argument is out of range or two do not fit, or weights are not finite; nothing is drawn. Or,
                while drawing, the callback returned something else than a dict of finite tokens.
        """
        settings = SamplingSettings(
            num_inference_steps=num_inference_steps,
            num_diffusion_steps=num_diffusion_steps,
            last_diffusion_steps=last_diffusion_steps,
            guidance_scale=guidance_scale,
            min_guidance_scale=min_guidance_scale,
            guidance_above=guidance_above,
            spacing=spacing,
            order=order,
            order_strength=order_strength,
            refresh_every=refresh_every,
        )
        settings = settings.faster() if fast else settings
        painting = read_painting(image, mask_image)
        size = self._check_size(height, width, None if painting is None else tuple(painting[0].shape[2:]))
        check_choice("output_type", output_type, OUTPUT_TYPES)
        offers = check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        self._check_weights()
        condition = self._check_condition("prompt", prompt, class_labels, prompt_embeds)
        copies = check_whole("num_images_per_prompt", num_images_per_prompt, 1, MOST_IMAGES)
        images = check_whole("prompts times num_images_per_prompt", len(condition) * copies, 1, MOST_IMAGES)
        negative = self._check_negative(negative_prompt, negative_prompt_embeds, len(condition))
        generator = check_generator(generator, images)
        stride = self.vae_scale_factor * self.transformer.config.patch_size
        canvas = None if painting is None else prepare_canvas(*painting, images, size, stride)
        self._interrupt, self._guidance_scale = False, settings.guidance_scale

        condition, negative = self._embed_prompts(condition, negative if settings.guided else None)
        grid = (size[0] // stride, size[1] // stride)
        tokens, known = self._known_tokens(canvas, images, grid)
        context, unconditional = self._encode_conditions(condition, negative, grid, copies)
        uniform = torch.special.ndtr(self._normal((images, len(tokens[0])), generator, torch.float32))
        plan = settings.plan(uniform, known, grid, float(self.scheduler.config.shift))
        self._num_timesteps = len(plan.predictions)
        drawing = draw_tokens(
            self.transformer,
            context,
            unconditional,
            tokens,
            plan,
            lambda step, wanted: self._normal((*wanted.shape, tokens.shape[2]), generator, tokens.dtype),
            grid=grid,
            images_per_prompt=copies,
        )
        done, frames = plan.known, []
        with self.progress_bar(total=self._num_timesteps) as progress:
            for step, drawn in enumerate(drawing):
                done += plan.predictions[step]
                if callback_on_step_end is not None:
                    returned = callback_on_step_end(self, step, done, dict.fromkeys(offers, drawn))
                    if (changed := returned_tensor(returned, "tokens", drawn)) is not drawn:
                        drawn.copy_(changed)
                if return_steps:
                    # Pictures are made at the end: the autoencoder may have to wait for the transformer's place.
                    frames.append((drawn.clone(), plan.order[:, :done]))
                progress.update()
                if self._interrupt:
                    break
        result = unpatchify(drawn, grid, self.transformer.config.patch_size)
        if output_type != "latent":
            result = self._pictures(result, canvas, output_type)
        steps = [self._frame(*frame, grid, canvas) for frame in frames]
        steps = [list(pictures) for pictures in zip(*steps, strict=True)] if return_steps else None
        self.maybe_free_model_hooks()
        return LinaPipelineOutput(result, steps) if return_dict else (result, steps)

    def _check_size(
        self, height: int | None, width: int | None, image: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        own = tuple(size * self.vae_scale_factor for size in self.transformer.latent_size)
        multiple = 2 * self.vae_scale_factor * self.transformer.config.patch_size
        return check_size((height, width), own, image, multiple)

    def _check_weights(self) -> None:
        for name, module in (("transformer", self.transformer), ("vae", self.vae), ("text_encoder", self.text_encoder)):
            if isinstance(module, nn.Module) and (wrong := not_finite(module)):
                raise ValueError(f"{name}: the weights {wrong} are not finite; the checkpoint is damaged")

    def _check_condition(
        self, name: str, prompt: Any, labels: Any, embeddings: Any
    ) -> list[str] | Tensor | list[Tensor]:
        """What to draw, of one of the three ways to say it."""
        given = [way for way in (prompt, labels, embeddings) if way is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {name}, class_labels and {name}_embeds, and not {len(given)} of them")
        classes = self.transformer.config.num_classes
        if (labels is not None) != (classes is not None):
            raise ValueError(f"{name}: this model is conditioned on {'classes' if classes else 'captions'}")
        if labels is not None:
            return self._check_labels(labels, classes)
        if embeddings is not None:
            dim, embeddings = self.transformer.config.text_dim, list(embeddings)
            if not embeddings or any(e.dim() != 2 or e.shape[1] != dim for e in embeddings):
                shapes = [tuple(e.shape) for e in embeddings]
                raise ValueError(f"{name}_embeds has shapes {shapes}; each must be (length, {dim})")
            if not all(e.isfinite().all() for e in embeddings):
                raise ValueError(f"{name}_embeds holds numbers that are not finite")
            longest, most = max(map(len, embeddings)), self.transformer.config.text_length
            if longest > most:
                logger.warning("%s_embeds has %d rows; those after the first %d are cut", name, longest, most)
            return embeddings
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, Sequence) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"{name} is {prompt!r}; it must be a string or a list of strings")
        return list(prompts)

    def _check_labels(self, labels: Any, classes: int) -> Tensor:
        try:
            tensor = torch.as_tensor(labels).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            tensor = torch.empty(0)
        whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
        if not whole or not len(tensor) or tensor.min() < 0 or tensor.max() >= classes:
            raise ValueError(f"class_labels is {labels!r}; classes are whole numbers from 0 to {classes - 1}")
        return tensor.long()

    def _check_negative(self, prompt: Any, embeddings: Any, prompts: int) -> list[str] | Tensor | list[Tensor]:
        """What to lead away from: one for all prompts or one for each."""
        if prompt is None and embeddings is None:
            return self.transformer.unconditional(1)
        condition = self._check_condition("negative_prompt", prompt, None, embeddings)
        if len(condition) not in (1, prompts):
            raise ValueError(f"negative_prompt has {len(condition)} entries; it has one, or one for each of {prompts}")
        return condition

    def _embed_prompts(self, condition: Any, negative: Any) -> tuple[Any, Any]:
        """Both with features in place of prompts; a text encoder that has to be loaded is loaded once for both."""
        both = [condition, negative]
        texts = [each if isinstance(each, list) and isinstance(each[0], str) else [] for each in both]
        features = self.encode_prompt(texts[0] + texts[1]) if any(texts) else []
        if empty := sum(not len(own) for own in features[: len(texts[0])]):
            logger.warning("%d of %d prompts are empty: these are drawn unconditionally", empty, len(texts[0]))
        split = (features[: len(texts[0])], features[len(texts[0]) :])
        return tuple(own if text else each for own, text, each in zip(split, texts, both, strict=True))

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str]) -> list[Tensor]:
        """Features `[length, text_dim]` of each prompt; none, `[0, text_dim]`, of an empty one, which is unconditional.

        The text encoder of an official checkpoint is loaded for this and freed again.

        Raises:
            ValueError: there is no text encoder, or the model is not conditioned on captions.
        """
        prompts = self._check_condition("prompt", prompt, None, None)
        worded = [text for text in prompts if text.strip()]
        features = iter(self._features(worded) if worded else ())
        nothing = self.transformer.text_embed.weight[:0]
        return [(next(features) if text.strip() else nothing).to(self._execution_device) for text in prompts]

    def _features(self, prompts: list[str]) -> list[Tensor]:
        config, encoder, tokenizer = self.transformer.config, self.text_encoder, self.tokenizer
        if encoder is None and self.text_encoder_folder is not None:
            encoder, tokenizer = load_text_encoder(self.text_encoder_folder, self.transformer.dtype)
            encoder.to(self._execution_device)
        if encoder is None:
            raise ValueError("text_encoder is None; give prompt_embeds instead of prompt")
        features = encode_prompts(encoder, tokenizer, prompts, config.text_length)
        if features[0].shape[1] != config.text_dim:
            raise ValueError(
                f"text_encoder gives {features[0].shape[1]} numbers a token; the transformer needs {config.text_dim}"
            )
        return features

    def _encode_conditions(
        self, condition: Any, negative: Any, grid: tuple[int, int], copies: int
    ) -> tuple[Tensor, Tensor | None]:
        """Contexts `[B, n, C]` of all images, and of what is led away from; each different one is computed once."""
        transformer = self._present(self.transformer)

        def encode(condition: Any, copies: int) -> Tensor:
            if isinstance(condition, Tensor):
                condition = condition.to(self._execution_device)
            context = transformer.encode_condition(transformer.embed_condition(condition), grid)
            return context.repeat_interleave(copies, 0)

        if negative is None:
            return encode(condition, copies), None
        return encode(condition, copies), encode(negative, copies * len(condition) // len(negative))

    def _known_tokens(self, canvas: Canvas | None, images: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Tokens `[B, N, D]`, and which of them are known, `[B, N]`."""
        config, device, dtype = self.transformer.config, self._execution_device, self.transformer.dtype
        count, dim = grid[0] * grid[1], config.latent_channels * config.patch_size**2
        if canvas is None:
            nothing = torch.zeros(images, count, dtype=torch.bool, device=device)
            return torch.zeros(images, count, dim, device=device, dtype=dtype), nothing
        vae = self._present(self.vae)
        latents = vae.encode(canvas.without_the_hidden().to(device, vae.dtype)).latent_dist.mode()
        latents = (latents - self._shift) * vae.config.scaling_factor
        return patchify(latents.to(dtype), config.patch_size), ~canvas.unknown.to(device)

    def _normal(self, shape: tuple[int, ...], generator: Any, dtype: torch.dtype) -> Tensor:
        """Normal numbers `shape`, of each image from its own generator; the same ones whatever the dtype."""
        drawn = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        return drawn.to(dtype)

    @staticmethod
    def _present(module: nn.Module) -> nn.Module:
        """`module`, brought to the device if it is offloaded: by itself it comes only when its `forward` is called."""
        hook = getattr(module, "_hf_hook", None)
        if hasattr(hook, "pre_forward"):
            hook.pre_forward(module)
        return module

    @property
    def _shift(self) -> float:
        return self.vae.config.get("shift_factor", None) or 0.0

    def _pictures(self, latents: Tensor, canvas: Canvas | None, output_type: str, drawn: Tensor | None = None) -> Any:
        """Pictures of latents, what is not `drawn` `[B, 1, H, W]` grey, and what is kept of the canvas in its place."""
        vae = self._present(self.vae)
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + self._shift
        pictures = vae.decode(latents, return_dict=False)[0].float()
        pictures = pictures if drawn is None else pictures * drawn
        pictures = pictures if canvas is None else canvas.keep(pictures)
        return self.image_processor.postprocess(pictures, output_type)

    def _frame(self, tokens: Tensor, done: Tensor, grid: tuple[int, int], canvas: Canvas | None) -> list[Image.Image]:
        """Pictures of the tokens `done`, `[B, k]` indices, the others grey."""
        patch_size = self.transformer.config.patch_size
        drawn = torch.zeros(tokens.shape[:2], device=tokens.device).scatter_(1, done, 1.0).unflatten(1, grid)
        stride = self.vae_scale_factor * patch_size
        drawn = drawn.repeat_interleave(stride, 1).repeat_interleave(stride, 2)[:, None]
        return self._pictures(unpatchify(tokens, grid, patch_size), canvas, "pil", drawn)
