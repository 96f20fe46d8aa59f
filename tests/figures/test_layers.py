"""Quantities over layers: what is drawn is the mean over images, with its interval; NaN is no value."""

import numpy as np
import pytest
import xarray as xr
from drawn_studies import planted
from numpy.testing import assert_allclose

from vitrail.errors import UsageError
from vitrail.figures.heads import heads_by_layer
from vitrail.figures.layers import quantities_over_layers
from vitrail.figures.style import picture
from vitrail.layer_summary import LayerQuantity, layer_quantity
from vitrail.stats import mean_interval


def values(n_images=9, n_layers=4):
    found = np.random.default_rng(0).random((n_images, n_layers))
    found[:, 1] = np.nan  # a layer that has none
    found[3:4, 2] = np.nan  # an image that has none there
    return found


def test_the_line_is_the_mean_over_the_images_that_have_a_value_and_skips_layers_without():
    given = values()
    axes = quantities_over_layers([LayerQuantity("a", "patches", given)], "title").axes[0]
    line = axes.lines[0]
    assert line.get_xdata().tolist() == [0, 2, 3]
    assert_allclose(line.get_ydata(), [given[:, 0].mean(), np.nanmean(given[:, 2]), given[:, 3].mean()])
    assert axes.get_ylabel() == "patches"


def test_the_band_is_the_interval_of_the_mean():
    given = values()
    axes = quantities_over_layers([LayerQuantity("a", "1", given)], "title").axes[0]
    band = next(
        each for each in axes.collections if type(each).__name__ in ("PolyCollection", "FillBetweenPolyCollection")
    )
    low, high, _ = mean_interval(given[:, 3:])
    ends = [y for x, y in band.get_paths()[0].vertices if x == 3]
    assert_allclose([min(ends), max(ends)], [low[0], high[0]])


def test_one_image_has_a_line_and_no_interval():
    figure = quantities_over_layers([LayerQuantity("a", "1", values(1))], "title")
    assert len(figure.axes[0].collections) == 0
    assert "interval" not in figure.get_supxlabel()


def test_a_measure_is_averaged_over_what_else_it_has_dimensions_for():
    given = np.random.default_rng(0).random((3, 2, 5, 2))
    given[:, 1, 4] = np.nan
    study = xr.Dataset({"a": (("image", "layer", "patch", "xy"), given, {"title": "of a", "unit": "1"})})
    found = layer_quantity(study, "a")
    assert_allclose(found.values, np.nanmean(given, axis=(2, 3)))
    assert (found.title, found.unit) == ("of a", "0 to 1")


def test_every_head_is_a_dot_at_its_mean():
    study = planted(fewer=(2,))
    axes = heads_by_layer(study, "attention_distance", "How far").axes[0]
    dots = next(each for each in axes.collections if type(each).__name__ == "PathCollection")
    expected = study["attention_distance"].to_numpy().astype(float).mean(0).ravel()
    assert_allclose(dots.get_offsets()[:, 1], expected[~np.isnan(expected)], rtol=1e-12)
    with pytest.raises(UsageError, match="holds, per head"):
        heads_by_layer(study, "tendency", "How far")


def test_a_bare_picture_has_lost_its_title_and_its_line():
    figure = quantities_over_layers([LayerQuantity("a", "1", values())], "A title", "How to read.")
    framed, bare = picture(figure, "png"), picture(figure, "png", bare=True)
    assert framed.startswith(b"\x89PNG")
    assert bare.startswith(b"\x89PNG")
    assert (figure.get_suptitle(), figure.get_supxlabel()) == ("", "")
    assert framed != bare
    assert picture(figure, "svg", bare=True) == picture(figure, "svg", bare=True)
