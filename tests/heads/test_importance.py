"""Importance by pruning: against naive leave-one-out, surgery, and a toy whose truth is known."""

import copy

import numpy as np
import pytest
import torch
from head_models import PLANTED, PlantedViT, StackedBlock, bright_and_dark_images, timm_vit, torchvision_vit
from numpy.testing import assert_allclose
from torch.testing import assert_close

from vitrail import open_vit
from vitrail.analysis import analyses, make_collectors, unavailable
from vitrail.heads import estimate, importance
from vitrail.heads.estimate import loss_gradients
from vitrail.heads.importance import LAYER_METRICS
from vitrail.heads.metrics import jensen_shannon, shift
from vitrail.heads.summary import rank_agreement

SWEPT = tuple(name for name in analyses()["heads"].measure_names if name.startswith("head_"))


def study_batch(vit, images, labels, names=SWEPT, **options):
    """What a study does with one batch."""
    tap, arrays = vit.tap(), {}
    found = make_collectors(vit, names, options)
    readers = [collector.readers() for collector in found]
    for collector, reader in zip(found, readers, strict=True):
        replay, logits = tap.record(images, reader)
        arrays |= collector.finish(tap, replay, logits, np.asarray(labels, dtype=np.int64))
    return arrays


def without_head(model, layer, head):
    """The model with a head's columns of the output projection set to zero: surgery, no tap."""
    model = copy.deepcopy(model)
    attention = model.blocks[layer].attn
    size = attention.proj.weight.shape[1] // attention.num_heads
    with torch.no_grad():
        attention.proj.weight[:, head * size : (head + 1) * size] = 0
    return model


def residual_of(model, images, layer):
    """Tokens after attention and residual of a timm block, without the tap."""
    kept = []
    handle = model.blocks[layer].norm2.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    with torch.no_grad():
        logits = model(images)
    handle.remove()
    return logits, kept[0]


@pytest.fixture(scope="module")
def model():
    return timm_vit()


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 48, 80, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def labels():
    return np.array([0, 3, 9, 1, 1])


@pytest.fixture(scope="module")
def swept(model, images, labels):
    return study_batch(open_vit(model, image_size=(48, 80)), images, labels)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("head", [0, 2])
def test_the_sweep_equals_naive_leave_one_out(model, images, labels, swept, layer, head):
    plain, before = residual_of(model, images, layer)
    pruned, after = residual_of(without_head(model, layer, head), images, layer)
    rows, target = range(len(labels)), torch.from_numpy(labels)
    loss = torch.nn.functional.cross_entropy
    moved = shift(before, after)
    expected = {
        "head_probability": pruned.softmax(-1)[rows, target],
        "head_divergence": jensen_shannon(plain, pruned),
        "head_loss_change": loss(pruned, target, reduction="none") - loss(plain, target, reduction="none"),
        "head_token_shift": moved.one_minus_cosine.mean(-1),
        "head_token_shift_l2": moved.relative_l2.mean(-1),
        "head_cls_shift": moved.one_minus_cosine[:, 0],
        "head_cls_shift_l2": moved.relative_l2[:, 0],
    }
    for name, values in expected.items():
        assert_allclose(
            swept[name][:, layer, head], values, rtol=1e-4, atol=1e-4 * float(values.abs().max()), err_msg=name
        )
    assert (swept["head_flip"][:, layer, head] == (plain.argmax(-1) != pruned.argmax(-1)).numpy()).all()


