"""Filters that show objects, colours and norms of tokens, images that excite, relevance and its curves."""

import copy

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from token_models import small_images, small_vit

from vitrail import Readers
from vitrail.errors import Unsupported, UsageError
from vitrail.tokens.embedding import find_embedding
from vitrail.tokens.excite import TopImages, maximise_activation
from vitrail.tokens.filters import auroc, best_filters_by_class, filter_energy, filter_table, salient_patches
from vitrail.tokens.levels import read_levels
from vitrail.tokens.outliers import norm_outliers
from vitrail.tokens.relevance import METHODS, deletion_and_insertion, gradient_rollout, relevance
from vitrail.tokens.vectors import colour_basis, similarity, token_norms
from vitrail.tokens.views import local_view


def test_energy_is_the_length_of_the_positive_part_of_every_local_view(vit, images):
    embedding = find_embedding(vit)
    found = filter_energy(images, embedding.filters)
    for channel in (0, 31):
        for patch in (0, 9, 31):
            view = local_view(images, embedding.filters[channel], embedding.grid, patch)
            assert_allclose(found[:, channel, patch], view.clamp(min=0).flatten(1).norm(dim=1), rtol=1e-4)


def test_auroc_is_scikit_learns_with_ties():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, (5, 3, 40)).astype(float), rng.random((5, 3, 40)) < 0.3
    found = auroc(scores, positive)
    for image in range(5):
        for channel in range(3):
            assert found[image, channel] == pytest.approx(
                roc_auc_score(positive[image, channel], scores[image, channel]), abs=1e-12
            )


def test_auroc_without_objects_is_not_a_number():
    assert np.isnan(auroc(np.random.default_rng(0).random((2, 9)), np.zeros((2, 9), dtype=bool))).all()


def test_a_filter_table_names_the_best_and_worst_images_and_leaves_out_those_without_a_score():
    scores = np.array([[0.9, 0.1], [np.nan, np.nan], [0.2, 0.8], [0.5, 0.5]])
    table = filter_table(scores, 2)
    assert table.n_images == 3
    assert table.best.tolist() == [[0, 3], [2, 3]]
    assert table.worst.tolist() == [[2, 3], [0, 3]]
    assert_allclose(table.mean, [1.6 / 3, 1.4 / 3])


def test_filters_are_ranked_by_class():
    scores = np.array([[0.9, 0.1], [0.8, 0.3], [0.2, 0.7]])
    ranked = best_filters_by_class(scores, {"a": np.array([True, True, False]), "b": np.array([False, False, True])}, 1)
    assert ranked == {"a": [(0, pytest.approx(0.85))], "b": [(1, pytest.approx(0.7))]}


def test_salient_patches_are_the_share_with_the_highest_rollout():
    found = salient_patches(np.array([[0.1, 0.4, 0.3, 0.2], [4.0, 3.0, 2.0, 1.0]]), 0.5)
    assert found.tolist() == [[False, True, True, False], [True, True, False, False]]


def test_colours_are_principal_components_with_one_basis_for_all_images():
    tokens = np.random.default_rng(0).normal(size=(6, 20, 8)) * np.arange(8, 0, -1)
    basis = colour_basis(tokens)
    expected = PCA(3).fit(tokens.reshape(-1, 8))
    for found, direction in zip(basis.directions, expected.components_, strict=True):
        assert abs(found @ direction) == pytest.approx(1, abs=1e-9)
    assert_allclose(basis.shares, expected.explained_variance_ratio_, rtol=1e-9)
    colours = basis.colours(tokens)
    assert colours.shape == (6, 20, 3)
    assert_allclose(colours[2], basis.colours(tokens[2]))
    assert colours.min() == 0
    assert colours.max() == 1


def test_a_foreground_alone_can_set_the_colours():
    tokens = np.random.default_rng(0).normal(size=(2, 30, 5))
    chosen = np.zeros((2, 30), dtype=bool)
    chosen[:, :12] = True
    assert_allclose(colour_basis(tokens, weights=chosen).mean, tokens[:, :12].reshape(-1, 5).mean(0))
    with pytest.raises(UsageError, match="take more images"):
        colour_basis(tokens[:1, :2])


