"""Two studies compared: joined by content, aligned by depth, differences with intervals and a null that holds."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal

import vitrail
from synthetic_study import plan_of
from vitrail.analysis import declaration, measures
from vitrail.comparison import open_pair
from vitrail.comparison.align import alike_measures
from vitrail.comparison.compare import _correspondence, _effect_sizes
from vitrail.comparison.findings import comparison_findings, describe_difference, measures_by_effect
from vitrail.data import ImageEntry, Manifest
from vitrail.errors import StudyError, UsageError
from vitrail.figures.comparison import measures_that_differ
from vitrail.stats import sign_flip_p_values
from vitrail.study.writing import StudyFolder

N = 40


def write(folder: Path, arrays: dict[str, np.ndarray], names: list[str], **changes: object) -> Path:
    """A study of these arrays; images of the same name have the same content."""
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    labels = arrays["label"].tolist()
    entries = [
        ImageEntry(f"{folder.name}/{name}.png", None, int(label), 1, digest)
        for name, label, digest in zip(names, labels, digests, strict=True)
    ]
    manifest = Manifest(None, "planted", tuple(entries), ())
    layers = next(values.shape[1] for values in arrays.values() if values.ndim > 1)
    heads = next((values.shape[2] for values in arrays.values() if values.ndim > 2), 1)
    counts = changes.pop("n_heads", [heads] * layers)
    plan = plan_of(
        len(names),
        manifest.digest,
        n_layers=layers,
        n_heads=counts,
        grids=changes.pop("grids", [[14, 14]] * layers),
        prefixes=[1] * layers,
        weight_digest=hashlib.sha256(folder.name.encode()).hexdigest(),
        measures={name: declaration(name).version for name in measures() if name in arrays},
        part_size=16,
        **changes,
    )
    folder.mkdir()
    writing = StudyFolder(folder, plan, manifest)
    for part in writing.missing:
        rows = slice(part.start, part.stop)
        writing.write_part(
            part, {name: values[rows].astype(declaration(name).dtype) for name, values in arrays.items()}
        )
    return folder


def numbers(seed: int, n: int = N, layers: int = 4, heads: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 5
    profile = np.random.default_rng(99).normal(0, 1, (layers, heads))  # what heads of the same index share
    return {
        "label": label,
        "prediction": np.where(rng.random(n) < 0.2, (label + 1) % 5, label),
        "probability": rng.uniform(0.5, 0.9, n),
        "head_probability": rng.uniform(0.3, 0.9, (n, layers, heads)),
        "head_flip": rng.random((n, layers, heads)) < 0.3,
        "attention_distance": 4 + profile + rng.normal(0, 0.3, (n, layers, heads)),
        "attention_strength": rng.uniform(0, 1, (n, layers, heads, 14)),
        "sink_share": rng.uniform(0, 1, (n, layers)),
    }


NAMES = [f"image{i:03d}" for i in range(N)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict, dict]:
    """The second study has the images in another order, without two and with one of its own, and reaches further."""
    tmp = tmp_path_factory.mktemp("pair")
    a, b = numbers(0), numbers(1)
    b["attention_distance"] = b["attention_distance"] + 0.5
    b["attention_distance"][7] += 6
    order = np.random.default_rng(5).permutation(N)[2:]
    names = [NAMES[i] for i in order] + ["another"]
    rows = np.append(order, 0)
    first = write(tmp / "before", a, NAMES)
    second = write(tmp / "after", {name: values[rows] for name, values in b.items()}, names)
    missing = set(range(N)) - set(order.tolist())
    keep = np.array([i for i in range(N) if i not in missing])
    return first, second, {k: v[keep] for k, v in a.items()}, {k: v[keep] for k, v in b.items()}


@pytest.fixture(scope="module")
def compared(folders):
    return vitrail.compare(folders[0], folders[1])


def test_images_are_joined_by_content_and_differences_are_of_the_same_image(compared, folders):
    _, _, a, b = folders
    assert compared.attrs["n_shared"] == N - 2
    assert compared["image"].values[0].startswith("before/")
    ids = [name.rpartition("/")[2] for name in compared["image"].values]
    assert ids == [name.rpartition("/")[2] for name in compared["image_b"].values]
    of_measure = compared.sel(measure="attention_distance")
    expected = (b["attention_distance"] - a["attention_distance"]).astype(np.float64).mean((1, 2))
    assert_allclose(of_measure["difference"], expected, rtol=1e-5)
    assert_allclose(of_measure["mean_a"], a["attention_distance"].mean(), rtol=1e-5)
    assert_allclose(of_measure["mean_difference"], expected.mean(), rtol=1e-5)
    assert_allclose(of_measure["standardised"], expected.mean() / expected.std(), rtol=1e-4)
    assert of_measure["title"] == "mean attention distance"
    assert float(of_measure["low"]) < expected.mean() < float(of_measure["high"])
    assert float(of_measure["low_all"]) < float(of_measure["low"])


def test_a_comparison_is_written_as_netcdf(compared, tmp_path):
    pytest.importorskip("h5netcdf", reason="h5netcdf writes netCDF, and is not installed")
    compared.to_netcdf(tmp_path / "compared.nc")
    with xr.open_dataset(tmp_path / "compared.nc", engine="h5netcdf") as read:
        np.testing.assert_array_equal(read["change"], compared["change"])
        assert json.loads(read.attrs["left_out"]) == compared.attrs["left_out"]


def test_what_differs_is_told_from_what_does_not(compared):
    p = dict(zip(compared["measure"].values, compared["p"].values, strict=True))
    assert p["attention_distance"] < 0.05
    assert all(value > 0.05 for name, value in p.items() if name != "attention_distance")
    low, high = compared["low_all"].sel(measure="attention_distance").values, compared["high_all"].values
    assert low > 0
    assert (high > 0).all()


def test_cells_are_layers_and_heads_with_their_own_correction(compared, folders):
    _, _, a, b = folders
    difference = (b["attention_distance"] - a["attention_distance"]).astype(np.float64)
    assert_allclose(compared["attention_distance_difference"], difference.mean((0, 2)), rtol=1e-5)
    assert_allclose(compared["attention_distance_head_difference"], difference.mean(0), rtol=1e-5)
    assert compared["attention_strength_difference"].dims == ("layer", "hop")
    assert compared["attention_distance_head_p"].dims == ("all_layer", "head")
    assert_allclose(compared["depth"], [0.125, 0.375, 0.625, 0.875])
    assert_array_equal(compared["sink_share_p"], sign_flip_p_values((b["sink_share"] - a["sink_share"]).astype("f4")))


def test_flags_and_accuracy_are_shares_with_their_range(compared, folders):
    _, _, a, b = folders
    correct = (b["prediction"] == b["label"]).astype(float) - (a["prediction"] == a["label"])
    assert_allclose(compared["mean_difference"].sel(measure="correct"), correct.mean(), atol=1e-12)
    assert_array_equal(compared["same_prediction"], a["prediction"] == b["prediction"])
    flips = b["head_flip"].mean() - a["head_flip"].mean()
    assert_allclose(compared["mean_difference"].sel(measure="head_flip"), flips, atol=1e-6)


def test_the_image_that_changed_most_is_the_one_that_was_changed(compared):
    most = compared["image"].values[int(compared["change"].values.argmax())]
    assert most == "before/image007.png"


def test_heads_of_the_same_index_correspond_where_they_share_what_they_do(compared, folders, tmp_path):
    told = compared.attrs["heads_correspond"]
    assert told["correlation"] > 0.9
    assert told["p"] <= 0.01
    strangers = numbers(3)
    strangers["attention_distance"] = np.random.default_rng(8).normal(4, 1, (1, 4, 3)) + np.zeros((N, 1, 1))
    told = vitrail.compare(folders[0], write(tmp_path / "other", strangers, NAMES)).attrs["heads_correspond"]
    assert told["p"] > 0.05


def test_a_measure_of_one_layer_does_not_hide_that_heads_correspond():
    """Over the six heads of one layer correlations are large by chance, over 72 they are not."""
    rng = np.random.default_rng(0)
    profile = rng.normal(size=(12, 6))
    alike = np.stack([profile, profile + rng.normal(0, 1, (12, 6))])
    late = np.full((2, 12, 6), np.nan)
    late[:, -1] = rng.normal(size=(2, 6))
    for heads in ([alike], [late, alike], [alike, late]):
        told = _correspondence(heads, 0)
        assert_allclose(told["correlation"], _correspondence([alike], 0)["correlation"])
        assert told["p"] <= 0.002
    strangers = np.stack([profile, rng.normal(size=(12, 6))])
    assert _correspondence([late, strangers], 0)["p"] > 0.05


@pytest.fixture(scope="module")
def constant(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """Two differences that are the same in every image, one of them but for rounding, and one that varies."""
    tmp = tmp_path_factory.mktemp("constant")
    a, b = numbers(0), numbers(1)
    a["sink_share"][:], b["sink_share"][:] = 0.25, 0.5
    a["attention_distance"][:], b["attention_distance"][:] = 0.2, 0.1
    a["probability"], b["probability"] = np.full(N, 0.5), 0.6 + 0.1 * np.sin(np.arange(N))
    for arrays in (a, b):
        arrays["head_cls_shift"] = arrays["head_cls_shift_l2"] = arrays["attention_distance"]
    names = ["sink_share", "attention_distance", "probability", "head_cls_shift", "head_cls_shift_l2"]
    return vitrail.compare(write(tmp / "a", a, NAMES), write(tmp / "b", b, NAMES), measures=names)


def test_a_difference_that_is_the_same_in_every_image_is_the_surest(constant):
    standardised = constant["standardised"]
    assert standardised.sel(measure="sink_share") == np.inf
    assert standardised.sel(measure="attention_distance") == -np.inf  # 0.1 and 0.2 are rounded
    assert 1 < standardised.sel(measure="probability") < 2
    assert measures_by_effect(constant)[-1] == "probability"
    told = describe_difference(constant, "sink_share")
    assert f"no 95 % interval: {constant.attrs['no_interval']['sink_share']}; p 0.001" in told
    assert "the same value in all images (40)" in told
    equal = _effect_sizes(np.array([0.0, 1e-17]), np.array([0.0, 1e-17]), np.array([0.5, 0.5]))
    assert np.isnan(equal).all()


def test_the_difference_of_a_single_image_has_no_spread_and_comes_last(tmp_path):
    pair = []
    for seed, name in enumerate(("one", "two")):
        arrays = numbers(seed)
        arrays["attention_distance"][1:] = np.nan
        pair.append(write(tmp_path / name, arrays, NAMES))
    compared = vitrail.compare(*pair)
    assert np.isnan(compared["standardised"].sel(measure="attention_distance"))
    assert np.isfinite(compared["standardised"]).sum() == compared.sizes["measure"] - 1
    assert measures_by_effect(compared)[-1] == "attention_distance"
    (axes,) = measures_that_differ(compared).axes
    assert [text.get_text() for text in axes.texts] == ["of one image"]
    alone = [write(tmp_path / f"alone{i}", {k: v[:1] for k, v in numbers(i).items()}, NAMES[:1]) for i in range(2)]
    assert np.isnan(vitrail.compare(*alone)["standardised"]).all()


def test_a_difference_that_no_axis_reaches_stands_at_its_end(constant):
    (axes,) = measures_that_differ(constant).axes
    ends = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in "<>"]
    assert len(ends) == 4
    assert max(map(abs, axes.get_xlim())) < 5
    assert [text.get_text() for text in axes.texts] == ["in every image alike"] * 4


def test_a_measure_whose_name_begins_with_that_of_another_has_its_own_title_and_unit(constant):
    for name in ("head_cls_shift", "head_cls_shift_l2"):
        for variable in (f"{name}_difference", f"{name}_head_a"):
            assert constant[variable].attrs == {"title": declaration(name).title, "unit": declaration(name).unit}
        assert not constant[f"{name}_p"].attrs


def test_models_of_another_shape_are_compared_at_the_same_depth(folders, tmp_path):
    deep = numbers(4, layers=8, heads=2)
    slope = np.linspace(0.5, 7.5, 8)  # a measure that is its depth: value d * 8 in the middle of layer d
    deep["attention_distance"] = np.broadcast_to(slope[None, :, None], (N, 8, 2)).copy()
    flat = numbers(0)
    flat["attention_distance"] = np.broadcast_to(np.arange(4)[None, :, None] * 2.0 + 1, (N, 4, 3)).copy()
    first = write(tmp_path / "flat", flat, NAMES)
    compared = vitrail.compare(first, write(tmp_path / "deep", deep, NAMES))
    assert_allclose(compared["attention_distance_b"], [1, 3, 5, 7])
    assert_allclose(compared["attention_distance_difference"], 0, atol=1e-12)
    assert_allclose(compared["p"].sel(measure="attention_distance"), 1)
    assert not any("_head_" in str(name) for name in compared)
    assert compared.attrs["heads_correspond"] is None


def test_a_block_that_lost_its_attention_shifts_no_other(tmp_path):
    """Of four blocks the second has no attention any more: the others are compared with themselves."""
    whole, kept = numbers(0), [0, 2, 3]
    pruned = {name: values[:, kept] if values.ndim > 1 else values for name, values in whole.items()}
    first = write(tmp_path / "whole", whole, NAMES)  # an older study, which does not number its blocks
    second = write(tmp_path / "pruned", pruned, NAMES, block_numbers=kept, n_blocks=4)
    compared = vitrail.compare(first, second)
    assert_array_equal(compared["attention_distance_difference"], 0)
    assert_allclose(compared["attention_distance_a"], whole["attention_distance"].mean((0, 2))[kept], rtol=1e-6)
    assert_array_equal(compared["layer_a"], kept)
    assert_array_equal(compared["layer_b"], [0, 1, 2])
    assert_allclose(compared["depth"], [0.125, 0.625, 0.875])
    told = " ".join(comparison_findings(compared))
    assert "compared by layer, block by block; 1 layer of whole without attention in the other is left out." in told
    pruned["attention_distance"] = pruned["attention_distance"] + np.array([0, 0, 2.0])[:, None]
    again = vitrail.compare(
        first, write(tmp_path / "moved", pruned, NAMES, block_numbers=kept, n_blocks=4), measures="attention_distance"
    )
    told = describe_difference(again, "attention_distance")
    assert "most at L3 of whole, L2 of the other (+2)" in told
    assert told.layer == 3
    others = {name: values[:, [0, 1, 3]] if values.ndim > 1 else values for name, values in whole.items()}
    third = write(tmp_path / "third", others, NAMES, block_numbers=[0, 1, 3], n_blocks=4)
    between = vitrail.compare(second, third)
    assert_allclose(between["depth"], [0.125, 0.875])
    assert not any("_head_" in str(name) for name in between)  # as many heads, and not of the same layers


@pytest.mark.parametrize("grids", [([[8, 8]] * 4, [[4, 4]] * 4), ([[8, 8]] * 4, [[8, 8], [8, 8], [4, 4], [4, 4]])])
def test_lengths_on_other_grids_are_compared_as_shares_of_the_side(tmp_path, grids):
    pair = []
    for name, of_model in zip(("fine", "coarse"), grids, strict=True):
        arrays = numbers(0)
        side = np.array([rows for rows, _ in of_model])[:, None]
        arrays["attention_distance"] = np.broadcast_to(0.25 * side, (N, 4, 3)).copy()  # a quarter of the image
        arrays["strength_entropy"] = np.broadcast_to(np.log(side), (N, 4, 3)).copy()
        pair.append(write(tmp_path / name, arrays, NAMES, grids=of_model))
    compared = vitrail.compare(*pair)
    row = compared.sel(measure="attention_distance")
    assert_allclose([row["mean_a"], row["mean_b"]], 0.25)
    assert row["unit"] == compared["attention_distance_head_a"].attrs["unit"] == "share of the image's side"
    assert_allclose(compared["attention_distance_head_difference"], 0)
    left_out = compared.attrs["left_out"]
    assert {"strength_entropy", "attention_strength"} <= set(left_out)
    assert (
        "depend on the grid of patches, and those of the two models differ (8 x 8 and" in left_out["strength_entropy"]
    )
    drawn = alike_measures(open_pair(*pair))
    assert "attention_distance" in drawn
    assert not {"strength_entropy", "attention_strength"} & set(drawn)
    with pytest.raises(UsageError, match="strength_entropy was to be compared: its numbers depend on the grid"):
        vitrail.compare(*pair, measures="strength_entropy")
    wide = write(tmp_path / "wide", numbers(1), NAMES, grids=[[4, 8]] * 4)
    assert "images of other proportions" in vitrail.compare(pair[0], wide).attrs["left_out"]["attention_distance"]


def test_studies_of_one_hierarchy_are_compared_layer_by_layer_in_one_unit(tmp_path):
    """The first layer moves by two of its patches, the last by one and a half of its own, which is farther."""
    grids, pair = [[8, 8], [8, 8], [4, 4], [4, 4]], []
    for name, further in (("before", [0, 0, 0, 0]), ("after", [2, 0, 0, 1.5])):
        arrays = numbers(0)
        arrays["attention_distance"] = arrays["attention_distance"] + np.array(further)[:, None]
        arrays["strength_entropy"] = np.ones((N, 4, 3))
        pair.append(write(tmp_path / name, arrays, NAMES, grids=grids))
    compared = vitrail.compare(*pair)
    assert_allclose(compared["attention_distance_difference"], [0.25, 0, 0, 0.375], atol=1e-6)
    assert "most at L3 (+0.375)" in describe_difference(compared, "attention_distance")
    assert {"strength_entropy", "attention_strength"} <= set(compared["measure"].values)


def test_numbers_of_several_kinds_have_no_mean_to_compare(tmp_path):
    pair = []
    for seed, name in enumerate(("one", "two")):
        arrays = numbers(seed) | {"tendency": np.random.default_rng(seed).normal(0, 1, (N, 4, 9, 2))}
        pair.append(write(tmp_path / name, arrays, NAMES))
    assert "'xy' are of several kinds" in vitrail.compare(*pair).attrs["left_out"]["tendency"]
    assert "tendency" in alike_measures(open_pair(*pair))  # arrows can be looked at side by side


def test_padding_of_flags_is_no_value(folders, tmp_path):
    pruned = numbers(0)
    pruned["head_flip"][:] = True
    pruned["head_flip"][:, 2, 1:] = False  # padding, as layer 2 has one head
    for name in ("head_probability", "attention_distance", "attention_strength"):
        pruned[name][:, 2, 1:] = np.nan
    folder = write(tmp_path / "pruned", pruned, NAMES, n_heads=[3, 3, 1, 3])
    compared = vitrail.compare(folders[0], folder)
    assert_allclose(compared["head_flip_b"], 1)


def test_patches_beyond_the_grid_of_a_layer_are_no_value(folders, tmp_path):
    merged = numbers(0)
    merged["sink"] = np.zeros((N, 4, 16), dtype=bool)
    merged["sink"][:, 1, :4] = True  # every patch of a grid of 2 x 2; the others are padding
    merged["sink"][:, 0, :4] = True  # a quarter of 4 x 4
    even = numbers(1) | {"sink": np.ones((N, 4, 16), dtype=bool)}
    grids = [[4, 4], [2, 2], [2, 2], None]
    first = write(tmp_path / "merged", merged, NAMES, grids=grids)
    compared = vitrail.compare(first, write(tmp_path / "even", even, NAMES, grids=[[4, 4]] * 4), measures="sink")
    assert_allclose(compared["sink_a"], [0.25, 1, 0, np.nan])
    assert_allclose(compared["sink_b"], [1, 1, 1, np.nan])


def test_measures_that_mean_something_else_are_left_out_or_refused(folders, tmp_path):
    other = numbers(2)
    del other["sink_share"]
    other["attention_strength"] = other["attention_strength"][..., :7]
    folder = write(tmp_path / "options", other, NAMES, options={"importance": "estimate"})
    compared = vitrail.compare(folders[0], folder)
    left_out = compared.attrs["left_out"]
    assert "option importance (exact and estimate)" in left_out["head_probability"]
    assert left_out["sink_share"] == "options does not hold it"
    assert "14 and 7 values" in left_out["attention_strength"]
    assert set(compared["measure"].values) == {"probability", "attention_distance", "correct"}
    with pytest.raises(UsageError, match=r"head_flip was to be compared: .* option importance"):
        vitrail.compare(folders[0], folder, measures="head_flip")
    with pytest.raises(UsageError, match="nothing was to be compared; the studies hold"):
        vitrail.compare(folders[0], folder, measures="nothing")


def test_measures_of_the_label_are_of_images_with_the_same_label(folders, tmp_path):
    other = numbers(6)
    other["label"] = other["label"].copy()
    other["label"][:10] = (other["label"][:10] + 1) % 5
    compared = vitrail.compare(folders[0], write(tmp_path / "own", other, NAMES, labels="predicted"))
    assert f"30 of {N} images" in compared.attrs["labels"]
    assert compared.attrs["labels"].startswith("The labels of own are the model's own predictions, those of the other")
    assert np.isnan(compared["difference"].sel(measure="probability")[:10]).all()
    assert not np.isnan(compared["difference"].sel(measure="attention_distance")).any()
    assert "correct" not in compared["measure"].values
    classes = write(tmp_path / "classes", numbers(7), NAMES, class_names=None, n_classes=9)
    assert "other classes" in vitrail.compare(folders[0], classes).attrs["left_out"]["probability"]


def test_estimates_are_left_out_where_exact_values_lie_beside_them(tmp_path):
    """A corrected study's own means are corrected; differences of its estimates would contradict them."""
    pair = []
    for seed, name in enumerate(("first", "second")):
        arrays = numbers(seed)
        arrays["head_probability_exact"] = np.where(
            np.arange(N)[:, None, None] % 4 == 1, arrays["head_probability"], np.nan
        )
        pair.append(write(tmp_path / name, arrays, NAMES, options={"importance": "corrected"}))
    compared = vitrail.compare(*pair)
    assert "estimates; head_probability_exact has" in compared.attrs["left_out"]["head_probability"]
    assert "head_probability_exact" in compared["measure"].values
    assert np.isfinite(compared["difference"].sel(measure="head_probability_exact")).sum() == N // 4


