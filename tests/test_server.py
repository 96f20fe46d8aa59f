"""The server of the page: what it answers, whom it refuses, and what happens when things go wrong."""

import asyncio
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from synthetic_study import CLASSES, N_HEADS, N_LAYERS, SIZE, PlantedLive, photograph, write_study
from vitrail.app import create_app
from vitrail.app.desk import Desk
from vitrail.app.guard import is_loopback
from vitrail.app.pictures import seen_by_model
from vitrail.app.shelf import Shelf
from vitrail.app.summary import STATISTICS, evenly_spaced, summary
from vitrail.errors import StudyError
from vitrail.study.store import open_study

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
    held = io.BytesIO()
    photograph(3, 0).resize(size).save(held, "JPEG")
    return held.getvalue()


# --- the study ---


def test_the_study_tells_its_sizes_measures_and_accuracy(client: TestClient, study: Path) -> None:
    told = client.get("/api/study").json()
    dataset = open_study(study)
    assert told["sizes"]["image"] == N_IMAGES
    assert told["n_heads"] == [N_HEADS] * N_LAYERS
    assert told["class_names"] == [name.split(",")[0] for name in CLASSES]
    right = float((dataset.prediction == dataset.label).mean())
    assert_allclose(told["accuracy"]["value"], right, atol=1e-6)
    assert told["accuracy"]["low"] < right < told["accuracy"]["high"]
    assert told["measures"]["strength_entropy"]["unit"] == "nats"
    assert "class_names" not in told["measures"]
    assert "thumbnail" not in told["measures"]


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


def test_a_summary_of_some_images_is_of_those_only(client: TestClient, study: Path) -> None:
    chosen = [3, 10, 11, 40]
    answer = client.post("/api/summary/strength_entropy?over=head", json={"images": chosen})
    assert answer.headers["x-dims"] == "statistic,layer"
    assert answer.headers["x-images"] == "4"
    expected = open_study(study).strength_entropy.values[chosen].mean(axis=2)
    assert_allclose(array(answer)[0], expected.mean(axis=0), rtol=1e-5)


def test_a_summary_of_one_head_is_a_slice_of_the_whole(client: TestClient) -> None:
    whole = array(client.get("/api/summary/attention_strength"))
    part = array(client.get("/api/summary/attention_strength?layer=4&head=2"))
    assert_array_equal(part, whole[:, 4, 2])


