"""How views become pictures; needs no torch."""

from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["rgb_image", "sign_map"]


def rgb_image(
    pixels: Float[np.ndarray, "colour row column"], scale: float | None = None
) -> Float[np.ndarray, "row column colour"]:
    """A view as a picture: clip(V / max V, 0, 1), one scale for the three channels (as published).

    Args:
        pixels: A view, in any unit; negative entries become black (`sign_map` has them).
        scale: Stands in for max V, for one scale over several views.

    Returns:
        Colours, 0 to 1; black where nothing is positive.
    """
    top = float(pixels.max()) if scale is None else scale
    return np.moveaxis(np.clip(pixels / top if top > 0 else np.zeros_like(pixels), 0, 1), 0, -1)


def sign_map(
    pixels: Float[np.ndarray, "colour row column"], scale: float | None = None
) -> Float[np.ndarray, "row column"]:
    """A view summed over colours, for a diverging colour scale; beside `rgb_image`, ours.

    Args:
        pixels: A view, in any unit.
        scale: Stands in for the largest absolute sum, for one scale over several views.

    Returns:
        -1 to 1; beyond that where a sum exceeds `scale`.
    """
    summed: np.ndarray[Any, Any] = pixels.sum(axis=0)
    top = float(np.abs(summed).max()) if scale is None else scale
    return summed / top if top > 0 else summed
