"""Lengths in a hierarchy, whose later patches are longer: they are compared in patches of the first layer."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from report.tiny_reports import planted_study
from vitrail.figures.heads import heads_by_layer
from vitrail.figures.patches import tendency_arrows, tendency_flow
from vitrail.heads.summary import head_table
from vitrail.heads.why import why_sentences, why_table
from vitrail.report.heads import heads
from vitrail.report.parts import ReportData
from vitrail.report.patches import patches

GRIDS = [[8, 8], [4, 4], [2, 2]]
N_IMAGES = 3


def planted(grids: list[list[int]]) -> ReportData:
    """Of each layer the distances 2, 1.5 and 1 in its own patches, as `grids` counts them 2, 3 and 4 of the first."""
    shape = (N_IMAGES, 3, 64)
    there = np.arange(64) < np.array([rows * columns for rows, columns in grids])[:, None]
    own = np.array([2.0, 1.5, 1.0])
    distance = np.where(there, own[:, None], np.nan) + np.zeros(shape)
    of_heads = own[:, None] + np.array([0.0, 0.5]) + np.zeros((N_IMAGES, 3, 2))
    entropy = np.array([[2.0, 1.0], [1.2, 1.1], [0.6, 0.5]]) + np.zeros((N_IMAGES, 3, 2))
    arrays = {
        "interaction_distance": distance,
        "tendency": np.stack([distance, np.zeros(shape)], -1),
        "attention_distance": of_heads,
        "strength_entropy": entropy,
    }
    return planted_study({name: values.astype(np.float32) for name, values in arrays.items()}, grids)


def test_the_nearest_and_the_farthest_layer_are_told_in_one_unit():
    section = patches(planted(GRIDS))
    assert "2.0 patches of L0 away in L0, the nearest, and 4.0 in L2, the farthest" in section.findings[0]
    assert_allclose(section.findings[0].by_layer, [2, 3, 4])
    plain = patches(planted([[8, 8]] * 3))
    assert "1.0 patches away in L2, the nearest, and 2.0 in L0, the farthest" in plain.findings[0]


def test_heads_of_later_layers_look_farther_though_they_count_fewer_patches():
    study = planted(GRIDS)
    told = " ".join(heads(study).findings)
    assert "Heads of L0 look 2.2 patches of L0 far on average, those of L2 5.0 (rank correlation" in told
    assert "Within L0 they range from 2.0 to 2.5 patches of L0." in told
    table = head_table(study.data)
    assert table["attention_distance_mean"].attrs["unit"] == "patches of L0"
    assert_allclose(table["attention_distance_mean"], [[2, 2.5], [3, 4], [4, 6]])
    assert_allclose(why_table(study.data)["attention_distance_mean"], table["attention_distance_mean"])
    axes = heads_by_layer(study.data, "attention_distance", "How far").axes[0]
    assert "patches of L0" in axes.get_ylabel().replace("\n", " ")
    assert_allclose(axes.lines[0].get_ydata(), [2.25, 3.5, 5])


def test_the_spread_of_a_head_is_told_among_those_with_as_many_hops():
    study = planted(GRIDS).data
    assert_allclose(why_table(study)["strength_entropy_percentile"], [[100, 0]] * 3)
    told = str(next(each for each in why_sentences(study, 1, 0) if "nats" in each))
    assert "1.20 nats of entropy, the widest of all heads on grids as fine" in told
    assert "it looks 3.0 patches of L0 far on average" in told


def test_a_head_alone_on_its_grid_is_compared_with_no_other():
    study = planted(GRIDS).data
    study["strength_entropy"] = study["strength_entropy"].copy()
    study["strength_entropy"][:, 0, 1] = np.nan  # as in a first stage of one layer with one head
    assert_allclose(why_table(study)["strength_entropy_percentile"], [[np.nan, np.nan], [100, 0], [100, 0]])
    told = str(next(each for each in why_sentences(study, 0, 0) if "nats" in each))
    assert "is 2.00 nats of entropy, and it looks 2.0 patches of L0 far" in told


@pytest.mark.parametrize("draw", [tendency_flow, tendency_arrows])
def test_pulls_are_drawn_in_one_unit(draw):
    figure = draw(planted(GRIDS).data)
    notes = [axes.get_title("right") for axes in figure.axes[:3]]
    assert notes == ["2.0", "3.0", "4.0"]
    assert "mean length in patches of L0" in " ".join(figure.get_supxlabel().split())