def test_an_array_too_large_to_keep_gives_the_same_summary(
    study: Path, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = array(client.get("/api/summary/attention_strength"))
    monkeypatch.setattr("vitrail.app.reader.WHOLE_BYTES", 0)
    with TestClient(create_app(study), base_url=HOME) as bare:
        streamed = array(bare.get("/api/summary/attention_strength"))
        some = array(bare.post("/api/summary/attention_strength", json={"images": [1, 2]}))
        column = array(bare.get("/api/array/attention_strength?layer=0&head=0"))
    assert_allclose(streamed[[0, 3, 4, 5]], kept[[0, 3, 4, 5]], rtol=1e-5)
    assert_allclose(streamed[1:3], kept[1:3], rtol=0.1)  # normal against bootstrap
    strength = open_study(study).attention_strength
    assert_allclose(some[0], strength.values[1:3].mean(axis=0), rtol=1e-5)
    assert_array_equal(column, strength.values[:, 0, 0])


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
    shown = Image.open(io.BytesIO(client.get("/thumb/12").content))
    stored = open_study(study).thumbnail.values[12].astype(float)
    assert np.abs(np.asarray(shown, dtype=float) - stored).mean() < 6  # JPEG


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
    preprocessing = pytest.importorskip("vitrail.vit.preprocessing")
    picture = photograph(5, 2).resize((150, 101))
    meant = preprocessing.Preprocessing(size, (0.5,), (0.5,), "bicubic", 0.875, mode)
    shown = seen_by_model(picture, meant.as_dict())
    expected = meant.view(picture)
    assert shown.size == expected.size
    apart = np.abs(np.asarray(shown, dtype=float) - np.asarray(expected, dtype=float))
    if mode != "border":  # which pads with another colour than ours, outside the photograph
        assert apart.mean() < 1.5


# --- the live model ---


def test_live_attention_is_that_of_the_chosen_head(client: TestClient) -> None:
    answer = client.get("/api/live/attention/6?layer=3&head=2")
    assert answer.headers["x-dims"] == "query,key"
    told = array(answer)
    assert_allclose(told.sum(axis=1), 1, rtol=1e-5)
    assert not np.allclose(told, array(client.get("/api/live/attention/6?layer=3&head=1")))


def test_live_modes_have_a_row_for_each_mode(client: TestClient) -> None:
    assert array(client.get("/api/live/modes/6?layer=3&head=2")).shape == (6, len(CLASSES))


def test_without_a_model_live_answers_say_what_to_do(study: Path) -> None:
    with TestClient(create_app(study), base_url=HOME) as client:
        for answer in (
            client.get("/api/live/attention/0?layer=0&head=0"),
            client.post("/api/live/look", content=jpeg()),
        ):
            assert "vitrail open" in refusal(answer, 503)
        assert client.get("/api/study").json()["live"] is False
        assert client.get("/api/array/label").status_code == 200


def test_an_uploaded_photograph_is_read_like_a_stored_one(client: TestClient, study: Path) -> None:
    name = client.post("/api/live/look", content=jpeg()).json()["image"]
    assert name.startswith("u")
    assert len(name) > 12
    entropy = array(client.get(f"/api/array/strength_entropy?image={name}"))
    assert entropy.shape == (N_LAYERS, N_HEADS)
    one = array(client.get(f"/api/array/strength_entropy?image={name}&layer=4&head=2"))
    assert_array_equal(one, entropy[4, 2])
    xy = array(client.get(f"/api/array/image_xy?image={name}"))
    lows, highs = open_study(study).image_xy.values.min(0), open_study(study).image_xy.values.max(0)
    assert np.all(xy >= lows)
    assert np.all(xy <= highs)
    for path in (f"/thumb/{name}", f"/photo/{name}"):
        assert Image.open(io.BytesIO(client.get(path).content)).format == "JPEG"
    assert array(client.get(f"/api/live/attention/{name}?layer=0&head=0")).shape == (197, 197)


def test_only_the_last_few_uploads_are_kept(client: TestClient) -> None:
    names = [client.post("/api/live/look", content=jpeg()).json()["image"] for _ in range(9)]
    assert len(set(names)) == 9
    refusal(client.get(f"/photo/{names[0]}"), 404)
    assert client.get(f"/photo/{names[-1]}").status_code == 200


def test_an_upload_leaves_nothing_on_the_disk(client: TestClient, study: Path) -> None:
    before = sorted(study.rglob("*"))
    client.post("/api/live/look", content=jpeg())
    assert sorted(study.rglob("*")) == before


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", b"not an image at all", jpeg()[:200], b"\x89PNG\r\n\x1a\n" + b"\0" * 40]
)
def test_an_upload_that_is_no_image_is_refused_with_the_reason(client: TestClient, content: bytes) -> None:
    answer = client.post("/api/live/look", content=content)
    assert answer.status_code == 422
    assert answer.json()["error"]


def test_uploads_too_large_in_bytes_or_pixels_are_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal(client.post("/api/live/look", content=b"\0" * (32 * 2**20 + 1)), 413)

    def drops() -> Iterator[bytes]:  # no content-length: counted as it comes
        for _ in range(40):
            yield b"\0" * 2**20

    refusal(client.post("/api/live/look", content=drops()), 413)
    monkeypatch.setattr("vitrail.app.server.MAX_PIXELS", 1000)
    assert "pixels" in client.post("/api/live/look", content=jpeg()).json()["error"]


