"""The collector: every measure for every kind of grid, equal to what the pure functions say of the maps."""

import copy
import subprocess
import sys
from itertools import combinations, product

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from heads.head_models import drawn_wide, timm_swin, timm_vit
from vitrail import Readers, open_vit
from vitrail.analysis import analyses, declaration, make_collectors, unavailable
from vitrail.errors import ModelError, UsageError
from vitrail.figures.patches import tendency_flow
from vitrail.patches import field, windows
from vitrail.patches.hubs import find_hubs
from vitrail.patches.interaction import indicator
from vitrail.study.run import run_study
from vitrail.tap.edits import Edit

ROOM = analyses()["patches"].measure_names


def instance_ids(n_images, rows, columns):
    """One object in each image, each elsewhere; none in the last of several."""
    masks = [np.zeros((rows, columns), dtype=np.int64) for _ in range(n_images)]
    for number, mask in enumerate(masks[:-1] or masks):
        mask[7 * number : 7 * number + 21, 10 : 10 + 23 * (number + 1)] = 3
    return masks


def collected(vit, images, names=ROOM, options=None):
    (collector,) = make_collectors(vit, names, {"masks": "given", **(options or {})})
    collector.take_masks(instance_ids(len(images), *images.shape[2:]))
    tap = vit.tap()
    replay, logits = tap.record(images, collector.readers())
    return collector.finish(tap, replay, logits, np.zeros(len(images), dtype=np.int64))


def maps_on_grid(vit, images):
    kept = {}
    vit.tap().read(images, Readers(attention=lambda seen: kept.update({seen.layer: seen.weights_on_grid().detach()})))
    return kept


def photographs(n_images, rows, columns, seed=0):
    return torch.randn(n_images, 3, rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vit():
    return open_vit(timm_vit(), image_size=(48, 80))


def test_importing_the_room_loads_no_torch():
    code = "import sys, vitrail.patches; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_study_of_the_room_declares_what_it_computes(vit):
    found = collected(vit, photographs(2, 48, 80))
    assert sorted(found) == sorted(ROOM)
    for name, values in found.items():
        assert values.shape[:3] == ((2, 3, 15) if "patch" in declaration(name).dims else (2, 3))
        assert values.dtype == declaration(name).dtype
        assert values.ndim == len(declaration(name).dims)


def unfused_maps(model, images):
    """Attention of each layer as timm computes it, [layer image head query key]."""
    model, maps = copy.deepcopy(model), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0].double().numpy()))
    with torch.no_grad():
        model(images)
    return np.stack(maps)


def test_measures_are_what_the_maps_say(vit):
    """On 3 x 5 patches, in NumPy from timm's own maps; hubs and sinks by the pure function, which has its own tests."""
    images = photographs(3, 48, 80)
    found = collected(vit, images)
    row, column = np.divmod(np.arange(15), 5)
    sides = product(combinations(range(4), 2), combinations(range(6), 2))
    top, bottom, left, right = np.array([(*rows, *columns) for rows, columns in sides]).T[..., None]
    inside = (top <= row) & (row < bottom) & (left <= column) & (column < right)
    area = inside.sum(1)
    for layer, weights in enumerate(unfused_maps(vit.model, images)):
        block = weights[:, :, 1:, 1:]
        matrix = (block / block.sum(-1, keepdims=True)).mean(1) * (1 - np.eye(15))
        matrix /= matrix.sum(-1, keepdims=True)
        held = matrix @ inside.T
        west, north, east, south = np.moveaxis(found["window"][:, layer], -1, 0)[..., None]
        window = (column[:, None] - west <= column) & (column <= column[:, None] + east)
        window &= (row[:, None] - north <= row) & (row <= row[:, None] + south)
        assert (window.sum(-1) <= 4).all()
        assert_allclose((matrix * window).sum(-1), np.where(area <= 4, held, 0).max(-1), rtol=1e-4)
        weight = matrix * window / (matrix * window).sum(-1, keepdims=True)
        tendency = np.stack([weight @ column - column, weight @ row - row], -1)
        assert_allclose(found["tendency"][:, layer], tendency, atol=1e-4)
        for image, ids in enumerate(instance_ids(3, 48, 80)):
            cells = (ids > 0).reshape(3, 16, 5, 16).mean((1, 3)).ravel()
            on_objects = window[image] @ cells / window[image].sum(-1)
            assert_allclose(found["window_object_share"][image, layer], on_objects, atol=1e-6)
        assert_allclose(found["field_size"][:, layer], np.where(held >= 0.5, area, 15).min(-1) / 15, rtol=1e-6)
        upto = np.sort(matrix, -1)[..., ::-1].cumsum(-1)
        assert_allclose(found["strongest_share"][:, layer], (1 + (upto < 0.5).sum(-1)) / 15, rtol=1e-6)
        distance = np.hypot(row[:, None] - row, column[:, None] - column)
        assert_allclose(found["interaction_distance"][:, layer], (matrix * distance).sum(-1), rtol=1e-4)
        matrix = torch.as_tensor(matrix).float()
        of_layer = find_hubs(matrix)
        assert_array_equal(found["hub"][:, layer], of_layer.hubs)
        assert_array_equal(found["sink"][:, layer], of_layer.sinks)
        taken = [float(rows[:, sinks].sum() / rows.sum()) for rows, sinks in zip(matrix, of_layer.sinks, strict=True)]
        assert_allclose(found["sink_share"][:, layer], taken, rtol=1e-5)


