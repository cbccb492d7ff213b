"""What `vision.model_insight.look_inside` found as one picture: image, receptive field, decays and gates."""

import math
from textwrap import wrap
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vision.model_insight import Insight, area_holding

Extent = tuple[float, float, float, float]  # left, right, bottom, top, as matplotlib's imshow takes it

_WIDTH = 13.0  # inches
_COLOUR_BAR = 0.8  # inches of width, labels included
_TITLES = 0.7  # inches of height of a group of panels
_TITLE_LETTERS = 110  # in a line
_ACROSS = 9  # heads in a row of panels
_FAINTEST = 1e-4  # of the receptive field that is shown, relative to its largest value
_SMALLEST_SPAN = 1e-3  # of the colours of gates: what differs by less, as at random weights, looks the same
_OUT_OF_REACH = "#c8c8c8"
_MARK = "#ff2d2d"


class _Maps(NamedTuple):
    """Maps over the tokens, one a head or a single one, that share a name, a norm and a colour map."""

    values: Tensor | np.ma.MaskedArray
    name: str
    norm: Normalize
    colours: Colormap

    @property
    def rows(self) -> int:
        return math.ceil(len(self.values) / _ACROSS)

    @property
    def columns(self) -> int:
        return math.ceil(len(self.values) / self.rows)


def draw_insight(insight: Insight, picture: np.ndarray, title: str, extent: Extent | None = None) -> Figure:
    """The picture that `python -m vision explain` saves.

    Args:
        insight: of one block.
        picture: what the model saw, (height, width, 3) or (height, width) in 0 .. 1.
        title: of the figure.
        extent: of the picture in the coordinates that its axes show; its own pixels if None.
    """
    height, width = picture.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5) if extent is None else extent
    groups = _groups(insight)
    single, by_head = ([maps for maps in groups if (len(maps.values) > 1) == many] for many in (False, True))
    rows = _side_by_side(by_head)

    top_panels = 2 + len(single)
    heights = [2 * _TITLES + _side(top_panels, top_panels, 4.0) * height / width]
    for row in rows:
        side = _side(sum(maps.columns for maps in row), len(row), 2.5)
        heights.append(_TITLES + row[0].rows * (side * height / width + 0.25))
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]

    parts[0].suptitle("\n".join(part for line in title.splitlines() for part in wrap(line, _TITLE_LETTERS)))
    panels = parts[0].subplots(1, top_panels)
    _draw_picture(panels[0], picture, extent)
    _draw_receptive_field(panels[1], insight.receptive_field, extent)
    for axes, maps in zip(panels[2:], single, strict=True):
        _draw_map(axes, maps, 0, extent)
        axes.set_title(maps.name, fontsize="medium")
        _colour_bar(axes, maps.norm, maps.colours)
    for axes in panels:
        _mark_token(axes, insight, extent)

    for part, row in zip(parts[1:], rows, strict=True):
        places = part.subfigures(1, len(row), width_ratios=[maps.columns for maps in row], squeeze=False)[0]
        lines = max(maps.name.count("\n") for maps in row)
        for place, maps in zip(places, row, strict=True):
            place.suptitle(maps.name + "\n" * (lines - maps.name.count("\n")), fontsize="medium")
            _draw_heads(place, maps, insight, extent)
    return figure


def describe_receptive_field(field: Tensor) -> str:
    half, most = (100 * area_holding(field, share) for share in (0.5, 0.95))
    return f"50 % of it in {half:.1f} %, 95 % in {most:.1f} % of the image"


def _groups(insight: Insight) -> list[_Maps]:
    decay = np.ma.masked_equal(insight.decay.numpy(), 0)
    name = insight.decay_name + ("\n(grey: out of reach)" if decay.mask.any() else "")
    groups = [_Maps(decay, name, Normalize(0, 1), matplotlib.colormaps["viridis"].with_extremes(bad=_OUT_OF_REACH))]
    for gate in insight.gates:
        low, high = float(gate.values.min()), float(gate.values.max())
        if gate.signed:
            low = -max(abs(low), abs(high))
            high = -low
        margin = max(0.0, (_SMALLEST_SPAN - (high - low)) / 2)
        colours = matplotlib.colormaps["RdBu_r" if gate.signed else "cividis"]
        groups.append(_Maps(gate.values, gate.name, Normalize(low - margin, high + margin), colours))
    return groups


def _side_by_side(groups: list[_Maps]) -> list[list[_Maps]]:
    """Groups that fit into one row of `_ACROSS` panels share it."""
    rows: list[list[_Maps]] = []
    for maps in groups:
        if rows and sum(other.columns for other in rows[-1]) + maps.columns <= _ACROSS:
            rows[-1].append(maps)
        else:
            rows.append([maps])
    return rows


def _side(panels: int, colour_bars: int, largest: float) -> float:
    """Inches of width of one of several panels in a row."""
    return min(largest, (_WIDTH - colour_bars * _COLOUR_BAR) / panels)


def _draw_picture(axes: Axes, picture: np.ndarray, extent: Extent) -> None:
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=extent)
    axes.set_title("image, and the chosen patch", fontsize="medium")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set(xlabel="column", ylabel="row")


def _draw_receptive_field(axes: Axes, field: Tensor, extent: Extent) -> None:
    relative = (field / field.max().clamp(min=1e-30)).clamp(min=_FAINTEST)
    norm, colours = LogNorm(_FAINTEST, 1), matplotlib.colormaps["magma"]
    axes.imshow(relative, norm=norm, cmap=colours, extent=extent)
    title = f"receptive field, relative to its maximum\n({describe_receptive_field(field)})"
    axes.set_title(title, fontsize="medium")
    axes.set(xticks=[], yticks=[])
    _colour_bar(axes, norm, colours)


def _draw_map(axes: Axes, maps: _Maps, index: int, extent: Extent) -> None:
    axes.imshow(maps.values[index], norm=maps.norm, cmap=maps.colours, extent=extent)
    axes.set(xticks=[], yticks=[])


def _draw_heads(part: SubFigure, maps: _Maps, insight: Insight, extent: Extent) -> None:
    panels = part.subplots(maps.rows, maps.columns, squeeze=False).flatten()
    for axes in panels[len(maps.values) :]:
        axes.axis("off")
    for head, axes in enumerate(panels[: len(maps.values)]):
        _draw_map(axes, maps, head, extent)
        axes.set_title(f"head {head}", fontsize="small")
        _mark_token(axes, insight, extent)
    _colour_bar(panels[maps.columns - 1], maps.norm, maps.colours)


def _colour_bar(axes: Axes, norm: Normalize, colours: Colormap) -> None:
    """A colour bar at the right of a panel, as high as it."""
    place = axes.inset_axes((1.04, 0, 0.05, 1))
    axes.figure.colorbar(ScalarMappable(norm, colours), cax=place)
    place.tick_params(labelsize="small")


def _mark_token(axes: Axes, insight: Insight, extent: Extent) -> None:
    left, right, bottom, top = extent
    rows, columns = insight.size
    width, height = (right - left) / columns, (bottom - top) / rows
    corner = (left + insight.token[1] * width, top + insight.token[0] * height)
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=_MARK, linewidth=1.2))
