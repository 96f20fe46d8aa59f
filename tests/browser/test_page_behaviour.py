"""The page as a whole: keys, links, failures, exports, screens."""

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image
from playwright.sync_api import expect
from served import Site, Visit, cell, held, n_selected

from synthetic_study import N_LAYERS, PlantedLive, write_study
from vitrail.app import create_app


def test_arrows_walk_heads_and_layers_and_brackets_walk_images(visit: Visit) -> None:
    page = visit("?layer=1&head=1&image=10")
    for key, place in (("ArrowRight", "L1H2"), ("ArrowRight", "L2H0"), ("ArrowUp", "L1H0"), ("ArrowLeft", "L0H2")):
        page.keyboard.press(key)
        expect(page.locator("header .head")).to_have_text(place)
    page.keyboard.press("]")
    assert held(page, "image") == "11"
    page.keyboard.press("[")
    page.keyboard.press("[")
    assert held(page, "image") == "9"


def test_brackets_stay_inside_the_selection(visit: Visit, site: Site) -> None:
    wrong = np.flatnonzero((site.dataset.prediction != site.dataset.label).values)
    page = visit(f"?brush=wrong&image={wrong[0]}")
    expect(n_selected(page)).to_have_text(str(len(wrong)))
    page.keyboard.press("]")
    assert held(page, "image") == str(wrong[1])


def test_help_lists_the_keys(visit: Visit) -> None:
    page = visit()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("previous, next head")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_back_and_forward_retrace_the_steps(visit: Visit) -> None:
    page = visit("?layer=0&head=0")
    page.locator(cell("L2H1")).click()
    page.wait_for_timeout(500)  # changes closer together are one step
    page.locator("[data-view=A] button[data-image='3']").click()
    page.wait_for_timeout(500)
    page.go_back()
    expect(page.locator("header .head")).to_have_text("L2H1")
    assert held(page, "image") == "0"
    page.go_back()
    expect(page.locator("header .head")).to_have_text("L0H0")
    page.go_forward()
    page.go_forward()
    expect(page.locator("[data-view=A] circle.chosen")).to_have_attribute("data-image", "3")


def test_a_link_reproduces_the_screen(visit: Visit) -> None:
    page = visit("?image=8&layer=3&head=2&token=7&mode=5&metric=head_divergence&threshold=0.05&brush=right&scope=set")
    page.keyboard.press("ArrowLeft")
    address = page.evaluate("location.search")
    again = visit(address)
    for key in ("image", "layer", "head", "token", "mode", "metric", "threshold", "brush", "scope", "study"):
        assert held(again, key) == held(page, key)
    expect(again.locator("[data-view=B3] .reading")).to_contain_text("mode 5")
    expect(again.get_by_label("Metric")).to_have_value("head_divergence")


@pytest.mark.parametrize(
    "query",
    ["?image=9999&layer=77&head=-3", "?token=99999&mode=9", "?metric=none&colour=none&threshold=x", "?image=<b>"],
)
def test_a_link_with_values_that_do_not_exist_opens_on_ones_that_do(visit: Visit, query: str) -> None:
    page = visit(query)
    page.wait_for_selector(cell("L0H0"))
    page.wait_for_selector("[data-map=looks] rect[data-weight]")


def test_a_brush_without_meaning_says_so_and_can_be_cleared(visit: Visit) -> None:
    page = visit("?brush=nonsense:1")
    expect(page.get_by_role("alert").first).to_contain_text("means nothing in this study")
    page.get_by_role("button", name="Clear the selection").click()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_selection_of_nothing_is_told_in_the_views_and_the_rest_lives(visit: Visit) -> None:
    page = visit("?brush=find:zzzz&scope=set&image=2")
    expect(page.locator("[data-view=B1] .error")).to_contain_text("No image matches")
    page.wait_for_selector("[data-map=looks] rect[data-weight]")
    page.wait_for_selector("[data-view=C3] rect[data-bin]")


def test_without_a_model_the_live_views_say_so_and_the_others_go_on(
    visit: Visit, study: Path, serving: Callable[..., str]
) -> None:
    page = visit(url=serving(create_app(study)), allow_errors=True)
    for view in ("B2", "B3", "D2"):
        expect(page.locator(f"[data-view={view}] .error")).to_contain_text("No model is open")
    for ready in (cell("L0H0"), "[data-view=C1] circle[data-head]", "[data-view=D2] image"):
        page.wait_for_selector(ready)
    expect(page.get_by_role("button", name="Your own image")).to_have_count(0)