def test_outliers_are_norms_far_above_the_rest():
    norms = np.random.default_rng(0).normal(10, 1, (4, 50))
    norms[2, 7] = 60
    assert np.argwhere(norm_outliers(norms)).tolist() == [[2, 7]]


def test_norms_and_similarities_of_tokens(vit, images):
    tokens = read_levels(vit.tap(), images).tokens[3]
    assert_allclose(token_norms(tokens), tokens.norm(dim=-1), rtol=1e-6)
    found = similarity(tokens, 9)
    assert_allclose(found[:, 9], 1, atol=1e-6)
    assert_allclose(found[1, 4], torch.nn.functional.cosine_similarity(tokens[1, 4], tokens[1, 9], dim=0), atol=1e-6)
    centred = tokens[1] - tokens[1].mean(0)
    expected = torch.nn.functional.cosine_similarity(centred[4], centred[9], dim=0)
    assert abs(float(expected - found[1, 4])) > 1e-3
    assert_allclose(similarity(tokens, 9, centred=True)[1, 4], expected, atol=1e-6)
    with pytest.raises(UsageError, match="tokens 0 to 32"):
        similarity(tokens, 33)


def test_streamed_top_images_are_those_of_all_at_once():
    patches = torch.randn(40, 6, 5, generator=torch.Generator().manual_seed(0))
    top = TopImages(5, keep=4)
    for start in range(0, 40, 7):
        numbers = list(range(start, min(start + 7, 40)))
        top.add(patches[numbers], numbers)
    highest = patches.amax(1).T
    expected = highest.argsort(dim=1, descending=True)[:, :4]
    assert (top.image == expected.numpy()).all()
    assert_allclose(top.activation, highest.gather(1, expected), rtol=1e-6)
    channel, rank = 2, 1
    assert patches[top.image[channel, rank], top.patch[channel, rank], channel] == pytest.approx(
        top.activation[channel, rank]
    )


def test_fewer_images_than_places_leave_places_empty():
    top = TopImages(3, keep=4)
    top.add(torch.randn(2, 6, 3), [8, 9])
    assert (top.image[:, 2:] == -1).all()
    assert set(top.image[:, :2].flatten()) == {8, 9}


def test_a_made_image_excites_its_channel_more_than_noise_and_stays_an_image(vit):
    made = maximise_activation(vit, 2, 7, n_steps=15)
    assert made.after > made.before + 0.1
    assert made.pixels.shape == (32, 64, 3)
    assert made.pixels.min() >= 0
    assert made.pixels.max() <= 1
    with pytest.raises(UsageError, match="levels 1 to 3"):
        maximise_activation(vit, 0, 7)


@pytest.mark.parametrize(
    ("channel", "options", "words"),
    [
        (99, {}, "no channel 99: level 2 .* channels 0 to 47"), (-1, {}, "no channel -1"),
        (7, {"token": 99}, "no token 99"), (7, {"token": -1}, "no token -1"),
        (7, {"n_steps": 0}, "0 steps cannot be asked for"),
        (7, {"lr": 0.0}, "learning rate of 0"), (7, {"lr": float("nan")}, "learning rate of nan"),
    ],
)  # fmt: skip
def test_no_image_is_made_for_a_neuron_that_is_not_there_or_in_no_steps(channel, options, words, vit):
    with pytest.raises(UsageError, match=words):
        maximise_activation(vit, 2, channel, **({"n_steps": 2} | options))


def test_gradient_rollout_is_that_of_maps_and_gradients_taken_by_hand(vit, images):
    """Chefer, Gur and Wolf's rule on timm's own unfused attention, its maps kept with their gradients."""
    model, classes, maps = copy.deepcopy(vit.model), np.array([1, 4, 2]), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _module, _inputs, weights: maps.append(weights))
    logits = model(images)
    gradients = torch.autograd.grad(logits[range(3), classes].sum(), maps)
    carried = torch.eye(33).expand(3, -1, -1)
    for weights, gradient in zip(maps, gradients, strict=True):
        carried = carried + (weights * gradient).clamp(min=0).mean(1) @ carried
    expected = (carried - torch.eye(33))[:, 0, 1:].detach()
    assert expected.max() > 1e-3
    assert_allclose(gradient_rollout(vit, images, classes), expected, rtol=1e-3, atol=1e-6)


