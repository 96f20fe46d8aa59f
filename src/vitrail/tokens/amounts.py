"""How many patches a study takes away, and into how many cells it cuts an image; needs no torch."""

from collections.abc import Sequence

__all__ = ["AMOUNTS", "cells_that_divide"]

AMOUNTS = (0.25, 0.5, 0.75)
"""Shares of the patches that are lost, the values of the dimension `amount` of the occlusion measures."""

CELLS = (2, 4, 7, 14)
"""Cells along a side; those that divide the grid are the values of the dimension `cells` of the shuffle measures."""


def cells_that_divide(grid: tuple[int, int], candidates: Sequence[int] = CELLS) -> list[int]:
    """The numbers of cells that cut the grid into equal cells of whole patches.

    Args:
        grid: (rows, columns) of patches.
        candidates: Cells along a side.

    Returns:
        Those of the candidates that divide both sides of the grid, in their order.
    """
    return [cells for cells in candidates if grid[0] % cells == 0 and grid[1] % cells == 0]
