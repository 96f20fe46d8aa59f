"""Figures of the room: pictures from arrays, scores of a study, and no torch."""

import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from vitrail.analysis import declaration, measures
from vitrail.errors import UsageError
from vitrail.figures.style import save
from vitrail.figures.tokens import (
    Curve,
    Panel,
    curves,
    grouping_by_layer,
    norms_by_layer,
    overlaid,
    panels,
    position_grid,
    scatter_of_tokens,
    survival,
    token_map,
    view_panels,
)
from vitrail.tokens.summary import grouping_quantities


def drawn(figure, tmp_path):
    """The figure's pixels, red green blue, 0 to 255."""
    return np.asarray(Image.open(save(figure, tmp_path / "figure.png")).convert("RGB")).astype(int)


def test_figures_of_neurons_need_no_torch():
    code = "import sys, vitrail.figures.tokens; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_panels_show_their_pictures(tmp_path):
    red = np.zeros((4, 4, 3))
    red[..., 0] = 1
    pixels = drawn(
        panels([[Panel(red, "red", (1, 1, 2, 2))], [Panel(red), Panel(1 - red)]], "title", "How to read."), tmp_path
    )
    is_red = (pixels == [255, 0, 0]).all(-1)
    is_cyan = (pixels == [0, 255, 255]).all(-1)
    assert 0.1 < is_red.mean() < 0.5
    assert is_red.sum() == pytest.approx(2 * is_cyan.sum(), rel=0.1)  # two red pictures, one with a mark, and one cyan


def test_a_map_of_tokens_is_clear_where_low_and_bright_where_high():
    found = token_map(np.arange(6.0), (2, 3))
    assert found.shape == (2, 3, 3)
    brightness = found.sum(-1).flatten()
    assert (np.diff(brightness) > 0).all()


def test_one_scale_keeps_decay_visible():
    strong = np.ones((3, 4, 4))
    own, _ = view_panels([strong, strong / 10], ["a", "b"])
    shared, _ = view_panels([strong, strong / 10], ["a", "b"], one_scale=True)
    assert_allclose(own[1].picture, 1)
    assert_allclose(shared[1].picture, 0.1)


def test_a_photograph_keeps_its_grey_where_values_are_low():
    photo, values = np.full((4, 4, 3), 0.5), np.array([0.0, 0.0, 0.0, 1.0])
    found = overlaid(photo, values, (2, 2), top=1.0)
    assert_allclose(found[:2, :2], 0.35 + 0.65 * 0.5)
    assert found[3, 3, 0] > found[3, 3, 2] + 0.3  # orange


def test_values_lie_on_the_pixels_of_their_patches_where_some_are_left_over():
    values = np.zeros(9)
    values[8] = 1.0
    found = overlaid(np.zeros((19, 16, 3)), values, (3, 3), top=1.0, view=(19 / 5, 16 / 5))
    orange = found[..., 0] > found[..., 2] + 0.3
    assert_array_equal(np.argwhere(orange)[[0, -1]], [[10, 10], [14, 14]])
    assert orange.sum() == 25


def test_the_grid_of_positions_holds_a_map_per_patch():
    found = position_grid(np.eye(4), (2, 2))
    assert found.shape == (6, 6, 3)
    assert_allclose(found[:2, :2], token_map(np.eye(4)[0], (2, 2)))
    assert_allclose(found[3:5, 3:5], token_map(np.eye(4)[3], (2, 2)))


def test_curves_and_scatters_are_drawn(tmp_path):
    x = np.linspace(0, 1, 4)
    lines = [Curve("one", x, x, x - 0.1, x + 0.1), Curve("two", x, 1 - x, dashed=True)]
    assert drawn(curves({"a": lines, "b": lines[:1]}, "title", "x", "y", "Reading."), tmp_path).std() > 5
    xy = np.random.default_rng(0).random((7, 2))
    owner = np.array([0, 0, 1, 1, 2, 2])
    figure = scatter_of_tokens(
        {"L0": xy}, owner, np.ones(6), {0: "background", 1: "cat", 2: "dog"}, "title", "Reading."
    )
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "background", "cat", "dog", "class token",
    ]  # fmt: skip


