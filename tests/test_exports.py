"""A study leaves in the formats of other tools, and their own readers give back the numbers of the study."""

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from PIL import Image
from typer.testing import CliRunner

from synthetic_study import CLASSES, N_HEADS, N_LAYERS, plan_of, write_study
from vitrail import open_study, open_vit, run_study
from vitrail.analysis import declaration
from vitrail.cli import app
from vitrail.data.geometry import resize_and_crop
from vitrail.errors import MissingLibrary, UsageError
from vitrail.exports import export_study, tables
from vitrail.exports.fiftyone import heat_map
from vitrail.exports.source import ExportSource, open_source
from vitrail.patterns.names import RULES

N_IMAGES = 7
HEADS = (3, 2, *(3,) * (N_LAYERS - 2))
"""One layer has a head less than the others, so the store has padding there."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("exported"), N_IMAGES, n_heads=HEADS)


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_pandas_reads_the_tables_of_parquet_with_units_and_without_padding(study: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas reads the exported tables, and is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow writes Parquet, and is not installed")
    output = invoke(study, "--to", "parquet")
    folder = study / "exports" / "parquet"
    assert f"{folder}/image.parquet" in output
    dataset = open_study(study)
    images = pandas.read_parquet(folder / "image.parquet")
    assert images["image"].tolist() == dataset["image"].to_numpy().tolist()
    np.testing.assert_array_equal(images["probability"], dataset["probability"])
    assert images["label_name"].tolist() == [CLASSES[each] for each in images["label"]]
    np.testing.assert_array_equal(images[["image_xy_x", "image_xy_y"]], dataset["image_xy"])
    assert all(Path(path).is_file() for path in images["path"])
    heads = pandas.read_parquet(folder / "image-layer-head.parquet")
    assert len(heads) == N_IMAGES * sum(HEADS)
    assert not ((heads["layer"] == 1) & (heads["head"] == 2)).any()
    for row in heads.sample(20, random_state=0).itertuples():
        one = dataset.sel(image=row.image).isel(layer=row.layer, head=row.head)
        assert row.head_probability == np.float32(one["head_probability"])
        assert row.head_flip == bool(one["head_flip"])
    schema = parquet.read_schema(folder / "image-layer-head.parquet")
    assert schema.field("head_divergence").metadata[b"unit"] == b"bits"
    assert json.loads(schema.metadata[b"vitrail"])["model"] == "planted:vit_of_shapes"


def test_places_along_dimensions_have_the_names_and_values_that_they_stand_for(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas reads the exported tables, and is not installed")
    pytest.importorskip("pyarrow.parquet", reason="pyarrow writes Parquet, and is not installed")
    vit = open_vit("vitrail:photos")
    measured = "tokens,patches,patterns,regions"
    dataset = run_study(vit, "vitrail:photos", out=tmp_path / "study", measures=measured, limit=8)
    invoke(tmp_path / "study", "--to", "parquet")
    tables = tmp_path / "study" / "exports" / "parquet"
    lost = pandas.read_parquet(tables / "image-amount.parquet")
    assert sorted(set(lost["amount"])) == [0.25, 0.5, 0.75]
    half = dataset["occlusion_random"].sel(amount=0.5)
    np.testing.assert_array_equal(lost[lost["amount"] == 0.5]["occlusion_random"], half)
    np.testing.assert_array_equal(half, dataset["occlusion_random"].to_numpy()[:, 1])
    rules = pandas.read_parquet(tables / "image-layer-head-rule.parquet")
    assert list(dict.fromkeys(rules["rule"])) == list(RULES)
    sinks = dataset["pattern_rule"].sel(rule="sink")
    np.testing.assert_array_equal(sinks, dataset["pattern_rule"].to_numpy()[..., RULES.index("sink")])
    np.testing.assert_array_equal(dataset["window"].sel(side="bottom"), dataset["window"].to_numpy()[..., 3])
    assert dataset["cells"].to_numpy().tolist() == [2, 4]
    assert dataset["mode"].to_numpy().tolist() == ["class token", "patches"]


def test_csv_holds_the_same_numbers_to_the_last_bit_and_says_what_its_columns_are(study: Path, tmp_path: Path) -> None:
    invoke(study, "--to", "csv", "--measures", "head_probability", "--out", tmp_path / "tables")
    with (tmp_path / "tables" / "image-layer-head.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"image", "layer", "head", "head_probability"}
    array = open_study(study)["head_probability"]
    index = {name: position for position, name in enumerate(array["image"].to_numpy().tolist())}
    read = np.full(array.shape, np.nan, np.float32)
    for row in rows:
        read[index[row["image"]], int(row["layer"]), int(row["head"])] = np.float32(row["head_probability"])
    np.testing.assert_array_equal(read, array)
    with (tmp_path / "tables" / "columns.csv").open(newline="", encoding="utf-8") as file:
        about = {row["column"]: row for row in csv.DictReader(file)}
    assert about["head_probability"]["unit"] == "1"
    assert about["head_probability"]["limits"]


def test_a_path_that_is_no_utf_8_is_written_with_escapes(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "study")
    listed = json.loads((tmp_path / "study" / "images.json").read_text())
    listed["images"][0]["path"] = "/photos/caf\udce9.png"
    (tmp_path / "study" / "images.json").write_text(json.dumps(listed))
    folder, _ = export_study(tmp_path / "study", "csv", measures="base")
    with (folder / "image.csv").open(newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["path"] == r"/photos/caf\xe9.png"
    if importlib.util.find_spec("pyarrow") is not None:
        export_study(tmp_path / "study", "parquet", measures="base")


def test_no_name_is_a_formula_to_a_spreadsheet(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formulas = ("=1+1", "+1", "-1", "@SUM(A1)", "cat = dog")
    monkeypatch.setattr(
        ExportSource, "class_names", lambda _self, ids: [formulas[each % 5] for each in range(len(ids))]
    )
    invoke(study, "--to", "csv", "--out", tmp_path / "tables")
    with (tmp_path / "tables" / "image.csv").open(newline="", encoding="utf-8") as file:
        read = [row["label_name"] for row in csv.DictReader(file)]
    assert read == ["'=1+1", "'+1", "'-1", "'@SUM(A1)", "cat = dog", "'=1+1", "'+1"]


def test_a_study_is_written_by_xarray_itself_with_its_plan_as_json(study: Path, tmp_path: Path) -> None:
    pytest.importorskip("h5netcdf", reason="h5netcdf writes netCDF, and is not installed")
    dataset = open_study(study)
    plan = json.loads((study / "study.json").read_text())
    dataset.isel(image=slice(1, 3)).to_netcdf(tmp_path / "study.nc")
    with xr.open_dataset(tmp_path / "study.nc", engine="h5netcdf") as read:
        for name in ("preprocessing", "left_out", "measures", "n_heads", "class_names"):
            assert json.loads(read.attrs[name]) == plan[name], name
        assert read.attrs["model"] == plan["model"]
        assert json.loads(read.attrs["target"]) is plan["target"] is None
        for name, values in dataset.isel(image=slice(1, 3)).data_vars.items():
            assert read[name].dtype == values.dtype, name
            np.testing.assert_array_equal(read[name], values, err_msg=str(name))
            assert read[name].attrs == values.attrs
    assert dataset.attrs["preprocessing"] == plan["preprocessing"]  # what was written is a copy


def test_without_a_library_for_netcdf_xarray_is_not_asked(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingLibrary, match=r"to_netcdf needs .* pip install 'vitrail\[export\]'"):
        open_study(study).to_netcdf("study.nc")


def test_xarray_reads_from_netcdf_what_it_reads_from_the_study(study: Path) -> None:
    for name in ("h5netcdf", "h5py"):
        pytest.importorskip(name, reason=f"{name} writes netCDF, and is not installed")
    invoke(study, "--to", "netcdf")
    with xr.open_dataset(study / "exports" / "netcdf" / "study.nc", engine="h5netcdf") as read:
        dataset = open_study(study).drop_vars("thumbnail")
        assert json.loads(read.attrs["plan"])["n_heads"] == list(HEADS)
        for name in dataset.data_vars:
            assert read[name].dims == dataset[name].dims
            assert read[name].dtype == dataset[name].dtype, name
            np.testing.assert_array_equal(read[name].to_numpy(), dataset[name].to_numpy(), err_msg=str(name))
            assert read[name].attrs["limits"] == dataset[name].attrs["limits"]
        assert read["image"].to_numpy().tolist() == dataset["image"].to_numpy().tolist()


def test_the_map_for_embedding_atlas_has_a_picture_a_place_and_numbers_of_each_image(study: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas reads the exported table, and is not installed")
    pytest.importorskip("pyarrow", reason="pyarrow writes Parquet, and is not installed")
    output = invoke(study, "--to", "embedding-atlas")
    file = study / "exports" / "embedding-atlas" / "images.parquet"
    assert f"embedding-atlas '{file}' --image image --x x --y y" in output
    table, dataset = pandas.read_parquet(file), open_study(study)
    np.testing.assert_array_equal(table[["x", "y"]], dataset["image_xy"])
    assert table["correct"].tolist() == (dataset["label"] == dataset["prediction"]).to_numpy().tolist()
    present = np.arange(N_HEADS) < np.array(HEADS)[:, None]
    pruned = dataset["head_probability"].to_numpy().astype(np.float64)[:, present]
    np.testing.assert_allclose(table["mean_head_probability"], pruned.mean(1), rtol=1e-6)
    loss = dataset["probability"].to_numpy().astype(np.float64) - pruned.min(1)
    np.testing.assert_allclose(table["largest_loss_head_probability"], loss, rtol=1e-6)
    flips = dataset["head_flip"].to_numpy()[:, present]
    np.testing.assert_allclose(table["mean_head_flip"], flips.mean(1), rtol=1e-6)


def test_embedding_atlas_itself_takes_the_map(study: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("embedding_atlas") is None:
        pytest.skip("embedding-atlas, which opens the export, is not installed")
    folder, command = export_study(study, "embedding-atlas", tmp_path / "atlas")
    del folder
    page = tmp_path / "page.zip"
    ran = subprocess.run(
        [sys.executable, "-m", "embedding_atlas.cli", *command.split()[1:], "--export-application", str(page)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert page.stat().st_size > 0


@pytest.mark.filterwarnings("ignore:No uuidRepresentation is specified")  # FiftyOne's own, to pymongo
def test_fiftyone_itself_loads_labels_predictions_and_heat_maps(tmp_path: Path) -> None:
    fo = pytest.importorskip("fiftyone", reason="FiftyOne, which opens the export, is not installed")
    study, vit = tmp_path / "study", open_vit("vitrail:photos")
    run_study(vit, "photos", out=study, limit=4, measures="probability,field_size")
    try:
        folder, _ = export_study(study, "fiftyone", tmp_path / "fiftyone")
    except MissingLibrary as error:
        pytest.skip(str(error))
    dataset = fo.Dataset.from_dir(str(folder / "dataset"), fo.types.FiftyOneDataset)
    try:
        sample = dataset.first()
        study_data = open_study(study)
        assert sample["prediction"].label == vit.class_names[int(study_data["prediction"][0])]
        assert sample["prediction"].confidence == pytest.approx(float(study_data["probability"][0]))
        assert Path(sample.filepath).is_file()
        assert sample["field_size"].map.max() == pytest.approx(float(study_data["field_size"][0, -1].max()))
    finally:
        dataset.delete()


def test_a_heat_map_lies_where_the_model_saw_the_photograph() -> None:
    """The same crop of the heat map, by Pillow, gives the patches back; what the model did not see is 0."""
    settings = {"size": (64, 64), "crop_pct": 0.8, "crop_mode": "center", "interpolation": "nearest"}
    values = 1 + np.arange(16, dtype=float).reshape(4, 4)
    for sides in ((200, 120), (90, 300), (80, 80)):
        laid = heat_map(values, sides, settings)
        picture = Image.fromarray(laid.astype(np.uint8)).resize(sides, Image.Resampling.NEAREST).convert("RGB")
        cropped = np.asarray(resize_and_crop(picture, settings))[..., 0]
        np.testing.assert_array_equal(cropped[8::16, 8::16], values)
        assert laid[0, 0] == 0
        assert laid.shape[1] / laid.shape[0] == pytest.approx(sides[0] / sides[1], rel=0.05)
    np.testing.assert_array_equal(heat_map(values, None, settings)[4::8, 4::8], values)


def test_an_image_has_no_mean_of_x_and_y_and_lengths_in_the_patches_of_one_layer() -> None:
    random = np.random.default_rng(0)
    there = np.arange(16) < np.array([16, 4])[:, None]  # grids of 4 x 4 and 2 x 2
    arrays = {
        "tendency": np.where(there[..., None], random.normal(size=(3, 2, 16, 2)), np.nan),
        "interaction_distance": np.where(there, 1.0, np.nan) + np.zeros((3, 2, 16)),
        "attention_strength": np.where(np.arange(4) < np.array([4, 2])[:, None, None], 1.0, np.nan)
        + np.zeros((3, 2, 1, 4)),
    }
    data = xr.Dataset(
        {
            name: xr.DataArray(values, dims=declaration(name).dims, attrs=declaration(name).attributes())
            for name, values in arrays.items()
        }
    )
    plan = plan_of(3, "", n_layers=2, n_heads=[1, 1], grids=[[4, 4], [2, 2]], prefixes=[1, 1])
    source = ExportSource(data, data, plan, ())
    numbers = source.numbers_of_images()
    assert set(numbers) == {"mean_interaction_distance", "mean_attention_strength"}
    np.testing.assert_allclose(numbers["mean_interaction_distance"], (16 * 1 + 4 * 2) / 20)
    assert source.present(("layer", "head", "hop")).sum(-1).ravel().tolist() == [4, 2]


def test_a_heat_map_is_empty_where_pixels_belong_to_no_patch() -> None:
    settings = {"size": (76, 76), "crop_pct": 1.0, "crop_mode": "center", "interpolation": "nearest"}
    values = 1 + np.arange(16, dtype=float).reshape(4, 4)
    laid = heat_map(values, None, settings, view=(76 / 16, 76 / 16))
    side = len(laid)
    for row in range(4):  # the middle of each patch of 16 pixels
        at = [int((16 * each + 8) / 76 * side) for each in range(4)]
        np.testing.assert_array_equal(laid[at[row], at], values[row])
    assert not laid[int(66 / 76 * side) :].any()  # behind the last patch


def test_what_an_export_cannot_do_is_a_sentence(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no export to 'xlsx'; choose from parquet, csv, netcdf"):
        export_study(study, "xlsx")
    with pytest.raises(UsageError, match="holds none of window"):
        export_study(study, "csv", measures="window")
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("words")
    with pytest.raises(UsageError, match=r"was not written by `vitrail export`"):
        export_study(study, "csv", foreign)
    assert (foreign / "chapter.tex").read_text() == "words"
    for name, to in (
        ("pyarrow", "parquet"),
        ("h5netcdf", "netcdf"),
        ("pyarrow", "embedding-atlas"),
        ("fiftyone", "fiftyone"),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingLibrary, match=rf"export to {to} needs {name}.*pip install"):
            export_study(study, to, tmp_path / to)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--to", "csv", "--images", "0"], "--images has a meaning with --page only"),
        (["--to", "csv", "--with", "/nowhere", "--no-live"], "--with, --no-live has a meaning with --page only"),
        (["--page", "p.html", "--out", "d", "--measures", "m"], "--out, --measures has a meaning with --to only"),
    ],
)
def test_options_that_would_be_ignored_are_refused(study: Path, options: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["export", str(study), *options])
    assert isinstance(result.exception, UsageError)
    assert told in str(result.exception)


def test_an_export_replaces_its_own_files_and_leaves_those_that_others_put_beside_them(study: Path, tmp_path) -> None:
    folder, _ = export_study(study, "csv", tmp_path / "tables")
    own = {path.name for path in folder.iterdir()} - {"export.json"}
    (folder / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    (folder / "more" / "fit.csv").write_text("1,2")
    export_study(study, "csv", folder, measures="head_probability")
    left = {path.name for path in folder.iterdir()}
    assert {"notes.txt", "more", "export.json"} < left
    assert left & own < own  # tables of measures that are no longer exported are gone
    assert (folder / "more" / "fit.csv").read_text() == "1,2"
    (folder / "export.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        export_study(study, "csv", folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_an_export_writes_over_no_file_that_another_program_or_a_user_put_there(study: Path, tmp_path: Path) -> None:
    other = tmp_path / "annotations"
    other.mkdir()
    contents = {
        "export.json": json.dumps({"annotations": ["words"], "files": ["a.jpg", "notes.txt"]}),
        "a.jpg": "photo",
        "notes.txt": "mine",
        "image.csv": "my table",
    }
    for name, content in contents.items():
        (other / name).write_text(content)
    with pytest.raises(UsageError, match=r"its export.json is of another program"):
        export_study(study, "csv", other)
    assert {path.name: path.read_text() for path in other.iterdir()} == contents
    folder, _ = export_study(study, "csv", tmp_path / "tables", measures="base")
    own = {path.name: path.read_bytes() for path in folder.iterdir()}
    mine = {"image.parquet": b"my own", "study.nc": b"mine", "image-layer-head.csv": b"mine too"}
    for name, content in mine.items():
        (folder / name).write_bytes(content)
    for to, name in (("parquet", "image.parquet"), ("netcdf", "study.nc"), ("csv", "image-layer-head.csv")):
        with pytest.raises(UsageError, match=rf"{name}, which `vitrail export` did not write"):
            export_study(study, to, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == own | mine


def test_what_an_export_that_was_killed_has_written_is_written_over(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = export_study(study, "csv", tmp_path / "tables")
    complete = {path.name: path.read_bytes() for path in folder.iterdir()}
    signs: list[str] = []
    monkeypatch.setattr(tables.csv, "writer", lambda _file: signs.append((folder / "export.json").read_text()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_study(study, "csv", folder)
    monkeypatch.undo()
    (folder / "export.json").write_text(signs[0])  # as it was when the first table was begun
    for name in complete.keys() - {"export.json"}:
        (folder / name).write_text("half")
    export_study(study, "csv", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == complete


def test_an_export_takes_blocks_as_they_come(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = export_study(study, "csv", tmp_path / "tables")
    whole = (folder / "image-layer-head-hop.csv").read_bytes()
    monkeypatch.setattr("vitrail.exports.source.BLOCK_BYTES", 1)
    again, _ = export_study(study, "csv", tmp_path / "tables")
    assert (again / "image-layer-head-hop.csv").read_bytes() == whole
    assert json.loads((again / "export.json").read_text())["left_out"] == ["thumbnail"]
    shutil.rmtree(again)
    assert open_source(study).left_out == ["thumbnail"]
