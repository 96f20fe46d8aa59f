"""Occlusion and shuffling: exact edits of the input, matched amounts, removal from the sequence, responses."""

import numpy as np
import pytest
import timm
import torch
from neuron_models import small_images, small_vit
from numpy.testing import assert_allclose

from vitrail import Edit, open_vit
from vitrail.errors import Unsupported, UsageError
from vitrail.neurons.embedding import find_embedding
from vitrail.neurons.levels import read_levels
from vitrail.neurons.robustness import (
    Occlusion,
    Shuffling,
    cell_places,
    cells_that_divide,
    drop_orders,
    lost_patches,
    moved_patches,
    paint,
    probes,
    respond,
    run_without,
    shuffle,
)
from vitrail.neurons.views import local_view

GRID = (4, 8)


def some_lost(n_images=3, n_patches=32, n_lost=7, seed=0):
    rng = np.random.default_rng(seed)
    lost = np.zeros((n_images, n_patches), dtype=bool)
    for row in lost:
        row[rng.choice(n_patches, n_lost, replace=False)] = True
    return lost


@pytest.mark.parametrize("cells", [(4, 8), 4, 2])
def test_shuffling_permutes_level_0_local_views_exactly(vit, images, cells):
    # a square grid for cells = grid; the others move blocks of patches
    square = small_vit(img_size=(32, 32)) if cells == (4, 8) else vit
    pictures = small_images(3, (32, 32)) if cells == (4, 8) else images
    grid, n = ((4, 4), 4) if cells == (4, 8) else (GRID, cells)
    embedding, places = find_embedding(square), cell_places(n, [0, 1, 2])
    shuffled, sources = shuffle(pictures, n, places), moved_patches(places, n, grid)
    assert not torch.equal(shuffled, pictures)
    for patch in range(grid[0] * grid[1]):
        for image in range(3):
            moved = local_view(shuffled[image : image + 1], embedding.filters[7], grid, patch)
            before = local_view(pictures[image : image + 1], embedding.filters[7], grid, int(sources[image, patch]))
            assert torch.equal(moved, before)


def test_shuffling_by_the_identity_changes_nothing(images):
    places = np.tile(np.arange(16), (3, 1))
    assert torch.equal(shuffle(images, 4, places), images)
    assert_allclose(moved_patches(places, 4, GRID), np.tile(np.arange(32), (3, 1)))


def test_only_cells_of_whole_patches_are_offered():
    assert cells_that_divide((14, 14)) == [2, 7, 14]
    assert cells_that_divide((16, 16)) == [2, 4]
    assert cells_that_divide((4, 8)) == [2, 4]


@pytest.mark.parametrize("colour", ["black", "mean"])
def test_dropping_patches_changes_level_0_only_at_those_patches(vit, images, colour):
    lost = some_lost()
    before = read_levels(vit.tap(), images).tokens[0]
    after = read_levels(vit.tap(), paint(images, lost, GRID, colour, vit.preprocessing)).tokens[0]
    changed = (before != after).any(-1).numpy()
    assert not changed[:, 0].any()
    assert (changed[:, 1:] == lost).all()


def test_the_mean_colour_is_the_images_own(images, vit):
    painted = paint(images, some_lost(), GRID, "mean", vit.preprocessing)
    row, column = divmod(int(np.flatnonzero(some_lost()[1])[0]), 8)
    assert_allclose(painted[1, :, row * 8 + 3, column * 8 + 3], images[1].mean((1, 2)), atol=1e-6)


def test_orders_put_salient_patches_first_and_last_and_lose_the_same_number():
    salience = np.random.default_rng(0).random((4, 32)).round(1)  # with ties
    orders = drop_orders(salience, [3, 1, 4, 2])
    for order in orders.values():
        assert (np.sort(order, axis=1) == np.arange(32)).all()
        assert (lost_patches(order, 0.3).sum(axis=1) == 10).all()
    ranked = {name: np.take_along_axis(salience, order, axis=1) for name, order in orders.items()}
    assert (np.diff(ranked["salient"], axis=1) <= 0).all()
    assert (np.diff(ranked["non-salient"], axis=1) >= 0).all()


def test_an_images_orders_do_not_depend_on_its_batch():
    salience = np.zeros((3, 32))
    together, alone = drop_orders(salience, [5, 6, 7]), drop_orders(salience[:1], [6])
    for name in together:
        assert (together[name][1] == alone[name][0]).all()
    assert (together["random"][0] != together["random"][1]).any()


def test_removing_patches_is_removing_their_tokens_from_the_sequence(vit, images):
    lost = np.tile(some_lost(1), (3, 1))
    tap = vit.tap()
    replay, _ = tap.record(images)
    found = run_without(tap, replay, lost)
    tokens = read_levels(tap, images).tokens[0][:, [0, *(1 + np.flatnonzero(~lost[0]))]]
    with torch.no_grad():
        expected = vit.model.forward_head(vit.model.norm(vit.model.blocks(tokens)))
    assert_allclose(found, expected, atol=1e-5)


def test_removed_patches_and_patches_nobody_looks_at_are_the_same_to_the_class_token(vit, images):
    lost = np.tile(some_lost(1), (3, 1))
    tap = vit.tap()
    replay, _ = tap.record(images)
    keys = tuple(1 + int(patch) for patch in np.flatnonzero(lost[0]))
    closed = tap.read(images, edits=[Edit(layer, drop_keys=keys) for layer in range(3)]).detach()
    assert_allclose(run_without(tap, replay, lost), closed, atol=1e-5)