def test_gradient_rollout_knows_of_the_class_and_the_others_do_not(vit, images):
    prototype = np.ones(48, np.float32)
    one = relevance(vit, images, np.array([1, 1, 1]), prototype=prototype)
    other = relevance(vit, images, np.array([5, 5, 5]), prototype=prototype)
    for method in METHODS:
        same = np.allclose(one[method], other[method])
        assert same == (method not in ("gradient", "grad_sam", "legrad", "lrp"))


def test_raw_relevance_is_the_class_tokens_last_row(vit, images):
    maps = {}
    vit.tap().read(images, Readers(attention=lambda each: maps.update({each.layer: each.weights().detach()})))
    found = relevance(vit, images, np.zeros(3, dtype=int), ["raw"])["raw"]
    assert_allclose(found, maps[2].mean(1)[:, 0, 1:], atol=1e-6)


def test_deletion_and_insertion_end_where_the_other_begins(vit, images):
    classes = vit.logits(images).argmax(-1).numpy()
    curves = deletion_and_insertion(vit, images, classes, np.random.default_rng(0).random((3, 32)), 4)
    whole = vit.logits(images).softmax(-1)[range(3), classes]
    assert_allclose(curves.deletion[:, 0], whole, rtol=1e-4)
    assert_allclose(curves.insertion[:, -1], whole, rtol=1e-4)
    assert_allclose(curves.deletion[:, -1], curves.insertion[:, 0])
    low, high = curves.areas
    assert ((low > 0) & (low < 1) & (high > 0) & (high < 1)).all()


def test_the_areas_of_a_straight_line_are_a_half():
    from vitrail.tokens.relevance import Curves

    line = np.linspace(0, 1, 5)[None]
    low, high = Curves(np.linspace(0, 1, 5), 1 - line, line).areas
    assert (low, high) == (pytest.approx(0.5), pytest.approx(0.5))


def test_deleting_in_one_order_is_inserting_in_the_reverse(vit, images):
    classes = vit.logits(images).argmax(-1).numpy()
    scores = np.random.default_rng(1).random((3, 32))
    one = deletion_and_insertion(vit, images, classes, scores, 4)
    other = deletion_and_insertion(vit, images, classes, -scores, 4)
    assert_allclose(one.deletion, other.insertion[:, ::-1], rtol=1e-4)


def test_models_without_a_classifier_have_no_class_to_explain():
    features = small_vit("vit_base_patch16_siglip_gap_224", num_classes=0)
    with pytest.raises(Unsupported, match="no classifier"):
        gradient_rollout(features, small_images(1), np.array([0]))
    found = relevance(features, small_images(1), np.array([0]), ["raw", "rollout", "random"])
    assert {each.shape for each in found.values()} == {(1, 32)}


def test_curves_of_no_class_or_no_image_are_refused(vit, images):
    scores = np.random.default_rng(0).random((3, 32))
    for classes, words in (([0, 1, 99], "99 is no class"), ([0, 1, -1], "-1 is no class")):
        with pytest.raises(UsageError, match=words):
            deletion_and_insertion(vit, images, np.array(classes), scores, 4)
    with pytest.raises(UsageError, match="no image"):
        deletion_and_insertion(vit, images[:0], np.zeros(0, dtype=int), scores[:0], 4)
    with pytest.raises(UsageError, match="no image"):
        relevance(vit, images[:0], np.zeros(0, dtype=int), ["raw"])
    features = small_vit("vit_base_patch16_siglip_gap_224", num_classes=0)
    with pytest.raises(Unsupported, match="no classifier"):
        deletion_and_insertion(features, small_images(1), np.array([0]), scores[:1], 4)


def test_an_unknown_relevance_is_refused(vit, images):
    with pytest.raises(UsageError, match="raw, rollout"):
        relevance(vit, images, np.zeros(3, dtype=int), ["magic"])
