"""Where the tokens of zoomed regions go in a prompt, and which rotary positions they and all after them get.

[text, start mark, image, end mark] [start mark, region, end mark] ... [question]

With "continuous" alignment (Q-Zoom, arXiv 2604.06912, `reuse_src_pos` in its code) a region lies on the rows and
columns of the source image that it was cut from, one step later in time; with "separate" it is an ordinary further
image, as transformers' `get_rope_index` numbers it. Both shift what follows by the same number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.argument_checks import check_choice, check_size, check_whole

ALIGNMENTS = ("continuous", "separate")
IGNORED_LABEL = -100


@dataclass(frozen=True)
class SplicePlan:
    """For each of the S' tokens of the new prompt where it comes from.

    Attributes:
        source: `[S']`, index of the token in the old prompt; -1 for tokens of regions.
        region: `[S']`, index among the tokens of all regions, one region after another; -1 for the others.
        inserted: `[S']` bool: tokens of regions, and the repeated marks around them.
        reusable: so many tokens at the beginning are the same, with the same positions, as in the old prompt.
    """

    source: Tensor
    region: Tensor
    inserted: Tensor
    reusable: int

    def splice(self, prompt: Tensor, regions: Tensor) -> Tensor:
        """`[S', ...]` of the old prompt's `[S, ...]` and the regions' `[N, ...]`: embeddings, ids, masks."""
        joined = torch.cat([prompt, regions.to(prompt)])
        origin = torch.where(self.region < 0, self.source, self.region + prompt.shape[0])
        return joined[origin.to(joined.device)]

    def splice_labels(self, labels: Tensor, ignored: int = IGNORED_LABEL) -> Tensor:
        """Labels `[S']` of the old prompt's `[S]`; what was inserted is `ignored`."""
        kept = labels[self.source.clamp(min=0).to(labels.device)]
        return kept.masked_fill(self.inserted.to(labels.device), ignored)


def splice_plan(
    length: int, image_start: int, image_tokens: int, region_tokens: Sequence[int], *, marked: bool = True
) -> SplicePlan:
    """The plan to put regions of `region_tokens` tokens each, in this order, after the image of a prompt of `length`.

    Args:
        image_start: index of the image's first token.
        image_tokens: how many it has, in one run.
        marked: the tokens before and after the image (vision start and end) are repeated around every region, which
            then follows the image's own end mark. Otherwise regions follow the image's last token.

    Raises:
        ValueError: the image and its marks are not within the prompt, or a region has no token.
    """
    stop = _check_image(length, image_start, image_tokens, marked)
    for count in region_tokens:
        check_whole("region_tokens", count, 1)
    after = stop + marked
    source, region, first = [torch.arange(after)], [torch.full((after,), -1)], 0
    for count in region_tokens:
        inside = torch.arange(first, first + count)
        absent, mark = torch.full((count,), -1), torch.full((int(marked),), -1)
        source += [mark + image_start, absent, mark + stop + 1]  # the marks at image_start - 1 and at stop
        region += [mark, inside, mark]
        first += count
    inserted = sum(part.numel() for part in source[1:])
    source.append(torch.arange(after, length))
    region.append(torch.full((length - after,), -1))
    is_inserted = torch.zeros(length + inserted, dtype=torch.bool)
    is_inserted[after : after + inserted] = True
    return SplicePlan(torch.cat(source), torch.cat(region), is_inserted, after)


def region_positions(
    image_positions: Tensor, grid: tuple[int, int], box: Sequence[int], region_grid: tuple[int, int], time: float
) -> Tensor:
    """Positions `[3, N]` (time, row, column) in float32 of a region's N tokens, row by row, on the ruler of its image.

    The first and last rows (columns) of the region get the positions of the box's first and last rows (columns) of
    cells, those between are spread evenly, so they need not be whole. A region of one row is at the box's first.

    Args:
        image_positions: `[3, rows * columns]` of the source image of `grid` (rows, columns).
        box: left, top, right, bottom in cells of that grid; the latter two are exclusive.
        region_grid: rows and columns of the region's tokens.
        time: the position on the first axis.

    Raises:
        ValueError: the box is empty or not inside the grid, or shapes do not fit.
    """
    rows, columns = check_size("grid", grid)
    region_rows, region_columns = check_size("region_grid", region_grid)
    if tuple(image_positions.shape) != (3, rows * columns):
        raise ValueError(
            f"image_positions have the shape {tuple(image_positions.shape)}; of {rows} x {columns} cells they have "
            f"(3, {rows * columns})"
        )
    left, top, right, bottom = box
    if not (0 <= left < right <= columns and 0 <= top < bottom <= rows):
        raise ValueError(
            f"box is {tuple(box)}; it must have an area, inside {rows} rows and {columns} columns of cells"
        )
    cells = image_positions.float().unflatten(1, (rows, columns))
    device = cells.device
    row = torch.linspace(float(cells[1, top, left]), float(cells[1, bottom - 1, left]), region_rows, device=device)
    column = torch.linspace(float(cells[2, top, left]), float(cells[2, top, right - 1]), region_columns, device=device)
    row, column = torch.meshgrid(row, column, indexing="ij")
    return torch.stack([torch.full_like(row, time), row, column]).flatten(1)


