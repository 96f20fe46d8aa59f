"""What a model cannot give is said before a study is made, with the true reason; and a study then agrees."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import xarray as xr
from PIL import Image

from vitrail.analysis import measures, unavailable
from vitrail.app.study_arrays import StudyArrays
from vitrail.contract.outlook import study_outlook
from vitrail.contract.tiny_models import FAMILIES
from vitrail.errors import Unsupported
from vitrail.live import LiveModel
from vitrail.models.open import Vit, open_vit
from vitrail.models.token_grid import share_grids, token_grids

HALF = (0.5, 0.5, 0.5)


def opened(name: str) -> Vit:
    family = next(each for each in FAMILIES if each.name == name)
    return open_vit(family.model(), image_size=family.image_size, mean=HALF, std=HALF)


@pytest.fixture(scope="module")
def cait() -> Vit:
    return opened("timm CaiT")


def test_weights_of_mixed_heads_are_not_read_as_shares(cait: Vit) -> None:
    assert sorted(token_grids(cait)[0]) == [(0, 0), (1, 0), (2, 0)]
    grids, reasons = share_grids(cait)
    assert grids == {}
    assert all("mixes its heads after the softmax" in reasons[layer, 0] for layer in (0, 1, 2))
    left_out = unavailable(cait, measures(), {"masks": "given"})
    assert "attention_strength" not in left_out  # a mean of weights, whatever their sign
    for name in ("strength_entropy", "attention_distance", "prefix_share", "window", "sink", "pattern_rule"):
        assert "negative" in left_out[name]


def test_what_a_layer_of_the_class_token_alone_cannot_give_is_left_out(cait: Vit) -> None:
    left_out = unavailable(cait, ["head_region_probability", "head_cls_shift"])
    assert "no layer has a map with a row and a column of a class token" in left_out["head_region_probability"]
    assert "head_cls_shift" not in left_out
    looked = cait.look(Image.new("RGB", (48, 40), "teal"), measures="heads")
    assert "class token among its tokens" in looked.attrs["left_out"]["class_attention"]
    assert "peak_attention" in looked


@pytest.mark.parametrize(
    ("name", "measure", "options", "reason"),
    [
        ("timm ConViT", "pattern_cls_xy", {}, "no class token among their tokens"),
        ("timm EdgeNeXt", "grouping_purity", {"masks": "given"}, "no layer returns the patches"),
        ("timm ViT, tokens merged", "shuffle_drift", {}, "no layer returns patches on a grid"),
        ("timm DaViT", "head_token_shift", {}, "no layer is seen to add its attention to the tokens that it was given"),
        ("timm SAM", "occlusion_random", {"lost_patches": "removed"}, "ties attention to a full grid"),
        ("timm CaiT", "occlusion_random", {}, "L3 has no map between its patches ('class' attention"),
        ("timm Swin", "occlusion_random", {}, "L2 has 196 tokens on grid (14, 14), and L0 has 784 on (28, 28)"),
        ("transformers ViT-MAE, mask_ratio 0", "head_cls_shift", {}, "no class token can be told from patches"),
    ],
)
def test_what_no_layer_gives_is_left_out_with_the_reason(
    name: str, measure: str, options: dict[str, str], reason: str
) -> None:
    vit = opened(name)
    assert reason in unavailable(vit, [measure], options)[measure]
    assert measure not in unavailable(opened("timm ViT"), [measure], options)


def test_maps_from_queries_to_other_keys_are_refused_and_not_put_on_the_grid() -> None:
    live = LiveModel(opened("timm Hiera"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for layer in (1, 2):
        with pytest.raises(Unsupported, match=r"from 16 queries to 64 keys|queries and|do not join"):
            live.attention(picture, layer)


def test_the_outlook_counts_measures_and_groups_reasons(cait: Vit) -> None:
    outlook = study_outlook(cait)
    n_left_out = sum(map(len, outlook.left_out.values()))
    assert outlook.text().startswith(
        f"A study holds {len(outlook.measures)} of {len(outlook.measures) + n_left_out} measures."
    )
    assert outlook.ok
    assert "predicted_window" not in outlook.text()  # nobody misses a WinT's own
    assert study_outlook(opened("timm ViT")).left_out == {}


def test_chance_and_numbers_that_are_not_finite_are_said_before_a_study() -> None:
    class Dropping(torch.nn.Dropout):
        def train(self, mode: bool = True) -> "Dropping":
            return super().train(True)

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    torch.nn.init.normal_(model.head.weight)
    model.head_drop = Dropping(0.3)
    assert "dropout" in study_outlook(open_vit(model)).text()
    model.head_drop = torch.nn.Identity()
    assert study_outlook(open_vit(model)).ok
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    outlook = study_outlook(open_vit(model))
    assert not outlook.ok
    assert "NaN" in outlook.text()


def test_a_mean_over_heads_that_are_not_there_is_nan_and_warns_of_nothing() -> None:
    values = np.array([[[1.0, 3.0], [np.nan, np.nan], [5.0, np.nan]]], dtype=np.float32)
    array, study = (
        xr.DataArray(values, dims=("image", "layer", "head")),
        SimpleNamespace(_absent=np.zeros((3, 2), bool)),
    )
    np.testing.assert_array_equal(StudyArrays._numbers(study, array, values, True), [[2.0, np.nan, 5.0]])


def test_an_image_made_for_a_neuron_is_left_out_where_no_layer_lies_on_a_grid() -> None:
    hiera = opened("timm Hiera")
    looked = hiera.look(Image.new("RGB", (48, 40), "teal"), measures="exciting")
    assert "exciting_image" not in looked
    assert "no grid" in looked.attrs["left_out"]["exciting_image"]
