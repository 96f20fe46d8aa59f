"""Importance follows what the output means; right values by plain PyTorch on a copy without the head."""

import copy

import numpy as np
import pytest
import timm
import torch
from head_models import drawn_wide
from numpy.testing import assert_allclose
from torch.nn import functional as F  # noqa: N812

from vitrail.analysis import make_collectors
from vitrail.errors import UsageError
from vitrail.models.open import open_vit

NAMES = (
    "head_probability",
    "head_divergence",
    "head_loss_change",
    "head_output_shift",
    "head_value",
    "head_value_change",
)
LAYER, HEAD = 1, 2


def small(num_classes):
    torch.manual_seed(0)
    shape = {"img_size": 48, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": num_classes}
    return drawn_wide(timm.create_model("vit_tiny_patch16_224", **shape).eval())


def images():
    return torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(model):
    """What the model gives, and what it gives without the head: its columns of the projection set to zero."""
    without = copy.deepcopy(model)
    without.blocks[LAYER].attn.proj.weight[:, HEAD * 16 : (HEAD + 1) * 16] = 0
    return model(images()), without(images())


def measured(model, labels=(-1,) * 4, importance="exact", **options):
    vit = open_vit(model, image_size=48, **options)
    arrays = {}
    for collector in make_collectors(vit, NAMES, {"importance": importance}):
        replay, logits = vit.tap().record(images(), collector.readers())
        arrays |= collector.finish(vit.tap(), replay, logits, np.asarray(labels, dtype=np.int64))
    return {name: values[:, LAYER, HEAD] for name, values in arrays.items()}


def test_of_independent_labels_it_is_the_sigmoid_and_the_labels_own_loss():
    model, labels = small(5), torch.tensor([0, 4, 2, 2])
    found = measured(model, labels, task="labels")
    plain, pruned = (each[range(4), labels] for each in outputs(model))
    yes = torch.ones(4)
    loss = F.binary_cross_entropy_with_logits
    assert_allclose(found["head_probability"], pruned.sigmoid(), rtol=1e-4)
    expected = loss(pruned, yes, reduction="none") - loss(plain, yes, reduction="none")
    assert_allclose(found["head_loss_change"], expected, rtol=1e-3, atol=1e-6)
    before, after = (torch.stack([each.sigmoid(), 1 - each.sigmoid()], -1).double() for each in outputs(model))
    middle = (before + after) / 2
    bits = sum((part * (part / middle).log2()).sum(-1) for part in (before, after)) / 2
    assert_allclose(found["head_divergence"], bits.mean(-1), rtol=1e-3, atol=1e-7)
    assert not {"head_output_shift", "head_value"} & set(found)


def test_the_estimate_of_a_labels_loss_is_that_of_its_sigmoid():
    model, labels = small(5), torch.tensor([0, 4, 2, 2])
    found = measured(model, labels, "estimate", task="labels")
    gate = torch.ones(4, requires_grad=True)

    def scale(_, arguments):
        channels = torch.ones(4, 1, 48)
        channels = torch.cat([channels[..., :32], gate[:, None, None].expand(-1, -1, 16)], -1)
        return (arguments[0] * channels,)

    with model.blocks[LAYER].attn.proj.register_forward_pre_hook(scale):
        picked = model(images())[range(4), labels]
    (gradient,) = torch.autograd.grad(F.binary_cross_entropy_with_logits(picked, torch.ones(4), reduction="sum"), gate)
    assert_allclose(found["head_loss_change"], gradient.square() / 2 - gradient, rtol=1e-3, atol=1e-5)


def test_of_one_value_it_is_the_value_and_its_change():
    model = small(1)
    found = measured(model)
    plain, pruned = (each[:, 0] for each in outputs(model))
    assert_allclose(found["head_value"], pruned, rtol=1e-4, atol=1e-5)
    assert_allclose(found["head_value_change"], (pruned - plain).abs(), rtol=1e-3, atol=1e-5)
    assert set(found) == {"head_value", "head_value_change"}


def test_of_several_values_it_is_the_length_of_their_change():
    model = small(6)
    found = measured(model, task="regression")
    plain, pruned = outputs(model)
    assert_allclose(found["head_value_change"], (pruned - plain).square().sum(-1).sqrt(), rtol=1e-3)
    assert set(found) == {"head_value_change"}


@pytest.mark.parametrize("as_function", [False, True])
def test_of_a_feature_vector_it_is_its_turn_and_the_users_target(as_function):
    model, text = small(0), torch.randn(48, generator=torch.Generator().manual_seed(1))

    def similarity(output):
        return F.cosine_similarity(output, text, dim=-1)

    found = measured(model, target=similarity if as_function else text)
    plain, pruned = outputs(model)
    assert_allclose(found["head_output_shift"], 1 - F.cosine_similarity(plain, pruned, dim=-1), rtol=1e-3, atol=1e-6)
    assert_allclose(found["head_value"], similarity(pruned), rtol=1e-3, atol=1e-5)
    assert_allclose(found["head_value_change"], (similarity(pruned) - similarity(plain)).abs(), rtol=1e-2, atol=1e-5)
    assert "head_divergence" not in found


def test_a_target_that_gives_no_number_per_image_is_refused():
    with pytest.raises(UsageError, match=r"it takes \[image, value\]"):
        measured(small(0), target=lambda output: output.mean())
    with pytest.raises(UsageError, match="3 numbers and the model's output 48"):
        measured(small(0), target=[1.0, 2.0, 3.0])