def test_what_cannot_be_compared_is_refused_in_a_sentence(folders, tmp_path):
    first, second, _, _ = folders
    with pytest.raises(UsageError, match="compared with itself"):
        vitrail.compare(first, first)
    strangers = write(tmp_path / "strangers", numbers(1), [f"x{i}" for i in range(N)])
    with pytest.raises(UsageError, match="no image in common"):
        vitrail.compare(first, strangers)
    (tmp_path / "copy").mkdir()
    same = write(tmp_path / "copy" / "before", numbers(0), NAMES)
    with pytest.raises(UsageError, match="same weights"):
        vitrail.compare(first, same)
    with pytest.raises(StudyError, match="not a study"):
        vitrail.compare(first, tmp_path / "nowhere")
    (second / "parts" / "00001.json").rename(tmp_path / "part")
    try:
        with pytest.raises(StudyError, match="parts"):
            vitrail.compare(first, second)
    finally:
        (tmp_path / "part").rename(second / "parts" / "00001.json")


def test_random_signs_reject_as_rarely_as_they_say():
    rng = np.random.default_rng(0)
    smallest = []
    for seed in range(60):
        values = rng.standard_t(3, (12, 5)) @ rng.normal(0, 1, (5, 5))
        values[rng.random((12, 5)) < 0.1] = np.nan
        smallest.append(np.nanmin(sign_flip_p_values(values, seed=seed)))
    assert np.mean(np.array(smallest) < 0.05) <= 0.15  # 5 % expected; 9 of 60 has a chance below 0.5 %
    planted = rng.normal([0, 0, 2, 0], 1, (40, 4))
    p = sign_flip_p_values(planted)
    assert p[2] == 0.001
    assert p[[0, 1, 3]].min() > 0.05
    assert_array_equal(sign_flip_p_values(np.zeros((5, 2))), 1)
    assert np.isnan(sign_flip_p_values(np.full((5, 1), np.nan))).all()


def test_a_model_in_a_folder_is_called_by_its_name_alone(tmp_path: Path) -> None:
    first = write(tmp_path / "one", numbers(0), NAMES, model="timm:vit_tiny_patch16_224")
    second = write(tmp_path / "two", numbers(1), NAMES, model=str(tmp_path / "models" / "mine"))
    compared = vitrail.compare(first, second)
    assert (compared.attrs["name_a"], compared.attrs["name_b"]) == ("vit_tiny_patch16_224", "mine")


def test_maps_of_example_images_have_no_mean_to_compare() -> None:
    assert not declaration("object_map").is_quantity
    assert declaration("object_auroc").is_quantity
