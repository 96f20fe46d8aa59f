"""Figures of attention patterns, drawn from planted studies."""

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_rgba

from vitrail.analysis import declaration
from vitrail.errors import UsageError
from vitrail.figures.patterns import COLOURS, cluster_maps, pattern_map, patterns_by_head
from vitrail.figures.whole import draw_figures
from vitrail.patterns.names import NAMES, RULES

GRID = (4, 5)
N_IMAGES, N_LAYERS, N_HEADS = 30, 4, 3


def planted_study() -> xr.Dataset:
    """Three groups of heads: to the right, even, and content that is in no cluster; L3H2 is not there."""
    rng = np.random.default_rng(0)
    shape, n_patches = (N_IMAGES, N_LAYERS, N_HEADS), GRID[0] * GRID[1]
    group = np.arange(N_LAYERS * N_HEADS).reshape(N_LAYERS, N_HEADS) % 3
    rules = np.zeros((*shape, len(RULES)), dtype=np.float32)
    rules[..., RULES.index("uniformity")] = np.where(group == 1, 0.99, 0.5)
    rules[..., RULES.index("shift_mass")] = np.where(group == 0, 0.8, 0.05)
    rules[..., RULES.index("shift_x")] = 1
    rules[:, 3, 2] = np.nan
    middle = np.array([[0, 0], [30, 5], [10, 40]])[group]
    xy = (middle + rng.normal(0, 3, (*shape, 2))).astype(np.float32)
    xy[:, 3, 2] = np.nan
    cluster = np.broadcast_to(np.where(group == 2, -1, group), shape).astype(np.int32)
    arrays = {
        "pattern_rule": rules,
        "pattern_patch_xy": xy,
        "pattern_patch_cluster": cluster,
        "image_dependence": np.where(np.isnan(rules[0, ..., 0]), np.nan, rng.uniform(0, 1, shape[1:])).astype(
            np.float32
        ),
        "patch_cluster_map": rng.dirichlet(np.ones(n_patches), (2, n_patches)).astype(np.float32),
    }
    fit = {"method": "pca", "why": "PCA, as it describes held-out images as well", "n_latents": 8}
    errors = {"autoencoder_error": 0.41, "pca_error": 0.4, "n_train": 100, "n_held": 20, "n_clusters": 2}
    errors["gain"] = [-0.02, 0.001]
    return xr.Dataset(
        {name: (declaration(name).dims, values, declaration(name).attributes()) for name, values in arrays.items()},
        coords={"image": [f"{at}.png" for at in range(N_IMAGES)]},
        attrs={
            "n_heads": [3, 3, 3, 2],
            "grids": [list(GRID)] * N_LAYERS,
            "patterns": {"grid": list(GRID), "patch": {**fit, **errors}},
            "left_out": {"pattern_cls_xy": "the model has no class token"},
        },
    )


@pytest.fixture(scope="module")
def study() -> xr.Dataset:
    return planted_study()


def words(figure) -> list[str]:
    import matplotlib.text

    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_the_map_shows_one_images_heads_on_all_heads(study: xr.Dataset) -> None:
    figure = pattern_map(study, image="7.png")
    scattered = [each for each in figure.axes[0].collections if type(each).__name__ == "PathCollection"]
    (dots,) = [each for each in scattered if len(each.get_offsets()) == 11]
    there = ~np.isnan(study["pattern_patch_xy"].values[7, ..., 0])
    np.testing.assert_allclose(dots.get_offsets(), study["pattern_patch_xy"].values[7][there], rtol=1e-6)
    np.testing.assert_allclose(dots.get_array(), np.argwhere(there)[:, 0])
    told = " ".join(words(figure)).replace("\n", " ")
    assert "330 maps" in told
    assert "autoencoder 0.410, PCA 0.400 (PCA - autoencoder: -0.0100, 95 % interval -0.0200 to 0.0010)." in told
    assert {"0", "1"} <= set(words(figure))


def test_a_study_of_an_older_version_has_no_interval_of_the_two_errors(study: xr.Dataset) -> None:
    about = study.attrs["patterns"]
    fit = {name: value for name, value in about["patch"].items() if name != "gain"}
    old = study.assign_attrs(patterns={**about, "patch": fit})
    assert "autoencoder 0.410, PCA 0.400." in " ".join(words(pattern_map(old))).replace("\n", " ")


def test_the_map_of_a_single_image_names_it(study: xr.Dataset) -> None:
    shown = words(pattern_map(study.isel(image=[4]), "patch"))
    assert "Map of patch patterns, image 4.png" in shown


def test_clusters_carry_name_size_heads_and_rule(study: xr.Dataset) -> None:
    told = " ".join(words(cluster_maps(study))).replace("\n", " ")
    assert "0 shift (+1, 0)" in told.replace("  ", " ")
    assert "1 uniform" in told.replace("  ", " ")
    assert "120 maps: L0H0 100 %" in told


def test_every_head_has_its_name_in_its_cell(study: xr.Dataset) -> None:
    figure = patterns_by_head(study)
    cells = {tuple(text.get_position()): text.get_text() for text in figure.axes[0].texts}
    assert cells[0.5, 0.5] == "(+1, 0)"
    assert cells[1.5, 0.5] == "uniform"
    assert cells[2.5, 0.5] == "content"
    assert (2.5, 3.5) not in cells
    assert len(figure.axes[1].texts) == 11


def test_a_legend_names_the_colours_where_cells_have_no_room(study: xr.Dataset) -> None:
    wide = xr.concat([study[["pattern_rule", "image_dependence"]]] * 5, dim="head").assign_attrs(study.attrs)
    figure = patterns_by_head(wide)
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["shift", "uniform", "content"]
    colours = [patch.get_facecolor() for patch in legend.get_patches()]
    assert colours == [to_rgba(COLOURS[name]) for name in ("shift", "uniform", "content")]
    assert not figure.axes[0].texts
    assert patterns_by_head(study).axes[0].get_legend() is None


def test_the_whole_set_is_written_and_what_is_not_there_is_left_out(study: xr.Dataset, tmp_path) -> None:
    made = [path.name for path in draw_figures(study, tmp_path, ("svg",), only=["patterns"])]
    assert made == ["patterns_by_head.svg", "pattern_map_patch.svg", "pattern_clusters.svg"]
    few = study.drop_vars(["pattern_patch_xy", "pattern_patch_cluster", "patch_cluster_map", "image_dependence"])
    assert [path.name for path in draw_figures(few, tmp_path)] == ["patterns_by_head.png"]
    assert draw_figures(xr.Dataset(), tmp_path) == []


def test_a_map_that_the_study_lacks_is_refused_with_the_reason(study: xr.Dataset) -> None:
    with pytest.raises(UsageError, match="this study has none: the model has no class token"):
        pattern_map(study, "cls")
    with pytest.raises(UsageError, match="there are patch and cls"):
        pattern_map(study, "token")
    with pytest.raises(UsageError, match="this study has none"):
        cluster_maps(study.drop_vars("patch_cluster_map"))
    with pytest.raises(UsageError, match="this study holds none"):
        patterns_by_head(xr.Dataset())


def test_every_name_has_a_colour_and_the_measures_are_declared() -> None:
    assert set(COLOURS) == set(NAMES)
    assert declaration("pattern_patch_cluster").dtype == "int32"