def fused_positions(
    positions: Tensor,
    image_start: int,
    grid: tuple[int, int],
    region_grids: Sequence[tuple[int, int]],
    boxes: Sequence[Sequence[int]],
    alignment: str = "continuous",
    *,
    marked: bool = True,
) -> Tensor:
    """Positions `[A, S']` of a prompt with regions put in after its image, as `splice_plan` orders them.

    Several regions follow one another in time: each begins after the end of the one before it.

    Args:
        positions: `[A, S]` of the old prompt without padding: A is 3 (time, row, column) or 1.
        image_start: index of the image's first token.
        grid: rows and columns of the image's tokens.
        region_grids: rows and columns of each region's tokens.
        boxes: of each region in cells of `grid`: left, top, right, bottom, the latter two exclusive.
        alignment: "continuous" (of 3 axes only; float32) or "separate" (of the type of `positions`).
        marked: see `splice_plan`.

    Raises:
        ValueError: an argument is not as above, or there are not as many boxes as grids.
    """
    check_choice("alignment", alignment, ALIGNMENTS)
    rows, columns = check_size("grid", grid)
    if positions.dim() != 2 or positions.shape[0] not in (1, 3):
        raise ValueError(f"positions have the shape {tuple(positions.shape)}; it must be [3, S] or [1, S]")
    axes, length = positions.shape
    if alignment == "continuous" and axes != 3:
        raise ValueError(
            "alignment is 'continuous' and positions have 1 axis; without rows and columns it is 'separate'"
        )
    if len(boxes) != len(region_grids):
        raise ValueError(f"boxes are {len(boxes)} and region_grids {len(region_grids)}; each region has one of both")
    stop = _check_image(length, image_start, rows * columns, marked)
    after = stop + marked
    image = positions[:, image_start:stop]
    dtype = torch.float32 if alignment == "continuous" else positions.dtype
    parts, start = [positions[:, :after].to(dtype)], positions[:, :after].max() + 1
    for region_grid, box in zip(region_grids, boxes, strict=True):
        region_rows, region_columns = check_size("region_grids", region_grid)
        extent = max(region_rows, region_columns) if axes == 3 else region_rows * region_columns
        first = start + int(marked)
        if alignment == "continuous":
            region = region_positions(image, grid, box, region_grid, float(first))
        elif axes == 3:
            row, column = torch.meshgrid(torch.arange(region_rows), torch.arange(region_columns), indexing="ij")
            region = torch.stack([torch.zeros_like(row), row, column]).flatten(1).to(positions) + first
        else:
            region = torch.arange(region_rows * region_columns).to(positions)[None] + first
        mark = positions.new_zeros(axes, int(marked))
        parts += [part.to(dtype) for part in (mark + start, region, mark + first + extent)]
        start = first + extent + int(marked)
    shift = start - (positions[:, :after].max() + 1)
    parts.append((positions[:, after:] + shift).to(dtype))
    return torch.cat(parts, dim=1)


def _check_image(length: int, image_start: int, image_tokens: int, marked: bool) -> int:
    """The index after the image's last token."""
    check_whole("image_start", image_start, int(marked))
    check_whole("image_tokens", image_tokens, 1)
    stop = image_start + image_tokens
    if stop + marked > length:
        marks = " and the mark after it" if marked else ""
        raise ValueError(
            f"image_start is {image_start} and the image has {image_tokens} tokens; with {length} tokens in the prompt "
            f"it{marks} must end before"
        )
    return stop
