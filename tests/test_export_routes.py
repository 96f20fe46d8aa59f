"""A page as one file and the routes of the server: each is recorded, or has a reason not to be."""

import asyncio
import base64
import json
import re
import zlib
from pathlib import Path

import pytest
from starlette.routing import compile_path

from synthetic_study import PlantedLive, write_beside, write_study
from vitrail.app import create_app
from vitrail.app.export import NOT_RECORDED, RECORDED, _Recorder, export_page
from vitrail.app.static_files import built_page
from vitrail.errors import UsageError

NOT_PLANTED = {
    "/api/patterns",
    "/api/patterns/{image}",
    "/api/patterns/map/{kind}",
    "/api/compare/{study}/image/{image}/{measure}",
}
"""What a planted study does not hold: patterns, measures of patches. The browser's tests open files with patterns."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("planted"), 12)


def test_every_route_is_recorded_or_has_a_reason(study: Path) -> None:
    paths = [route.path for route in create_app(study).routes if route.path.startswith(("/api", "/thumb", "/photo"))]
    assert sorted(paths) == sorted([*RECORDED, *NOT_RECORDED])
    assert all(NOT_RECORDED.values())


def test_a_file_holds_an_answer_of_every_recorded_route_and_of_no_other(study: Path, tmp_path: Path) -> None:
    if not built_page():
        pytest.skip("the page is not built")
    beside = write_beside(study, tmp_path / "beside")
    html = export_page(study, tmp_path / "page.html", PlantedLive(), images=[3], others=[beside]).read_text("utf-8")
    found = re.search(r'id="vitrail-recording"[^>]*>(.*?)</script>', html, re.DOTALL)
    assert found
    recording = json.loads(found[1])
    paths = [path.partition("?")[0] for path in recording["answers"]] + ["/thumb/0"] * len(recording["thumbnails"])
    patterns = {route: compile_path(route)[0] for route in (*RECORDED, *NOT_RECORDED)}
    # Routes are tried in order, as the server does: the first that matches answers.
    hit = {next(route for route, pattern in patterns.items() if pattern.match(path)) for path in paths}
    assert hit == set(RECORDED) - NOT_PLANTED


def test_a_file_opens_with_an_image_whose_photograph_it_holds(study: Path) -> None:
    recorder = _Recorder(create_app(study))

    def start(images: list[int] | None) -> int:
        recording = asyncio.run(recorder.record(images))
        content = zlib.decompress(base64.b64decode(recording["answers"]["/api/study"]["data"]), wbits=-15)
        image: int = json.loads(content)["start"]["image"]
        return image

    best = start(None)
    assert start([(best + 1) % 12, (best + 2) % 12]) == (best + 1) % 12
    assert start([(best + 1) % 12, best]) == best


@pytest.mark.parametrize("images", [[], 5, ["a"], [2.5], "05"])
def test_images_that_are_no_positions_are_refused(study: Path, images: object) -> None:
    with pytest.raises(UsageError, match="positions in the study"):
        asyncio.run(_Recorder(create_app(study)).record(images))  # type: ignore[arg-type]
