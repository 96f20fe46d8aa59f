"""The page as one file, and in a notebook's frame: the same views, from a file, with no server and no request."""

import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect
from served import PATIENCE_MS, Site, at_patch, cell, chosen_head, n_selected, photograph, value

import vitrail
from vitrail.app.export import export_page
from vitrail.errors import UsageError

IMAGES = [5, 7]


@pytest.fixture(scope="module")
def file(study: Path, site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_page(study, tmp_path_factory.mktemp("export"), site.live, images=IMAGES)


@pytest.fixture
def opened(browser, file: Path):
    """Opens the file at a screen; afterwards: no error, and nothing was asked of anybody."""
    said, asked, contexts = [], [], []

    def visit(query: str = "") -> Page:
        context = browser.new_context(viewport={"width": 1280, "height": 720}, offline=True)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri() + query)
        page.wait_for_selector("#evidence > section")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith((file.as_uri(), "data:", "blob:"))] == []


def test_the_file_shows_what_the_server_shows(opened, site: Site, study: Path) -> None:
    page = opened("#?tab=heads&image=7&layer=2&head=1&scope=set")
    lost = site.dataset.probability.values[:, None, None] - site.dataset.head_probability.values
    assert abs(value(page, cell("L2H1")) - lost[:, 2, 1].mean()) < 1e-5
    attention = site.live.attention(photograph(study, 7), 2)[1]
    shown = at_patch(page, 27)
    np.testing.assert_allclose(shown, attention[0, 1 + 27], rtol=0.02)
    expect(page.locator("[data-view=why] li").first).to_be_visible()
    expect(page.locator("#photograph .hero img")).to_have_attribute("src", re.compile("^blob:"))
    page.locator(cell("L3H0")).click()
    expect(chosen_head(page)).to_have_text("L3H0")
    assert "layer=3" in page.evaluate("location.hash")
    page.go_back()
    expect(chosen_head(page)).to_have_text("L2H1")


def test_a_selection_is_averaged_in_the_file(opened, site: Site) -> None:
    page = opened("#?tab=heads&brush=wrong&scope=set")
    wrong = site.dataset.prediction.values != site.dataset.label.values
    expect(n_selected(page)).to_have_attribute("data-selected", str(int(wrong.sum())))
    lost = site.dataset.probability.values[:, None, None] - site.dataset.head_probability.values
    assert abs(value(page, cell("L1H1")) - lost[wrong][:, 1, 1].mean()) < 1e-5


def test_what_is_not_in_the_file_says_how_to_have_it(opened) -> None:
    page = opened("#?tab=heads&image=0")
    expect(page.locator("#photograph .note")).to_contain_text("vitrail open crops")
    page = opened("#?tab=what-if")
    expect(page.locator("[data-missing]")).to_have_count(1)
    expect(page.locator("[data-missing]")).to_contain_text("vitrail open crops")


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(browser, study: Path, tmp_path: Path) -> None:
    said = []
    shown = vitrail.show(study, images=[5])
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><title>notebook</title>{shown._repr_html_()}", encoding="utf-8")
    assert notebook.stat().st_size < 5e6
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(notebook.as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("[data-findings=heads] li").first.wait_for(timeout=PATIENCE_MS)
    frame.locator("[data-tab=heads]").click()
    expect(frame.locator("[data-view=grid] rect[data-head=L0H0]")).to_be_visible()
    frame.get_by_role("button", name="Light or dark").click()
    page.close()
    assert said == []


def test_only_pages_of_ours_are_overwritten_and_images_are_looked_up(study: Path, tmp_path: Path) -> None:
    letter = tmp_path / "letter.html"
    letter.write_text("Dear Anna")
    with pytest.raises(UsageError):
        export_page(study, letter)
    with pytest.raises(UsageError, match="images 0 to 63"):
        export_page(study, tmp_path / "page.html", images=[64])
    assert letter.read_text() == "Dear Anna"
