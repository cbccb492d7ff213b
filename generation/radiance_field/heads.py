"""What follows a hash grid: the heads that make density and colour of features, and what a field returns.

Of features f of a point, a direction d and the embedding a of a picture's appearance:

    (s, g) = MLP(f)        density = exp(s + bias) or softplus(s + bias)        colour = sigmoid(MLP(g, SH(d), a))

Sources: the shapes of instant-ngp (arXiv 2201.05989) and nerfacto (arXiv 2302.04264); the shifted softplus, mip-NeRF
(arXiv 2103.13415).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.argument_checks import check_choice, check_whole
from generation.radiance_field.contraction import SceneSpace
from generation.radiance_field.directions import MOST_LEVELS, check_directions, spherical_harmonics
from kernels.expert_dispatch import Routing, combine, route

DENSITY_ACTIVATIONS = ("truncated_exp", "shifted_softplus")
LARGEST_EXPONENT = 15.0  # beyond it the gradient of exp does not grow
LAST_EXPONENT = 80.0  # beyond it exp does not grow: in float32 a density times any length is finite then


@dataclass(frozen=True)
class DensityOutput:
    """Densities of N points, and where they went.

    Attributes:
        density: `[N]`, at least 0, a unit of length in the world.
        routing: of a mixture: indices, probabilities and loads of its experts; None of a single network.
    """

    density: Tensor
    routing: Routing | None = None

    @property
    def expert(self) -> Tensor | None:
        """int64 `[N]`, the expert of each point."""
        return None if self.routing is None else self.routing.indices[0]

    @property
    def loads(self) -> Tensor | None:
        """int64 `[E]`, the points of each expert, dropped ones included."""
        return None if self.routing is None else self.routing.loads

    @property
    def load_fractions(self) -> Tensor | None:
        """`[E]`, the share of the points that each expert has: one that stays near 0 is dead."""
        return None if self.routing is None else self.routing.loads / max(len(self.density), 1)

    @property
    def mean_probabilities(self) -> Tensor | None:
        """`[E]`, of the gate, without gradient; their entropy falls as a mixture collapses."""
        return None if self.routing is None else self.routing.probabilities.detach().mean(0)

    @property
    def dropped(self) -> Tensor | None:
        """`[]`, the number of points that no expert took, for want of capacity."""
        return None if self.routing is None else self.routing.dropped


@dataclass(frozen=True)
class FieldOutput(DensityOutput):
    """Densities and colours of N points.

    Attributes:
        colour: `[N, 3]` in [0, 1].
        balance_loss: `[]`, 1 where the experts' loads are equal and E where one has all; None of a single network.
    """

    colour: Tensor | None = None
    balance_loss: Tensor | None = None


class _TruncatedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(max=LAST_EXPONENT).exp()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        return gradient * x.clamp(max=LARGEST_EXPONENT).exp()


def truncated_exp(x: Tensor) -> Tensor:
    """exp(x), whose gradient is that at 15 beyond 15, so that a steep step does not make all later ones infinite.

    Beyond 80, where all is opaque, it stays what it is there, since infinity would end a training.
    """
    return _TruncatedExp.apply(x)


def density_of(raw: Tensor, activation: str, bias: float) -> Tensor:
    """Densities of what a network says, in float32 at least.

    Args:
        raw: of any shape.
        activation: "truncated_exp", or "shifted_softplus", whose shift is `bias`.
        bias: added before.
    """
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32)) + bias
    return truncated_exp(raw) if activation == "truncated_exp" else F.softplus(raw)


class Perceptron(nn.ModuleList):
    """Linear layers with ReLU between.

    Args:
        widths: of the input, of each hidden layer, of the output.
        final_bias: whether the last layer has one.
    """

    def __init__(self, widths: Sequence[int], *, final_bias: bool = True):
        last = len(widths) - 2
        pairs = enumerate(pairwise(widths))
        super().__init__(nn.Linear(i, o, bias=final_bias or n < last) for n, (i, o) in pairs)

    def forward(self, rows: Tensor) -> Tensor:
        *hidden, last = self
        for layer in hidden:
            rows = F.relu_(layer(rows))
        return last(rows)

    def of_columns(self, columns: Tensor) -> Tensor:
        """`[C', N]` of `[C, N]`: for narrow layers, whose products are faster so."""
        for layer in self:
            if layer is not self[0]:
                columns = F.relu_(columns)
            if layer.bias is None:
                columns = layer.weight @ columns
            else:
                columns = torch.addmm(layer.bias[:, None], layer.weight, columns)
        return columns


class ColourHead(Perceptron):
    """Colours of what a density head leaves, of directions and appearances.

    The part of the first layer that appearances have is of their pictures, not of points, of whom there are many more.

    Args:
        geometry, direction, appearance: widths of the parts.
        width, layers: of the hidden layers.
    """

    def __init__(self, geometry: int, direction: int, appearance: int, width: int, layers: int):
        super().__init__([geometry + direction + appearance, *[width] * layers, 3])
        self.parts = [geometry + direction, appearance]

    def forward(self, raw: Tensor, directions: Tensor, appearance: Tensor | None, of_image: Tensor | None) -> Tensor:
        """`[N, 3]` in [0, 1], float32 at least.

        Args:
            raw: `[N, 1 + geometry]`, of which the first column is not looked at.
            directions: `[N, direction]`, encoded.
            appearance: embeddings `[I, appearance]`, None if the width is 0.
            of_image: `[N]`, which of them a point has; None if there is one for all.
        """
        first, *others = self
        for_point, for_appearance = first.weight.split(self.parts, 1)
        bias = first.bias
        offsets = None
        if appearance is not None:
            offsets = F.linear(appearance, for_appearance)
            if of_image is None:
                bias, offsets = bias + offsets[0], None
        hidden = F.linear(torch.cat([raw[:, 1:], directions.to(raw.dtype)], 1), for_point, bias)
        if offsets is not None:
            hidden = hidden.add_(F.embedding(of_image, offsets))
        for layer in others:
            hidden = layer(F.relu_(hidden))
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32)).sigmoid()


class HeadedField(nn.Module):
    """A field of features in a box with the heads above: all but the features.

    Args:
        width_of_features: of a point.
        box, contraction: see `SceneSpace`.
        hidden_width: of the heads.
        geometry_features: numbers that the density head passes on.
        colour_layers: hidden layers of the colour head, 1 or more.
        direction_levels: of the spherical harmonics, 1 to 5.
        appearances: pictures that have an embedding; 0 for none.
        appearance_features: of an embedding.
        density_activation: "truncated_exp" or "shifted_softplus" (a softplus, of which `density_bias` is the shift).
        density_bias: added to what the density head says.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self,
        width_of_features: int,
        *,
        box: Any,
        contraction: str,
        hidden_width: int,
        geometry_features: int,
        colour_layers: int,
        direction_levels: int,
        appearances: int,
        appearance_features: int,
        density_activation: str,
        density_bias: float,
    ):
        super().__init__()
        check_whole("hidden_width", hidden_width, 1)
        check_whole("geometry_features", geometry_features, 1)
        check_whole("colour_layers", colour_layers, 1)
        check_whole("direction_levels", direction_levels, 1, MOST_LEVELS)
        check_whole("appearances", appearances, 0)
        check_whole("appearance_features", appearance_features, 1)
        self.density_activation = check_choice("density_activation", density_activation, DENSITY_ACTIVATIONS)
        self.density_bias = check_signed("density_bias", density_bias)
        self.direction_levels = direction_levels
        self.space = SceneSpace(box, contraction)
        self.base = Perceptron([width_of_features, hidden_width, 1 + geometry_features])
        embedded = appearance_features if appearances else 0
        self.colour = ColourHead(geometry_features, direction_levels**2, embedded, hidden_width, colour_layers)
        self.appearance = nn.Embedding(appearances, appearance_features) if appearances else None

    def density_of(self, raw: Tensor) -> Tensor:
        """`[N]` of the density head's output."""
        return density_of(raw[:, 0], self.density_activation, self.density_bias)

    def colour_of(self, raw: Tensor, directions: Tensor, appearance: Tensor | int | None) -> Tensor:
        """`[N, 3]` of the density head's output, unit directions and checked appearances."""
        embeddings, of_image = chosen_appearance(self.appearance, appearance)
        return self.colour(raw, spherical_harmonics(directions, self.direction_levels), embeddings, of_image)


