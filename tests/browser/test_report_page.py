"""The report of a study in a real Chromium, opened from the file: nothing is asked for, nothing goes wrong."""

from pathlib import Path
from typing import Any

import pytest

from vitrail.report import write_report

PATIENCE_MS = 60_000
"""For a machine that does much else, as in the tests of the page."""


@pytest.fixture(scope="module")
def report(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(study, tmp_path_factory.mktemp("report") / "report.html")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_a_report_opens_from_its_file_with_all_pictures_and_no_request(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE_MS)
    page, said, asked, failed = context.new_page(), [], [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.on("requestfailed", lambda request: failed.append(request.url))
    page.goto(report.as_uri())
    pictures = page.locator("img")
    assert pictures.count() >= 8
    sizes = pictures.evaluate_all("all => all.map(each => each.complete ? each.naturalWidth : 0)")
    assert min(sizes) > 0
    assert page.evaluate("document.documentElement.scrollWidth") == width  # no sideways scrolling of the page
    facts = page.locator("table.facts")
    widths = facts.evaluate_all("all => all.map(each => [each.scrollWidth, each.parentElement.clientWidth])")
    if width > 1000:
        assert [own for own, room in widths if own > room] == []  # names and reasons stand beside each other
    assert [address for address in asked if not address.startswith(("file:", "data:"))] == []
    assert (said, failed) == ([], [])
    context.close()
