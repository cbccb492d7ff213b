"""The definition: token after token, choice after choice."""

import torch
from torch import Tensor

from kernels.expert_dispatch.places import refuse_what_has_no_order


def choose(scores: Tensor, choices: int, softmax: bool) -> tuple[Tensor, Tensor]:
    """As `kernels.expert_dispatch.places.choose`."""
    refuse_what_has_no_order(scores)
    ranked = [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:choices] for row in scores.tolist()]
    indices = torch.tensor(ranked, dtype=torch.int64, device=scores.device).view(-1, choices).t().contiguous()
    powers = (scores - scores.detach().amax(1, keepdim=True)).exp()
    return powers / powers.sum(1, keepdim=True) if softmax else scores.new_empty(0), indices


def find_places(
    indices: Tensor, turns: Tensor | None, experts: int, limit: int, bounded_by_load: bool
) -> tuple[Tensor, ...]:
    """As `kernels.expert_dispatch.places.find_places`."""
    tokens = indices.shape[1]
    of_expert = [[] for _ in range(experts)]  # its choices in order
    for j, row in enumerate(indices.tolist()):
        for n in range(tokens) if turns is None else turns.tolist():
            of_expert[row[n]].append(j * tokens + n)
    loads = [len(chosen) for chosen in of_expert]
    capacity = min(limit, max(loads)) if bounded_by_load else limit
    order = [choice for chosen in of_expert for choice in chosen[:capacity]]
    order += [choice for chosen in of_expert for choice in chosen[capacity:]]
    starts = [sum(min(load, capacity) for load in loads[:e]) for e in range(experts + 1)]
    locations, positions = [0] * len(order), [0] * len(order)
    for chosen in of_expert:
        for location, choice in enumerate(chosen):
            locations[choice] = location
    for row, choice in enumerate(order):
        positions[choice] = row
    flat, like = [torch.tensor(x, dtype=torch.int64, device=indices.device) for x in (locations, positions)], indices
    rest = (torch.tensor(x, dtype=torch.int64, device=like.device) for x in (order, starts, loads, capacity))
    return *(x.view(like.shape) for x in flat), *rest


def mixture(tokens: Tensor, indices: Tensor, kept: Tensor, gates: Tensor, experts) -> Tensor:
    """What `dispatch`, the experts (functions (C) -> (D)) and `combine` compute together."""
    outputs = []
    for n, token in enumerate(tokens):
        output = 0 * experts[0](token)
        for j in range(indices.shape[0]):
            if kept[j, n]:
                output = output + gates[j, n] * experts[int(indices[j, n])](token)
        outputs.append(output)
    return torch.stack(outputs)


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> Tensor:
    """As `kernels.expert_dispatch.grouped_linear`, of one row at least."""
    outputs = []
    for r, row in enumerate(rows):
        expert = sum(r >= end for end in starts[1:].tolist())
        if expert == len(weight):
            outputs.append(0 * (row @ weight[0]))
        else:
            outputs.append(row @ weight[expert] + (0 if bias is None else bias[expert]))
    return torch.stack(outputs)
