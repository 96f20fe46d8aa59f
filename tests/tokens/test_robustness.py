"""Occlusion and shuffling: exact edits of the input, matched amounts, removal from the sequence, responses."""

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from token_models import small_images, small_vit

import vitrail
from vitrail import Edit, open_vit
from vitrail.analysis import unavailable
from vitrail.contract.tiny_models import FAMILIES
from vitrail.errors import Unsupported, UsageError
from vitrail.tokens.amounts import cells_that_divide
from vitrail.tokens.embedding import find_embedding
from vitrail.tokens.levels import read_levels
from vitrail.tokens.robustness import (
    Occlusion,
    Shuffling,
    all_probes,
    cell_permutations,
    drop_orders,
    paint,
    patch_sources,
    patches_to_drop,
    respond,
    run_without,
    shuffle,
)
from vitrail.tokens.views import local_view

GRID = (4, 8)


def some_lost(n_images=3, n_patches=32, n_lost=7, seed=0):
    rng = np.random.default_rng(seed)
    lost = np.zeros((n_images, n_patches), dtype=bool)
    for row in lost:
        row[rng.choice(n_patches, n_lost, replace=False)] = True
    return lost


def test_patches_that_leave_pixels_over_are_painted_and_moved_where_the_model_has_them():
    model = timm.create_model("vit_tiny_patch16_224", img_size=38, patch_size=10, embed_dim=24, depth=1, num_heads=2)
    vit = open_vit(model.eval(), mean=0.5, std=0.5)
    block, images = vit.anatomy.blocks[0], torch.randn((2, 3, 38, 38), generator=torch.Generator().manual_seed(0))
    assert (block.grid, block.patch_step) == ((3, 3), (10, 10))
    lost = np.zeros((2, 9), dtype=bool)
    lost[:, 4] = True
    painted = paint(images, lost, (3, 3), "black", vit.preprocessing, block.patch_step)
    expected = images.clone()
    expected[..., 10:20, 10:20] = -1
    assert torch.equal(painted, expected)
    moved = shuffle(images, 3, np.array([[8, 1, 2, 3, 4, 5, 6, 7, 0]] * 2), (3, 3), block.patch_step)
    assert torch.equal(moved[..., :10, :10], images[..., 20:30, 20:30])
    ids = np.zeros((38, 38), dtype=np.int64)
    ids[20:30, 20:30] = 7
    looked = vitrail.look(vit, Image.new("RGB", (38, 38)), measures="patches", mask=ids)
    assert_array_equal(looked["object_share"][0], np.eye(9)[8])


@pytest.mark.parametrize("cells", [(4, 8), 4, 2])
def test_shuffling_permutes_level_0_local_views_exactly(vit, images, cells):
    # a square grid for cells = grid; the others move blocks of patches
    square = small_vit(img_size=(32, 32)) if cells == (4, 8) else vit
    pictures = small_images(3, (32, 32)) if cells == (4, 8) else images
    grid, n = ((4, 4), 4) if cells == (4, 8) else (GRID, cells)
    embedding, places = find_embedding(square), cell_permutations(n, [0, 1, 2])
    shuffled, sources = shuffle(pictures, n, places), patch_sources(places, n, grid)
    assert not torch.equal(shuffled, pictures)
    for patch in range(grid[0] * grid[1]):
        for image in range(3):
            moved = local_view(shuffled[image : image + 1], embedding.filters[7], grid, patch)
            before = local_view(pictures[image : image + 1], embedding.filters[7], grid, int(sources[image, patch]))
            assert torch.equal(moved, before)


