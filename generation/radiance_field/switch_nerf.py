"""Switch-NeRF, the baseline of large scenes: a gate sends each point to one of several MLPs, and NeRF is behind them.

Mathematics. With the frequency embedding P of a point x, in units in which the scene lies within [-1, 1],

    h = Linear(P(x))        z = W LayerNorm(MLP(h))        p = softmax(z)        i = argmax p
    y = relu(p_i MLP_i(h))        density = softplus(Linear(y) + n - 1)
    colour = sigmoid(Linear(relu(Linear([Linear(y), P(d), a]))))

with noise n of the density in training. An expert adds its input to the layers of `skips`, before their ReLU, and what
comes out is the input that the next skip adds. In training an expert takes `int(capacity_factor ceil(N / E))` points,
those of which the gate is surest, and y is 0 of others; in evaluation nothing is dropped.

Source: Switch-NeRF, ICLR 2023, and its code; the background is Mega-NeRF's (arXiv 2112.10703), on the points of NeRF++.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.argument_checks import check_real, check_whole
from generation.radiance_field.contraction import SceneSpace, check_points
from generation.radiance_field.directions import frequency_embedding
from generation.radiance_field.heads import (
    DensityOutput,
    FieldOutput,
    Perceptron,
    check_rays,
    check_signed,
    chosen_appearance,
    density_of,
    kept_gates,
    put_back,
    route_points,
)
from kernels.expert_dispatch import Routing, dispatch, grouped_linear, load_balance_loss


class ExpertPerceptrons(nn.Module):
    """E perceptrons of one width, each over the rows of its own segment.

    Args:
        experts, width, layers: sizes; the weights of a layer are `[E, width, width]`, input before output.
        skips: layers to whose output the input is added.
    """

    def __init__(self, experts: int, width: int, layers: int, skips: Sequence[int]):
        super().__init__()
        self.skips = frozenset(skips)
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(experts, width, width)) for _ in range(layers))
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(experts, width)) for _ in range(layers))
        for parameter in self.parameters():  # as nn.Linear begins
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    def forward(self, rows: Tensor, starts: Tensor) -> Tensor:
        """`[N, width]` of rows `[N, width]`, of which expert e has starts[e] to starts[e + 1]; others are not meant."""
        skipped = rows
        for n, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            rows = grouped_linear(rows, weight, bias, starts)
            if n in self.skips:
                rows = rows + skipped.to(rows.dtype)
            if n < len(self.weights) - 1:
                rows = F.relu(rows)
            if n in self.skips:
                skipped = rows
        return rows


class PointGate(nn.Module):
    """Scores of experts, of embedded points: two layers, a layer norm, and a layer without bias in float32 at least."""

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.mlp = Perceptron([width, width, width])
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, experts, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """`[N, E]`."""
        rows = self.mlp(rows)
        with torch.autocast(rows.device.type, enabled=False):
            return self.scores(self.norm(rows.to(self.norm.weight.dtype)))


class SwitchNeRFField(nn.Module):
    """The radiance field of Switch-NeRF: see the module. Defaults are the authors'.

    Args:
        box: least and greatest corner of what becomes [-1, 1] along the longest side, before it is embedded. The
            default changes nothing: the authors' scenes have such units.
        width: of all layers but the colour head's.
        experts, expert_layers, skips: see `ExpertPerceptrons`; skips below `expert_layers`.
        position_octaves, direction_octaves: of the frequency embeddings.
        appearances: pictures that have an embedding; 0 for none.
        appearance_features: of an embedding.
        colour_width: of the colour head's hidden layer.
        capacity_factor: in training; 0 drops nothing.
        batch_prioritized: points of whom the gate is surer are not dropped before others.
        gate_noise: in training, normal noise of this over E is added to the scores.
        density_noise: in training, standard deviation of the noise that is added before the softplus.
        density_bias: minus the shift of the softplus.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self,
        *,
        box: Any = ((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0)),
        width: int = 256,
        experts: int = 8,
        expert_layers: int = 7,
        skips: Sequence[int] = (3,),
        position_octaves: int = 12,
        direction_octaves: int = 4,
        appearances: int = 0,
        appearance_features: int = 48,
        colour_width: int = 128,
        capacity_factor: float = 1.0,
        batch_prioritized: bool = True,
        gate_noise: float = 0.0,
        density_noise: float = 1.0,
        density_bias: float = -1.0,
    ):
        super().__init__()
        check_whole("width", width, 1)
        check_whole("experts", experts, 1)
        check_whole("expert_layers", expert_layers, 1)
        for skip in skips:
            check_whole("skips", skip, 0, expert_layers - 1)
        check_whole("position_octaves", position_octaves, 0)
        check_whole("direction_octaves", direction_octaves, 0)
        check_whole("appearances", appearances, 0)
        check_whole("appearance_features", appearance_features, 1)
        check_whole("colour_width", colour_width, 1)
        self.capacity_factor = check_real("capacity_factor", capacity_factor)
        self.batch_prioritized = batch_prioritized
        self.gate_noise = check_real("gate_noise", gate_noise)
        self.density_noise = check_real("density_noise", density_noise)
        self.density_bias = check_signed("density_bias", density_bias)
        self.position_octaves, self.direction_octaves = position_octaves, direction_octaves
        self.space = SceneSpace(box)
        self.position = nn.Linear(3 * (2 * position_octaves + 1), width)
        self.gate = PointGate(width, experts)
        self.experts = ExpertPerceptrons(experts, width, expert_layers, skips)
        self.raw_density = nn.Linear(width, 1)
        self.features = nn.Linear(width, width)
        of_ray = 3 * (2 * direction_octaves + 1) + (appearance_features if appearances else 0)
        self.colour = Perceptron([width + of_ray, colour_width, 3])
        self.appearance = nn.Embedding(appearances, appearance_features) if appearances else None

    @classmethod
    def from_official(cls, checkpoint: str | Path | Mapping, **options: Any) -> "SwitchNeRFField":
        """The foreground of an official checkpoint: see `switch_nerf_checkpoints.from_official`."""
        from generation.radiance_field.switch_nerf_checkpoints import from_official

        return from_official(checkpoint, **options).foreground

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by how they are trained: all are "heads", which the authors train as one."""
        return {"heads": list(self.parameters())}

    def _mixture(self, points: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """y in the order of the experts, the density's raw values `[N]` of it, and who went where."""
        embedded = self.position(frequency_embedding(self.space.centred(points), self.position_octaves))
        routing = route_points(self, self.gate(embedded))
        sent = dispatch(embedded, routing)
        mixed = self.experts(sent.tokens, sent.starts) * dispatch(kept_gates(routing)[:, None], routing).tokens
        mixed = F.relu(mixed)
        raw = self.raw_density(mixed)[:, 0]
        if self.training and self.density_noise:
            raw = raw + self.density_noise * torch.randn_like(raw)
        return mixed, density_of(raw, "shifted_softplus", self.density_bias), routing

    def density(self, points: Tensor) -> DensityOutput:
        """Densities of points `[N, 3]` of the world.

        Raises:
            ValueError: points have another shape.
        """
        _, density, routing = self._mixture(points)
        return DensityOutput(put_back(density[:, None], routing)[:, 0], routing)

    def forward(self, points: Tensor, directions: Tensor, appearance: Tensor | int | None = None) -> FieldOutput:
        """Densities and colours.

        Args:
            points: `[N, 3]` of the world.
            directions: `[N, 3]`, unit vectors along the rays.
            appearance: `[N]`, or one for all, the picture whose appearance is wanted; None for the mean of all. A field
                without embeddings does not look at it.

        Raises:
            ValueError: shapes do not fit, or there is no such appearance.
        """
        appearance = check_rays(points, directions, appearance, self.appearance)
        mixed, density, routing = self._mixture(points)
        if isinstance(appearance, Tensor):
            appearance = appearance.index_select(0, routing.places.order)
        of_ray = _of_ray(dispatch(directions, routing).tokens, self.direction_octaves, self.appearance, appearance)
        colour = _sigmoid(self.colour(torch.cat([self.features(mixed), *of_ray], 1)))
        return FieldOutput(
            put_back(density[:, None], routing)[:, 0],
            routing,
            put_back(colour, routing),
            load_balance_loss(routing.probabilities, routing.indices[0]),
        )