def test_one_measure_alone_is_the_same_as_all_together(vit):
    images = photographs(2, 48, 80)
    together = collected(vit, images)
    for name in ROOM:
        assert_array_equal(collected(vit, images, [name])[name], together[name])


def test_an_image_whose_attention_is_no_number_is_named(tmp_path):
    for index in range(2):
        Image.new("RGB", (80, 48), (255 * index, 0, 0)).save(tmp_path / f"{index}.png")
    vit = open_vit(timm_vit(), image_size=(48, 80), mean=0.0, std=1.0)
    assert vit.anatomy.grid == (3, 5)  # found on other images
    with torch.no_grad():
        vit.model.patch_embed.proj.weight.fill_(3e38)  # black alone stays finite
    with pytest.raises(ModelError, match=r"not finite .* for 1 of 2 images: 1\.png"):
        run_study(vit, tmp_path, out=tmp_path / "study", measures="patches")


def test_a_patch_that_interacts_with_no_other_has_no_window(vit):
    images, alone = photographs(2, 48, 80), 7
    opened = torch.ones(2, 15, 15, dtype=torch.bool)
    opened[1, alone] = torch.arange(15) == alone
    (collector,) = make_collectors(vit, ROOM, {"masks": "given"})
    collector.take_masks(instance_ids(2, 48, 80))
    tap = vit.tap()
    replay, _ = tap.record(images)
    with torch.no_grad():
        logits = tap.read(images, collector.readers(), masked(vit, [opened] * 3))
    found = collector.finish(tap, replay, logits, np.zeros(2, dtype=np.int64))
    expected = np.zeros((2, 3, 15), dtype=bool)
    expected[1, :, alone] = True
    for name in ("window", "window_object_share", "tendency", "field_size"):
        values = found[name].reshape(2, 3, 15, -1)
        assert (np.isnan(values) == expected[..., None]).all(), name


def test_permuting_images_permutes_rows(vit):
    images, order = photographs(4, 48, 80), [2, 0, 3, 1]
    straight, permuted = collected(vit, images), collected(vit, images[order])
    assert_allclose(permuted["field_size"], straight["field_size"][order], rtol=1e-3)
    assert_allclose(permuted["interaction_distance"], straight["interaction_distance"][order], rtol=1e-4)


def test_the_area_of_windows_is_an_option(vit):
    for area, most in (("10", 2), ("60", 9)):
        sides = collected(vit, photographs(1, 48, 80), options={"window_area": area})["window"]
        size = (sides[..., 0] + sides[..., 2] + 1) * (sides[..., 1] + sides[..., 3] + 1)
        assert size.max() <= most
    with pytest.raises(UsageError, match="window_area"):
        make_collectors(vit, ROOM, {"window_area": "all"})


@pytest.mark.parametrize(
    ("options", "prefix"),
    [({"reg_tokens": 4}, 5), ({"class_token": False, "global_pool": "avg"}, 0)],
    ids=["registers", "no class token"],
)
def test_registers_and_missing_class_tokens_are_no_patches(options, prefix):
    vit = open_vit(timm_vit(**options), image_size=(48, 80))
    images = photographs(2, 48, 80)
    found, maps = collected(vit, images), maps_on_grid(vit, images)
    for layer, weights in maps.items():
        distance = field.interaction_distance(indicator(weights, prefix), (3, 5))
        assert_allclose(found["interaction_distance"][:, layer], distance, rtol=1e-4)


