"""Why a head is important: the table and the sentences, from planted studies."""

import re

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal
from planted_patterns import FAMILIES, GRID

from vitrail.errors import UsageError
from vitrail.heads import why
from vitrail.heads.summary import head_table, pruning_table
from vitrail.heads.why import extreme_images, missing, why_sentences, why_table
from vitrail.patterns.names import RULES

N_IMAGES, N_LAYERS, N_HEADS = 40, 3, 2
SHAPE = (N_IMAGES, N_LAYERS, N_HEADS)
IMPORTANT = (1, 0)


def rules_of(family: str) -> np.ndarray:
    import torch

    from vitrail.patterns.rules import rule_values

    return rule_values(torch.as_tensor(FAMILIES[family], dtype=torch.float32), GRID).numpy()


@pytest.fixture
def study() -> xr.Dataset:
    """L1H0 costs the label half of its probability, through its patches; image 7 most of all."""
    rng = np.random.default_rng(0)
    before = rng.uniform(0.7, 0.8, N_IMAGES)
    pruned = np.repeat(before, 6).reshape(SHAPE) - rng.uniform(0, 0.01, SHAPE)
    pruned[:, *IMPORTANT] = before / 2
    pruned[7, *IMPORTANT] = 0.001
    parts = np.repeat(before, 12).reshape(*SHAPE, 2).copy()
    parts[:, *IMPORTANT, 1] -= 0.3
    rules = np.tile(rules_of("local"), (*SHAPE, 1))
    rules[:, *IMPORTANT] = rules_of("shift (+1, 0)")
    rules[:10, *IMPORTANT] = rules_of("sink")
    per_head = ("image", "layer", "head")
    label = np.zeros(N_IMAGES, dtype=np.int64)
    flips = np.zeros(SHAPE, dtype=bool)
    flips[:8, *IMPORTANT] = True
    return xr.Dataset(
        {
            "label": ("image", label),
            "prediction": ("image", label),
            "probability": ("image", before),
            "head_probability": (per_head, pruned),
            "head_divergence": (per_head, rng.uniform(0, 0.1, SHAPE)),
            "head_flip": (per_head, flips),
            "head_prediction": (per_head, flips.astype(np.int32)),
            "strength_entropy": (per_head, np.tile(np.arange(6.0).reshape(3, 2), (N_IMAGES, 1, 1))),
            "attention_distance": (per_head, np.full(SHAPE, 3.0)),
            "head_region_probability": ((*per_head, "mode"), parts),
            "pattern_rule": ((*per_head, "rule"), rules),
            "image_dependence": (("layer", "head"), np.full((N_LAYERS, N_HEADS), 0.1)),
        },
        coords={"image": [f"photo {at}.png" for at in range(N_IMAGES)]},
        attrs={"n_heads": [2, 2, 2], "grids": [list(GRID)] * 3, "labels": "given"},
    )


def test_the_planted_head_is_first_and_its_part_and_images_are_found(study: xr.Dataset) -> None:
    table = why_table(study)
    assert table["rank"][IMPORTANT] == 1
    assert_array_equal(np.sort(table["rank"].values.ravel()), np.arange(1, 7))
    assert_allclose(table["drop_patch_part"][IMPORTANT], 0.3, rtol=1e-6)
    assert_allclose(table["drop_class_part"][IMPORTANT], 0.0, atol=1e-9)
    most, least = extreme_images(study, *IMPORTANT)
    assert most[0] == 7
    drop = (study["probability"] - study["head_probability"][:, 1, 0]).to_numpy()
    assert_array_equal(drop[least], np.sort(drop)[:3])
    assert_allclose(table["strength_entropy_percentile"].values.ravel(), [0, 20, 40, 60, 80, 100])
    assert table["pattern"][IMPORTANT] == "shift (+1, 0)"
    assert_allclose(table["pattern_share"][IMPORTANT], 0.75)
    assert_allclose(table["rule_shift_mass"][IMPORTANT], 0.75 + 0.25 * rules_of("sink")[RULES.index("shift_mass")])


