"""The routes of changes: answers of the model step by step, bounded, looked up, and refused in sentences."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image
from starlette.testclient import TestClient

from synthetic_study import CLASSES, N_HEADS, N_LAYERS, SIZE, PlantedLive, write_study
from vitrail.app import create_app
from vitrail.app.what_if import _with_folder
from vitrail.data import stored_image
from vitrail.study.store import open_study, read_manifest

HOME = "http://127.0.0.1:8765"


@pytest.fixture(scope="module")
def vit() -> Any:
    """A real model with the planted study's shape, as the changes are made by the model itself."""
    import timm
    import torch

    from vitrail.models.open import open_vit

    torch.manual_seed(0)
    shape = {"img_size": SIZE, "patch_size": 8, "depth": N_LAYERS, "embed_dim": 24, "num_heads": N_HEADS}
    model = timm.create_model("vit_tiny_patch16_224", **shape, num_classes=len(CLASSES))
    return open_vit(model.eval(), mean=0.5, std=0.5, image_size=SIZE)


class ChangingLive(PlantedLive):
    def __init__(self, vit: Any) -> None:
        self.vit = vit
        self.calls: list[dict[str, Any]] = []

    def what_if(self, image: Image.Image, **changes: Any) -> Any:
        self.calls.append(changes)
        return self.vit.what_if(image, **changes)


@pytest.fixture(scope="module")
def live(vit: Any) -> ChangingLive:
    return ChangingLive(vit)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("planted"), 24)


@pytest.fixture(scope="module")
def client(study: Path, live: ChangingLive) -> Iterator[TestClient]:
    with TestClient(create_app(study, live), base_url=HOME) as client:
        yield client


def photograph_of(study: Path, image: int) -> Image.Image:
    return stored_image(read_manifest(study), read_manifest(study).images[image])