def test_shuffling_by_the_identity_changes_nothing(images):
    places = np.tile(np.arange(16), (3, 1))
    assert torch.equal(shuffle(images, 4, places), images)
    assert_allclose(patch_sources(places, 4, GRID), np.tile(np.arange(32), (3, 1)))


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
        assert (patches_to_drop(order, 0.3).sum(axis=1) == 10).all()
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
    lost = patches_to_drop(drop_orders(salience, [0, 1, 2])["salient"], 0.5)
    answers = vit.logits(paint(images, lost, GRID, "black", vit.preprocessing)).softmax(-1)
    assert_allclose(found[0].probability, answers[range(3), labels], rtol=1e-4)
    shuffled = vit.logits(shuffle(images, 2, cell_permutations(2, [0, 1, 2]))).softmax(-1)
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
    lost = patches_to_drop(drop_orders(salience, [0, 1, 2])["random"], 0.5)
    before = read_levels(vit.tap(), images).tokens[2]
    after = read_levels(vit.tap(), paint(images, lost, GRID, "mean", vit.preprocessing)).tokens[2]
    cosines = torch.nn.functional.cosine_similarity(before, after, dim=-1)[:, 1:].numpy()
    expected = [1 - row[~gone].mean() for row, gone in zip(cosines, lost, strict=True)]
    assert_allclose(moved.drift[:, 1], expected, atol=1e-5)
    assert (moved.class_drift > 1e-4).all()


def test_shuffled_tokens_are_compared_with_the_same_content(vit, images):
    places = cell_permutations(4, [0, 1, 2])
    (found,) = respond(vit, images, np.array([1, 2, 3]), np.zeros((3, 32)), [0, 1, 2], [Shuffling(4)])
    before = read_levels(vit.tap(), images).tokens[1][:, 1:].numpy()
    after = read_levels(vit.tap(), shuffle(images, 4, places)).tokens[1][:, 1:].numpy()
    sources = patch_sources(places, 4, GRID)
    same = np.take_along_axis(before, sources[..., None], axis=1)
    cosine = (same * after).sum(-1) / np.linalg.norm(same, axis=-1) / np.linalg.norm(after, axis=-1)
    assert_allclose(found.drift[:, 0], 1 - cosine.mean(1), atol=1e-5)


