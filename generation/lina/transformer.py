"""LINA: images from captions or classes, by a masked autoregressive transformer on linear attention.

Three networks are trained together in the latent space of a frozen autoencoder. A context encoder turns the caption
into context tokens; an image encoder, in some order, predicts conditions of the tokens not yet known from those that
are; a token denoiser draws each of these tokens by flow matching. `forward` is the whole training objective, `sampling`
the loop that draws images.

Source: LINA, arXiv 2601.22630, and its published code; NOVA, arXiv 2412.14169, whose softmax model is
`attention="softmax"`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from generation.lina.attention import ATTENTIONS, GATES, NORMALIZATIONS, Attention
from generation.lina.attention_memory import EncoderMemory
from generation.lina.blocks import ContextEncoder, ImageEncoder
from generation.lina.embeddings import (
    FramePositionEmbedding,
    LabelEmbedding,
    MaskEmbedding,
    TextEmbedding,
    rotary_angles,
)
from generation.lina.token_denoiser import TIME_SCALE, FlowSchedule, TokenDenoiser

SIZES = {"0.4B": (768, 12), "0.6B": (1024, 16), "1.4B": (1536, 16), "1.5B": (1536, 16)}  # width, heads
IMAGENET_CLASSES = 1000
LEAST = {
    **dict.fromkeys(("width", "num_heads", "decoder_depth", "latent_channels", "patch_size", "text_length"), 1),
    **dict.fromkeys(("text_dim", "num_classes", "denoiser_width"), 1),
    **dict.fromkeys(("context_depth", "encoder_depth", "denoiser_depth", "locality", "value_bank"), 0),
}


@dataclass(frozen=True)
class TrainingDraw:
    """The random numbers of one evaluation of the loss.

    Args:
        known: `[B, m]` indices of the tokens that the image encoder sees.
        noise: `[R B, N, D]`; R repetitions, the first of all images first.
        level: `[R B, N]` indices into the schedule's training sigmas.
    """

    known: Tensor
    noise: Tensor
    level: Tensor


class LinaTransformer(ModelMixin, ConfigMixin):
    """Context encoder, image encoder and token denoiser.

    Args:
        width: channels C.
        num_heads: of all attention layers.
        context_depth: blocks of the context encoder.
        encoder_depth: blocks of the image encoder that see known tokens only.
        decoder_depth: blocks of the image encoder that see all tokens; gates and convolutions are in these.
        denoiser_width: of the token denoiser; C if None.
        denoiser_depth: blocks of the token denoiser.
        mlp_ratio: hidden width of the transformer's MLPs over C.
        latent_channels: of the autoencoder.
        latent_size: (rows, columns) of the latents; both divide by twice `patch_size`.
        patch_size: side of an image token's patch; a context token's is twice that.
        text_dim: of the text encoder's features, None for a class-conditional model.
        text_length: rows of an embedded caption.
        num_classes: of a class-conditional model, else None.
        attention: "linear" or "softmax" (NOVA's; it takes neither gates nor a normalization).
        normalization: "division" or "subtraction".
        gates: None, "per_head", "shared", "key" or "value".
        locality: side of the depthwise convolution, odd, or 0 for none.
        rotary: rotate queries and keys of image tokens (in the authors' ablations).
        text_prefix: give the image encoder the caption too (not in the paper).
        value_bank: how many value embeddings all attention layers share, 0 for none (MoVE; not in the paper).

    Raises:
        ValueError: an argument is none of these, or two do not fit.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        width: int = 768,
        num_heads: int = 12,
        context_depth: int = 16,
        encoder_depth: int = 16,
        decoder_depth: int = 16,
        denoiser_width: int | None = None,
        denoiser_depth: int = 6,
        mlp_ratio: float = 4.0,
        latent_channels: int = 16,
        latent_size: tuple[int, int] = (16, 16),
        patch_size: int = 1,
        text_dim: int | None = None,
        text_length: int = 256,
        num_classes: int | None = None,
        attention: str = "linear",
        normalization: str = "division",
        gates: str | None = "per_head",
        locality: int = 5,
        rotary: bool = False,
        text_prefix: bool = False,
        value_bank: int = 0,
    ):
        super().__init__()
        self._check_arguments()
        self.latent_size = tuple(latent_size)
        grid = self.grid_of(self.latent_size)
        options = {
            "attention": attention,
            "normalization": normalization,
            "value_bank": value_bank,
            "mlp_ratio": mlp_ratio,
        }
        prefix = (text_length if text_dim else 1) if text_prefix else 0
        decoder_options = {"gates": gates, "prefix": prefix, "grid": grid, "locality": locality}
        self.video_encoder = ContextEncoder(context_depth, width, num_heads, latent_channels, 2 * patch_size, **options)
        self.image_encoder = ImageEncoder(
            *(encoder_depth, decoder_depth, width, num_heads, latent_channels, patch_size, decoder_options, rotary),
            **options,
        )
        head_width = width if denoiser_width is None else denoiser_width
        self.image_decoder = TokenDenoiser(denoiser_depth, head_width, width, latent_channels, patch_size)
        self.mask_embed = MaskEmbedding(width)
        self.video_pos_embed = FramePositionEmbedding(width)
        self.text_embed = TextEmbedding(text_dim, width, text_length) if text_dim else None
        self.label_embed = LabelEmbedding(num_classes, width) if num_classes else None
        self.shared_values = nn.Parameter(torch.randn(value_bank, width) * 0.02) if value_bank else None
        self._initialize()

    def _check_arguments(self) -> None:
        config = self.config
        for name, choices in (("attention", ATTENTIONS), ("normalization", NORMALIZATIONS), ("gates", (None, *GATES))):
            if config[name] not in choices:
                raise ValueError(f"{name} is {config[name]!r}; valid are {', '.join(map(repr, choices))}")
        for name, least in LEAST.items():
            if config[name] is not None and config[name] < least:
                raise ValueError(f"{name} is {config[name]}; it is at least {least}")
        if config.mlp_ratio * config.width < 1:
            raise ValueError(
                f"mlp_ratio is {config.mlp_ratio}; the MLPs' width, it times {config.width}, is at least 1"
            )
        if config.width % config.num_heads or config.width % 4:
            raise ValueError(f"width is {config.width}; it must divide by 4 and by num_heads, {config.num_heads}")
        if (config.text_dim is None) == (config.num_classes is None):
            raise ValueError(
                f"text_dim is {config.text_dim} and num_classes is {config.num_classes}; give one of them, and not both"
            )
        if config.attention == "softmax" and config.gates is not None:
            raise ValueError(f"gates is {config.gates!r}; softmax attention takes None")
        if config.attention == "softmax" and config.normalization != "division":
            raise ValueError(
                f"normalization is {config.normalization!r}; softmax attention has its own: leave 'division'"
            )
        if config.rotary:
            rotary_angles(config.width // config.num_heads, (1, 1), 0, torch.empty(0))
        if config.locality and config.locality % 2 == 0:
            raise ValueError(f"locality is {config.locality}; it is odd, or 0")
        self.grid_of(config.latent_size)

    @classmethod
    def of_size(
        cls, size: str, image_size: int = 256, *, text_conditional: bool = False, **options
    ) -> "LinaTransformer":
        """A published model, untrained: class-conditional on the latents of MAR's autoencoder, or text-conditional on
        SDXL's.

        Args:
            size: "0.4B", "0.6B", "1.4B" or "1.5B" (the last two are one network; the numbers are those at 512 and 1024
                pixels).
            image_size: in pixels, a multiple of 32.
            text_conditional: captions as features of Phi-2, instead of ImageNet's classes.
            options: further arguments of the class.

        Raises:
            ValueError: there is no such size.
        """
        if size not in SIZES:
            raise ValueError(f"size is {size!r}; valid are {', '.join(SIZES)}")
        width, heads = SIZES[size]
        if text_conditional:
            latents = {"latent_channels": 4, "latent_size": (image_size // 8,) * 2, "patch_size": 2, "text_dim": 2560}
        else:
            latents = {"latent_size": (image_size // 16,) * 2, "num_classes": IMAGENET_CLASSES}
        return cls(**{"width": width, "num_heads": heads, **latents, **options})

    def _initialize(self) -> None:
        transformers = (self.video_encoder, self.image_encoder)
        for module in (layer for network in transformers for layer in network.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.image_decoder.initialize()

    def grid_of(self, latent_size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of image tokens of latents.

        Raises:
            ValueError: the latents do not divide into tokens, and those into context tokens.
        """
        stride = 2 * self.config.patch_size
        if len(latent_size) != 2 or any(side < stride or side % stride for side in latent_size):
            raise ValueError(f"latent_size is {tuple(latent_size)}; rows and columns must be multiples of {stride}")
        return latent_size[0] // self.config.patch_size, latent_size[1] // self.config.patch_size

    def resize(self, latent_size: tuple[int, int], gates: str = "interpolate") -> "LinaTransformer":
        """Make latents of another size the model's own; its gates are interpolated in two dimensions or reset to 1.

        A model that is merely called with other sizes interpolates its gates on the fly.

        Raises:
            ValueError: `gates` is neither "interpolate" nor "reset", or the size does not divide into tokens.
        """
        if gates not in ("interpolate", "reset"):
            raise ValueError(f"gates is {gates!r}; valid are 'interpolate', 'reset'")
        grid = self.grid_of(latent_size)
        for module in self.image_encoder.modules():
            if isinstance(module, Attention) and module.grid != (0, 0):
                module.resize(grid, gates)
        self.latent_size = tuple(latent_size)
        self.register_to_config(latent_size=self.latent_size)
        return self

    def embed_condition(self, condition: Sequence[Tensor] | Tensor) -> Tensor:
        """Features of each caption, `[length_i, text_dim]`, or `[B]` labels, to `[B, T, C]` tokens."""
        return self.label_embed(condition) if self.text_embed is None else self.text_embed(condition)

    def unconditional(self, count: int) -> Sequence[Tensor] | Tensor:
        """The condition of `count` images of anything, as `embed_condition` takes it."""
        if self.text_embed is None:
            return torch.full((count,), self.label_embed.null, device=self.device)
        return [self.text_embed.weight[:0]] * count

    def encode_condition(self, embedded: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the image encoder sees of embedded captions `[B, T, C]`: `[B, T' + h w / 4, C]`, T' = T for a model with
        a text prefix, else 0."""
        beginning = self.mask_embed.bos_token + self.video_pos_embed((grid[0] // 2, grid[1] // 2))
        beginning = beginning.to(embedded.dtype).expand(len(embedded), -1, -1)
        context = self.video_encoder(embedded, beginning, self.shared_values)
        return torch.cat([embedded, context], 1) if self.config.text_prefix else context

    def encode_image(
        self,
        tokens: Tensor,
        context: Tensor,
        grid: tuple[int, int],
        known: Tensor | None,
        wanted: Tensor | None = None,
        memory: EncoderMemory | None = None,
    ) -> Tensor:
        """Conditions of the token denoiser: see `ImageEncoder.forward`."""
        mask_token, bank = self.mask_embed.mask_token, self.shared_values
        return self.image_encoder(tokens, context, mask_token, grid, known, wanted, bank, memory)

    def draw(
        self,
        tokens: Tensor,
        schedule: FlowSchedule,
        repeat: int = 4,
        least_masked: float = 0.7,
        generator: torch.Generator | None = None,
    ) -> TrainingDraw:
        """Random numbers of the published recipe for `[B, N, D]` tokens.

        The share of masked tokens is one draw, for all images, from a normal distribution of mean 1 and deviation 0.25
        cut to [least_masked, 1]; which tokens, and their noise and times, are each token's own.
        """
        batch, count, _ = tokens.shape
        where = {"device": tokens.device, "generator": generator}
        quantiles = torch.special.ndtr(torch.tensor([(least_masked - 1) / 0.25, 0.0], dtype=torch.float64))
        u = torch.rand((), **where).double().cpu()
        masked = 1 + 0.25 * torch.special.ndtri(quantiles[0] + u * (quantiles[1] - quantiles[0])).item()
        visible = round((1 - masked) * count)
        known = torch.rand(batch, count, **where).argsort(1)[:, :visible]
        noise = torch.randn(repeat * batch, *tokens.shape[1:], **where, dtype=tokens.dtype)
        time = torch.randn(repeat * batch, count, **where).sigmoid()
        level = (time * schedule.levels).long().clamp(max=schedule.levels - 1)
        return TrainingDraw(known, noise, level)

    def forward(
        self, tokens: Tensor, condition: Sequence[Tensor] | Tensor, draw: TrainingDraw, schedule: FlowSchedule
    ) -> Tensor:
        """The training loss, a number: mean squared error of the velocity over the masked tokens.

        Args:
            tokens: `[B, N, p p C]`, `patchify` of scaled latents, of the model's own size.
            condition: features of each caption, or labels, as in `embed_condition`; those of which the model shall not
                know are `unconditional`.
            draw: the random numbers.
            schedule: the noise levels.
        """
        grid = self.grid_of(self.latent_size)
        context = self.encode_condition(self.embed_condition(condition), grid)
        encoded = self.encode_image(tokens, context, grid, draw.known)
        masked = torch.ones(tokens.shape[:2], device=tokens.device).scatter(1, draw.known, 0.0)
        repeat = len(draw.noise) // len(tokens)
        encoded, target, masked = (x.repeat(repeat, *[1] * (x.dim() - 1)) for x in (encoded, tokens, masked))
        sigma = schedule.training_sigmas().to(tokens.device)[draw.level]
        weight = sigma[..., None].to(tokens.dtype)
        velocity = self.image_decoder(weight * draw.noise + (1 - weight) * target, encoded, TIME_SCALE * sigma)
        error = F.mse_loss(velocity.float(), (draw.noise - target).float(), reduction="none").mean(-1)
        return (error * masked).sum() / (masked.sum() + 1e-5)
