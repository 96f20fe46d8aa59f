"""Tokens whose length lies far above all others; needs no torch."""

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

__all__ = ["ABLATIONS", "OUTLIER_DEVIATIONS", "REGISTER_MODELS", "TRIED_MODELS", "norm_outliers", "outlier_counts"]

OUTLIER_DEVIATIONS = 6.0
"""Robust standard deviations above the median from which a norm counts as an outlier."""

REGISTER_MODELS = ("as it is", "registers", "random neurons")
"""Of a trial of artefacts: the model, the same with registers, and with registers that listen to other neurons."""

ABLATIONS = {"neurons off": "other neurons off", "heads off": "other heads off"}
"""What a trial of artefacts switches off, and its null."""

TRIED_MODELS = (*REGISTER_MODELS, *(each for pair in ABLATIONS.items() for each in pair))
"""The models of a trial of artefacts; the last two are missing where heads cannot be told apart."""

DEVIATION_OF_NORMAL = 1.4826
"""Standard deviation of a normal distribution in units of its median absolute deviation."""


def norm_outliers(
    norms: Float[np.ndarray, "*image patch"], deviations: float = OUTLIER_DEVIATIONS
) -> Bool[np.ndarray, "*image patch"]:
    """Patches whose norm lies far above all others of the set: the artefacts of Darcet et al. 2023 (arXiv 2309.16588).

    They cut at a fixed norm of one model; ours is the median plus `deviations` robust standard deviations (1.4826 times
    the median absolute deviation), taken over all norms together.

    Args:
        norms: Lengths of patches only: class and register tokens have norms of their own.
        deviations: Robust standard deviations above the median.

    Returns:
        True for outliers.
    """
    middle = np.median(norms)
    spread = DEVIATION_OF_NORMAL * np.median(np.abs(norms - middle))
    return np.asarray(norms > middle + deviations * spread)


def outlier_counts(trial: xr.Dataset) -> xr.DataArray:
    """How many patches of an image have a token of outlying length.

    Args:
        trial: What `vitrail.tokens.artefact_trial.try_registers` gives.

    Returns:
        [model layer], mean over images.
    """
    return trial["outlier_share"].mean("image") * trial.sizes["patch"]
