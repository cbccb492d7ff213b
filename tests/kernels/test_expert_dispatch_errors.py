"""Expert dispatch: what does not fit is named."""

import math

import pytest
import torch

from kernels.expert_dispatch import (
    assign,
    combine,
    dispatch,
    grouped_linear,
    load_balance_loss,
    load_importance_loss,
    route,
)

INDICES = torch.tensor([0, 1, 1])


def _assigned(**changes):
    return assign(**{"expert_index": INDICES, "experts": 2} | changes)


def _grouped(**changes):
    starts = torch.tensor([0, 1, 3])
    return grouped_linear(
        **{"rows": torch.ones(3, 4), "weight": torch.ones(2, 4, 5), "bias": None, "starts": starts} | changes
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: route(torch.ones(3)), r"scores have shape \(3,\); it must be \(tokens, experts\)"),
        (lambda: route(torch.ones(3, 0)), r"scores have shape \(3, 0\)"),
        (lambda: route(torch.ones(3, 2, dtype=torch.int64)), "scores have dtype torch.int64"),
        (lambda: route(torch.ones(3, 2), experts_per_token=3), "experts_per_token is 3; with 2 experts it must be 1"),
        (lambda: route(torch.ones(3, 2), experts_per_token=0), "experts_per_token is 0"),
        (lambda: route(torch.ones(3, 2), noise=-1.0), "noise is -1.0; it must be 0 at least and finite"),
        (lambda: route(torch.ones(3, 2), capacity_factor=math.inf), "capacity_factor is inf; it must be finite"),
        (lambda: route(torch.ones(3, 2), capacity_factor=math.nan), "capacity_factor is nan"),
        (lambda: route(torch.ones(3, 2), backend="cuda"), "backend is 'cuda'"),
        (lambda: route(-torch.ones(3, 2), softmax=False), "scores have a negative number"),
        (lambda: _assigned(expert_index=torch.ones(1, 2, 3).long()), r"expert_index has shape \(1, 2, 3\)"),
        (lambda: _assigned(expert_index=torch.ones(3)), "expert_index has dtype torch.float32"),
        (lambda: _assigned(experts=1), "expert_index holds 1; with 1 experts it must be 0 to 0"),
        (lambda: _assigned(expert_index=-INDICES), "expert_index holds -1"),
        (lambda: _assigned(experts=0), "experts is 0; it must be 1 at least"),
        (lambda: _assigned(gates=torch.ones(2)), r"gates has shape \(2,\); with this expert_index it must be \(3,\)"),
        (lambda: _assigned(priority=torch.ones(2)), r"priority has shape \(2,\)"),
        (lambda: _assigned(priority=torch.ones(3, device="meta")), "priority is on meta and expert_index on cpu"),
        (lambda: _assigned(priority=torch.full((3,), math.nan)), "priority has a NaN"),
        (lambda: dispatch(torch.ones(4, 2), _assigned()), r"tokens have shape \(4, 2\); .* must be \(3, channels\)"),
        (lambda: dispatch(torch.ones(3), _assigned()), r"tokens have shape \(3,\)"),
        (lambda: dispatch(torch.ones(3, 2, device="meta"), _assigned()), "tokens are on meta and the routing on cpu"),
        (lambda: combine(torch.ones(4, 2), _assigned()), r"expert_output has shape \(4, 2\); .* \(3, channels\)"),
        (lambda: combine(torch.ones(3, 2).long(), _assigned()), "expert_output has dtype torch.int64"),
        (lambda: combine(torch.ones(3, 2), _assigned(), torch.ones(3)), r"gates have shape \(3,\); .* \(1, 3\)"),
        (lambda: combine(torch.ones(3, 2, device="meta"), _assigned()), "expert_output is on meta"),
        (lambda: _grouped(rows=torch.ones(3, 5)), r"rows have shape \(3, 5\) and weight \(2, 4, 5\)"),
        (lambda: _grouped(bias=torch.ones(5)), r"bias has shape \(5,\); with this weight it must be \(2, 5\)"),
        (lambda: _grouped(starts=torch.tensor([0, 3])), r"starts has shape \(2,\) .* it must be \(3,\)"),
        (lambda: _grouped(weight=torch.ones(2, 4, 5).double()), "weight is torch.float64 on cpu and rows torch.fl"),
        (lambda: _grouped(starts=torch.tensor([0, 2, 4])), r"starts is \[0, 2, 4\]; it must ascend from 0"),
        (lambda: _grouped(starts=torch.tensor([0, 2, 1])), r"starts is \[0, 2, 1\]"),
        (lambda: load_balance_loss(torch.ones(3, 2), INDICES[:2]), r"probabilities have shape \(3, 2\) and first"),
        (lambda: load_importance_loss(torch.ones(3, 1), torch.ones(3), 1.0), r"logits have shape \(3, 1\)"),
        (lambda: load_importance_loss(torch.ones(3, 2), torch.ones(3), 0.0), "noise is 0.0; it must be positive"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_backends_that_cannot_run():
    with pytest.raises(RuntimeError, match="routing has no triton kernel"):
        route(torch.ones(3, 2), backend="triton")
