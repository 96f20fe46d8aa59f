"""Collectors: which measures a model can give, what a batch looks like, several at once."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from head_models import timm_swin, timm_vit
from numpy.testing import assert_allclose

from vitrail import Readers, open_vit
from vitrail.analysis import analyses, is_of_other_models, make_collectors, unavailable
from vitrail.errors import UsageError
from vitrail.heads.strength import reach
from vitrail.models.token_grid import TokenGrid
from vitrail.tap import maps

REACH = ("attention_strength", "strength_entropy", "attention_distance", "prefix_share")


def read_reach(vit, images, **options):
    (collector,) = make_collectors(vit, REACH, options)
    tap = vit.tap()
    replay, logits = tap.record(images, collector.readers())
    return collector.finish(tap, replay, logits, np.zeros(len(images), dtype=np.int64))


def maps_of(vit, images):
    kept = {}
    vit.tap().read(
        images, Readers(attention=lambda attention: kept.update({attention.layer: attention.weights().detach()}))
    )
    return kept


@pytest.fixture(scope="module")
def vit():
    return open_vit(timm_vit(), image_size=(48, 80))


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 48, 80, generator=torch.Generator().manual_seed(0))


def test_importing_the_package_and_its_tables_loads_no_torch():
    code = "import sys, vitrail.heads, vitrail.heads.summary, vitrail.heads.why; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_measure_of_heads_is_computed_for_a_classifier_with_class_token(vit):
    names = [name for each in ("heads", "regions", "patterns") for name in analyses()[each].measure_names]
    found = [name for collector in make_collectors(vit, names) for name in collector.measures]
    of_classifiers = [name for name in analyses()["heads"].measure_names if not is_of_other_models(name)]
    assert sorted(found) == sorted([*of_classifiers, *analyses()["regions"].measure_names, "pattern_rule"])
    assert unavailable(vit, found) == {}


def test_reach_of_a_batch_is_reach_of_each_layers_maps(vit, images):
    found, maps = read_reach(vit, images), maps_of(vit, images)
    assert found["attention_strength"].shape == (4, 3, 3, 5)
    for layer, weights in maps.items():
        expected = reach(weights, TokenGrid((3, 5), 1))
        assert_allclose(found["attention_strength"][:, layer], expected.strength, rtol=1e-5)
        assert_allclose(found["strength_entropy"][:, layer], expected.entropy, rtol=1e-5)
        assert_allclose(found["attention_distance"][:, layer], expected.distance, rtol=1e-5)
        assert_allclose(found["prefix_share"][:, layer], expected.prefix_share, rtol=1e-5)
    assert (found["strength_entropy"] < math.log(5)).all()


def test_a_few_images_at_a_time_give_the_same(vit, images, monkeypatch):
    whole = read_reach(vit, images)
    monkeypatch.setattr(maps, "MAX_BYTES", 1)
    for name, values in read_reach(vit, images).items():
        assert_allclose(values, whole[name], rtol=1e-5, err_msg=name)


def test_maps_in_bfloat16_stay_within_a_few_percent(vit, images):
    exact, rough = read_reach(vit, images), read_reach(vit, images, maps="bfloat16")
    for name in REACH:
        assert_allclose(rough[name], exact[name], rtol=0.05, err_msg=name)
        assert np.abs(rough[name] - exact[name]).max() > 0, name


def test_attention_with_a_bias_before_the_softmax_is_read_as_the_model_computes_it(images):
    vit = open_vit(timm_vit("vit_relpos_small_patch16_224"), image_size=(48, 80))
    found, expected = read_reach(vit, images), maps_of(vit, images)
    for layer, weights in expected.items():
        assert_allclose(found["attention_strength"][:, layer], reach(weights, TokenGrid((3, 5))).strength, rtol=1e-5)


def test_permuting_images_permutes_rows(vit, images):
    order = [2, 0, 3, 1]
    straight, permuted = read_reach(vit, images), read_reach(vit, images[order])
    for name in REACH:
        assert_allclose(permuted[name], straight[name][order], rtol=1e-4, err_msg=name)


def test_swin_is_read_on_the_image_grid_with_layers_padded():
    vit = open_vit(timm_swin(), image_size=(64, 64))
    found = read_reach(vit, torch.randn(2, 3, 64, 64))
    strength = found["attention_strength"]
    assert strength.shape == (2, 4, 3, 16)
    assert np.isnan(strength[:, :2, 2]).all()  # two heads in the first stage
    assert np.isnan(strength[:, 2:, :, 8:]).all()  # a grid of 8 x 8 in the second
    assert_allclose(strength[:, 0, :2, 4:], 0, atol=0)  # windows of 4 x 4 do not reach further
    assert (strength[:, 0, :2, :4] > 0).all()
    assert_allclose(found["prefix_share"][:, 0, :2], 0, atol=0)


def test_measures_that_a_model_cannot_give_are_named_with_the_reason():
    features = open_vit(timm_vit("vit_base_patch16_siglip_gap_224", num_classes=0), image_size=(48, 80))
    reasons = unavailable(features, list(analyses()["heads"].measure_names))
    assert "no classifier" in reasons["head_probability"]
    assert "no class token" in reasons["head_cls_shift"]
    assert "head_token_shift" not in reasons


def test_the_estimate_says_what_it_does_not_offer(vit):
    reasons = unavailable(vit, list(analyses()["heads"].measure_names), {"importance": "estimate"})
    assert "use --importance exact" in reasons["head_divergence"]
    assert "head_loss_change" not in reasons


def test_an_unknown_option_is_refused_with_those_that_exist(vit):
    with pytest.raises(UsageError, match="exact, estimate"):
        make_collectors(vit, ["head_flip"], {"importance": "guess"})


def test_parts_of_heads_are_what_the_region_modes_say(vit, images):
    from vitrail.heads.regions import Mode, region_modes

    (collector,) = make_collectors(vit, ["head_region_probability"])
    tap = vit.tap()
    replay, logits = tap.record(images, collector.readers())
    labels = logits.argmax(-1)
    found = collector.finish(tap, replay, logits, labels.numpy())["head_region_probability"]
    for layer, head in ((0, 1), (2, 0)):
        said = region_modes(tap, vit.anatomy, images, layer, head)
        for at, mode in enumerate((Mode.CROSS, Mode.PATCHES)):
            rows = said.logits[said.modes.index(mode)].softmax(-1)
            assert_allclose(found[:, layer, head, at], rows.gather(1, labels[:, None])[:, 0], rtol=1e-4)
    assert_allclose(found[:, 2, :, 1], logits.softmax(-1).amax(-1)[:, None].expand(-1, 3), rtol=1e-4)  # the last layer
