"""The server of the page: what it answers, whom it refuses, and what happens when things go wrong."""

import asyncio
import errno
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from synthetic_study import CLASSES, GRID, N_HEADS, N_LAYERS, SIZE, PlantedLive, photograph, write_study
from vitrail.analysis import analyses, measures
from vitrail.app import create_app, look, server, study_arrays
from vitrail.app.answers import binary
from vitrail.app.columns import Columns
from vitrail.app.live_queue import LiveQueue
from vitrail.app.lru_cache import LRUCache
from vitrail.app.middleware import is_loopback
from vitrail.app.pictures import Upload, Uploads, model_view
from vitrail.app.study_arrays import StudyArrays
from vitrail.app.summary import STATISTICS, evenly_spaced, summarise
from vitrail.data import open_images, scan
from vitrail.errors import StudyError, UsageError, WeightsMismatch
from vitrail.study.growth import arrange_images
from vitrail.study.ownership import write_atomic
from vitrail.study.plan import ModelIdentity, growing_command
from vitrail.study.store import PLAN, open_study, read_manifest, read_plan
from vitrail.study.writing import StudyFolder

N_IMAGES = 70
HOME = "http://127.0.0.1:8765"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("planted"), N_IMAGES)


@pytest.fixture(scope="module")
def app(study: Path) -> Starlette:
    return create_app(study, PlantedLive())


@pytest.fixture(scope="module")
def client(app: Starlette) -> Iterator[TestClient]:
    with TestClient(app, base_url=HOME) as client:
        yield client


