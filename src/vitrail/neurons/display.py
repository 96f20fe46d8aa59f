"""How views are shown as pictures; needs no torch."""

from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["shown", "signed"]


def shown(
    pixels: Float[np.ndarray, "colour row column"], scale: float | None = None
) -> Float[np.ndarray, "row column colour"]:
    """A view as a picture: clip(V / max V, 0, 1), one scale for the three channels (as published).

    `scale` stands in for max V, for one scale over several views. Negative entries are black: `signed` shows them.
    """
    top = float(pixels.max()) if scale is None else scale
    return np.moveaxis(np.clip(pixels / top if top > 0 else np.zeros_like(pixels), 0, 1), 0, -1)


def signed(
    pixels: Float[np.ndarray, "colour row column"], scale: float | None = None
) -> Float[np.ndarray, "row column"]:
    """A view summed over colours, from -1 to 1, for a diverging colour scale; beside `shown`, ours."""
    summed: np.ndarray[Any, Any] = pixels.sum(axis=0)
    top = float(np.abs(summed).max()) if scale is None else scale
    return summed / top if top > 0 else summed
