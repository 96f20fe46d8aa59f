"""Windows: for each query the box of patches that holds most of its interactions. Our construction, after Ma et al.

A box is (top, left, bottom, right) in rows and columns of the grid, half open: it holds rows top .. bottom - 1. It need
not hold its query; the query may always see itself (`masks`).

Boxes are searched through integral images (`integral.py`), for all queries at once.
"""

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from vitrail import grid as grids
from vitrail.arguments import at_least_one
from vitrail.errors import UsageError
from vitrail.grid import Grid
from vitrail.patches.integral import ROUNDING, Integral, blocks, shapes_of_area

__all__ = [
    "Boxes",
    "areas",
    "attention_bias",
    "best_boxes",
    "boxes_and_sinks",
    "boxes_of_sides",
    "centred_boxes",
    "complements",
    "in_box",
    "masks",
    "n_patches_of",
    "random_boxes",
    "shapes_of_area",
    "shared_boxes",
    "sides",
    "smallest_areas",
    "smallest_boxes",
    "top_keys",
]

Boxes = Int[Tensor, "*batch patch side"]
"""(top, left, bottom, right) for each query patch; the last two are exclusive."""

PRICE_STEPS = 30
"""Bisections of the price of a patch, from 0 .. 1 down to 1e-9: finer than the float32 sums that it weighs."""


