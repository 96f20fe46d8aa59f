"""The table over a data set, on small made-up studies with known answers."""

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose

from vitrail.analysis import declaration
from vitrail.errors import UsageError
from vitrail.heads.summary import (
    correct_estimate,
    head_table,
    heads_that_matter,
    rank_agreement,
    value_limits,
)


def study(n_images=200, seed=0):
    """Two layers; the second has one head only. L0H0 takes half the probability and flips every fourth image."""
    rng = np.random.default_rng(seed)
    probability = rng.uniform(0.6, 1.0, n_images)
    after = np.repeat(probability[:, None, None], 2, 1).repeat(2, 2)
    after[:, 0, 0] /= 2
    after[:, 1, 1] = np.nan
    label = rng.integers(0, 5, n_images)
    prediction = np.where(np.arange(n_images) % 10 == 0, (label + 1) % 5, label)
    pruned = np.repeat(prediction[:, None, None], 2, 1).repeat(2, 2)
    pruned[::4, 0, 0] = (pruned[::4, 0, 0] + 1) % 5
    pruned[:, 1, 1] = -1
    heads = ("image", "layer", "head")
    return xr.Dataset(
        {
            "probability": ("image", probability.astype(np.float32)),
            "label": ("image", label.astype(np.int32)),
            "prediction": ("image", prediction.astype(np.int32)),
            "head_probability": (heads, after.astype(np.float32)),
            "head_flip": (heads, pruned != prediction[:, None, None]),
            "head_prediction": (heads, pruned.astype(np.int32)),
        }
    )


def test_the_table_finds_the_planted_head_and_leaves_missing_heads_empty():
    table = head_table(study())
    assert_allclose(table["drop_mean"][0, 0], study()["probability"].mean() / 2, rtol=1e-6)
    assert_allclose(table["drop_mean"][0, 1], 0, atol=1e-7)
    assert_allclose(table["drop_share_large"].values, [[1, 0], [0, np.nan]])
    assert_allclose(table["flip_share"].values, [[0.25, 0], [0, np.nan]])
    assert_allclose(table["head_probability_median"][1, 0], np.median(study()["probability"]), rtol=1e-6)


def test_accuracy_counts_images_that_pruning_puts_right_as_well_as_those_it_breaks():
    data = study()
    right = (data["head_prediction"] == data["label"]).mean("image")
    table = head_table(data)
    assert_allclose(table["accuracy"][0], right[0])
    assert_allclose(table.attrs["accuracy"], 0.9)
    assert np.isnan(table["accuracy"][1, 1])
    assert table["accuracy_low"][0, 0] < table["accuracy"][0, 0] < table["accuracy_high"][0, 0]


def test_the_same_seed_gives_the_same_intervals_and_another_seed_others():
    data = study()
    xr.testing.assert_identical(head_table(data, seed=3), head_table(data, seed=3))
    assert abs(head_table(data, seed=3)["drop_low"][0, 0] - head_table(data, seed=4)["drop_low"][0, 0]) > 0


def test_a_study_without_images_has_no_table():
    with pytest.raises(UsageError, match="no images"):
        head_table(xr.Dataset())


def test_rank_agreement_is_over_heads_of_the_means_and_skips_missing_heads():
    exact = np.random.default_rng(0).uniform(size=(6, 3, 4))
    exact[:, 2, 3] = np.nan
    assert_allclose(rank_agreement(np.exp(3 * exact.mean(0, keepdims=True)), exact), 1.0)


def test_a_corrected_estimate_is_exact_where_estimate_and_truth_are_on_one_line():
    estimate = np.random.default_rng(0).normal(size=(50, 2, 3))
    truth = 2 * estimate + 1
    found = correct_estimate(estimate, np.arange(25), truth[:25])
    assert_allclose(found.mean, truth.mean(0), rtol=1e-9)


def test_a_corrected_estimate_has_a_smaller_error_than_the_sample_alone_and_an_honest_interval():
    rng = np.random.default_rng(0)
    estimate = rng.normal(size=(1000, 20, 20))
    truth = estimate + 0.3 * rng.normal(size=estimate.shape)
    found = correct_estimate(estimate, np.arange(60), truth[:60])
    error = np.abs(found.mean - truth.mean(0)).mean()
    assert error < 0.5 * np.abs(truth[:60].mean(0) - truth.mean(0)).mean()
    assert_allclose(((found.low < 0) & (found.high > 0)).mean(), 0.95, atol=0.04)


