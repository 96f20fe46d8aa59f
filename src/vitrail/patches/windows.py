"""Windows: for each query the box of patches that holds most of its interactions. Our construction, after Ma et al.

A box is (top, left, bottom, right) in rows and columns of the grid, half open: it holds rows top .. bottom - 1. It need
not hold its query; the query may always see itself (`masks`).

Boxes are searched through integral images (`integral.py`), for all queries at once.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.errors import UsageError
from vitrail.patches.integral import Integral, blocks

__all__ = [
    "Boxes",
    "areas",
    "attention_bias",
    "best_boxes",
    "boxes_and_sinks",
    "centred_boxes",
    "complements",
    "held_area",
    "in_box",
    "ladder",
    "masks",
    "n_patches_of",
    "random_boxes",
    "shapes_of_area",
    "shared_boxes",
    "sides",
    "smallest_boxes",
    "top_keys",
]

Boxes = Int[Tensor, "*batch patch side"]
"""(top, left, bottom, right) for each query patch; the last two are exclusive."""

Grid = tuple[int, int]
"""(rows, columns)"""


def n_patches_of(share: float, grid: Grid) -> int:
    """The number of patches that a share of the grid allows: rounded, at least 1."""
    if not 0 < share <= 1:
        raise UsageError(f"A window cannot have {share} of the grid; give a share above 0 and at most 1.")
    return max(1, round(share * grid[0] * grid[1]))


@lru_cache(maxsize=256)
def shapes_of_area(grid: Grid, n_patches: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of every box of at most `n_patches` that cannot grow within that and within the grid."""
    rows, columns = grid
    widest = {height: min(columns, n_patches // height) for height in range(1, min(rows, n_patches) + 1)}
    return tuple((height, width) for height, width in widest.items() if width > widest.get(height + 1, 0) and width > 0)


def best_boxes(
    indicator: Float[Tensor, "*batch patch other"], grid: Grid, n_patches: int
) -> tuple[Int[Tensor, "*batch patch side"], Float[Tensor, "*batch patch"]]:
    """For each query the box of at most `n_patches` patches that holds the most indicator, and what it holds.

    All boxes of `shapes_of_area` at all places are compared; ties go to the flattest shape, then topmost, leftmost.
    """
    return _searched(indicator, grid, shapes_of_area(grid, n_patches))


def smallest_boxes(
    indicator: Float[Tensor, "*batch patch other"], grid: Grid, share: float
) -> tuple[Int[Tensor, "*batch patch side"], Float[Tensor, "*batch patch"]]:
    """For each query the smallest box that holds at least `share` of its row, and what it holds.

    All boxes there are get compared, by area, then by mass: about a hundred times the work of `best_boxes`.
    """
    wanted = share * indicator.sum(-1) - 1e-5
    boxes, mass = _searched(indicator, grid, [(1, 1)])
    missing = mass < wanted
    for shapes in _shapes_by_area(grid)[1:]:
        if not missing.any():
            break
        found, held = _searched(indicator, grid, shapes)
        taken = missing & (held >= wanted)
        boxes = torch.where(taken[..., None], found, boxes)
        mass = torch.where(taken, held, mass)
        missing = missing & ~taken
    return boxes, mass


LADDER = (0.02, 0.06, 0.12, 0.2, 0.32, 0.5, 0.75)
"""Shares of the grid between which `held_area` interpolates."""


def held_area(
    indicator: Float[Tensor, "*batch patch other"], grid: Grid, share: float
) -> Float[Tensor, "*batch patch"]:
    """About how many patches a box about square must have to hold `share` of each row; cheap.

    The squarest box of each area of a ladder is tried at all places, and areas are interpolated between the last that
    holds too little and the first that holds enough. Rows without mass give the smallest area.
    """
    rows = indicator.flatten(0, -2)
    found = [Integral(rows[part], grid).area_holding(share, ladder(grid)) for part in blocks(rows)]
    return torch.cat(found).view(indicator.shape[:-1])


@lru_cache(maxsize=8)
def ladder(grid: Grid) -> tuple[tuple[int, int], ...]:
    """The squarest shape of each area of `LADDER`, growing, without the whole grid."""
    shapes = {
        min(shapes_of_area(grid, n_patches), key=lambda shape: abs(shape[0] - shape[1]))
        for n_patches in (n_patches_of(share, grid) for share in LADDER)
    }
    return tuple(sorted(shapes - {grid}, key=lambda shape: shape[0] * shape[1]))


@lru_cache(maxsize=8)
def _shapes_by_area(grid: Grid) -> tuple[tuple[tuple[int, int], ...], ...]:
    """All shapes, those of one area together, the smallest area first."""
    by_area: dict[int, list[tuple[int, int]]] = {}
    for height in range(1, grid[0] + 1):
        for width in range(1, grid[1] + 1):
            by_area.setdefault(height * width, []).append((height, width))
    return tuple(tuple(by_area[area]) for area in sorted(by_area))


def shared_boxes(
    indicator: Float[Tensor, "*batch patch other"], grid: Grid, n_patches: int, levels: Sequence[int]
) -> tuple[Int[Tensor, "*batch patch side"], Float[Tensor, "*batch patch"]]:
    """Boxes whose areas share one budget: the mean over the queries of a layer is at most `n_patches`.

    Each query takes one of the areas `levels` (patches) such that the mass held by all queries of the layer together is
    largest: what a further patch may cost is the same for all queries, and found by bisection.
    """
    found = [best_boxes(indicator, grid, level) for level in sorted(levels)]
    boxes = torch.stack([box for box, _ in found], -2)
    mass = torch.stack([held for _, held in found], -1)
    size = areas(boxes).to(mass)
    price = _price(mass, size, n_patches)
    chosen = (mass - price[..., None, None] * size).argmax(-1, keepdim=True)
    picked = boxes.gather(-2, chosen[..., None].expand(*chosen.shape, 4))[..., 0, :]
    return picked, mass.gather(-1, chosen)[..., 0]


def _price(
    mass: Float[Tensor, "*batch patch level"], size: Float[Tensor, "*batch patch level"], n_patches: int
) -> Float[Tensor, "*batch"]:
    """The lowest price of a patch at which the queries of a layer buy `n_patches` each on average, or fewer."""
    low, high = mass.new_zeros(mass.shape[:-2]), mass.new_ones(mass.shape[:-2])
    for _ in range(30):
        middle = (low + high) / 2
        bought = size.gather(-1, (mass - middle[..., None, None] * size).argmax(-1, keepdim=True))
        too_much = bought.mean((-1, -2)) > n_patches
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return high


def centred_boxes(boxes: Boxes, grid: Grid) -> Boxes:
    """Boxes of the same shapes centred on their queries, pushed inside the grid: a control that knows only nearness."""
    row, column = _places(grid, boxes.device)
    return _placed(boxes, grid, row - _heights(boxes) // 2, column - _widths(boxes) // 2)


def random_boxes(boxes: Boxes, grid: Grid, generator: torch.Generator) -> Boxes:
    """Boxes of the same shapes anywhere on the grid, all places alike: the control that knows nothing."""
    free = torch.stack([grid[0] - _heights(boxes), grid[1] - _widths(boxes)])
    place = torch.rand(free.shape, generator=generator).to(boxes.device) * (free + 1)
    top, left = place.long().clamp(min=0).minimum(free)
    return _placed(boxes, grid, top, left)


def top_keys(
    indicator: Float[Tensor, "*batch patch other"], count: Int[Tensor, "*batch patch"]
) -> Bool[Tensor, "*batch patch other"]:
    """The `count` strongest keys of each query, of any shape, and the query itself."""
    rank = indicator.argsort(-1, descending=True).argsort(-1)
    return _with_self(rank < count[..., None])


def boxes_and_sinks(
    indicator: Float[Tensor, "*batch patch other"], grid: Grid, n_patches: int, n_sinks: int
) -> tuple[Int[Tensor, "*batch patch side"], Bool[Tensor, "*batch patch other"]]:
    """Windows of at most `n_patches` that need not stretch to hold sinks: boxes, and the masks of box and sinks.

    The `n_sinks` keys that receive most of a layer are open to every query, and count; the box of the patches that are
    left is the one that holds most of the rest.
    """
    sinks = indicator.sum(-2).topk(n_sinks, dim=-1).indices
    shut = torch.zeros(indicator.shape[:-1], dtype=torch.bool, device=indicator.device).scatter_(-1, sinks, value=True)
    boxes, _ = best_boxes(indicator.masked_fill(shut[..., None, :], 0), grid, n_patches - n_sinks)
    return boxes, masks(boxes, grid) | shut[..., None, :]


def areas(boxes: Boxes) -> Int[Tensor, "*batch patch"]:
    """Patches in each box."""
    return _heights(boxes) * _widths(boxes)


def sides(boxes: Boxes, grid: Grid) -> Int[Tensor, "*batch patch side"]:
    """How far each box reaches from its query: patches left, top, right, bottom; negative if it lies beyond.

    A box of the query alone is (0, 0, 0, 0). The box has (left + right + 1) x (top + bottom + 1) patches.
    """
    row, column = _places(grid, boxes.device)
    top, left, bottom, right = boxes.unbind(-1)
    return torch.stack([column - left, row - top, right - 1 - column, bottom - 1 - row], -1)


def masks(boxes: Boxes, grid: Grid) -> Bool[Tensor, "*batch patch other"]:
    """Which keys each query may see: those in its box, and itself."""
    return _with_self(in_box(boxes, grid))


def complements(boxes: Boxes, grid: Grid) -> Bool[Tensor, "*batch patch other"]:
    """Which keys each query may see if its box is closed instead: all others, and itself."""
    return _with_self(~in_box(boxes, grid))


def attention_bias(mask: Bool[Tensor, "*batch patch other"], prefix: int) -> Float[Tensor, "*batch query key"]:
    """What to add to attention scores: 0 where the mask is open, -inf elsewhere; prefix rows and columns are open."""
    bias = torch.zeros((*mask.shape[:-2], mask.shape[-2] + prefix, mask.shape[-1] + prefix), device=mask.device)
    bias[..., prefix:, prefix:].masked_fill_(~mask, -torch.inf)
    return bias


def in_box(boxes: Boxes, grid: Grid) -> Bool[Tensor, "*batch patch other"]:
    top, left, bottom, right = boxes[..., None].unbind(-2)
    row, column = torch.arange(grid[0], device=boxes.device), torch.arange(grid[1], device=boxes.device)
    rows = (row >= top) & (row < bottom)
    columns = (column >= left) & (column < right)
    return (rows[..., :, None] & columns[..., None, :]).flatten(-2)


def _with_self(mask: Bool[Tensor, "*batch patch other"]) -> Bool[Tensor, "*batch patch other"]:
    mask.diagonal(dim1=-2, dim2=-1).fill_(True)
    return mask


def _heights(boxes: Boxes) -> Int[Tensor, "*batch patch"]:
    return boxes[..., 2] - boxes[..., 0]


def _widths(boxes: Boxes) -> Int[Tensor, "*batch patch"]:
    return boxes[..., 3] - boxes[..., 1]


def _placed(boxes: Boxes, grid: Grid, top: Tensor, left: Tensor) -> Boxes:
    height, width = _heights(boxes), _widths(boxes)
    top = top.clamp(min=0).minimum(grid[0] - height)
    left = left.clamp(min=0).minimum(grid[1] - width)
    return torch.stack([top, left, top + height, left + width], -1)


def _places(grid: Grid, device: torch.device) -> tuple[Int[Tensor, "patch"], Int[Tensor, "patch"]]:
    patch = torch.arange(grid[0] * grid[1], device=device)
    return patch // grid[1], patch % grid[1]


def _searched(
    indicator: Float[Tensor, "*batch patch other"], grid: Grid, shapes: Sequence[tuple[int, int]]
) -> tuple[Int[Tensor, "*batch patch side"], Float[Tensor, "*batch patch"]]:
    """The best box of the given shapes for each row, a block of rows at a time."""
    rows = indicator.flatten(0, -2)
    parts = [Integral(rows[part], grid).best_box(shapes) for part in blocks(rows)]
    boxes, mass = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return boxes.view(*indicator.shape[:-1], 4), mass.view(indicator.shape[:-1])
