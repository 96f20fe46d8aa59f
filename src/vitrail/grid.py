"""The grid of patches of an image: positions, distances, and windows as sides, boxes or masks.

Patches are counted row by row from the top left. A window of a query patch is given in one of three forms:

sides  how far it reaches from the query, in patches: left, top, right, bottom; (0, 0, 0, 0) is the query alone
box    (top, left, bottom, right) in rows and columns, half open: rows top .. bottom - 1. It need not hold its query
mask   for each patch of the grid whether it lies in the window

This module needs NumPy alone. Every function makes its tables with `arange`: a caller with tensors passes
`functools.partial(torch.arange, device=...)` and gets tensors back.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

__all__ = [
    "Grid",
    "Sides",
    "box_masks",
    "box_means",
    "boxes_of_sides",
    "distances",
    "n_patches",
    "overlap_shares",
    "patch_edges",
    "patch_sides",
    "pixels_moved",
    "positions",
    "sides_in_patches",
    "sides_of_boxes",
    "view_in_patches",
    "window_masks",
]

Grid = tuple[int, int]
"""(rows, columns) of patches"""

Sides = tuple[float | int, float | int]
"""(rows, columns) that something is long, in patches and parts of patches"""

Arange = Callable[[int], Any]


def n_patches(grid: Grid) -> int:
    """Number of patches of a grid.

    Args:
        grid: Rows and columns.

    Returns:
        Rows times columns.
    """
    return grid[0] * grid[1]


def positions(grid: Grid, arange: Arange = np.arange) -> tuple[Shaped[Any, "patch"], Shaped[Any, "patch"]]:
    """Row and column of every patch.

    Args:
        grid: Rows and columns.
        arange: Makes 0 .. n - 1 as an array of the caller's library.

    Returns:
        Two integer arrays [patch]: the rows, then the columns.
    """
    patch = arange(n_patches(grid))
    return patch // grid[1], patch % grid[1]


def overlap_shares(n_parts: int, n_others: int) -> Float[np.ndarray, "part other"]:
    """How the parts of a side, all as long, lie on other parts of the same side: what a resampling by area keeps.

    Args:
        n_parts: Parts that the side is cut into.
        n_others: Parts that it is cut into otherwise.

    Returns:
        The share of each part that lies on each of the others, every row summing to 1.
    """
    edges, others = np.arange(n_parts + 1) / n_parts, np.arange(n_others + 1) / n_others
    begin, end = np.maximum.outer(edges[:-1], others[:-1]), np.minimum.outer(edges[1:], others[1:])
    return np.asarray(np.maximum(end - begin, 0) * n_parts)


def patch_edges(n_pixels: int, n_patches: int, step: int | None = None) -> Int[np.ndarray, "edge"]:
    """Where the patches of one side of an image begin and end.

    A side need not be a whole number of patches: a model leaves pixels over or fills them up, and patches may overlap.
    A patch is taken to be as wide as the step from one to the next; pixels behind the last patch belong to none.

    Args:
        n_pixels: Length of the side.
        n_patches: Patches along it.
        step: Pixels from one patch to the next (`Block.patch_step`); None where that is not known: then the length of
            the side over the number of patches, to the nearest pixel. That is off by a pixel or more where half a pixel
            a patch or more is left over.

    Returns:
        Growing [patch + 1]: patch i has the pixels edges[i] .. edges[i + 1] - 1, at least one.
    """
    width = step or max(1, round(n_pixels / n_patches))
    if width * (n_patches - 1) >= n_pixels:
        width = max(1, n_pixels // n_patches)
    return np.asarray(np.minimum(np.arange(n_patches + 1) * width, n_pixels))


def sides_in_patches(size: tuple[int, int], grid: Grid, step: tuple[int, int] | None = None) -> Sides:
    """How many patches long the sides of an image are: where whatever is drawn on the grid lies on the image.

    Args:
        size: Rows and columns of pixels.
        grid: Rows and columns of patches.
        step: Rows and columns of pixels from one patch to the next (`Block.patch_step`); None where that is not known.

    Returns:
        Of the rows, then of the columns: more than the grid has where pixels are left over behind the last patch, less
        where the last patch reaches beyond the image; the grid itself where the step is not known.
    """
    rows, columns = (
        n_pixels / width if width and width * (n - 1) < n_pixels else float(n)
        for n_pixels, n, width in zip(size, grid, step or (None, None), strict=True)
    )
    return rows, columns


def view_in_patches(study: Mapping[Any, Any], layer: int) -> Sides:
    """How many patches of a layer long the sides of what the model sees are.

    Args:
        study: Attributes of a study or of one image, as its dataset has them.
        layer: Index of a layer with a grid.

    Returns:
        As `sides_in_patches`; of studies that do not say how far patches lie apart the grid itself.
    """
    rows, columns = study["grids"][layer]
    steps = study.get("patch_steps")
    step = steps[layer] if steps else None
    if step is None:
        return float(rows), float(columns)
    height, width = study["preprocessing"]["size"]
    return sides_in_patches((height, width), (rows, columns), (step[0], step[1]))


def patch_sides(grids: Sequence[Sequence[int] | None]) -> Float[np.ndarray, "layer"]:
    """How long a patch of each layer is: in a hierarchy those of later layers are longer.

    Args:
        grids: (rows, columns) of each layer; None for a layer without a grid.

    Returns:
        The side of a patch as a share of the image's, of an image that is no square of that of a square as large; NaN
        for a layer without a grid.
    """
    return np.array([np.nan if grid is None else (grid[0] * grid[1]) ** -0.5 for grid in grids])


def pixels_moved(
    size: tuple[int, int],
    cells: Grid,
    sources: Int[np.ndarray, "image cell"],
    grid: Grid | None = None,
    step: tuple[int, int] | None = None,
) -> Int[np.ndarray, "image pixel"]:
    """From which pixel each pixel of an image comes whose cells change places.

    Args:
        size: Rows and columns of pixels.
        cells: Rows and columns of cells.
        sources: The cell that each place shows.
        grid: Rows and columns of patches, of which every cell holds the same number; None: a cell is a patch.
        step: Rows and columns of pixels from one patch to the next, as far as known.

    Returns:
        Indices of pixels, row by row; pixels that belong to no cell stay. Where cells are not alike in size, a narrow
        one shows the beginning of a wide one.
    """
    places = []  # of rows, then of columns: the cell of each pixel, and how far it lies in it
    edges = []
    for n_pixels, n_cells, n, width in zip(size, cells, grid or cells, step or (None, None), strict=True):
        edge = patch_edges(n_pixels, n, width)[:: n // n_cells]
        cell = np.searchsorted(edge, np.arange(n_pixels), side="right") - 1
        edges.append(edge)
        places.append((cell, np.arange(n_pixels) - edge[cell]))
    (row, down), (column, right) = places
    inside = (row < cells[0])[:, None] & (column < cells[1])[None, :]
    flat = np.minimum(row, cells[0] - 1)[:, None] * cells[1] + np.minimum(column, cells[1] - 1)[None, :]
    source = sources[:, flat]
    top, left = source // cells[1], source % cells[1]
    from_row = edges[0][top] + np.minimum(down[:, None], np.diff(edges[0])[top] - 1)
    from_column = edges[1][left] + np.minimum(right[None, :], np.diff(edges[1])[left] - 1)
    own = np.arange(size[0] * size[1]).reshape(size)
    moved = np.where(inside, from_row * size[1] + from_column, own)
    return np.asarray(moved.reshape(len(sources), -1))


def distances(grid: Grid) -> Float[np.ndarray, "patch other"]:
    """Euclidean distance between the centres of every two patches, in patches.

    Args:
        grid: Rows and columns.

    Returns:
        Symmetric matrix [patch other] in float64, zero on the diagonal.
    """
    row, column = positions(grid)
    return np.asarray(np.hypot(np.subtract.outer(row, row), np.subtract.outer(column, column)))


def sides_of_boxes(
    boxes: Shaped[Any, "*batch query 4"], grid: Grid, arange: Arange = np.arange
) -> tuple[Shaped[Any, "*batch query"], ...]:
    """How far the box of each query patch reaches from it.

    Args:
        boxes: (top, left, bottom, right) for every patch of the grid, half open.
        grid: Rows and columns.
        arange: Makes 0 .. n - 1 as an array of the caller's library.

    Returns:
        Left, top, right and bottom, each [.. query] in patches, negative where the box lies beyond the query; to be
        stacked by the caller. The box has (left + right + 1) x (top + bottom + 1) patches.
    """
    row, column = positions(grid, arange)
    top, left, bottom, right = (boxes[..., side] for side in range(4))
    return column - left, row - top, right - 1 - column, bottom - 1 - row


def boxes_of_sides(
    sides: Shaped[Any, "*batch query 4"], grid: Grid, arange: Arange = np.arange, first: int = 0
) -> tuple[Shaped[Any, "*batch query"], ...]:
    """The box that each query patch's sides describe: the inverse of `sides_of_boxes`.

    Args:
        sides: Left, top, right, bottom in whole patches, for the patches `first`, `first` + 1, ... of the grid.
        grid: Rows and columns.
        arange: Makes 0 .. n - 1 as an array of the caller's library.
        first: The patch that the first query is, where sides are those of a few patches.

    Returns:
        Top, left, bottom and right, each [.. query], half open, not cut to the grid; to be stacked by the caller.
    """
    row, column = (axis[first : first + sides.shape[-2]] for axis in positions(grid, arange))
    left, top, right, bottom = (sides[..., side] for side in range(4))
    return row - top, column - left, row + bottom + 1, column + right + 1


def box_masks(boxes: Shaped[Any, "*batch 4"], grid: Grid, arange: Arange = np.arange) -> Bool[Any, "*batch patch"]:
    """Which patches of the grid lie in each box.

    Args:
        boxes: (top, left, bottom, right), half open; parts beyond the grid hold no patch.
        grid: Rows and columns.
        arange: Makes 0 .. n - 1 as an array of the caller's library.

    Returns:
        True where a patch lies in the box, one row of the grid's patches for each box.
    """
    top, left, bottom, right = (boxes[..., side, None] for side in range(4))
    row, column = arange(grid[0]), arange(grid[1])
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    return (rows[..., :, None] & columns[..., None, :]).reshape(*boxes.shape[:-1], n_patches(grid))


def box_means(
    values: Float[np.ndarray, "*#batch patch"], boxes: Int[np.ndarray, "*#batch query 4"], grid: Grid
) -> Float[np.ndarray, "*batch query"]:
    """The mean of a value of patches over each box, in four numbers a box: sums above and left of its corners.

    Args:
        values: A value for each patch, any unit; leading dimensions of 1 go with all boxes.
        boxes: (top, left, bottom, right), half open, within the grid.
        grid: Rows and columns.

    Returns:
        Means in the unit of the values; NaN where any value of the image is, and for empty boxes.
    """
    corners = np.zeros((*values.shape[:-1], grid[0] + 1, grid[1] + 1))
    corners[..., 1:, 1:] = values.reshape(*values.shape[:-1], *grid).cumsum(-2).cumsum(-1)
    flat = corners.reshape(*values.shape[:-1], -1)
    top, left, bottom, right = (boxes[..., side] for side in range(4))

    def before(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        at = row * (grid[1] + 1) + column
        return np.take_along_axis(np.broadcast_to(flat, (*at.shape[:-1], flat.shape[-1])), at, axis=-1)

    sums = before(bottom, right) - before(top, right) - before(bottom, left) + before(top, left)
    areas = (bottom - top) * (right - left)
    return np.asarray(sums / np.where(areas > 0, areas, np.nan))


def window_masks(
    boxes: Shaped[Any, "*batch query 4"], grid: Grid, arange: Arange = np.arange, first: int = 0
) -> Bool[Any, "*batch query patch"]:
    """Which patches each query may see: those in its box, and always itself.

    Args:
        boxes: (top, left, bottom, right), half open, for the patches `first`, `first` + 1, ... of the grid.
        grid: Rows and columns.
        arange: Makes 0 .. n - 1 as an array of the caller's library.
        first: The patch that the first query is, where boxes are those of a few patches.

    Returns:
        True where the query (row) may see the patch (column).
    """
    patch = arange(n_patches(grid))
    return box_masks(boxes, grid, arange) | (patch[first : first + boxes.shape[-2], None] == patch)
