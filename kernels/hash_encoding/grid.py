"""What a hash grid is: its levels, the sizes of their tables, and the conventions by which points find their rows."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.hash_encoding.layout import advise_huge_pages

CONVENTIONS = ("tiny-cuda-nn", "nerfstudio")
INTERPOLATIONS = ("linear", "smoothstep", "nearest")
DIMS = (2, 3, 4)
FEATURES = (1, 2, 4, 8)
PRIMES = (1, 2654435761, 805459861, 3674653429)
WORD = 1 << 32  # integers wrap here


class Level(NamedTuple):
    """One level of one expert.

    Args:
        scale: cells a unit of length.
        resolution: vertices a side.
        offset: first row in the table.
        size: rows.
        hashed: whether terms are combined by xor instead of addition.
        multipliers: of a vertex in each dimension: primes, or powers of the resolution.
    """

    scale: float
    resolution: int
    offset: int
    size: int
    hashed: bool
    multipliers: tuple[int, ...]


@dataclass(frozen=True)
class HashGrid:
    """Configuration of a hash grid, or of a mixture of them with one table.

    Args:
        resolutions: vertices a side of the coarsest and the finest level, (N_min, N_max); of a mixture, one such pair
            for each expert.
        dims: of a point, 2 to 4.
        levels: of every expert.
        features: of a level, 1, 2, 4 or 8.
        log2_table_size: most rows of a level of one expert, as a power of two: 3 to 31.
        interpolation: "linear", "smoothstep" or "nearest".
        convention: "tiny-cuda-nn" or "nerfstudio" (linear only).

    Raises:
        ValueError: no grid is like that.
    """

    resolutions: Any = (16, 2048)
    dims: int = 3
    levels: int = 16
    features: int = 2
    log2_table_size: int = 19
    interpolation: str = "linear"
    convention: str = "tiny-cuda-nn"
    rows: tuple[Level, ...] = field(init=False, repr=False, compare=False)  # level l of expert e is e * levels + l

    def __post_init__(self) -> None:
        object.__setattr__(self, "resolutions", _pairs(self.resolutions))
        self._check()
        object.__setattr__(self, "rows", tuple(self._rows()))

    @classmethod
    def growing(cls, coarsest: float, growth: float, *, levels: int = 16, **options: Any) -> "HashGrid":
        """A grid given by `growth`, from one level's resolution to the next's (tiny-cuda-nn's per_level_scale)."""
        return cls((coarsest, coarsest * growth ** (levels - 1)), levels=levels, **options)

    @property
    def experts(self) -> int:
        return len(self.resolutions)

    @property
    def width(self) -> int:
        """Features of a point."""
        return self.levels * self.features

    @property
    def entries(self) -> int:
        """Rows of the table."""
        return self.rows[-1].offset + self.rows[-1].size

    @property
    def expert_base(self) -> tuple[int, ...]:
        """E + 1 numbers: the rows of expert e begin at the e-th and end before the next."""
        return (*(self.rows[e * self.levels].offset for e in range(self.experts)), self.entries)

    @property
    def staggered(self) -> bool:
        """Whether half a cell is added to a position, and levels may be dense."""
        return self.convention == "tiny-cuda-nn"

    def rows_of(self, expert: int) -> tuple[Level, ...]:
        return self.rows[expert * self.levels : (expert + 1) * self.levels]

    def initialize(
        self, generator: torch.Generator | None = None, *, dtype: torch.dtype = torch.float32, device: Any = None
    ) -> Tensor:
        """A table (entries, F) as a training begins: uniform, within 1e-4 of zero (nerfstudio: 1e-3)."""
        table = torch.empty((self.entries, self.features), dtype=dtype, device=device)
        advise_huge_pages(table)
        bound = 1e-4 if self.staggered else 1e-3
        return table.uniform_(-bound, bound, generator=generator)

    def as_arguments(self) -> tuple[Any, ...]:
        """What `grid_of` takes: for an operator, which takes no dataclass."""
        flat = [float(resolution) for pair in self.resolutions for resolution in pair]
        return flat, self.dims, self.levels, self.features, self.log2_table_size, self.interpolation, self.convention

    def _check(self) -> None:
        for name, choices in (
            ("dims", DIMS),
            ("features", FEATURES),
            ("interpolation", INTERPOLATIONS),
            ("convention", CONVENTIONS),
        ):
            if (chosen := getattr(self, name)) not in choices:
                raise ValueError(f"{name} is {chosen!r}; valid are {', '.join(map(repr, choices))}")
        if self.levels < 1:
            raise ValueError(f"levels is {self.levels}; it must be 1 at least")
        if not 3 <= self.log2_table_size <= 31:
            raise ValueError(f"log2_table_size is {self.log2_table_size}; it must be 3 to 31")
        for coarsest, finest in self.resolutions:
            if not 1 <= coarsest <= finest < 2**31:
                raise ValueError(
                    f"resolutions holds ({coarsest}, {finest}); it must be (coarsest, finest), 1 <= coarsest <= finest "
                    "< 2^31"
                )
        if self.convention == "nerfstudio" and self.interpolation != "linear":
            raise ValueError(f"interpolation is {self.interpolation!r}; the nerfstudio convention has 'linear' only")

    def _rows(self):
        most, offset = 1 << self.log2_table_size, 0
        for coarsest, finest in self.resolutions:
            growth = math.exp(math.log(finest / coarsest) / (self.levels - 1)) if self.levels > 1 else 1.0
            for level in range(self.levels):
                if self.staggered:
                    scale = _float32(_float32(_power(growth, level) * _float32(coarsest)) - 1)
                    resolution = math.ceil(scale) + 1
                    vertices = resolution**self.dims
                    size = min((vertices + 7) // 8 * 8, most)
                    hashed = size < vertices
                else:
                    scale = float(math.floor(_float32(coarsest * _float32(_float32(growth) ** level))))
                    resolution, size, hashed = int(scale) + 1, most, True
                factors = PRIMES if hashed else [resolution**d for d in range(self.dims)]
                yield Level(scale, resolution, offset, size, hashed, tuple(m % WORD for m in factors[: self.dims]))
                offset += size


@cache
def grid_of(
    resolutions: tuple[float, ...],
    dims: int,
    levels: int,
    features: int,
    log2_table_size: int,
    interpolation: str,
    convention: str,
) -> HashGrid:
    """The grid whose `as_arguments` these are, made once."""
    pairs = tuple(zip(resolutions[::2], resolutions[1::2], strict=True))
    return HashGrid(pairs, dims, levels, features, log2_table_size, interpolation, convention)


def _pairs(resolutions: Any) -> tuple[tuple[float, float], ...]:
    pairs = tuple(resolutions)
    if pairs and not isinstance(pairs[0], Sequence):
        pairs = (pairs,)
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"resolutions is {resolutions!r}; it must be (coarsest, finest) or one such pair an expert")
    return tuple((coarsest, finest) for coarsest, finest in pairs)


def _float32(x: float) -> float:
    return ctypes.c_float(x).value


def _power(growth: float, level: int) -> float:
    """exp2f(level * log2f(growth)), rounded after each operation."""
    return _float32(2.0 ** _float32(level * _float32(math.log2(_float32(growth)))))