def test_swin_is_read_on_the_image_grid_with_small_layers_padded():
    vit = open_vit(timm_swin(), image_size=(64, 64))
    images = photographs(2, 64, 64)
    found, maps = collected(vit, images), maps_on_grid(vit, images)
    for layer, weights in maps.items():
        side = 16 if layer < 2 else 8
        matrix = indicator(weights, prefix=0)
        distance = field.interaction_distance(matrix, (side, side))
        assert_allclose(found["interaction_distance"][:, layer, : side**2], distance, rtol=1e-4)
        assert np.isnan(found["window"][:, layer, side**2 :]).all()
        assert not found["hub"][:, layer, side**2 :].any()
        assert_allclose(held(found["window"][:, layer, : side**2], matrix, side), best(matrix, side), atol=1e-5)


def held(sides, matrix, side):
    """What windows hold of an indicator, from their sides."""
    row, column = np.divmod(np.arange(side**2), side)
    left, top, right, bottom = np.moveaxis(sides, -1, 0)
    boxes = np.stack([row - top, column - left, row + bottom + 1, column + right + 1], -1)
    return (matrix * windows.in_box(torch.as_tensor(boxes).long(), (side, side))).sum(-1)


def best(matrix, side):
    return windows.best_boxes(matrix, (side, side), windows.n_patches_of(0.25, (side, side)))[1]


def test_a_model_without_maps_between_patches_is_skipped_with_the_reason():
    model = timm.create_model("xcit_nano_12_p16_224", depth=2, cls_attn_layers=1, img_size=64, num_classes=5).eval()
    vit = open_vit(model, image_size=64)
    assert set(unavailable(vit, ROOM)) == set(ROOM)
    assert "no layer has a map" in unavailable(vit, ROOM)["window"]
    assert make_collectors(vit, ROOM) == []


def masked(vit, masks, prefix=1):
    return [Edit(layer, bias=windows.attention_bias(mask, prefix)[:, None]) for layer, mask in enumerate(masks)]


def test_a_window_of_the_whole_image_changes_nothing_bitwise(vit):
    images = photographs(2, 48, 80)
    boxes, _ = windows.best_boxes(torch.rand(2, 15, 15), (3, 5), 15)
    whole = [windows.masks(boxes, (3, 5))] * 3
    plain = vit.tap().read(images, edits=[Edit(layer, bias=torch.zeros(2, 1, 16, 16)) for layer in range(3)])
    assert torch.equal(vit.tap().read(images, edits=masked(vit, whole)), plain)
    assert torch.equal(plain, vit.tap().read(images))


def test_a_window_changes_the_answer(vit):
    images = photographs(2, 48, 80)
    narrow = [torch.eye(15, dtype=torch.bool).expand(2, -1, -1)] * 3
    with torch.no_grad():
        change = (vit.tap().read(images, edits=masked(vit, narrow)) - vit.tap().read(images)).abs().max()
    assert float(change) > 1e-2


def test_closing_keys_to_all_in_every_layer_is_dropping_the_tokens():
    model = drawn_wide(timm_vit())
    vit = open_vit(model, image_size=(48, 80))
    images, gone = photographs(2, 48, 80), (2, 7, 8)
    edits = [Edit(layer, drop_keys=tuple(1 + patch for patch in gone)) for layer in range(3)]
    left = [token for token in range(16) if token - 1 not in gone]
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))[:, left]
        dropped = model.forward_head(model.norm(model.blocks(tokens)))
        closed = vit.tap().read(images, edits=edits)
    assert_allclose(closed, dropped, atol=1e-5 * float(dropped.abs().max()))


def test_a_study_holds_the_room_and_figures_draw_it(tmp_path):
    vit = open_vit(timm_vit(img_size=48), image_size=48)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (60, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    study = run_study(vit, tmp_path, out=tmp_path / "study", measures="patches", batch_size=2)
    assert set(ROOM) - set(study.data_vars) == {"window_object_share"}
    assert "give a folder of instance ids" in study.attrs["left_out"]["window_object_share"]
    assert study["window"].dims == declaration("window").dims
    assert study["tendency"].attrs["unit"] == declaration("tendency").unit
    assert len(tendency_flow(study, 0).axes) == 4  # three layers and the wheel