def test_on_every_grid_of_a_hierarchy_shuffled_tokens_are_compared_with_the_same_content():
    swin, images = small_swin(), small_images(2, (112, 112))
    (drift,) = [each.drift for each in respond_to(swin, images, [Shuffling(7)])]
    places = cell_permutations(7, [0, 1])
    shuffled = torch.empty_like(images)
    for image in range(2):
        for cell in range(49):
            (row, column), (row_from, column_from) = divmod(cell, 7), divmod(int(places[image, cell]), 7)
            source = images[image, :, 16 * row_from : 16 * row_from + 16, 16 * column_from : 16 * column_from + 16]
            shuffled[image, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = source
    before, after = maps_of(swin, images), maps_of(swin, shuffled)
    for layer, (one, two) in enumerate(zip(before, after, strict=True)):
        side = one.shape[1] // 7  # patches along a cell: 4 in the first stage, 2 in the second
        for image in range(2):
            cosines = []
            for cell in range(49):
                (row, column), (row_from, column_from) = divmod(cell, 7), divmod(int(places[image, cell]), 7)
                now = two[image, side * row :, side * column :][:side, :side]
                then = one[image, side * row_from :, side * column_from :][:side, :side]
                cosines.append(torch.nn.functional.cosine_similarity(now, then, dim=-1).mean())
            assert_allclose(drift[image, layer], 1 - torch.stack(cosines).mean(), atol=1e-5)
    in_place = [
        1 - torch.nn.functional.cosine_similarity(*maps, dim=-1).mean() for maps in zip(before, after, strict=True)
    ]
    assert (
        drift.mean(0)[2:] < 0.8 * np.array(in_place)[2:]
    ).all()  # what comparing the same place gives is another number


@pytest.mark.parametrize("name", ["timm PVT v2", "timm EdgeNeXt"])
def test_what_stages_return_on_the_next_grid_is_compared_with_the_same_content(name):
    family = next(each for each in FAMILIES if each.name == name)
    vit, images = open_vit(family.model(), image_size=64, mean=0.5, std=0.5), small_images(2, (64, 64))
    assert unavailable(vit, ["shuffle_drift"]) == {}
    salience = np.zeros((2, np.prod(vit.anatomy.blocks[0].grid)))
    responses = respond(vit, images, np.zeros(2, dtype=int), salience, [0, 1], [Shuffling(2), Shuffling(4)])
    for cells, response in zip((2, 4), responses, strict=True):
        places = cell_permutations(cells, [0, 1])
        shuffled = move_cells(images, places, cells)
        before, after = (stages_of(vit, pictures) for pictures in (images, shuffled))
        assert np.isnan(response.drift[:, -1]).all()  # no layer says on which grid the last one's patches lie
        for layer in range(vit.n_layers - 1):
            same = move_cells(before[layer], places, cells)
            drift = 1 - torch.nn.functional.cosine_similarity(same, after[layer], dim=1).mean((1, 2))
            assert_allclose(response.drift[:, layer], drift, atol=1e-5)


def move_cells(pictures, places, cells):
    """Pictures [image channel row column] whose cells have changed places."""
    moved, side = torch.empty_like(pictures), pictures.shape[-1] // cells
    for image, permutation in enumerate(places):
        for cell, source in enumerate(permutation):
            (row, column), (row_from, column_from) = divmod(cell, cells), divmod(int(source), cells)
            patch = pictures[image, :, side * row_from :, side * column_from :][:, :side, :side]
            moved[image, :, side * row : side * row + side, side * column : side * column + side] = patch
    return moved


@torch.no_grad()
def stages_of(vit, pictures):
    """What each layer of a pyramid returns, as pictures [image channel row column], from hooks on the model itself."""
    returned = []
    stages = [vit.model.get_submodule(block.path) for block in vit.anatomy.blocks]
    hooks = [stage.register_forward_hook(lambda _, __, out: returned.append(out)) for stage in stages]
    vit.model(pictures)
    for hook in hooks:
        hook.remove()
    return returned


def test_the_cells_must_divide_a_grid_that_a_layer_returns(vit, monkeypatch):
    monkeypatch.setattr("vitrail.tokens.levels.grids_returned", lambda vit: frozenset({(5, 5)}))
    assert unavailable(vit, ["shuffle_drift", "shuffle_probability"]) == {
        "shuffle_drift": "the cells that divide its first grid (4, 8) divide none that a layer returns: (5, 5)"
    }


def test_drift_is_unknown_where_the_edge_of_a_cell_runs_through_a_patch():
    (found,) = respond_to(small_swin(), small_images(2, (112, 112)), [Shuffling(4)])  # 28 and 14 patches a side
    assert np.isfinite(found.drift[:, :2]).all()
    assert np.isnan(found.drift[:, 2:]).all()


def test_on_every_grid_of_a_hierarchy_only_patches_of_which_nothing_is_lost_count():
    swin, images = small_swin(), small_images(2, (112, 112))
    (found,) = respond_to(swin, images, [Occlusion("random", "mean", 0.25)])
    lost = patches_to_drop(drop_orders(np.zeros((2, 784)), [0, 1])["random"], 0.25)
    painted = images.clone()
    for image, patch in zip(*np.nonzero(lost), strict=True):
        row, column = divmod(int(patch), 28)
        colour = images[image].mean((1, 2))[:, None, None]
        painted[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = colour
    for layer, (one, two) in enumerate(zip(maps_of(swin, images), maps_of(swin, painted), strict=True)):
        cosines = torch.nn.functional.cosine_similarity(one, two, dim=-1)
        step = 28 // one.shape[1]
        for image in range(2):
            marked = lost[image].reshape(28, 28)
            places = [(row, column) for row in range(one.shape[1]) for column in range(one.shape[1])]
            left = [
                float(cosines[image, row, column])
                for row, column in places
                if not marked[step * row : step * row + step, step * column : step * column + step].any()
            ]
            assert 0 < len(left) < len(places)
            assert_allclose(found.drift[image, layer], 1 - np.mean(left), atol=1e-5)


def small_swin():
    """A random Swin with 28 x 28 patches in its first two layers, 14 x 14 in its last two."""
    torch.manual_seed(0)
    shape = {"img_size": 112, "depths": (2, 2), "embed_dim": 16, "num_heads": (2, 4), "num_classes": 10}
    return timm.create_model("swin_tiny_patch4_window7_224", **shape).eval()


def respond_to(model, images, asked):
    vit = open_vit(model, image_size=(112, 112))
    return respond(vit, images, np.array([1, 2]), np.zeros((2, 784)), [0, 1], asked)


@torch.no_grad()
def maps_of(swin, images):
    """What each block returns, [image row column channel]."""
    maps = []
    hooks = [
        block.register_forward_hook(lambda module, args, output: maps.append(output.clone()))
        for stage in swin.layers
        for block in stage.blocks
    ]
    swin(images)
    for hook in hooks:
        hook.remove()
    return maps


def test_every_selection_loses_by_every_means_in_the_same_amounts():
    asked = all_probes((14, 14), amounts=(0.25, 0.5))
    assert len(asked) == 3 * 3 * 2 + 3
    assert {probe.amount for probe in asked if isinstance(probe, Occlusion)} == {0.25, 0.5}


def test_all_patches_cannot_be_lost():
    with pytest.raises(UsageError, match="less than 1"):
        patches_to_drop(np.zeros((1, 4), dtype=int), 1.0)


@pytest.fixture(scope="module")
def overlapping():
    """Patches of 8 pixels, 4 apart: 14 of them along a side of 60 pixels, which is no multiple of 14."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=56, patch_size=4, depth=2, embed_dim=24, num_heads=2, num_classes=7
    )
    model.patch_embed.proj = torch.nn.Conv2d(3, 24, 8, stride=4)
    model.patch_embed.img_size, model.patch_embed.strict_img_size = None, False
    return open_vit(model.eval(), image_size=60, mean=0.5, std=0.5)


def test_patches_that_overlap_are_painted_a_step_wide(overlapping):
    assert overlapping.anatomy.blocks[0].grid == (14, 14)
    images = torch.rand(1, 3, 60, 60)
    lost = np.zeros((1, 196), dtype=bool)
    lost[0, [0, 14 * 3 + 5, 195]] = True
    changed = (paint(images, lost, (14, 14), "black", overlapping.preprocessing) != images).any(1)[0].numpy()
    expected = np.zeros((60, 60), dtype=bool)
    expected[:4, :4] = expected[12:16, 20:24] = expected[52:56, 52:56] = True
    assert (changed == expected).all()


def test_occlusion_and_shuffling_go_through_where_patches_overlap(overlapping):
    images, numbers = torch.rand(2, 3, 60, 60), [0, 1]
    probes = [Occlusion("random", "mean", 0.5), *(Shuffling(cells) for cells in cells_that_divide((14, 14)))]
    salience = np.random.default_rng(0).random((2, 196))
    found = respond(overlapping, images, np.array([1, 2]), salience, numbers, probes)
    assert len(found) == 4
    for probe, response in zip(probes[1:], found[1:], strict=True):
        edited = images.clone()
        side = 56 // probe.cells
        for image, places in enumerate(cell_permutations(probe.cells, numbers)):
            for place, source in enumerate(places):
                (down, right), (top, left) = divmod(place, probe.cells), divmod(int(source), probe.cells)
                edited[image, :, down * side : (down + 1) * side, right * side : (right + 1) * side] = images[
                    image, :, top * side : (top + 1) * side, left * side : (left + 1) * side
                ]
        expected = overlapping.logits(edited).softmax(-1)[[0, 1], [1, 2]]
        assert_allclose(response.probability, expected, rtol=1e-5)
