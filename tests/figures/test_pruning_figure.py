"""The figure of pruning curves."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from vitrail.data import LabelSource
from vitrail.errors import UsageError
from vitrail.figures.pruning import pruning_curves
from vitrail.figures.style import save
from vitrail.pruning.ranking import Curves, area_table


def curves(*names):
    rng = np.random.default_rng(0)
    counts = np.array([0, 2, 5, 9])
    falling = lambda at: rng.random((4, 60)) < np.array(at)[:, None]  # noqa: E731
    return Curves(
        counts,
        {name: falling([0.9, 0.9, 0.7, 0]) for name in names},
        {name: falling([0.9, 0.3, 0.1, 0]) for name in names},
        np.stack([falling([0.9, 0.6, 0.4, 0])[:, :20] for _ in range(6)]),
    )


def test_every_ranking_has_a_chart_with_its_area_and_the_areas_have_one_of_their_own(tmp_path):
    drawn = curves("probability", "tokens", "flips")
    figure = pruning_curves(drawn, "a model")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 4
    for axes, (name, area) in zip(shown, area_table(drawn).items(), strict=False):
        assert axes.get_title(loc="left") == f"{name}   area {area.between[0]:.2f}"
        least = next(line for line in axes.lines if line.get_label() == "least important first")
        assert_allclose(least.get_ydata(), drawn.least[name].mean(-1))
    assert [label.get_text() for label in shown[-1].get_yticklabels()] == list(area_table(drawn))
    assert save(figure, tmp_path / "curves.png").stat().st_size > 20_000


def test_areas_say_what_they_are_areas_of():
    given, own = (replace(curves("flips"), labels=labels) for labels in (LabelSource.GIVEN, LabelSource.PREDICTED))
    assert pruning_curves(given).axes[1].get_xlabel() == "area between (accuracy)"
    assert "agreement" in pruning_curves(own).axes[1].get_xlabel()


def test_one_ranking_is_drawn_too():
    figure = pruning_curves(curves("flips"))
    assert len([axes for axes in figure.axes if axes.get_visible()]) == 2
    assert "where a ranking that knows nothing lies" in " ".join(figure.get_supxlabel().split())


def test_the_band_of_a_few_random_orders_leaves_the_areas_their_room():
    drawn = curves("flips", "tokens")
    levels = np.array([0.2, 0.8])[:, None, None]
    few = replace(drawn, random=np.random.default_rng(1).random((2, 4, 20)) < levels)
    areas = [area.between for area in area_table(few).values()]
    assert area_table(few)["flips"].chance == 1
    low, high = pruning_curves(few).axes[2].get_xlim()
    assert -low == high == pytest.approx(1.1 * np.abs(areas).max())


def test_without_a_ranking_there_is_nothing_to_draw():
    with pytest.raises(UsageError, match="no ranking"):
        pruning_curves(Curves(np.array([0, 1]), {}, {}, np.zeros((1, 2, 3), bool)))
