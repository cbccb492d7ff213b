"""Checkpoints of the authors' Switch-NeRF, by the shapes in them: of a training, or converted for evaluation.

A checkpoint has `model_state_dict`, and `bg_model_state_dict` if the scene has a background. In training, weights of
experts are `layers.0.experts.0.weights.{j}` `[E, in, out]` with `bias.{j}` `[E, 1, out]`; for evaluation, they are
`layers.0.experts.0.experts.{e}.layers.{j}.weight` `[out, in]` with `bias` `[out]`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from generation.radiance_field.switch_nerf import BackgroundField, SwitchNeRFField

FOREGROUND_NAMES = {
    "layers.xyz.fcs.0": "position",
    "layers.moe_external_gate.fcs.0": "gate.mlp.0",
    "layers.moe_external_gate.fcs.1": "gate.mlp.1",
    "layers.gate_input_norm": "gate.norm",
    "layers.0.gates.0.wg": "gate.scores",
    "layers.sigma.fcs.0": "raw_density",
    "layers.1.fcs.0": "features",
    "layers.2.fcs.0": "colour.0",
    "layers.color.fcs.0": "colour.1",
    "embedding_a": "appearance",
}
BACKGROUND_NAMES = {
    "xyz_encoding_final": "features",
    "dir_a_encoding.0": "colour.0",
    "sigma": "raw_density",
    "rgb": "colour.1",
    "embedding_a": "appearance",
}
OF_TRAINING = re.compile(r"layers\.0\.experts\.0\.(weights|bias)\.(\d+)")
OF_EVALUATION = re.compile(r"layers\.0\.experts\.0\.experts\.(\d+)\.layers\.(\d+)\.(weight|bias)")
OF_BACKGROUND = re.compile(r"xyz_encodings\.(\d+)\.0")


@dataclass(frozen=True)
class SwitchNeRF:
    """What a checkpoint holds; both in evaluation mode."""

    foreground: SwitchNeRFField
    background: BackgroundField | None


def from_official(
    checkpoint: str | Path | Mapping, *, skips: Sequence[int] = (3,), direction_octaves: int = 4
) -> SwitchNeRF:
    """Load a checkpoint of Switch-NeRF.

    Args:
        checkpoint: a .pt file, read with `weights_only=True`, what is in one, or the state dict of the foreground.
        skips: layers of the experts that add their input, which leave no trace in a checkpoint.
        direction_octaves: of the frequency embedding of directions, by which the rest of the colour head's input is
            the appearance's where there is an embedding.

    Raises:
        ValueError: it cannot be read, or is no such checkpoint: a key is missing or unknown, or of a wrong shape.
    """
    content = _read(checkpoint)
    foreground = _foreground(_state(content.get("model_state_dict", content), "model_state_dict"))
    shape = _shape(foreground, "experts.weights.0", 3)
    if missing := sorted({int(n) for n in skips} - set(range(_count(foreground, "experts.weights.")))):
        raise ValueError(f"skips hold {missing}; the checkpoint's experts have no such layers")
    field = SwitchNeRFField(
        width=shape[2],
        experts=shape[0],
        expert_layers=_count(foreground, "experts.weights."),
        skips=tuple(skips),
        position_octaves=_octaves(foreground, "position.weight", 3),
        direction_octaves=direction_octaves,
        colour_width=_shape(foreground, "colour.0.weight", 2)[0],
        **_appearances(foreground),
    )
    _load(field, foreground | {"space.box": field.space.box})
    given = content.get("bg_model_state_dict")
    return SwitchNeRF(field.eval(), None if given is None else _background(given, direction_octaves).eval())


def _background(given: Any, direction_octaves: int) -> BackgroundField:
    state = _renamed(_state(given, "bg_model_state_dict"), BACKGROUND_NAMES)
    state = {OF_BACKGROUND.sub(r"position.\1", name): value for name, value in state.items()}
    first, layers = _shape(state, "position.0.weight", 2), _count(state, "position.", ".weight")
    width, embedded = first
    field = BackgroundField(
        width=width,
        layers=layers,
        skips=[n for n in range(1, layers) if _shape(state, f"position.{n}.weight", 2)[1] == width + embedded],
        position_octaves=_octaves(state, "position.0.weight", 4),
        direction_octaves=direction_octaves,
        **_appearances(state),
    )
    _load(field, state)
    return field


def _read(checkpoint: str | Path | Mapping) -> Mapping:
    if isinstance(checkpoint, Mapping):
        return checkpoint
    path = Path(checkpoint)
    if not path.is_file():
        raise ValueError(f"checkpoint is {str(path)!r}; there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be read as tensors: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(content).__name__}; a dict is needed")
    return content


def _state(given: Any, name: str) -> dict[str, Tensor]:
    if not isinstance(given, Mapping) or not given or not all(isinstance(value, Tensor) for value in given.values()):
        raise ValueError(f"checkpoint holds no state dict: expected tensors by name, in {name}")
    return {key.removeprefix("module."): value for key, value in given.items()}


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        owner, _, last = name.rpartition(".")
        renamed[f"{names[owner]}.{last}" if owner in names else name] = value
    return renamed


def _foreground(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names, with the weights of experts side by side."""
    renamed: dict[str, Tensor] = {}
    single: dict[tuple[str, int], dict[int, Tensor]] = {}
    for name, value in _renamed(state, FOREGROUND_NAMES).items():
        if match := OF_TRAINING.fullmatch(name):
            bias = match[1] == "bias"
            if bias and (value.dim() != 3 or value.shape[1] != 1):
                raise ValueError(f"checkpoint does not fit: {name} is {tuple(value.shape)}; it must be (E, 1, out)")
            renamed[f"experts.{'biases' if bias else 'weights'}.{match[2]}"] = value[:, 0] if bias else value
        elif match := OF_EVALUATION.fullmatch(name):
            kind = "biases" if match[3] == "bias" else "weights"
            single.setdefault((kind, int(match[2])), {})[int(match[1])] = value
        else:
            renamed[name] = value
    for (kind, layer), by_expert in single.items():
        name = f"layers.0.experts.0.experts.*.layers.{layer}.{'bias' if kind == 'biases' else 'weight'}"
        if sorted(by_expert) != list(range(len(by_expert))) or len({tuple(v.shape) for v in by_expert.values()}) != 1:
            shapes = {e: tuple(value.shape) for e, value in sorted(by_expert.items())}
            raise ValueError(f"checkpoint does not fit: {name} are {shapes}; all experts must have them, of one shape")
        stacked = torch.stack([by_expert[e] for e in range(len(by_expert))])
        renamed[f"experts.{kind}.{layer}"] = stacked.transpose(1, -1) if kind == "weights" else stacked
    return renamed


