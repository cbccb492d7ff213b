"""The native and Triton retentions as PyTorch operators: fake kernels, gradients, autocast.

Each backend's module has the two functions called here. Gradients of gradients are not defined; use the `torch` backend
for them.
"""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from kernels.window_retention.arguments import Settings


def _kernels(backend: str) -> ModuleType:
    return import_module(f"kernels.window_retention.{backend}")


def _settings(log_decay, slopes, window, shift, *options) -> Settings:
    return Settings(tuple(log_decay), tuple(slopes), tuple(window), tuple(shift), *options)


@torch.library.custom_op("gated_vision::window_retention", mutates_args=())
def window_retention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Sequence[float],
    slopes: Sequence[float],
    window: Sequence[int],
    shift: Sequence[int],
    activation: str,
    normalization: str,
    signed_slopes: bool,
    rotary: bool,
    scale: float,
    backend: str,
) -> Tensor:
    settings = _settings(log_decay, slopes, window, shift, activation, normalization, signed_slopes, rotary, scale)
    return _kernels(backend).forward(query, key, value, settings)


@window_retention.register_fake
def _(query, key, value, *settings_and_backend):
    return value.new_empty(value.shape)


@torch.library.custom_op("gated_vision::window_retention_backward", mutates_args=())
def window_retention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Sequence[float],
    slopes: Sequence[float],
    window: Sequence[int],
    shift: Sequence[int],
    activation: str,
    normalization: str,
    signed_slopes: bool,
    rotary: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = _settings(log_decay, slopes, window, shift, activation, normalization, signed_slopes, rotary, scale)
    return _kernels(backend).backward(grad_output, query, key, value, settings)


@window_retention_backward.register_fake
def _(grad_output, query, key, value, *settings_and_backend):
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _save(ctx, inputs, output):
    query, key, value, *ctx.settings_and_backend = inputs
    ctx.save_for_backward(query, key, value)


def _gradients(ctx, grad_output):
    gradients = window_retention_backward(grad_output, *ctx.saved_tensors, *ctx.settings_and_backend)
    return *gradients, *[None] * len(ctx.settings_and_backend)


window_retention.register_autograd(_gradients, setup_context=_save)
