"""One image as data: the same numbers as a study and as plain PyTorch, with the words of the declarations."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import timm
import torch
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from vitrail.analysis import analyses, declaration, unavailable
from vitrail.contract.tiny_models import FAMILIES
from vitrail.errors import DataError, ModelError, UsageError
from vitrail.figures.one_image import TOKEN_FIGURES
from vitrail.figures.whole import draw_figures
from vitrail.models.open import open_vit
from vitrail.one_image import look, parts_of, record_image, save_look
from vitrail.report import findings_of
from vitrail.study.run import run_study
from vitrail.tap.attention import Readers
from vitrail.tokens.grouping import tsne

MASKED = {"token_xy", "class_token_xy", "patch_object"}
"""Computed only with a mask."""


def small_vit(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    model = timm.create_model(name, **shape | options)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
    return open_vit(model.eval(), image_size=32)


def photo(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC)


def halves():
    ids = np.ones((36, 40), dtype=np.int64)
    ids[:, 20:] = 2
    return ids


@pytest.fixture(scope="module")
def vit():
    return small_vit()


@pytest.fixture(scope="module")
def looked(vit):
    return look(vit, photo(), name="noise.png")


def test_weights_that_are_no_numbers_are_said_and_never_looked_at():
    broken = small_vit()
    with torch.no_grad():
        broken.model.blocks[1].mlp.fc1.weight[3, 3] = torch.nan
    for ask in (
        lambda: broken.look(photo(), measures="heads"),
        lambda: record_image(broken, photo()),
        lambda: broken.what_if(photo(), heads_off="L0H0"),
    ):
        with pytest.raises(ModelError, match=r"not finite .* Check the weights"):
            ask()


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (255, 0, 0)])
def test_a_constant_image_is_looked_at_and_nothing_is_said_that_is_no_number(vit, colour):
    looked = look(vit, Image.new("RGB", (40, 36), colour), measures="heads,patches,tokens")
    plain = vit.logits(vit.prepare([Image.new("RGB", (40, 36), colour)])).softmax(-1)[0]
    assert_allclose(looked["probability"], plain.max(), rtol=1e-5)
    for name in ("head_probability", "strength_entropy", "interaction_distance", "token_norm"):
        assert np.isfinite(looked[name]).all(), name
    assert not [sentence for sentence in findings_of(looked) if "nan" in sentence.lower()]


@contextmanager
def bfloat16_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@pytest.mark.parametrize("mode", [torch.inference_mode, bfloat16_autocast])
def test_the_callers_modes_of_torch_change_nothing(vit, looked, mode, tmp_path):
    (tmp_path / "photos").mkdir()
    photo().save(tmp_path / "photos" / "noise.png")
    images = vit.prepare([photo()])
    expected = vit.logits(images)
    with mode():
        same = look(vit, photo(), name="noise.png", measures="tokens,exciting")
        study = run_study(vit, tmp_path / "photos", out=tmp_path / "study", measures="tokens", batch_size=1)
        opened = small_vit()
        answers = [vit.logits(images), vit.tap().read(images)]
        changed = vit.what_if(photo(), patches=[(0, 1)])
    for name in same.data_vars:
        assert_array_equal(same[name], looked[name], err_msg=name)
    assert same.attrs["left_out"].keys() <= looked.attrs["left_out"].keys()
    for name in {*study.data_vars} & {*looked.data_vars}:
        assert_array_equal(study[name], looked[name], err_msg=name)
    for answer in answers:
        assert_array_equal(answer.detach(), expected)
    assert_array_equal(changed["probability"], vit.what_if(photo(), patches=[(0, 1)])["probability"])
    assert "gradient" not in opened.look(photo(), measures="tokens").attrs["left_out"].get("relevance", "")


def test_a_photograph_in_any_form_is_one_look(vit, tmp_path):
    photo().save(tmp_path / "photo.png")
    expected = look(vit, photo(), measures="objects", mask=halves())
    for given in (tmp_path / "photo.png", np.asarray(photo()), torch.from_numpy(np.array(photo())).permute(2, 0, 1)):
        looked = look(vit, given, measures="objects", mask=halves())
        assert looked.identical(expected)
        assert_array_equal(record_image(vit, given).logits, vit.logits(vit.prepare([photo()])))
        assert_array_equal(
            vit.what_if(given, heads_off="L0H0")["probability"], vit.what_if(photo(), heads_off="L0H0")["probability"]
        )


def test_a_look_is_written_as_netcdf(looked, tmp_path):
    pytest.importorskip("h5netcdf", reason="h5netcdf writes netCDF, and is not installed")
    looked.to_netcdf(tmp_path / "look.nc")
    with xr.open_dataset(tmp_path / "look.nc", engine="h5netcdf") as read:
        assert_array_equal(read["head_probability"], looked["head_probability"])
        assert json.loads(read.attrs["left_out"]) == looked.attrs["left_out"]


def test_attributes_that_a_user_adds_are_written_as_xarray_writes_them(looked, tmp_path):
    pytest.importorskip("h5netcdf", reason="h5netcdf writes netCDF, and is not installed")
    added = {"fold": np.int64(3), "rate": np.float32(0.5), "row": np.arange(2), "table": {"n": np.int64(4)}}
    looked[["probability"]].assign_attrs(added).to_netcdf(tmp_path / "look.nc")
    with xr.open_dataset(tmp_path / "look.nc", engine="h5netcdf") as read:
        assert (read.attrs["fold"], read.attrs["rate"], list(read.attrs["row"])) == (3, 0.5, [0, 1])
        assert json.loads(read.attrs["table"]) == {"n": 4}


def test_places_are_whole_numbers_of_any_kind(vit, tmp_path):
    one = record_image(vit, photo(), patch=np.array([1, 2]), channel=np.int64(3))
    assert (one.patch, one.asked_channel) == ((1, 2), 3)
    looked = look(vit, photo(), measures="objects", patch=np.array([1, 2]))
    assert looked.attrs["patch"] == [1, 2]
    for numbers in (looked.attrs["patch"], one.patch):
        assert {type(number) for number in numbers} == {int}
    with pytest.raises(UsageError, match=r"The patch \(1, 2, 3\) has no meaning; give 2 whole numbers"):
        record_image(vit, photo(), patch=(1, 2, 3))


def test_a_look_has_the_measures_of_a_study_with_the_same_numbers(vit, looked, tmp_path):
    (tmp_path / "photos").mkdir()
    photo().save(tmp_path / "photos" / "noise.png")
    study = run_study(
        vit, tmp_path / "photos", out=tmp_path / "study", measures="heads,regions,patches,tokens", batch_size=1
    )
    measures = [name for each in ("heads", "regions", "patches", "tokens") for name in analyses()[each].measure_names]
    compared = [name for name in measures if name in study]
    assert len(compared) > 20
    for name in compared:
        assert_array_equal(looked[name].to_numpy(), study[name].to_numpy(), err_msg=name)
        assert looked[name].dims == study[name].dims


def test_every_array_has_the_dimensions_type_and_words_of_its_declaration(looked):
    for name, array in looked.items():
        declared = declaration(str(name))
        assert array.dims == declared.dims, name
        assert array.dtype == declared.dtype, name
        assert array.attrs["title"] == declared.title


def test_every_declared_array_is_there_or_left_out_with_a_reason(looked):
    for analysis in analyses().values():
        for measure in (*analysis.measures, *analysis.image_measures):
            masked = "masks" in measure.needs
            there = measure.name in looked or measure.derived or masked
            assert there or looked.attrs["left_out"][measure.name], measure.name


def test_parts_put_together_are_the_look(vit, looked):
    one = record_image(vit, photo())
    together, left_out = xr.Dataset(), {}
    for analysis in analyses().values():
        for part in parts_of(vit, analysis):
            computed = part.compute(one)
            assert set(computed) | set(computed.attrs["left_out"]) >= set(part.names) - MASKED, part.names
            together, left_out = together.merge(computed), left_out | computed.attrs["left_out"]
        left_out |= unavailable(vit, [name for name in analysis.measure_names if not declaration(name).derived])
    xr.testing.assert_equal(type(looked)(together.data_vars, together.coords), looked.drop_vars("image"))
    said = {name: reason for name, reason in looked.attrs["left_out"].items() if not declaration(name).derived}
    assert left_out == said


def test_rows_of_attention_are_those_of_the_models_own_maps(vit, looked):
    pixels = vit.prepare([photo()])
    attention = vit.model.blocks[1].attn
    tokens = vit.model.pos_drop(
        torch.cat([vit.model.cls_token, vit.model.patch_embed(pixels)], 1) + vit.model.pos_embed
    )
    with torch.no_grad():
        tokens = vit.model.blocks[1].norm1(vit.model.blocks[0](tokens))
        q, k, _ = attention.qkv(tokens).reshape(1, 17, 3, 2, 12).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * attention.scale).softmax(-1)[0].numpy()
    assert_allclose(looked["class_attention"][1], weights[:, 0], rtol=1e-5)
    assert_allclose(looked["class_received"][1], weights[:, :, 0], rtol=1e-5)
    between = weights[:, 1:, 1:] * (1 - np.eye(16))
    assert_array_equal(looked["peak_patch"][1], between.sum(1).argmax(-1))
    peaks = looked["peak_patch"].to_numpy()[1]
    assert_allclose(looked["peak_attention"][1], [weights[head, 1 + peaks[head]] for head in range(2)], rtol=1e-5)


def test_similarity_is_the_cosine_of_the_models_own_tokens(vit, looked):
    with torch.no_grad():
        _, layers = vit.model.forward_intermediates(vit.prepare([photo()]), indices=2, output_fmt="NLC", norm=False)
    row, column = looked.attrs["patch"]
    for layer, tokens in enumerate(layers):
        unit = tokens[0] / tokens[0].norm(dim=-1, keepdim=True)
        assert_allclose(looked["token_similarity"][layer], unit @ unit[4 * row + column], atol=1e-5)


def test_deletion_begins_with_the_whole_image_and_insertion_ends_with_it(vit, looked):
    with torch.no_grad():
        whole = float(vit.model(vit.prepare([photo()])).softmax(-1).max())
    assert_allclose(looked["relevance_deletion"][:, 0], whole, rtol=1e-4)
    assert_allclose(looked["relevance_insertion"][:, -1], whole, rtol=1e-4)


def test_a_mask_may_be_an_image_truth_values_or_whole_floats(vit):
    expected = look(vit, photo(), mask=halves() - 1, measures="patches")["object_share"]
    pixels = (halves() - 1).astype(np.uint8)
    for mask in (Image.fromarray(pixels), pixels > 0, pixels.astype(float)):
        assert_array_equal(look(vit, photo(), mask=mask, measures="patches")["object_share"], expected)
    assert_array_equal(record_image(vit, photo(), mask=pixels > 0).instance_ids.max(), 1)


def test_a_look_is_written_where_text_names_a_folder(looked, tmp_path):
    path = save_look(looked, str(tmp_path / "look.zarr"))
    assert_array_equal(xr.open_zarr(path, consolidated=False)["head_probability"], looked["head_probability"])


def test_a_mask_brings_objects_grouping_and_a_layout(vit):
    looked = look(vit, photo(), mask=halves(), measures="tokens")
    assert set(np.unique(looked["patch_object"])) == {1, 2}
    assert np.isfinite(looked["grouping_silhouette"]).all()
    assert np.isfinite(looked["token_xy"]).any()


def test_the_class_token_is_laid_out_with_the_patches_and_has_a_place_of_its_own(vit):
    looked = look(vit, photo(), mask=halves(), measures="tokens")
    with torch.no_grad():
        model, images = vit.model, vit.prepare([photo()])
        tokens = model._pos_embed(model.patch_embed(images))
        for layer, block in enumerate(model.blocks):
            tokens = block(tokens)
            expected = tsne(np.concatenate([tokens[0, 1:], tokens[0, :1]]))
            laid_out = np.vstack([looked["token_xy"][layer], looked["class_token_xy"][layer]])
            apart = [np.linalg.norm(xy[:, None] - xy, axis=-1) for xy in (laid_out, expected)]
            assert_allclose(apart[0].argsort(1)[:, 1], apart[1].argsort(1)[:, 1])  # everybody's nearest neighbour
    (axes, *_) = dict(TOKEN_FIGURES)["tsne"](looked).axes
    star = next(each for each in axes.collections if each.get_label() == "class token")
    assert_allclose(star.get_offsets()[0], looked["class_token_xy"][0])


def test_without_a_class_token_only_patches_are_laid_out_and_the_reason_is_said():
    pooled = small_vit(class_token=False, global_pool="avg")
    looked = look(pooled, photo(), mask=halves(), measures="tokens")
    assert np.isfinite(looked["token_xy"]).all()
    assert "class_token_xy" not in looked
    assert looked.attrs["left_out"]["class_token_xy"] == "the layers that were laid out have no class token"
    figure = dict(TOKEN_FIGURES)["tsne"](looked)
    assert not [each for each in figure.axes[0].collections if each.get_label() == "class token"]
    assert "star" not in figure.get_supxlabel()


def test_filters_say_what_salient_patches_are_where_objects_are_too_small_to_colour(vit):
    ids = np.zeros((36, 40), dtype=np.int64)
    ids[:9, :20] = 1  # two patches
    masked, plain = (look(vit, photo(), mask=mask, measures="tokens") for mask in (ids, None))
    assert "patch_object" in masked.attrs["left_out"]
    assert masked["patch_salient"].to_numpy().sum() == 2
    captions = [" ".join(dict(TOKEN_FIGURES)["filters"](each).get_supxlabel().split()) for each in (masked, plain)]
    assert "salient: under objects of the mask." in captions[0]
    assert "salient: the quarter with the highest rollout." in captions[1]


def test_what_compares_with_other_images_is_left_out_of_one(vit):
    looked = look(vit, photo(), mask=halves() - 1, measures="objects")
    assert np.isfinite(looked["object_pointing"]).any()
    assert "object_pointing_null" not in looked
    assert "first image of a batch" in looked.attrs["left_out"]["object_pointing_null"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"measures": ["kitchen"]}, UsageError, "choose from heads"),
        ({"patch": (4, 0)}, UsageError, r"grid is \(4, 4\)"),
        ({"channel": 24}, UsageError, "channels 0 to 23"),
        ({"mask": np.ones((36, 40, 3), dtype=np.int64)}, DataError, r"shape \[36, 40, 3\]; a mask is \[row, column\]"),
        ({"mask": np.full((36, 40), 0.5)}, DataError, "no whole numbers"),
        ({"mask": np.full((36, 40), -1)}, DataError, "the id -1; ids are 0 to 65535"),
        ({"mask": np.ones((36, 39), dtype=np.int64)}, DataError, "39 x 36 pixels and its image 40 x 36"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(vit, options, error, words):
    with pytest.raises(error, match=words):
        look(vit, photo(), **options)


def test_a_model_without_classifier_or_class_token_says_what_it_lacks():
    vit = small_vit(num_classes=0, class_token=False, global_pool="avg")
    looked = look(vit, photo())
    assert {"relevance", "token_colour", "head_output_shift", "peak_attention"} <= set(looked)
    assert "no classifier" in looked.attrs["left_out"]["relevance_deletion"]
    assert looked.attrs["left_out"]["class_attention"] == "the model has no class token"


def test_frozen_weights_change_no_number():
    vit = small_vit()
    plain = look(vit, photo(), measures="head_windows,tokens")
    vit.model.requires_grad_(False)
    frozen = look(vit, photo(), measures="head_windows,tokens")
    assert_array_equal(frozen["head_window_area"], plain["head_window_area"])
    assert_allclose(frozen["relevance"], plain["relevance"], rtol=1e-5, atol=1e-7)


class Frozen(torch.nn.Module):
    """An encoder that is run under a context of its own, as linear probes do, and a classifier."""

    def __init__(self, context):
        super().__init__()
        self.encoder, self.head, self.context = small_vit(num_classes=0).model, torch.nn.Linear(24, 5), context

    def forward(self, images):
        with self.context():
            features = self.encoder(images)
        return self.head(features.clone())


class InPlace(torch.nn.Module):
    """Writes to what the gradient of its attention needs."""

    def __init__(self):
        super().__init__()
        self.encoder = small_vit().model
        for block in self.encoder.blocks:
            block.forward = lambda x, block=block: x.add_(block.attn(block.norm1(x)))

    def forward(self, images):
        return self.encoder(images)


@pytest.mark.parametrize(
    "model",
    [lambda: Frozen(torch.no_grad), lambda: Frozen(torch.inference_mode), InPlace],
    ids=["no_grad", "inference", "in place"],
)
def test_what_needs_gradients_is_left_out_of_a_model_that_lets_none_through(model):
    vit = open_vit(model().eval(), image_size=32, weights="random", n_classes=5)
    looked = look(vit, photo(), measures="heads,tokens,head_windows")
    assert {"head_probability", "peak_attention", "token_colour"} <= set(looked)
    assert list(looked["relevance"]["relevance_method"].values[:4]) == ["raw", "rollout", "self_similarity", "random 1"]
    assert "No gradient" in looked.attrs["left_out"]["head_window_area"]
    assert "No gradient" in unavailable(vit, ["head_probability"], {"importance": "estimate"})["head_probability"]


def test_a_stage_of_one_block_that_merges_tokens_first_is_not_followed():
    """The block is the whole stage: it is given more tokens than its attention joins."""
    torch.manual_seed(0)
    shape = {"img_size": 56, "window_size": 7, "depths": (1, 1, 1), "num_heads": (1, 2, 4), "embed_dim": 8}
    vit = open_vit(timm.create_model("swin_tiny_patch4_window7_224", **shape).eval(), image_size=56)
    assert [block.maps_on_grid for block in vit.anatomy.blocks] == [True, False, False]
    looked = look(vit, photo(), measures="tokens")
    assert "L1 has no map between its patches (it attends between 49" in looked.attrs["left_out"]["occlusion_random"]
    assert "token_norm" in looked


def test_a_hierarchy_is_looked_at_with_layers_padded():
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, window_size=7, depths=(2, 2), num_heads=(1, 2), embed_dim=8
    )
    looked = look(open_vit(model.eval(), image_size=56), photo())
    assert looked["token_similarity"].shape == (4, 196)
    assert np.isnan(looked["token_similarity"][3, 49:]).all()
    assert "class_attention" in looked.attrs["left_out"]
    assert looked["relevance"].shape == (9, 196)
    methods = looked["relevance_method"].to_numpy().astype(str).tolist()
    assert methods[:5] == ["raw", "grad_sam", "lrp", "self_similarity", "random 1"]
    assert np.isfinite(looked["relevance"]).all()
    best = int(looked["relevance"].sel(relevance_method="lrp").to_numpy().argmax())
    assert looked.attrs["patch"] == list(divmod(best, 14))
    assert_allclose(looked["relevance_deletion"][:, -1], looked["relevance_insertion"][:, 0], rtol=1e-4)
    assert "tokens cannot be followed" in looked.attrs["left_out"]["filter_auroc"]


def test_layers_of_fewer_than_four_patches_have_no_colours(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=16, window_size=2, depths=(2, 2, 2), num_heads=(1, 2, 2), embed_dim=8
    )
    looked = look(open_vit(model.eval(), image_size=16), photo(), measures="tokens")
    assert looked.attrs["grids"] == [[4, 4]] * 2 + [[2, 2]] * 2 + [[1, 1]] * 2
    assert list(np.isfinite(looked["token_colour_share"])) == [True] * 4 + [False] * 2
    assert np.isnan(looked["token_colour"][4:]).all()
    assert looked["token_similarity"][5, 0] == pytest.approx(1)
    only = looked.assign(token_colour_share=looked["token_colour_share"] * np.nan)
    draw_figures(only, tmp_path, ["png"], one_image=True)
    assert (tmp_path / "relevance.png").exists()
    assert not (tmp_path / "tokens.png").exists()


@torch.no_grad()
def test_arrays_of_patches_are_as_wide_as_the_largest_grid_of_a_pyramid(tmp_path):
    family = next(each for each in FAMILIES if each.name == "transformers PVT")
    vit = open_vit(family.model(), image_size=128, mean=0.5, std=0.5)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))
    ids = np.zeros((90, 90), dtype=np.int64)
    ids[:, :45] = 1
    looked = look(vit, picture, mask=ids, measures="patches")
    assert looked.sizes["patch"] == 32 * 32
    assert_array_equal(looked["object_share"][0].to_numpy().reshape(32, 32), np.arange(32)[None].repeat(32, 0) < 16)
    maps = []
    vit.tap().read(vit.prepare([picture]), Readers(attention=lambda each: maps.append(each.weights())))
    between = maps[-1][0, :, 1:, 1:]  # of the last stage, 4 x 4 patches behind a class token
    interactions = (between / between.sum(-1, keepdim=True)).mean(0) * (1 - torch.eye(16))
    row, column = np.divmod(np.arange(16), 4)
    hops = torch.from_numpy(np.hypot(row[:, None] - row, column[:, None] - column)).float()
    expected = (interactions / interactions.sum(-1, keepdim=True) * hops).sum(-1)
    distance = looked["interaction_distance"][0, -1]
    assert_allclose(distance[:16], expected, atol=1e-5)
    assert np.isnan(distance[16:]).all()
    assert np.isnan(looked["interaction_distance"][0, :-1]).all()
    draw_figures(looked, tmp_path, ["png"], one_image=True)  # no layer has windows on the grid of the first
    assert not (tmp_path / "windows_of_patch.png").exists()