def test_a_sweep_with_one_head_at_a_time_gives_the_same(model, images, labels, swept, monkeypatch):
    monkeypatch.setattr(importance, "BATCH_BYTES", 1)
    one_by_one = study_batch(open_vit(model, image_size=(48, 80)), images, labels)
    for name in swept:
        assert_allclose(one_by_one[name], swept[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_planted_head_ranks_first_in_every_model_metric_and_in_the_estimate():
    images, labels = bright_and_dark_images()
    vit = open_vit(PlantedViT().eval(), image_size=(16, 16))
    exact = study_batch(vit, images, labels)
    guess = study_batch(vit, images, labels, importance="estimate")
    scores = {
        "drop": -exact["head_probability"],
        "divergence": exact["head_divergence"],
        "loss": exact["head_loss_change"],
        "flips": exact["head_flip"].astype(float),
        "class token": exact["head_cls_shift"],
        "estimated drop": -guess["head_probability"],
        "estimated loss": guess["head_loss_change"],
    }
    for name, score in scores.items():
        mean = score.mean(0)
        assert np.unravel_index(mean.argmax(), mean.shape) == PLANTED, name
        others = np.delete(mean.ravel(), np.ravel_multi_index(PLANTED, mean.shape))
        assert mean[PLANTED] > others.max(), name


def test_the_estimate_is_the_derivative_by_the_gate(model, images, labels):
    vit = open_vit(model, image_size=(48, 80))
    tap, target, step = vit.tap(), torch.from_numpy(labels), 1e-2
    gradients = loss_gradients(tap, vit.anatomy, images, target, vit.task)

    def loss_with(factor, layer, head):
        scaled = copy.deepcopy(model)
        attention = scaled.blocks[layer].attn
        size = attention.proj.weight.shape[1] // attention.num_heads
        with torch.no_grad():
            attention.proj.weight[:, head * size : (head + 1) * size] *= factor
            return torch.nn.functional.cross_entropy(scaled.double()(images.double()), target, reduction="none").float()

    for layer, head in [(0, 0), (1, 2), (2, 1)]:
        slope = (loss_with(1 + step, layer, head) - loss_with(1 - step, layer, head)) / (2 * step)
        assert_close(gradients[layer][:, head], slope, rtol=1e-2, atol=1e-3)


def test_the_estimate_is_close_and_ranks_heads_alike_where_heads_write_little(images, labels):
    faint = timm_vit()
    with torch.no_grad():
        for block in faint.blocks:
            block.attn.proj.weight.mul_(0.03)
    vit = open_vit(faint, image_size=(48, 80))
    exact = study_batch(vit, images, labels)
    guess = study_batch(vit, images, labels, importance="estimate")
    change = exact["head_loss_change"]
    assert_allclose(guess["head_loss_change"], change, rtol=0, atol=0.1 * np.abs(change).max())
    assert_allclose(guess["head_probability"], exact["head_probability"], rtol=0, atol=0.02)
    assert_allclose(rank_agreement(guess["head_loss_change"], change), 1.0, atol=0.05)
    assert "head_divergence" not in guess


def test_the_estimate_of_one_image_at_a_time_is_the_same(model, images, labels, monkeypatch):
    vit = open_vit(model, image_size=(48, 80))
    together = study_batch(vit, images, labels, ["head_loss_change"], importance="estimate")
    monkeypatch.setattr(estimate, "GRAPH_BYTES", 1)
    apart = study_batch(vit, images, labels, ["head_loss_change"], importance="estimate")
    assert_allclose(apart["head_loss_change"], together["head_loss_change"], rtol=1e-3, atol=1e-5)


def test_layer_metrics_are_exact_under_the_estimate_too(model, images, labels, swept):
    guess = study_batch(open_vit(model, image_size=(48, 80)), images, labels, importance="estimate")
    for name in SWEPT:
        if name in LAYER_METRICS:
            assert_allclose(guess[name], swept[name], rtol=1e-3, atol=1e-7, err_msg=name)


def test_the_sweep_in_bfloat16_errs_by_what_its_roundings_add_up_to(model, images, labels, swept):
    """bfloat16 keeps 8 bits: a rounding is 2^-9 of a value at most. A block rounds the residual stream twice, and what
    it adds some four times on its way (norm, product, activation or softmax, product), so three blocks, the embedding
    and the classifier leave about 24 roundings that do not conspire: sqrt(24) of them, three times that at worst."""
    half = open_vit(copy.deepcopy(model), image_size=(48, 80), precision="bfloat16")
    plain = open_vit(model, image_size=(48, 80)).logits(images)
    bound = 3 * 24**0.5 * 2**-9
    apart = (half.logits(images.bfloat16()).float() - plain).abs().max() / plain.abs().max()
    assert 2**-12 < apart < bound  # not float32 under another name
    found = study_batch(half, images.bfloat16(), labels)
    # dp = p (1 - p) (move of the label's logit - mean move of the others): at most a quarter of twice the bound
    of_logits = bound * float(plain.abs().max())
    assert_allclose(found["head_probability"], swept["head_probability"], rtol=0, atol=of_logits / 2)
    assert rank_agreement(found["head_divergence"], swept["head_divergence"]) > 0.9


def test_the_estimate_leaves_no_gradients_behind(model, images, labels):
    vit = open_vit(model, image_size=(48, 80))
    study_batch(vit, images, labels, importance="estimate")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_classifier_has_layer_metrics_and_the_cosine_of_its_output(images):
    features = timm_vit(num_classes=0)
    vit = open_vit(features, image_size=(48, 80))
    found = study_batch(vit, images, np.zeros(5, dtype=np.int64))
    assert set(found) == {"head_output_shift", *LAYER_METRICS}
    with torch.no_grad():
        cosine = torch.nn.functional.cosine_similarity(features(images), without_head(features, 1, 0)(images), dim=-1)
    assert_allclose(found["head_output_shift"][:, 1, 0], 1 - cosine, rtol=1e-3, atol=1e-6)


def test_where_a_native_kernel_hides_the_residual_a_spare_copy_shows_it():
    model, images = torchvision_vit(), torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    layer, head, size = 1, 2, 12

    def with_residual(one):
        kept = []
        handle = one.encoder.layers[layer].ln_2.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        with torch.no_grad():
            logits = one(images)
        handle.remove()
        return logits, kept[0]

    cut = copy.deepcopy(model)
    with torch.no_grad():
        cut.encoder.layers[layer].self_attention.out_proj.weight[:, head * size : (head + 1) * size] = 0
    (plain, before), (pruned, after) = with_residual(model), with_residual(cut)
    found = study_batch(open_vit(model, image_size=(48, 48)), images, plain.argmax(-1))
    moved = shift(before, after)
    for name, values in {
        "head_divergence": jensen_shannon(plain, pruned),
        "head_token_shift": moved.one_minus_cosine.mean(-1),
        "head_cls_shift_l2": moved.relative_l2[:, 0],
    }.items():
        assert_allclose(found[name][:, layer, head], values, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("how", ["exact", "estimate"])
def test_blocks_that_never_show_the_residual_have_no_layer_metrics_and_keep_the_others(how):
    images, labels = bright_and_dark_images()
    vit = open_vit(PlantedViT(StackedBlock).eval(), image_size=(16, 16))
    found = study_batch(vit, images, labels, importance=how)
    assert "head_token_shift" not in found
    assert "add its attention" in unavailable(vit, ["head_token_shift"])["head_token_shift"]
    drop = -found["head_probability"].mean(0)
    assert np.unravel_index(drop.argmax(), drop.shape) == PLANTED
