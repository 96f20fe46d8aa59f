"""Intervals and comparisons: their coverage by simulation, and closed forms."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from vitrail.errors import UsageError
from vitrail.stats import (
    candidates_for_largest,
    group_p_values,
    mean_bounds,
    mean_interval,
    moment_interval,
    paired_interval,
    quantile_interval,
    share_interval,
    sign_flip_p_values,
    simultaneous_intervals,
    spearman,
    upper_bound,
)

STUDIES = 2000
TOLERANCE = 2 * np.sqrt(0.93 * 0.07 / STUDIES)
"""Two standard errors of a coverage of 93 % over so many simulated studies: about one point."""


def spike(rng, size, share=0.05):
    """Mostly zero; a rare value between a half and one."""
    return (rng.random(size) < share) * rng.uniform(0.5, 1, size)


DISTRIBUTIONS = {
    "normal": (lambda rng, size: np.clip(rng.normal(0.1, 0.05, size), -1, 1), 0.1),
    "Beta(0.3, 2)": (lambda rng, size: rng.beta(0.3, 2, size), 0.3 / 2.3),
    "spike": (spike, 0.05 * 0.75),
    "flip 5 %": (lambda rng, size: rng.random(size) < 0.05, 0.05),
    "flip 20 %": (lambda rng, size: rng.random(size) < 0.2, 0.2),
}


@pytest.mark.parametrize("n_images", [25, 60])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_intervals_of_a_mean_cover_at_least_93_percent(name, n_images):
    draw, mean = DISTRIBUTIONS[name]
    found = mean_interval(draw(np.random.default_rng(n_images), (n_images, STUDIES)), limits=(-1.0, 1.0))
    assert not np.isnan(found.low).any()
    assert ((found.low <= mean) & (mean <= found.high)).mean() >= 0.93 - TOLERANCE


@pytest.mark.parametrize("n_images", [25, 60])
@pytest.mark.parametrize("name", ["normal", "Beta(0.3, 2)", "spike"])
def test_without_a_range_what_is_claimed_is_wrong_in_at_most_7_percent_of_studies(name, n_images):
    draw, mean = DISTRIBUTIONS[name]
    found = mean_interval(draw(np.random.default_rng(n_images), (n_images, STUDIES)))
    claimed = ~np.isnan(found.low)
    assert (claimed & ~((found.low <= mean) & (mean <= found.high))).mean() <= 0.07 + TOLERANCE
    if name == "spike":
        assert "too few images" in found.reason
    else:
        assert claimed.all()


def test_a_loss_that_the_sample_may_not_hold_is_within_the_upper_bound_though_the_interval_misses_it():
    rng = np.random.default_rng(0)
    values = (rng.random((25, STUDIES)) < 0.05) * 0.9 + rng.normal(0, 0.005, (25, STUDIES))
    assert (mean_interval(values, limits=(-1.0, 1.0)).high < 0.045).mean() > 0.2  # no sample tells of what it lacks
    assert (upper_bound(values, (-1.0, 1.0)) >= 0.045).mean() >= 0.95
    bounds = mean_bounds(values, (-1.0, 1.0))
    assert ((bounds.low <= 0.045) & (bounds.high >= 0.045)).mean() >= 0.95


def test_the_bootstrap_agrees_with_students_interval_where_that_is_exact():
    values = np.random.default_rng(0).normal(3, 2, (40, 300))
    found = mean_interval(values)
    low, high = scipy.stats.t.interval(0.95, 39, values.mean(0), values.std(0, ddof=1) / np.sqrt(40))
    assert_allclose((found.high - found.low).mean(), (high - low).mean(), rtol=0.05)
    assert_allclose(found.low.mean(), low.mean(), atol=0.03)


def test_many_images_give_the_same_interval_with_and_without_drawing():
    values = np.random.default_rng(0).gamma(3.0, size=(499, 200))
    drawn = mean_interval(values)
    spread, centred = values.std(0), values - values.mean(0)
    more = np.concatenate([values, values[:1]])  # one image more: computed from moments
    width = (drawn.high - drawn.low).mean()
    assert_allclose(mean_interval(more).low.mean(), drawn.low.mean(), atol=0.02 * width)
    assert_allclose(mean_interval(more).high.mean(), drawn.high.mean(), atol=0.02 * width)
    moments = moment_interval(values.mean(0), spread**2, (centred**3).mean(0) / spread**3, 500)
    assert_allclose(moments.high.mean(), drawn.high.mean(), atol=0.02 * width)


def test_moments_of_few_or_very_skewed_images_have_no_interval_and_a_reason():
    one = np.ones(1)
    assert np.isnan(moment_interval(one, one, one, 499).low).all()
    skewed = moment_interval(one, one, 30 * one, 1000)
    assert np.isnan(skewed.high).all()
    assert "too few images" in skewed.reason


def test_shares_are_those_of_clopper_and_pearson():
    for count, n_images in ((0, 8), (1, 8), (8, 8), (3, 25), (30, 60)):
        values = np.arange(n_images) < count
        exact = scipy.stats.binomtest(count, n_images).proportion_ci(0.95, "exact")
        found = share_interval(values)
        assert_allclose([found.low, found.high], [exact.low, exact.high], atol=1e-9)
        bounds = mean_bounds(values.astype(float), (0.0, 1.0))
        assert_allclose([bounds.low, bounds.high], [exact.low, exact.high], atol=0.02)
    assert_allclose(share_interval(np.zeros(8, bool)).high, 0.3694, atol=1e-4)
    with pytest.raises(UsageError, match="not all 0 or 1"):
        share_interval(np.array([0.0, 0.5]))


@pytest.mark.parametrize("quantile", [0.05, 0.5, 0.95])
def test_intervals_of_quantiles_cover_and_those_that_cannot_are_refused(quantile):
    values = np.random.default_rng(1).exponential(size=(80, STUDIES))
    found = quantile_interval(values, quantile)
    truth = scipy.stats.expon.ppf(quantile)
    assert found.reason == ""
    assert ((found.low <= truth) & (truth <= found.high)).mean() >= 0.95 - TOLERANCE


@pytest.mark.parametrize("n_images", [6, 72, 73, 1000, 1_300_000])
def test_intervals_of_quantiles_end_at_the_order_statistics_of_the_binomial(n_images):
    """Values that are their own ranks tell which of them were taken."""
    for quantile in (0.05, 0.5, 0.95) if n_images > 100 else (0.5,):
        found = quantile_interval(np.arange(1, n_images + 1), quantile)
        count = scipy.stats.binom(n_images, quantile)
        assert [found.low, found.high] == [count.ppf(0.025), count.isf(0.025) + 1]


def test_a_quantile_that_few_images_bound_on_one_side_only_has_no_interval_but_within_a_range():
    values = np.random.default_rng(1).random((25, 3))
    found = quantile_interval(values, 0.05)
    assert np.isnan([found.low, found.high]).all()
    assert "5 % quantile" in found.reason
    assert_array_equal(quantile_interval(values, 0.05, limits=(0.0, 1.0)).low, 0)
    median = quantile_interval(values[:, 0], 0.5)  # the 8th and the 18th of 25, by any table of the sign test
    assert_array_equal([median.low, median.high], np.sort(values[:, 0])[[7, 17]])


def test_images_without_a_value_are_left_out_of_their_column_alone():
    values = np.random.default_rng(2).normal(size=(30, 3))
    holes = values.copy()
    holes[20:, 1], holes[:, 2] = np.nan, np.nan
    for interval in (mean_interval, lambda values: quantile_interval(values, 0.5)):
        found, full, part = interval(holes), interval(values[:, :1]), interval(values[:20, 1:2])
        assert_allclose(found.low[:2], [full.low[0], part.low[0]], rtol=1e-9)
        assert_allclose(found.high[:2], [full.high[0], part.high[0]], rtol=1e-9)
        assert np.isnan(found.low[2])
        assert found.reason == ""  # the absent column is no lack of images


def test_a_reason_is_of_the_columns_that_lack_an_interval_and_of_the_images_that_have_a_value():
    values = np.random.default_rng(0).random((60, 12))
    values[:, 3] = 0.5
    for found in (simultaneous_intervals(values, limits=(0.0, 1.0)), mean_interval(values)):
        assert np.isnan(found.low).sum() == 1
        assert found.reason == "the same value in all images (60), for 1 of 12 columns"
    values[5:] = np.nan
    assert mean_interval(values[:, :3]).reason == "too few images (5; 8 are needed)"
    assert quantile_interval(values[:, :3], 0.5).reason == "too few images (5) for the 50 % quantile"
    values = np.random.default_rng(0).random((60, 2))
    values[:20, 0] = np.nan
    assert simultaneous_intervals(values).reason == "20 of 60 images without a value, for 1 of 2 columns"


def test_where_no_interval_can_be_trusted_the_ends_are_nan_and_the_reason_is_said():
    rng = np.random.default_rng(0)
    assert mean_interval(rng.normal(size=(1, 2))).reason == "a single image says nothing of others"
    few = mean_interval(rng.normal(size=(5, 2)))
    assert np.isnan(few.low).all()
    assert "too few images (5; 8 are needed)" in few.reason
    same = mean_interval(np.full(50, 0.1))
    assert np.isnan(same.low)
    assert same.reason == "the same value in all images (50)"
    assert_allclose(mean_interval(np.zeros(50), limits=(0.0, 1.0)).high, 1 - 0.025 ** (1 / 50), atol=0.01)
    with pytest.raises(UsageError, match="found 0 to 2"):
        mean_interval(np.array([0.0, 2.0]), limits=(0.0, 1.0))
    with pytest.raises(UsageError, match="infinite"):
        mean_interval(np.array([0.0, np.inf]))
    with pytest.raises(UsageError, match="no image"):
        mean_interval(np.zeros((0, 3)))


def test_paired_differences_of_answers_know_their_range():
    one, other = np.arange(30) < 20, np.arange(30) < 20
    found = paired_interval(one, other)
    assert -0.2 < found.low < 0 < found.high < 0.2  # never a difference in 30: not "no difference, for certain"
    with pytest.raises(UsageError, match="same images"):
        paired_interval(one, other[:20])


@given(st.integers(0, 3), st.floats(0.5, 5), st.floats(-3, 3))
def test_intervals_follow_a_change_of_unit(seed, scale, offset):
    values = np.random.default_rng(seed).gamma(1.0, size=(20, 4))
    plain, changed = mean_interval(values), mean_interval(scale * values + offset)
    assert_allclose(changed.low, scale * plain.low + offset, rtol=1e-6, atol=1e-6)
    assert_allclose(changed.high, scale * plain.high + offset, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_images", [25, 60])
def test_simultaneous_intervals_hold_all_at_once_where_single_ones_do_not(n_images):
    rng = np.random.default_rng(0)
    together, alone = [], []
    for seed in range(60):
        values = rng.exponential(size=(n_images, 30))
        for found, covered in ((simultaneous_intervals(values, seed=seed), together), (mean_interval(values), alone)):
            covered.append(((found.low <= 1) & (found.high >= 1)).all())
    assert np.mean(together) >= 0.95 - 2 * np.sqrt(0.95 * 0.05 / 60)
    assert np.mean(alone) < 0.6


@pytest.mark.parametrize("n_images", [8, 25])
def test_equal_columns_all_stay_candidates_and_a_planted_one_is_alone(n_images):
    rng = np.random.default_rng(0)
    sets = [candidates_for_largest(rng.normal(size=(n_images, 30)), seed=seed) for seed in range(30)]
    assert np.mean(sets) >= 0.9  # each of them is one of the largest
    values = rng.normal(size=(n_images, 30))
    values[:, 4] += 9
    values[:, 7] = np.nan
    assert np.flatnonzero(candidates_for_largest(values)).tolist() == [4]
    assert candidates_for_largest(values[:5]).sum() == 29  # five images cannot tell


def test_a_column_ahead_by_the_same_in_every_image_is_the_largest():
    values = np.random.default_rng(0).normal(size=(20, 1)) + np.array([0.0, 1.0, 0.0])
    assert candidates_for_largest(values).tolist() == [False, True, False]


def test_a_column_of_equal_numbers_takes_no_p_value_from_others():
    values, groups = np.random.default_rng(0).normal(size=(60, 3)), np.arange(60) % 4
    values[groups == 0, 0] += 2
    with_equal = np.column_stack([values, np.full(60, 1 / 3)])  # whose standard deviation is 5e-17
    p_values = group_p_values(with_equal, groups)
    assert_allclose(p_values[:, :3], group_p_values(values, groups))
    assert p_values[0, 0] == 0.001
    assert np.isnan(p_values[:, 3]).all()


def test_groups_that_do_not_matter_are_starred_in_about_5_percent_of_studies_and_planted_ones_are():
    rng = np.random.default_rng(0)
    starred = []
    for seed in range(30):
        values, groups = rng.exponential(size=(65, 12)) ** 2, np.arange(65) % 13
        starred.append((group_p_values(values, groups, seed=seed) < 0.05).any())
    assert np.mean(starred) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 30)
    values[groups == 3, 5] += 20
    groups[-1] = 99
    p_values = group_p_values(values, groups)
    assert np.argwhere(p_values < 0.05).tolist() == [[3, 5]]
    assert np.isnan(p_values[-1]).all()  # a group of one


def test_spearman_is_that_of_scipy_and_refuses_nan():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 6, 40).astype(float), rng.normal(size=40)
    assert_allclose(spearman(one, other), scipy.stats.spearmanr(one, other).statistic, rtol=1e-12)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))
    one[3] = np.nan
    with pytest.raises(UsageError, match="1 of them hold NaN"):
        spearman(one, other)
    with pytest.raises(UsageError, match="40 and 39"):
        spearman(one, other[:-1])


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_a_sentence(seed: int) -> None:
    values = np.random.default_rng(0).gamma(1.0, size=(20, 4))
    for compute in (mean_interval, simultaneous_intervals, sign_flip_p_values, candidates_for_largest):
        with pytest.raises(UsageError, match=rf"The seed {seed} cannot be used"):
            compute(values, seed=seed)
