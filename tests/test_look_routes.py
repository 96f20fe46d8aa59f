"""The routes of the live look: the arrays of one image part by part, bounded, looked up, and in order."""

import asyncio
import io
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from starlette.testclient import TestClient

from synthetic_study import GRID, N_HEADS, N_LAYERS, AnalysisParts, PlantedLive, photograph, write_study
from vitrail.app import create_app
from vitrail.app.pictures import Photographs
from vitrail.data import stored_image, with_masks
from vitrail.study.store import read_manifest

HOME = "http://127.0.0.1:8765"
KINDS = {"float32": "<f4", "int32": "<i4", "uint8": "u1"}


class CountingLive(PlantedLive):
    """Says which parts were computed, and may be held up before the next."""

    def __init__(self) -> None:
        self.computed: list[tuple[str, ...]] = []
        self.gate = threading.Event()
        self.gate.set()

    def look_part(
        self,
        image: Image.Image,
        analysis: str,
        part: tuple[str, ...],
        *choices: int | None,
        mask: np.ndarray | None = None,
    ) -> object:
        self.gate.wait(10)
        self.computed.append(tuple(part))
        self.mask = mask
        return super().look_part(image, analysis, part, *choices)


@pytest.fixture(scope="module")
def live() -> CountingLive:
    return CountingLive()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("planted"), 12)


@pytest.fixture(scope="module")
def client(study: Path, live: CountingLive) -> Iterator[TestClient]:
    with TestClient(create_app(study, live), base_url=HOME) as client:
        yield client


def jpeg() -> bytes:
    buffer = io.BytesIO()
    photograph(3, 0).save(buffer, "JPEG")
    return buffer.getvalue()


