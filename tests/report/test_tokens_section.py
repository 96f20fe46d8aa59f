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
    assert sentence.endswith("1.0 of 9 on average.")


def test_tokens_of_which_none_is_known_to_be_a_patch_are_not_told_by_their_length():
    values = norms([1, 13])
    section = tokens(planted_study({"token_norm": values}, [None, None], prefixes=[0, 0]))
    assert "which of the tokens that it returns are patches" in section.findings[0]
    assert len(section.all_parts()) == 1  # how to read the measure, and no figure


def test_grouping_is_told_of_the_layers_that_have_it_and_of_the_images_that_have_it_in_all_of_these():
    values = np.full((8, 5), np.nan, np.float32)
    values[:, :3] = [0.1, 0.4, 0.2]
    values[7, 2] = np.nan  # its objects are too small for that grid
    (sentence,) = findings({"grouping_silhouette": values}, [[4, 4]] * 5)
    assert "best after L1 (silhouette 0.400; 0.100 after L0, 0.200 after L2, the last layer that has one" in sentence
    assert "7 images" in sentence
    assert np.isnan(sentence.by_layer[3:]).all()
    (sentence,) = findings({"grouping_silhouette": values[:1, :3]}, [[4, 4]] * 3)
    assert "0.200 after the last layer; 1 image with" in sentence
    (sentence,) = findings({"grouping_silhouette": values[7:, 2:]}, [[4, 4]] * 3)
    assert sentence == "No image has two objects large enough to score how tokens group."
    (sentence,) = findings({"grouping_silhouette": np.float32([[0.1, np.nan], [np.nan, 0.1]])}, [[4, 4]] * 2)
    assert "large enough for the grid of every layer" in sentence


def test_few_images_with_outliers_are_no_share_of_0_and_no_other_image_is_shown_for_them():
    values = norms([17, 17], n_images=300)
    values[7, 1, 4] = 900
    (sentence,) = findings({"token_norm": values}, [[4, 4]] * 2)
    assert ": below 1 % of the images have such patches after it, below 0.1 of 16 on average." in sentence
    assert sentence.images == ((7, "1 patch"),)
