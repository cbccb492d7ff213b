"""From a trained network of quantised activations to one of spiking neurons, and the authors' checkpoints of both.

The two have the same weights: converting copies them, and exchanges the activations. What is lost on the way is the
difference between the mean of a neuron's spikes and the quantised value of its mean current, where its current is not
the same in all time steps, and between the mean of a group norm and the norm of the mean. With `norm="batch"` only the
first remains; `conversion_tuning` lessens both.

Source: Spiking Diffusion Models, arXiv 2408.16467, section on conversion, and its published code (ANN2SNN).
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from generation.spiking_diffusion import official_checkpoints
from generation.spiking_diffusion.quantized_unet import UNQUANTIZED, QuantizedUNet2DModel
from training_runs.atomic_files import write_folder_atomically

OFFICIALLY_SIGNED = ("time_embedding", "read_out")  # after the official code's `unsigned_spikes()`
RENAMED = (
    (r"\.block\.(?=\d)", "."),  # a converted network's: its neurons are in a wrapper
    (r"^time_embedding\.timembedding\.0\.weight$", "time_embedding.table"),
    (r"^time_embedding\.timembedding\.1\.", "time_embedding.linear1."),
    (r"^time_embedding\.timembedding\.2\.", "time_embedding.activation."),
    (r"^time_embedding\.timembedding\.3\.", "time_embedding.linear2."),
    (r"^head\.", "stem_conv."),
    (r"^tail\.0\.", "read_out.norm."),
    (r"^tail\.1\.", "read_out.activation."),
    (r"^tail\.2\.", "read_out.conv."),
    (r"^middleblocks\.", "mid_blocks."),
    (r"^(down|up)blocks\.", r"\1_blocks."),
    (r"\.block([12])\.0\.", r".norm\1."),
    (r"\.block([12])\.1\.", r".activation\1."),
    (r"\.block1\.2\.|\.block2\.3\.", lambda match: f".conv{match[0][6]}."),
    (r"\.temb_proj\.0\.", ".time_activation."),
    (r"\.temb_proj\.1\.", ".time_projection."),
    (r"\.main\.", ".conv."),
    (r"\.act_alpha$", ".clip"),
)


def convert(
    ann: QuantizedUNet2DModel, steps: int | None = None, signed: bool | tuple[str, ...] = False
) -> QuantizedUNet2DModel:
    """The spiking network of a quantised one: neurons in place of its activations, and copies of its weights.

    Args:
        ann: the quantised network.
        steps: T; None for `2**bits - 1`, at which the mean of the spikes has as many levels as an activation.
        signed: whether neurons can take back spikes: see `QuantizedUNet2DModel`. The default is the paper's; the
            official code's is True, and `OFFICIALLY_SIGNED` what its switch to unsigned spikes leaves.

    Returns:
        The network, in evaluation mode, on the device and with the data type of `ann`.

    Raises:
        ValueError: `ann` is spiking already, its ReLUs have no levels or a clip that no current can reach, or `steps`
            or `signed` are not valid.
    """
    config = {name: value for name, value in ann.config.items() if not name.startswith("_")}
    if config["snn_timesteps"] is not None:
        raise ValueError(f"ann spikes for {config['snn_timesteps']} steps already; a quantised network is needed")
    if config["bits"] == UNQUANTIZED:
        raise ValueError(f"ann has bits={UNQUANTIZED}, plain ReLUs without a clip for a threshold; train one of 2 to 5")
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}; it is at least 1")
    for name, value in ann.state_dict().items():
        if name.endswith(".clip") and not value > 0:
            raise ValueError(f"ann has {name} = {value.item()}; a threshold must be above 0")
    config |= {"snn_timesteps": 2 ** config["bits"] - 1 if steps is None else steps, "signed": signed}
    spiking = QuantizedUNet2DModel(**config)
    spiking.load_state_dict({name: value.clone() for name, value in ann.state_dict().items()}, assign=True)
    return spiking.eval()


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names, of a quantised or of a converted network, to those of `QuantizedUNet2DModel`."""
    renamed = {}
    for name, value in state.items():
        new = name
        for pattern, replacement in RENAMED:
            new = re.sub(pattern, replacement, new)
        renamed[new] = value
    return renamed


