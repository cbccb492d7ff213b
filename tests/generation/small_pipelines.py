"""LINA's pipeline on a tiny untrained model, and how the tests draw with it."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from generation.lina.autoencoder import TinyAutoencoder
from generation.lina.pipeline import LinaPipeline
from generation.lina.text_encoder import WordTextEncoder
from generation.lina.transformer import LinaTransformer

STEPS = {"num_inference_steps": 5, "num_diffusion_steps": 3, "guidance_scale": 3.0}
SMALL = {
    "width": 32,
    "num_heads": 2,
    "context_depth": 1,
    "encoder_depth": 1,
    "decoder_depth": 2,
    "denoiser_depth": 1,
    "latent_channels": 6,
    "latent_size": (8, 8),
    "patch_size": 2,
}


def make(**conditioning) -> LinaPipeline:
    """A pipeline whose every weight matters."""
    torch.manual_seed(0)
    transformer = LinaTransformer(**SMALL, **conditioning)
    vae = TinyAutoencoder(width=8)
    for parameter in (*transformer.parameters(), *vae.parameters()):
        if not parameter.any() or (parameter == 1).all():
            torch.nn.init.normal_(parameter.data, mean=parameter.data.mean().item(), std=0.1)
    encoder = WordTextEncoder(dim=16, num_heads=2) if transformer.text_embed is not None else None
    pipeline = LinaPipeline(transformer.eval(), vae.eval(), FlowMatchEulerDiscreteScheduler(), encoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipeline: LinaPipeline, *arguments, seed: int = 0, **options) -> Tensor:
    options = {"generator": seeds(seed)[0], "output_type": "pt", **STEPS} | options
    return pipeline(*arguments, **options).images
