"""What is drawn and reported follows from what was measured: a study of any single measure is no error."""

import numpy as np
import pytest
from drawn_studies import study_of_everything
from numpy.testing import assert_allclose

from vitrail.analysis import BASE, analyses, measures
from vitrail.figures.whole import draw_figures
from vitrail.heads.exact_names import EXACT_VALUES
from vitrail.heads.head_values import head_values, importance_metrics

BASE_MEASURES = [measure.name for measure in analyses()[BASE].measures]
FIGURES = [each for analysis in analyses().values() for each in analysis.all_figures() if not each.one_image]
NOT_DRAWN = {
    "head_prediction", "head_value", "attention_distance", "prefix_share", "head_region_probability",
    "image_dependence", "pattern_patch_cluster", "pattern_cls_cluster", "field_size", "interaction_distance",
    "predicted_window", "strongest_share", "sink", "sink_share", "object_map", "neuron_peak", "neuron_peak_patch",
    "image_embedding",
    *EXACT_VALUES.values(),
    *(name for name in measures() if name.startswith(("object_layer_", "object_centre_")) or name.endswith("_null")),
    *(each.name for each in measures().values() if each.analysis == "head_windows" and each.dims == ("image",)),
}  # fmt: skip
"""Measures that only look, the report or other figures make use of."""


@pytest.fixture(scope="module")
def everything():
    return study_of_everything()


@pytest.mark.parametrize("name", [name for name in measures() if name not in BASE_MEASURES])
@pytest.mark.parametrize("n_images", [1, 6])
def test_a_study_of_a_single_measure_is_drawn_without_error(everything, name, n_images):
    base = [each for each in BASE_MEASURES if each in everything]
    study = everything[[*base, name]].isel(image=slice(n_images))
    stems = [figure.stem for figure in FIGURES if figure.draw(study) is not None]
    assert bool(stems) == (name not in NOT_DRAWN)


def test_a_study_of_attention_strength_alone_gets_its_figure_and_no_overview(everything, tmp_path):
    study = everything[[*BASE_MEASURES, "attention_strength"]]
    assert [path.name for path in draw_figures(study, tmp_path)] == ["strength_of_top_heads.png"]


def test_grouping_that_no_image_has_is_not_drawn(everything):
    names = [name for name in everything if name.startswith("grouping_")]
    study = everything[names].map(lambda values: values * np.nan)
    assert next(each for each in FIGURES if each.stem == "grouping_by_layer").draw(study) is None


def test_a_value_is_compared_with_the_plain_value_and_only_its_change_is_importance(everything):
    values = head_values(everything, "head_value")
    assert_allclose(values.unpruned, everything["value"].to_numpy().astype(np.float64).mean())
    assert "head_value" not in importance_metrics(everything)
    assert "head_value_change" in importance_metrics(everything)
    assert_allclose(head_values(everything, "head_value_change").unpruned, 0)
