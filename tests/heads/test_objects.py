"""Which heads find objects: scores against brute force, planted heads, the null; no number depends on later images."""

import itertools

import numpy as np
import pytest
import timm
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import rankdata
from torch import nn
from torch.testing import assert_close

from heads.head_models import timm_swin, timm_vit
from vitrail import Readers, open_vit
from vitrail.analysis import analyses, declaration, make_collectors, unavailable
from vitrail.heads.head_values import head_values
from vitrail.heads.object_summary import example_maps, summarise_scores
from vitrail.heads.objects import SCORES, centre_scores, class_maps, map_scores

NAMES = analyses()["objects"].measure_names
SIDE, N_LAYERS = 6, 2


def planted_model(class_token: bool = True) -> nn.Module:
    """On 6 x 6 patches of 8 px: in L1 head 0 looks at bright patches, head 1 at dark ones, head 2 evenly."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=48,
        patch_size=8,
        embed_dim=24,
        depth=N_LAYERS,
        num_heads=3,
        num_classes=5,
        class_token=class_token,
        global_pool="token" if class_token else "avg",
    ).eval()
    with torch.no_grad():
        model.pos_embed.zero_()
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.weight[0] = 1 / 64
        model.patch_embed.proj.bias.zero_()
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
            block.attn.proj.weight.zero_()
            block.mlp.fc2.weight.zero_()
        attention = model.blocks[1].attn
        for head, sign in ((0, 1.0), (1, -1.0)):
            attention.qkv.bias[8 * head] = 4.0  # every query asks the same
            attention.qkv.weight[24 + 8 * head, 0] = sign
    return model


def bright_objects(n_images: int, seed: int = 0) -> tuple[torch.Tensor, list[np.ndarray]]:
    """Dark photographs with a bright rectangle of 2 x 3 patches anywhere, and the rectangle as instance 7."""
    random = np.random.default_rng(seed)
    images, masks = np.full((n_images, 3, 48, 48), -0.5, np.float32), []
    images += 0.05 * random.standard_normal(images.shape)
    for image in images:
        row, column = 8 * random.integers(0, 5), 8 * random.integers(0, 4)
        image[:, row : row + 16, column : column + 24] += 1.0
        mask = np.zeros((48, 48), dtype=np.int64)
        mask[row : row + 16, column : column + 24] = 7
        masks.append(mask)
    return torch.from_numpy(images), masks


def collected(model: nn.Module, images: torch.Tensor, masks: list, names: tuple[str, ...] = NAMES) -> dict:
    vit = open_vit(model, image_size=tuple(images.shape[2:]))
    (collector,) = make_collectors(vit, names, {"masks": "given"})
    collector.take_masks(masks)
    replay, logits = vit.tap().record(images, collector.readers())
    with torch.no_grad():
        return collector.finish(vit.tap(), replay, logits, np.zeros(len(images), dtype=np.int64))


# --- scores of one map -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=5, max_size=5), st.lists(st.booleans(), min_size=5, max_size=5))
def test_scores_are_means_over_all_orders_of_equal_weights(weights: list[int], on: list[bool]) -> None:
    scores = map_scores(torch.tensor(weights).float(), torch.tensor(on)).numpy()
    n_objects = sum(on)
    if n_objects in (0, 5):
        assert np.isnan(scores).all()
        return
    first, hits = [], []
    for order in itertools.permutations(range(5)):
        ranked = sorted(order, key=lambda patch: -weights[patch])  # stable: ties in the order of the permutation
        first.append(on[ranked[0]])
        hits.append(sum(on[patch] for patch in ranked[:n_objects]))
    pairs = [
        (weights[a] > weights[b]) + 0.5 * (weights[a] == weights[b])
        for a, b in itertools.product(range(5), repeat=2)
        if on[a] and not on[b]
    ]
    expected = np.mean(first), np.mean(hits) / (2 * n_objects - np.mean(hits)), np.mean(pairs)
    assert_allclose(scores, expected, atol=1e-6)


def test_patches_that_do_not_count_might_as_well_not_be_there() -> None:
    generator = torch.Generator().manual_seed(0)
    maps, on = torch.rand((4, 9), generator=generator), torch.rand((4, 9), generator=generator) < 0.4
    counted = torch.ones(4, 9, dtype=torch.bool)
    counted[:, [2, 5]] = False
    left = [0, 1, 3, 4, 6, 7, 8]
    assert_close(map_scores(maps, on, counted), map_scores(maps[:, left], on[:, left]), equal_nan=True)


def test_maps_that_are_the_object_score_one_and_maps_of_the_rest_score_zero() -> None:
    on = torch.tensor([True, True, False, False, False])
    noise = torch.tensor([0.1, 0.3, 0.0, 0.2, 0.4])
    assert_array_equal(map_scores(on + 0.1 * noise, on), [1, 1, 1])
    assert_array_equal(map_scores(~on + 0.1 * noise, on), [0, 0, 0])
    assert_allclose(map_scores(torch.ones(5), on), [0.4, 0.25, 0.5])  # 0.8 of 2 are hit: 0.8 / 3.2


def test_the_map_of_an_image_is_the_class_tokens_row_or_what_patches_receive_from_others() -> None:
    weights = torch.rand((2, 5, 5), generator=torch.Generator().manual_seed(0))
    assert_array_equal(class_maps(weights, 1, 0), weights[:, 0, 1:])
    received = class_maps(weights, 0, None)
    assert float(received[1, 2]) == pytest.approx(float(weights[1, [0, 1, 3, 4], 2].mean()))


def test_a_blob_in_the_middle_finds_what_lies_in_the_middle() -> None:
    middle, corner = np.zeros((2, 25), dtype=bool)
    middle[[7, 11, 12, 13, 17]] = True
    corner[0] = True
    assert_array_equal(centre_scores(middle, (5, 5)), [1, 1, 1])
    assert_allclose(centre_scores(corner, (5, 5)), [0, 0, 1.5 / 24])  # the farthest, with three other corners


# --- heads of a model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", [True, False], ids=["class token", "no class token"])
def test_the_planted_head_finds_every_object_and_not_those_of_other_images(class_token: bool) -> None:
    images, masks = bright_objects(9)
    found = collected(planted_model(class_token), images, masks)
    assert set(found) == set(NAMES)
    for name, values in found.items():
        assert values.dtype == declaration(name).dtype
        assert values.ndim == len(declaration(name).dims)
    for kind in ("object", "object_patch"):
        for score in SCORES:
            values = found[f"{kind}_{score}"]
            assert_array_equal(values[:, 1, 0], np.ones(9), err_msg=f"{kind} {score}")
            assert_array_equal(values[:, 1, 1], np.zeros(9), err_msg=f"{kind} {score}")
            null = found[f"{kind}_{score}_null"]
            assert np.isnan(null[0]).all()  # nothing before it
            assert np.nanmean(null[1:, 1, 0]) < 0.75
    assert_allclose(found["object_auroc"][:, 1, 2], 0.5, atol=1e-6)  # even attention
    assert_allclose(found["object_auroc"][:, 0], 0.5, atol=1e-6)


def test_scores_are_those_of_the_maps_themselves() -> None:
    images, masks = bright_objects(3)
    masks[1] = None
    vit = open_vit(timm_vit(img_size=48, patch_size=8), image_size=48)
    found = collected(vit.model, images, masks)
    maps = {}
    vit.tap().read(images, readers_of(maps))
    on = (masks[0] > 0).reshape(6, 8, 6, 8).mean((1, 3)).reshape(-1) >= 0.5
    for layer, weights in maps.items():
        for head in range(weights.shape[1]):
            row = weights[0, head, 0, 1:]
            above = rankdata(row)[on].sum() - on.sum() * (on.sum() + 1) / 2
            assert found["object_auroc"][0, layer, head] == pytest.approx(above / (on.sum() * (~on).sum()), abs=1e-5)
            strongest = np.argsort(-row)[: on.sum()]
            hits = on[strongest].sum()
            assert found["object_iou"][0, layer, head] == pytest.approx(hits / (2 * on.sum() - hits), abs=1e-5)
            assert found["object_pointing"][0, layer, head] == on[row.argmax()]
            rows = []
            for query in np.flatnonzero(on):
                others = np.arange(36) != query
                keys, same = weights[0, head, 1 + query, 1:][others], on[others]
                above = rankdata(keys)[same].sum() - same.sum() * (same.sum() + 1) / 2
                rows.append(above / (same.sum() * (~same).sum()))
            assert found["object_patch_auroc"][0, layer, head] == pytest.approx(np.mean(rows), abs=1e-5)
        mean = weights[0, :, 0, 1:].mean(0)
        above = rankdata(mean)[on].sum() - on.sum() * (on.sum() + 1) / 2
        assert found["object_layer_auroc"][0, layer] == pytest.approx(above / (on.sum() * (~on).sum()), abs=1e-5)
    assert all(np.isnan(values[1]).all() for values in found.values())  # no mask
    only = collected(vit.model, images[[0, 2]], [masks[0], masks[2]])
    assert_array_equal(found["object_auroc_null"][2], only["object_auroc_null"][1])


def readers_of(maps: dict):
    return Readers(attention=lambda each: maps.update({each.layer: each.weights().detach().numpy()}))


def test_no_number_depends_on_images_that_follow() -> None:
    images, masks = bright_objects(6)
    model = planted_model()
    long, short = collected(model, images, masks), collected(model, images[:4], masks[:4])
    for name in NAMES:
        assert_array_equal(long[name][:4], short[name], err_msg=name)


def test_maps_of_some_images_are_kept_as_they_are() -> None:
    images, masks = bright_objects(24)
    found = collected(planted_model(), images, masks, ("object_map", "object_auroc"))
    kept = np.isfinite(found["object_map"]).any((1, 2, 3))
    assert 1 <= kept.sum() <= 8
    bright = images[:, 0].reshape(24, 6, 8, 6, 8).mean((2, 4)).reshape(24, 36).numpy() > 0
    maps = found["object_map"][kept][:, 1, 0]
    assert maps[bright[kept]].min() > maps[~bright[kept]].max()


def test_hierarchies_have_scores_on_each_layers_grid_and_models_without_maps_say_why() -> None:
    images, masks = bright_objects(2)
    pixels = torch.nn.functional.interpolate(images, (64, 64))
    grown = [np.kron(mask, np.ones((4, 4), dtype=np.int64))[::3, ::3] for mask in masks]
    found = collected(timm_swin(), pixels, grown)
    assert np.isfinite(found["object_auroc"][0]).any()
    assert ((found["object_iou"] >= 0) | np.isnan(found["object_iou"])).all()
    without = timm.create_model("xcit_nano_12_p16_224", depth=2, cls_attn_layers=1, img_size=64, num_classes=5).eval()
    assert (
        "no layer has a map"
        in unavailable(open_vit(without, image_size=64), ["object_iou"], {"masks": "given"})["object_iou"]
    )
    vit = open_vit(planted_model(), image_size=48)
    assert "give a folder of instance ids" in unavailable(vit, ["object_iou"])["object_iou"]


# --- over the images of a study --------------------------------------------------------------------------------------


def planted_scores(n_images: int, best: float = 0.9, seed: int = 0):
    random = np.random.default_rng(seed)
    own = random.normal(0.6, 0.1, (n_images, 3, 4))
    own[:, 2, 1] = random.normal(best, 0.05, n_images)
    null = random.normal(0.6, 0.1, own.shape)
    own[3], null[3], null[0] = np.nan, np.nan, np.nan  # no mask; the first of its batch
    dims = ("image", "layer", "head")
    return xr.Dataset(
        {
            "object_auroc": (dims, own.clip(0, 1)),
            "object_auroc_null": (dims, null.clip(0, 1)),
            "object_centre_auroc": ("image", random.normal(0.7, 0.1, n_images)),
        }
    )


def test_the_best_head_is_found_with_intervals_that_hold_for_all_heads() -> None:
    summary = summarise_scores(planted_scores(60), "object_auroc")
    assert summary.n_images == 59
    assert summary.ranked[0] == (2, 1)
    assert summary.may_be_best.sum() == 1
    assert summary.low[2, 1] < 0.9 < summary.high[2, 1]
    assert summary.excess_low[2, 1] > 0.2
    others = np.ones((3, 4), dtype=bool)
    others[2, 1] = False
    assert (summary.excess_low[others] < 0).all()
    assert (summary.over_centre_low[others] < 0).all()
    assert summary.over_centre_low[2, 1] > 0
    assert summary.centre == pytest.approx(0.7, abs=0.05)


def test_images_without_a_mask_leave_the_mean_of_a_head_to_the_others() -> None:
    study = planted_scores(20)
    values = head_values(study, "object_auroc")
    assert_allclose(values.values, np.nanmean(study["object_auroc"], axis=0))
    assert values.description == "mean over 19 of 20 images"
    assert np.isfinite(values.low).all()


def test_heads_of_layers_that_miss_small_objects_are_compared_on_the_same_images() -> None:
    """Half of the images have no patch of an object on the grid of the last layer, and would be easy for the others."""
    study = planted_scores(120)
    small = np.arange(120) % 2 == 0
    study["object_auroc"][small, :2] = 0.99
    study["object_auroc"][small, 2] = np.nan
    summary = summarise_scores(study, "object_auroc")
    assert summary.n_images == 59
    assert summary.ranked[0] == (2, 1)
    assert summary.reason == ""
    assert summary.may_be_best[2, 1]
    assert np.isfinite(summary.low).all()
    values = head_values(study, "object_auroc")
    assert_allclose(values.values, summary.mean)
    assert values.description == "mean over 59 of 120 images"


def test_heads_that_find_no_more_than_chance_are_told_so_nineteen_times_in_twenty() -> None:
    shown = [
        (summarise_scores(planted_scores(40, 0.6, seed), "object_auroc").excess_low > 0).any() for seed in range(40)
    ]
    assert np.mean(shown) <= 0.1


def test_few_images_have_no_interval_and_the_reason() -> None:
    summary = summarise_scores(planted_scores(5), "object_auroc")
    assert np.isnan(summary.low).all()
    assert "too few images" in summary.reason
    assert summary.ranked[0] == (2, 1)
    assert summarise_scores(planted_scores(5), "object_iou") is None
    assert summarise_scores(planted_scores(5).isel(image=[3]), "object_auroc") is None


def test_examples_go_from_the_best_image_to_the_worst() -> None:
    maps = np.full((8, 1, 2, 9), np.nan)
    maps[[1, 2, 5, 6]] = np.arange(4)[:, None, None, None]
    scores = np.linspace(0, 1, 16).reshape(8, 1, 2)
    study = xr.Dataset(
        {
            "object_map": (("image", "layer", "head", "patch"), maps),
            "object_auroc": (("image", "layer", "head"), scores),
        }
    )
    assert [each.image for each in example_maps(study, 0, 1, 3)] == [6, 2, 1]
    assert [each.image for each in example_maps(study, 0, 1, 9)] == [6, 5, 2, 1]
    assert example_maps(study.drop_vars("object_map"), 0, 1, 3) == []
