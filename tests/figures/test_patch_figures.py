"""Figures of the patches room: what they show, for all layers, with and without a photograph."""

import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.testing import assert_allclose
from PIL import Image

from vitrail.analysis import declaration
from vitrail.errors import UsageError
from vitrail.figures import patches as figures
from vitrail.figures.photo_grid import draw_outline
from vitrail.figures.style import save
from vitrail.patches.layer_maps import coverage

GRID = (4, 5)


@pytest.fixture
def study():
    """Three images, two layers of 4 x 5 patches and one without a grid."""
    random = np.random.default_rng(0)
    n_patches = GRID[0] * GRID[1]
    row, column = np.divmod(np.arange(n_patches), GRID[1])
    whole = np.stack([column, row, GRID[1] - 1 - column, GRID[0] - 1 - row], -1).astype(np.float32)
    window = np.broadcast_to(whole, (3, 3, n_patches, 4)).copy()
    tendency = random.normal(size=(3, 3, n_patches, 2)).astype(np.float32)
    window[:, 2], tendency[:, 2] = np.nan, np.nan
    hub = np.zeros((3, 3, n_patches), dtype=bool)
    hub[0, 1, [3, 7]] = True
    on_objects = random.random((3, 3, n_patches)).astype(np.float32)
    covered = np.repeat(np.arange(3)[:, None] == 0, n_patches, axis=1).astype(np.float32)
    covered[1, :5] = 1
    on_objects[:, 2] = np.nan
    arrays = {"window": window, "tendency": tendency, "hub": hub}
    arrays |= {"window_object_share": on_objects, "object_share": covered}
    held = {name: xr.DataArray(array, dims=declaration(name).dims) for name, array in arrays.items()}
    grids = [list(GRID), list(GRID), None]
    return xr.Dataset(held, coords={"image": ["a.png", "b.png", "c.png"]}, attrs={"grids": grids})


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 80, 3), dtype=np.uint8))


DRAWINGS = {
    "arrows": figures.tendency_arrows,
    "flow": figures.tendency_flow,
    "coverage": figures.window_coverage,
    "hubs": figures.hub_map,
    "objects": figures.window_object_map,
    "windows": lambda study, image=0, photo=None: figures.windows_of_patch(study, 7, image, photo),
}


