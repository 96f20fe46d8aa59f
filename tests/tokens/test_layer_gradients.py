"""Relevance by the gradients of attention maps: by hand, planted, in hierarchies, refused, against chance."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from hierarchies import bright_images, brightness, maxvit, opened, pvt, swin
from numpy.testing import assert_allclose, assert_array_equal
from token_models import small_images, small_vit

from vitrail.contract.tiny_models import FAMILIES
from vitrail.errors import Unsupported, UsageError
from vitrail.models.open import open_vit
from vitrail.tap.tap import Readers
from vitrail.tokens.relevance import _Gains, deletion_and_insertion, layer_gradients, relevance, unavailable_methods


def gains_by_hand(model, images, classes, times_map):
    """The positive part of the gradients of timm's own unfused maps, [.. head query key] for each attention call."""
    model, maps = copy.deepcopy(model), []
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(lambda _module, _inputs, weights: maps.append(weights))
    logits = model(images)
    gradients = torch.autograd.grad(logits[range(len(images)), classes].sum(), maps)
    return [
        ((weights if times_map else 1) * each.clamp(min=0)).detach()
        for weights, each in zip(maps, gradients, strict=True)
    ]


def shares(by_layer):
    return torch.stack([each / each.sum(1, keepdim=True) for each in by_layer]).mean(0)


TIMES_MAP = pytest.mark.parametrize("times_map", [True, False], ids=["grad_sam", "legrad"])


@TIMES_MAP
@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"num_heads": 4}])
def test_layer_gradients_are_those_of_the_maps_taken_by_hand(options, times_map):
    vit, images, classes = small_vit(**options), small_images(), np.array([1, 4, 2])
    prefix = vit.anatomy.blocks[0].prefix
    gains = [each.mean((1, 2))[:, prefix:] for each in gains_by_hand(vit.model, images, classes, times_map)]
    assert len(gains) == 3
    assert_allclose(layer_gradients(vit, images, classes, times_map=times_map), shares(gains), rtol=1e-3, atol=1e-7)


