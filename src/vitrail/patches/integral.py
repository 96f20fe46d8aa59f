"""Integral images of indicator rows: what any box of patches holds, in four numbers.

Made once for a block of queries and asked several times: for the best box of given shapes, for the area that holds a
share, for the centre of what a box holds. Keys come first and queries last in memory, so that every step is a sum or
difference of long contiguous rows.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["BLOCK_NUMBERS", "Integral", "blocks"]

BLOCK_NUMBERS = 2**20
"""About how many indicator values one block takes in: many rows for each step, and memory that stays in bounds."""


def blocks(rows: Float[Tensor, "query key"]) -> Iterator[slice]:
    """Slices of rows, about `BLOCK_NUMBERS` values each."""
    step = max(1, BLOCK_NUMBERS // rows.shape[-1])
    for start in range(0, len(rows), step):
        yield slice(start, min(start + step, len(rows)))


class Integral:
    """Sums over boxes of a block of rows [query key], the keys being the patches of `grid` (rows, columns), row-major.

    Keep blocks near `BLOCK_NUMBERS` values (`blocks`). Boxes are (top, left, bottom, right), half open.
    """

    def __init__(self, rows: Float[Tensor, "query key"], grid: tuple[int, int]) -> None:
        self._grid = grid
        self._total = rows.sum(-1)
        self._corner = _corners(rows, grid)  # [row column query], sums of all keys above and left of each corner
        # Memory for the sums of one shape: fresh pages for every shape would cost as much as the sums.
        self._scratch = self._corner.new_empty((2, self._corner.numel()))

    def best_box(self, shapes: Sequence[tuple[int, int]]) -> tuple[Int[Tensor, "query side"], Float[Tensor, "query"]]:
        """For each row the box of one of the `shapes` (rows, columns) that holds most, and what it holds.

        Ties go to the first shape, then topmost, leftmost. Only what the boxes of each shape and top hold at most is
        kept; the left edge is looked up for the winners.
        """
        most = torch.cat([self._sums(shape).amax(1) for shape in shapes])
        starts = [(height, width, top) for height, width in shapes for top in range(self._grid[0] - height + 1)]
        height, width, top = torch.tensor(starts, device=most.device)[_first_largest(most)].unbind(-1)
        left = self._leftmost_best(top, height, width)
        return torch.stack([top, left, top + height, left + width], -1), most.amax(0)

    def area_holding(self, share: float, ladder: Sequence[tuple[int, int]]) -> Float[Tensor, "query"]:
        """About how many patches a box must have to hold `share` of its row.

        The shapes of the `ladder` (growing) are tried at all places, and areas are interpolated between the last that
        holds too little and the first that holds enough. Rows without mass give the smallest area.
        """
        wanted = share * self._total - 1e-5
        result = torch.zeros_like(wanted)
        held_before, area_before = torch.zeros_like(wanted), 0
        for shape in (*ladder, self._grid):
            held = self._total if shape == self._grid else self._sums(shape).amax((0, 1))
            area = shape[0] * shape[1]
            part = ((wanted - held_before) / (held - held_before).clamp_min(1e-9)).clamp(0, 1)
            crossed = (held_before < wanted) | (area_before == 0)
            result = torch.where(crossed, area_before + part * (area - area_before), result)
            if bool((held >= wanted).all()):
                break
            held_before, area_before = torch.maximum(held, held_before), area
        return result.clamp_min(1)

    def centre(self, boxes: Int[Tensor, "query side"]) -> Float[Tensor, "query xy"]:
        """Centre (x right, y down, in patches) of what each row's box holds; NaN where it holds nothing."""
        top, left, bottom, right = boxes.unbind(-1)
        found = []
        for axis, (first, last), (low, high) in ((0, (top, bottom), (left, right)), (1, (left, right), (top, bottom))):
            upto = self._between(axis, first, last)  # what lies before each edge along the other axis
            edge = torch.arange(len(upto), device=upto.device)[:, None]
            inside = (edge[:-1] >= low) & (edge[:-1] < high)
            held = upto.diff(dim=0) * inside
            mass = held.sum(0)
            found.append((held * edge[:-1]).sum(0) / torch.where(mass > 0, mass, torch.nan))
        return torch.stack(found, -1)

    def _sums(self, shape: tuple[int, int]) -> Float[Tensor, "top left query"]:
        """What a box of one shape holds at every place; overwritten by the next call."""
        height, width = shape
        strips = torch.sub(self._corner[height:], self._corner[:-height], out=self._view(0, height, 0))
        return torch.sub(strips[:, width:], strips[:, :-width], out=self._view(1, height, width))

    def _view(self, half: int, height: int, width: int) -> Float[Tensor, "row column query"]:
        rows, columns, queries = self._corner.shape
        size = (rows - height, columns - width, queries)
        return self._scratch[half, : size[0] * size[1] * queries].view(size)

    def _leftmost_best(
        self, top: Int[Tensor, "query"], height: Int[Tensor, "query"], width: Int[Tensor, "query"]
    ) -> Int[Tensor, "query"]:
        """The left edge at which a box of the given rows and width holds most, for each query its own box."""
        strip = self._between(0, top, top + height)
        n_columns = len(strip) - 1
        right = torch.arange(n_columns, device=strip.device)[:, None] + width
        sums = strip.gather(0, right.clamp(max=n_columns)) - strip[:-1]
        return _first_largest(sums.masked_fill(right > n_columns, -torch.inf))

    def _between(
        self, axis: int, first: Int[Tensor, "query"], last: Int[Tensor, "query"]
    ) -> Float[Tensor, "edge query"]:
        """Along the other axis, what lies before each edge within lines first .. last - 1, each query its own lines."""
        size = (1, self._corner.shape[1], -1) if axis == 0 else (self._corner.shape[0], 1, -1)
        strip = self._corner.gather(axis, last.expand(size)) - self._corner.gather(axis, first.expand(size))
        return strip.squeeze(axis)


def _first_largest(numbers: Float[Tensor, "place query"]) -> Int[Tensor, "query"]:
    """`argmax(0)`, vectorised over the queries: the largest of a countdown where the maximum is."""
    countdown = torch.arange(len(numbers), 0, -1, device=numbers.device, dtype=numbers.dtype)[:, None]
    largest = torch.eq(numbers, numbers.amax(0), out=torch.empty_like(numbers))
    return len(numbers) - (largest * countdown).amax(0).long()


def _corners(rows: Float[Tensor, "query key"], grid: tuple[int, int]) -> Float[Tensor, "row column query"]:
    corner = rows.new_zeros((grid[0] + 1, grid[1] + 1, len(rows)))
    corner[1:, 1:] = rows.T.view(*grid, -1)
    for row in range(2, grid[0] + 1):
        corner[row] += corner[row - 1]
    for column in range(2, grid[1] + 1):
        corner[:, column] += corner[:, column - 1]
    return corner
