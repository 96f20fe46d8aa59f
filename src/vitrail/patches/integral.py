"""Integral images of indicator rows: what any box of patches holds, in four numbers.

Built once for a block of queries and asked several times: for the best box of given shapes, for the area that holds a
share, for the centre of what a box holds. Keys come first and queries last in memory, so that every step is a sum or
difference of long contiguous rows.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.grid import Grid
from vitrail.tap.budget import budget_of

__all__ = ["BLOCK_NUMBERS", "ROUNDING", "Integral", "blocks", "shapes_of_area"]

BLOCK_NUMBERS = 2**20
"""About how many indicator values one block takes in on a processor: many rows for each step, in memory that stays in
bounds."""

ROUNDING = 1e-5
"""What a box may lack of the share that is asked for: sums over corners of float32 images are rounded."""


def blocks(rows: Float[Tensor, "query key"]) -> Iterator[slice]:
    """Splits rows into blocks of about `BLOCK_NUMBERS` values, which is what one `Integral` should take in.

    Args:
        rows: One row of numbers for each query.

    Yields:
        Slices of the rows, in order, that cover all of them.
    """
    n_numbers = budget_of(rows.device).bytes_for(BLOCK_NUMBERS * rows.element_size()) // rows.element_size()
    step = max(1, n_numbers // rows.shape[-1])
    for start in range(0, len(rows), step):
        yield slice(start, min(start + step, len(rows)))


@lru_cache(maxsize=256)
def shapes_of_area(grid: Grid, n_patches: int) -> tuple[tuple[int, int], ...]:
    """Shapes of the boxes that use an area to the full.

    Args:
        grid: (rows, columns) of patches.
        n_patches: The largest area, in patches.

    Returns:
        (rows, columns) of every box of at most `n_patches` that cannot grow within that and within the grid, flattest
        first.
    """
    rows, columns = grid
    widest = {height: min(columns, n_patches // height) for height in range(1, min(rows, n_patches) + 1)}
    return tuple((height, width) for height, width in widest.items() if width > widest.get(height + 1, 0) and width > 0)


@lru_cache(maxsize=8)
def _areas(grid: Grid) -> tuple[int, ...]:
    """The areas that boxes can have, growing."""
    return tuple(sorted({rows * columns for rows in range(1, grid[0] + 1) for columns in range(1, grid[1] + 1)}))


class Integral:
    """Sums over boxes of a block of rows [query key], the keys being the patches of `grid`, row by row.

    Boxes are (top, left, bottom, right), half open.

    Args:
        rows: The numbers to sum, zero or more; about `BLOCK_NUMBERS` of them (`blocks`).
        grid: (rows, columns) of patches.
    """

    def __init__(self, rows: Float[Tensor, "query key"], grid: Grid) -> None:
        self._grid = grid
        rows = rows.detach()  # where a box lies has no gradient, and sums are written into memory of their own
        self._total = rows.sum(-1)
        self._corner = _corners(rows, grid)  # [row column query], sums of all keys above and left of each corner
        # Memory for the sums of one shape: fresh pages for every shape would cost as much as the sums.
        self._scratch = self._corner.new_empty((2, self._corner.numel()))

    def best_box(self, shapes: Sequence[tuple[int, int]]) -> tuple[Int[Tensor, "query side"], Float[Tensor, "query"]]:
        """The box of each row that holds most, among boxes of the given shapes at every position.

        Only what the boxes of each shape and top hold at most is stored; the left edge is looked up for the winners.

        Args:
            shapes: (rows, columns) of boxes, all of which fit the grid.

        Returns:
            The boxes, and the most that any holds; a row whose sum is 0 has an empty box. Ties, which are sums that
            differ by no more than their rounding, go to the first shape, then to the topmost, then to the leftmost box.
        """
        most = torch.cat([self._sums(shape).amax(1) for shape in shapes])
        held = most.amax(0)
        # A corner sums up rows and columns one by one: equal boxes differ by about half as many roundings at most.
        enough = held - max(self._grid) * torch.finfo(held.dtype).eps * self._total
        starts = [(height, width, top) for height, width in shapes for top in range(self._grid[0] - height + 1)]
        height, width, top = torch.tensor(starts, device=most.device)[_first_of(most, enough)].unbind(-1)
        left = self._leftmost(top, height, width, enough)
        boxes = torch.stack([top, left, top + height, left + width], -1)
        return boxes * (self._total > 0)[:, None], held

    def smallest_areas(self, share: float) -> Float[Tensor, "query"]:
        """Area of the smallest box, of any shape at any position, that holds a share of each row.

        Exact: the larger a box may be, the more it holds, so the smallest area that is enough is found by bisection
        over the areas that boxes can have. Queries whose searches go the same way are searched together.

        Args:
            share: Of each row's sum, above 0 and at most 1.

        Returns:
            Whole numbers of patches, 1 to all; NaN for rows whose sum is 0.
        """
        areas = _areas(self._grid)
        target = share * self._total - ROUNDING
        if budget_of(target.device).joins_images:
            return self._smallest_of_all_areas(areas, target)
        result = torch.full_like(target, torch.nan)
        some = self._total.nonzero()[:, 0]
        ranges = [(0, len(areas) - 1, some, self._select_queries(self._corner, some))]
        while ranges:  # of `areas`, first and last candidate; queries; their integral images
            low, high, queries, corner = ranges.pop()
            if low == high:
                result[queries] = areas[low]
                continue
            middle = (low + high) // 2
            enough = self._most_within(corner, areas[low], areas[middle]) >= target[queries]
            for first, last, part in ((low, middle, enough), (middle + 1, high, ~enough)):
                members = part.nonzero()[:, 0]
                if len(members):
                    ranges.append((first, last, queries[members], self._select_queries(corner, members)))
        return result

    def _smallest_of_all_areas(self, areas: Sequence[int], target: Float[Tensor, "query"]) -> Float[Tensor, "query"]:
        """The same from every area in turn: more sums, and none waits for what another one says."""
        n_missed = torch.zeros_like(target, dtype=torch.int64)
        most, previous = torch.full_like(target, -torch.inf), 1
        for area in areas[:-1]:
            most = torch.maximum(most, self._most_within(self._corner, previous, area))
            n_missed += most < target
            previous = area + 1
        result = torch.tensor(areas, dtype=target.dtype, device=target.device)[n_missed]
        return torch.where(self._total != 0, result, torch.nan)

    def _most_within(self, corner: Float[Tensor, "row column some"], least: int, most: int) -> Float[Tensor, "some"]:
        """What a box of `least` to `most` patches holds at most, for each query."""
        shapes = [shape for shape in shapes_of_area(self._grid, most) if shape[0] * shape[1] >= least]
        sums = [self._sums(shape, corner).flatten(0, 1).amax(0) for shape in shapes]
        return torch.stack(sums).amax(0)

    def _select_queries(
        self, corner: Float[Tensor, "row column query"], queries: Int[Tensor, "some"]
    ) -> Float[Tensor, "row column some"]:
        return corner if len(queries) == corner.shape[-1] else corner.index_select(-1, queries)

    def centre(self, boxes: Int[Tensor, "query side"]) -> Float[Tensor, "query xy"]:
        """Centre of what each row's box holds, weighted by the row.

        Args:
            boxes: One box for each row.

        Returns:
            (x to the right, y down) in patches, counted from the first; NaN where the box holds nothing.
        """
        top, left, bottom, right = boxes.unbind(-1)
        centres = []
        for axis, (first, last), (low, high) in ((0, (top, bottom), (left, right)), (1, (left, right), (top, bottom))):
            upto = self._between(axis, first, last)  # what lies before each edge along the other axis
            edge = torch.arange(len(upto), device=upto.device)[:, None]
            inside = (edge[:-1] >= low) & (edge[:-1] < high)
            inside_mass = upto.diff(dim=0) * inside
            mass = inside_mass.sum(0)
            centres.append((inside_mass * edge[:-1]).sum(0) / torch.where(mass > 0, mass, torch.nan))
        return torch.stack(centres, -1)

    def _sums(
        self, shape: tuple[int, int], corner: Float[Tensor, "row column query"] | None = None
    ) -> Float[Tensor, "top left query"]:
        """What a box of one shape holds at every place; overwritten by the next call."""
        height, width = shape
        corner = self._corner if corner is None else corner
        strips = torch.sub(corner[height:], corner[:-height], out=self._view(0, corner, height, 0))
        return torch.sub(strips[:, width:], strips[:, :-width], out=self._view(1, corner, height, width))

    def _view(
        self, half: int, corner: Float[Tensor, "row column query"], height: int, width: int
    ) -> Float[Tensor, "top left query"]:
        rows, columns, queries = corner.shape
        size = (rows - height, columns - width, queries)
        return self._scratch[half, : size[0] * size[1] * queries].view(size)

    def _leftmost(
        self,
        top: Int[Tensor, "query"],
        height: Int[Tensor, "query"],
        width: Int[Tensor, "query"],
        enough: Float[Tensor, "query"],
    ) -> Int[Tensor, "query"]:
        """The first left edge at which a box of the given rows and width holds enough, for each query its own box."""
        strip = self._between(0, top, top + height)
        n_columns = len(strip) - 1
        right = torch.arange(n_columns, device=strip.device)[:, None] + width
        sums = strip.gather(0, right.clamp(max=n_columns)) - strip[:-1]
        return _first_of(sums.masked_fill(right > n_columns, -torch.inf), enough)

    def _between(
        self, axis: int, first: Int[Tensor, "query"], last: Int[Tensor, "query"]
    ) -> Float[Tensor, "edge query"]:
        """Along the other axis, what lies before each edge within lines first .. last - 1, each query its own lines."""
        size = (1, self._corner.shape[1], -1) if axis == 0 else (self._corner.shape[0], 1, -1)
        strip = self._corner.gather(axis, last.expand(size)) - self._corner.gather(axis, first.expand(size))
        return strip.squeeze(axis)


def _first_of(numbers: Float[Tensor, "place query"], enough: Float[Tensor, "query"]) -> Int[Tensor, "query"]:
    """The first place whose number is enough, vectorised over the queries: the largest of a countdown; 0 for NaN."""
    countdown = torch.arange(len(numbers), 0, -1, device=numbers.device, dtype=numbers.dtype)[:, None]
    is_enough = torch.ge(numbers, enough, out=torch.empty_like(numbers))
    return (len(numbers) - (is_enough * countdown).amax(0).long()) % len(numbers)


def _corners(rows: Float[Tensor, "query key"], grid: Grid) -> Float[Tensor, "row column query"]:
    corner = rows.new_zeros((grid[0] + 1, grid[1] + 1, len(rows)))
    corner[1:, 1:] = rows.T.view(*grid, -1)
    for row in range(2, grid[0] + 1):
        corner[row] += corner[row - 1]
    for column in range(2, grid[1] + 1):
        corner[:, column] += corner[:, column - 1]
    return corner
