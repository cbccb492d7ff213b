"""One hash grid with the heads of the mixture: what instant-ngp has, and what a mixture is measured against."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from generation.argument_checks import check_real, check_whole
from generation.radiance_field.heads import DensityOutput, FieldOutput, HeadedField, check_rays
from kernels.hash_encoding import HashGrid, hash_encoding

UNIT_BOX = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
BYTES_OF_POINT = 256  # of what every field has of a point: where it is, its direction and colour, where it is sent


class GridTable(nn.Module):
    """The numbers of a hash grid, or of several in one table, and how they are read.

    Args:
        grid: its configuration.
        bound: they begin uniform, within it of zero.
    """

    def __init__(self, grid: HashGrid, bound: float):
        super().__init__()
        self.grid = grid
        check_real("table_bound", bound)
        self.table = nn.Parameter(grid.initialize())
        nn.init.uniform_(self.table, -bound, bound)

    def forward(
        self, points: Tensor, expert: Tensor | None = None, gate: Tensor | None = None, backend: str | None = None
    ) -> Tensor:
        """Features of points in the unit cube: see `kernels.hash_encoding`."""
        return hash_encoding(points, self.table, self.grid, expert=expert, gate=gate, backend=backend)

    def extra_repr(self) -> str:
        return str(self.grid)


class SingleGridField(HeadedField):
    """A radiance field of one multiresolution hash grid.

    Args:
        box, contraction: see `SceneSpace`: from the world to the unit cube.
        resolutions: vertices a side of the coarsest and the finest level.
        levels, features, log2_table_size: see `kernels.hash_encoding.HashGrid`.
        table_bound: the table begins uniform, within it of zero (1e-4, instant-ngp's; 1e-2 suits trainings of a
            thousand steps).
        hidden_width, geometry_features, colour_layers, direction_levels, appearances, appearance_features,
        density_activation, density_bias: see `HeadedField`.
        backend: of the kernels; chosen by device if None.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self,
        *,
        box: Any = UNIT_BOX,
        contraction: str = "none",
        resolutions: Sequence[float] = (16, 2048),
        levels: int = 16,
        features: int = 2,
        log2_table_size: int = 19,
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
        grid = checked_grid("", resolutions, "", levels, features, log2_table_size)
        if grid.experts > 1:
            raise ValueError(f"resolutions is {resolutions!r}; it must be one pair, (coarsest, finest)")
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
        self.backend = backend
        self.grid = GridTable(grid, table_bound)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by how they are trained: "grids", and "heads" with the appearances."""
        of_grid = {id(parameter) for parameter in self.grid.parameters()}
        heads = [parameter for parameter in self.parameters() if id(parameter) not in of_grid]
        return {"grids": list(self.grid.parameters()), "heads": heads}

    @property
    def expert_count(self) -> int:
        """0: one network is no mixture."""
        return 0

    @property
    def bytes_a_sample(self) -> int:
        """Of a point's activations in evaluation, at most about, in float32."""
        return bytes_of_heads(self)

    def _raw(self, points: Tensor) -> Tensor:
        return self.base(self.grid(self.space(points), backend=self.backend))

    def density(self, points: Tensor) -> DensityOutput:
        """Densities of points `[N, 3]` of the world.

        Raises:
            ValueError: points have another shape, or one is not finite.
        """
        return DensityOutput(self.density_of(self._raw(points)))

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
        raw = self._raw(points)
        return FieldOutput(self.density_of(raw), colour=self.colour_of(raw, directions, appearance))


def bytes_of_heads(field: HeadedField) -> int:
    """Of a point's activations in evaluation, at most about, in float32: features, two hidden layers at once, and what
    the colour head takes, which is put together of its parts."""
    first = field.base[0]
    return BYTES_OF_POINT + 4 * (first.in_features + 2 * first.out_features + 2 * field.colour[0].in_features)


def checked_grid(
    of_resolutions: str, resolutions: Any, prefix: str, levels: int, features: int, log2_table_size: int
) -> HashGrid:
    """A grid of a field's arguments.

    Args:
        of_resolutions, prefix: what the names of the arguments begin with, the first one's and the others'.

    Raises:
        ValueError: no grid is like that.
    """
    check_whole(f"{prefix}levels", levels, 1)
    check_whole(f"{prefix}features", features, 1)
    check_whole(f"{prefix}log2_table_size", log2_table_size, 3, 31)
    try:
        resolutions = tuple(pair if isinstance(pair, int | float) else tuple(pair) for pair in resolutions)
        return HashGrid(resolutions, levels=levels, features=features, log2_table_size=log2_table_size)
    except TypeError as error:
        name = f"{of_resolutions}resolutions"
        raise ValueError(f"{name} is {resolutions!r}; it must be (coarsest, finest) or a list of such pairs") from error
    except ValueError as error:  # its words begin with the argument's name
        begin = of_resolutions if str(error).startswith("resolutions") else prefix
        raise ValueError(f"{begin}{error}") from error
