"""Block-wise fine-tuning of a converted network: each block learns to repeat what the quantised network's block says.

The blocks are walked in order. A block's target is the output of the quantised network's for the same noised image; its
input is what the spiking blocks before it, tuned already, make of that image. The loss is the squared difference of the
mean of the block's output over T. Thresholds stay as they are. The gradient is one of two:

    surrogate: that of the spiking block, through time, with a smooth function's derivative for that of a spike
    twin: that of the quantised block with the spiking block's weights, at the mean of its input; the spiking block's
        output is put in the place of its own (the paper's)

The official code draws the diffusion's time steps below 2**bits only, and adds no noise to the images; here they are
drawn from all, and the images are noised accordingly. It leaves out the read-out, which is tuned here, and tunes time
embedding and stem, which are not.

Source: Spiking Diffusion Models, arXiv 2408.16467, section on conversion, and its published code (ANN2SNN, `SNN_ft`).
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from generation.spiking_diffusion.quantized_unet import QuantizedUNet2DModel

GRADIENTS = ("surrogate", "twin")


class BlockError(NamedTuple):
    """Mean squared error of a block's output, averaged over T, before and after the block was tuned."""

    name: str
    before: float
    after: float


class NoisedBatch(NamedTuple):
    """The arguments of both networks."""

    sample: Tensor
    timestep: Tensor
    class_labels: Tensor | None


def tune(
    spiking: QuantizedUNet2DModel,
    ann: QuantizedUNet2DModel,
    images: Tensor,
    steps_per_block: int,
    *,
    class_labels: Tensor | None = None,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    gradient: str = "surrogate",
    scheduler: SchedulerMixin | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> list[BlockError]:
    """Tune the spiking network in place; both networks are in evaluation mode afterwards.

    Args:
        spiking: what `conversion.convert` made of `ann`.
        ann: the quantised network; its weights stay as they are.
        images: `[N, in_channels, H, W]`, such as the network was trained on.
        steps_per_block: updates by Adam, above 0.
        class_labels: `[N]` integers, of a class-conditional model.
        batch_size: images of an update and of a measurement, drawn with replacement.
        learning_rate: of Adam at first; it falls to 0 along half a cosine.
        gradient: "surrogate", which comes closer to the quantised network, or "twin", the one for signed neurons.
        scheduler: of the noise, one of diffusers'; its `DDPMScheduler` with the model's number of time steps if None.
        generator: on the CPU, of all that is drawn; one of seed 0 if None.
        progress: show a bar.

    Returns:
        The errors of all blocks in their order, on a batch drawn once, with the blocks in front tuned already. The
        last block is the read-out, so that its error is the prediction's.

    Raises:
        ValueError: `spiking` is no conversion of `ann`, there are no images or not as many labels, a number is not
            above 0, or `gradient` is none of the two or does not fit the neurons.
    """
    if spiking.config.snn_timesteps is None or ann.config.snn_timesteps is not None:
        raise ValueError("spiking must be a spiking network, and ann the quantised network that it was made of")
    if [*spiking.blocks()] != [*ann.blocks()]:
        raise ValueError(f"spiking has the blocks {', '.join(spiking.blocks())}, ann has {', '.join(ann.blocks())}")
    numbers = {"steps_per_block": steps_per_block, "batch_size": batch_size, "learning_rate": learning_rate}
    for name, value in (numbers | {"the number of images": len(images)}).items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    if class_labels is not None and class_labels.shape != (len(images),):
        raise ValueError(f"class_labels has the shape {tuple(class_labels.shape)}; there are {len(images)} images")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient is {gradient!r}; valid are {', '.join(map(repr, GRADIENTS))}")
    if gradient == "surrogate" and spiking.config.signed:
        raise ValueError("gradient is 'surrogate', which signed neurons do not have; for them 'twin' is valid")
    spiking.eval()
    ann.eval()
    scheduler = scheduler or DDPMScheduler(num_train_timesteps=spiking.config.num_train_timesteps)
    generator = generator or torch.Generator().manual_seed(0)
    batches = noised_batches(images.to(ann.device, ann.dtype), class_labels, batch_size, scheduler, generator)
    judged, errors, blocks = next(batches), [], spiking.blocks()
    with tqdm(total=len(blocks) * steps_per_block, disable=not progress, unit="update") as bar:
        for name, block in blocks.items():
            bar.set_description(name)
            with torch.no_grad():
                before = _loss(spiking, ann, name, judged, gradient).item()
            weights = [weight for key, weight in block.named_parameters() if not key.endswith("clip")]
            optimizer = torch.optim.Adam(weights, learning_rate)
            rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps_per_block)
            for batch in islice(batches, steps_per_block):
                _loss(spiking, ann, name, batch, gradient).backward()
                optimizer.step()
                optimizer.zero_grad()
                rate.step()
                bar.update()
            with torch.no_grad():
                after = _loss(spiking, ann, name, judged, gradient).item()
            errors.append(BlockError(name, before, after))
    return errors


def noised_batches(
    images: Tensor,
    class_labels: Tensor | None,
    batch_size: int,
    scheduler: SchedulerMixin,
    generator: torch.Generator,
) -> Iterator[NoisedBatch]:
    """Images, drawn with replacement, at times of the whole diffusion, without end."""
    while True:
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
        noise = torch.randn(batch_size, *images.shape[1:], generator=generator).to(images)
        chosen, timestep = chosen.to(images.device), timestep.to(images.device)
        labels = None if class_labels is None else class_labels.to(images.device)[chosen]
        yield NoisedBatch(scheduler.add_noise(images[chosen], noise, timestep), timestep, labels)


def _loss(
    spiking: QuantizedUNet2DModel, ann: QuantizedUNet2DModel, name: str, batch: NoisedBatch, gradient: str
) -> Tensor:
    """Squared error of the spiking block's mean output."""
    block, quantized_block, index = spiking.blocks()[name], ann.blocks()[name], [*ann.blocks()].index(name)
    with torch.no_grad():
        *_, target = next(islice(ann.trace(*batch), index, None))
        x, embedding, output = next(islice(spiking.trace(*batch), index, None))
    weights = {key: weight.detach() if key.endswith("clip") else weight for key, weight in block.named_parameters()}
    if gradient == "surrogate":
        return F.mse_loss(_mean(functional_call(block, weights, (x, embedding)), target), target)
    twin = functional_call(quantized_block, weights, (_mean(x, target), _mean(embedding, target)))
    return F.mse_loss(twin + (_mean(output, target) - twin).detach(), target)


def _mean(value: Tensor, target: Tensor) -> Tensor:
    """`[T B, ...]` -> `[B, ...]`, B that of the target; what is a mean already is left as it is."""
    return value.unflatten(0, (-1, len(target))).mean(0)
