"""What a gated backbone does with one image: its decays, its gates, and where the features of a token come from.

For ViG, hierarchical ViG, RMT and Gated-SwinRMT; `python -m vision explain` draws what `look_inside` finds.

    decay           what is left of every token's value at the chosen token, by head and apart from the scores:
                    gamma^(|dh| + |dw|) inside its window (retention), the product of the gates in between (ViG)
    gates           values of the gates at every token
    receptive field |d (sum of the chosen token's features) / d image|, summed over image channels
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gated_scan import log_decay_from_logits
from kernels.window_retention import tables
from vision.gated_linear_attention import GATE_LOGIT_NORMALIZER, GatedLinearAttention
from vision.gated_swin_rmt import GatedRetention, SwatRetention
from vision.retention_backbone import RetentionBackbone
from vision.retention_layers import RetentionMixer, WindowRetention, windows_and_shift
from vision.vig import ViG
from vision.vig_hierarchical import HierarchicalViG

SMALLEST_MAP = 4  # tokens along a side, below which maps show little


@dataclass(frozen=True)
class GateMaps:
    """One gate over the map.

    Args:
        name: what is shown, in words.
        values: (maps, rows, columns): one map a head, or a single one.
        signed: whether the gate may be negative (SiLU); else it lies in 0 .. 1.
    """

    name: str
    values: Tensor
    signed: bool = False


@dataclass(frozen=True)
class Insight:
    """What `look_inside` found in one block.

    Args:
        stage: index of the stage.
        block: index of the block in it.
        token: row and column of the chosen token.
        decay: (heads, rows, columns), 0 .. 1; exactly 0 where the token cannot look.
        decay_name: what `decay` is, in words.
        gates: of the block; empty if it has none.
        receptive_field: (image height, image width), >= 0.
    """

    stage: int
    block: int
    token: tuple[int, int]
    decay: Tensor
    decay_name: str
    gates: tuple[GateMaps, ...]
    receptive_field: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.decay.shape[1], self.decay.shape[2]


def look_inside(
    model: nn.Module,
    image: Tensor,
    pixel: tuple[int, int] | None = None,
    stage: int | None = None,
    block: int | None = None,
) -> Insight:
    """Run `model` on one image and look into one of its blocks; the model is put in evaluation mode.

    Args:
        model: of one of the families above, not fused.
        image: (C, H, W), preprocessed; any size that the model takes.
        pixel: row and column in the image, whose token is looked at; the centre if None.
        stage: of the hierarchical models (a plain ViG is one stage); the last one whose map has at least
            `SMALLEST_MAP` tokens along both sides if None, or the one with the largest map.
        block: of the stage; its last if None.

    Raises:
        ValueError: an argument is out of range, or the model is of another kind or fused.
    """
    stages = blocks_by_stage(model)
    if image.dim() != 3:
        raise ValueError(f"image has shape {tuple(image.shape)}; it must be (channels, height, width)")
    height, width = image.shape[1:]
    row, column = (height // 2, width // 2) if pixel is None else pixel
    check_index("pixel[0]", row, height)
    check_index("pixel[1]", column, width)
    if stage is not None:
        check_index("stage", stage, len(stages))

    model.eval()
    watched = [module for blocks in stages for each in blocks for module in (each, *gate_layers(mixer_of(each)))]
    with torch.inference_mode(False), torch.enable_grad():
        images = image.detach().clone()[None].to(next(model.parameters())).requires_grad_()
        with recorded(watched) as outputs:
            model(images)
        if stage is None:
            stage = default_stage([outputs[blocks[-1]].shape[1:3] for blocks in stages])
        blocks = stages[stage]
        block = len(blocks) - 1 if block is None else block
        check_index("block", block, len(blocks))
        features = outputs[blocks[block]]  # (1, rows, columns, C)
        size = features.shape[1:3]
        token = (row * size[0] // height, column * size[1] // width)
        (gradient,) = torch.autograd.grad(features[0, token[0], token[1]].sum(), images)

    mixer = mixer_of(blocks[block])
    logits = [outputs[layer].detach().reshape(*size, -1).float() for layer in gate_layers(mixer)]
    if isinstance(mixer, GatedLinearAttention):
        decay_name = "decay towards the chosen token:\nproduct of the gates on the way"
        decay, gates = _of_scan(mixer, *logits, token)
    else:
        decay_name = "decay towards the chosen token: gamma^(|dh| + |dw|)"
        decay, gates = _decay_of_retention(mixer.core, size, token), _gates_of_retention(mixer, *logits)
    receptive_field = gradient[0].abs().sum(0).float().cpu()
    return Insight(stage, block, token, decay, decay_name, gates, receptive_field)


def blocks_by_stage(model: nn.Module) -> list[nn.Sequential]:
    """The blocks of each stage; a plain ViG is one stage.

    Raises:
        ValueError: the model is of another kind, or fused.
    """
    if isinstance(model, ViG):
        stages = [model.blocks]
    elif isinstance(model, HierarchicalViG | RetentionBackbone):
        stages = [stage.blocks for stage in model.layers]
    else:
        raise ValueError(
            f"model is a {type(model).__name__}; valid are ViG, HierarchicalViG, RMT and GatedSwinRMT models"
        )
    if model.fused:
        raise ValueError(
            "model was fused for inference, which merges the projections that its gates come from; "
            "create it anew and do not fuse()"
        )
    return stages


def default_stage(sizes: Sequence[tuple[int, int]]) -> int:
    """The last stage whose map has `SMALLEST_MAP` tokens or more along both sides, or the one with the most tokens."""
    legible = [stage for stage, size in enumerate(sizes) if min(size) >= SMALLEST_MAP]
    return legible[-1] if legible else max(range(len(sizes)), key=lambda stage: sizes[stage][0] * sizes[stage][1])


def check_index(name: str, index: int, length: int) -> None:
    if not 0 <= index < length:
        raise ValueError(f"{name} is {index}; valid are 0 .. {length - 1}")


def mixer_of(block: nn.Module) -> GatedLinearAttention | RetentionMixer:
    """The token mixer of a block of any family."""
    return next(module for module in block.children() if isinstance(module, GatedLinearAttention | RetentionMixer))


def gate_layers(mixer: GatedLinearAttention | RetentionMixer) -> list[nn.Module]:
    """The layers whose outputs are the logits of the mixer's gates."""
    if isinstance(mixer, GatedLinearAttention):
        return [mixer.gk_proj[1], mixer.g_proj]
    return [mixer.g_proj] if hasattr(mixer, "g_proj") else []


