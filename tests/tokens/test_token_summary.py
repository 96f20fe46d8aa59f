"""Summaries of tokens: relevance against orders at random."""

import numpy as np
import xarray as xr
from numpy.testing import assert_allclose

from vitrail.tokens.summary import relevance_over_chance


def test_the_gain_of_relevance_is_the_area_beyond_that_of_random_orders():
    rng = np.random.default_rng(0)
    steps = np.array([0.0, 0.25, 0.5, 1.0])
    deletion, insertion = rng.random((2, 4, 4))
    methods = ["rollout", "gradient", "random 1", "random 2"]
    dims = ("relevance_method", "step")
    look = xr.Dataset(
        {"relevance_deletion": (dims, deletion), "relevance_insertion": (dims, insertion)},
        coords={"relevance_method": methods, "step": steps},
    )
    result = relevance_over_chance(look, methods[:2])
    heights = insertion - deletion
    area = ((heights[:, 1:] + heights[:, :-1]) / 2 * np.diff(steps)).sum(1)
    assert_allclose(list(result.gains.values()), area[:2] - area[2:].mean())
    assert list(result.gains) == methods[:2]
    mean, lowest, highest = result.chance["deletion"]
    assert_allclose([mean, lowest, highest], [deletion[2:].mean(0), deletion[2:].min(0), deletion[2:].max(0)])
    assert result.n_random == 2
