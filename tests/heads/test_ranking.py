"""Rankings and their pruning curves: known areas, and a toy whose label one planted head carries."""

import numpy as np
import pytest
import torch
import xarray as xr
from head_models import PLANTED, PlantedViT, bright_and_dark_images
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from vitrail import open_vit
from vitrail.analysis import analyses, make_collectors
from vitrail.errors import UsageError
from vitrail.pruning.masked import predictions_without
from vitrail.pruning.ranking import Curves, area_table, halves, orders, parse_heads, random_orders, scores

COUNTS = np.array([0, 1, 2, 4])


def curves(least, most, random):
    """Curves of accuracies, as answers of 100 images of which so many are right, the same in each."""
    answers = lambda accuracies: np.arange(100) < np.round(100 * np.asarray(accuracies))[..., None]  # noqa: E731
    return Curves(COUNTS, {"known": answers(least)}, {"known": answers(most)}, answers(random))


def planted_study():
    """What a study of the planted toy holds."""
    images, labels = bright_and_dark_images(16)
    vit = open_vit(PlantedViT().eval(), image_size=(16, 16))
    arrays = {}
    for collector in make_collectors(
        vit, [name for name in analyses()["heads"].measure_names if name.startswith("head_")]
    ):
        replay, logits = vit.tap().record(images, collector.readers())
        arrays |= collector.finish(vit.tap(), replay, logits, labels.numpy().astype(np.int64))
    probability = logits.softmax(-1)[range(16), labels].numpy()
    data = {name: (("image", "layer", "head"), values) for name, values in arrays.items()}
    base = {"label": labels.numpy(), "prediction": logits.argmax(-1).numpy(), "probability": probability}
    return vit, images, xr.Dataset(data | {name: ("image", values) for name, values in base.items()})


def test_areas_are_the_trapezoids_under_the_curves_over_the_share_of_heads_pruned():
    table = area_table(curves([1.0, 1.0, 0.8, 0.0], [1.0, 0.2, 0.0, 0.0], [[1.0, 0.5, 0.5, 0.0]] * 3))
    area = table["known"]
    assert_allclose(area.least[0], (1.0 + 0.9 + 0.4 * 2) / 4)
    assert_allclose(area.most[0], (0.6 + 0.1 + 0.0) / 4)
    assert_allclose(area.between[0], area.least[0] - area.most[0])
    assert_allclose(area.over_random[0], area.least[0] - (0.75 + 0.5 + 0.25 * 2) / 4)
    assert_allclose(area.under_random[0], area.most[0] - (0.75 + 0.5 + 0.25 * 2) / 4)
    assert area.beaten == 1.0


def test_a_ranking_that_knows_has_a_positive_area_its_reverse_a_negative_and_none_is_zero():
    good, bad, chance = [1.0, 0.9, 0.8, 0.0], [1.0, 0.3, 0.1, 0.0], [[1.0, 0.6, 0.4, 0.0]] * 5
    known = area_table(curves(good, bad, chance))["known"]
    assert known.between[1] > 0
    assert known.over_random[1] > 0 > known.under_random[2]
    assert area_table(curves(bad, good, chance))["known"].between[2] < 0
    value, low, high = area_table(curves(good, good, chance))["known"].between
    assert abs(value) < 1e-12
    assert low < 0 < high  # no difference in these images is not: no difference


def test_rankings_are_sorted_by_the_area_between_their_curves():
    one = curves([1, 0.9, 0.8, 0], [1, 0.3, 0.1, 0], [[1, 0.6, 0.4, 0]])
    both = Curves(
        COUNTS, {"poor": one.most["known"], "good": one.least["known"]},
        {"poor": one.least["known"], "good": one.most["known"]}, one.random,
    )  # fmt: skip
    assert list(area_table(both)) == ["good", "poor"]


def test_the_interval_over_random_counts_the_spread_of_the_orders_too():
    rng = np.random.default_rng(0)
    alike = np.repeat(rng.random((1, 4, 400)) < 0.5, 12, 0)
    spread = rng.random((12, 1, 400)) < rng.uniform(0.2, 0.8, (12, 1, 1))
    least = {"any": rng.random((4, 400)) < 0.5}
    width = lambda random: np.diff(area_table(Curves(COUNTS, least, least, random))["any"].over_random[1:])  # noqa: E731
    assert width(np.repeat(spread, 4, 1)) > 1.5 * width(alike)


def by_chance(rng, n_rankings, n_orders=8, n_images=40, n_heads=12):
    """Curves of rankings that know nothing of the heads, each of which gives every image something else."""
    gives = rng.lognormal(-1, 1, n_heads) * (1 + 0.5 * rng.normal(size=(n_images, n_heads)))
    needs = rng.uniform(0, 2, (n_images, 1))
    right = lambda order: (needs - gives[:, order].cumsum(1) > 0).T  # noqa: E731
    drawn = {f"r{at}": rng.permutation(n_heads) for at in range(n_rankings)}
    return Curves(
        np.arange(n_heads),
        {name: right(order) for name, order in drawn.items()},
        {name: right(order[::-1]) for name, order in drawn.items()},
        np.stack([right(rng.permutation(n_heads)) for _ in range(n_orders)]),
    )


def test_rankings_that_know_nothing_lie_within_what_chance_gives_the_best_of_them():
    """The interval over images leaves 0 out in most of these studies; what one more order may do, in none."""
    rng = np.random.default_rng(0)
    best = [next(iter(area_table(by_chance(rng, 6)).values())) for _ in range(8)]
    assert sum(area.between[1] > 0 for area in best) > 4
    assert all(area.between[0] < area.chance for area in best)
    assert all(area.over_random[1] < 0 for area in best)