def load(
    checkpoint: str | Path | Mapping,
    bits: int,
    *,
    snn_timesteps: int | None = None,
    signed: bool | tuple[str, ...] = False,
    sample_size: int = 32,
) -> QuantizedUNet2DModel:
    """Load a checkpoint of ANN2SNN: ckpt.pt of the quantised network, or converted_snn.pt.

    Args:
        checkpoint: a file, what is in one, or a state dict. Averaged weights are preferred.
        bits: of the activations, which leave no trace in a checkpoint; 32 if they are plain ReLUs.
        snn_timesteps: T of a converted network; `2**bits - 1` if None. Given for a quantised one, it is converted.
        signed: of a converted network.
        sample_size: side of the images, which leaves no trace in a checkpoint.

    Returns:
        The model, in evaluation mode: a converted one spikes, one of names that are not is quantised.

    Raises:
        ValueError: it is no such checkpoint, or `bits` is 32 where activations have clips, or not 32 where they have
            none.
    """
    official = official_checkpoints.read(checkpoint, preferred=("ema_model", "net_model"))
    state = rename(official)
    needed = {"stem_conv.weight", "time_embedding.table", "read_out.conv.weight"}
    if missing := sorted(needed - state.keys()):
        raise ValueError(f"checkpoint is not one of ANN2SNN: it lacks {', '.join(missing)}")
    if any(name.endswith(".clip") for name in state) == (bits == UNQUANTIZED):
        has = "plain ReLUs" if bits != UNQUANTIZED else "activations with clips"
        raise ValueError(f"bits is {bits}, but the checkpoint has {has}")
    if snn_timesteps is None and any(".block." in name for name in official):
        snn_timesteps = 2**bits - 1
    shapes = official_checkpoints.configuration(state | {"out_conv.weight": state["read_out.conv.weight"]})
    settings = {name: value for name, value in shapes.items() if name not in ("snn_timesteps", "tsm", "official")}
    norm = "batch" if "read_out.norm.running_mean" in state else "group"
    settings |= {"bits": bits, "norm": norm, "sample_size": sample_size}
    model = QuantizedUNet2DModel(**settings, snn_timesteps=snn_timesteps, signed=signed)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"checkpoint does not fit: it lacks {missing[:5]}, and has {unexpected[:5]} besides")
    return model.eval()


@torch.no_grad()
def conversion_error(
    spiking: QuantizedUNet2DModel,
    ann: QuantizedUNet2DModel,
    sample: Tensor,
    timestep: Tensor,
    class_labels: Tensor | None = None,
) -> float:
    """Mean squared difference of the predictions over the mean square of `ann`'s: 0 where the conversion is exact."""
    expected = ann(sample, timestep, class_labels).sample
    error = spiking(sample, timestep, class_labels).sample - expected
    return (error.square().mean() / expected.square().mean()).item()


def main(options: argparse.Namespace) -> None:
    """Of `commands.convert_options`."""
    from generation.lina.openmoji import to_signed
    from generation.spiking_diffusion.conversion_tuning import noised_batches, tune
    from generation.spiking_diffusion.evaluation import data_of
    from generation.spiking_diffusion.shipped_models import load_pipeline

    pipeline = load_pipeline(options.model)
    ann = pipeline.unet.eval()
    if not isinstance(ann, QuantizedUNet2DModel):
        raise ValueError(f"model is {options.model!r}, a {type(ann).__name__}; a QuantizedUNet2DModel can be converted")
    data = data_of(options.data, pipeline)
    images, labels = to_signed(data.images), data.labels if ann.config.num_class_embeds else None
    spiking = convert(ann, options.snn_timesteps, options.signed)

    def tell(state: str) -> None:
        judged = noised_batches(
            images, labels, 256, pipeline.scheduler, torch.Generator().manual_seed(options.seed + 1)
        )
        print(f"{state}: relative squared error of the prediction {conversion_error(spiking, ann, *next(judged)):.4f}")

    tell("converted")
    if options.tune:
        errors = tune(
            spiking,
            ann,
            images,
            options.tune,
            class_labels=labels,
            learning_rate=options.learning_rate,
            gradient="twin" if options.signed else "surrogate",
            scheduler=pipeline.scheduler,
            generator=torch.Generator().manual_seed(options.seed),
        )
        for error in errors:
            print(f"  {error.name:16} {error.before:.5f} -> {error.after:.5f}")
        tell("tuned")
    write_folder_atomically(options.output, type(pipeline)(spiking, pipeline.scheduler).save_pretrained)
    print(f"written to {options.output}")
