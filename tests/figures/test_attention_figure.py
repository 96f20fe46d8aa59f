"""Attention over a photograph: the values drawn are the map's row and column."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image

from vitrail.errors import UsageError
from vitrail.figures.attention import attention_over_photo
from vitrail.figures.style import save
from vitrail.heads.query_maps import query_maps

GRID, PREFIX = (3, 4), 2


def a_map(seed=0):
    weights = np.random.default_rng(seed).exponential(size=(14, 14)).astype(np.float32)
    return weights / weights.sum(1, keepdims=True)


def of_query(weights, query):
    return query_maps(weights[query], weights[:, query], GRID, PREFIX)


def a_photo():
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (48, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("query", [0, 1, 2, 9, 13])
def test_the_maps_are_the_row_and_the_column_of_the_query_on_one_scale(query):
    weights = a_map()
    figure = attention_over_photo(a_photo(), of_query(weights, query), GRID, PREFIX, query, "L0H0")
    looks, looked_at = figure.axes[1].images[1], figure.axes[2].images[1]
    assert_allclose(looks.get_array(), weights[query, 2:].reshape(GRID))
    assert_allclose(looked_at.get_array(), weights[2:, query].reshape(GRID))
    assert looks.norm is looked_at.norm
    assert_allclose(looks.norm.vmax, np.quantile(np.concatenate([weights[query, 2:], weights[2:, query]]), 0.99))


def test_the_query_patch_is_framed_in_every_picture_and_a_class_token_in_none():
    framed = attention_over_photo(a_photo(), of_query(a_map(), 2 + 6), GRID, PREFIX, 2 + 6, "L0H0")
    frames = [axes.patches[0].get_xy() for axes in framed.axes[:3]]
    assert_allclose(frames, np.tile([2 - 0.5, 1 - 0.5], (3, 1)))
    token = attention_over_photo(a_photo(), of_query(a_map(), 0), GRID, PREFIX, 0, "L0H0")
    assert sum(len(axes.patches) for axes in token.axes[:3]) == 0
    assert "class token" in token.axes[0].get_title(loc="left")


def test_the_photograph_lies_under_the_patches_where_pixels_are_left_over():
    pixels = np.zeros((60, 64, 3), dtype=np.uint8)  # patches of 16 pixels: 12 rows of pixels belong to none
    pixels[32:48, 48:64] = 255  # the patch in row 2, column 3
    drawn = Image.fromarray(pixels)
    figure = attention_over_photo(drawn, of_query(a_map(), 0), GRID, PREFIX, 0, "L0H0", view=(3.75, 4))
    for axes in figure.axes[:3]:
        left, right, bottom, top = axes.images[0].get_extent()
        assert_allclose([top + (bottom - top) * row / 60 for row in (32, 48)], [1.5, 2.5])
        assert_allclose([left + (right - left) * column / 64 for column in (48, 64)], [2.5, 3.5])
        assert axes.get_ylim() == (3.25, -0.5)
    assert_allclose(figure.axes[1].images[1].get_extent(), (-0.5, 3.5, 2.5, -0.5))


def test_the_scale_and_the_even_weight_are_stated_and_bytes_repeat(tmp_path):
    written = []
    for name in "ab":
        figure = attention_over_photo(a_photo(), of_query(a_map(), 5), GRID, PREFIX, 5, "L0H0")
        written.append(save(figure, tmp_path / f"{name}.svg").read_bytes())
    assert written[0] == written[1]
    below = " ".join(figure.get_supxlabel().split())
    assert "one scale, 0 to " in below
    assert "Even attention to all tokens would be 0.0714" in below


def test_a_map_that_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="a row and a column of 18 tokens"):
        query_maps(a_map()[0], a_map()[:, 0], (4, 4), PREFIX)
