"""Training of radiance fields: `RadianceFieldTraining` holds the loss, the optimiser and the occupancy grid's updates.

A step takes as many of a batch's rays, from the first, as have `samples` samples together: their number grows as empty
space is found.

Several processes share a batch out ray by ray. They tell each other how many samples each ray has, so that together
they take the rays, with the samples, that one process would; colours count by the rays of the whole step, and the
balance loss by its experts' loads. Losses and gradients are then those of one process but for the order in which sums
are rounded. What is drawn or dropped by the points of one process is not: noise of gate or density, and a capacity.
"""

import logging
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
from generation.loaded_weights import not_finite
from generation.numbered_batches import generator_of_batch
from generation.radiance_field.checkpoint_origin import check_origin, origin_of
from generation.radiance_field.heads import FieldOutput
from generation.radiance_field.proposal_sampling import Proposed
from generation.radiance_field.renderer import Drawn, Renderer, first_rays, rays_within
from generation.radiance_field.saved_renderer import save
from generation.radiance_field.scene import Scene
from generation.radiance_field.scene_rays import on_background
from kernels.occupancy_grid import Marched
from training_runs.atomic_files import write_folder_atomically

logger = logging.getLogger("generation")

LOSSES = ("smooth_l1", "mse")


class RadianceFieldTraining(pl.LightningModule):
    """Fits a field to a scene's pictures.

    Batches are those of `SceneRays`.

    Args:
        kind: of field: see `Renderer`.
        field: arguments of the field.
        occupancy: arguments of the occupancy grid; not looked at with sampler "proposal", nor are the next two.
        step: least length of a sample, in the scene's units.
        cone_angle: growth of samples with distance.
        sampler: "occupancy" or "proposal": see `Renderer`.
        proposal: arguments of the `ProposalSampler`.
        background: "none" or "field": see `Renderer`.
        background_field: arguments of the `OutsideOfEllipsoid`.
        samples: of a batch, over all processes together; a single ray may have more.
        loss: "smooth_l1", with the transition at `beta`, or "mse".
        beta: see `loss`.
        balance_weight: of the loss that keeps experts equally busy.
        interlevel_weight: of the loss by which proposals learn.
        distortion_weight: with proposals, of the loss that keeps a ray's weights together.
        grid_learning_rate, head_learning_rate, gate_learning_rate: of Adam, for hash grids, heads, and the gate with
            its grid; reached after `warmup_steps`, falling to `last_rate` of it along a cosine.
        warmup_steps: of a linear warm-up.
        last_rate: share of the rates that is left at the end.
        weight_decay: of the heads.

    Raises:
        ValueError: an argument is out of range, or the scene does not fit the field.
        RuntimeError: the loss or a weight is not finite.
    """

    def __init__(
        self,
        kind: Literal["hash_experts", "single_grid", "switch_nerf"],
        field: dict[str, Any],
        occupancy: dict[str, Any] | None = None,
        step: float | None = None,
        cone_angle: float = 0.0,
        sampler: Literal["occupancy", "proposal"] = "occupancy",
        proposal: dict[str, Any] | None = None,
        background: Literal["none", "field"] = "none",
        background_field: dict[str, Any] | None = None,
        samples: int = 1 << 15,
        loss: Literal["smooth_l1", "mse"] = "smooth_l1",
        beta: float = 0.1,
        balance_weight: float = 1e-2,
        interlevel_weight: float = 1.0,
        distortion_weight: float = 2e-3,
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
            ("interlevel_weight", interlevel_weight, interlevel_weight > 0, "above 0"),
            ("distortion_weight", distortion_weight, distortion_weight >= 0, "at least 0"),
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
        chosen = {"sampler": sampler, "proposal": proposal}
        chosen |= {"background": background, "background_field": background_field}
        self.renderer = Renderer(kind, field, occupancy, step, cone_angle, **chosen)
        self.seed = torch.initial_seed() % 2**31

    @property
    def scene(self) -> Scene:
        return self.trainer.datamodule.scene

    def setup(self, stage: str) -> None:
        """Take the scene's box, distances and background, and say what they are where a training begins.

        Raises:
            ValueError: the field's embeddings of appearances are not as many as the scene's.
        """
        self.renderer.place(self.scene)
        if stage == "fit":
            self._describe()

    @rank_zero_only
    def _describe(self) -> None:
        print(self.scene.summary)
        if self.hparams.sampler == "occupancy":
            count = int((self.scene.box[1] - self.scene.box[0]).norm() / self.hparams.step)
            print(f"step {self.hparams.step:.4g}: {count} samples along the box's diagonal")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["scene"] = origin_of(self.scene)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See that a run goes on with its own scene and model, and say so where nothing is left to train.

        Raises:
            ValueError: the checkpoint is of others.
        """
        if self._trainer is None:  # it is loaded by itself
            return
        check_origin(checkpoint, self.scene, self.hparams, self.state_dict())
        step, last = checkpoint["global_step"], self.trainer.max_steps
        if self.trainer.state.fn == "fit" and 0 < last <= step:
            logger.warning(
                "the checkpoint is of step %d and max_steps is %d: nothing is left to train. Raise --trainer.max_steps "
                "to train on",
                step,
                last,
            )

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        own = generator_of_batch(self, self.seed, batch_index)
        try:
            # Fields draw their noise from the global generator: a resumed run shall draw what it would have drawn.
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(own.initial_seed())
                return self._step(batch, batch_index)
        except ValueError as error:
            if (name := not_finite(self.renderer)) is None:
                raise
            message = f"{name} holds NaN or infinity at step {self.global_step}: lower the learning rates"
            raise RuntimeError(message) from error

    def _step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        if batch_index % self.trainer.accumulate_grad_batches == 0:
            self.renderer.update_occupancy(self.global_step, self._shared_generator())
        rays, own, samples, proposed = self._sampled(batch)
        origins, directions, jitter, appearance, wanted = (
            batch[name][:own] for name in ("origin", "direction", "jitter", "appearance", "colour")
        )
        said = self.renderer.ask(origins, directions, samples, appearance)
        behind = self.renderer.behind(origins, directions, jitter, appearance)
        made = self.renderer.composite(said, samples, behind)
        error = self.error(made.colour, wanted) / (3 * rays)
        squared = F.mse_loss(made.colour.detach(), wanted, reduction="sum") / (3 * rays)
        loads = error.new_zeros(0) if said.loads is None else said.loads
        sums = torch.stack([error.detach(), squared, error.new_tensor(len(samples.start))]).double()
        total = self.trainer.strategy.reduce(torch.cat([sums, loads]), reduce_op="sum")
        if not math.isfinite(total[0].item()):
            raise RuntimeError(f"the loss is {total[0].item()} at step {self.global_step}: lower the learning rates")
        self._log(total, rays)
        loss = error
        if said.balance_loss is not None:
            loss = loss + self.hparams.balance_weight * balance(said, total[3:])
        if proposed is not None:
            interlevel, distortion = proposed.losses(made.weights)
            weighted = self.hparams.interlevel_weight * interlevel + self.hparams.distortion_weight * distortion
            loss = loss + weighted / rays
        return loss * self.trainer.world_size  # over which DDP takes the mean of gradients

    def _sampled(self, batch: dict[str, Tensor]) -> tuple[int, int, Marched, Proposed | None]:
        """Of the batch's first rays, how many are taken (see `_rays_of_step`), samples, and how they were proposed."""
        origins, directions, jitter = batch["origin"], batch["direction"], batch["jitter"]
        if self.renderer.proposal is None:
            samples = self.renderer.march(origins, directions, jitter)
            rays, own = self._rays_of_step(samples.offsets)
            return rays, own, first_rays(samples, own), None
        # Proposals are asked for the rays that are taken alone: how many samples each has is known before.
        spans = self.renderer.spans(origins, directions)
        rays, own = self._rays_of_step(self.renderer.proposal.offsets(spans))
        spans = type(spans)(*(value[:own] for value in spans))
        proposed = self.renderer.propose(origins[:own], directions[:own], spans, jitter[:own], self.global_step)
        return rays, own, proposed.samples, proposed

    def _rays_of_step(self, offsets: Tensor) -> tuple[int, int]:
        """How many of the batch's first rays are taken, by all processes together and by this one."""
        processes, most = self.trainer.world_size, self.hparams.samples
        if processes > 1:
            counts = self.all_gather(offsets.diff()).t().flatten()  # in the order of the batch
            offsets = F.pad(counts.cumsum(0), (1, 0))
        rays = rays_within(offsets, most)
        return rays, len(range(self.global_rank, rays, processes))

    def error(self, colour: Tensor, wanted: Tensor) -> Tensor:
        """The sum over rays and channels."""
        if self.hparams.loss == "mse":
            return F.mse_loss(colour, wanted, reduction="sum")
        return F.smooth_l1_loss(colour, wanted, beta=self.hparams.beta, reduction="sum")

    def _shared_generator(self) -> torch.Generator:
        """The same on all processes, whose occupancy grids stay equal."""
        return torch.Generator(self.device).manual_seed((self.seed + self.global_step * 0x9E3779B1) % 2**32)

    def _log(self, total: Tensor, rays: int) -> None:
        """Of error, squared error, samples and loads, over all processes."""
        error, squared, samples, *loads = total.float()
        options = {"prog_bar": True, "batch_size": rays}
        self.log("train/psnr", -10 * squared.log10(), **options)
        for expert, load in enumerate(loads):
            self.log(f"load/{expert}", load / samples.clamp(min=1), **options)
        self.log_dict({"train/loss": error, "train/rays": float(rays), "train/samples": samples}, batch_size=rays)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True  # in mid-epoch, too, the held-out pictures are looked at before the end

    def validation_step(self, batch: dict[str, int], batch_index: int) -> None:
        """PSNR and SSIM of a held-out picture."""
        frame = int(batch["frame"])
        named = {f"val/{name}": value for name, value in self.scores(self.draw(frame), frame).items()}
        self.log_dict(named, prog_bar=True, sync_dist=True, batch_size=1)

    def draw(self, frame: int) -> Drawn:
        """A picture from one of the scene's cameras, with its own appearance if that was trained, else the mean."""
        cameras, appearance = self.scene.cameras.to(self.device), self.scene.training_appearance(frame)
        return self.renderer.eval().draw_image(cameras, frame, appearance)

    def photograph(self, frame: int) -> Tensor:
        """`[H, W, 3]` in [0, 1], the scene's picture; what is transparent has the scene's background behind it."""
        picture = torch.as_tensor(self.scene.images[frame]).to(self.device).float() / 255
        return on_background(picture, self.scene.background)

    def scores(self, drawn: Drawn, frame: int) -> dict[str, Tensor]:
        """`measures` of what was drawn of a frame, by the pixels that count."""
        mask = None if self.scene.masks is None else self.scene.masks[frame]
        return measures(drawn.colour, self.photograph(frame), mask)

    @rank_zero_only
    def on_train_end(self) -> None:
        """Say how good held-out pictures are; a run that leaves checkpoints leaves its renderer as `<run>/renderer`."""
        scores = self.trainer.callback_metrics
        if "val/psnr" in scores:
            print(f"held-out pictures: {scores['val/psnr']:.2f} dB, SSIM {scores['val/ssim']:.3f}")
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
            for name, parameters in self.renderer.parameter_groups().items()
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


def balance(said: FieldOutput, loads: Tensor) -> Tensor:
    """This process's part of the balance loss of the points of all processes; the parts add up to it.

    Args:
        said: of the points of this process.
        loads: `[E]`, of the experts, by all processes.
    """
    probabilities = said.routing.probabilities.sum(0)
    return (probabilities * loads.to(probabilities.dtype)).sum() * (len(loads) / loads.sum().clamp(min=1) ** 2)


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
