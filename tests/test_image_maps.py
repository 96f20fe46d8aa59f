"""Maps of the images that the page offers: which there are, where images lie on each, and where a new one does."""

import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import timm
from numpy.testing import assert_allclose, assert_array_equal
from starlette.testclient import TestClient

from synthetic_study import PlantedLive, photograph, write_study
from vitrail import open_vit, run_study
from vitrail.app import create_app, image_maps
from vitrail.live import LiveModel
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


def test_images_lie_by_the_embedding_of_the_model_and_a_new_one_among_them(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=0)
    vit = open_vit(model.eval(), mean=(0.5,) * 3, std=(0.5,) * 3)
    (tmp_path / "photos").mkdir()
    for number in range(8):
        photograph(number, 0).save(tmp_path / "photos" / f"{number}.png")
    embedding = run_study(
        vit, tmp_path / "photos", out=tmp_path / "study", measures="image_embedding,head_output_shift", batch_size=4
    )["image_embedding"].values
    with TestClient(create_app(tmp_path / "study", LiveModel(vit)), base_url=HOME) as client:
        listed = client.get("/api/study").json()["maps"]
        assert [each["title"] for each in listed][:2] == [
            "t-SNE of the model's embedding",
            "PCA of the model's embedding",
        ]
        assert len(listed) == 4
        computed = array(client.get("/api/maps/embedding-pca"))
        assert_allclose(np.abs(computed), np.abs(principal_axes(embedding)), atol=1e-4)
        own = client.post("/api/look", content=(tmp_path / "photos" / "3.png").read_bytes()).json()["image"]
        assert client.get(f"/api/look/{own}/stream?analyses=tokens").status_code == 200
        distance = ((embedding - array(client.get(f"/api/array/image_embedding?image={own}"))) ** 2).sum(axis=1)
        nearest = np.argsort(distance, kind="stable")[:5]
        assert nearest[0] == 3
        lies = array(client.get(f"/api/maps/embedding-pca?image={own}"))
        assert_allclose(lies, computed[nearest].mean(axis=0), rtol=1e-5)
