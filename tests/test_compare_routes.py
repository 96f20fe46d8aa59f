"""The routes of a comparison: the numbers of `vitrail.compare`, looked up, and refused in sentences."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose
from starlette.testclient import TestClient

import vitrail
from synthetic_study import write_beside, write_study
from vitrail.app import create_app
from vitrail.comparison.findings import comparison_findings
from vitrail.errors import UsageError
from vitrail.study.store import open_study

HOME = "http://127.0.0.1:8765"


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    tmp = tmp_path_factory.mktemp("two")
    study = write_study(tmp, 30)
    return study, write_beside(study, tmp / "another")


@pytest.fixture(scope="module")
def client(studies: tuple[Path, Path]) -> Iterator[TestClient]:
    with TestClient(create_app(studies[0], others=studies[1:]), base_url=HOME) as client:
        yield client


def test_the_answers_are_those_of_the_library(client: TestClient, studies: tuple[Path, Path]) -> None:
    compared = vitrail.compare(*studies)
    assert client.get("/api/study").json()["others"] == client.get("/api/compare").json()["studies"] == ["another"]
    found = client.get("/api/compare/0").json()
    assert [each["text"] for each in found["findings"]] == list(map(str, comparison_findings(compared)))
    first = found["measures"][0]
    assert (first["name"], first["by_layer"], first["by_head"]) == ("attention_distance", True, True)
    assert_allclose(first["mean_difference"], 0.5, atol=0.01)  # planted: 0.2 to 0.8 over the layers
    assert first["low"] < 0.5 < first["high"]
    values = np.frombuffer(client.get("/api/compare/0/attention_distance_difference").content, np.float32)
    assert_allclose(values, np.linspace(0.2, 0.8, 12), atol=0.05)
    image = found["images"][0]["image"]
    one = client.get(f"/api/compare/0/image/{image}").json()
    assert_allclose(one["change"], found["images"][0]["change"])
    expected = compared["difference"].sel(measure="attention_distance").values[image]
    assert_allclose(one["differences"]["attention_distance"], expected, rtol=1e-6)


def test_what_the_other_study_holds_of_an_image_is_found_by_its_digest(
    client: TestClient, studies: tuple[Path, Path]
) -> None:
    path = "/api/compare/0/image/7/attention_distance"
    ids = [list(open_study(folder)["image"].values) for folder in studies]
    row = open_study(studies[1])["attention_distance"].values[ids[1].index(ids[0][7])]
    answer = client.get(path)
    assert answer.headers["x-dims"] == "layer,head"
    assert_allclose(np.frombuffer(answer.content, np.float32).reshape(row.shape), row)
    of_head = client.get(f"{path}?head=2")
    assert_allclose(np.frombuffer(of_head.content, np.float32), row[:, 2])
    assert client.get(f"{path}?head=99").status_code == 404
    other = client.get("/api/compare/0").json()["other"]
    assert "attention_distance" in other["measures"]
    described = client.get("/api/study").json()
    assert other["grids"] == described["grids"]
    assert other["depths"] == described["depths"] == [(layer + 0.5) / 12 for layer in range(12)]
    assert other["views"] == described["views"] == [list(map(float, grid)) for grid in other["grids"]]


@pytest.mark.parametrize(
    "path",
    ["1", "-1", "9" * 30, "0/nonsense", "0/image/30", "0/change%2F..", "0/image_b", "0/image/0/no", "0/image/30/label"],
)
def test_what_is_not_there_is_refused(client: TestClient, path: str) -> None:
    answer = client.get(f"/api/compare/{path}")
    assert answer.status_code == 404
    assert "error" in answer.json()


def test_an_image_without_a_value_in_any_compared_measure_is_not_among_those_that_changed(
    studies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = vitrail.compare(*studies)
    has_values = xr.DataArray(np.arange(compared.sizes["image"]) > 20, dims="image")
    lacking = compared.assign({name: compared[name].where(has_values) for name in ("difference", "change")})
    monkeypatch.setattr("vitrail.app.compare.compare", lambda *_folders: lacking)
    with TestClient(create_app(studies[0], others=studies[1:]), base_url=HOME) as client:
        images = client.get("/api/compare/0").json()["images"]
        one = client.get("/api/compare/0/image/7").json()
    assert sorted(each["image"] for each in images) == list(range(21, compared.sizes["image"]))
    assert [each["change"] for each in images] == sorted((each["change"] for each in images), reverse=True)
    assert one["change"] is None
    assert set(one["differences"].values()) == {None}


def test_the_page_is_told_which_effects_are_infinite_none_and_unknown(
    studies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = vitrail.compare(*studies)
    effects, differences = compared["standardised"].copy(), compared["difference"].copy()
    names = compared["measure"].values[:3].tolist()
    effects[:3] = np.array([np.inf, np.nan, np.nan])  # the same in all images, none but rounding, of a single image
    differences[1:, 2] = np.nan
    changed = compared.assign(standardised=effects, difference=differences)
    monkeypatch.setattr("vitrail.app.compare.compare", lambda *_folders: changed)
    with TestClient(create_app(studies[0], others=studies[1:]), base_url=HOME) as client:
        told = {each["name"]: each for each in client.get("/api/compare/0").json()["measures"]}
    assert [(told[name]["standardised"], told[name]["alike"]) for name in names] == [
        (None, True),
        (0, False),
        (None, False),
    ]


def test_a_study_is_not_compared_with_itself(studies: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="was to be compared with itself; name another study"):
        create_app(studies[0], others=[studies[1], studies[0] / ".." / studies[0].name])


def test_a_study_that_cannot_be_compared_is_refused_when_it_is_asked_for(
    studies: tuple[Path, Path], tmp_path: Path
) -> None:
    copied = shutil.copytree(studies[0], tmp_path / "again")
    with TestClient(create_app(studies[0], others=[copied]), base_url=HOME) as client:
        answer = client.get("/api/compare/0")
    assert answer.status_code == 422
    assert "same" in answer.json()["error"]
