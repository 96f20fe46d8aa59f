"""What the page is told of pruning curves: accuracies and areas from planted answers."""

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from starlette.testclient import TestClient

from synthetic_study import write_study
from vitrail.app import create_app
from vitrail.pruning.ranking import CURVES_FILE
from vitrail.study.store import read_plan

HOME = "http://127.0.0.1:8765"
COUNTS = np.array([0, 9, 36])
N_IMAGES = 8


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("planted"), 12)


def answers(*shares: float) -> np.ndarray:
    """[count, image]: the first images of each count are right."""
    return np.arange(N_IMAGES) < N_IMAGES * np.array(shares)[:, None]


def write_curves(study: Path, digest: str) -> None:
    np.savez(
        study / CURVES_FILE,
        data_digest=np.array(digest),
        names=np.array(["poor", "good"]),
        counts=COUNTS,
        least=np.stack([answers(1, 0.5, 0.25), answers(1, 0.75, 0.25)]),
        most=np.stack([answers(1, 0.5, 0.25), answers(1, 0.25, 0.25)]),
        random=np.stack([answers(1, 0.25, 0.25)[:, :4], answers(1, 0.75, 0.25)[:, :4]]),
    )


def test_curves_are_accuracies_by_ranking_the_largest_area_first(study: Path) -> None:
    write_curves(study, read_plan(study).data_digest)
    with TestClient(create_app(study), base_url=HOME) as client:
        assert client.get("/api/study").json()["has_curves"] is True
        curves = client.get("/api/curves").json()
    assert curves["counts"] == [0, 9, 36]
    assert curves["images"] == N_IMAGES
    assert [each["name"] for each in curves["rankings"]] == ["good", "poor"]
    good = curves["rankings"][0]
    assert_allclose(good["least"], [1, 0.75, 0.25])
    assert_allclose(good["most"], [1, 0.25, 0.25])
    # Between the curves lies 0.5 of accuracy at a quarter of the heads: a triangle over all of them.
    assert_allclose(good["area"]["value"], 0.25)
    assert good["area"]["low"] < 0.25 < good["area"]["high"]
    assert good["area"]["chance"] > 0.25  # two orders at random show next to nothing
    assert good["area"]["beaten"] == 0.5
    assert curves["random"]["orders"] == 2
    assert_allclose(curves["random"]["mean"], [1, np.mean([0.25 * 8 / 4, 1]), 0.5])


def test_a_study_without_curves_of_its_own_images_has_none(study: Path) -> None:
    for make in (lambda: write_curves(study, "another"), lambda: (study / CURVES_FILE).write_bytes(b"PK")):
        make()
        with TestClient(create_app(study), base_url=HOME) as client:
            assert client.get("/api/study").json()["has_curves"] is False
    (study / CURVES_FILE).unlink()
    with TestClient(create_app(study), base_url=HOME) as client:
        assert client.get("/api/curves").json() == {"rankings": []}