@pytest.mark.parametrize("name", DRAWINGS)
@pytest.mark.parametrize("over_photo", [False, True])
def test_each_layer_with_a_grid_has_a_panel(study, photo, name, over_photo, tmp_path):
    figure = DRAWINGS[name](study, 0, photo if over_photo else None)
    titles = [axes.get_title("left") for axes in figure.axes if axes.get_title("left")]
    assert titles[:2] == ["L0", "L1"]
    assert "L2" not in titles
    assert save(figure, tmp_path / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize("name", ["arrows", "flow", "hubs", "objects"])
def test_over_all_images_the_mean_is_drawn(study, name):
    assert "mean over 3 images" in DRAWINGS[name](study, None).get_suptitle().replace("\n", " ")


def test_the_photograph_lies_under_the_patches_where_pixels_are_left_over(study):
    pixels = np.zeros((76, 80, 3), dtype=np.uint8)
    pixels[48:64, 64:80] = 255  # the patch in row 3, column 4
    study.attrs |= {"patch_steps": [[16, 16], [16, 16], None], "preprocessing": {"size": [76, 80]}}
    for name in DRAWINGS:
        axes = DRAWINGS[name](study, 0, Image.fromarray(pixels)).axes[0]
        left, right, bottom, top = axes.images[0].get_extent()
        assert_allclose([top + (bottom - top) * row / 76 for row in (48, 64)], [2.5, 3.5])
        assert_allclose([left + (right - left) * column / 80 for column in (64, 80)], [3.5, 4.5])
    outlined = draw_outline_of(np.pad(np.ones((1, 1)), ((3, 0), (4, 0))), (76 / 16, 5), (76 / 32, 2.5))
    assert_allclose(outlined.max(0), [1.875, 1.375])  # patches twice as long; halfway from its middle to its end


def draw_outline_of(objects, own, view):
    axes = Figure().subplots()
    draw_outline(axes, objects, own, view)
    return np.concatenate(axes.collections[0].get_paths()[0].to_polygons(closed_only=False))


def test_hubs_of_a_study_have_a_scale_that_says_what_the_darkest_is(study):
    figure = figures.hub_map(study, None)
    scales = [[text.get_text() for text in axes.get_yticklabels()] for axes in figure.findobj(Axes)]
    assert ["no image", "33 % of images"] in scales
    assert figure.axes[0].images[0].get_clim() == pytest.approx((0, 1 / 3))


def test_the_frame_of_a_window_lies_where_the_window_is(study):
    study["window"].values[0, 0, 7] = [1, 1, 2, 0]  # patch 7 is row 1, column 2
    frames = [patch for patch in figures.windows_of_patch(study, 7, 0).axes[0].patches if isinstance(patch, Rectangle)]
    assert frames[-1].get_xy() == (0.5, -0.5)
    assert (frames[-1].get_width(), frames[-1].get_height()) == (4, 2)


def test_a_patch_without_a_window_is_drawn_without_a_frame(study):
    with_frame = len(figures.windows_of_patch(study, 7, 0).axes[0].patches)
    study["window"].values[0, 0, 7] = np.nan
    figure = figures.windows_of_patch(study, 7, 0)
    assert len(figure.axes[0].patches) == with_frame - 2
    assert figure.axes[0].get_title("right") == ""


def test_hubs_are_framed_and_counted(study):
    axes = figures.hub_map(study, 0).axes[1]
    assert {patch.get_xy() for patch in axes.patches} == {(2.5, -0.5), (1.5, 0.5)}
    assert axes.get_title("right") == "2"


def test_windows_on_objects_are_drawn_of_a_study_and_over_the_photograph_of_one_image(study, photo):
    ((_, draw),) = figures.BOTH
    assert "mean over 3 images" in draw(study).get_suptitle().replace("\n", " ")
    looked = study.isel(image=[1]).assign(view=(("row", "column", "channel"), np.asarray(photo)))
    panel = draw(looked).axes[0]
    assert_allclose(panel.images[-1].get_array().ravel(), study["window_object_share"][1, 0])
    assert len(panel.collections) == 1  # the line around the object
    assert draw(study.drop_vars("window_object_share")) is None


def test_coverage_of_windows_that_are_the_whole_grid_is_one_everywhere(study):
    assert_allclose(coverage(study["window"].values[0, 0].astype(float), GRID), np.ones(GRID))


def test_flow_is_paper_without_length_and_another_colour_for_each_direction():
    still = figures.flow_colours(np.zeros((1, 1, 2)), 1.0)
    assert still.min() > 0.95
    angles = np.arange(8) * np.pi / 4
    colours = figures.flow_colours(np.stack([np.cos(angles), np.sin(angles)], -1)[None], 1.0)[0]
    apart = np.abs(colours[:, None] - colours).max(-1) + np.eye(8)
    assert apart.min() > 0.05


def test_flow_is_as_strong_at_the_radius_as_beyond():
    one, far = (figures.flow_colours(np.array([[[length, 0.0]]]), 2.0) for length in (2.0, 9.0))
    assert_allclose(one, far)


def test_a_patch_that_is_not_there_is_refused(study):
    with pytest.raises(UsageError, match="patches 0 to 19"):
        figures.windows_of_patch(study, 20)


def test_a_study_of_other_measures_is_refused(study):
    with pytest.raises(UsageError, match="--measures patches"):
        figures.tendency_arrows(study.drop_vars("tendency"))


def test_the_sum_of_windows_over_images_is_the_mean_of_their_sums(study):
    study["window"][1, 0] = 0.0  # in this image every window of L0 is the patch itself
    meshes = [figures.window_coverage(study, image).axes[0].images[0].get_array() for image in (0, 1, 2, None)]
    assert_allclose(meshes[3], np.mean(meshes[:3], axis=0))
    assert_allclose(meshes[1], 1 / 20)