def test_a_failure_of_the_model_reaches_the_page_as_a_sentence(study: Path) -> None:
    class Failing(PlantedLive):
        def attention(self, image: Image.Image, layer: int) -> np.ndarray:
            raise RuntimeError("out of something")

    with TestClient(create_app(study, Failing()), base_url=HOME, raise_server_exceptions=False) as client:
        told = refusal(client.get("/api/live/attention/0?layer=0&head=0"), 500)
        assert "out of something" not in told  # the log has it, the page need not
        assert array(client.get("/api/live/modes/0?layer=0&head=0")).shape[0] == 6


class Request:
    """As much of a request as the desk asks for."""

    def __init__(self) -> None:
        self.left = False

    async def is_disconnected(self) -> bool:
        return self.left


def test_live_work_is_bounded_and_dropped_when_the_page_leaves() -> None:
    gate, done = threading.Event(), []

    async def scene() -> None:
        desk = Desk(PlantedLive(), waiting=2)
        staying, leaving = Request(), Request()

        def work(name: str) -> object:
            return lambda _live: (gate.wait(10), done.append(name))

        first = asyncio.create_task(desk.ask(staying, work("first")))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        second = asyncio.create_task(desk.ask(leaving, work("second")))  # type: ignore[arg-type]
        third = asyncio.create_task(desk.ask(staying, work("third")))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        with pytest.raises(HTTPException, match="busy") as full:
            await desk.ask(staying, work("fourth"))  # type: ignore[arg-type]
        assert full.value.status_code == 503
        leaving.left = True
        with pytest.raises(HTTPException, match="left"):
            await second
        gate.set()
        await asyncio.gather(first, third)
        desk.close()

    with ThreadPoolExecutor(1) as thread:  # a loop of its own: browser tests leave theirs running in this thread
        thread.submit(asyncio.run, scene()).result()
    assert done == ["first", "third"]


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
    refusal(client.post("/api/live/look", content=jpeg(), headers=headers), 403)
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
        deadline = time.monotonic() + 20
        while True:
            try:
                told = httpx.get(address + "api/study", timeout=5).json()
                break
            except httpx.ConnectError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert told["sizes"]["image"] == N_IMAGES
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()  # type: ignore[union-attr]


# --- the small parts ---


def test_an_interval_of_many_images_covers_like_the_bootstrap() -> None:
    rng = np.random.default_rng(1)
    values = rng.gamma(2, 1, (2_000, 3)).astype(np.float32)
    few, many = summary(values), summary(np.concatenate([values, values[:1]]))
    assert few.interval.startswith("bootstrap")
    assert many.interval == "normal"
    assert_allclose(few.values[1:3], many.values[1:3], rtol=0.01)


def test_padding_stays_nan_in_a_summary() -> None:
    values = np.ones((5, 2, 2), dtype=np.float32)
    values[:, 0, 1] = np.nan
    made = summary(values).values
    assert np.isnan(made[:, 0, 1]).all()
    assert_allclose(made[:, 1, 1], 1)


def test_evenly_spaced_indices_have_both_ends_and_no_doubles() -> None:
    assert_array_equal(evenly_spaced(3, 10), [0, 1, 2])
    chosen = evenly_spaced(50_000, 5_000)
    assert len(chosen) == 5_000
    assert chosen[0] == 0
    assert chosen[-1] == 49_999


def test_a_shelf_makes_an_array_once_and_forgets_the_oldest() -> None:
    made = []

    def make(name: str) -> np.ndarray:
        made.append(name)
        return np.zeros(100, np.uint8)

    shelf = Shelf(250)
    for name in ("a", "b", "a", "c", "a", "b"):
        shelf.take(name, lambda name=name: make(name))
    assert made == ["a", "b", "c", "b"]
    with pytest.raises(ValueError, match="no"):
        shelf.take("bad", lambda: (_ for _ in ()).throw(ValueError("no")))
    assert not shelf.holds("bad")


def test_json_of_the_study_has_no_nan(client: TestClient) -> None:
    json.loads(client.get("/api/study").text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
