"""State dicts of the authors' checkpoints (and of NOVA's) as state dicts of `LinaTransformer`, and back.

The keys are the same, with two exceptions: gates lose their outer dimensions ([1, H, N, 1] there, [H, N] here), and the
separate query and key-value projections of subtraction-normalised models become one.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

GATE_KEYS = {"key_scale": "key_gate", "value_scale": "value_gate"}


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' tensors under our keys."""
    converted = {}
    for key, tensor in state_dict.items():
        stem, _, last = key.rpartition(".")
        if last in GATE_KEYS:
            converted[f"{stem}.{GATE_KEYS[last]}".lstrip(".")] = tensor[0, :, :, 0]
        elif match := re.fullmatch(r"(|.*\.)q\.(weight|bias)", key):
            rest = state_dict[f"{match[1]}kv.{match[2]}"]
            converted[f"{match[1]}qkv.{match[2]}"] = torch.cat([tensor, rest])
        elif not re.fullmatch(r"(|.*\.)kv\.(weight|bias)", key):
            converted[key] = tensor
    return converted


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the keys of the authors' division-normalised (or softmax) models."""
    ours = {gate: scale for scale, gate in GATE_KEYS.items()}
    converted = {}
    for key, tensor in state_dict.items():
        stem, _, last = key.rpartition(".")
        if last in ours:
            converted[f"{stem}.{ours[last]}".lstrip(".")] = tensor[None, :, :, None]
        else:
            converted[key] = tensor
    return converted
