"""Expert dispatch: each token goes to its best experts, sorted so that an expert's tokens lie together, and back.

Mathematics. N tokens, E experts, k choices a token. With scores z (N, E), noise s and r drawn from the unit normal:

    z <- z + s r / E                                         noise, if any
    p = softmax(z)                                           or p = z, weights of another gate
    i[j, n] = the expert of the j-th largest z[n], of equals the lowest index
    g[j, n] = p[n, i[j, n]];  if k > 1:  g / max(sum_j g, eps)
    location[j, n] = how many choices of the same expert come earlier

Choices come in the order of their tokens, or in that of falling max p (`batch_prioritized`), all first choices before
all second ones. With c = ceil(N / E) and the largest load L, the capacity of an expert is

    k int(f c) if f > 0,    L if f = 0 (nothing is dropped),    min(L, k int(-f c)) if f < 0

for the capacity factor f; a choice whose location is not below it is dropped: counted, and worth 0. For experts F_e

    output[n] = sum_j g[j, n] F_{i[j, n]}(token[n])          over the choices that are kept

computed as `route` (who goes where), `dispatch` (rows in the order of experts and locations, the dropped ones last),
`grouped_linear` or whatever reads the segments, and `combine`. Where nothing is dropped a token's output does not
depend on the other tokens, so chunks give what the whole gives.

Gradients reach the scores through p and g alone; indices carry none. Moving rows is a permutation and its gradient the
inverse one, so nothing is added up in an order that changes from run to run. Gradients of gradients are defined.

Sources: the routing of Switch-NeRF (ICLR 2023), which is Tutel's, arXiv 2206.03382; its balance loss is GShard's, arXiv
2006.16668; load and importance, arXiv 1701.06538; the tree gate, COMET, arXiv 2306.02742.

Files: `reference.py` is the definition, in loops; `places.py` is the `torch` backend of routing, `native.cpp` the CPU
kernel, which `operators.py` registers with PyTorch; `movement.py` and `grouped.py` move rows and multiply segments
by PyTorch's own operations on every device; `losses.py` and `tree_gate.py` are plain PyTorch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.expert_dispatch import movement, operators, places, reference
from kernels.expert_dispatch.arguments import (
    check_capacity_factor,
    check_combination,
    check_indices,
    check_scores,
    check_tokens,
)
from kernels.expert_dispatch.grouped import grouped_linear
from kernels.expert_dispatch.losses import load_balance_loss, load_importance_loss
from kernels.expert_dispatch.places import Places, capacity_rule
from kernels.expert_dispatch.tree_gate import leaf_entropy, leaf_probabilities, tree_gate

__all__ = [
    "Dispatched",
    "Routing",
    "assign",
    "combine",
    "dispatch",
    "grouped_linear",
    "leaf_entropy",
    "leaf_probabilities",
    "load_balance_loss",
    "load_importance_loss",
    "route",
    "tree_gate",
]

NO_TRITON = "routing has no triton kernel: it moves integers, which PyTorch does on a GPU"


@dataclass(frozen=True)
class Routing:
    """Who goes where; all integers are int64 on the device of the tokens, and no count waits for that device."""

    indices: Tensor  # (k, N) expert of each choice
    gates: Tensor | None  # (k, N)
    scores: Tensor | None  # (N, E) as they were ranked: noise included, float32 at least
    probabilities: Tensor | None  # (N, E)
    places: Places
    may_drop: bool  # False: a capacity factor of 0

    @property
    def locations(self) -> Tensor:
        """(k, N): how many choices of the same expert come earlier, dropped ones included."""
        return self.places.locations

    @property
    def loads(self) -> Tensor:
        """(E): the choices of each expert, dropped ones included."""
        return self.places.loads

    @property
    def capacity(self) -> Tensor:
        """(): the most choices that an expert takes."""
        return self.places.capacity

    @property
    def kept(self) -> Tensor:
        """(k, N): which choices are not dropped."""
        return self.locations < self.capacity

    @property
    def dropped(self) -> Tensor:
        """(): the number of choices that are dropped."""
        return self.indices.numel() - self.places.starts[-1]


@dataclass(frozen=True)
class Dispatched:
    """Tokens in the order of their experts."""

    tokens: Tensor  # (k N, C): expert e owns rows starts[e] to starts[e + 1]; dropped choices lie after starts[E]
    starts: Tensor  # (E + 1)
    routing: Routing

    @property
    def order(self) -> Tensor:
        """(k N): the choice j N + n of each row."""
        return self.routing.places.order

    @property
    def positions(self) -> Tensor:
        """(k, N): the row of each choice; the inverse of `order`."""
        return self.routing.places.positions

    @property
    def dropped(self) -> Tensor:
        """(): the number of rows after the last segment."""
        return self.routing.dropped


def route(
    scores: Tensor,
    *,
    experts_per_token: int = 1,
    capacity_factor: float = 0.0,
    batch_prioritized: bool = False,
    noise: float | None = None,
    softmax: bool = True,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Routing:
    """Choose the experts of every token.

    Args:
        scores: (N, E) logits; -inf bars an expert, if another is left.
        experts_per_token: k, 1 to E.
        capacity_factor: f of the mathematics; 0 drops nothing.
        batch_prioritized: whether tokens that are surer of their first expert are counted first.
        noise: s of the mathematics, for training; None or 0 for none.
        softmax: False if the scores are weights, 0 at least, of another gate such as `tree_gate`.
        generator: of the noise.
        backend: "reference", "torch" or "native"; chosen by device if None.

    Returns:
        The routing; probabilities and gates in float32 (float64 for float64 scores), under autocast, too.

    Raises:
        ValueError: an argument does not fit, or a row of scores has a NaN, +inf, or no finite number. (A compiled graph
            of the `torch` backend does not look at the numbers.)
        RuntimeError: the named backend cannot run here.
    """
    check_scores(scores, experts_per_token, noise, softmax)
    check_capacity_factor(capacity_factor)
    backend = resolve_backend("expert_dispatch", scores.device, backend, refusals={"triton": NO_TRITON})
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if noise:
        scores = scores + noise / scores.shape[1] * torch.empty_like(scores).normal_(generator=generator)
    choose = {"reference": reference.choose, "torch": places.choose, "native": operators.expert_choice}[backend]
    probabilities, indices = choose(scores, experts_per_token, softmax)
    if not softmax:
        probabilities = scores
    gates = probabilities.t().gather(0, indices)
    priority = gates[0].detach() if batch_prioritized else None
    if experts_per_token > 1:
        gates = gates / gates.sum(0).clamp(min=torch.finfo(gates.dtype).eps)
    found = _places(indices, scores.shape[1], capacity_factor, priority, backend)
    return Routing(indices, gates, scores, probabilities, found, capacity_factor != 0)


def assign(
    expert_index: Tensor,
    experts: int,
    *,
    gates: Tensor | None = None,
    capacity_factor: float = 0.0,
    priority: Tensor | None = None,
    backend: str | None = None,
) -> Routing:
    """The routing of tokens whose experts are known.

    Args:
        expert_index: (N) or (k, N) integers from 0 to `experts` - 1.
        experts: E.
        gates: of the shape of `expert_index`; kept for `combine`.
        capacity_factor: as in `route`.
        priority: (N); tokens of a larger one are counted first, equals in their order. None: all in their order.
        backend: as in `route`.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: the named backend cannot run here.
    """
    check_indices(expert_index, experts, gates, priority)
    check_capacity_factor(capacity_factor)
    backend = resolve_backend("expert_dispatch", expert_index.device, backend, refusals={"triton": NO_TRITON})
    indices = torch.atleast_2d(expert_index).to(torch.int64).contiguous()
    gates = None if gates is None else gates.reshape(indices.shape)
    found = _places(indices, experts, capacity_factor, priority, backend)
    return Routing(indices, gates, None, None, found, capacity_factor != 0)


def _places(indices: Tensor, experts: int, factor: float, priority: Tensor | None, backend: str) -> Places:
    turns = None if priority is None else torch.argsort(priority, descending=True, stable=True)
    find = {"reference": reference.find_places, "torch": places.find_places, "native": operators.expert_places}[backend]
    return Places(*find(indices, turns, experts, *capacity_rule(*indices.shape, experts, factor)))


def dispatch(tokens: Tensor, routing: Routing) -> Dispatched:
    """Sort tokens by their experts.

    Args:
        tokens: (N, C), any strides.
        routing: of `route` or `assign`.

    Raises:
        ValueError: the tokens do not fit the routing.
    """
    check_tokens(tokens, routing.indices)
    rows = movement.spread(tokens, routing.places.order, routing.places.positions)
    return Dispatched(rows, routing.places.starts, routing)


def combine(expert_output: Tensor, routing: Routing | Dispatched, gates: Tensor | None = None) -> Tensor:
    """Add up what the experts made of each token.

    Args:
        expert_output: (k N, D), a row for each of the dispatched tokens; those of dropped choices are not looked at.
        routing: of `route` or `assign`, or what `dispatch` returned.
        gates: (k, N); those of the routing if None, and 1 if it has none.

    Returns:
        (N, D) in the dtype of `expert_output`; a token whose choices are all dropped gets 0.

    Raises:
        ValueError: the output or the gates do not fit the routing.
    """
    routing = routing.routing if isinstance(routing, Dispatched) else routing
    gates = routing.gates if gates is None else gates
    check_combination(expert_output, gates, routing.indices)
    kept = routing.kept if routing.may_drop else None
    return movement.collect(expert_output, gates, kept, routing.places.order, routing.places.positions)
