"""Rows to their experts and back.

Both ways are permutations of the choices, and each has the other as its gradient: rows are only read, never added to.
"""

import torch
from torch import Tensor


class _Permute(torch.autograd.Function):
    """rows[index], where rows = result[inverse]."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return _Permute.apply(gradient, inverse, index), None, None


class _Spread(torch.autograd.Function):
    """The token of each choice of `order`."""

    @staticmethod
    def forward(ctx, tokens: Tensor, order: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(order, positions)
        return tokens.index_select(0, order if len(positions) == 1 else order % max(len(tokens), 1))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, positions = ctx.saved_tensors
        by_choice = _Permute.apply(gradient, positions.flatten(), order)
        if len(positions) == 1:
            return by_choice, None, None
        return by_choice.unflatten(0, positions.shape).sum(0), None, None


def spread(tokens: Tensor, order: Tensor, positions: Tensor) -> Tensor:
    """(k N, C) of tokens (N, C): row r holds the token of choice order[r]."""
    return _Spread.apply(tokens, order, positions)


def collect(rows: Tensor, gates: Tensor | None, kept: Tensor | None, order: Tensor, positions: Tensor) -> Tensor:
    """(N, D) of rows (k N, D): the sum of each token's rows by its gates (1 if None), of those kept (all if None)."""
    by_choice = _Permute.apply(rows, positions.flatten(), order).unflatten(0, positions.shape)
    if kept is not None:
        by_choice = by_choice.masked_fill(~kept[..., None], 0)
    if gates is not None:
        alone = not torch.is_grad_enabled() and gates.dtype == rows.dtype  # nobody else needs the rows just copied
        by_choice = by_choice.mul_(gates[..., None]) if alone else by_choice * gates[..., None]
    return (by_choice[0] if len(by_choice) == 1 else by_choice.sum(0)).to(rows.dtype)
