"""Ranks where equal values share theirs."""

import numpy as np
from jaxtyping import Float

__all__ = ["average_ranks"]


def average_ranks(values: Float[np.ndarray, "*batch item"]) -> Float[np.ndarray, "*batch item"]:
    """Ranks from 1 along the last dimension; equal values all get the mean of the ranks they fill."""
    rows = values.reshape(-1, values.shape[-1])
    ranks = np.empty(rows.shape)
    for index, row in enumerate(rows):
        ordered = np.sort(row)
        ranks[index] = (np.searchsorted(ordered, row, "left") + np.searchsorted(ordered, row, "right") + 1) / 2
    return ranks.reshape(values.shape)