def test_only_the_head_without_a_wider_one_is_called_the_widest() -> None:
    """Of 384 heads the second narrowest and the second widest are not the last ones."""
    words = [why._wider_than(100 * at / 383) for at in (0, 1, 382, 383)]
    assert words == [
        "the narrowest of all heads",
        "wider than that of 1 % of the other heads",
        "wider than that of 99 % of the other heads",
        "the widest of all heads",
    ]


def test_one_head_alone_has_the_numbers_that_it_has_among_all(study: xr.Dataset) -> None:
    table = head_table(study)
    means = why_table(study)
    for at in np.ndindex(N_LAYERS, N_HEADS):
        alone = pruning_table(study, *at)
        assert {"drop_mean", "drop_low", "drop_q95", "flip_share", "accuracy_high"} <= set(alone)
        for name in alone:
            assert_allclose(alone[name], table[name][at], rtol=1e-12, err_msg=name)
    for name in ("drop_mean", "head_divergence_mean", "strength_entropy_mean"):
        assert_allclose(means[name], table[name], rtol=1e-12)
    assert alone.attrs["accuracy"] == table.attrs["accuracy"]


def test_the_sentences_carry_the_numbers(study: xr.Dataset) -> None:
    told = why_sentences(study, *IMPORTANT)
    text = " ".join(told)
    drop = float((study["probability"] - study["head_probability"][:, 1, 0]).mean())
    assert f"L1H0 is 1st of 6 heads: without it the label loses {drop:.3f}" in text
    assert "more than 0.1 in 100.0 % of 40 images" in text
    assert "The prediction changes in 20.0 % of them, accuracy goes from 100.0 % to 80.0 %" in text
    assert "Its patch part carries it" in text
    assert (
        "The spread of its attention over distances is 2.00 nats of entropy, wider than that of 40 % of the other heads"
        in text
    )
    assert "Its pattern is shift (+1, 0)" in text
    assert "; 75 % of the images have this pattern when taken alone, most others sink." in text
    assert "How much its map depends on the image: 0.10 of 1, nearly the same map for all images." in text
    assert "It matters most for photo 7 (probability" in text
    most = next(sentence for sentence in told if sentence.startswith("It matters most"))
    assert most.caption == "the probability with L1H0 and without it"
    assert [words.startswith("least: ") for _, words in most.images] == [False] * (len(most.images) - 1) + [True]
    assert not any("does not hold" in sentence for sentence in told)


def test_what_a_study_lacks_is_said_with_the_command_that_adds_it(study: xr.Dataset) -> None:
    poor = study.drop_vars(["pattern_rule", "image_dependence", "head_region_probability"])
    told = missing(poor)
    assert set(told) == {"regions", "patterns"}
    assert "`vitrail study ... --measures heads,patterns` adds it" in told["patterns"]
    assert why_sentences(poor, 0, 0)[-2:] == list(told.values())
    left_out = poor.assign_attrs(left_out={"pattern_rule": "no layer has maps to compare"})
    assert "the model cannot give it: no layer has maps to compare" in missing(left_out)["patterns"]


def test_without_labels_or_classifier_nothing_is_said_of_accuracy_or_probability(study: xr.Dataset) -> None:
    own = study.assign_attrs(labels="predicted")
    assert "accuracy" not in " ".join(why_sentences(own, *IMPORTANT))
    features = study.drop_vars(
        ["label", "prediction", "probability", "head_probability", "head_flip", "head_prediction"]
    )
    told = why_sentences(features, *IMPORTANT)
    assert told[0].endswith("of 6 heads by divergence of the predictions.")


def test_one_image_is_told_without_intervals(study: xr.Dataset) -> None:
    told = why_sentences(study.isel(image=[7]), *IMPORTANT)
    assert "in this image" in told[0]
    assert "interval" not in " ".join(told)
    assert "matters most for" not in " ".join(told)


