"""Maps of the images that the page offers: which there are, where images lie on each, and where a new one does."""

import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from starlette.testclient import TestClient

from synthetic_study import PlantedLive, photograph, write_study
from vitrail.app import create_app, image_maps
from vitrail.study.store import open_study

N_IMAGES = 40
HOME = "http://127.0.0.1:8765"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("planted"), N_IMAGES)


@pytest.fixture(scope="module")
def client(study: Path) -> Iterator[TestClient]:
    with TestClient(create_app(study, PlantedLive()), base_url=HOME) as client:
        yield client


def array(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    shape = [int(size) for size in answer.headers["x-shape"].split(",")]
    return np.frombuffer(answer.content, "<f4").reshape(shape)


def principal_axes(rows: np.ndarray) -> np.ndarray:
    """By the covariance, not by the decomposition that the library uses."""
    centred = rows.reshape(len(rows), -1).astype(np.float64)
    centred = centred - centred.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    return centred @ axes[:, ::-1][:, :2]


def test_the_stored_map_comes_first_and_the_others_are_computed_of_the_same_table(
    client: TestClient, study: Path
) -> None:
    dataset = open_study(study)
    listed = client.get("/api/study").json()["maps"]
    assert [each["name"] for each in listed] == ["importance-tsne", "importance-pca"]
    assert {each["table"] for each in listed} == {"head_probability"}
    assert_array_equal(array(client.get("/api/maps/importance-tsne")), dataset["image_xy"])
    computed = array(client.get("/api/maps/importance-pca"))
    assert_allclose(np.abs(computed), np.abs(principal_axes(dataset["head_probability"].values)), atol=1e-5)
    answer = client.get("/api/maps/..%2Flabel")
    assert answer.status_code == 404
    answer = client.get("/api/maps/embedding")
    assert answer.status_code == 404
    assert answer.json()["error"].endswith("It has: importance-tsne, importance-pca.")


def test_a_new_photograph_lies_between_the_images_whose_heads_are_most_like_its_own(
    client: TestClient, study: Path
) -> None:
    buffer = io.BytesIO()
    photograph(3, 0).save(buffer, "JPEG")
    image = client.post("/api/look", content=buffer.getvalue()).json()["image"]
    assert client.get(f"/api/look/{image}/stream?analyses=heads").status_code == 200
    own = array(client.get(f"/api/array/head_probability?image={image}"))
    distance = ((open_study(study)["head_probability"].values - own) ** 2).sum(axis=(1, 2))
    nearest = np.argsort(distance, kind="stable")[:5]
    for name in ("importance-tsne", "importance-pca"):
        positions = array(client.get(f"/api/maps/{name}"))
        lies = array(client.get(f"/api/maps/{name}?image={image}"))
        assert_allclose(lies, positions[nearest].mean(axis=0), rtol=1e-5)


def test_a_model_without_classifier_has_maps_by_what_its_heads_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = write_study(tmp_path, 24, classifier=False, n_heads=(1, *[3] * 11))
    with TestClient(create_app(study), base_url=HOME) as client:
        listed = client.get("/api/study").json()["maps"]
        assert [each["title"] for each in listed] == ["t-SNE of head importance", "PCA of head importance"]
        (table,) = {each["table"] for each in listed}
        values = open_study(study)[table].values.reshape(24, -1)
        expected = principal_axes(values[:, ~np.isnan(values).any(axis=0)])
        computed = array(client.get("/api/maps/importance-pca"))
        assert_allclose(np.abs(computed), np.abs(expected), atol=1e-5)
        assert np.isfinite(array(client.get("/api/maps/importance-tsne"))).all()
    monkeypatch.setattr(image_maps, "MOST_IMAGES_TSNE", 23)
    with TestClient(create_app(study), base_url=HOME) as client:
        assert [each["name"] for each in client.get("/api/study").json()["maps"]] == ["importance-pca"]


def test_without_scikit_learn_only_maps_that_need_none_are_offered(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.app.image_maps.find_spec", lambda name: None)
    with TestClient(create_app(study, PlantedLive()), base_url=HOME) as without:
        listed = without.get("/api/study").json()["maps"]
        assert {each["name"] for each in listed} <= {"importance-pca", "importance-tsne"}
        for each in listed:
            assert each["name"] == "importance-pca" or each is listed[0]  # the stored one needs nothing
            assert without.get(f"/api/maps/{each['name']}").status_code == 200
