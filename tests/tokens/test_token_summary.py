"""Summaries of tokens: relevance against orders at random, norms of patches and of the class token."""

import numpy as np
import xarray as xr
from numpy.testing import assert_allclose

from vitrail.tokens.summary import norm_outliers_by_layer, norms_of_layers, patch_norms, relevance_over_chance


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


def norms_of(tokens, grids, prefixes, class_token, n_images=3):
    """Norms near 10 of as many tokens as each layer returns; the class token's are to be planted."""
    norms = np.full((n_images, len(tokens), max(tokens)), np.nan, np.float32)
    for layer, n in enumerate(tokens):
        norms[:, layer, :n] = np.random.default_rng(layer).normal(10, 1, (n_images, n))
    attributes = {"grids": grids, "prefixes": prefixes, "class_token": class_token}
    return xr.Dataset({"token_norm": (("image", "layer", "token"), norms)}, attrs=attributes)


def test_a_class_token_that_joins_late_is_no_patch_and_a_patch_no_class_token():
    study = norms_of([16, 16, 1, 1], [[4, 4]] * 4, [0] * 4, class_token=True)  # as of CaiT
    study["token_norm"][:, 2:, 0] = 900
    norms = norms_of_layers(study)
    assert list(norms.layers) == [0, 1]
    assert_allclose(norms.class_token, [np.nan, np.nan, 900, 900])
    assert list(norm_outliers_by_layer(study)) == [0, 1]
    assert not any(outliers.values.any() for outliers in norm_outliers_by_layer(study).values())


def test_among_merged_tokens_the_class_token_is_not_taken_for_a_patch():
    study = norms_of([15, 13, 11], [[4, 4], None, None], [1, 0, 0], class_token=True)
    norms = norms_of_layers(study)
    assert list(norms.layers) == [0]
    assert patch_norms(study)[0].values.shape == (3, 14)
    assert patch_norms(study)[0].grid is None
    assert_allclose(norms.class_token, [np.median(study["token_norm"][:, 0, 0]), np.nan, np.nan])
    without = norms_of([15, 13], [None, None], [0, 0], class_token=False)
    assert [each.values.shape[1] for each in patch_norms(without).values()] == [15, 13]


def test_patches_that_a_layer_puts_together_lie_on_the_grid_of_the_next():
    study = norms_of([36, 9, 9], [[6, 6], [6, 6], [3, 3]], [0, 0, 0], class_token=False)
    study["token_norm"][:, 1, 7] = 900
    outliers = norm_outliers_by_layer(study)
    assert [each.grid for each in outliers.values()] == [(6, 6), (3, 3), (3, 3)]
    assert list(np.flatnonzero(outliers[1].values.any(0))) == [7]
    assert norms_of_layers(study).class_token is None