def test_the_part_that_carries_a_head_is_named_only_where_an_interval_shows_it(study: xr.Dataset) -> None:
    """The class part costs 0.025 more on average, by two images out of 40."""

    def verdict(by_class: np.ndarray, by_patch: np.ndarray, images: slice = slice(None)) -> str:
        parts = study["head_region_probability"].copy(deep=True)
        for mode, drop in enumerate((by_class, by_patch)):
            parts[:, *IMPORTANT, mode] = study["probability"] - drop
        told = why_sentences(study.assign(head_region_probability=parts).isel(image=images), *IMPORTANT)
        return next(each for each in told if each.measure == "head_region_probability").split(":")[0]

    few = np.where(np.arange(N_IMAGES) < 2, 0.6, 0.0)
    noise = np.random.default_rng(1).uniform(0, 0.01, N_IMAGES)
    assert verdict(few, noise) == "Which of its parts matters more is not shown (95 %)"
    assert verdict(few, noise, slice(1)) == "Its class part carries it"
    assert verdict(few + 0.2 + noise, 0.15 + noise[::-1]) == "Both of its parts matter"
    assert verdict(0.2 + noise, noise[::-1]) == "Its class part carries it"
    assert verdict(noise / 4, noise / 4) == "Neither part of it matters alone in these images"


def test_a_reason_stands_in_the_place_of_an_interval_that_cannot_be_trusted(study: xr.Dataset) -> None:
    values = study["head_probability"].values.copy()
    values[1:, *IMPORTANT] = np.nan
    lone = study.assign(head_probability=(study["head_probability"].dims, values))
    table = head_table(lone)
    assert np.isnan(table["drop_low"][IMPORTANT])
    text = " ".join(why_sentences(lone, *IMPORTANT))
    drop = float(study["probability"][0]) / 2
    assert f"loses {drop:.3f} of its probability" in text
    assert table.attrs["no_interval"].startswith("a single image says nothing of others, for 1 of ")
    assert "on average (no 95 % interval: a single image says nothing of others), and more than 0.1" in text
    assert not re.search(r"\bnan\b", text)
    assert [images.tolist() for images in extreme_images(lone, *IMPORTANT)] == [[0], [0]]


@pytest.mark.parametrize("n_images", [2, 3, 4, 9])
def test_the_image_where_a_head_matters_least_is_none_where_it_matters_most(study: xr.Dataset, n_images: int) -> None:
    few = study.isel(image=slice(n_images))
    (sentence,) = [each for each in why_sentences(few, *IMPORTANT) if "It matters most for" in each]
    named = [image for image, _ in sentence.images]
    drop = (few["probability"] - few["head_probability"][:, 1, 0]).to_numpy()
    assert len(named) == len(set(named)) == min(n_images, 4)
    assert_allclose(drop[named], [*np.sort(drop)[::-1][: len(named) - 1], drop.min()])


def test_a_head_that_is_not_there_is_refused(study: xr.Dataset) -> None:
    with pytest.raises(UsageError, match="L1H5 was asked for; the study has layers 0 to 2 with 2 heads at most"):
        why_sentences(study, 1, 5)
    with pytest.raises(UsageError, match="L9H0"):
        why_sentences(study, 9, 0)


def test_heads_that_a_layer_lacks_have_no_row(study: xr.Dataset) -> None:
    values = study["head_probability"].values.copy()
    values[:, 2, 1] = np.nan
    rules = study["pattern_rule"].values.copy()
    rules[:, 2, 1] = np.nan
    narrow = study.assign(
        head_probability=(study["head_probability"].dims, values), pattern_rule=(study["pattern_rule"].dims, rules)
    ).assign_attrs(n_heads=[2, 2, 1])
    table = why_table(narrow)
    assert np.isnan(table["rank"][2, 1])
    assert table["pattern"][2, 1] == ""
    assert [len(images) for images in extreme_images(narrow, 2, 1)] == [0, 0]
    with pytest.raises(UsageError, match="L2H1"):
        why_sentences(narrow, 2, 1)


def test_of_a_study_without_measures_of_heads_it_is_said_what_adds_them(study: xr.Dataset) -> None:
    without = study.drop_dims(["head"])
    said = why_sentences(without, 1, 0)
    assert "`vitrail study ... --measures heads` adds it" in said[0]
    with pytest.raises(UsageError, match="was asked for; the study has layers"):
        why_sentences(without, 99, 0)