def test_correcting_with_too_few_exact_images_is_refused():
    with pytest.raises(UsageError, match="at least 25"):
        correct_estimate(np.zeros((99, 1, 1)), np.arange(24), np.zeros((24, 1, 1)))


def test_a_corrected_estimate_of_skewed_losses_covers_where_normal_theory_does_not():
    rng = np.random.default_rng(0)
    estimate = np.exp(rng.normal(size=(1000, 1, 400)))
    truth = estimate * np.exp(rng.normal(0, 0.5, estimate.shape))
    found, mean = correct_estimate(estimate, np.arange(30), truth[:30]), np.exp(0.5 + 0.125)
    # 90 % with two standard errors of 400 simulated studies; the normal interval of the same residuals covers 81 %.
    assert ((found.low <= mean) & (mean <= found.high)).mean() >= 0.9 - 2 * np.sqrt(0.9 * 0.1 / 400)


def test_a_bound_of_the_loss_is_small_only_where_enough_images_show_it():
    few, many = (head_table(study(n_images=n_images)) for n_images in (8, 200))
    assert few["drop_low"][0, 1] < 0 < few["drop_high"][0, 1]
    assert_allclose(few["drop_bound"][0, 1], 1 - 0.05 ** (1 / 8), atol=0.02)  # nothing lost in 8: up to 0.31
    assert_allclose(many["drop_bound"][0, 1], 1 - 0.05 ** (1 / 200), atol=0.002)
    assert_allclose(few["flip_share_high"][0, 1], 1 - 0.025 ** (1 / 8))  # 0 of 8 flips: up to 0.37
    assert many["drop_may_be_largest"].values[0].tolist() == [1, 0]


def test_every_statistic_comes_with_an_interval_around_it():
    table = head_table(study())
    for name, of in (
        ("drop_mean", "drop"), ("drop_median", "drop_median"), ("drop_q05", "drop_q05"), ("drop_q95", "drop_q95"),
        ("drop_share_large", "drop_share_large"), ("flip_share", "flip_share"), ("accuracy", "accuracy"),
        ("head_probability_mean", "head_probability"), ("head_probability_median", "head_probability_median"),
    ):  # fmt: skip
        low, value, high = (table[each].values[0, 0] for each in (f"{of}_low", name, f"{of}_high"))
        assert low <= value <= high, name
        assert np.isnan(table[f"{of}_low"].values[1, 1]), name


def test_a_single_image_has_statistics_and_no_intervals():
    table = head_table(study().isel(image=slice(1)))
    assert_allclose(table["drop_mean"][0, 0], study()["probability"][0] / 2, rtol=1e-6)
    for name in ("drop_low", "drop_median_high", "accuracy_low", "flip_share_high"):
        assert np.isnan(table[name]).all(), name


def test_heads_that_matter_are_counted_per_image():
    assert_allclose(heads_that_matter(study()), 1)
    with pytest.raises(UsageError, match="head_probability"):
        heads_that_matter(xr.Dataset())


def test_the_number_of_heads_in_the_plan_tells_which_are_there():
    flips = xr.Dataset(
        {"head_flip": (("image", "layer", "head"), np.zeros((3, 2, 2), bool))}, attrs={"n_heads": [2, 1]}
    )
    assert_allclose(head_table(flips)["flip_share"], [[0, 0], [0, np.nan]])


def test_the_range_of_values_is_what_the_measure_declares():
    assert value_limits("head_probability") == value_limits("occlusion_random") == (0.0, 1.0)
    assert value_limits("head_cls_shift") == (0.0, 2.0)
    assert value_limits("drop") == (-1.0, 1.0)
    assert value_limits("head_loss_change") is None
    assert value_limits("my_probability") is None


def test_a_range_that_is_none_is_refused():
    with pytest.raises(UsageError, match="lowest, highest"):
        replace(declaration("head_probability"), value_range=(1.0, 0.0))
