"""What one head's attention map says of one query: where it looks, and how much each patch looks at it; no torch."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from vitrail.errors import UsageError

__all__ = ["QueryMaps", "query_maps"]

SCALE_QUANTILE = 0.99
"""A scale ends at this quantile of what is drawn: one sink patch would leave everything else blank."""


class QueryMaps(NamedTuple):
    """One query's row and column of an attention map, on the grid of patches.

    Attributes:
        attends: Attention weight that the query gives each patch, [row column].
        received: Attention weight that each patch gives the query, [row column].
        patch_share: Share of the query's attention that goes to patches, 0 to 1.
        mean_received: Mean of `received`.
        scale: Upper end of a colour scale for both maps, their common 99 % quantile; above 0.
        clipped: Some weight lies above `scale`.
    """

    attends: Float[np.ndarray, "row column"]
    received: Float[np.ndarray, "row column"]
    patch_share: float
    mean_received: float
    scale: float
    clipped: bool


def query_maps(
    row: Float[np.ndarray, "token"], column: Float[np.ndarray, "token"], grid: tuple[int, int], prefix: int
) -> QueryMaps:
    """The row and the column of one query of a head's map, on the grid of patches.

    Args:
        row: Attention weight that the query gives each token, [token]: `prefix` tokens, then the patches.
        column: Attention weight that each token gives the query, [token].
        grid: Rows and columns of patches.
        prefix: Tokens before the patches.

    Returns:
        Both maps with their common scale.

    Raises:
        UsageError: The row or the column does not fit the grid.
    """
    n_tokens = prefix + grid[0] * grid[1]
    if row.shape != (n_tokens,) or column.shape != (n_tokens,):
        raise UsageError(
            f"Attention over a photograph needs a row and a column of {n_tokens} tokens ({prefix} before the patches, "
            f"grid {grid[0]} x {grid[1]}); found {row.shape} and {column.shape}. Pass one query's, and its "
            "layer's grid and prefix."
        )
    attends, received = row[prefix:].reshape(grid), column[prefix:].reshape(grid)
    both = np.concatenate([attends.ravel(), received.ravel()])
    highest = float(both.max())
    scale = float(np.quantile(both, SCALE_QUANTILE)) or highest or 1.0
    return QueryMaps(attends, received, float(attends.sum()), float(received.mean()), scale, highest > scale)
