"""Layer-wise relevance: closed forms, complete, planted, of one image as of many, refused, against chance."""

import copy

import numpy as np
import pytest
import torch
from hierarchies import bright_images, brightness, maxvit, pvt, swin
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from token_models import small_images, small_vit
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitrail import look
from vitrail.contract.tiny_models import FAMILIES
from vitrail.errors import Unsupported, UsageError
from vitrail.models.gradients import gradients_enabled
from vitrail.models.open import open_vit
from vitrail.tap.frozen import Frozen
from vitrail.tokens.levels import sum_over_patches
from vitrail.tokens.lrp import classes_of_images, layerwise_relevance
from vitrail.tokens.relevance import (
    deletion_and_insertion,
    gradient_rollout,
    layer_gradients,
    relevance,
    unavailable_methods,
)
from vitrail.tokens.robustness import paint


def family(name):
    made = next(each for each in FAMILIES if each.name == name)
    torch.manual_seed(0)
    return open_vit(made.model(), image_size=made.image_size)


def test_of_a_linear_model_it_is_what_painting_the_patch_over_costs():
    vit, images = brightness(), small_images(2, (32, 32))
    found = layerwise_relevance(vit, images, np.array([1, 1])).numpy()
    for patch in range(64):
        lost = np.zeros((2, 64), dtype=bool)
        lost[:, patch] = True
        painted = paint(images, lost, (8, 8), "mean", vit.preprocessing)
        assert_allclose(found[:, patch], (vit.logits(images) - vit.logits(painted))[:, 1], rtol=1e-3, atol=1e-6)
    assert_allclose(layerwise_relevance(vit, images, np.array([0, 0])), 0.0)  # logit 0 is always 0


MAKERS = {
    "ViT": small_vit,
    "Swin": swin,
    "PVT": pvt,
    "MaxViT": maxvit,
    **{name: lambda name=name: family(name) for name in ("timm XCiT", "timm EVA-02", "transformers Swin")},
}


@pytest.mark.parametrize("kind", MAKERS)
def test_it_adds_up_to_the_logit_and_an_image_alone_has_what_it_has_among_others(kind):
    vit = MAKERS[kind]()
    images, classes = small_images(2, vit.anatomy.image_shape[1:]), np.array([0, 3])
    found = layerwise_relevance(vit, images, classes)
    assert found.shape == (2, np.prod(vit.anatomy.blocks[0].grid))
    frozen, bare = Frozen(), images.mean((2, 3), keepdim=True).expand_as(images).clone()
    with torch.enable_grad():
        with frozen:
            here = vit.tap().read(images.clone().requires_grad_()).detach()
        with frozen.replay():
            there = vit.tap().read(bare.requires_grad_()).detach()
    change = (here - there)[range(2), classes]
    assert_allclose(found.sum(1), change, rtol=1e-3, atol=1e-4)
    largest = float(found.abs().max())
    assert_allclose(layerwise_relevance(vit, images[1:], classes[1:])[0], found[1], atol=1e-4 * largest)
    other = layerwise_relevance(vit, images, np.array([1, 2]))
    assert float((other - found).abs().max()) > 0.01 * largest


def test_a_planted_patch_is_found_by_deletion_and_insertion_and_chance_does_not_find_it():
    vit, patches, classes = brightness(), [5, 22, 40, 57], np.ones(4, dtype=int)
    images = bright_images(patches)
    scores = relevance(vit, images, classes, ["lrp"])["lrp"]
    assert scores.argmax(1).tolist() == patches
    low, high = deletion_and_insertion(vit, images, classes, scores).areas
    gaps = []
    for order in np.random.default_rng(0).random((20, 4, 64)):
        areas = deletion_and_insertion(vit, images, classes, order).areas
        gaps.append((areas[1] - areas[0]).mean())
    assert (high - low).mean() > max(gaps)
    bare = torch.full_like(images, 0.3)  # of an image without anything in it nothing matters
    assert_allclose(relevance(vit, bare, classes, ["lrp"])["lrp"], 0.0, atol=1e-6)


def test_pixels_are_summed_over_the_patches_that_they_lie_in():
    pixels = torch.arange(2 * 7 * 9, dtype=torch.float32).view(2, 7, 9)  # a row and a column are left over
    found = sum_over_patches(pixels, (3, 4), (2, 2))
    expected = pixels[:, :6, :8].reshape(2, 3, 2, 4, 2).sum((2, 4)).flatten(1)
    assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: small_vit(num_classes=0), "has no classifier, so no class has a gradient; use raw attention or"),
        (lambda: family("timm NesT"), "lie on no grid that could be found, so no patch has a relevance"),
    ],
    ids=["no classifier", "no grid"],
)
def test_a_model_without_it_says_why(make, words):
    vit = make()
    with pytest.raises(Unsupported, match=words) as error:
        relevance(vit, torch.zeros(1, *vit.anatomy.image_shape), np.array([0]), ["lrp"])
    assert unavailable_methods(vit)["lrp"] == str(error.value)