def test_chance_counts_the_rankings_and_one_random_order_says_nothing_of_others():
    one = by_chance(np.random.default_rng(0), 1)
    accuracy = one.random.mean(-1)
    areas = ((accuracy[:, 1:] + accuracy[:, :-1]) / 2).mean(1)
    assert_allclose(area_table(one)["r0"].chance, 2 * 2.3646 * areas.std(ddof=1), rtol=1e-3)  # t of 7 degrees
    least, most = (dict.fromkeys("abcdef", ends["r0"]) for ends in (one.least, one.most))
    six = Curves(one.counts, least, most, one.random)
    assert area_table(six)["a"].chance > 1.3 * area_table(one)["r0"].chance
    alone = area_table(Curves(one.counts, one.least, one.most, one.random[:1]))["r0"]
    assert np.isnan([alone.chance, *alone.over_random[1:]]).all()


@pytest.mark.parametrize("n_orders", [2, 3])
def test_chance_by_two_or_three_orders_reaches_no_further_than_an_area_can(n_orders):
    levels = np.linspace(0.1, 0.9, n_orders)[:, None] * np.ones(4)
    area = area_table(curves([1.0, 1.0, 0.8, 0.0], [1.0, 0.2, 0.0, 0.0], levels))["known"]
    assert area.chance == 1
    assert area.over_random[1:] == area.under_random[1:] == (-1, 1)


def test_an_area_under_one_curve_is_no_less_than_nothing():
    right = np.ones((3, 5), bool)
    right[2] = False
    area = area_table(Curves(np.array([0, 4, 8]), {"any": right}, {"any": right}, np.stack([right] * 3)))["any"]
    assert_allclose(area.least[0], 0.75)
    assert 0.2 < area.least[1] < 0.75 < area.least[2] <= 1


def test_the_planted_head_destroys_the_accuracy_when_pruned_first_and_keeps_it_when_pruned_last():
    vit, images, study = planted_study()
    labels = study["label"].to_numpy()
    ranked = scores(study)
    assert set(ranked) == {
        "probability", "divergence", "loss", "flips", "accuracy", "class token", "tokens", "class token, L2",
        "tokens, L2",
    }  # fmt: skip
    for name in ("probability", "divergence", "loss", "flips", "accuracy", "class token"):
        order = orders(ranked[name])
        assert order[-1] == PLANTED, name
        counts = [0, 1, 6, 11]
        least = predictions_without(vit, images, [order[:count] for count in counts]) == labels
        most = predictions_without(vit, images, [order[::-1][:count] for count in counts]) == labels
        assert_array_equal(least.mean(-1), 1.0)
        assert (most.mean(-1)[1:] < 0.75).all()  # two classes: what the faint heads leave is near chance or wrong


def test_halves_share_no_image_and_hold_all_of_them():
    found = halves(11, seed=3)
    assert len(found.calibration) == 5
    assert sorted([*found.calibration, *found.test]) == list(range(11))
    assert_array_equal(halves(11, seed=3).test, found.test)
    assert not np.array_equal(halves(11, seed=4).test, found.test)
    with pytest.raises(UsageError, match="at least 2 images"):
        halves(1)


def test_rankings_of_some_images_do_not_see_the_others():
    _, _, study = planted_study()
    part = scores(study, np.arange(4))
    other = study.copy(deep=True)
    other["head_divergence"][4:] = 1e9
    assert_allclose(scores(other, np.arange(4))["divergence"], part["divergence"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=6, max_size=6, unique=True), st.integers(0, 5))
def test_an_order_goes_from_the_least_to_the_most_important_and_leaves_missing_heads_out(values, missing):
    ranking = np.array(values).reshape(2, 3)
    ranking.flat[missing] = np.nan
    found = orders(ranking)
    assert len(found) == 5
    assert np.unravel_index(missing, (2, 3)) not in found
    assert_array_equal(np.diff([ranking[pair] for pair in found]) > 0, True)
    assert orders(-ranking) == found[::-1]


def test_random_orders_hold_the_same_heads_each_in_another_order():
    heads = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    found = random_orders(heads, 4, seed=1)
    assert all(sorted(order) == heads for order in found)
    assert len({tuple(order) for order in found}) > 1
    assert found == random_orders(heads, 4, seed=1)


def test_a_study_without_importance_ranks_nothing():
    with pytest.raises(UsageError, match="no measure of importance"):
        scores(xr.Dataset({"strength_entropy": (("image", "layer", "head"), np.ones((3, 2, 2)))}))


def test_a_model_without_classifier_is_ranked_by_what_it_has():
    shape = (("image", "layer", "head"), np.random.default_rng(0).random((3, 2, 2)))
    assert set(scores(xr.Dataset({"head_divergence": shape, "head_token_shift": shape}))) == {"divergence", "tokens"}


def test_heads_are_written_as_layer_and_head():
    assert parse_heads("L0H4,L3H1, l11h0") == [(0, 4), (3, 1), (11, 0)]
    for wrong in ("", "H4", "L0H4;L1H1", "L0", "3,1"):
        with pytest.raises(UsageError, match="L0H4,L3H1"):
            parse_heads(wrong)
    with pytest.raises(UsageError, match="twice"):
        parse_heads("L0H4,L0H4")


def test_one_layer_with_one_head_is_ranked_too():
    study = xr.Dataset({"head_divergence": (("image", "layer", "head"), torch.rand(2, 1, 1).numpy())})
    assert orders(scores(study)["divergence"]) == [(0, 0)]
