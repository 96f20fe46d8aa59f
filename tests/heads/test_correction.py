"""Means of estimates that are corrected by a sample with exact values, on made-up studies with known answers."""

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import spearmanr

from vitrail.app.study_arrays import StudyArrays
from vitrail.heads.classes import class_table
from vitrail.heads.correction import (
    correct_mean,
    estimate_agreement,
    exact_part,
    exact_values,
    how_corrected,
    is_swept,
)
from vitrail.heads.head_values import head_values, importance_metrics
from vitrail.heads.summary import correct_estimate, head_table, heads_that_matter, pruning_table
from vitrail.heads.why import extreme_images, why_sentences, why_table
from vitrail.pruning.ranking import scores
from vitrail.study.table import study_summary

HEADS = ("image", "layer", "head")
N_IMAGES = 400


def study(n_images=N_IMAGES, seed=0):
    """L0H0 costs 0.4 +- 0.1 of probability and its estimate says a quarter of it; the second layer has one head."""
    rng = np.random.default_rng(seed)
    probability = rng.uniform(0.7, 0.9, n_images)
    lost = rng.normal(0.05, 0.02, (n_images, 2, 2))
    lost[:, 0, 0] = rng.normal(0.4, 0.1, n_images)
    lost[:, 1, 1] = np.nan
    rough = lost / 4 + rng.normal(0, 0.01, lost.shape)
    swept = np.array([is_swept(place) for place in range(n_images)])[:, None, None]
    label = rng.integers(0, 2, n_images)
    return xr.Dataset(
        {
            "probability": ("image", probability.astype(np.float32)),
            "label": ("image", label.astype(np.int32)),
            "prediction": ("image", label.astype(np.int32)),
            "head_probability": (HEADS, (probability[:, None, None] - rough).astype(np.float32)),
            "head_probability_exact": (
                HEADS,
                np.where(swept, probability[:, None, None] - lost, np.nan).astype(np.float32),
            ),
            "head_loss_change": (HEADS, (3 * rough).astype(np.float32)),
            "head_loss_change_exact": (HEADS, np.where(swept, 3 * lost, np.nan).astype(np.float32)),
            "head_token_shift": (HEADS, np.abs(lost).astype(np.float32)),
        },
        coords={"image": [f"{at}.jpg" for at in range(n_images)]},
        attrs={"n_heads": [2, 1], "lost": lost},
    )


def by_hand(data, name):
    """The corrected mean of a measure of `study` and its interval, without anything that knows of studies."""
    if name == "drop":
        before = data["probability"].to_numpy().astype(np.float64)[:, None, None]
        rough, exact = before - data["head_probability"].to_numpy(), before - data["head_probability_exact"].to_numpy()
    else:
        rough, exact = data[name].to_numpy(), data[f"{name}_exact"].to_numpy()
    sample = np.flatnonzero(~np.isnan(exact[:, 0, 0]))
    return correct_estimate(rough, sample, exact[sample])


def test_one_place_of_four_is_swept_and_no_period_decides_which():
    swept = np.array([is_swept(place) for place in range(4000)]).reshape(1000, 4)
    assert_array_equal(swept.sum(1), 1)
    assert (np.abs(swept.mean(0) - 0.25) < 0.05).all()
    assert abs(np.corrcoef(swept[:-1, 0], swept[1:, 0])[0, 1]) < 0.1


def ranked_study(n_images=60, n_swept=30, seed=0):
    """12 heads that cost more from one to the next; the estimate sees half of that and noise of its own."""
    rng = np.random.default_rng(seed)
    lost = np.linspace(0.01, 0.12, 12) * np.exp(rng.normal(0, 1, (n_images, 12)))
    rough = lost / 2 * np.exp(rng.normal(0, 0.8, lost.shape))
    exact = np.where(np.arange(n_images)[:, None] < n_swept, 0.9 - lost, np.nan)
    values = [each.reshape(n_images, 3, 4).astype(np.float32) for each in (0.9 - rough, exact)]
    return xr.Dataset({"head_probability": (HEADS, values[0]), "head_probability_exact": (HEADS, values[1])})


def test_an_estimates_agreement_is_the_rank_correlation_on_the_images_that_have_both_with_their_jackknife():
    data = ranked_study()
    found = estimate_agreement(data)
    rough, exact = (data[name].to_numpy()[:30].reshape(30, 12).astype(np.float64) for name in data)
    assert_allclose(found.correlation, spearmanr(rough.mean(0), exact.mean(0)).statistic)
    left_out = []
    for image in range(30):
        others = np.arange(30) != image
        left_out.append(spearmanr(rough[others].mean(0), exact[others].mean(0)).statistic)
    error = np.sqrt(29 / 30 * ((np.array(left_out) - np.mean(left_out)) ** 2).sum())
    ends = np.clip(found.correlation + np.array([-1.96, 1.96]) * error, -1, 1)
    assert_allclose([found.low, found.high], ends, atol=1e-4)
    assert (found.measure, found.n_images) == ("head_probability", 30)
    assert found.low < found.correlation < found.high


