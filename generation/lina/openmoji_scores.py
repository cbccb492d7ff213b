"""What a model of OpenMoji draws: `python -m generation evaluate-openmoji`, whose --help says more.

All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0.
"""

import argparse
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from torchvision.utils import save_image

from generation.lina.openmoji import GROUPS, Emoji, group_of, split_emoji, to_signed
from generation.lina.shape_scores import draw_prompts
from generation.lina.shipped_models import load_pipeline
from generation.picture_statistics import PictureStatistics
from training_runs.atomic_files import write_atomically, write_json

SHOWN = 32  # pictures of a grid, each above the real one


def grid(drawn: Tensor, real: Tensor, path: Path, columns: int = 8) -> None:
    """Rows of drawn pictures, each above the real ones of the same captions."""
    rows = []
    for start in range(0, min(len(drawn), SHOWN), columns):
        rows += [drawn[start : start + columns], real[start : start + columns]]
    picture = torch.cat(rows).clamp(-1, 1) / 2 + 0.5
    write_atomically(path, lambda partial: save_image(picture, partial, nrow=columns))


def random_part(emoji: Emoji, count: int, seed: int) -> Emoji:
    """`count` of the pictures, or all if there are fewer."""
    order = torch.randperm(len(emoji), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return emoji.pick([emoji.captions[i] for i in order])


def main(options: argparse.Namespace) -> None:
    """Of `generation.__main__.evaluate_openmoji_options`."""
    pipeline = load_pipeline(options.model)
    size = pipeline.transformer.latent_size[0] * pipeline.vae_scale_factor
    training, held_out = split_emoji(size)
    known = random_part(training, options.pictures, options.seed)
    settings = {
        "guidance_scale": options.guidance,
        "num_inference_steps": options.steps,
        "num_diffusion_steps": options.diffusion_steps,
        "spacing": "trailing",
    }
    drawn = {
        "held_out": draw_prompts(pipeline, held_out.captions, options.seed, **settings),
        "training": draw_prompts(pipeline, known.captions, options.seed, **settings),
    }
    real = {"held_out": to_signed(held_out.images), "training": to_signed(known.images)}
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(options.seed))
    grid(drawn["held_out"][order], real["held_out"][order], options.output / "held_out.png")
    grid(drawn["training"], real["training"], options.output / "training.png")

    statistics = PictureStatistics(to_signed(training.images))
    report = {
        "model": options.model,
        "settings": settings,
        "frechet_distance": {
            "halves of the training pictures": statistics.half_split_distance(options.seed),
            f"{len(known)} drawn of training captions": statistics.distance(drawn["training"]),
            f"{len(held_out)} drawn of held-out captions": statistics.distance(drawn["held_out"]),
            f"{len(held_out)} held-out pictures": statistics.distance(real["held_out"]),
        },
    }
    for name, pictures in drawn.items():
        copying = statistics.copying(pictures, real["held_out"])
        report[f"nearest training picture of {name} captions"] = {
            "pixel_ratio": copying.pixel_ratio,
            "feature_ratio": copying.feature_ratio,
            "share_nearer": copying.share_nearer,
        }
    error = (drawn["held_out"].clamp(-1, 1) - real["held_out"]).square().mean((1, 2, 3)).sqrt()
    groups = [group_of(caption) for caption in held_out.captions]
    report["root mean squared difference from the real picture"] = {
        group: mean(value for value, own in zip(error.tolist(), groups, strict=True) if own == group)
        for group in GROUPS
    }
    write_json(options.output / "scores.json", report)
    for name, values in report.items():
        if isinstance(values, dict):
            print(f"{name}:")
            for key, value in values.items():
                print(f"  {key:40} {value:.3f}" if isinstance(value, float) else f"  {key:40} {value}")
    print(f"written to {options.output}")
