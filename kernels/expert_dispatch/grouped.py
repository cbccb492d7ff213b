"""Linear maps of sorted rows, each expert's over its own segment, as PyTorch operators with gradients."""

from itertools import pairwise

import torch
from torch import Tensor

from kernels.expert_dispatch.arguments import check_grouped
from kernels.precision import full_precision


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> Tensor:
    """rows[i] weight[e] + bias[e] for starts[e] <= i < starts[e + 1].

    Every segment is one matrix product that reads and writes its rows where they are. On a GPU the host waits for
    `starts`. (PyTorch's own grouped product was slower in float32 on CPU.)

    Args:
        rows: (R, I).
        weight: (E, I, O), any strides.
        bias: (E, O).
        starts: (E + 1) int64, ascending from 0 to R at most, as in `Dispatched`.

    Returns:
        (R, O) in the dtype of `rows`, or that of autocast; rows after the last segment are 0.

    Raises:
        ValueError: shapes, dtypes, devices or starts do not fit.
    """
    device = rows.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and rows.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        rows, weight, bias = (None if x is None else x.to(dtype) for x in (rows, weight, bias))
    check_grouped(rows, weight, bias, starts)
    return expert_linear(rows, weight, bias, starts)


def _segments(starts: Tensor, rows: Tensor) -> list[tuple[int, int]]:
    bounds = starts.tolist()
    if bounds[0] != 0 or bounds[-1] > len(rows) or bounds != sorted(bounds):
        raise ValueError(f"starts is {bounds}; it must ascend from 0 to the number of rows, {len(rows)}, at most")
    return list(pairwise(bounds))


@torch.library.custom_op("gated_vision::expert_linear", mutates_args=())
def expert_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> Tensor:
    """`grouped_linear` of what fits."""
    output = rows.new_empty(len(rows), weight.shape[2])
    segments = _segments(starts, rows)
    with full_precision(rows.device):
        for e, (start, end) in enumerate(segments):
            if start == end:
                continue
            if bias is None:
                torch.mm(rows[start:end], weight[e], out=output[start:end])
            else:
                torch.addmm(bias[e], rows[start:end], weight[e], out=output[start:end])
    output[segments[-1][1] :].zero_()
    return output


@expert_linear.register_fake
def _(rows, weight, bias, starts):
    return rows.new_empty(rows.shape[0], weight.shape[2])


@torch.library.custom_op("gated_vision::expert_outer", mutates_args=())
def expert_outer(left: Tensor, right: Tensor, starts: Tensor) -> Tensor:
    """(E, I, O): the sum over each segment of left[i] (I) right[i] (O)."""
    segments = _segments(starts, left)
    output = left.new_empty(len(segments), left.shape[1], right.shape[1])
    with full_precision(left.device):
        for e, (start, end) in enumerate(segments):
            torch.mm(left[start:end].t(), right[start:end], out=output[e])
    return output


@expert_outer.register_fake
def _(left, right, starts):
    return left.new_empty(starts.shape[0] - 1, left.shape[1], right.shape[1])


def _save_linear(ctx, inputs, output):
    rows, weight, _, starts = inputs
    ctx.save_for_backward(rows, weight, starts)


def _linear_gradients(ctx, gradient):
    rows, weight, starts = ctx.saved_tensors
    of_rows, of_weight, of_bias, _ = ctx.needs_input_grad
    return (
        expert_linear(gradient, weight.transpose(1, 2), None, starts) if of_rows else None,
        expert_outer(rows, gradient, starts) if of_weight else None,
        expert_outer(gradient.new_ones(len(gradient), 1), gradient, starts).squeeze(1) if of_bias else None,
        None,
    )


def _save_outer(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _outer_gradients(ctx, gradient):
    left, right, starts = ctx.saved_tensors
    of_left, of_right, _ = ctx.needs_input_grad
    return (
        expert_linear(right, gradient.transpose(1, 2), None, starts) if of_left else None,
        expert_linear(left, gradient, None, starts) if of_right else None,
        None,
    )


expert_linear.register_autograd(_linear_gradients, setup_context=_save_linear)
expert_outer.register_autograd(_outer_gradients, setup_context=_save_outer)