def test_where_positions_enter_in_attention_removed_patches_are_closed_to_all():
    vit, images = small_vit("vit_relpos_base_patch16_cls_224"), small_images()
    tap, lost = vit.tap(), np.tile(some_lost(1), (3, 1))
    replay, _ = tap.record(images)
    keys = tuple(vit.anatomy.blocks[0].prefix + int(patch) for patch in np.flatnonzero(lost[0]))
    closed = tap.read(images, edits=[Edit(layer, drop_keys=keys) for layer in range(3)]).detach()
    assert_allclose(run_without(tap, replay, lost), closed, atol=1e-4)


def test_removal_is_refused_where_such_a_model_pools_its_patches():
    vit = small_vit("beit_base_patch16_224", use_rel_pos_bias=True)
    replay, _ = vit.tap().record(small_images())
    with pytest.raises(Unsupported, match="pools its patches"):
        run_without(vit.tap(), replay, some_lost())


def test_removal_works_without_a_class_token():
    vit, images = small_vit("vit_base_patch16_siglip_gap_224", num_classes=10), small_images()
    tap = vit.tap()
    replay, logits = tap.record(images)
    nothing = np.zeros((3, 32), dtype=bool)
    assert_allclose(run_without(tap, replay, nothing), logits, atol=1e-5)
    assert (run_without(tap, replay, some_lost()) - logits).abs().max() > 1e-3


def test_windows_refuse_removal():
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(2, 2), embed_dim=24,
                             num_heads=(2, 3), num_classes=10).eval()  # fmt: skip
    vit = open_vit(swin, image_size=(64, 64))
    replay, _ = vit.tap().record(torch.randn(1, 3, 64, 64))
    with pytest.raises(Unsupported, match="paint them"):
        run_without(vit.tap(), replay, some_lost(1, 256))


def test_responses_are_the_models_own_answers_to_the_edited_images(vit, images):
    labels, salience = np.array([1, 2, 3]), np.random.default_rng(1).random((3, 32))
    asked = [Occlusion("salient", "black", 0.5), Shuffling(2), Occlusion("random", "removed", 0.25)]
    found = respond(vit, images, labels, salience, [0, 1, 2], asked)
    lost = lost_patches(drop_orders(salience, [0, 1, 2])["salient"], 0.5)
    answers = vit.logits(paint(images, lost, GRID, "black", vit.preprocessing)).softmax(-1)
    assert_allclose(found[0].probability, answers[range(3), labels], rtol=1e-4)
    shuffled = vit.logits(shuffle(images, 2, cell_places(2, [0, 1, 2]))).softmax(-1)
    assert_allclose(found[1].probability, shuffled[range(3), labels], rtol=1e-4)
    assert (found[1].correct == (shuffled.argmax(-1).numpy() == labels)).all()


def test_drift_is_0_where_nothing_changed_and_is_measured_on_the_patches_that_are_left(vit, images):
    labels, salience = np.array([1, 2, 3]), np.random.default_rng(1).random((3, 32))
    still, moved = respond(
        vit,
        images,
        labels,
        salience,
        [0, 1, 2],
        [Occlusion("random", "removed", 0.0), Occlusion("random", "mean", 0.5)],
    )
    assert_allclose(still.drift, 0, atol=1e-5)
    assert_allclose(still.class_drift, 0, atol=1e-5)
    lost = lost_patches(drop_orders(salience, [0, 1, 2])["random"], 0.5)
    before = read_levels(vit.tap(), images).tokens[2]
    after = read_levels(vit.tap(), paint(images, lost, GRID, "mean", vit.preprocessing)).tokens[2]
    cosines = torch.nn.functional.cosine_similarity(before, after, dim=-1)[:, 1:].numpy()
    expected = [1 - row[~gone].mean() for row, gone in zip(cosines, lost, strict=True)]
    assert_allclose(moved.drift[:, 1], expected, atol=1e-5)
    assert (moved.class_drift > 1e-4).all()


def test_shuffled_tokens_are_compared_with_the_same_content(vit, images):
    places = cell_places(4, [0, 1, 2])
    (found,) = respond(vit, images, np.array([1, 2, 3]), np.zeros((3, 32)), [0, 1, 2], [Shuffling(4)])
    before = read_levels(vit.tap(), images).tokens[1][:, 1:].numpy()
    after = read_levels(vit.tap(), shuffle(images, 4, places)).tokens[1][:, 1:].numpy()
    sources = moved_patches(places, 4, GRID)
    same = np.take_along_axis(before, sources[..., None], axis=1)
    cosine = (same * after).sum(-1) / np.linalg.norm(same, axis=-1) / np.linalg.norm(after, axis=-1)
    assert_allclose(found.drift[:, 0], 1 - cosine.mean(1), atol=1e-5)


def test_every_selection_loses_by_every_means_in_the_same_amounts():
    asked = probes((14, 14), amounts=(0.25, 0.5))
    assert len(asked) == 3 * 3 * 2 + 3
    assert {probe.amount for probe in asked if isinstance(probe, Occlusion)} == {0.25, 0.5}


def test_all_patches_cannot_be_lost():
    with pytest.raises(UsageError, match="less than 1"):
        lost_patches(np.zeros((1, 4), dtype=int), 1.0)