def chosen_appearance(
    embedding: nn.Embedding | None, appearance: Tensor | int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Embeddings, and which of them each point has, or None where all points have the first.

    Without `appearance` it is the mean of all (as in nerfacto), which is what a picture taken by nobody looks like.
    """
    if embedding is None:
        return None, None
    if appearance is None:
        return embedding.weight.mean(0, keepdim=True), None
    if isinstance(appearance, int):
        return embedding.weight[appearance][None], None
    return embedding.weight, appearance


def check_rays(
    points: Tensor, directions: Tensor, appearance: Tensor | int | None, embedding: nn.Embedding | None
) -> Tensor | int | None:
    """`appearance`, None if there is no embedding; the shapes of points are checked where they are mapped.

    Raises:
        ValueError: directions or appearances do not fit the points, or there is no such appearance.
    """
    check_directions(directions, len(points))
    if embedding is None or appearance is None:
        return None
    count = embedding.num_embeddings
    if isinstance(appearance, Tensor):
        if appearance.shape != points.shape[:1] or appearance.is_floating_point():
            raise ValueError(
                f"appearance has shape {tuple(appearance.shape)} and dtype {appearance.dtype}; it must be integers "
                f"({len(points)})"
            )
        if appearance.device.type == "cpu" and not torch.compiler.is_compiling() and len(points):
            least, most = (int(end) for end in appearance.aminmax())
            if least < 0 or most >= count:
                raise ValueError(f"appearance is from {least} to {most}; it must be from 0 to {count - 1}")
        return appearance
    return check_whole("appearance", appearance, 0, count - 1)


def route_points(field: nn.Module, scores: Tensor) -> Routing:
    """Where points of scores `[N, E]` go, with the field's noise and capacity in training alone."""
    training = field.training
    return route(
        scores,
        capacity_factor=field.capacity_factor if training else 0.0,
        batch_prioritized=field.batch_prioritized and training and field.capacity_factor > 0,
        noise=field.gate_noise if training else None,
    )


def kept_gates(routing: Routing) -> Tensor:
    """`[N]`, the gate of each point, 0 of those that are dropped."""
    gate = routing.gates[0]
    return gate.masked_fill(~routing.kept[0], 0) if routing.may_drop else gate


def put_back(rows: Tensor, routing: Routing) -> Tensor:
    """Rows of all points, dropped ones included, from the order of the experts to that in which the points came."""
    return combine(rows, replace(routing, gates=None, may_drop=False))


def check_signed(name: str, value: Any) -> float:
    """`value` as a `float`.

    Raises:
        ValueError: it is no finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise ValueError(f"{name} is {value!r}; it must be a finite number")
    return float(value)