class PowerPooled(nn.Module):
    """A generalised mean of the tokens in front of the classifier; its root is held still, and nothing else goes on."""

    def __init__(self):
        super().__init__()
        self.inner = small_vit(class_token=False, global_pool="").model

    def forward(self, images):
        tokens = self.inner.forward_features(images).clamp(min=1e-3)
        return self.inner.head(tokens.pow(3).mean(1).pow(-1 / 3))


def test_a_model_that_it_holds_still_whole_says_so_and_keeps_the_other_methods():
    vit = open_vit(PowerPooled().eval(), image_size=(32, 64), mean=0.5, std=0.5, n_classes=10)
    reasons = unavailable_methods(vit)
    assert "goes through statistics that lrp holds still; use grad_sam" in reasons["lrp"]
    assert set(reasons) == {"lrp"}
    with pytest.raises(Unsupported, match="lrp holds still"):
        relevance(vit, small_images(1), np.array([0]), ["lrp"])
    looked = look(vit, Image.fromarray(np.zeros((32, 64, 3), np.uint8)), measures="tokens")
    methods = looked["relevance_method"].to_numpy().astype(str).tolist()
    assert {"raw", "rollout", "gradient", "grad_sam"} <= set(methods)
    assert "lrp" not in methods


class RunAgain(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *args, **kwargs):
        return checkpoint(self.block, x, use_reentrant=False)


def test_a_model_that_runs_parts_again_in_the_backward_pass_is_refused_in_a_sentence():
    vit = small_vit()
    vit.model.blocks[1].mlp = RunAgain(vit.model.blocks[1].mlp)
    with pytest.raises(Unsupported, match="runs parts of it again"):
        layerwise_relevance(vit, small_images(1), np.array([0]))
    assert "runs parts of it again" in unavailable_methods(vit)["lrp"]


@pytest.mark.parametrize("explain", [layerwise_relevance, layer_gradients, gradient_rollout])
@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ([0, 12], "12 is no class of .*: classes are whole numbers from 0 to 9, one an image"),
        ([-1, 0], "-1 is no class"),
    ],
)
def test_what_is_no_class_of_each_image_is_refused(explain, classes, words):
    with pytest.raises(UsageError, match=words):
        explain(small_vit(), small_images(2), np.array(classes))


@pytest.mark.parametrize(("classes", "words"), [([0.5, 1.0], "0.5 is no class"), ([True, False], "True is no class")])
def test_classes_are_whole_numbers(classes, words):
    with pytest.raises(UsageError, match=words):
        classes_of_images(small_vit(), classes, 2)
    with pytest.raises(UsageError, match=r"2 images need one class each, and classes of shape \(1,\) were given"):
        classes_of_images(small_vit(), [0], 2)
    assert classes_of_images(small_vit(), [1, 0], 2).tolist() == [1, 0]


def test_a_caller_in_inference_mode_has_it_too():
    vit, images, classes = small_vit(), small_images(2), np.array([1, 2])
    with torch.inference_mode():
        found = layerwise_relevance(vit, images, classes)
    assert_allclose(found, layerwise_relevance(vit, images, classes), rtol=1e-5)


def test_it_leaves_the_images_and_the_model_as_they_are():
    vit, images = swin(), small_images(1, (32, 32))
    before = vit.logits(images)
    with torch.no_grad():
        layerwise_relevance(vit, images, np.array([0]))
    assert not images.requires_grad
    assert all(parameter.grad is None for parameter in vit.model.parameters())
    assert_array_equal(vit.logits(images), before)


def test_the_gradient_through_an_instance_norm_in_front_of_tokens_is_that_of_the_image_among_others():
    torch.manual_seed(0)
    norm, images, weights = nn.InstanceNorm2d(8), torch.randn(2, 8, 6, 6), torch.randn(2, 36, 8)
    both = []
    for some in (slice(0, 2), slice(1, 2)):
        with gradients_enabled():
            pixels = images[some].clone().requires_grad_()
            product = norm(pixels).flatten(2).transpose(1, 2) * weights[some]
            both.append(torch.autograd.grad(product.sum(), pixels)[0][-1])
    assert_allclose(both[1], both[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("n_images", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_through_a_batch_norm_in_front_of_tokens_is_right_for_one_image_too(n_images, layout):
    """torch 2.14 has another one for a single image where tokens follow: `flatten(2).transpose(1, 2)`."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8).eval()
    norm.running_var.uniform_(0.5, 2)
    images, weights = torch.randn(n_images, 8, 6, 6).to(memory_format=layout), torch.randn(n_images, 36, 8)
    with gradients_enabled():
        pixels = copy.deepcopy(images).requires_grad_()
        (found,) = torch.autograd.grad((norm(pixels).flatten(2).transpose(1, 2) * weights).sum(), pixels)
    rate = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(1, -1, 1, 1).detach()
    assert_allclose(found, weights.transpose(1, 2).unflatten(2, (6, 6)) * rate, rtol=1e-5)