def test_the_interval_of_an_agreement_holds_what_as_many_images_show():
    agreements = [estimate_agreement(ranked_study(n_images=30, seed=seed)) for seed in range(60)]
    truth = np.mean([each.correlation for each in agreements])
    assert np.mean([each.low <= truth <= each.high for each in agreements]) >= 0.95 - 2 * np.sqrt(0.95 * 0.05 / 60)
    assert np.mean([each.high - each.low for each in agreements]) < 0.5  # and says something


def test_an_agreement_without_exact_values_or_with_few_or_with_no_doubt_has_no_interval():
    assert estimate_agreement(ranked_study().drop_vars("head_probability_exact")) is None
    assert estimate_agreement(ranked_study(n_swept=0)) is None
    for few in (ranked_study(n_swept=24), ranked_study().isel(layer=[0, 1])):  # images; heads
        found = estimate_agreement(few)
        assert np.isfinite(found.correlation)
        assert np.isnan([found.low, found.high]).all()
    same = ranked_study()
    same["head_probability"] = same["head_probability_exact"]
    sure = estimate_agreement(same)
    assert_allclose(sure.correlation, 1)
    assert np.isnan([sure.low, sure.high]).all()


@pytest.mark.parametrize("name", ["drop", "head_probability", "head_loss_change"])
def test_the_table_has_the_mean_and_interval_that_correcting_by_hand_gives(name):
    table, expected = head_table(study()), by_hand(study(), name)
    for column, values in zip(("mean", "low", "high"), expected, strict=True):
        assert_allclose(table[f"{name}_{column}"], values, rtol=1e-6, atol=1e-9, err_msg=column)
    assert np.isnan(table[f"{name}_mean"][1, 1])
    assert table.attrs["corrected"] == "corrected by 100 exact images"


def test_the_mean_is_that_of_all_images_where_the_estimate_says_a_quarter():
    data = study()
    table, truth = head_table(data), data.attrs["lost"].mean(0)
    assert_allclose(table["drop_mean"], truth, atol=0.01)
    assert_allclose((data["probability"] - data["head_probability"]).mean("image")[0, 0], truth[0, 0] / 4, atol=0.01)
    width = (table["drop_high"] - table["drop_low"])[0, 0]
    alone = (table["head_probability_exact_high"] - table["head_probability_exact_low"])[0, 0]
    assert float(width) < 0.75 * float(alone)  # the estimate knows where the other images lie


def test_what_is_no_mean_is_of_the_exact_images():
    data, table = study(), head_table(study())
    exact = exact_values(data, "drop")
    rows = exact[~np.isnan(exact[:, 0, 0])]
    assert_allclose(table["drop_median"], np.median(rows, 0))
    assert_allclose(table["drop_share_large"][0], (rows > 0.1).mean(0)[0])
    assert table["drop_may_be_largest"].values[0].tolist() == [1, 0]
    assert len(heads_that_matter(data)) == len(rows) == 100
    assert_array_equal(heads_that_matter(data), (rows > 0.1).sum((1, 2)))
    assert exact_part(data).sizes["image"] == 100
    assert_allclose(class_table(data)["n_images"].sum(), 100)


def test_below_25_exact_images_nothing_is_corrected_and_the_reason_stands_in_place_of_the_interval():
    few = study().isel(image=slice(96))
    table = head_table(few)
    assert "corrected" not in table.attrs
    assert how_corrected(few) == ""
    assert "every head was pruned on 24 of these images" in table.attrs["no_interval"]
    assert "take 100 images or more" in table.attrs["no_interval"]
    assert np.isnan(table["drop_low"]).all()
    estimated = few["probability"].to_numpy().astype(float)[:, None, None] - few["head_probability"].to_numpy()
    assert_allclose(table["drop_mean"], estimated.mean(0))
    assert exact_part(few) is few
    assert correct_mean(few["head_loss_change"].to_numpy(), few["head_loss_change_exact"].to_numpy()) is None


def test_studies_without_exact_values_of_a_sample_are_what_they_were():
    names = ["head_probability_exact", "head_loss_change_exact"]
    plain = study().drop_vars(names)
    table = head_table(plain)
    assert "corrected" not in table.attrs
    estimated = plain["probability"].to_numpy().astype(float)[:, None, None] - plain["head_probability"].to_numpy()
    assert_allclose(table["drop_mean"], estimated.mean(0))
    assert np.isfinite(table["drop_low"][0]).all()
    xr.testing.assert_identical(table["head_token_shift_mean"], head_table(study())["head_token_shift_mean"])