@TIMES_MAP
def test_layer_gradients_of_shifted_windows_are_put_back_by_hand(times_map):
    vit, images, classes = swin(), small_images(2, (32, 32)), np.array([3, 0])
    by_layer = []
    for layer, gain in enumerate(gains_by_hand(vit.model, images, classes, times_map)):
        side, shift = (16, 8)[layer // 2], (0, 2)[layer % 2]
        windows = gain.mean((1, 2)).reshape(2, side // 4, side // 4, 4, 4)  # image, window, slot
        image = windows.permute(0, 1, 3, 2, 4).reshape(2, side, side).roll((shift, shift), (1, 2))
        by_layer.append(image.repeat_interleave(16 // side, 1).repeat_interleave(16 // side, 2).flatten(1))
    assert_allclose(layer_gradients(vit, images, classes, times_map=times_map), shares(by_layer), rtol=1e-3, atol=1e-7)


@TIMES_MAP
def test_layer_gradients_of_pooled_keys_are_put_back_by_hand(times_map):
    """PVT v2 of timm: on grids of 16 x 16 to 2 x 2 patches keys are those of 8 x 8, 4 x 4, 2 x 2 and single ones."""
    vit, images, classes = pvt(depths=(2, 2, 2, 2)), small_images(2, (64, 64)), np.array([3, 0])
    by_layer = []
    for gain in gains_by_hand(vit.model, images, classes, times_map):
        side = round(gain.shape[-1] ** 0.5)
        image = gain.mean((1, 2)).reshape(2, side, side)
        by_layer.append(image.repeat_interleave(16 // side, 1).repeat_interleave(16 // side, 2).flatten(1))
    assert_allclose(layer_gradients(vit, images, classes, times_map=times_map), shares(by_layer), rtol=1e-3, atol=1e-7)


@TIMES_MAP
def test_a_planted_patch_has_all_that_its_layers_can_tell_apart(times_map):
    vit, patches = brightness(), [0, 19, 63, 42]
    images = bright_images(patches)
    expected = np.zeros((4, 8, 8))
    for image, patch in zip(expected, patches, strict=True):
        row, column = divmod(patch, 8)
        image[row // 2 * 2 : row // 2 * 2 + 2, column // 2 * 2 : column // 2 * 2 + 2] = 1 / 2 / 4
        image[row, column] += 1 / 2
    assert_allclose(
        layer_gradients(vit, images, np.ones(4, dtype=int), times_map=times_map).reshape(4, 8, 8), expected, atol=1e-6
    )


def test_a_planted_patch_is_found_by_deletion_and_insertion_and_chance_does_not_find_it():
    vit, patches, classes = brightness(), [5, 22, 40, 57], np.ones(4, dtype=int)
    images = bright_images(patches)
    maps = relevance(vit, images, classes, ["grad_sam", "random"])
    low, high = deletion_and_insertion(vit, images, classes, maps["grad_sam"]).areas
    orders = np.random.default_rng(0).random((20, 4, 64))
    gaps = []
    for scores in orders:
        areas = deletion_and_insertion(vit, images, classes, scores).areas
        gaps.append((areas[1] - areas[0]).mean())
    assert maps["grad_sam"].argmax(1).tolist() == patches
    assert (high - low).mean() > max(gaps)
    assert abs(np.mean(gaps)) < 3 * np.std(gaps) / len(gaps) ** 0.5
    assert_allclose(maps["random"], relevance(vit, 1 - images, classes, ["random"])["random"])  # whatever is shown
    rank = (maps["random"] > maps["random"][range(4), patches][:, None]).sum(1)
    assert 8 < rank.mean() < 56  # of 64 patches; the planted one is neither first nor last


@pytest.mark.parametrize("make", [swin, pvt, maxvit])
def test_hierarchies_have_relevance_of_the_first_grid_that_knows_of_the_class(make):
    vit = make()
    images, grid = small_images(2, vit.image_size), vit.anatomy.blocks[0].grid
    assert set(unavailable_methods(vit)) == {"rollout", "gradient"}
    found = relevance(vit, images, np.array([0, 1]), ["raw", "grad_sam", "legrad", "random"])
    for scores in found.values():
        assert scores.shape == (2, grid[0] * grid[1])
        assert np.isfinite(scores).all()
        assert (scores >= 0).all()
    for method in ("grad_sam", "legrad"):
        assert_allclose(found[method].sum(1), 1, rtol=1e-5)
    assert_allclose(found["raw"].sum(1), 1, rtol=1e-4)
    other = layer_gradients(vit, images, np.array([2, 3])).numpy()
    assert not np.allclose(found["grad_sam"], other)
    assert_allclose(layer_gradients(vit, images[1:], np.array([1]))[0], found["grad_sam"][1], rtol=1e-3, atol=1e-7)
    curves = deletion_and_insertion(vit, images, np.array([0, 1]), found["grad_sam"], 4)
    assert_allclose(curves.deletion[:, 0], curves.insertion[:, -1])


def test_raw_attention_of_a_hierarchy_is_what_keys_of_the_last_layer_are_given():
    vit, images, maps = pvt(depths=(2, 2, 2, 2)), small_images(2, (64, 64)), {}
    vit.tap().read(images, Readers(attention=lambda each: maps.update({each.layer: each.weights().detach()})))
    received = maps[7].mean((1, 2)).reshape(2, 2, 2)
    expected = received.repeat_interleave(8, 1).repeat_interleave(8, 2).flatten(1) / 64
    assert_allclose(relevance(vit, images, np.zeros(2, dtype=int), ["raw"])["raw"], expected, rtol=1e-4)


def family(name):
    made = next(each for each in FAMILIES if each.name == name)
    return open_vit(made.model(), image_size=made.image_size)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: small_vit(num_classes=0), "has no classifier, so no class has a gradient; use raw attention or"),
        (lambda: family("timm EdgeNeXt"), "has no map between tokens .kind 'channel'., so its keys have no place"),
        (lambda: family("timm NesT"), "lie on no grid that could be found, so no patch has a relevance"),
    ],
    ids=["no classifier", "channels", "no grid"],
)
def test_a_model_without_layer_gradients_says_why_in_one_sentence(make, words):
    vit = make()
    images = torch.zeros(1, *vit.anatomy.image_shape)
    with pytest.raises(Unsupported, match=words) as error:
        layer_gradients(vit, images, np.array([0]))
    assert str(error.value).count(". ") == 0
    with pytest.raises(Unsupported, match=words):
        relevance(vit, images, np.array([0]), ["grad_sam"])
    assert unavailable_methods(vit)["grad_sam"] == str(error.value)


def test_a_model_of_one_grid_with_windows_is_sent_from_gradient_rollout_to_grad_sam():
    vit = swin(depths=(2,), num_heads=(2,))
    assert set(unavailable_methods(vit)) == {"gradient"}
    with pytest.raises(Unsupported, match=r"attends within windows.* use lrp or grad_sam"):
        relevance(vit, small_images(1, (32, 32)), np.array([0]), ["gradient"])


def test_scores_of_another_grid_are_refused():
    vit = swin()
    with pytest.raises(UsageError, match=r"\(2, 64\) were passed for 2 images on a grid of 16 x 16"):
        deletion_and_insertion(vit, small_images(2, (32, 32)), np.zeros(2, dtype=int), np.zeros((2, 64)))


def test_relevance_leaves_the_images_and_the_model_as_they_are():
    vit, images = swin(), small_images(1, (32, 32))
    before = vit.logits(images)
    layer_gradients(vit, images, np.array([0]))
    assert not images.requires_grad
    assert all(parameter.grad is None for parameter in vit.model.parameters())
    assert_array_equal(vit.logits(images), before)


def test_a_pass_is_let_go_of_when_its_gradients_are_taken(monkeypatch):
    """A hook on a tensor that the hook itself holds is a cycle that no collector sees."""
    vit, images, passes = small_vit(), small_images(1), []
    read = _Gains.read

    def watch(self, attention):
        passes.append(weakref.ref(attention))
        read(self, attention)

    monkeypatch.setattr(_Gains, "read", watch)
    layer_gradients(vit, images, np.array([0]))
    gc.collect()
    assert len(passes) == 3
    assert not any(each() for each in passes)


def test_no_gradient_reaches_a_reader_of_a_pass_without_gradients():
    vit = opened(copy.deepcopy(swin().model), 32)

    def read(attention):
        attention.register_out_hook(lambda gradient: None)

    with torch.no_grad(), pytest.raises(Unsupported, match="No gradient reaches the attention of L0"):
        vit.tap().read(small_images(1, (32, 32)), Readers(attention=read))