class BackgroundField(nn.Module):
    """NeRF of points outside of an ellipsoid, `[N, 4]` as of `Ellipsoid.inverted_points`. Defaults are the authors'.

    Args:
        width, layers: of the MLP.
        skips: layers, above the first, whose input is the embedded point as well.
        position_octaves, direction_octaves, appearances, appearance_features, density_noise, density_bias: as of
            `SwitchNeRFField`. The colour head is half as wide.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self,
        *,
        width: int = 256,
        layers: int = 8,
        skips: Sequence[int] = (4,),
        position_octaves: int = 12,
        direction_octaves: int = 4,
        appearances: int = 0,
        appearance_features: int = 48,
        density_noise: float = 1.0,
        density_bias: float = -1.0,
    ):
        super().__init__()
        check_whole("width", width, 2)
        check_whole("layers", layers, 1)
        for skip in skips:
            check_whole("skips", skip, 1, layers - 1)
        check_whole("position_octaves", position_octaves, 0)
        check_whole("direction_octaves", direction_octaves, 0)
        check_whole("appearances", appearances, 0)
        check_whole("appearance_features", appearance_features, 1)
        self.density_noise = check_real("density_noise", density_noise)
        self.density_bias = check_signed("density_bias", density_bias)
        self.position_octaves, self.direction_octaves = position_octaves, direction_octaves
        self.skips = frozenset(skips)
        embedded = 4 * (2 * position_octaves + 1)
        self.position = nn.ModuleList(
            nn.Linear((width if n else embedded) + (embedded if n in self.skips else 0), width) for n in range(layers)
        )
        self.raw_density = nn.Linear(width, 1)
        self.features = nn.Linear(width, width)
        of_ray = 3 * (2 * direction_octaves + 1) + (appearance_features if appearances else 0)
        self.colour = Perceptron([width + of_ray, width // 2, 3])
        self.appearance = nn.Embedding(appearances, appearance_features) if appearances else None

    def forward(self, points: Tensor, directions: Tensor, appearance: Tensor | int | None = None) -> FieldOutput:
        """Densities and colours, as of `SwitchNeRFField`, of points `[N, 4]`.

        Raises:
            ValueError: shapes do not fit, or there is no such appearance.
        """
        check_points(points, 4)
        appearance = check_rays(points, directions, appearance, self.appearance)
        embedded = rows = frequency_embedding(points, self.position_octaves)
        for n, layer in enumerate(self.position):
            if n in self.skips:
                rows = torch.cat([embedded, rows.to(embedded.dtype)], 1)
            rows = F.relu(layer(rows))
        raw = self.raw_density(rows)[:, 0]
        if self.training and self.density_noise:
            raw = raw + self.density_noise * torch.randn_like(raw)
        of_ray = _of_ray(directions, self.direction_octaves, self.appearance, appearance)
        colour = _sigmoid(self.colour(torch.cat([self.features(rows), *of_ray], 1)))
        return FieldOutput(density_of(raw, "shifted_softplus", self.density_bias), colour=colour)


def _of_ray(
    directions: Tensor, octaves: int, embedding: nn.Embedding | None, appearance: Tensor | int | None
) -> list[Tensor]:
    """What colours depend on beside the point: embedded directions, and embeddings of appearances if there are any."""
    parts = [frequency_embedding(directions, octaves)]
    embeddings, of_image = chosen_appearance(embedding, appearance)
    if embeddings is not None:
        alike = of_image is None
        parts.append(embeddings.expand(len(directions), -1) if alike else F.embedding(of_image, embeddings))
    return parts


def _sigmoid(raw: Tensor) -> Tensor:
    return raw.to(torch.promote_types(raw.dtype, torch.float32)).sigmoid()