def n_patches_of(share: float, grid: Grid) -> int:
    """The number of patches that a share of the grid allows.

    Args:
        share: Above 0 and at most 1.
        grid: (rows, columns) of patches.

    Returns:
        The share in patches, rounded; at least 1.

    Raises:
        UsageError: The share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise UsageError(f"A window cannot have {share} of the grid; give a share above 0 and at most 1.")
    return max(1, round(share * grid[0] * grid[1]))


def best_boxes(
    indicator: Float[Tensor, "*batch patch other"], grid: Grid, n_patches: int
) -> tuple[Int[Tensor, "*batch patch side"], Float[Tensor, "*batch patch"]]:
    """For each query the box of an area that holds the most indicator.

    Args:
        indicator: Rows of interactions, zero or more.
        grid: (rows, columns) of patches.
        n_patches: The largest area of a box, in patches.

    Returns:
        The boxes, and the sum of the row in each; a row whose sum is 0 has an empty box. All boxes of `shapes_of_area`
        at all positions are compared; ties go to the flattest shape, then to the topmost, then to the leftmost box.

    Raises:
        UsageError: The area is no whole number of 1 or more.
    """
    n_patches = at_least_one("patches of a box", n_patches)
    return _search(indicator, grid, shapes_of_area(grid, n_patches))


def smallest_boxes(
    indicator: Float[Tensor, "*batch patch other"], grid: Grid, share: float
) -> tuple[Int[Tensor, "*batch patch side"], Float[Tensor, "*batch patch"]]:
    """For each query the smallest box that holds at least a share of its row.

    All boxes of the grid are compared, by area, then by what they hold: about a hundred times the work of `best_boxes`.

    Args:
        indicator: Rows of interactions, zero or more.
        grid: (rows, columns) of patches.
        share: Of each row's sum, above 0 and at most 1.

    Returns:
        The boxes, and the sum of the row in each.

    Raises:
        UsageError: The share is not above 0 and at most 1.
    """
    _require_share(share)
    target = share * indicator.sum(-1) - ROUNDING
    boxes, mass = _search(indicator, grid, [(1, 1)])
    missing = mass < target
    for shapes in _shapes_by_area(grid)[1:]:
        if not missing.any():
            break
        candidates, candidate_mass = _search(indicator, grid, shapes)
        accepted = missing & (candidate_mass >= target)
        boxes = torch.where(accepted[..., None], candidates, boxes)
        mass = torch.where(accepted, candidate_mass, mass)
        missing = missing & ~accepted
    return boxes, mass


def smallest_areas(
    indicator: Float[Tensor, "*batch patch other"], grid: Grid, share: float
) -> Float[Tensor, "*batch patch"]:
    """Number of patches in the smallest box that holds a share of each query's row.

    The areas of `smallest_boxes`, found faster because the boxes themselves are not.

    Args:
        indicator: rows of interactions, zero or more.
        grid: rows and columns of patches.
        share: of each row's sum, above 0 and at most 1.

    Returns:
        Whole numbers of patches, 1 to all; NaN for rows without mass.

    Raises:
        UsageError: The share is not above 0 and at most 1.
    """
    _require_share(share)
    rows = indicator.flatten(0, -2)
    areas_of_blocks = [Integral(rows[part], grid).smallest_areas(share) for part in blocks(rows)]
    return torch.cat(areas_of_blocks).view(indicator.shape[:-1])


def _require_share(share: float) -> None:
    if not 0 < share <= 1:
        raise UsageError(f"No box is asked to hold {share} of a row; give a share above 0 and at most 1.")


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
    """Boxes whose areas share one budget: the mean area over the queries of a layer is bounded, not each area.

    Each query takes the area for which the mass inside the boxes of all queries of the layer together is largest: what
    a further patch may cost is the same for all queries, and found by bisection.

    Args:
        indicator: Rows of interactions, zero or more.
        grid: (rows, columns) of patches.
        n_patches: Bound on the mean area, in patches.
        levels: The areas to choose from, in patches; the smallest is at most `n_patches`.

    Returns:
        The boxes, and the sum of the row in each.
    """
    candidates = [best_boxes(indicator, grid, level) for level in sorted(levels)]
    boxes = torch.stack([box for box, _ in candidates], -2)
    mass = torch.stack([sums for _, sums in candidates], -1)
    size = areas(boxes).to(mass)
    price = _price(mass, size, n_patches)
    choice = (mass - price[..., None, None] * size).argmax(-1, keepdim=True)
    best = boxes.gather(-2, choice[..., None].expand(*choice.shape, 4))[..., 0, :]
    return best, mass.gather(-1, choice)[..., 0]


def _price(
    mass: Float[Tensor, "*batch patch level"], size: Float[Tensor, "*batch patch level"], n_patches: int
) -> Float[Tensor, "*batch"]:
    """The lowest price of a patch at which the queries of a layer buy `n_patches` each on average, or fewer."""
    low, high = mass.new_zeros(mass.shape[:-2]), mass.new_ones(mass.shape[:-2])
    for _ in range(PRICE_STEPS):
        middle = (low + high) / 2
        bought = size.gather(-1, (mass - middle[..., None, None] * size).argmax(-1, keepdim=True))
        too_much = bought.mean((-1, -2)) > n_patches
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return high


def centred_boxes(boxes: Boxes, grid: Grid) -> Boxes:
    """Boxes of the same shapes centred on their queries, pushed inside the grid: a control that knows only nearness.

    Args:
        boxes: The boxes whose shapes are taken.
        grid: (rows, columns) of patches.

    Returns:
        One box for each query.
    """
    row, column = grids.positions(grid, _arange(boxes))
    return _place_boxes(boxes, grid, row - _heights(boxes) // 2, column - _widths(boxes) // 2)


def random_boxes(boxes: Boxes, grid: Grid, generator: torch.Generator) -> Boxes:
    """Boxes of the same shapes anywhere on the grid, all positions alike: the control that knows nothing.

    Args:
        boxes: The boxes whose shapes are taken.
        grid: (rows, columns) of patches.
        generator: On the CPU, so that every device draws the same boxes.

    Returns:
        One box for each query.
    """
    free = torch.stack([grid[0] - _heights(boxes), grid[1] - _widths(boxes)])
    corner = torch.rand(free.shape, generator=generator).to(boxes.device) * (free + 1)
    top, left = corner.long().clamp(min=0).minimum(free)
    return _place_boxes(boxes, grid, top, left)


def top_keys(
    indicator: Float[Tensor, "*batch patch other"], count: Int[Tensor, "*batch patch"]
) -> Bool[Tensor, "*batch patch other"]:
    """The strongest keys of each query, wherever they lie, and the query itself.

    Args:
        indicator: Rows of interactions.
        count: How many keys each query may see, itself not counted.

    Returns:
        A mask, True where the query may see the key.
    """
    rank = indicator.argsort(-1, descending=True).argsort(-1)
    return _with_self(rank < count[..., None])


def boxes_and_sinks(
    indicator: Float[Tensor, "*batch patch other"], grid: Grid, n_patches: int, n_sinks: int
) -> tuple[Int[Tensor, "*batch patch side"], Bool[Tensor, "*batch patch other"]]:
    """Windows that need not stretch to hold sinks: every query sees the sinks of its layer, and a box.

    The keys that receive most of a layer are open to every query, and count; the box of the patches that are left is
    the one that holds most of the rest.

    Args:
        indicator: Rows of interactions, zero or more.
        grid: (rows, columns) of patches.
        n_patches: Patches that a query may see, sinks included.
        n_sinks: How many of them are sinks, fewer than `n_patches`.

    Returns:
        The boxes, and the masks of box and sinks.
    """
    sinks = indicator.sum(-2).topk(n_sinks, dim=-1).indices
    sink = torch.zeros(indicator.shape[:-1], dtype=torch.bool, device=indicator.device).scatter_(-1, sinks, value=True)
    boxes, _ = best_boxes(indicator.masked_fill(sink[..., None, :], 0), grid, n_patches - n_sinks)
    return boxes, masks(boxes, grid) | sink[..., None, :]


def areas(boxes: Boxes) -> Int[Tensor, "*batch patch"]:
    """Number of patches in each box.

    Args:
        boxes: Boxes inside the grid.

    Returns:
        Whole numbers; 0 for an empty box.
    """
    return _heights(boxes) * _widths(boxes)


def sides(boxes: Boxes, grid: Grid) -> Int[Tensor, "*batch patch side"]:
    """How far each box reaches from its query.

    Args:
        boxes: One box for every patch of the grid.
        grid: (rows, columns) of patches.

    Returns:
        Patches left, top, right, bottom; negative where the box ends before the query. A box of the query alone is (0,
        0, 0, 0); any box has (left + right + 1) x (top + bottom + 1) patches.
    """
    return torch.stack(grids.sides_of_boxes(boxes, grid, _arange(boxes)), -1)


def boxes_of_sides(sides: Num[Tensor, "*batch patch side"], grid: Grid) -> Num[Tensor, "*batch patch side"]:
    """The boxes that sides describe; the inverse of `sides`.

    Args:
        sides: Whole patches left, top, right, bottom of every patch of the grid.
        grid: (rows, columns) of patches.

    Returns:
        Boxes, not cut to the grid.
    """
    return torch.stack(grids.boxes_of_sides(sides, grid, _arange(sides)), -1)


def masks(boxes: Num[Tensor, "*batch patch side"], grid: Grid) -> Bool[Tensor, "*batch patch other"]:
    """The keys that each query may see: those in its box, and itself.

    Args:
        boxes: One box for every patch of the grid.
        grid: (rows, columns) of patches.

    Returns:
        True where the query (row) may see the key (column).
    """
    mask: Tensor = grids.window_masks(boxes, grid, _arange(boxes))
    return mask


def complements(boxes: Boxes, grid: Grid) -> Bool[Tensor, "*batch patch other"]:
    """The keys that each query may see if its box is closed instead: all others, and itself.

    Args:
        boxes: One box for every patch of the grid.
        grid: (rows, columns) of patches.

    Returns:
        True where the query (row) may see the key (column).
    """
    return _with_self(~in_box(boxes, grid))


def attention_bias(mask: Bool[Tensor, "*batch patch other"], prefix: int) -> Float[Tensor, "*batch query key"]:
    """What to add to attention scores so that patches see only what a mask opens.

    Args:
        mask: True where the patch (row) may see the patch (column).
        prefix: Tokens before the patches; their rows and columns stay open.

    Returns:
        0 where open, -inf elsewhere, over all tokens.
    """
    bias = torch.zeros((*mask.shape[:-2], mask.shape[-2] + prefix, mask.shape[-1] + prefix), device=mask.device)
    bias[..., prefix:, prefix:].masked_fill_(~mask, -torch.inf)
    return bias


def in_box(boxes: Boxes, grid: Grid) -> Bool[Tensor, "*batch patch other"]:
    """The keys that lie in the box of each query; unlike `masks` without the query itself.

    Args:
        boxes: One box for every patch of the grid.
        grid: (rows, columns) of patches.

    Returns:
        True where the key (column) lies in the box of the query (row).
    """
    mask: Tensor = grids.box_masks(boxes, grid, _arange(boxes))
    return mask


def _with_self(mask: Bool[Tensor, "*batch patch other"]) -> Bool[Tensor, "*batch patch other"]:
    mask.diagonal(dim1=-2, dim2=-1).fill_(True)
    return mask


def _heights(boxes: Boxes) -> Int[Tensor, "*batch patch"]:
    return boxes[..., 2] - boxes[..., 0]


def _widths(boxes: Boxes) -> Int[Tensor, "*batch patch"]:
    return boxes[..., 3] - boxes[..., 1]


def _place_boxes(boxes: Boxes, grid: Grid, top: Tensor, left: Tensor) -> Boxes:
    height, width = _heights(boxes), _widths(boxes)
    top = top.clamp(min=0).minimum(grid[0] - height)
    left = left.clamp(min=0).minimum(grid[1] - width)
    return torch.stack([top, left, top + height, left + width], -1)


def _arange(like: Tensor) -> "partial[Tensor]":
    """0 .. n - 1 on the device of a tensor."""
    return partial(torch.arange, device=like.device)


def _search(
    indicator: Float[Tensor, "*batch patch other"], grid: Grid, shapes: Sequence[tuple[int, int]]
) -> tuple[Int[Tensor, "*batch patch side"], Float[Tensor, "*batch patch"]]:
    """The best box of the given shapes for each row, a block of rows at a time."""
    rows = indicator.flatten(0, -2)
    parts = [Integral(rows[part], grid).best_box(shapes) for part in blocks(rows)]
    boxes, mass = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return boxes.view(*indicator.shape[:-1], 4), mass.view(indicator.shape[:-1])
