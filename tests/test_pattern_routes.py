"""What the page is told of patterns: names of heads and clusters from planted numbers, and where maps lie."""

from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from vitrail.app.patterns import routes
from vitrail.app.pictures import Uploads
from vitrail.app.study_arrays import StudyArrays
from vitrail.patterns.names import RULES

N_IMAGES, GRID = 6, (8, 8)
SELF = dict(zip(RULES, (0.9, 0.1, 0, 0, 0.95, 0.95, 1.0, 0.1, 0.2, 0.05), strict=True))
STEP = dict(zip(RULES, (0.02, 0.8, 1, 0, 0.9, 0.1, 0.9, 0.1, 0.3, 0.05), strict=True))
CENTRES = np.array([[10.0, -4.0], [-10.0, 4.0]])


def planted() -> xr.Dataset:
    """L0H0 looks at itself; L0H1 one step to the right, but at itself in image 5; L1H0 as L0H0; L1 has no H1."""
    rules = np.full((N_IMAGES, 2, 2, len(RULES)), np.nan, np.float32)
    rules[:, 0, 0] = rules[:, 1, 0] = list(SELF.values())
    rules[:, 0, 1] = list(STEP.values())
    rules[5, 0, 1] = list(SELF.values())
    cluster = np.full((N_IMAGES, 2, 2), -1, np.int32)
    cluster[:, :, 0], cluster[:5, 0, 1], cluster[5, 0, 1] = 0, 1, 0
    xy = np.where(cluster[..., None] >= 0, CENTRES[cluster.clip(0)], np.nan)
    xy += np.random.default_rng(0).normal(0, 0.3, xy.shape)
    head = ("image", "layer", "head")
    return xr.Dataset(
        {
            "pattern_rule": ((*head, "rule"), rules),
            "pattern_patch_cluster": (head, cluster),
            "pattern_patch_xy": ((*head, "xy"), xy.astype(np.float32)),
            "image_dependence": (("layer", "head"), np.array([[0.25, 0.5], [0.75, np.nan]], np.float32)),
            "label": ("image", np.zeros(N_IMAGES, np.int64)),
        },
        coords={"image": [f"{image}.png" for image in range(N_IMAGES)]},
        attrs={"grids": [GRID, GRID]},
    )


def client_of(dataset: xr.Dataset) -> TestClient:
    async def refuse(_request: Request, failure: Exception) -> JSONResponse:
        assert isinstance(failure, HTTPException)
        return JSONResponse({"error": failure.detail}, failure.status_code)

    state = SimpleNamespace(dataset=dataset, arrays=StudyArrays(dataset), uploads=Uploads())
    return TestClient(Starlette(routes=routes(state), exception_handlers={HTTPException: refuse}))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def client() -> TestClient:
    return client_of(planted())


def test_heads_are_named_over_all_images_with_the_share_that_agrees(client: TestClient) -> None:
    told = client.get("/api/patterns").json()
    heads = {(each["layer"], each["head"]): each for each in told["heads"]}
    assert {place: each["label"] for place, each in heads.items()} == {
        (0, 0): "self",
        (0, 1): "shift (+1, 0)",
        (1, 0): "self",
    }
    assert_allclose([heads[0, 1]["share"], heads[0, 1]["image_dependence"]], [5 / 6, 0.5])
    assert_allclose(heads[0, 1]["values"][RULES.index("shift_mass")], (5 * 0.8 + 0.1) / 6, rtol=1e-6)
    assert told["even"][RULES.index("row")] == 1 / 8
    assert told["even"][RULES.index("class_mass")] is None
    assert [(each["label"], each["size"]) for each in told["clusters"]] == [("self", 13), ("shift (+1, 0)", 5)]
    assert_allclose(told["clusters"][1]["heads"], [[0, 1, 5 / 6]])


def test_heads_of_one_image_are_named_by_its_own_numbers(client: TestClient) -> None:
    assert [each["label"] for each in client.get("/api/patterns/0").json()["heads"]] == [
        "self",
        "shift (+1, 0)",
        "self",
    ]
    assert [each["label"] for each in client.get("/api/patterns/5").json()["heads"]] == ["self", "self", "self"]
    assert "0 to 5" in client.get("/api/patterns/6").json()["error"]


def test_the_landscape_is_highest_where_most_maps_lie(client: TestClient) -> None:
    told = client.get("/api/patterns/map/patch").json()
    assert told["n_maps"] == 18
    height = np.array(told["height"]).reshape(told["shape"])
    peak = np.unravel_index(height.argmax(), height.shape)
    at = [np.interp(peak[axis], [0, height.shape[axis] - 1], told[name]) for axis, name in enumerate("xy")]
    assert_allclose(at, CENTRES[0], atol=1)
    assert_allclose([[each["x"], each["y"]] for each in told["clusters"]], CENTRES, atol=0.5)


def test_what_a_study_does_not_hold_is_said(client: TestClient) -> None:
    assert "no map of 'cls' patterns" in client.get("/api/patterns/map/cls").json()["error"]
    answer = client_of(planted().drop_vars("pattern_rule")).get("/api/patterns")
    assert answer.status_code == 404
    assert "--measures patterns" in answer.json()["error"]
