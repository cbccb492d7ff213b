"""The native and Triton hash encodings as PyTorch operators, with fake kernels and gradients.

Each backend's module has the two functions called here. A gradient that nobody asked for is an empty tensor.
"""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from kernels.hash_encoding.grid import grid_of
from kernels.hash_encoding.layout import new_features


def _kernels(backend: str) -> ModuleType:
    return import_module(f"kernels.hash_encoding.{backend}")


@torch.library.custom_op("gated_vision::hash_encoding", mutates_args=())
def hash_encoding(
    points: Tensor,
    table: Tensor,
    expert: Tensor | None,
    gate: Tensor | None,
    resolutions: Sequence[float],
    dims: int,
    levels: int,
    features: int,
    log2_table_size: int,
    interpolation: str,
    convention: str,
    max_level: int,
    backend: str,
) -> Tensor:
    grid = grid_of(tuple(resolutions), dims, levels, features, log2_table_size, interpolation, convention)
    return _kernels(backend).forward(points, table, expert, gate, grid, max_level)


@hash_encoding.register_fake
def _(points, table, expert, gate, resolutions, dims, levels, features, *others):
    return new_features(table, points.shape[0], levels * features)


@torch.library.custom_op("gated_vision::hash_encoding_backward", mutates_args=())
def hash_encoding_backward(
    grad_output: Tensor,
    points: Tensor,
    table: Tensor,
    expert: Tensor | None,
    gate: Tensor | None,
    resolutions: Sequence[float],
    dims: int,
    levels: int,
    features: int,
    log2_table_size: int,
    interpolation: str,
    convention: str,
    max_level: int,
    backend: str,
    of_points: bool,
    of_table: bool,
    of_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of points, table and gate; one that is not wanted is empty."""
    grid = grid_of(tuple(resolutions), dims, levels, features, log2_table_size, interpolation, convention)
    wanted = (of_points, of_table, of_gate)
    return _kernels(backend).backward(grad_output, points, table, expert, gate, grid, max_level, wanted)


@hash_encoding_backward.register_fake
def _(grad_output, points, table, expert, gate, *others):
    return tuple(
        x.new_empty(x.shape) if wanted else points.new_empty(0)
        for x, wanted in zip((points, table, gate), others[-3:], strict=True)
    )


def _save(ctx, inputs, output):
    points, table, expert, gate, *ctx.settings = inputs
    ctx.save_for_backward(points, table, expert, gate)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_output):
    nothing = (None,) * len(ctx.settings)
    of_points, of_table, _, of_gate, *_ = wanted = ctx.needs_input_grad
    if grad_output is None or not any(wanted):
        return None, None, None, None, *nothing
    gradients = hash_encoding_backward(grad_output, *ctx.saved_tensors, *ctx.settings, of_points, of_table, of_gate)
    points, table, gate = (
        gradient if wants else None for gradient, wants in zip(gradients, (of_points, of_table, of_gate), strict=True)
    )
    return points, table, None, gate, *nothing


hash_encoding.register_autograd(_gradients, setup_context=_save)


def _no_gradients(ctx, *gradients):
    raise NotImplementedError(
        "hash_encoding: gradients of gradients are defined by backend='torch' (and 'reference') only"
    )


hash_encoding_backward.register_autograd(_no_gradients)