def array(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    shape = [int(size) for size in answer.headers["x-shape"].split(",") if size]
    return np.frombuffer(answer.content, np.dtype(answer.headers["x-dtype"]).newbyteorder("<")).reshape(shape)


def refusal(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    sentence = answer.json()["error"]
    assert sentence.endswith((".", "?"))
    assert len(sentence) > 20
    return sentence


def jpeg(size: tuple[int, int] = (90, 60)) -> bytes:
    buffer = io.BytesIO()
    photograph(3, 0).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


# --- the study ---


def test_the_study_tells_its_sizes_measures_and_accuracy(client: TestClient, study: Path) -> None:
    description = client.get("/api/study").json()
    dataset = open_study(study)
    assert description["sizes"]["image"] == N_IMAGES
    assert description["n_heads"] == [N_HEADS] * N_LAYERS
    assert description["class_names"] == [name.split(",")[0] for name in CLASSES]
    share_correct = float((dataset.prediction == dataset.label).mean())
    assert_allclose(description["accuracy"]["value"], share_correct, atol=1e-6)
    assert description["accuracy"]["low"] < share_correct < description["accuracy"]["high"]
    assert description["measures"]["strength_entropy"]["unit"] == "nats"
    quantities = {name: each["is_quantity"] for name, each in description["measures"].items()}
    assert quantities == {name: measures()[name].is_quantity for name in quantities}
    assert (quantities["prediction"], quantities["probability"]) == (False, True)
    assert "class_names" not in description["measures"]
    assert "thumbnail" not in description["measures"]


def test_arrays_arrive_as_they_are_stored(client: TestClient, study: Path) -> None:
    dataset = open_study(study)
    for name in ("label", "probability", "image_xy", "head_probability"):
        assert_array_equal(array(client.get(f"/api/array/{name}")), dataset[name].values)
    one = array(client.get("/api/array/attention_strength", params={"image": 5, "layer": 2, "head": 1}))
    assert_array_equal(one, dataset.attention_strength[5, 2, 1])
    column = client.get("/api/array/strength_entropy", params={"layer": 11, "head": 0})
    assert column.headers["x-dims"] == "image"
    assert_array_equal(array(column), dataset.strength_entropy[:, 11, 0])
    assert array(client.get("/api/array/head_flip", params={"image": 0})).dtype == np.uint8


def test_a_summary_is_the_mean_with_an_interval_and_quantiles(client: TestClient, study: Path) -> None:
    values = open_study(study).head_probability.values
    answer = client.get("/api/summary/head_probability")
    assert answer.headers["x-statistics"] == ",".join(STATISTICS)
    mean, low, high, q05, median, q95 = array(answer)
    assert_allclose(mean, values.mean(axis=0), rtol=1e-5)
    assert_allclose([q05, median, q95], np.quantile(values, (0.05, 0.5, 0.95), axis=0), rtol=1e-5)
    assert np.all(low < mean)
    assert np.all(mean < high)


def test_a_cost_is_the_baseline_less_the_measure_image_by_image(client: TestClient, study: Path) -> None:
    dataset = open_study(study)
    lost = dataset.probability.values[:, None, None] - dataset.head_probability.values
    mean, low, high = array(client.get("/api/summary/head_probability?cost=1"))[:3]
    assert_allclose(mean, lost.mean(axis=0), atol=1e-6)
    assert_allclose((low + high)[11, 0] / 2, mean[11, 0], atol=0.02)
    of_some = array(client.post("/api/summary/head_probability?cost=1&layer=0&head=1", json={"images": [0, 6, 12]}))
    assert_allclose(of_some[0], lost[[0, 6, 12], 0, 1].mean(), atol=1e-6)
    assert "has no cost" in refusal(client.get("/api/summary/strength_entropy?cost=1"), 404)


def test_the_page_opens_on_the_head_that_matters_most_and_the_image_that_needs_it_most(
    client: TestClient, study: Path
) -> None:
    dataset = open_study(study)
    lost = dataset.probability.values[:, None, None] - dataset.head_probability.values
    layer, head = np.unravel_index(lost.mean(0).argmax(), lost.shape[1:])
    start = {"layer": int(layer), "head": int(head), "image": int(lost[:, layer, head].argmax())}
    description = client.get("/api/study").json()
    assert description["start"] == start
    assert description["measures"]["head_probability"]["baseline"] == "probability"
    assert description["measures"]["strength_entropy"]["baseline"] == ""


def test_a_summary_of_some_images_is_of_those_only(client: TestClient, study: Path) -> None:
    images = [3, 10, 11, 40]
    answer = client.post("/api/summary/strength_entropy?over=head", json={"images": images})
    assert answer.headers["x-dims"] == "statistic,layer"
    assert answer.headers["x-images"] == "4"
    expected = open_study(study).strength_entropy.values[images].mean(axis=2)
    assert_allclose(array(answer)[0], expected.mean(axis=0), rtol=1e-5)


def test_a_summary_of_one_head_is_a_slice_of_the_whole(client: TestClient) -> None:
    whole = array(client.get("/api/summary/attention_strength"))
    part = array(client.get("/api/summary/attention_strength?layer=4&head=2"))
    assert_array_equal(part, whole[:, 4, 2])


def test_one_head_of_a_large_array_is_summarised_alone_with_the_same_numbers(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = StudyArrays(open_study(study)).summary("attention_strength", None, False, {"layer": 1, "head": 2})
    monkeypatch.setattr(study_arrays, "PIECEWISE_BYTES", 0)
    arrays = StudyArrays(open_study(study))
    monkeypatch.setattr(arrays, "summary_of_all", None)
    for _ in range(2):
        dims, piece = arrays.summary("attention_strength", None, False, {"layer": 1, "head": 2})
        assert dims == whole[0]
        assert_allclose(piece.values, whole[1].values, rtol=1e-6)
        said = [each.interval.split(", for ")[0] for each in (piece, whole[1])]  # for how many columns is its own
        assert said[0] == said[1]
        assert (piece.n_images, piece.quantiles_of) == (whole[1].n_images, whole[1].quantiles_of)


def test_how_many_heads_have_no_interval_is_counted_over_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((50, 10)).astype(np.float32)
    values[:, [3, 9]] = 0.5
    at_once = summarise(values).interval
    assert at_once.endswith(", for 2 of 10 columns")
    monkeypatch.setattr("vitrail.app.summary.CELLS_AT_ONCE", 50 * 5)
    assert summarise(values).interval == at_once
    values[:, 3] = values[:, 4]  # none in the first step
    assert summarise(values).interval.endswith(", for 1 of 10 columns")
    assert ", for " not in summarise(values[:, [9, 9]]).interval


def test_what_is_added_to_a_study_is_told_to_a_page_that_is_opened_meanwhile(study: Path, tmp_path: Path) -> None:
    """A page whose study is being written tells which measures are under way, and that more is there than it has."""
    plan, data, later = read_plan(study), open_study(study), "prefix_share"
    names = [str(name) for name in data.data_vars if "image" in data[name].dims and name != "image_xy"]
    folder = tmp_path / "written"
    folder.mkdir()
    writing = StudyFolder(folder, replace(plan, part_size=32), read_manifest(study))

    def write(n_parts: int, arrays: list[str]) -> None:
        for part in writing.plan.parts[:n_parts]:
            rows = slice(part.start, part.stop)
            writing.write_part(part, {name: data[name].values[rows] for name in arrays})

    without = [name for name in names if name != later]
    write(1, without)
    with TestClient(create_app(folder), base_url=HOME) as client:

        def told() -> tuple[int, int, list[str], bool]:
            about = client.get("/api/study").json()
            arrived, under_way = about["arrived_measures"], later in about["missing_measures"]
            return about["missing_images"], about["arrived_images"], arrived, under_way

        assert told() == (N_IMAGES - 32, 0, [], True)
        write(2, without)
        assert told() == (N_IMAGES - 32, 32, [], True)
        write(3, without)
        write(3, [later])
        assert told() == (N_IMAGES - 32, N_IMAGES - 32, [later], False)
        assert array(client.get("/api/array/label")).shape == (32,)  # what was opened goes on


def test_an_array_too_large_to_keep_gives_the_same_summary(
    study: Path, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = array(client.get("/api/summary/attention_strength"))
    monkeypatch.setattr("vitrail.app.study_arrays.WHOLE_BYTES", 0)
    with TestClient(create_app(study), base_url=HOME) as bare:
        streamed = array(bare.get("/api/summary/attention_strength"))
        some = array(bare.post("/api/summary/attention_strength", json={"images": [1, 2]}))
        column = array(bare.get("/api/array/attention_strength?layer=0&head=0"))
        layer = array(bare.get("/api/array/attention_strength?layer=2"))
        assert bare.get("/api/study").json()["start"] == client.get("/api/study").json()["start"]
    assert_allclose(streamed[[0, 3, 4, 5]], kept[[0, 3, 4, 5]], rtol=1e-5)
    assert_allclose(streamed[1:3], kept[1:3], rtol=1e-5)
    strength = open_study(study).attention_strength
    assert_allclose(some[0], strength.values[1:3].mean(axis=0), rtol=1e-5)
    assert_array_equal(column, strength.values[:, 0, 0])
    assert_array_equal(layer, strength.values[:, 2])


@pytest.mark.parametrize("whole_bytes", [2**29, 0])
def test_lengths_in_a_hierarchy_are_in_patches_of_the_first_layer_as_in_the_report(
    whole_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.app.study_arrays.WHOLE_BYTES", whole_bytes)
    study = write_study(tmp_path, 30)
    plan = json.loads((study / PLAN).read_text()) | {"grids": [[GRID, GRID]] * 6 + [[GRID // 2, GRID // 2]] * 6}
    del plan["digest"]  # is of the plan as it was
    (study / PLAN).write_text(json.dumps(plan))
    values = open_study(study)["attention_distance"].values * np.repeat([1, 2], 6)[:, None]
    path, name = "/api/array/attention_distance", "attention_distance"
    with TestClient(create_app(study, PlantedLive()), base_url=HOME) as client:
        measures_told = client.get("/api/study").json()["measures"]
        assert (measures_told[name]["unit"], measures_told["strength_entropy"]["unit"]) == ("patches of L0", "nats")
        for query, expected in (
            ("?image=3", values[3]),  # from the store, and below from memory
            ("", values),
            ("?image=3", values[3]),
            ("?layer=7&head=1", values[:, 7, 1]),
            ("?layer=7", values[:, 7]),
            ("?head=2&image=4", values[4, :, 2]),
        ):
            assert_allclose(array(client.get(path + query)), expected, rtol=1e-6, err_msg=query)
        summary = f"/api/summary/{name}"
        assert_allclose(array(client.get(summary))[0], values.mean(0), rtol=1e-5)
        assert_allclose(array(client.get(f"{summary}?over=head"))[0], values.mean((0, 2)), rtol=1e-5)
        some = array(client.post(f"{summary}?layer=8", json={"images": [1, 2]}))
        assert_allclose(some[0], values[1:3, 8].mean(0), rtol=1e-5)
        image = client.post("/api/look", content=jpeg()).json()["image"]
        client.get(f"/api/look/{image}/stream", params={"measures": name})
        own = client.app.state.shared.uploads.get(image).arrays[name]  # type: ignore[attr-defined]
        assert_allclose(array(client.get(f"{path}?image={image}&layer=9")), 2 * own[9], rtol=1e-6)


def test_boxes_and_arrows_stay_in_patches_of_the_layer_that_they_are_drawn_on() -> None:
    unit = {"unit": "patches, x to the right, y down"}
    pulls = np.ones((5, 2, 4, 2), dtype=np.float32)
    grids = {"grids": [[2, 2], [1, 1]]}
    dataset = xr.Dataset({"tendency": (("image", "layer", "patch", "xy"), pulls, unit)}, attrs=grids)
    arrays = StudyArrays(dataset)
    assert_array_equal(arrays.read_slice("tendency", {"image": "0"})[1], pulls[0])
    assert arrays.unit("tendency") == "patches of L0, x to the right, y down"


@pytest.mark.parametrize("n_bytes", [2**30, 0, None])
def test_one_head_of_an_array_too_large_to_keep_is_read_from_the_study_once_where_there_is_room(
    n_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(1).random((60, 3, 2)).astype(np.float32)
    arrays = StudyArrays(xr.Dataset({"attention_distance": (("image", "layer", "head"), values)}))
    monkeypatch.setattr("vitrail.app.study_arrays.WHOLE_BYTES", 0)
    if n_bytes is None:
        monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    else:
        monkeypatch.setattr("vitrail.app.columns.MAX_BYTES", n_bytes)
    blocks, read = StudyArrays._blocks, []
    monkeypatch.setattr(StudyArrays, "_blocks", lambda self, array: (read.append(1), blocks(self, array))[1])
    for layer in range(3):
        dims, column = arrays.read_slice("attention_distance", {"layer": str(layer), "head": "1"})
        assert dims == ("image",)
        assert_array_equal(column, values[:, layer, 1])
    assert len(read) == bool(n_bytes)


@pytest.mark.parametrize("room", ["full", "taken", "written"])
def test_a_copy_takes_its_room_before_it_is_filled(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a sparse file that a full disk cannot hold would end the process."""
    values = np.random.default_rng(1).random((60, 30, 20)).astype(np.float32)
    allocated: list[int] = []

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        for file in Path("/proc/self/fd").glob("*"):
            if file.exists() and file.stat().st_size == values.nbytes:
                allocated.append(512 * file.stat().st_blocks)
        yield 0, values

    def fail(*_arguments: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if room == "full":
        monkeypatch.setattr("os.posix_fallocate", fail, raising=False)
    elif room == "written":
        monkeypatch.delattr("os.posix_fallocate", raising=False)
    copy = Columns().get("planted", values.shape, values.dtype, blocks)
    if room == "full":
        assert copy is None
        assert not allocated
        return
    assert_array_equal(copy, np.moveaxis(values, 0, -1))
    assert all(each >= values.nbytes for each in allocated)
    assert allocated or not Path("/proc/self/fd").is_dir()


@pytest.mark.parametrize(
    "path",
    [
        "/api/array/label?image=70",
        "/api/array/label?image=-1",
        "/api/array/label?image=٣",
        "/api/array/label?image=1e3",
        "/api/array/label?image=99999999999999999999",
        "/api/array/strength_entropy?layer=12&head=0",
        "/api/array/strength_entropy?head=3",
        "/thumb/70",
        "/photo/70",
        "/photo/x",
        "/api/live/attention/70?layer=0&head=0",
        "/api/live/attention/0?layer=12&head=0",
        "/api/live/attention/0?layer=0",
    ],
)
def test_an_index_that_is_not_there_is_404_with_the_valid_range(client: TestClient, path: str) -> None:
    assert "Valid: 0 to" in refusal(client.get(path), 404)


@pytest.mark.parametrize(
    "path",
    [
        "/api/array/nothing",
        "/api/array/label?layer=0",
        "/api/summary/nothing",
        "/thumb/u0123",
        "/photo/u0123",
        "/api/live/modes/u0123?layer=0&head=0",
    ],
)
def test_a_name_that_is_not_there_is_404_with_a_sentence(client: TestClient, path: str) -> None:
    refusal(client.get(path), 404)


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml",
        "/..%2f..%2fpyproject.toml",
        "/photo/..%2f..%2fstudy.json",
        "/assets/../../server.py",
        "//etc/passwd",
    ],
)
def test_no_path_of_a_request_reaches_the_disk(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert b"vitrail" not in answer.content.lower() or len(answer.content) < 300


@pytest.mark.parametrize("images", [[], [70], [-1], [0.5], ["0"], [True], "0", None, list(range(71))])
def test_a_set_of_images_that_makes_no_sense_is_refused(client: TestClient, images: object) -> None:
    answer = client.post("/api/summary/strength_entropy", json={"images": images})
    refusal(answer, 404 if images in ([70], [-1]) else 422)


def test_a_set_that_is_not_json_or_too_large_is_refused(client: TestClient) -> None:
    refusal(client.post("/api/summary/strength_entropy", content=b"\xff{"), 422)
    refusal(client.post("/api/summary/strength_entropy", content=b"[" + b"1," * 2_200_000), 413)


# --- pictures ---


def test_a_thumbnail_is_the_one_in_the_store(client: TestClient, study: Path) -> None:
    thumbnail = Image.open(io.BytesIO(client.get("/thumb/12").content))
    stored = open_study(study).thumbnail.values[12].astype(float)
    assert np.abs(np.asarray(thumbnail, dtype=float) - stored).mean() < 6  # JPEG


def test_a_photograph_is_shown_as_the_model_sees_it(client: TestClient) -> None:
    assert Image.open(io.BytesIO(client.get("/photo/12").content)).size == (SIZE, SIZE)


def test_a_photograph_that_has_gone_is_404_and_the_rest_goes_on(tmp_path: Path) -> None:
    study = write_study(tmp_path, 8)
    for path in (tmp_path / "photos").rglob("*.png"):
        path.unlink()
    with TestClient(create_app(study), base_url=HOME) as client:
        refusal(client.get("/photo/0"), 404)
        assert client.get("/thumb/0").status_code == 200
        assert client.get("/api/study").status_code == 200


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(60, 60), (48, 80)])
def test_the_model_sees_what_its_own_preprocessing_shows(mode: str, size: tuple[int, int]) -> None:
    preprocessing = pytest.importorskip("vitrail.models.preprocessing")
    picture = photograph(5, 2).resize((150, 101))
    reference = preprocessing.Preprocessing(size, (0.5,), (0.5,), "bicubic", 0.875, mode)
    view = model_view(picture, reference.as_dict())
    expected = reference.view(picture)
    assert view.size == expected.size
    apart = np.abs(np.asarray(view, dtype=float) - np.asarray(expected, dtype=float))
    if mode != "border":  # which pads with another colour than ours, outside the photograph
        assert apart.mean() < 1.5


# --- the live model ---


def test_live_attention_is_that_of_the_chosen_head(client: TestClient) -> None:
    answer = client.get("/api/live/attention/6?layer=3&head=2")
    assert answer.headers["x-dims"] == "query,key"
    weights = array(answer)
    assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    assert not np.allclose(weights, array(client.get("/api/live/attention/6?layer=3&head=1")))


def test_live_modes_have_a_row_for_each_mode(client: TestClient) -> None:
    assert array(client.get("/api/live/modes/6?layer=3&head=2")).shape == (6, len(CLASSES))


def test_without_a_model_live_answers_say_what_to_do(study: Path) -> None:
    with TestClient(create_app(study), base_url=HOME) as client:
        for answer in (
            client.get("/api/live/attention/0?layer=0&head=0"),
            client.post("/api/look", content=jpeg()),
        ):
            assert "vitrail open" in refusal(answer, 503)
        assert client.get("/api/study").json()["live"]["state"] == "none"
        assert client.get("/api/array/label").status_code == 200


def test_the_stored_study_is_served_while_the_model_is_opened(study: Path) -> None:
    opening, opened = threading.Event(), threading.Event()

    def open_model() -> PlantedLive:
        opening.set()
        assert opened.wait(30)
        return PlantedLive()

    with TestClient(create_app(study, open_model), base_url=HOME) as client:
        assert opening.wait(30)
        assert client.get("/api/live").json()["state"] == "loading"
        assert "being opened" in refusal(client.get("/api/live/attention/0?layer=0&head=0"), 503)
        assert client.get("/api/array/label").status_code == 200
        opened.set()
        deadline = time.monotonic() + 30
        while client.get("/api/live").json()["state"] == "loading" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.get("/api/live").json() == {"state": "ready", "reason": ""}
        assert array(client.get("/api/live/attention/0?layer=0&head=0")).shape == (197, 197)


@pytest.mark.parametrize("failure", [StudyError("The weights have moved. Name them with --weights."), OSError("gone")])
def test_a_model_that_cannot_be_opened_leaves_the_stored_study_and_the_reason(study: Path, failure: Exception) -> None:
    def open_model() -> PlantedLive:
        raise failure

    queue = LiveQueue(open_model)
    queue.open_model()
    status = queue.status()
    assert status["state"] == "failed"
    assert ("--weights" in status["reason"]) == isinstance(failure, StudyError)
    with pytest.raises(HTTPException, match=r"weights|log says where"):
        queue.refuse_without_model()
    queue.close()


def test_a_model_with_other_weights_than_the_studied_ones_is_refused(study: Path) -> None:
    class Another(PlantedLive):
        identity = ModelIdentity("1" * 64)

    with pytest.raises(WeightsMismatch, match="studied with other weights"):
        create_app(study, Another())

    def open_model() -> Another:
        return Another()

    app = create_app(study, open_model)
    app.state.live.open_model()
    status = app.state.live.status()
    assert status["state"] == "failed"
    assert "studied with other weights" in status["reason"]
    app.state.live.close()


def test_an_uploaded_photograph_is_read_like_a_stored_one(client: TestClient, study: Path) -> None:
    name = client.post("/api/look", content=jpeg()).json()["image"]
    assert name.startswith("u")
    assert len(name) > 12
    assert client.get(f"/api/look/{name}/stream?analyses=heads").status_code == 200
    entropy = array(client.get(f"/api/array/strength_entropy?image={name}"))
    assert entropy.shape == (N_LAYERS, N_HEADS)
    one = array(client.get(f"/api/array/strength_entropy?image={name}&layer=4&head=2"))
    assert_array_equal(one, entropy[4, 2])
    xy = array(client.get(f"/api/maps/importance-tsne?image={name}"))
    lows, highs = open_study(study).image_xy.values.min(0), open_study(study).image_xy.values.max(0)
    assert np.all(xy >= lows)
    assert np.all(xy <= highs)
    for path in (f"/thumb/{name}", f"/photo/{name}"):
        assert Image.open(io.BytesIO(client.get(path).content)).format == "JPEG"
    assert max(Image.open(io.BytesIO(client.get(f"/thumb/{name}").content)).size) == 64
    assert array(client.get(f"/api/live/attention/{name}?layer=0&head=0")).shape == (197, 197)


def test_only_the_last_few_uploads_are_kept(client: TestClient) -> None:
    names = [client.post("/api/look", content=jpeg()).json()["image"] for _ in range(9)]
    assert len(set(names)) == 9
    refusal(client.get(f"/photo/{names[0]}"), 404)
    assert client.get(f"/photo/{names[-1]}").status_code == 200


def test_an_upload_leaves_nothing_on_the_disk(client: TestClient, study: Path) -> None:
    before = sorted(study.rglob("*"))
    client.post("/api/look", content=jpeg())
    assert sorted(study.rglob("*")) == before


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", b"not an image at all", jpeg()[:200], b"\x89PNG\r\n\x1a\n" + b"\0" * 40]
)
def test_an_upload_that_is_no_image_is_refused_with_the_reason(client: TestClient, content: bytes) -> None:
    answer = client.post("/api/look", content=content)
    assert answer.status_code == 422
    assert answer.json()["error"]


def test_uploads_too_large_in_bytes_or_pixels_are_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal(client.post("/api/look", content=b"\0" * (32 * 2**20 + 1)), 413)

    def drops() -> Iterator[bytes]:  # no content-length: counted as it comes
        for _ in range(40):
            yield b"\0" * 2**20

    refusal(client.post("/api/look", content=drops()), 413)
    monkeypatch.setattr("vitrail.app.look.MAX_PIXELS", 1000)
    assert "pixels" in client.post("/api/look", content=jpeg()).json()["error"]


def test_a_failure_of_the_model_reaches_the_page_as_a_sentence(study: Path) -> None:
    class Failing(PlantedLive):
        def attention(self, image: Image.Image, layer: int) -> np.ndarray:
            raise RuntimeError("out of something")

    with TestClient(create_app(study, Failing()), base_url=HOME, raise_server_exceptions=False) as client:
        sentence = refusal(client.get("/api/live/attention/0?layer=0&head=0"), 500)
        assert "out of something" not in sentence  # the log has it, the page need not
        assert array(client.get("/api/live/modes/0?layer=0&head=0")).shape[0] == 6


class Request:
    """The part of a request that the queue uses."""

    def __init__(self) -> None:
        self.left = False

    async def is_disconnected(self) -> bool:
        return self.left


def test_live_work_is_bounded_and_dropped_when_the_page_leaves() -> None:
    gate, done = threading.Event(), []

    async def scene() -> None:
        queue = LiveQueue(PlantedLive(), max_waiting=2)
        staying, leaving = Request(), Request()

        def work(name: str) -> object:
            return lambda _live: (gate.wait(10), done.append(name))

        first = asyncio.create_task(queue.run(staying, work("first")))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        second = asyncio.create_task(queue.run(leaving, work("second")))  # type: ignore[arg-type]
        third = asyncio.create_task(queue.run(staying, work("third")))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        with pytest.raises(HTTPException, match="busy") as full:
            await queue.run(staying, work("fourth"))  # type: ignore[arg-type]
        assert full.value.status_code == 503
        leaving.left = True
        with pytest.raises(HTTPException, match="left"):
            await second
        gate.set()
        await asyncio.gather(first, third)
        queue.close()

    with ThreadPoolExecutor(1) as thread:  # a loop of its own: browser tests leave theirs running in this thread
        thread.submit(asyncio.run, scene()).result()
    assert done == ["first", "third"]


def test_a_signal_that_comes_while_a_call_is_being_queued_waits_for_nothing() -> None:
    """A handler of signals runs in the thread that it interrupts, whatever lock that holds."""

    async def scene() -> None:
        queue = LiveQueue(PlantedLive())
        with queue._worker._shutdown_lock, queue._count_lock:
            queue.refuse_more()
        with pytest.raises(HTTPException, match="closing") as refused:
            await queue.run(Request(), lambda _live: None)  # type: ignore[arg-type]
        assert refused.value.status_code == 503
        queue.close()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, scene()).result()


# --- who may ask ---


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "[::1", "0.0.0.0"])
def test_another_host_name_is_refused(client: TestClient, host: str) -> None:
    for path in ("/", "/api/study", "/photo/0"):
        refusal(client.get(path, headers={"host": host}), 403)


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:8765", "LOCALHOST"])
def test_the_names_of_this_machine_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/api/study", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_another_site_is_refused(client: TestClient, headers: dict[str, str]) -> None:
    refusal(client.post("/api/look", content=jpeg(), headers=headers), 403)
    refusal(client.get("/api/study", headers=headers), 403)


def test_a_link_on_another_site_may_open_the_page_but_not_its_data(client: TestClient) -> None:
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=headers).status_code in (200, 503)  # 503: the page is not built here
    refusal(client.get("/photo/0", headers=headers), 403)


def test_every_answer_carries_the_security_headers(client: TestClient) -> None:
    for path in ("/", "/api/study", "/nothing", "/thumb/0"):
        headers = client.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert not [name for name in headers if name.startswith("access-control")]


def test_with_a_token_nothing_is_answered_without_it(study: Path) -> None:
    app = create_app(study, None, "secret-of-this-run")
    with TestClient(app, base_url=HOME, follow_redirects=False) as client:
        refusal(client.get("/api/study"), 401)
        refusal(client.get("/?token=wrong"), 401)
        assert client.get("/api/study", headers={"authorization": "Bearer secret-of-this-run"}).status_code == 200
        welcome = client.get("/?image=3&token=secret-of-this-run")
        assert welcome.status_code == 303
        assert welcome.headers["location"] == "/?image=3"
        assert "HttpOnly" in welcome.headers["set-cookie"]
        assert "SameSite=strict" in welcome.headers["set-cookie"]
        assert client.get("/api/study").status_code == 200  # the cookie


def test_two_servers_on_one_machine_keep_their_visitors(study: Path) -> None:
    cookies: dict[str, str] = {}  # of one browser: by the machine's name, whatever the port
    hosts = ["127.0.0.1:8765", "127.0.0.1:8766"]
    apps = [create_app(study, None, f"secret-of-{host}") for host in hosts]
    for app, host in zip(apps, hosts, strict=True):
        with TestClient(app, base_url=f"http://{host}", follow_redirects=False) as client:
            assert client.get(f"/?token=secret-of-{host}").status_code == 303
            cookies |= dict(client.cookies)
    assert len(cookies) == 2
    for app, host in zip(apps, hosts, strict=True):
        with TestClient(app, base_url=f"http://{host}", cookies=cookies) as client:
            assert client.get("/api/study").status_code == 200


@pytest.mark.parametrize("listening", ["0.0.0.0", "::"])
def test_on_all_addresses_a_visitor_comes_by_any_of_them_and_by_no_other_name(study: Path, listening: str) -> None:
    app = create_app(study, None, "secret", allowed_hosts=("localhost", "vm", listening))
    bearer = {"authorization": "Bearer secret"}
    with TestClient(app, base_url=HOME) as client:
        for host in ("192.0.2.2:8765", "[2001:db8::7]:8765", "vm:8765"):
            assert client.get("/api/study", headers={"host": host, **bearer}).status_code == 200
            refusal(client.get("/api/study", headers={"host": host}), 401)
        for host in ("evil.example", "192.0.2.2.evil.example", ""):
            refusal(client.get("/api/study", headers={"host": host, **bearer}), 403)
    with TestClient(create_app(study, allowed_hosts=("localhost", listening)), base_url=HOME) as client:
        refusal(client.get("/api/study", headers={"host": "192.0.2.2"}), 403)  # only a token lets everybody ask


def test_an_address_that_cannot_be_listened_on_is_refused_with_what_to_change(study: Path) -> None:
    with pytest.raises(UsageError, match=r"Cannot listen on 192\.0\.2\.7 .*--host"):
        server.serve(study, host="192.0.2.7", open_browser=False)  # of no machine: kept for documentation
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match=r"Cannot listen on 127\.0\.0\.1 .*--port"):
            server.serve(study, port=taken.getsockname()[1], open_browser=False)


def test_loopback_is_told_from_the_network() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"))
    assert not any(
        is_loopback(host) for host in ("0.0.0.0", "192.168.1.4", "::", "example.org", "localhost.evil.example")
    )


# --- by itself ---


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="not a study"):
        create_app(tmp_path)


def test_the_server_opens_a_study_without_torch(study: Path) -> None:
    code = (
        "import sys; from vitrail.app import create_app; from starlette.testclient import TestClient\n"
        f"app = create_app({str(study)!r})\n"
        f"with TestClient(app, base_url={HOME!r}) as client: assert client.get('/api/study').status_code == 200\n"
        f"with TestClient(app, base_url={HOME!r}) as client: assert client.get('/photo/0').status_code == 200\n"
        "bad = [name for name in sys.modules if name.split('.')[0] in ('torch', 'timm', 'torchvision')]\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_serve_answers_over_a_socket_until_it_is_interrupted(study: Path) -> None:
    code = f"from vitrail.app import serve; serve({str(study)!r}, port=0, open_browser=False)"
    process = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        description = httpx.get(address + "api/study", timeout=60).json()  # it listens before it says where
        assert description["sizes"]["image"] == N_IMAGES
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()  # type: ignore[union-attr]


def test_an_address_that_was_announced_can_be_connected_to(study: Path) -> None:
    class Connected(Exception):
        pass

    def connect(address: str) -> None:
        with socket.create_connection(("127.0.0.1", httpx.URL(address).port or 0), timeout=10):
            raise Connected

    with pytest.raises(Connected):
        server.serve(study, port=0, open_browser=False, announce=connect)


# --- the small parts ---


def test_a_share_has_the_interval_of_a_share_and_too_few_images_have_none() -> None:
    share = summarise(np.zeros((8, 1), dtype=np.float32), is_share=True)
    assert_allclose(share.values[1:3, 0], [0, 1 - 0.025 ** (1 / 8)], rtol=1e-6)
    few = summarise(np.arange(10, dtype=np.float32).reshape(5, 2))
    assert np.isnan(few.values[1:3]).all()
    assert "too few images" in few.interval


def test_sums_over_more_images_than_fit_in_memory_give_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).gamma(2, 1, (6_000, 3)).astype(np.float32)
    arrays = StudyArrays(xr.Dataset({"attention_distance": (("image", "layer"), values)}))
    monkeypatch.setattr("vitrail.app.study_arrays.WHOLE_BYTES", 0)
    streamed = arrays.summary_of_all("attention_distance")
    assert streamed.interval == "skew-corrected"
    assert_allclose(streamed.values[:3], summarise(values).values[:3], rtol=1e-6)


def test_a_summary_that_is_there_waits_for_none_that_is_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    names = ("attention_distance", "strength_entropy")
    arrays = StudyArrays(xr.Dataset(dict.fromkeys(names, (("image", "layer"), values))))
    ready, begun, end = arrays.summary_of_all(names[0]), threading.Event(), threading.Event()
    make = study_arrays._summarise

    def slowly(*given: Any) -> Any:
        begun.set()
        assert end.wait(60)
        return make(*given)

    monkeypatch.setattr(study_arrays, "_summarise", slowly)
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(arrays.summary_of_all, names[1])
        assert begun.wait(60)
        again = pool.submit(arrays.summary_of_all, names[0])
        try:
            assert again.result(timeout=60) is ready
            assert not other.done()
        finally:
            end.set()
        assert_array_equal(other.result().values, ready.values)


def test_very_many_images_have_the_interval_of_their_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).gamma(2, 1, (6_000, 3)).astype(np.float32)
    resampled = summarise(values)
    monkeypatch.setattr("vitrail.app.summary.MOMENTS_FROM", 5_000)
    of_moments = summarise(values)
    assert (resampled.interval, of_moments.interval) == ("studentised bootstrap", "skew-corrected")
    assert summarise(values, limits=(0.0, 99.0)).interval == "studentised bootstrap"
    assert_allclose(of_moments.values, resampled.values, rtol=1e-5)
    mean, error = values.mean(0), values.std(0) / np.sqrt(6_000)
    assert_allclose((of_moments.values[1:3] - mean) / error, [[-1.96] * 3, [1.96] * 3], atol=0.06)


def test_padding_stays_nan_in_a_summary() -> None:
    values = np.ones((5, 2, 2), dtype=np.float32)
    values[:, 0, 1] = np.nan
    statistics = summarise(values).values
    assert np.isnan(statistics[:, 0, 1]).all()
    assert_allclose(statistics[[0, 3, 4, 5], 1, 1], 1)
    assert np.isnan(statistics[1:3, 1, 1]).all()  # the same in five images: no interval


def test_heads_that_a_layer_lacks_are_no_zeros_in_a_summary(tmp_path: Path) -> None:
    study = write_study(tmp_path, 12, n_heads=(1, 2, *[3] * (N_LAYERS - 2)))
    flips = open_study(study).head_flip.values
    with TestClient(create_app(study), base_url=HOME) as client:
        mean = array(client.get("/api/summary/head_flip"))[0]
        assert_array_equal(np.isnan(mean[:2]), [[False, True, True], [False, False, True]])
        assert_allclose(mean[2:], flips[:, 2:].mean(0), rtol=1e-6)
        of_layers = array(client.get("/api/summary/head_flip?over=head"))[0]
        assert_allclose(of_layers[:2], [flips[:, 0, 0].mean(), flips[:, 1, :2].mean()], rtol=1e-6)
        some = client.post("/api/summary/head_flip?layer=1", json={"images": [0, 1, 6]})
        assert_allclose(array(some)[0], [*flips[[0, 1, 6], 1, :2].mean(0), np.nan], rtol=1e-6)


def test_images_that_lack_values_are_left_out_of_a_summary_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As objects are scored: some images have no mask, some no object on a coarse grid, some heads no score."""
    values = np.random.default_rng(3).random((40, 3, 2)).astype(np.float32)
    values[:, 2] = np.nan  # a layer without scores
    values[7] = np.nan
    values[9, 1] = np.nan
    values[12, 0, 1] = np.nan
    compared = np.delete(values, [7, 9], axis=0)
    summary = summarise(values, limits=(0.0, 1.0))
    assert summary.n_images == 38
    expected = np.nanmean(compared[:, :2], axis=0)
    assert_allclose(summary.values[0, :2], expected, rtol=1e-6)
    assert np.isnan(summary.values[:, 2]).all()
    assert_allclose(summary.values[3:, :2], np.nanquantile(compared[:, :2], (0.05, 0.5, 0.95), axis=0), rtol=1e-6)
    assert (summary.values[1, :2] < expected).all()
    assert (summary.values[2, :2] > expected).all()
    assert summarise(values[:, 0, 0]).n_images == 39
    arrays = StudyArrays(xr.Dataset({"object_auroc": (("image", "layer", "head"), values)}))
    monkeypatch.setattr("vitrail.app.study_arrays.WHOLE_BYTES", 0)
    monkeypatch.setattr("vitrail.app.study_arrays.QUANTILES_FROM", 20)
    streamed = arrays.summary_of_all("object_auroc")  # over all images that have the number
    assert streamed.n_images == 39
    assert_allclose(streamed.values[0, :2], np.nanmean(values[:, :2], axis=0), rtol=1e-6)
    assert np.isnan(streamed.values[:, 2]).all()


def test_evenly_spaced_indices_have_both_ends_and_no_doubles() -> None:
    assert_array_equal(evenly_spaced(3, 10), [0, 1, 2])
    indices = evenly_spaced(50_000, 5_000)
    assert len(indices) == 5_000
    assert indices[0] == 0
    assert indices[-1] == 49_999


def test_the_cache_makes_an_array_once_and_forgets_the_oldest() -> None:
    calls = []

    def make(name: str) -> np.ndarray:
        calls.append(name)
        return np.zeros(100, np.uint8)

    cache = LRUCache(250)
    for name in ("a", "b", "a", "c", "a", "b"):
        cache.get_or_create(name, lambda name=name: make(name))
    assert calls == ["a", "b", "c", "b"]
    with pytest.raises(ValueError, match="no"):
        cache.get_or_create("bad", lambda: (_ for _ in ()).throw(ValueError("no")))
    assert "bad" not in cache


def test_json_of_the_study_has_no_nan(client: TestClient) -> None:
    json.loads(client.get("/api/study").text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_study_that_gains_images_under_the_server_is_refused_and_one_that_gains_measures_is_not(
    tmp_path: Path,
) -> None:
    study = write_study(tmp_path, 8)
    paths = ["study", "array/prediction", "summary/head_probability", "array/label"]
    with TestClient(create_app(study), base_url=HOME) as client:
        assert client.get("/api/array/label").status_code == 200
        plan, manifest = read_plan(study), read_manifest(study)
        write_atomic(study / "study.json", replace(plan, measures={**plan.measures, "field_size": 1}).to_json())
        assert [client.get(f"/api/{path}").status_code for path in paths] == [200] * len(paths)
        write_atomic(study / "study.json", plan.to_json())
        for image in range(8, 12):
            photograph(image, 0).save(tmp_path / "photos" / CLASSES[0] / f"{image:04d}.png")
        more = arrange_images(plan, manifest, scan(open_images(str(tmp_path / "photos"), class_names=CLASSES)))
        StudyFolder(study, replace(plan, n_images=12, data_digest=more.digest), more)  # no part of it computed yet
        for path in (*(f"/api/{path}" for path in paths), "/thumb/0"):
            assert "has changed since it was opened" in refusal(client.get(path), 409)
        assert client.get("/").status_code in (200, 503)


def test_a_study_of_one_image_opens_without_an_interval_of_its_accuracy(tmp_path: Path) -> None:
    with TestClient(create_app(write_study(tmp_path, 1)), base_url=HOME) as client:
        answer = client.get("/api/study")
        assert answer.status_code == 200, answer.text
        assert answer.json()["accuracy"] == {"value": 1.0, "low": None, "high": None, "n_right": 1}
        named = [each["name"] for each in client.get("/api/findings").json()["analyses"]]
        others = ["curves", "why?layer=0&head=1", "summary/head_flip", *(f"findings/{name}" for name in named)]
        assert [client.get(f"/api/{path}").status_code for path in others] == [200] * len(others)


# --- the register on the page ---


def test_the_description_lists_every_analysis_with_what_the_store_holds_of_it(client: TestClient, study: Path) -> None:
    dataset = open_study(study)
    described = client.get("/api/study").json()["analyses"]
    assert [each["name"] for each in described] == list(analyses())
    for each in described:
        declared = [measure.name for measure in analyses()[each["name"]].measures]
        assert each["measures"] == declared
        assert each["stored"] == [name for name in declared if name in dataset.data_vars]
        model = "MODEL" if analyses()[each["name"]].only_for else "planted:vit_of_shapes"
        assert each["command"].startswith(f"vitrail study {model} IMAGES")
    assert {name for each in described for name in each["stored"]} == set(client.get("/api/study").json()["measures"])
    assert next(each for each in described if each["name"] == "patches")["command"].endswith(
        f"--measures patches --out {study}"
    )


@pytest.mark.parametrize("given", ["random", "file", "checkpoint", None])
def test_the_command_that_adds_an_analysis_opens_the_same_weights(
    study: Path, tmp_path: Path, given: str | None
) -> None:
    import torch

    from vitrail.models.open import open_vit

    weights, words = given, {"random": "--weights random ", None: ""}.get(given, "--weights WEIGHTS ")
    if given in ("file", "checkpoint"):
        state = open_vit("vitrail:photos").model.state_dict()
        weights = str(tmp_path / f"{given}.pth")
        torch.save(state if given == "file" else {"state_dict_ema": state, "state_dict": state}, weights)
    facts = {"weights_from": open_vit("vitrail:photos", weights=weights).weights_source, "precision": "bfloat16"}
    command = growing_command(replace(read_plan(study), **facts), ["IMAGES"], ["patches"], "study")
    assert command.endswith(f"IMAGES {words}--batch-size 64 --measures patches --precision bfloat16 --out study")


def test_a_measure_of_a_package_that_is_not_installed_is_listed_from_the_store() -> None:
    attributes = {"title": "contrast", "unit": "1", "analysis": "contrast_of_elsewhere"}
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    dataset = xr.Dataset(
        {"contrast": (("image", "layer"), values, attributes), "label": ("image", np.zeros(3, np.int32))}
    )
    arrays = StudyArrays(dataset)
    assert arrays.measures == ["label", "contrast"]
    assert arrays.undeclared == ["contrast"]


# --- hostile requests ---


@pytest.mark.parametrize("name", ["class_names", "image", "modes"])
def test_text_is_no_array_of_numbers(study: Path, name: str) -> None:
    dataset = open_study(study).assign(modes=("image", np.full(N_IMAGES, "x")))
    arrays = StudyArrays(dataset)
    for ask in (lambda: arrays.read_slice(name, {}), lambda: arrays.summary(name, None, False, {})):
        with pytest.raises(HTTPException, match="no numbers called"):
            ask()


def test_a_mean_over_images_is_refused_for_an_array_without_images() -> None:
    arrays = StudyArrays(xr.Dataset({"of_study": (("layer", "head"), np.ones((2, 3))), "label": ("image", np.ones(3))}))
    with pytest.raises(HTTPException, match="no value for each image"):
        arrays.summary("of_study", None, False, {})


def test_numbers_that_need_more_than_32_bits_are_refused_and_not_wrapped() -> None:
    assert np.frombuffer(binary(("image",), np.array([300, 65535], np.uint16)).body, "<i4").tolist() == [300, 65535]
    assert np.frombuffer(binary(("image",), np.array([-5, 2**31 - 1])).body, "<i4").tolist() == [-5, 2**31 - 1]
    for values in (np.array([2**31]), np.array([2**63], np.uint64), np.array([-(2**40)])):
        with pytest.raises(HTTPException, match="32 bits"):
            binary(("image",), values)


def test_more_than_one_answer_holds_is_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.app.study_arrays.MAX_ANSWER_BYTES", 1000)
    assert "ask for one image" in refusal(client.get("/api/array/attention_strength"), 413)
    assert client.get("/api/array/attention_strength?image=0&layer=0").status_code == 200


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b'{"images":' * 100_000, b'{"images": [' + b"9" * 5000 + b"]}", b'{"images": [1e400]}']
)
def test_deep_json_and_endless_numbers_are_refused(client: TestClient, content: bytes) -> None:
    refusal(client.post("/api/summary/strength_entropy", content=content), 422)


def test_half_a_character_in_a_request_comes_back_in_the_refusal(client: TestClient) -> None:
    answer = client.post("/api/what_if", content=b'{"image": "0", "\\ud800": 1}')
    assert answer.status_code == 422
    assert "Unknown: \\ud800" in answer.text


def test_an_index_beyond_64_bits_is_refused(client: TestClient) -> None:
    refusal(client.post("/api/summary/strength_entropy", json={"images": [2**70]}), 404)


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "//", "http://127.0.0.1:99999999", "\x7f"])
def test_an_odd_origin_is_another_site(client: TestClient, origin: str) -> None:
    refusal(client.get("/api/study", headers={"origin": origin}), 403)


@pytest.mark.parametrize("length", [b"\xb2", b"-1", b"9" * 5000, b"1e3"])
def test_an_odd_content_length_is_refused(client: TestClient, length: bytes) -> None:
    request = client.build_request("POST", "/api/look", content=b"x")
    request.headers = httpx.Headers([(b"host", b"127.0.0.1:8765"), (b"content-length", length)])
    refusal(client.send(request), 413)


def test_an_answer_of_500_carries_the_security_headers_too(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("vitrail.app.server.describe_study", fail)
    with TestClient(create_app(study), base_url=HOME, raise_server_exceptions=False) as bare:
        answer = bare.get("/api/study")
        assert "log says where" in refusal(answer, 500)
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_body_that_does_not_come_is_refused_and_its_place_freed(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.app.answers.BODY_S", 0.2)
    monkeypatch.setattr("vitrail.app.server.UPLOADS_AT_ONCE", 1)
    app = create_app(study, PlantedLive())
    stalled, answers = {"first": True}, []

    async def receive() -> dict[str, object]:
        if stalled.pop("first", False):
            return {"type": "http.request", "body": b"\xff\xd8", "more_body": True}
        await asyncio.sleep(30)
        raise AssertionError("the server waited for a body that does not come")

    async def send(message: dict[str, object]) -> None:
        answers.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/api/look", "raw_path": b"/api/look", "query_string": b"",
        "headers": [(b"host", b"127.0.0.1:8765")], "http_version": "1.1", "scheme": "http", "root_path": "",
    }  # fmt: skip
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, app(scope, receive, send)).result(10)  # type: ignore[arg-type]
    assert answers[0]["status"] == 408
    with TestClient(app, base_url=HOME) as client:
        assert client.post("/api/look", content=jpeg()).status_code == 200


def test_uploads_in_parallel_are_decoded_one_at_a_time_and_too_many_are_refused(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, most, gate = [], [], threading.Event()
    decode = look.decode_image

    def slow_decode(content: bytes, **limits: int) -> Image.Image:
        decoding.append(1)
        most.append(len(decoding))
        gate.wait(5)
        decoding.pop()
        return decode(content, **limits)

    monkeypatch.setattr(look, "decode_image", slow_decode)
    with TestClient(create_app(study, PlantedLive()), base_url=HOME) as client, ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(client.post, "/api/look", content=jpeg()) for _ in range(6)]
        deadline = time.monotonic() + 20
        while sum(answer.done() for answer in answers) < 6 - server.UPLOADS_AT_ONCE and time.monotonic() < deadline:
            time.sleep(0.02)
        gate.set()
        statuses = sorted(answer.result().status_code for answer in answers)
    assert statuses == [200] * server.UPLOADS_AT_ONCE + [503] * (6 - server.UPLOADS_AT_ONCE)
    assert max(most) == 1


def test_large_uploads_leave_before_small_ones_would() -> None:
    uploads = Uploads(max_uploads=8, max_bytes=4 * 100 * 100 * 2)
    names = [uploads.add(Upload(Image.new("RGB", (100, 100)), {})) for _ in range(3)]
    assert uploads.n_bytes == 4 * 100 * 100 * 2  # Pillow keeps RGB as four bytes a pixel
    with pytest.raises(HTTPException, match="no longer here"):
        uploads.get(names[0])
    large = uploads.add(Upload(Image.new("RGB", (500, 500)), {}))
    assert uploads.get(large).photograph.size == (500, 500)
    with pytest.raises(HTTPException, match="no longer here"):
        uploads.get(names[2])


def test_a_hundred_summaries_are_bounded_and_other_routes_go_on(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, running, most = threading.Event(), [], []
    summary = StudyArrays.summary

    def slow_summary(self: StudyArrays, *arguments: object, **_options: object) -> object:
        running.append(1)
        most.append(len(running))
        gate.wait(20)
        running.pop()
        return summary(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(StudyArrays, "summary", slow_summary)
    room_for = server.SUMMARIES_AT_ONCE + server.SUMMARIES_WAITING
    with TestClient(create_app(study), base_url=HOME) as client, ThreadPoolExecutor(100) as threads:
        answers = [threads.submit(client.get, "/api/summary/head_probability") for _ in range(100)]
        deadline = time.monotonic() + 30
        while sum(answer.done() for answer in answers) < 100 - room_for and time.monotonic() < deadline:
            time.sleep(0.05)
        good = client.get("/api/array/label")  # while all summaries stand still
        gate.set()
        statuses = sorted(answer.result().status_code for answer in answers)
    assert good.status_code == 200
    assert statuses == [200] * room_for + [503] * (100 - room_for)
    assert max(most) <= server.SUMMARIES_AT_ONCE


def test_sigterm_during_a_live_request_ends_the_server_soon(study: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from synthetic_study import PlantedLive\n"
        "from vitrail.app import serve\n"
        "class Slow(PlantedLive):\n"
        "    def attention(self, image, layer):\n"
        "        print('computing', flush=True)\n"
        "        time.sleep(120)\n"
        f"serve({str(study)!r}, Slow(), port=0, open_browser=False)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process, ThreadPoolExecutor(1) as thread:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            answer = thread.submit(_ask_until_closed, address + "api/live/attention/0?layer=0&head=0")
            assert process.stdout.readline().strip() == "computing"
            start = time.monotonic()
            process.terminate()
            process.wait(30)  # the model's call alone would last two minutes
            assert time.monotonic() - start < 25
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
            assert answer.result(10) in (None, 503)
        finally:
            process.kill()


def _ask_until_closed(address: str) -> int | None:
    """The status of an answer, or None where the connection was closed without one."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return httpx.get(address, timeout=60).status_code
        except httpx.ConnectError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        except httpx.TransportError:
            return None
