"""The report on tokens: what it says of lengths and of grouping by object."""

import numpy as np
from tiny_reports import planted_study

from vitrail.report.tokens import tokens


def norms(n_tokens, n_images=6):
    """Norms near 10 of as many tokens as each layer returns."""
    values = np.full((n_images, len(n_tokens), max(n_tokens)), np.nan, np.float32)
    for layer, n in enumerate(n_tokens):
        values[:, layer, :n] = np.random.default_rng(layer).normal(10, 1, (n_images, n)).clip(8, 12)
    return values


def findings(arrays, grids, **plan):
    return tokens(planted_study(arrays, grids, **plan)).findings


def test_outliers_are_named_by_where_they_lie_on_the_grid_that_the_layer_returns():
    values = norms([36, 9, 9])
    values[:, 1, 7] = 900
    plan = {"prefixes": [0, 0, 0], "class_token": False}
    (sentence,) = findings({"token_norm": values}, [[6, 6], [6, 6], [3, 3]], **plan)
    assert "in most images at row 2, column 1." in sentence
    assert sentence.layer == 1
    (sentence,) = findings({"token_norm": values}, [[6, 6], [6, 6], [4, 4]], **plan)
    assert "1.0 of 9 on average." in sentence


def test_tokens_of_which_none_is_known_to_be_a_patch_are_not_told_by_their_length():
    values = norms([1, 13])
    section = tokens(planted_study({"token_norm": values}, [None, None], prefixes=[0, 0]))
    assert "which of the tokens that it returns are patches" in section.findings[0]
    assert len(section.all_parts()) == 1  # how to read the measure, and no figure