def _shape(state: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    if name not in state:
        raise ValueError(f"checkpoint is not one of Switch-NeRF: it has nothing for {name}")
    if state[name].dim() != dims:
        raise ValueError(f"checkpoint does not fit: {name} is {tuple(state[name].shape)}; it must have {dims} dims")
    return tuple(state[name].shape)


def _count(state: Mapping[str, Tensor], prefix: str, suffix: str = "") -> int:
    return sum(name.startswith(prefix) and name.endswith(suffix) for name in state)


def _octaves(state: Mapping[str, Tensor], name: str, dims: int) -> int:
    width = _shape(state, name, 2)[1]
    octaves, rest = divmod(width // dims - 1, 2)
    if width % dims or rest or octaves < 0:
        raise ValueError(f"checkpoint does not fit: {name} takes {width} numbers; it must be {dims} (2 octaves + 1)")
    return octaves


def _appearances(state: Mapping[str, Tensor]) -> dict[str, int]:
    if "appearance.weight" not in state:
        return {}
    appearances, features = _shape(state, "appearance.weight", 2)
    return {"appearances": appearances, "appearance_features": features}


def _load(field: nn.Module, state: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(value.shape) for name, value in field.state_dict().items()}
    for name, value in state.items():
        if name in shapes and tuple(value.shape) != shapes[name]:
            raise ValueError(f"checkpoint does not fit: {name} is {tuple(value.shape)}; others ask for {shapes[name]}")
    missing, unexpected = field.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"checkpoint does not fit: missing {missing[:5]}, unexpected {unexpected[:5]}")
