"""Training of radiance fields: `RadianceFieldTraining` holds the loss, the optimiser and the occupancy grid's updates.

A step takes as many of a batch's rays, from the first, as have `samples` samples together: their number grows as empty
space is found.
"""

import math
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from generation.argument_checks import check_choice
from generation.atomic_files import write_folder_atomically
from generation.numbered_batches import generator_of_batch
from generation.radiance_field.renderer import Drawn, Renderer, first_rays, rays_within
from generation.radiance_field.saved_renderer import save
from generation.radiance_field.scene import Scene

LOSSES = ("smooth_l1", "mse")


class RadianceFieldTraining(pl.LightningModule):
    """Fits a field to a scene's pictures.

    Batches are those of `SceneRays`.

    Args:
        kind: of field: see `Renderer`.
        field: arguments of the field.
        occupancy: arguments of the occupancy grid.
        step: least length of a sample, in the scene's units.
        cone_angle: growth of samples with distance.
        samples: of an optimiser step, over all processes together.
        loss: "smooth_l1", with the transition at `beta`, or "mse".
        beta: see `loss`.
        balance_weight: of the loss that keeps experts equally busy.
        grid_learning_rate, head_learning_rate, gate_learning_rate: of Adam, for hash grids, heads, and the gate with
            its grid; reached after `warmup_steps`, falling to `last_rate` of it along a cosine.
        warmup_steps: of a linear warm-up.
        last_rate: share of the rates that is left at the end.
        weight_decay: of the heads.

    Raises:
        ValueError: an argument is out of range, or the scene does not fit the field.
        RuntimeError: the loss is not finite.
    """

    def __init__(
        self,
        kind: Literal["hash_experts", "single_grid", "switch_nerf"],
        field: dict[str, Any],
        occupancy: dict[str, Any],
        step: float,
        cone_angle: float = 0.0,
        samples: int = 1 << 15,
        loss: Literal["smooth_l1", "mse"] = "smooth_l1",
        beta: float = 0.1,
        balance_weight: float = 1e-2,
        grid_learning_rate: float = 1e-2,
        head_learning_rate: float = 5e-3,
        gate_learning_rate: float = 1e-3,
        warmup_steps: int = 30,
        last_rate: float = 0.05,
        weight_decay: float = 1e-6,
    ) -> None:
        super().__init__()
        check_choice("loss", loss, LOSSES)
        for name, value, valid, words in (
            ("samples", samples, samples >= 1, "at least 1"),
            ("beta", beta, beta > 0, "above 0"),
            ("balance_weight", balance_weight, balance_weight >= 0, "at least 0"),
            ("grid_learning_rate", grid_learning_rate, grid_learning_rate > 0, "above 0"),
            ("head_learning_rate", head_learning_rate, head_learning_rate > 0, "above 0"),
            ("gate_learning_rate", gate_learning_rate, gate_learning_rate > 0, "above 0"),
            ("warmup_steps", warmup_steps, warmup_steps >= 0, "at least 0"),
            ("last_rate", last_rate, 0 <= last_rate <= 1, "from 0 to 1"),
            ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
        ):
            if not valid:
                raise ValueError(f"{name} is {value}; it must be {words}")
        self.save_hyperparameters()
        self.renderer = Renderer(kind, field, occupancy, step, cone_angle)
        self.seed = torch.initial_seed() % 2**31

    @property
    def scene(self) -> Scene:
        return self.trainer.datamodule.scene

    def setup(self, stage: str) -> None:
        """Take the scene's box, distances and background.

        Raises:
            ValueError: the field has too few embeddings of appearances.
        """
        self.renderer.place(self.scene)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        generator = generator_of_batch(self, self.seed, batch_index)
        self.renderer.update_occupancy(self.global_step, self._shared_generator())
        jitter = torch.rand(len(batch["origin"]), generator=generator, device=self.device)
        samples = self.renderer.march(batch["origin"], batch["direction"], jitter)
        rays = rays_within(samples, self.hparams.samples // self.trainer.world_size)
        samples = first_rays(samples, rays)
        said = self.renderer.ask(batch["origin"][:rays], batch["direction"][:rays], samples, batch["appearance"][:rays])
        colour = self.renderer.composite(said, samples).colour
        wanted = batch["colour"][:rays]
        error = self.error(colour, wanted)
        loss = error if said.balance_loss is None else error + self.hparams.balance_weight * said.balance_loss
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss is {loss.item()} at step {self.global_step}: lower the learning rates")
        self._log(said, F.mse_loss(colour.detach(), wanted), rays, len(samples.start))
        return loss

    def error(self, colour: Tensor, wanted: Tensor) -> Tensor:
        if self.hparams.loss == "mse":
            return F.mse_loss(colour, wanted)
        return F.smooth_l1_loss(colour, wanted, beta=self.hparams.beta)

    def _shared_generator(self) -> torch.Generator:
        """The same on all processes, whose occupancy grids stay equal."""
        return torch.Generator(self.device).manual_seed((self.seed + self.global_step * 0x9E3779B1) % 2**32)

    def _log(self, said: Any, mse: Tensor, rays: int, samples: int) -> None:
        options = {"prog_bar": True, "batch_size": rays}
        self.log("train/psnr", -10 * mse.log10(), **options)
        if said.load_fractions is not None:
            for expert, share in enumerate(said.load_fractions):
                self.log(f"load/{expert}", share, **options)
        self.log_dict({"train/rays": float(rays), "train/samples": float(samples)}, batch_size=rays)

    def validation_step(self, batch: dict[str, int], batch_index: int) -> None:
        """PSNR and SSIM of a held-out picture, drawn with the mean appearance."""
        drawn, frame = self.draw(int(batch["frame"])), int(batch["frame"])
        wanted = torch.as_tensor(self.scene.images[frame])[..., :3].to(self.device).float() / 255
        scores = measures(drawn.colour, wanted, None if self.scene.masks is None else self.scene.masks[frame])
        named = {f"val/{name}": value for name, value in scores.items()}
        self.log_dict(named, prog_bar=True, sync_dist=True, batch_size=1)

    def draw(self, frame: int) -> Drawn:
        """A picture from one of the scene's cameras."""
        return self.renderer.eval().draw_image(self.scene.cameras.to(self.device), frame)

    @rank_zero_only
    def on_train_end(self) -> None:
        """Leave the renderer as `<run>/renderer`, in a run that leaves checkpoints."""
        if self.trainer.checkpoint_callback is None:
            return
        folder = Path(self.trainer.default_root_dir) / "renderer"
        write_folder_atomically(folder, lambda new: save(self.renderer, new, self.scene))
        print(f"trained model: {folder}\nfly through it:  python -m generation render {folder} --output fly.mp4")

    def configure_optimizers(self) -> dict[str, Any]:
        settings = self.hparams
        rates = {
            "grids": settings.grid_learning_rate,
            "heads": settings.head_learning_rate,
            "gate": settings.gate_learning_rate,
        }
        groups = [
            {"params": parameters, "lr": rates[name], "weight_decay": settings.weight_decay if name == "heads" else 0.0}
            for name, parameters in self.renderer.field.parameter_groups().items()
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15, fused=True)
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            if step < settings.warmup_steps:
                return (step + 1) / settings.warmup_steps
            falling = 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))
            return settings.last_rate + (1 - settings.last_rate) * falling

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def measures(colour: Tensor, wanted: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """PSNR in decibels and SSIM (11 x 11, sigma 1.5) of a picture.

    Args:
        colour, wanted: `[H, W, 3]` in [0, 1].
        mask: bool `[H, W]`, the pixels that count for PSNR; SSIM is of the whole picture, the others made equal.
    """
    if mask is not None:
        mask = torch.as_tensor(mask).to(colour.device)
        colour = torch.where(mask[..., None], colour, wanted)
    squared = (colour - wanted).square()
    mse = squared.mean() if mask is None else squared[mask].mean()
    ssim = structural_similarity_index_measure(
        colour.permute(2, 0, 1)[None], wanted.permute(2, 0, 1)[None], data_range=1.0
    )
    return {"psnr": -10 * mse.log10(), "ssim": ssim}
