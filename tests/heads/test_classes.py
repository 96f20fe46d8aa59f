"""Heads by class on a made-up study with known answers."""

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose

from vitrail.errors import UsageError
from vitrail.heads.classes import class_table, heads_by_class


def study(labels=(0,) * 30 + (1,) * 20 + (2,), **attrs):
    """Class 0 needs L0H0, class 1 L1H0; the second layer has one head. Class 2 has one image."""
    label = np.array(labels)
    rng = np.random.default_rng(0)
    drop = rng.normal(0, 0.01, (len(label), 2, 2))
    drop[label == 0, 0, 0] += 0.4
    drop[label == 1, 1, 0] += 0.3
    drop[:, 1, 1] = np.nan
    return xr.Dataset(
        {
            "label": ("image", label),
            "prediction": ("image", label.copy()),
            "probability": ("image", np.full(len(label), 0.9)),
            "head_probability": (("image", "layer", "head"), 0.9 - drop),
        },
        attrs={"class_names": ["cat", "dog", "owl"], "labels": "given", **attrs},
    )


def simulated_study(seed, n_classes=13, n_of_class=6, planted=0.0):
    """Skewed losses that do not depend on the class, but for L1H2 in class 5 where an effect is planted."""
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(n_classes), n_of_class)
    drop = np.minimum(0.02 * rng.exponential(size=(len(label), 2, 4)), 0.5)
    drop[label == 5, 1, 2] += planted
    return xr.Dataset(
        {
            "label": ("image", label),
            "probability": ("image", np.full(len(label), 0.9)),
            "head_probability": (("image", "layer", "head"), 0.9 - drop),
        }
    )


def test_each_class_has_the_head_it_needs_first_with_an_interval_that_other_classes_lie_below():
    cat, dog, _ = heads_by_class(study())
    assert [(cat.name, cat.n_images), (dog.name, dog.n_images)] == [("cat", 30), ("dog", 20)]
    for found, head, drop in ((cat, (0, 0), 0.4), (dog, (1, 0), 0.3)):
        first = found.heads[0]
        assert (first.layer, first.head) == head
        assert_allclose(first.drop, drop, atol=0.01)
        assert first.low < first.drop < first.high
        assert_allclose(first.elsewhere, 0, atol=0.01)
        assert first.is_own
        assert not found.heads[1].drop > 0.05
        assert found.note == ""


def test_a_class_with_one_image_has_means_no_intervals_and_a_sentence():
    owl = heads_by_class(study())[-1]
    assert (owl.label, owl.n_images) == (2, 1)
    assert np.isnan([head.low for head in owl.heads]).all()
    assert "One image" in owl.note
    assert not any(head.is_own for head in owl.heads)


def test_a_head_that_a_layer_does_not_have_is_in_no_class():
    assert all(
        (head.layer, head.head) != (1, 1) for found in heads_by_class(study(), n_heads=9) for head in found.heads
    )
    assert np.isnan(class_table(study())["drop"][:, 1, 1]).all()


def test_the_table_holds_means_counts_and_accuracy_by_class():
    data = study()
    data["prediction"][:15] = 1  # half of the first class goes wrong
    table = class_table(data)
    assert table["drop"].dims == ("class", "layer", "head")
    assert table["n_images"].values.tolist() == [30, 20, 1]
    assert_allclose(table["accuracy"], [0.5, 1, 1])
    mine = 0.9 - data["head_probability"].values[data["label"].values == 1]
    assert_allclose(table["drop"][1], mine.mean(0))


def test_one_class_alone_has_nothing_to_compare_with_and_says_so():
    (only,) = heads_by_class(study(labels=(0,) * 5))
    assert "nothing to compare" in only.note
    assert np.isnan(only.heads[0].elsewhere)
    assert not only.heads[0].is_own


def test_without_labels_classes_are_the_models_predictions_and_the_note_says_so():
    found = heads_by_class(study().assign_attrs(labels="predicted"))
    assert all("no labels" in each.note for each in found)


def test_one_image_with_one_layer_and_one_head_is_answered():
    data = study(labels=(1,)).isel(layer=slice(1), head=slice(1))
    (only,) = heads_by_class(data)
    assert len(only.heads) == 1
    assert "One image" in only.note


def test_what_cannot_be_answered_is_refused_with_what_to_do():
    with pytest.raises(UsageError, match="without a classifier there are no classes"):
        heads_by_class(study().drop_vars(["head_probability", "probability"]))
    with pytest.raises(UsageError, match="no images"):
        heads_by_class(study().isel(image=slice(0)))


def test_where_classes_do_not_matter_no_head_is_starred_in_19_of_20_studies():
    n_studies = 60
    starred = sum(
        any(head.is_own for each in heads_by_class(simulated_study(seed)) for head in each.heads)
        for seed in range(n_studies)
    )
    assert starred <= 0.07 * n_studies


def test_a_planted_head_is_starred_in_its_class_and_in_no_other():
    starred = [
        (each.label, head.layer, head.head)
        for each in heads_by_class(simulated_study(0, planted=0.2))
        for head in each.heads
        if head.is_own
    ]
    assert starred == [(5, 1, 2)]
