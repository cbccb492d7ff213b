"""What `benchmark lina` measures: our modules and models beside eager ones of the same weights.

The eager reference and the rule of counting launches are the tests' (tests/benchmarks); they are loaded by path,
because no room imports the tests, and an installed package is without them.
"""

import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from generation.lina.attention import Attention
from generation.lina.blocks import Block
from generation.lina.embeddings import patchify, unpatchify
from generation.lina.official_checkpoints import from_official
from generation.lina.sampling import draw_tokens, gather
from generation.lina.sampling_settings import SamplingSettings
from generation.lina.transformer import LinaTransformer

REFERENCES = Path(__file__).resolve().parents[2] / "tests" / "benchmarks"
KERNEL_SIZE = 5


@cache
def reference(name: str) -> ModuleType:
    """The tests' module `name`: "eager_lina_layers", "eager_lina" or "operation_counter".

    Raises:
        SystemExit: this is no checkout.
    """
    path, full_name = REFERENCES / f"{name}.py", f"tests.benchmarks.{name}"
    if not path.is_file():
        raise SystemExit(f"benchmark lina compares with the eager reference of a checkout, and {path} is not there")
    if name == "eager_lina":
        reference("eager_lina_layers")  # which it imports
    if full_name not in sys.modules:
        spec = spec_from_file_location(full_name, path)
        sys.modules[full_name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full_name])
    return sys.modules[full_name]


def randomized(module: nn.Module) -> nn.Module:
    """`module` with gates that are not all one."""
    for name, parameter in module.named_parameters():
        if name.endswith(("key_scale", "value_scale")):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module


def attention_pair(width: int, heads: int, side: int) -> tuple[nn.Module, Attention]:
    """The eager decoder attention for an image of `side` x `side` tokens, and ours with its weights."""
    layers = reference("eager_lina_layers")
    eager = randomized(layers.GatedConvolutionalAttention(width, heads, (side, side), side * side // 4))
    ours = Attention(width, heads, gates="per_head", grid=(side, side), locality=KERNEL_SIZE)
    ours.load_state_dict(from_official(eager.state_dict()))
    return eager, ours


def softmax_attention(width: int, heads: int) -> nn.Module:
    return reference("eager_lina_layers").SoftmaxAttention(width, heads)


def block_pair(width: int, heads: int, side: int) -> tuple[nn.Module, Block]:
    """The eager decoder block and ours."""
    layers = reference("eager_lina_layers")
    attention = layers.GatedConvolutionalAttention(width, heads, (side, side), side * side // 4)
    options = {"gates": "per_head", "grid": (side, side), "locality": KERNEL_SIZE}
    return layers.Block(width, attention), Block(width, heads, **options)


class SamplingCase:
    """Models of one size with the same weights, and everything random about one image.

    Args:
        side: of the image, in tokens; a token is 2 x 2 latents.
        width: of the networks.
        heads: of the attention.
        depth: of each of the three transformers.
        denoiser_depth: of the token denoiser.
        text_dim: of the caption's features.
    """

    def __init__(self, side: int, width: int, heads: int, depth: int, denoiser_depth: int, text_dim: int):
        self.side = side
        config = {"width": width, "context_depth": depth, "latent_channels": 4, "latent_size": (2 * side, 2 * side)}
        config |= {"patch_size": 2, "text_dim": text_dim, "text_length": 256}
        self.options = {
            **config,
            "num_heads": heads,
            "encoder_depth": depth,
            "decoder_depth": depth,
            "denoiser_depth": denoiser_depth,
        }
        eager_config = reference("eager_lina").EagerLinaConfig(
            **config, heads=heads, image_depth=2 * depth, head_width=width, head_depth=denoiser_depth
        )
        self.eager = randomized(reference("eager_lina").EagerLina(eager_config)).eval()
        self.ours = LinaTransformer(**self.options).eval()
        self.ours.load_state_dict(from_official(self.eager.state_dict()))
        self.uniform, self.features = torch.rand(1, side * side), torch.randn(20, text_dim)
        self.noise = torch.randn(side * side, 1, 4, 2 * side, 2 * side)  # of each step

    def softmax_twin(self) -> LinaTransformer:
        return LinaTransformer(**self.options, attention="softmax", gates=None, locality=0).eval()

    def plan(self, settings: SamplingSettings) -> Any:
        known = torch.zeros(self.uniform.shape, dtype=torch.bool)
        return settings.plan(self.uniform, known, (self.side, self.side), 1.0)

    @torch.no_grad()
    def sample_eager(self, settings: SamplingSettings) -> Tensor:
        """Latents, as the official code draws them."""
        plan = self.plan(settings)
        condition = self.eager.text_embed([self.features, None])
        order, sigmas = plan.order[..., None], torch.tensor(plan.sigmas[0])
        noise = self.noise[: len(plan.predictions)]
        return self.eager.sample(condition, order, plan.predictions, noise, plan.guidance, sigmas)

    @torch.no_grad()
    def sample(
        self, settings: SamplingSettings, model: LinaTransformer | None = None, after_step: Any = None
    ) -> Tensor:
        """The same by the sampler of the pipeline; `after_step` is called after each step."""
        model = self.ours if model is None else model
        plan, grid = self.plan(settings), (self.side, self.side)
        captions = ([self.features], model.unconditional(1))
        contexts = [model.encode_condition(model.embed_condition(caption), grid) for caption in captions]
        blank = torch.zeros(1, self.side * self.side, 16)
        noise = [patchify(noise, 2) for noise in self.noise[: len(plan.predictions)]]
        for drawn in draw_tokens(model, *contexts, blank, plan, lambda step, wanted: gather(noise[step], wanted)):
            tokens = drawn
            if after_step is not None:
                after_step()
        return unpatchify(tokens, grid, 2)


def projections(ours: Attention, x: Tensor, mixed: Tensor) -> None:
    """The two matrix products of an attention module, alone."""
    ours.qkv(x)
    ours.proj(mixed)
