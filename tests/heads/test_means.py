"""Ablation by the mean output: closed forms, and the same numbers by hooks and hands."""

import numpy as np
import pytest
import torch
from head_models import timm_swin, timm_vit, torchvision_vit
from numpy.testing import assert_allclose
from torch.testing import assert_close

from vitrail import Readers, open_vit
from vitrail.analysis import make_collectors, unavailable
from vitrail.heads.importance import model_metrics
from vitrail.heads.means import MeanOutputs
from vitrail.tap.edits import Edit

MEASURES = ("head_probability", "head_divergence", "head_token_shift")


def swept(vit, images, ablation):
    (collector,) = make_collectors(vit, MEASURES, {"ablation": ablation})
    if ablation == "mean":
        collector.calibrate(vit.tap(), images, len(images))
        collector.load_calibration(collector.calibration_statistics())
    replay, logits = vit.tap().record(images, collector.readers())
    return collector.finish(vit.tap(), replay, logits, logits.argmax(-1).numpy())


def noise(n_images, size, seed=0):
    return torch.randn(n_images, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("model", "size"), [(timm_vit, (48, 80)), (torchvision_vit, (48, 48)), (timm_swin, (64, 64))])
def test_the_mean_over_one_image_is_its_own_output_so_no_head_is_missed(model, size):
    vit, image = open_vit(model(), image_size=size), noise(1, size)
    found = swept(vit, image, "mean")
    assert_allclose(found["head_divergence"][~np.isnan(found["head_divergence"])], 0, atol=1e-7)
    assert np.nanmax(swept(vit, image, "zero")["head_divergence"]) > 1e-3


def test_a_head_that_gives_every_image_the_same_matters_by_zero_and_not_by_its_mean():
    model = timm_vit()
    with torch.no_grad():  # head 1 of layer 1: values from the bias alone, so its output is one vector everywhere
        qkv = model.blocks[1].attn.qkv
        rows = slice(2 * 48 + 16, 2 * 48 + 32)
        qkv.weight[rows], qkv.bias[rows] = 0, 1.0
    vit, images = open_vit(model, image_size=(48, 80)), noise(5, (48, 80))
    assert_allclose(swept(vit, images, "mean")["head_divergence"][:, 1, 1], 0, atol=1e-7)
    assert swept(vit, images, "zero")["head_divergence"][:, 1, 1].min() > 1e-4
    assert swept(vit, images, "mean")["head_divergence"][:, 1, 0].min() > 1e-4


def test_the_mean_is_put_before_the_output_projection_as_a_hook_would_do_it():
    model, images = timm_vit(), noise(4, (48, 80))
    vit = open_vit(model, image_size=(48, 80))
    kept = []
    projection = model.blocks[1].attn.proj
    handle = projection.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    with torch.no_grad():
        plain = model(images)
    handle.remove()

    def put_mean(_, args):
        changed = args[0].clone()
        changed[..., 32:48] = kept[0][..., 32:48].mean(0)
        return (changed,)

    handle = projection.register_forward_pre_hook(put_mean)
    with torch.no_grad():
        expected = model_metrics(plain, model(images)[None], plain.argmax(-1), vit.task)
    handle.remove()
    found = swept(vit, images, "mean")
    assert_allclose(found["head_probability"][:, 1, 2], expected["head_probability"][0], rtol=1e-4)
    assert_allclose(found["head_divergence"][:, 1, 2], expected["head_divergence"][0], rtol=1e-3, atol=1e-6)


def test_batches_and_padding_do_not_change_the_mean():
    vit, images = open_vit(timm_vit(), image_size=(48, 80)), noise(5, (48, 80))
    whole, parts = MeanOutputs(vit.anatomy), MeanOutputs(vit.anatomy)
    whole.add(vit.tap(), images, 5)
    parts.add(vit.tap(), images[:3], 3)
    parts.add(vit.tap(), torch.cat([images[3:], images[-1:]]), 2)  # padded with the last image
    for name, values in whole.arrays().items():
        assert values.shape == (1, 3, 16, 16)
        assert_allclose(parts.arrays()[name], values, atol=1e-5)


def test_a_fill_of_zeros_is_pruning_and_touches_no_other_head():
    vit, images = open_vit(timm_vit(), image_size=(48, 80)), noise(2, (48, 80))
    fill, kept = torch.zeros(1, 1, 16, 16), []
    filled = vit.tap().read(images, edits=[Edit(2, prune=(1,), fill=fill)])
    assert_close(filled, vit.tap().read(images, edits=[Edit(2, prune=(1,))]), rtol=0, atol=0)
    read = Readers(attention=lambda seen: kept.append(seen.out) if seen.layer == 2 else None)
    vit.tap().read(images, read)
    vit.tap().read(images, read, [Edit(2, prune=(1,), fill=fill + 3)])
    assert_close(kept[1][:, :, [0, 2]], kept[0][:, :, [0, 2]], rtol=0, atol=0)
    assert_close(kept[1][:, :, 1], torch.full_like(kept[1][:, :, 1], 3), rtol=0, atol=0)


def test_the_estimate_does_not_offer_means_and_says_so():
    vit = open_vit(timm_vit(), image_size=(48, 80))
    reasons = unavailable(vit, ["head_loss_change", "head_token_shift"], {"importance": "estimate", "ablation": "mean"})
    assert "--ablation zero" in reasons["head_loss_change"]
    assert "head_token_shift" not in reasons
