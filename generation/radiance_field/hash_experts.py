"""The field of Switch-NeRF++: a gate sends each point to one of several hash grids of different resolutions.

Mathematics. Of a point x in the unit cube, with the gate's own coarse grid G, the experts' grids H_e and a factor s:

    p = softmax(MLP(LayerNorm(G(x))))        i = argmax p        f = s p_i H_i(x)

    (raw, g) = MLP(f)        density = exp(raw + bias)        colour = sigmoid(MLP(g, SH(d), a))

so that the gate learns from the picture through the one p_i that is a factor, and from the balance loss
E / N² sum_e (sum_n p[n, e]) #{n: i[n] = e}. The heads are shared. No point is dropped, and a point's values do not
depend on the others', unless a capacity is set, which counts in training alone.

Source: Switch-NeRF++, arXiv 2505.02005, from whose abstract are the top-1 of a softmax of an MLP of a hash grid, the
heterogeneous ranges of the experts' resolutions, the gate as a factor, the unified head, and dispatch inside of the
hash operation. There is no code of the authors'. INFERRED, each an argument of `HashExpertField`: sizes of gate and
grids, which ranges, the normalisation before the gate's MLP (which Switch-NeRF has), s = E, capacity, the heads and the
density.

Points are sorted by expert once, and stay so through grids and heads; densities and colours alone are put back.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from generation.argument_checks import check_real, check_whole
from generation.radiance_field.heads import (
    DensityOutput,
    FieldOutput,
    HeadedField,
    Perceptron,
    check_rays,
    kept_gates,
    put_back,
    route_points,
)
from generation.radiance_field.single_grid import UNIT_BOX, GridTable, bytes_of_heads, checked_grid
from kernels.expert_dispatch import Routing, dispatch, load_balance_loss
from kernels.hash_encoding import HashGrid

RANGES = tuple((16.0, 2.0 ** (11 + e / 2)) for e in range(8))
BYTES_OF_EXPERT = 24  # of a point's score, probability and share, and of where they are one-hot


class _NormOfColumns(torch.autograd.Function):
    """Layer norm of rows whose numbers of one kind lie side by side in memory.

    PyTorch's own copies such rows, and takes them one at a time.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.epsilon = epsilon
        normal, _ = _normalise(rows.t(), epsilon)
        return torch.addcmul(bias[:, None], normal, weight[:, None]).t()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        normal, inverse = _normalise(rows.t(), ctx.epsilon)
        gradient = gradient.t()
        weighted = gradient * weight[:, None]
        inner = (weighted * normal).mean(0)
        of_rows = (weighted - weighted.mean(0) - normal * inner) * inverse
        return of_rows.t(), (gradient * normal).sum(1), gradient.sum(1), None