def refusal(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    sentence: str = answer.json()["error"]
    assert sentence.endswith((".", "?", "null")), sentence
    return sentence


def test_the_answer_is_that_of_the_model_with_every_step_and_both_probabilities(
    client: TestClient, study: Path, vit: Any
) -> None:
    body = {"image": 5, "heads_off": [[0, 1]], "modes": [[2, 0, 3]], "patches": [3, 4], "how": "black"}
    told = client.post("/api/what_if", json=body).json()
    changed = vit.what_if(photograph_of(study, 5), heads_off=[(0, 1), (2, 0, 3)], patches=[3, 4], how="black")
    assert [step["words"] for step in told["steps"]] == changed["step"].values.tolist()
    assert_allclose([step["divergence"] for step in told["steps"]], changed["divergence"], atol=1e-7)
    best = told["steps"][-1]["classes"][0]
    assert best["name"] == CLASSES[best["class"]].split(",")[0]
    followed = changed["followed_probability"]
    assert_allclose([each["after"] for each in told["classes"]], followed[-1], atol=1e-7)
    assert_allclose([each["before"] for each in told["classes"]], followed[0], atol=1e-7)
    assert_allclose(told["drift"], np.nanmean(changed["token_drift"][-1], -1), atol=1e-7)
    assert told["study"] is None
    assert "vit.what_if(image, heads_off=" in told["use_this"]


def test_maps_and_drift_of_the_last_step_are_numbers(client: TestClient, study: Path, vit: Any) -> None:
    body = {"image": 2, "windows": [{"layer": 3, "head": 1, "patch": None, "sides": [1, 1, 1, 1]}]}
    changed = vit.what_if(photograph_of(study, 2), windows=[(3, (1, 1, 1, 1), 1)], attention_layer=3)
    after = client.post("/api/what_if/attention_after?layer=3&head=1", json=body)
    assert after.headers["x-dims"] == "query,key"
    n_tokens = 1 + (SIZE // 8) ** 2
    assert_allclose(np.frombuffer(after.content, "<f4").reshape(n_tokens, n_tokens), changed["attention_after"][1])
    drift = client.post("/api/what_if/token_drift?layer=11", json=body)
    assert_allclose(np.frombuffer(drift.content, "<f4"), changed["token_drift"][1, 11], atol=1e-7)


def test_one_head_is_told_with_what_it_costs_over_the_study(client: TestClient, study: Path) -> None:
    told = client.post("/api/what_if", json={"image": "3", "heads_off": [[0, 1]]}).json()
    dataset = open_study(study)
    lost = (dataset.probability - dataset.head_probability[:, 0, 1]).values
    assert f"loses {lost.mean():.3f} of its probability without L0H1" in told["study"]
    assert f"more than 0.1 in {100 * (lost > 0.1).mean():.1f} %" in told["study"]
    assert told["use_this"] == f"vitrail prune {study} --heads L0H1 --out NEW_FOLDER"


def test_only_the_command_is_given_the_folder_of_the_study_not_a_path_in_python_lines() -> None:
    lines = "vit = vitrail.open_vit('/data/STUDY_7/checkpoint')\nchanged = vit.what_if(image, patches=[0])"
    assert _with_folder(lines, "/studies/my study") == lines
    command = "vitrail prune STUDY --heads L0H1 --out NEW_FOLDER"
    assert _with_folder(command, "/STUDY/my study") == "vitrail prune '/STUDY/my study' --heads L0H1 --out NEW_FOLDER"


def test_the_same_changes_are_computed_once_and_many_in_one_step(client: TestClient, live: ChangingLive) -> None:
    live.calls.clear()
    for _ in range(2):
        client.post("/api/what_if", json={"image": 7, "heads_off": [[1, 1]]})
    assert len(live.calls) == 1
    many = [[layer, head] for layer in range(N_LAYERS) for head in range(N_HEADS)]
    told = client.post("/api/what_if", json={"image": 7, "heads_off": many}).json()
    assert [step["words"] for step in told["steps"]] == ["unchanged", "all changes"]


BAD = [
    ({}, 404),
    ({"image": 24, "heads_off": [[0, 0]]}, 404),
    ({"image": "u0123", "heads_off": [[0, 0]]}, 404),
    ({"image": "../../study.json", "heads_off": [[0, 0]]}, 404),
    ({"image": 1}, 422),
    ({"image": 1, "heads_off": "L0H0"}, 422),
    ({"image": 1, "heads_off": [[0]]}, 422),
    ({"image": 1, "heads_off": [[0, 99]]}, 422),
    ({"image": 1, "heads_off": [[0, True]]}, 422),
    ({"image": 1, "heads_off": [[0, 10**30]]}, 422),
    ({"image": 1, "modes": [[0, 0, 1]]}, 422),
    ({"image": 1, "patches": [0.5]}, 422),
    ({"image": 1, "patches": [-1]}, 422),
    ({"image": 1, "patches": [10**30]}, 422),
    ({"image": 1, "patches": list(range(5_001))}, 422),
    ({"image": 1, "patches": [1], "how": "burnt"}, 422),
    ({"image": 1, "patches": [1], "how": 3}, 422),
    ({"image": 1, "patches": [1], "how": "shuffled", "seed": -1}, 422),
    ({"image": 1, "windows": [{}]}, 422),
    ({"image": 1, "windows": [{"layer": 0, "sides": [1, 1, 1]}]}, 422),
    ({"image": 1, "windows": [{"layer": 0, "sides": [1, 1, 1, 1], "head": 1.5}]}, 422),
    ({"image": 1, "windows": [{"layer": 0, "sides": [1, 1, 1, 1], "path": "x"}]}, 422),
    ({"image": 1, "windows": [[0, [1, 1, 1, 1]]]}, 422),
    ({"image": 1, "heads_off": [[0, 0]], "model": "timm:other"}, 422),
]


@pytest.mark.parametrize(("body", "status"), BAD)
def test_changes_without_meaning_are_refused_in_a_sentence(
    client: TestClient, body: dict[str, Any], status: int
) -> None:
    refusal(client.post("/api/what_if", json=body), status)


def test_bodies_and_names_are_bounded(client: TestClient) -> None:
    refusal(client.post("/api/what_if", content=b"{" * 70_000), 413)
    refusal(client.post("/api/what_if", content=b"{" * 60_000), 422)
    refusal(client.post("/api/what_if", content=b"[1]"), 404)
    body = {"image": 1, "heads_off": [[0, 0]]}
    for path, status in (("nothing?layer=0", 404), ("token_drift?layer=99", 404), ("attention_after?layer=0", 404)):
        refusal(client.post(f"/api/what_if/{path}", json=body), status)


def test_without_a_model_nothing_is_changed(study: Path) -> None:
    with TestClient(create_app(study), base_url=HOME) as client:
        refusal(client.post("/api/what_if", json={"image": 1, "heads_off": [[0, 0]]}), 503)
