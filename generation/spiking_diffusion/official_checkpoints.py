"""Checkpoints of the authors' SDDPM and SDM (`net_model` of a .pt file, or a state dict), by the shapes in them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from generation.argument_checks import check_whole

if TYPE_CHECKING:
    from generation.spiking_diffusion.unet import SpikingUNet2DModel

RENAMED = (
    (r"^time_embedding\.timembedding\.0\.weight$", "time_embedding.table"),
    (r"^time_embedding\.timembedding\.1\.", "time_embedding.linear1."),
    (r"^time_embedding\.timembedding\.3\.", "time_embedding.linear2."),
    (r"^conv\.", "stem_conv."),
    (r"^bn\.", "stem_norm."),
    (r"^conv_identity\.", "entry_conv."),
    (r"^bn_identity\.", "entry_norm."),
    (r"^(down|up)blocks\.", r"\1_blocks."),
    (r"^middleblocks\.", "mid_blocks."),
    (r"^tail_bn\.", "out_norm."),
    (r"^tail_conv\.", "out_conv."),
    (r"^T_output_layer\.", "out_step_conv."),
    (r"^last_bn\.", "out_step_norm."),
    (r"\.bn([12]?)\.", r".norm\1."),
    (r"\.temb_proj\.1\.", ".time_projection."),
    (r"\.tsmconv\.", "."),
    (r"\.tsmp$", ".step_scale"),
)
NEEDED = ("stem_conv.weight", "time_embedding.table", "out_conv.weight", "down_blocks.0.conv1.weight")


def read_file(path: Path) -> Mapping[str, Any]:
    """What a .pt or .safetensors file holds.

    Raises:
        ValueError: there is no such file, or no dict of tensors and plain values in it.
    """
    if path.is_dir():
        raise ValueError(f"checkpoint is {str(path)!r}, a folder; it must be a .pt or .safetensors file")
    if not path.is_file():
        raise ValueError(f"checkpoint is {str(path)!r}; there is no such file")
    try:
        safe = path.suffix == ".safetensors"
        held = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"checkpoint is {str(path)!r}, which cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # Of a file that is none of PyTorch's its unpickler can raise anything. What it says of one with code in it
        # advises running that code, and is not passed on.
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it must be a file of {'safetensors' if safe else '`torch.save`'}"
        if code:
            reason = f"it holds a {code[1]}, and code of a file is not run; save its state dict"
        raise ValueError(f"checkpoint {str(path)!r} cannot be read as tensors: {reason}") from None
    if not isinstance(held, Mapping):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(held).__name__}; a dict is needed")
    return held


def read(
    checkpoint: str | Path | Mapping, preferred: tuple[str, ...] = ("net_model", "ema_model")
) -> dict[str, Tensor]:
    """The state dict in a checkpoint, without the prefix of `DataParallel`.

    Args:
        checkpoint: a .pt file, read with `weights_only=True`, a .safetensors file, or what is in one.
        preferred: of the state dicts in it, in this order.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(checkpoint, Mapping):
        if not isinstance(checkpoint, str | Path):
            raise ValueError(f"checkpoint is a {type(checkpoint).__name__}; it must be a file or a state dict")
        checkpoint = read_file(Path(checkpoint))
    state = next((checkpoint[name] for name in preferred if name in checkpoint), checkpoint)
    named = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    if not named or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"checkpoint holds no state dict: expected tensors by name, or one of {', '.join(preferred)}")
    return {name.removeprefix("module."): value for name, value in state.items()}


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names to those of `SpikingUNet2DModel`, and shapes where they differ."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".step_scale"):
            value = value.flatten()
        elif name == "out_step_conv.weight":
            value = value.squeeze(-1)  # 3 x 3 x 1: a convolution of each time step
        renamed[name] = value
    return renamed


def configuration(state: Mapping[str, Tensor], snn_timesteps: int = 4) -> dict:
    """Arguments of `SpikingUNet2DModel`, from the shapes in a renamed state dict.

    Args:
        snn_timesteps: T of a checkpoint without temporal-wise scales, in which it leaves no trace.

    Raises:
        ValueError: these are not shapes of such a model.
    """
    for name in ("stem_conv.weight", "out_conv.weight", "time_embedding.table"):
        if state[name].dim() != (needed := 2 if name.endswith("table") else 4):
            raise ValueError(f"checkpoint does not fit: {name} has {state[name].dim()} axes; it must have {needed}")
    blocks = {}
    for name, value in state.items():
        if match := re.fullmatch(r"down_blocks\.(\d+)\.conv1?\.weight", name):
            blocks[int(match[1])] = (name.endswith(".conv.weight"), value.shape[0])
    channels, in_channels = state["stem_conv.weight"].shape[:2]
    widths = [[]]
    for _, (downsample, width) in sorted(blocks.items()):
        if downsample:
            widths.append([])
        else:
            widths[-1].append(width)
    if not all(widths):
        raise ValueError("checkpoint does not fit: its down_blocks have a level without a residual block")
    layers = len(widths[0])
    scale = state.get("stem_conv.step_scale")
    return {
        "in_channels": in_channels,
        "out_channels": state["out_conv.weight"].shape[0],
        "channels": channels,
        "channel_multipliers": tuple(level[0] // channels for level in widths),
        "layers_per_block": layers,
        "snn_timesteps": snn_timesteps if scale is None else len(scale),
        "tsm": scale is not None,
        "official": True,
        "num_train_timesteps": len(state["time_embedding.table"]),
    }


def load(
    checkpoint: str | Path | Mapping, *, snn_timesteps: int | None = None, tsm: bool = False, sample_size: int = 32
) -> "SpikingUNet2DModel":
    """Load a checkpoint of SDDPM or SDM.

    Args:
        checkpoint: a file, what is in one, or a state dict.
        snn_timesteps: T; 4 if None, or that of the checkpoint's temporal-wise scales.
        tsm: give the model temporal-wise scales, all 1 where the checkpoint has none: the second stage of SDM's
            training begins so.
        sample_size: side of the images, which leaves no trace in a checkpoint.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: it is no such checkpoint, or has scales of another number of steps.
    """
    from generation.spiking_diffusion.unet import SpikingUNet2DModel

    state = rename(read(checkpoint))
    if "head.weight" in state:
        raise ValueError("checkpoint is one of ANN2SNN; QuantizedUNet2DModel.from_official loads it")
    if missing := [name for name in NEEDED if name not in state]:
        raise ValueError(f"checkpoint is not one of SDDPM or SDM: it has no {', '.join(missing)}")
    if snn_timesteps is not None:
        check_whole("snn_timesteps", snn_timesteps, 1)
    settings = configuration(state, snn_timesteps or 4)
    if settings["tsm"] and snn_timesteps not in (None, settings["snn_timesteps"]):
        raise ValueError(f"snn_timesteps is {snn_timesteps}; the checkpoint has {settings['snn_timesteps']} scales")
    model = SpikingUNet2DModel(**settings | {"tsm": tsm or settings["tsm"], "sample_size": sample_size})
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, value in state.items():
        if name in shapes and tuple(value.shape) != shapes[name]:
            raise ValueError(f"checkpoint does not fit: {name} is {tuple(value.shape)}; others ask for {shapes[name]}")
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith(".step_scale") or settings["tsm"]]
    if missing or unexpected:
        raise ValueError(f"checkpoint does not fit: missing {missing[:5]}, unexpected {unexpected[:5]}")
    return model.eval()