def read_frames(content: bytes) -> list[tuple[dict, dict[str, np.ndarray]]]:
    """The frames of a stream, read as `docs/architecture.md` says that they are written."""
    frames, start = [], 0
    while start < len(content):
        (length,) = struct.unpack_from("<I", content, start)
        body = start + 4 + length
        assert body % 8 == 0
        header, end, arrays = json.loads(content[start + 4 : body]), body, {}
        for name, about in header.get("arrays", {}).items():
            kind = np.dtype(KINDS[about["dtype"]])
            count = about["bytes"] // kind.itemsize
            arrays[name] = np.frombuffer(content, kind, count, body + about["offset"]).reshape(about["shape"])
            end = max(end, body + about["offset"] + -(-about["bytes"] // 8) * 8)
        frames.append((header, arrays))
        start = end
    return frames


def refusal(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    sentence: str = answer.json()["error"]
    assert sentence.endswith((".", "?")), sentence
    return sentence


def test_a_stream_has_every_part_of_the_analyses_in_order_with_its_words(client: TestClient, study: Path) -> None:
    answer = client.get("/api/look/5/stream", params={"analyses": "heads,tokens", "patch": 17})
    assert answer.status_code == 200
    frames = read_frames(answer.content)
    assert [(header["analysis"], header["done"], header["of"]) for header, _ in frames] == [
        ("heads", 1, 3),
        ("heads", 2, 3),
        ("tokens", 3, 3),
    ]
    planted = PlantedLive().planted(photograph_of(study, 5))
    (_, measured), (about, attention), (tokens, similar) = frames
    assert_allclose(measured["head_probability"], planted["head_probability"], rtol=1e-6)
    assert measured["head_flip"].dtype == np.uint8
    assert attention["class_attention"].shape == (N_LAYERS, N_HEADS, 1 + GRID**2)
    assert about["arrays"]["class_attention"]["dims"] == ["layer", "head", "token"]
    assert about["arrays"]["class_attention"]["unit"] == "attention weight"
    assert tokens["left_out"] == {"grouping_purity": "it needs objects."}
    assert_array_equal(similar["token_similarity"], np.full((N_LAYERS, GRID**2), 17))


def test_a_stream_of_some_arrays_computes_the_parts_that_hold_them_alone(
    client: TestClient, live: CountingLive
) -> None:
    live.computed.clear()
    answer = client.get("/api/look/6/stream", params={"measures": "token_similarity,class_attention", "patch": 3})
    (about, similar), (last, attention) = read_frames(answer.content)
    assert_array_equal(similar["token_similarity"], np.full((N_LAYERS, GRID**2), 3))
    assert (about["of"], last["done"], set(attention)) == (2, 2, {"class_attention"})
    assert live.computed == [("token_similarity",), ("class_attention",)]
    assert "objects" in refusal(client.get("/api/look/6/stream", params={"measures": "grouping_purity"}), 404)
    assert "no_such" in refusal(client.get("/api/look/6/stream", params={"measures": "no_such"}), 404)


def photograph_of(study: Path, image: int) -> Image.Image:
    return stored_image(read_manifest(study), read_manifest(study).images[image])


def test_one_array_is_that_of_the_stream_and_computes_its_own_part_only(
    client: TestClient, study: Path, live: CountingLive
) -> None:
    live.computed.clear()
    answer = client.get("/api/look/7/class_attention", params={"layer": 3, "head": 1})
    assert answer.headers["x-dims"] == "token"
    expected = PlantedLive().attention(photograph_of(study, 7), 3)[1, 0]
    assert_allclose(np.frombuffer(answer.content, "<f4"), expected, rtol=1e-6)
    assert live.computed == [("class_attention",)]
    client.get("/api/look/7/class_attention", params={"layer": 4, "head": 0, "patch": 3})
    assert live.computed == [("class_attention",)]  # it does not depend on the patch
    for patch in (3, 4, 3):
        client.get("/api/look/7/token_similarity", params={"patch": patch})
    assert live.computed[1:] == [("token_similarity",)] * 2


def test_an_analysis_says_what_it_has_and_what_not(client: TestClient) -> None:
    told = client.get("/api/look/2", params={"analysis": "tokens"}).json()
    assert set(told["arrays"]) == {"token_similarity"}
    assert told["arrays"]["token_similarity"]["title"] == "similarity to the chosen patch"
    assert told["left_out"] == {"grouping_purity": "it needs objects."}


def test_an_upload_is_there_at_once_and_its_measures_join_those_of_the_study(
    client: TestClient, live: CountingLive
) -> None:
    live.computed.clear()
    image = client.post("/api/look", content=jpeg()).json()["image"]
    assert live.computed == [PlantedLive().parts("base").names[0]]
    assert client.get(f"/api/array/label?image={image}").status_code == 200
    refusal(client.get(f"/api/array/head_probability?image={image}"), 404)
    assert "was not computed" in refusal(client.get(f"/api/maps/importance-tsne?image={image}"), 404)
    read_frames(client.get(f"/api/look/{image}/stream?analyses=heads").content)
    assert client.get(f"/api/array/head_probability?image={image}&layer=0&head=1").status_code == 200
    refusal(client.get(f"/api/maps/importance-pca?image={image[:-1]}"), 404)
    assert client.get(f"/api/maps/importance-pca?image={image}").headers["x-shape"] == "2"


def test_measures_of_an_upload_stay_though_the_page_left_while_they_were_computed(
    client: TestClient, live: CountingLive
) -> None:
    image = client.post("/api/look", content=jpeg()).json()["image"]
    live.gate.clear()
    scope = {
        "type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "root_path": "", "raw_path": b"",
        "path": f"/api/look/{image}/stream", "query_string": b"analyses=heads", "headers": [(b"host", b"localhost")],
        "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 0),
    }  # fmt: skip

    async def leave() -> dict[str, str]:
        return {"type": "http.disconnect"}

    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    computed = len(live.computed)
    asyncio.run(client.app(scope, leave, send))
    assert sent[0]["status"] == 499
    live.gate.set()
    read_frames(client.get(f"/api/look/{image}/stream?analyses=heads").content)
    assert len(live.computed) == computed + 2  # each of the two parts once: the first for the page that left
    assert client.get(f"/api/array/strength_entropy?image={image}").status_code == 200
    assert client.get(f"/api/maps/importance-pca?image={image}").headers["x-shape"] == "2"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/look/12", 404),
        ("/api/look/-1/stream", 404),
        ("/api/look/u0123/stream", 404),
        ("/api/look/3?analysis=nothing", 404),
        ("/api/look/3/stream?analyses=heads,nothing", 404),
        ("/api/look/3/stream?analyses=windows", 404),
        ("/api/look/3/stream?patch=-1", 422),
        ("/api/look/3/stream?patch=1e9", 422),
        ("/api/look/3/stream?patch=" + "9" * 5000, 422),
        ("/api/look/3/stream?channel=%D9%A3", 422),
        ("/api/look/3/nothing", 404),
        ("/api/look/3/image_xy", 404),
        ("/api/look/3/image_dependence", 404),
        ("/api/look/3/grouping_purity", 404),
        ("/api/look/3/class_attention?layer=99", 404),
        ("/api/look/3/class_attention?layer=x", 422),
    ],
)
def test_what_is_not_there_or_has_no_meaning_is_a_sentence(client: TestClient, path: str, status: int) -> None:
    refusal(client.get(path), status)


def test_uploads_are_bounded_and_bad_ones_are_told(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client.post("/api/look", content=b"no photograph")
    assert answer.status_code == 422
    assert "not an image" in answer.json()["error"]
    monkeypatch.setattr("vitrail.app.look.MAX_UPLOAD_BYTES", 1000)
    refusal(client.post("/api/look", content=bytes(1001)), 413)
    monkeypatch.setattr("vitrail.app.look.MAX_UPLOAD_BYTES", 2**20)
    monkeypatch.setattr("vitrail.app.look.MAX_PIXELS", 100)
    answer = client.post("/api/look", content=jpeg())
    assert answer.status_code == 422
    assert "pixels" in answer.json()["error"]


def test_without_a_model_the_look_says_how_to_have_one(tmp_path: Path) -> None:
    study = write_study(tmp_path, 8)
    with TestClient(create_app(study), base_url=HOME) as client:
        for answer in (
            client.get("/api/look/3/stream"),
            client.get("/api/look/3?analysis=heads"),
            client.get("/api/look/3/class_attention"),
            client.post("/api/look", content=jpeg()),
        ):
            assert "vitrail open" in refusal(answer, 503)


def test_another_click_is_answered_between_two_parts(client: TestClient, live: CountingLive) -> None:
    live.computed.clear()
    live.gate.clear()
    stream = threading.Thread(target=lambda: client.get("/api/look/9/stream?analyses=heads,tokens"))
    stream.start()
    asked = threading.Thread(target=lambda: client.get("/api/look/10/class_attention"))
    asked.start()
    live.gate.set()
    stream.join()
    asked.join()
    assert len(live.computed) == 4


def test_objects_of_an_image_are_those_of_its_mask_and_an_upload_has_none(
    client: TestClient, study: Path, live: CountingLive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = AnalysisParts((("patch_object",), ("token_similarity",)), {})
    monkeypatch.setattr(live, "parts", lambda _analysis: planted)
    manifest = read_manifest(study)
    columns, rows = manifest.images[0].sides
    ids = np.arange(rows * columns).reshape(rows, columns).astype(np.uint8)
    for entry in manifest.images[:1]:
        file = (tmp_path / entry.id).with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids).save(file)
    state = client.app.state.shared  # type: ignore[attr-defined]
    before, state.photographs = state.photographs, Photographs(with_masks(manifest, tmp_path), state.ids)
    client.get("/api/look/0/patch_object")
    assert_array_equal(live.mask, ids)
    client.get("/api/look/1/patch_object")
    assert live.mask is None
    client.get("/api/look/0/token_similarity", params={"patch": 99})
    assert live.mask is None  # it does not depend on masks
    file.write_bytes(b"changed")
    state.looks = type(state.looks)(1)
    assert "changed since" in refusal(client.get("/api/look/0/patch_object"), 404)
    state.photographs = before