@contextmanager
def recorded(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """A dict that fills with the output of each of `modules` that runs inside the `with` block."""
    outputs: dict[nn.Module, Tensor] = {}
    hooks = [m.register_forward_hook(lambda module, _, output: outputs.update({module: output})) for m in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def manhattan_decay(
    log_decay: Sequence[float],
    size: tuple[int, int],
    token: tuple[int, int],
    window: tuple[int, int] | None = None,
    shift: tuple[int, int] = (0, 0),
) -> Tensor:
    """gamma^(|dh| + |dw|) around a token, (heads, rows, columns): what both passes together let through.

    It is zero outside the token's window, and where a shifted window's wrap-around or padding lies in between.

    Args:
        log_decay: ln(gamma) of each head.
        size: rows and columns of the map.
        token: row and column in it.
        window: rows and columns of a window; the whole map if None.
        shift: of the windows.
    """
    rates = torch.tensor(log_decay, dtype=torch.float64)[:, None]
    along = []
    for length, place, side, moved in zip(size, token, window or size, shift, strict=True):
        start, stop = next(run for run in tables.runs(length, side, moved) if run[0] <= place < run[1])
        places = torch.arange(length)
        reached = (places >= start) & (places < stop)
        along.append((rates * (places - place).abs()).exp() * reached)
    return (along[0][:, :, None] * along[1][:, None, :]).float()


def scan_decay(forward_log_decay: Tensor, backward_log_decay: Tensor, token: tuple[int, int]) -> Tensor:
    """Share of every token that a bidirectional scan over the rows of a map carries to the chosen token.

    The forward scan brings the tokens before it, the backward scan those after it; it reaches itself undecayed.

    Args:
        forward_log_decay: (rows, columns, heads, key channels), <= 0.
        backward_log_decay: likewise.
        token: row and column.

    Returns:
        (heads, rows, columns): means over the key channels.
    """
    rows, columns = forward_log_decay.shape[:2]
    place = token[0] * columns + token[1]
    forward, backward = (x.double().flatten(0, 1) for x in (forward_log_decay, backward_log_decay))
    # Before the token: the gates of all that follow the source, the token's included. After it: the mirror image.
    before = forward[1 : place + 1].flip(0).cumsum(0).flip(0)
    after = backward[place:-1].cumsum(0)
    shares = torch.cat((before, torch.zeros_like(forward[:1]), after)).exp().mean(-1)
    return shares.T.unflatten(1, (rows, columns)).float()


def area_holding(field: Tensor, share: float) -> float:
    """The smallest fraction of the pixels of a map >= 0 that holds `share` of its sum; 0 for a map of zeros."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must lie above 0 and not above 1")
    mass = field.double().flatten().sort(descending=True).values.cumsum(0)
    if mass[-1] == 0:
        return 0.0
    needed = int((mass < share * mass[-1]).sum()) + 1
    return needed / len(mass)


def _of_scan(
    mixer: GatedLinearAttention, decay_logits: Tensor, mix_logits: Tensor, token: tuple[int, int]
) -> tuple[Tensor, tuple[GateMaps, ...]]:
    log_decays = log_decay_from_logits(decay_logits, GATE_LOGIT_NORMALIZER).unflatten(-1, (2, mixer.num_heads, -1))
    forward, backward = log_decays.cpu().unbind(2)  # (rows, columns, heads, key channels)
    mix = mix_logits.sigmoid().mean(-1)[None].cpu()
    gates = (
        GateMaps("forward gate, mean over key channels", forward.exp().mean(-1).permute(2, 0, 1)),
        GateMaps("backward gate, mean over key channels", backward.exp().mean(-1).permute(2, 0, 1)),
        GateMaps("mix gate, mean over channels\n(0: local branch, 1: scan)", mix),
    )
    return scan_decay(forward, backward, token), gates


def _decay_of_retention(core: nn.Module, size: tuple[int, int], token: tuple[int, int]) -> Tensor:
    if not isinstance(core, WindowRetention):
        return manhattan_decay(core.log_decay, size, token)
    return manhattan_decay(core.log_decay, size, token, *windows_and_shift(size, core.window_size, core.shifted))


def _gates_of_retention(mixer: RetentionMixer, logits: Tensor | None = None) -> tuple[GateMaps, ...]:
    if logits is None:
        return ()
    maps = logits.permute(2, 0, 1).cpu()
    if isinstance(mixer, SwatRetention):
        return (GateMaps("value gate silu(g), mean over channels", F.silu(maps).mean(0, keepdim=True), signed=True),)
    if isinstance(mixer, GatedRetention) and mixer.gate == "headwise":
        return (GateMaps("output gate sigmoid(g)", maps.sigmoid()),)
    return (GateMaps("output gate sigmoid(g), mean over channels", maps.sigmoid().mean(0, keepdim=True)),)
