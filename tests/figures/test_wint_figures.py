"""Figures of a WinT: masks equal the model's, every layer has a panel, and what does not fit is refused."""

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from vitrail.errors import UsageError
from vitrail.figures import wint as figures
from vitrail.figures.style import save
from vitrail.windows.window_maps import hard_masks, windows_as_study
from vitrail.wint.model import hard_mask

GRID = (4, 5)


@pytest.fixture
def sides():
    """Three layers with two windows of 20 patches."""
    return np.random.default_rng(0).uniform(0, 3, (3, 2, 20, 4)).astype(np.float32)


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 80, 3), dtype=np.uint8))


def test_masks_of_the_figures_are_those_of_the_model(sides):
    assert_array_equal(hard_masks(sides, GRID), hard_mask(torch.from_numpy(sides), GRID))
    alone = hard_masks(sides[:, :, 7:8], GRID, first=7)
    assert_array_equal(alone[:, :, 0], hard_masks(sides, GRID)[:, :, 7])


@pytest.mark.parametrize("over_photo", [False, True])
def test_windows_have_a_panel_a_layer_and_a_frame_a_head(sides, photo, over_photo, tmp_path):
    figure = figures.windows_by_layer(windows_as_study(sides, GRID), 7, 0, photo if over_photo else None)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["L0", "L1", "L2"]
    frames = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert len(frames) == 4  # each on a white rim
    assert save(figure, tmp_path / "figure.png").stat().st_size > 5000


def test_teacher_and_student_lie_one_above_the_other(sides):
    student, teacher = windows_as_study(sides, GRID), windows_as_study(sides[::-1].copy(), GRID)
    figure = figures.windows_by_layer(student, 0, teacher=teacher)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["student L0", "student L1", "student L2", "teacher L0", "teacher L1", "teacher L2"]


def test_summed_masks_are_the_mean_over_layers_and_heads(sides, tmp_path):
    figure = figures.summed_windows(windows_as_study(sides, GRID), [0, 7, 19])
    shown = figure.axes[1].images[0].get_array()
    assert_allclose(shown, hard_masks(sides, GRID)[:, :, 7].mean((0, 1)).reshape(GRID))
    assert shown[1, 2] == 1  # the query sees itself
    assert save(figure, tmp_path / "figure.png").stat().st_size > 5000


def test_lines_by_layer_are_labelled(tmp_path):
    lines = {"student": np.array([0.2, 0.4, 0.3]), "teacher": np.array([0.25, 0.25, 0.25])}
    for draw in (figures.lines_of_areas, figures.lines_of_overlaps):
        figure = draw(lines)
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["student", "teacher"]
        assert_allclose(figure.axes[0].lines[0].get_ydata(), lines["student"])
        assert save(figure, tmp_path / "figure.png").stat().st_size > 5000


def test_what_does_not_fit_is_refused(sides):
    with pytest.raises(UsageError, match="0 to 19"):
        figures.windows_by_layer(windows_as_study(sides, GRID), 20)
    with pytest.raises(UsageError, match=r"\[layer, window, 30, 4\]"):
        windows_as_study(sides, (5, 6))
    with pytest.raises(UsageError, match="one length"):
        figures.lines_of_areas({"a": np.zeros(2), "b": np.zeros(3)})