def test_an_interval_without_an_end_is_none_and_says_why():
    data = study(100)
    rare = np.where(np.isnan(data["head_loss_change_exact"]), np.nan, 0.0)
    rare[np.flatnonzero(~np.isnan(rare[:, 0, 0]))[0], 0, 0] = 1.0
    rough = np.where(np.isnan(data["head_loss_change"]), np.nan, 0.0)
    mean, low, high = correct_mean(rough, rare)
    assert_allclose(mean[0, 0], 1 / 25)
    assert np.isnan([low[0, 0], high[0, 0]]).all()
    data["head_loss_change_exact"], data["head_loss_change"] = (HEADS, rare), (HEADS, rough)
    assert "too few exact values differ" in head_table(data).attrs["no_interval"]


class TestWhoeverShowsAMeanShowsTheCorrectedOne:
    def test_why_a_head_matters(self):
        data, expected = study(), by_hand(study(), "drop")
        assert_allclose(why_table(data)["drop_mean"], expected.mean, rtol=1e-6)
        assert_allclose(why_table(data)["head_loss_change_mean"], by_hand(data, "head_loss_change").mean, rtol=1e-6)
        assert_allclose(pruning_table(data, 0, 0)["drop_low"], expected.low[0, 0], rtol=1e-6)
        text = str(why_sentences(data, 0, 0)[0])
        assert f"loses {expected.mean[0, 0]:.3f}" in text
        assert "corrected by 100 exact images" in text
        assert "of 100 images" in text
        most, least = extreme_images(data, 0, 0)
        assert all(is_swept(int(place)) for place in (*most, *least))

    def test_figures(self):
        data, expected = study(), by_hand(study(), "head_probability")
        values = head_values(data, "head_probability")
        assert_allclose(values.values, expected.mean, rtol=1e-6)
        assert_allclose(values.high, expected.high, rtol=1e-6)
        assert values.description == "mean over 400 images, corrected by 100 exact images"
        exact = data["head_probability_exact"].to_numpy()
        assert_allclose(values.spread[:, 0], np.nanquantile(exact[:, 0], (0.05, 0.95), axis=0), rtol=1e-6)
        of_exact, swept = head_values(data, "head_probability_exact"), ~np.isnan(exact).all((1, 2))
        assert_allclose(of_exact.unpruned, data["probability"].to_numpy()[swept].mean())
        assert not {"head_probability_exact", "head_loss_change_exact"} & set(importance_metrics(data))

    def test_rankings_of_heads_that_are_pruned_together(self):
        data = study()
        assert_allclose(scores(data)["probability"], by_hand(data, "drop").mean, rtol=1e-6)
        assert_allclose(scores(data)["loss"], by_hand(data, "head_loss_change").mean, rtol=1e-6)

    def test_the_summary_of_a_study_in_a_terminal(self, monkeypatch, tmp_path):
        monkeypatch.setattr("vitrail.study.table._headline", lambda *_: "")
        monkeypatch.setattr("vitrail.study.table._skip_lines", lambda *_: [])
        monkeypatch.setattr("vitrail.study.table._scaling_lines", lambda *_: [])
        *_, words = study_summary(study(), tmp_path)
        assert str(words) == "p lost: estimated on all images and corrected by 100 exact images"
        *_, table = study_summary(study().isel(image=slice(96)), tmp_path)
        assert table.title == "heads that matter most"

    def test_the_page(self):
        data, expected = study(), by_hand(study(), "drop")
        arrays = StudyArrays(data)
        dims, summary = arrays.summary("head_probability", None, False, {}, is_cost=True)
        assert dims == ("layer", "head")
        for at, values in enumerate(expected):
            assert_allclose(summary.values[at], values, rtol=1e-4)
        assert summary.interval == "studentised bootstrap, corrected by 100 exact images"
        assert summary.quantiles_of == 100
        assert_allclose(summary.values[4], head_table(data)["drop_median"], rtol=1e-4)
        _, one = arrays.summary("head_probability", None, False, {"layer": 0, "head": 0}, is_cost=True)
        assert_allclose(one.values, summary.values[:, 0, 0])
        _, over_heads = arrays.summary("head_loss_change", None, True, {})
        assert_allclose(over_heads.values[0, 0], by_hand(data, "head_loss_change").mean[0].mean(), rtol=0.02)
        _, few = arrays.summary("head_probability", np.arange(40), False, {}, is_cost=True)
        assert np.isnan(few.values[1:3]).all()
        assert "every head was pruned on 10 of these images" in few.interval
        start = arrays.start()
        assert (start["layer"], start["head"]) == (0, 0)