def test_grouping_of_a_study_is_drawn_over_images_that_have_it(tmp_path):
    values = np.random.default_rng(0).random((5, 3))
    values[2] = np.nan
    names = [name for name in measures() if name.startswith("grouping_")]
    study = xr.Dataset({
        name: (("image", "layer"), values.copy(), declaration(name).attributes()) for name in names
    })  # fmt: skip
    figure = grouping_by_layer(study)
    assert "4 images" in figure.get_suptitle()
    assert drawn(figure, tmp_path).std() > 5
    units = {quantity.title: quantity.unit for quantity in grouping_quantities(study)}
    assert list(units.values()) == ["-1 to 1", "0 to 1", "cosine", "cosine", "clusters per object", "0 to 1"]
    study[names[1]][0, 0] = study[names[2]][:, 1] = np.nan  # no clusters in an image, a layer without a grid
    panels = grouping_by_layer(study).axes
    assert ["3 of them" in panel.get_title("left").replace("\n", " ") for panel in panels[:3]] == [False, True, False]
    assert list(panels[2].lines[0].get_xdata()) == [0, *range(2, values.shape[1])]
    with pytest.raises(UsageError, match="need masks"):
        grouping_by_layer(study.drop_vars(names))


def study_of_tokens(n_images=6, n_layers=3, n_tokens=17):
    """Norms about 10, but for patch 5 of the last layer, which is long in every image; answers that fall."""
    rng = np.random.default_rng(0)
    norms = rng.normal(10, 1, (n_images, n_layers, n_tokens))
    norms[:, 2, 1 + 5] = 300
    falling = np.linspace(0.8, 0.2, 4)
    arrays = {
        "token_norm": (("image", "layer", "token"), norms),
        "probability": (("image",), np.full(n_images, 0.9)),
        "occlusion_random": (("image", "amount"), np.tile(falling[:3], (n_images, 1))),
        "occlusion_salient": (("image", "amount"), np.tile(falling[1:], (n_images, 1))),
        "shuffle_probability": (("image", "cells"), np.tile(falling[:2], (n_images, 1))),
        "occlusion_drift": (("image", "layer", "amount"), rng.random((n_images, n_layers, 3))),
    }
    return xr.Dataset(
        {name: (dims, values, declaration(name).attributes()) for name, (dims, values) in arrays.items()},
        coords={"image": [f"{number}.png" for number in range(n_images)]},
        attrs={"prefixes": [1] * n_layers, "grids": [[4, 4]] * n_layers, "class_token": True, "options": {}},
    )


def test_norms_show_the_median_the_longest_and_how_many_stand_out():
    study = study_of_tokens()
    left, right = norms_by_layer(study).axes
    lines = {line.get_label(): line.get_ydata() for line in left.lines}
    patches = study["token_norm"].to_numpy()[:, :, 1:]
    assert_allclose(lines["median patch"], np.median(patches, axis=(0, 2)))
    assert_allclose(lines["longest patch"], patches.max(axis=(0, 2)))
    assert_allclose(lines["class token, median"], np.median(study["token_norm"].to_numpy()[:, :, 0], axis=0))
    assert_allclose([bar.get_height() for bar in right.patches], [0, 0, 1])
    with pytest.raises(UsageError, match="--measures tokens"):
        norms_by_layer(study.drop_vars("token_norm"))


def test_what_survives_starts_at_the_intact_image():
    study = study_of_tokens()
    lost, displaced, drift = survival(study).axes
    lines = {line.get_label(): line for line in lost.lines}
    assert set(lines) == {"random", "salient"}
    assert_allclose(lines["random"].get_xdata(), [0, 0.25, 0.5, 0.75])
    assert_allclose(lines["random"].get_ydata(), [0.9, 0.8, 0.6, 0.4])
    assert_allclose(displaced.lines[0].get_ydata(), [0.9, 0.8, 0.6])
    assert [text.get_text() for text in displaced.get_xticklabels()] == ["intact", "2 x 2", "4 x 4"]
    assert_allclose(drift.lines[1].get_ydata(), study["occlusion_drift"].to_numpy()[:, :, 1].mean(0))
    with pytest.raises(UsageError, match="no occlusion or shuffling"):
        survival(study[["token_norm"]])
