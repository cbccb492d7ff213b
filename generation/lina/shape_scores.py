"""The checker's scores of held-out prompts, during training (`ShapeReport`) and after it (`generation evaluate`)."""

import argparse
import itertools
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import save_image

from generation.lina.captioned_shapes import COLOURS, KINDS, PLACES, held_out_prompts
from generation.lina.pipeline import LinaPipeline
from generation.lina.shape_checker import check
from generation.lina.shipped_models import load_pipeline
from generation.lina.training import LinaTraining
from training_runs.atomic_files import write_atomically, write_json

BATCH = 125
COLUMNS = ("all_correct", "colour", "shape", "place", "relation")


def draw_prompts(pipeline: LinaPipeline, captions: Sequence[str], seed: int = 0, **settings: Any) -> Tensor:
    """`[B, 3, h, w]` pictures of captions, in [-1, 1]; `settings` are the pipeline's."""
    pictures = []
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(captions), BATCH):
        batch = list(captions[start : start + BATCH])
        pictures.append(pipeline(batch, generator=generator, output_type="pt", **settings).images)
    pipeline.set_progress_bar_config(disable=False)
    return 2 * torch.cat(pictures) - 1


def score(pipeline: LinaPipeline, level: str, count: int, seed: int = 0, **settings: Any) -> dict[str, float]:
    """The checker's means over `count` held-out prompts of a level of `captioned_shapes`."""
    captions = [scene.caption for scene in held_out_prompts(level, count)]
    return check(draw_prompts(pipeline, captions, seed, **settings), captions).summary()


@torch.no_grad()
def word_sensitivity(module: LinaTraining) -> dict[str, float]:
    """How far one swapped word moves the condition of an unseen picture's tokens, for each kind of word.

    It shows within seconds which words a model has begun to read: the mean over pairs of captions of the largest
    distance of a token's condition, all tokens masked. "order" and "binding" are of captions with the same words in
    another order: a model that reads captions as bags of words does not tell them apart.
    """
    transformer = module.transformer
    grid = transformer.grid_of(transformer.latent_size)

    def conditions(captions: list[str]) -> Tensor:
        context = transformer.encode_condition(transformer.embed_condition(module.text_encoder(captions)), grid)
        dim = transformer.config.latent_channels * transformer.config.patch_size**2
        tokens = context.new_zeros(len(captions), grid[0] * grid[1], dim)
        none = torch.zeros(len(captions), 0, dtype=torch.long, device=tokens.device)
        return transformer.encode_image(tokens, context, grid, none)

    colours, kinds, places = list(COLOURS), list(KINDS), list(PLACES)
    captions = {
        "colour": [f"a {colour} square {places[0]}" for colour in colours if colour[0] not in "aeiou"],
        "shape": [f"a red {kind} {places[0]}" for kind in kinds],
        "place": [f"a red square {place}" for place in places],
        "order": ["a red circle above a blue square", "a blue square above a red circle"],
        "binding": ["a red circle above a blue square", "a blue circle above a red square"],
    }
    distances = {}
    for word, texts in captions.items():
        encoded = conditions(texts)
        apart = (encoded[None] - encoded[:, None]).norm(dim=-1).amax(-1)
        distances[word] = (apart.sum() / (len(texts) * (len(texts) - 1))).item()
    return distances


def captioned_grid(pictures: Tensor, captions: Sequence[str], columns: int = 6) -> Figure:
    """Pictures `[B, 3, h, w]` in [-1, 1], each below its caption."""
    rows = -(-len(captions) // columns)
    figure = Figure(figsize=(2 * columns, 2.3 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, picture, caption in zip(figure.axes, pictures, captions, strict=False):
        axes.imshow((picture.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).numpy(), interpolation="bicubic")
        axes.set_title("\n".join(textwrap.wrap(caption, 24)), fontsize=8)
    return figure


class ShapeReport(pl.Callback):
    """Scores the moving average as training goes on, and draws `<run>/<level>.png`.

    Args:
        every_n_steps: between scores.
        levels: of `captioned_shapes`.
        prompts: of each level.
        guidance_scale: of the pictures.
        num_inference_steps: of autoregression.
        num_diffusion_steps: of each token.
    """

    def __init__(
        self,
        every_n_steps: int = 2000,
        levels: Sequence[str] = ("single", "pairs"),
        prompts: int = 125,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 16,
        num_diffusion_steps: int = 10,
    ):
        self.every_n_steps, self.levels, self.prompts = every_n_steps, tuple(levels), prompts
        self.settings = {
            "guidance_scale": guidance_scale,
            "num_inference_steps": num_inference_steps,
            "num_diffusion_steps": num_diffusion_steps,
            "spacing": "trailing",
        }

    def on_train_batch_end(self, trainer: pl.Trainer, module: LinaTraining, *_: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._report(trainer, module)

    @rank_zero_only
    def _report(self, trainer: pl.Trainer, module: LinaTraining) -> None:
        folder = Path(trainer.default_root_dir)
        state = torch.get_rng_state()  # training does not depend on whether it is scored
        metrics = {}
        with module.averaged():
            pipeline = module.pipeline()
            for level in self.levels:
                captions = [scene.caption for scene in held_out_prompts(level, self.prompts)]
                pictures = draw_prompts(pipeline, captions, **self.settings)
                scores = check(pictures, captions).summary()
                metrics |= {f"{level}/{name}": value for name, value in scores.items()}
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / f"{level}.png", partial(save_image, pictures[:48] / 2 + 0.5, nrow=8))
            metrics |= {f"sensitivity/{word}": value for word, value in word_sensitivity(module).items()}
        torch.set_rng_state(state)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)
        correct = ", ".join(f"{level} {metrics[f'{level}/all_correct']:.3f}" for level in self.levels)
        print(f"\nstep {trainer.global_step}: all correct {correct}", flush=True)


def main(options: argparse.Namespace) -> None:
    """Of `generation.__main__.evaluate_options`."""
    pipeline = load_pipeline(options.model)
    grid = itertools.product(
        options.levels, options.guidance, options.steps, options.diffusion_steps, (False, True)[: 1 + options.fast]
    )
    rows = []
    print(f"{'level':8}{'guidance':>9}{'steps':>6}{'diffusion':>10}{'fast':>6}  {'  '.join(COLUMNS)}")
    for level, guidance, steps, diffusion_steps, fast in grid:
        settings = {
            "guidance_scale": guidance,
            "num_inference_steps": steps,
            "num_diffusion_steps": diffusion_steps,
            "fast": fast,
        }
        scores = score(pipeline, level, options.prompts, options.seed, spacing="trailing", **settings)
        rows.append({"level": level, **settings, **scores})
        cells = (f"{scores[name]:.3f}" if name in scores else "" for name in COLUMNS)
        values = "  ".join(cell.rjust(len(name)) for cell, name in zip(cells, COLUMNS, strict=True))
        print(f"{level:8}{guidance:9g}{steps:6}{diffusion_steps:10}{fast!s:>6}  {values}", flush=True)
    if options.grid is not None:
        captions = [scene.caption for scene in held_out_prompts(options.levels[-1], 24, options.seed + 1)]
        settings = {"guidance_scale": options.guidance[-1], "num_inference_steps": options.steps[0]}
        pictures = draw_prompts(pipeline, captions, options.seed, **settings)
        figure = captioned_grid(pictures, captions)
        write_atomically(options.grid, lambda path: figure.savefig(path, dpi=80))
    report = {"model": options.model, "prompts": options.prompts, "scores": rows}
    write_json(options.output, report)
    print(f"written to {options.output}")
