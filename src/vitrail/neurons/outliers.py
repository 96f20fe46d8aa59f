"""Tokens whose length lies far above all others; needs no torch."""

import numpy as np
from jaxtyping import Bool, Float

__all__ = ["OUTLIER_DEVIATIONS", "norm_outliers"]

OUTLIER_DEVIATIONS = 6.0
"""Robust standard deviations above the median from which a norm counts as an outlier."""


def norm_outliers(
    norms: Float[np.ndarray, "*image patch"], deviations: float = OUTLIER_DEVIATIONS
) -> Bool[np.ndarray, "*image patch"]:
    """Patches whose norm lies far above all others of the set: the artefacts of Darcet et al. 2023 (arXiv 2309.16588).

    They cut at a fixed norm of one model; ours is the median plus `deviations` robust standard deviations (1.4826 times
    the median absolute deviation), taken over all `norms` given. Pass patches only: class and register tokens have
    norms of their own.
    """
    middle = np.median(norms)
    spread = 1.4826 * np.median(np.abs(norms - middle))
    return np.asarray(norms > middle + deviations * spread)