def _normalise(columns: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    centred = columns - columns.mean(0)
    inverse = (centred.square().mean(0) + epsilon).rsqrt()
    return centred * inverse, inverse


class ColumnNorm(nn.LayerNorm):
    """`nn.LayerNorm` of `[N, C]`, fast where C is small and features lie side by side."""

    def forward(self, rows: Tensor) -> Tensor:
        return _NormOfColumns.apply(rows, self.weight, self.bias, self.eps)


class HashGate(nn.Module):
    """Scores of experts, of points in the unit cube: a coarse grid, a layer norm, and two layers. In float32 at least.

    Args:
        grid: of its own.
        width: of the hidden layer.
        experts: scores of a point.
        table_bound: see `GridTable`.
    """

    def __init__(self, grid: HashGrid, width: int, experts: int, table_bound: float):
        super().__init__()
        self.grid = GridTable(grid, table_bound)
        self.norm = ColumnNorm(grid.width)
        self.mlp = Perceptron([grid.width, width, experts], final_bias=False)

    def forward(self, points: Tensor, backend: str | None = None) -> Tensor:
        """`[N, E]`."""
        with torch.autocast(points.device.type, enabled=False):
            return self.mlp.of_columns(self.norm(self.grid(points, backend=backend)).t()).t()


class HashExpertField(HeadedField):
    """A radiance field of heterogeneous hash experts: see the module.

    The state dict has `gate.grid.table`, `gate.norm`, `gate.mlp`, `experts.table` (the experts' tables one after the
    other), `experts.base` (where each begins), `base`, `colour`, `appearance.weight` and `space.box`.

    Args:
        box, contraction: see `SceneSpace`: from the world to the unit cube.
        expert_resolutions: (coarsest, finest) of each expert, vertices a side. Inferred: from 16 to 2^11, 2^11.5, ...
            2^14.5.
        levels, features, log2_table_size: of every expert, see `kernels.hash_encoding.HashGrid`. Inferred.
        gate_resolutions, gate_levels, gate_features, gate_log2_table_size: of the gate's grid. Inferred: coarse, so
            that the decomposition is smooth and cheap.
        gate_width: of the gate's hidden layer. Inferred.
        gate_scale: s of the mathematics; None for the number of experts, which keeps features at the size of the
            grids' while the gate is undecided; 1 is the formula of the paper. Inferred.
        gate_noise: in training, normal noise of this over E is added to the scores. Inferred: none.
        capacity_factor: 0 drops nothing. In training with more, an expert takes `int(factor ceil(N / E))` points and
            features of others are 0, see `kernels.expert_dispatch`. Inferred: none.
        batch_prioritized: points of whom the gate is surer are not dropped before others.
        table_bound: tables begin uniform, within it of zero (1e-4, instant-ngp's; 1e-2 suits trainings of a thousand
            steps).
        hidden_width, geometry_features, colour_layers, direction_levels, appearances, appearance_features,
        density_activation, density_bias: see `HeadedField`. Inferred: as in nerfacto; -1.5 suits short trainings.
        backend: of the hash grids; chosen by device if None. Gradients of gradients are those of "torch".

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self,
        *,
        box: Any = UNIT_BOX,
        contraction: str = "none",
        expert_resolutions: Sequence[tuple[float, float]] = RANGES,
        levels: int = 16,
        features: int = 2,
        log2_table_size: int = 19,
        gate_resolutions: tuple[float, float] = (16, 128),
        gate_levels: int = 8,
        gate_features: int = 2,
        gate_log2_table_size: int = 15,
        gate_width: int = 64,
        gate_scale: float | None = None,
        gate_noise: float = 0.0,
        capacity_factor: float = 0.0,
        batch_prioritized: bool = True,
        table_bound: float = 1e-4,
        hidden_width: int = 64,
        geometry_features: int = 15,
        colour_layers: int = 2,
        direction_levels: int = 4,
        appearances: int = 0,
        appearance_features: int = 32,
        density_activation: str = "truncated_exp",
        density_bias: float = -1.0,
        backend: str | None = None,
    ):
        ranges = _ranges(expert_resolutions)
        grid = checked_grid("expert_", ranges, "", levels, features, log2_table_size)
        super().__init__(
            grid.width,
            box=box,
            contraction=contraction,
            hidden_width=hidden_width,
            geometry_features=geometry_features,
            colour_layers=colour_layers,
            direction_levels=direction_levels,
            appearances=appearances,
            appearance_features=appearance_features,
            density_activation=density_activation,
            density_bias=density_bias,
        )
        check_whole("gate_width", gate_width, 1)
        self.gate_scale = float(len(ranges)) if gate_scale is None else check_real("gate_scale", gate_scale)
        if self.gate_scale == 0:
            raise ValueError(f"gate_scale is {gate_scale}; it must be above 0, or None for the number of experts")
        self.gate_noise = check_real("gate_noise", gate_noise)
        self.capacity_factor = check_real("capacity_factor", capacity_factor)
        self.batch_prioritized = batch_prioritized
        self.backend = backend
        gate_grid = checked_grid("gate_", gate_resolutions, "gate_", gate_levels, gate_features, gate_log2_table_size)
        self.gate = HashGate(gate_grid, gate_width, len(ranges), table_bound)
        self.experts = GridTable(grid, table_bound)
        self.experts.register_buffer("base", torch.tensor(grid.expert_base))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by how they are trained: "gate" with its grid, "grids" of the experts, and "heads"."""
        groups = {"gate": list(self.gate.parameters()), "grids": list(self.experts.parameters())}
        elsewhere = {id(parameter) for group in groups.values() for parameter in group}
        return groups | {"heads": [parameter for parameter in self.parameters() if id(parameter) not in elsewhere]}

    @property
    def expert_count(self) -> int:
        return self.gate.mlp[-1].out_features

    @property
    def bytes_a_sample(self) -> int:
        """Of a point's activations in evaluation, at most about, in float32."""
        gate = self.gate.mlp[0]
        of_gate = 4 * (gate.in_features + gate.out_features) + BYTES_OF_EXPERT * self.expert_count
        return bytes_of_heads(self) + of_gate

    def route(self, points: Tensor) -> Routing:
        """Where points `[N, 3]` of the world go; with noise and capacity in training alone.

        Raises:
            ValueError: points have another shape, or one is not finite.
        """
        return self._route(self.space(points))

    def _route(self, unit: Tensor) -> Routing:
        return route_points(self, self.gate(unit, self.backend))

    def _features(self, unit: Tensor, routing: Routing) -> Tensor:
        """`[N, L F]` in the order of the experts."""
        sorted_gate = dispatch((kept_gates(routing) * self.gate_scale)[:, None], routing).tokens[:, 0]
        sorted_expert = routing.indices[0].index_select(0, routing.places.order)
        return self.experts(dispatch(unit, routing).tokens, sorted_expert, sorted_gate, self.backend)

    def density(self, points: Tensor) -> DensityOutput:
        """Densities of points `[N, 3]` of the world.

        Raises:
            ValueError: points have another shape, or one is not finite.
        """
        unit = self.space(points)
        routing = self._route(unit)
        density = self.density_of(self.base(self._features(unit, routing)))
        return DensityOutput(put_back(density[:, None], routing)[:, 0], routing)

    def forward(self, points: Tensor, directions: Tensor, appearance: Tensor | int | None = None) -> FieldOutput:
        """Densities and colours.

        Args:
            points: `[N, 3]` of the world.
            directions: `[N, 3]`, unit vectors along the rays.
            appearance: `[N]`, or one for all, the picture whose appearance is wanted; None for the mean of all. A field
                without embeddings does not look at it.

        Raises:
            ValueError: shapes do not fit, a point is not finite, or there is no such appearance.
        """
        appearance = check_rays(points, directions, appearance, self.appearance)
        unit = self.space(points)
        routing = self._route(unit)
        raw = self.base(self._features(unit, routing))
        if isinstance(appearance, Tensor):
            appearance = appearance.index_select(0, routing.places.order)
        colour = self.colour_of(raw, dispatch(directions, routing).tokens, appearance)
        return FieldOutput(
            put_back(self.density_of(raw)[:, None], routing)[:, 0],
            routing,
            put_back(colour, routing),
            load_balance_loss(routing.probabilities, routing.indices[0]),
        )


def _ranges(resolutions: Any) -> tuple[tuple[float, float], ...]:
    try:
        ranges = tuple(tuple(map(float, pair)) for pair in resolutions)
    except (TypeError, ValueError):
        ranges = ()
    if not ranges or any(len(pair) != 2 for pair in ranges):
        raise ValueError(
            f"expert_resolutions is {resolutions!r}; it must be a list of (coarsest, finest), one an expert"
        )
    return ranges