def test_every_view_exports_svg_png_and_csv(visit: Visit, site: Site) -> None:
    page = visit("?image=3&scope=image&layer=1&head=1")
    page.wait_for_selector("[data-map=looks] rect[data-weight]")
    for view in ("A", "B1", "B2", "B3", "C1", "C2", "C3", "C4", "D2", "D5"):
        files = {}
        for kind in ("SVG", "PNG", "CSV"):
            page.locator(f"[data-view={view}] .export summary").click()
            with page.expect_download() as download:
                page.locator(f"[data-view={view}] .export").get_by_role("button", name=kind).click()
            assert download.value.suggested_filename == f"vitrail-{view}.{kind.lower()}"
            files[kind] = Path(download.value.path()).read_bytes()
        assert files["SVG"].startswith(b"<svg")
        assert b"light-dark" not in files["SVG"]
        picture = Image.open(io.BytesIO(files["PNG"])).convert("RGB")
        assert picture.width > 300
        assert len(picture.getcolors(2**24) or []) > 8, f"{view} exports an empty picture"
        assert len(list(csv.DictReader(io.StringIO(files["CSV"].decode())))) >= 5
    probability = site.dataset.head_probability.values[3]
    page.locator("[data-view=B1] .export summary").click()
    with page.expect_download() as download:
        page.locator("[data-view=B1] .export").get_by_role("button", name="CSV").click()
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
    assert rows[4]["head"] == "L1H1"
    assert_allclose(float(rows[4]["head_probability"]), probability[1, 1], atol=1e-6)


def test_every_chart_says_how_to_read_it_with_its_source_and_unit(visit: Visit) -> None:
    page = visit("?scope=image")
    page.wait_for_selector("[data-map=looks] rect[data-weight]")
    for view in ("B1", "B2", "B3", "C1", "C2", "C3", "C4", "D2", "D5"):
        reading = page.locator(f"[data-view={view}] .reading")
        expect(reading).to_contain_text("Source: ")
    for view, unit in (("C1", "nats"), ("C2", "attention weight"), ("C3", "nats"), ("C4", "nats"), ("D5", "weight")):
        expect(page.locator(f"[data-view={view}] svg.chart")).to_contain_text(unit)


def test_controls_have_names_and_focus_is_visible(visit: Visit) -> None:
    page = visit()
    page.wait_for_selector("[data-map=looks] rect[data-weight]")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, summary, [role=application], svg[role=img]")]
            .filter((e) => !(e.textContent.trim() || e.ariaLabel || e.title || e.labels?.length || e.placeholder))
            .map((e) => e.outerHTML.slice(0, 90))"""
    )
    assert unnamed == []
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours as the browser writes them, "rgb(r, g, b)"."""

    def luminance(colour: str) -> float:
        parts = np.array([float(part) for part in re.findall(r"[\d.]+", colour)[:3]]) / 255
        linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_on_its_ground(visit: Visit, theme: str) -> None:
    page = visit(color_scheme=theme)
    page.wait_for_selector("[data-map=looks] rect[data-weight]")
    colour = "([selector, name]) => getComputedStyle(document.querySelector(selector))[name]"
    ground = page.evaluate(colour, [".view", "backgroundColor"])
    texts = [(".reading", "color"), (".chart text", "fill"), (".here-text", "fill"), ("h3", "color")]
    ratios = {text: contrast(page.evaluate(colour, list(text)), ground) for text in texts}
    assert min(ratios.values()) >= 4.5, ratios


@pytest.mark.parametrize(
    "size", [(390, 844), (900, 1000), (1280, 720), (1920, 1080), (3840, 2160)], ids=lambda size: f"{size[0]}x{size[1]}"
)
def test_the_page_fits_every_screen_without_scrolling_sideways(visit: Visit, size: tuple[int, int]) -> None:
    page = visit("?scope=image", viewport={"width": size[0], "height": size[1]})
    page.wait_for_selector("[data-map=looks] rect[data-weight]")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    spilling = page.evaluate(
        """() => [...document.querySelectorAll(".view")].filter((view) => [...view.querySelectorAll("svg.chart")]
            .some((chart) => chart.getBoundingClientRect().right > view.getBoundingClientRect().right + 1))
            .map((view) => view.dataset.view)"""
    )
    assert spilling == []
    columns = page.evaluate(
        "new Set([...document.querySelectorAll('main > section')].map((s) => s.getBoundingClientRect().left)).size"
    )
    assert (columns == 1) == (size[0] == 390)


def test_the_theme_button_turns_the_page_dark_and_it_is_remembered(visit: Visit) -> None:
    page = visit(color_scheme="light")
    shade = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(shade)
    page.get_by_label("Light or dark").click()
    after = page.evaluate(shade)
    assert before != after
    page.reload()
    page.wait_for_selector("[data-view=A] [data-image]")
    assert page.evaluate(shade) == after


def test_a_model_without_classifier_or_with_fewer_heads_in_some_layers_opens(
    visit: Visit, serving: Callable[..., str], tmp_path: Path
) -> None:
    counts = (1, 2, *[3] * (N_LAYERS - 2))
    study = write_study(tmp_path, 24, classifier=False, n_heads=counts)
    page = visit("?scope=set", url=serving(create_app(study, PlantedLive())))
    expect(page.locator("[data-view=B1] rect[data-head]")).to_have_count(sum(counts))
    expect(page.locator("[data-view=C1] circle[data-head]")).to_have_count(sum(counts))
    expect(page.locator(cell("L0H1"))).to_have_count(0)
    expect(page.locator("[data-view=B2]")).to_have_count(0)
    page.keyboard.press("ArrowRight")
    expect(page.locator("header .head")).to_have_text("L1H0")  # layer 0 has one head only
    page.wait_for_selector("[data-map=looks] rect[data-weight]")
    page.get_by_role("button", name="this image").click()
    page.wait_for_selector("[data-view=C4] circle[data-step='0']")
