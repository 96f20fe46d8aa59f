"""The frame: tabs, images, the photograph with its overlay; keys, links, waiting, failing, screens."""

import csv
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image
from playwright.sync_api import Locator, Page, expect
from served import (
    N_IMAGES,
    Site,
    Visit,
    at_patch,
    becomes,
    cell,
    chosen_head,
    drawn_without_room,
    held,
    n_selected,
    photograph,
)

import vitrail
from synthetic_study import N_LAYERS, PlantedLive, write_study
from vitrail.app import create_app

AXE = Path(__file__).resolve().parents[2] / "web" / "node_modules" / "axe-core" / "axe.min.js"
TABS = ("findings", "heads", "patterns", "patches", "tokens", "windows", "what-if", "compare")

# --- tabs, keys, links ---


def test_number_keys_and_clicks_open_the_tabs_and_back_returns(visit: Visit) -> None:
    page = visit("?tab=heads")
    for key, tab in enumerate(TABS, start=1):
        page.keyboard.press(str(key))
        expect(page.locator(f"[data-tab={tab}]")).to_have_attribute("aria-selected", "true")
        assert held(page, "tab") == tab
    page.get_by_role("tab", name="Patches").click()
    assert held(page, "tab") == "patches"
    page.go_back()
    expect(page.locator(f"[data-tab={TABS[-1]}]")).to_have_attribute("aria-selected", "true")


def test_the_page_opens_on_findings_with_the_most_important_head_and_the_image_that_needs_it(
    visit: Visit, site: Site
) -> None:
    page = visit()
    lost = site.dataset.probability.values[:, None, None] - site.dataset.head_probability.values
    layer, head = np.unravel_index(lost.mean(0).argmax(), lost.shape[1:])
    assert (held(page, "tab"), held(page, "layer"), held(page, "head")) == ("findings", str(layer), str(head))
    assert held(page, "image") == str(lost[:, layer, head].argmax())


def test_arrows_walk_heads_and_layers_and_brackets_walk_images(visit: Visit) -> None:
    page = visit("?tab=heads&layer=1&head=1&image=10")
    for key, place in (("ArrowRight", "L1H2"), ("ArrowRight", "L2H0"), ("ArrowUp", "L1H0"), ("ArrowLeft", "L0H2")):
        page.keyboard.press(key)
        expect(chosen_head(page)).to_have_text(place)
    page.keyboard.press("]")
    page.keyboard.press("]")
    page.keyboard.press("[")
    assert held(page, "image") == "11"
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("previous, next head")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_back_and_forward_retrace_the_steps(visit: Visit) -> None:
    page = visit("?tab=heads&layer=0&head=0&image=0")
    page.locator(cell("L2H1")).click()
    page.wait_for_timeout(450)  # changes closer together are one step
    page.locator("[data-view=images] [data-image='3']").click()
    page.go_back()
    expect(chosen_head(page)).to_have_text("L2H1")
    assert held(page, "image") == "0"
    page.go_back()
    expect(chosen_head(page)).to_have_text("L0H0")
    page.go_forward()
    page.go_forward()
    expect(page.locator("[data-view=images] rect.chosen")).to_have_attribute("data-image", "3")


def test_a_link_reproduces_the_screen(visit: Visit) -> None:
    query = "?tab=patches&image=8&layer=3&head=2&token=7&mode=5&metric=head_divergence&overlay=tendency&own=yes"
    page = visit(query + "&threshold=0.05&brush=right&scope=image&colour=label")
    page.keyboard.press("ArrowLeft")
    again = visit(page.evaluate("location.search"))
    assert again.evaluate("location.search") == page.evaluate("location.search")
    expect(again.get_by_label("Drawn over the photograph")).to_have_value("tendency")
    n_arrows = page.locator("#photograph .hero path.arrow").count()
    assert n_arrows
    expect(again.locator("#photograph .hero path.arrow")).to_have_count(n_arrows)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?tab=heads&image=9999&layer=77&head=-3", "There is no image 9999"),
        ("?tab=heads&image=<b>", "There is no image <b>"),
        ("?tab=nothing&metric=none&colour=none&threshold=x&token=99999", "holds no none"),
        ("?study=another", "made on the study another"),
    ],
)
def test_a_link_that_names_what_is_gone_says_so_and_opens_on_what_is_there(visit: Visit, query: str, said: str) -> None:
    page = visit(query)
    expect(page.get_by_role("alert")).to_contain_text(said)
    page.get_by_role("alert").get_by_role("button").click()
    expect(page.get_by_role("alert")).to_have_count(0)


# --- images ---


def test_the_bar_names_the_study_and_counts_its_images(visit: Visit, site: Site) -> None:
    page = visit()
    expect(n_selected(page)).to_have_text(str(N_IMAGES))
    expect(page.locator("h1")).to_have_text("vitrail:photos")
    right = float((site.dataset.prediction == site.dataset.label).mean())
    expect(page.locator("header .about")).to_contain_text(f"{100 * right:.0f} % right")


def test_a_thumbnail_chooses_the_image_everywhere_and_arrows_go_on(visit: Visit, site: Site) -> None:
    page = visit("?tab=heads&scope=image&layer=1&head=1&image=0")
    page.locator("[data-view=images] [data-image='5']").click()
    expect(page.locator("[data-view=images] rect.chosen")).to_have_attribute("data-image", "5")
    lost = float(site.dataset.probability[5] - site.dataset.head_probability[5, 1, 1])
    becomes(page, cell("L1H1"), lost)
    label = int(site.dataset.label[5])
    expect(page.locator("#photograph .facts")).to_contain_text(site.dataset.attrs["class_names"][label])
    page.get_by_role("listbox").focus()
    page.keyboard.press("ArrowRight")
    assert (held(page, "image"), held(page, "head")) == ("6", "1")
    expect(page.get_by_role("listbox")).to_have_attribute("aria-activedescendant", "image-6")


def test_filters_select_and_can_be_taken_out(visit: Visit, site: Site) -> None:
    page = visit("?tab=heads&layer=2&head=0")
    wrong = np.flatnonzero((site.dataset.prediction != site.dataset.label).values)
    assert 0 < len(wrong) < N_IMAGES
    page.get_by_role("button", name="wrong", exact=True).click()
    expect(n_selected(page)).to_have_text(str(len(wrong)))
    lost = site.dataset.probability.values[:, None, None] - site.dataset.head_probability.values
    becomes(page, cell("L2H0"), float(lost[wrong].mean(axis=0)[2, 0]), 1e-5)
    page.keyboard.press("]")
    assert int(held(page, "image")) in wrong
    page.get_by_role("button", name="Take out: predicted wrongly").click()
    expect(n_selected(page)).to_have_text(str(N_IMAGES))
    page.get_by_role("button", name="needs L2H0").click()
    expect(n_selected(page)).to_have_text(str(int((lost[:, 2, 0] > 0.1).sum())))
    page.locator(cell("L1H1")).click()  # the button is of the head at hand, the selection stays
    expect(page.get_by_role("button", name="Take out: needs L2H0")).to_be_visible()
    page.get_by_role("button", name="needs L1H1", exact=True).click()
    expect(n_selected(page)).to_have_text(str(int((lost[:, 1, 1] > 0.1).sum())))
    page.locator("[data-view=grid] summary").click()
    page.keyboard.press("Escape")  # closes what is open, and nothing else
    expect(page.locator("[data-view=grid] details")).not_to_have_attribute("open", "")
    assert held(page, "brush") == "drop:L1H1:0.1"
    page.keyboard.press("Escape")
    assert held(page, "brush") == ""


def test_a_stroke_around_dots_selects_them_and_comes_back_from_the_link(visit: Visit) -> None:
    page = visit()
    box = page.locator("[data-view=images] svg[role=application]").first.bounding_box()
    assert box
    left, top, right, bottom = box["x"] + 1, box["y"] + 1, box["x"] + box["width"] / 2, box["y"] + box["height"] - 1
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom), (left, top + 9)):
        page.mouse.move(x, y, steps=6)
    page.mouse.up()
    page.wait_for_function(f"() => +document.querySelector('[data-selected]').dataset.selected < {N_IMAGES}")
    chosen = int(n_selected(page).inner_text())
    assert 0 < chosen < N_IMAGES
    assert held(page, "brush").startswith("lasso:")
    again = visit(page.url.split("/", 3)[3])
    expect(n_selected(again)).to_have_text(str(chosen))


def test_a_search_by_class_and_by_file_name(visit: Visit, site: Site) -> None:
    page = visit()
    page.keyboard.press("/")
    search = page.get_by_label("Search images by class or file name")
    expect(search).to_be_focused()
    names = site.dataset.attrs["class_names"]
    page.keyboard.type("cof")
    coffee = int((site.dataset.label == names.index("coffee")).sum())
    by_id = sum("cof" in str(name) for name in site.dataset.image.values)
    expect(n_selected(page)).to_have_text(str(max(coffee, by_id)))
    page.keyboard.press("Enter")
    assert int(site.dataset.label[int(held(page, "image"))]) == names.index("coffee")
    expect(search).to_have_value("cof")  # the field made the change and keeps it


def test_images_are_ordered_by_what_the_head_costs(visit: Visit, site: Site) -> None:
    page = visit("?layer=1&head=1")
    page.get_by_label("order of the images").select_option("high")
    most = int(np.argmax(site.dataset.probability.values - site.dataset.head_probability.values[:, 1, 1]))
    page.wait_for_function(
        "most => document.querySelector('[data-view=images] .grid [data-image]').dataset.image === String(most)",
        arg=most,
    )


def middle(ring: Locator) -> list[float]:
    """Where on the map of images a ring is drawn."""
    x, y, width, height = (float(ring.get_attribute(name) or "nan") for name in ("x", "y", "width", "height"))
    return [x + width / 2, y + height / 2]


def test_a_dot_is_drawn_where_the_map_has_an_image(visit: Visit) -> None:
    page = visit("?image=7&colour=label")
    ring = page.locator("[data-view=images] rect.chosen")
    shade = page.locator("[data-view=images] canvas").evaluate(
        """(canvas, at) => {
            const [x, y] = at.map((part) => Math.round(part * devicePixelRatio));
            return Array.from(canvas.getContext("2d").getImageData(x, y, 1, 1).data);
        }""",
        middle(ring),
    )
    assert shade[3] > 0


def map_of_images(page: Page) -> Locator:
    return page.locator("[data-view=images] svg[role=application]")


def chosen_place(page: Page) -> np.ndarray:
    return np.array(middle(page.locator("[data-view=images] rect.chosen")))


def test_the_map_is_magnified_about_the_pointer_until_dots_are_thumbnails(visit: Visit, site: Site) -> None:
    page = visit("?tab=heads&image=7&colour=label")
    field = map_of_images(page)
    box = field.bounding_box()
    assert box
    place = chosen_place(page)
    assert page.locator("[data-picture]").count() == 0
    page.mouse.move(box["x"] + place[0], box["y"] + place[1])
    for zoom in (2, 4, 8, 16):
        page.mouse.wheel(0, -240)
        expect(field).to_have_attribute("data-zoom", str(zoom))
        assert_allclose(chosen_place(page), place, atol=zoom)  # the pointer is within a pixel of the dot
    picture = page.locator("[data-picture='7']")
    expect(picture).to_have_attribute("src", "/thumb/7")
    page.wait_for_function("() => document.querySelector('[data-picture]').naturalWidth > 0")
    side = float(picture.evaluate("each => each.getBoundingClientRect().width"))
    assert 24 <= side <= 48
    near = np.abs(site.dataset.image_xy.values - site.dataset.image_xy.values[7]).max(axis=1)
    assert page.locator("[data-picture]").count() <= int((near < np.ptp(site.dataset.image_xy.values) / 8).sum())
    page.get_by_role("button", name="wrong", exact=True).click()
    is_wrong = bool(site.dataset.prediction[7] != site.dataset.label[7])
    assert ("faint" in (picture.get_attribute("class") or "")) is not is_wrong
    page.get_by_role("button", name="Whole map").click()
    expect(page.locator("[data-picture]")).to_have_count(0)
    expect(page.get_by_role("button", name="Whole map")).to_have_count(0)


def test_the_map_is_moved_by_keys_and_drags_and_a_stroke_on_it_selects_what_it_holds(visit: Visit, site: Site) -> None:
    page = visit("?tab=heads&image=7&layer=2&head=1")
    field = map_of_images(page)
    field.focus()
    for key, zoom in (("+", "2"), ("+", "4"), ("-", "2"), ("0", "1"), ("+", "2")):
        page.keyboard.press(key)
        expect(field).to_have_attribute("data-zoom", zoom)
    before = chosen_place(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert (held(page, "layer"), held(page, "head")) == ("2", "1")  # the heads' arrows rest meanwhile
    box = field.bounding_box()
    assert box
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    middle_y = box["y"] + box["height"] / 2
    page.keyboard.down("Control")
    page.mouse.move(box["x"] + 40, middle_y)
    page.mouse.down()
    page.mouse.move(box["x"] + 40, middle_y - 30, steps=3)
    page.mouse.up()
    page.keyboard.up("Control")
    assert held(page, "brush") == ""
    assert not np.allclose(chosen_place(page), before)
    edge = 2
    for x, y in ((edge, edge), (box["width"] - edge, edge), (box["width"] - edge, box["height"] - edge)):
        page.mouse.move(box["x"] + x, box["y"] + y)
        page.mouse.down() if (x, y) == (edge, edge) else None
    page.mouse.move(box["x"] + edge, box["y"] + box["height"] - edge)
    page.mouse.up()
    left, top, right, _, _, bottom, *_ = map(float, held(page, "brush").removeprefix("lasso:").split(","))
    x, y = site.dataset.image_xy.values.T
    inside = (x > left) & (x < right) & (y > top) & (y < bottom)
    assert 0 < inside.sum() < N_IMAGES
    expect(n_selected(page)).to_have_text(str(int(inside.sum())))


def test_the_layout_is_chosen_from_a_list_and_a_link_holds_it_and_what_was_drawn_on_it(
    visit: Visit, site: Site
) -> None:
    page = visit("?tab=heads&image=7")
    expect(page.get_by_label("layout").locator("option")).to_have_text(
        ["t-SNE of head importance", "PCA of head importance"]
    )
    page.get_by_label("layout").select_option("PCA of head importance")
    assert held(page, "layout") == "importance-pca"
    table = site.dataset.head_probability.values.reshape(N_IMAGES, -1)
    left, sizes, _ = np.linalg.svd(table - table.mean(axis=0), full_matrices=False)
    first = left[:, 0] * sizes[0]
    first = first * np.sign(first[np.abs(first).argmax()])
    span = float(first[7] - first.min()) / np.ptp(first)
    width = map_of_images(page).evaluate("each => each.clientWidth")
    expected = 12 + span * (width - 24)
    for _ in range(100):  # the layout arrives and the dots move
        if abs(chosen_place(page)[0] - expected) < 1.5:
            break
        page.wait_for_timeout(100)
    assert_allclose(chosen_place(page)[0], expected, atol=1.5)
    far = 99
    middle_x = float(np.median(first))
    page.goto(page.url + f"&brush=lasso:importance-pca,{-far},{-far},{middle_x},{-far},{middle_x},{far},{-far},{far}")
    expect(n_selected(page)).to_have_text(str(N_IMAGES // 2))
    page.get_by_label("layout").select_option("t-SNE of head importance")
    expect(page.locator("[data-view=images] polygon")).to_have_count(0)
    expect(n_selected(page)).to_have_text(str(N_IMAGES // 2))  # the same images, elsewhere


def test_a_selection_of_nothing_or_without_meaning_is_told_where_it_matters(visit: Visit) -> None:
    page = visit("?tab=heads&brush=find:zzzz&image=2")
    expect(page.locator("[data-view=grid] [role=alert]")).to_contain_text("No image matches")
    page.wait_for_selector("[data-view=distribution] rect[data-bin]")
    page.goto(page.url.replace("find%3Azzzz", "nonsense%3A1"))
    expect(page.locator("[data-view=images] [role=alert]")).to_contain_text("means nothing in this study")
    page.get_by_role("button", name="Clear the selection").click()
    expect(page.get_by_role("alert")).to_have_count(0)


# --- the photograph ---


def test_the_overlay_follows_the_pointer_without_a_request(visit: Visit, site: Site, study: Path) -> None:
    page = visit("?tab=heads&image=4&layer=2&head=1&token=0")
    weights = np.asarray(site.live.attention(photograph(study, 4), 2))[1]
    page.wait_for_selector("#photograph .hero svg[data-overlay=weights]")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    seen_from = page.get_by_role("group", name="Seen from")
    for patch in (0, 19, 40, 63):  # the class token's map stays, and is read
        assert_allclose(at_patch(page, patch), weights[0, 1 + patch], rtol=1e-4)
        expect(seen_from.get_by_role("button", name="class token")).to_have_attribute("aria-pressed", "true")
    page.locator("#photograph .hero svg").click(position={"x": 5, "y": 5})
    assert held(page, "token") == "1"
    for patch in (40, 63):  # so does that of a patch
        assert_allclose(at_patch(page, patch), weights[1, 1 + patch], rtol=1e-4)
        expect(seen_from.get_by_role("button", name="row 0, column 0")).to_be_visible()
    page.mouse.down()  # a drag looks from patch after patch
    assert_allclose(at_patch(page, 62), weights[1 + 62, 1 + 62], rtol=1e-4)
    page.mouse.up()
    assert held(page, "token") == "63"
    page.locator("#photograph .hero svg").click(position={"x": 5, "y": 5})
    page.mouse.move(2, 2)
    assert_allclose(
        float(page.locator("#photograph [data-prefix]").get_attribute("data-prefix") or 0), weights[1, 0], rtol=1e-4
    )
    page.get_by_label("Drawn over the photograph").select_option("looked-at")
    page.locator("#photograph .hero svg").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#photograph [data-patch]")).to_have_attribute("data-patch", "9")
    assert (held(page, "layer"), held(page, "head")) == ("2", "1")  # the heads' arrows rest meanwhile
    assert [url for url in requests if "/attention/" in url] == []


def test_the_photograph_is_saved_with_its_overlay_its_scale_and_its_numbers(
    visit: Visit, site: Site, study: Path
) -> None:
    page = visit("?tab=heads&image=4&layer=2&head=1&token=20")
    page.wait_for_selector("#photograph .hero svg[data-overlay=weights]")
    page.mouse.move(2, 2)

    def saved(kind: str) -> str:
        page.locator("#photograph summary").click()
        with page.expect_download() as download:
            page.get_by_label("Save the photograph as it is drawn").get_by_role("button", name=kind).click()
        return Path(download.value.path()).read_text(encoding="utf-8")

    rows = list(csv.DictReader(io.StringIO(saved("CSV"))))
    weights = np.asarray(site.live.attention(photograph(study, 4), 2))[1, 20]
    assert_allclose([float(row["value"]) for row in rows], [*weights[1:], weights[0]], rtol=1e-4)
    assert (rows[9]["row"], rows[9]["column"], rows[-1]["row"]) == ("1", "1", "class token")
    drawing = ElementTree.fromstring(saved("SVG"))
    svg = "{http://www.w3.org/2000/svg}"
    assert [each.get("href", "")[:15] for each in drawing.iter(f"{svg}image")] == ["data:image/png;"] * 2
    words = "".join(drawing.itertext())
    top = page.locator("#photograph [data-top]").inner_text()
    assert all(each in words for each in ("L2H1", "row 2, column 3", "even", top, "class token"))


def test_the_scale_starts_at_even_attention_and_is_shared_unless_it_is_its_own(
    visit: Visit, site: Site, study: Path
) -> None:
    page = visit("?tab=heads&image=4&layer=0&head=0&token=20")
    weights = np.asarray(site.live.attention(photograph(study, 4), 0))[0]
    floor, top = page.locator("#photograph [data-floor]"), page.locator("#photograph [data-top]")
    assert_allclose(float(floor.get_attribute("data-floor") or 0), 1 / 65, rtol=1e-6)
    shared = np.sort(weights[:, 1:].ravel())[int(0.995 * weights[:, 1:].size)]
    assert_allclose(float(top.get_attribute("data-top") or 0), shared, rtol=1e-4)
    page.get_by_label("Drawn over the photograph").select_option("looked-at")
    assert_allclose(float(top.get_attribute("data-top") or 0), shared, rtol=1e-4)
    page.get_by_label("own scale").check()
    page.wait_for_function("() => +document.querySelector('#photograph [data-top]').dataset.top > 0")
    assert_allclose(float(top.get_attribute("data-top") or 0), weights[1:, 20].max(), rtol=1e-4)
    alpha = page.locator("#photograph .hero canvas").evaluate(
        "canvas => Array.from(canvas.getContext('2d').getImageData(0, 0, 8, 8).data).filter((_, i) => i % 4 === 3)"
    )
    assert (np.array(alpha) > 0).sum() == (weights[1:, 20] > 1 / 65 + 1e-4).sum()


def test_stored_measures_of_patches_lie_over_the_photograph_by_layer(visit: Visit, site: Site) -> None:
    page = visit("?tab=patches&image=4&layer=2&token=20&overlay=field_size")
    for layer in (2, 3):
        page.get_by_label("Every layer").get_by_role("button", name=f"Layer {layer}").click()
        assert held(page, "layer") == str(layer)
        becomes(page, "#photograph [data-scale] [aria-live]", float(site.dataset.field_size[4, layer, 19]))
        assert_allclose(at_patch(page, 17), float(site.dataset.field_size[4, layer, 17]), rtol=1e-5)
        page.mouse.move(2, 2)
    page.get_by_label("Drawn over the photograph").select_option("window")
    box = page.locator("#photograph .hero [data-box]")
    sides = [float(side) for side in (box.get_attribute("data-box") or "").split(",")]
    assert_allclose(sides, site.dataset.window.values[4, 3, 19], rtol=1e-6)
    page.get_by_label("Drawn over the photograph").select_option("token_norm")
    assert_allclose(at_patch(page, 20), float(site.dataset.token_norm[4, 3, 21]), rtol=1e-5)


def test_without_a_model_no_live_route_is_asked_and_the_rest_goes_on(
    visit: Visit, study: Path, serving: Callable[..., str]
) -> None:
    page = visit("?tab=heads", url=serving(create_app(study)))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    expect(page.locator("[data-view=regions][data-missing]")).to_contain_text("No model is open")
    expect(page.locator("#photograph .note")).to_contain_text("No model is open")
    expect(page.get_by_role("button", name="Your own image")).to_have_count(0)
    page.reload()
    for ready in (cell("L0H0"), "[data-view=spread] circle[data-head]", "#photograph .hero img"):
        page.wait_for_selector(ready)
    page.keyboard.press("4")
    page.wait_for_selector("#photograph .hero svg[data-overlay]")
    assert [url for url in requests if "/live" in url] == []


def test_the_page_is_there_while_the_model_is_opened(
    visit: Visit, study: Path, site: Site, serving: Callable[..., str]
) -> None:
    opened: list[float] = []

    def open_model() -> object:
        while not opened:
            time.sleep(0.02)
        return site.live

    page = visit("?tab=heads", url=serving(create_app(study, open_model)))
    expect(page.locator("#photograph .note")).to_contain_text("being opened")
    expect(page.locator("[data-view=regions][data-missing]")).to_contain_text("being opened")
    page.wait_for_selector(cell("L0H0"))
    opened.append(1)
    page.wait_for_selector("#photograph .hero svg[data-overlay=weights]")
    page.wait_for_selector("[data-view=regions] rect[data-mode]")


def test_a_photograph_that_is_gone_says_so_and_its_thumbnail_stands_in(
    visit: Visit, serving: Callable[..., str], tmp_path: Path
) -> None:
    study = write_study(tmp_path, 24)
    next((tmp_path / "photos").rglob("*.png")).unlink()
    gone = sorted(json.loads((study / "images.json").read_text())["images"], key=lambda entry: entry["id"])
    page = visit("?tab=heads&image=0", url=serving(create_app(study)), allow_errors=True)
    missing = [i for i, entry in enumerate(gone) if not Path(entry["path"]).is_file()]
    page.goto(page.url.replace("image=0", f"image={missing[0]}"))
    expect(page.locator("#photograph .note")).to_contain_text(re.compile("gone|not|no longer"))
    expect(page.locator("#photograph .hero img")).to_have_attribute("src", f"/thumb/{missing[0]}")


# --- an own image ---


def png(size: tuple[int, int] = (96, 80)) -> bytes:
    rng = np.random.default_rng(5)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_own_image_is_computed_live_and_placed_on_the_map(visit: Visit, site: Site) -> None:
    page = visit("?tab=heads&layer=1&head=1")
    page.get_by_label("Your own image").set_input_files({"name": "mine.png", "mimeType": "image/png", "buffer": png()})
    expect(page.locator("#photograph .facts")).to_contain_text("Your photograph", timeout=40_000)
    assert re.fullmatch("u[0-9a-f]{16}", held(page, "image"))
    expect(page.locator("[data-view=images] rect.chosen")).to_have_count(1)
    looked = vitrail.look(site.live.vit, Image.open(io.BytesIO(png())), measures="heads").isel(image=0)
    becomes(page, cell("L1H1"), float(looked["probability"] - np.asarray(looked["head_probability"])[1, 1]), 1e-4)
    page.wait_for_selector("#photograph .hero svg[data-overlay=weights]")


def test_a_dropped_file_that_is_no_image_gets_a_sentence_and_the_page_goes_on(visit: Visit) -> None:
    page = visit("?image=0", allow_errors=True)
    page.evaluate(
        """() => {
            const data = new DataTransfer();
            data.items.add(new File(["not an image"], "mine.png", { type: "image/png" }));
            window.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }"""
    )
    expect(page.get_by_role("alert")).to_contain_text("not an image")
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("alert")).to_have_count(0)
    assert held(page, "image") == "0"


# --- every tab ---


def axe(page: Page) -> list[str]:
    """What axe finds wrong on the page once nothing is waited for: a view that waits is faint."""
    page.wait_for_function("() => !document.querySelector('.skeleton, [aria-busy=true]')")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    return [f"{each['id']}: {each['nodes'][0]['html'][:120]}" for each in found["violations"]]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_on_any_tab(visit: Visit, theme: str) -> None:
    if not AXE.is_file():
        pytest.skip("axe-core is not here: run `npm ci --ignore-scripts` in web/")
    page = visit(color_scheme=theme, reduced_motion="reduce")
    for key, tab in enumerate(TABS, start=1):
        page.keyboard.press(str(key))
        assert axe(page) == [], tab


def test_on_a_phone_a_button_beside_the_name_leads_to_all_images(visit: Visit) -> None:
    page = visit("?tab=heads")
    button = page.get_by_role("button", name="All images, below")
    expect(button).to_be_hidden()
    page.set_viewport_size({"width": 390, "height": 844})
    images = page.locator("[data-view=images]")
    page.wait_for_function("() => !document.querySelector('.skeleton, [aria-busy=true]')")
    expect(images).not_to_be_in_viewport()
    button.click()
    expect(images).to_be_in_viewport(ratio=0.5)


@pytest.mark.parametrize(
    "size", [(390, 844), (900, 1000), (1280, 720), (1920, 1080), (3840, 2160)], ids=lambda size: f"{size[0]}x{size[1]}"
)
def test_every_tab_fits_every_screen(visit: Visit, size: tuple[int, int]) -> None:
    page = visit("?tab=heads&scope=image", viewport={"width": size[0], "height": size[1]})
    for key, tab in enumerate(TABS, start=1):
        page.keyboard.press(str(key))
        page.wait_for_function("() => !document.querySelector('.skeleton')")
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0], tab
        if size[0] >= 1280:
            assert page.evaluate("document.documentElement.scrollHeight") <= size[1], tab
        spilling = page.evaluate(
            """() => [...document.querySelectorAll(".view")].filter((view) => [...view.querySelectorAll("svg.chart")]
                .some((chart) => chart.getBoundingClientRect().right > view.getBoundingClientRect().right + 1))
                .map((view) => view.dataset.view)"""
        )
        assert spilling == [], tab
        hero = page.locator("#photograph .hero")
        if tab != "findings" and size[0] == 1280:
            width = hero.bounding_box()
            assert width is not None
            assert width["width"] >= 400
    columns = page.evaluate(
        "new Set([...document.querySelectorAll('main > *')].map((s) => s.getBoundingClientRect().left)).size"
    )
    assert (columns == 1) == (size[0] == 390)


def test_every_control_is_within_twelve_tab_stops_and_focus_is_visible(visit: Visit) -> None:
    page = visit("?tab=heads")
    page.wait_for_function("() => !document.querySelector('.skeleton')")
    page.evaluate("document.body.focus()")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the second link skips to the evidence
    assert page.evaluate("document.activeElement.id") == "evidence"
    page.keyboard.press("Tab")
    assert page.evaluate("!!document.activeElement.closest('[data-view=grid]')")


def test_the_theme_button_turns_the_page_dark_and_it_is_remembered(visit: Visit) -> None:
    page = visit(color_scheme="light")
    shade = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(shade)
    page.get_by_label("Light or dark").click()
    after = page.evaluate(shade)
    assert before != after
    page.reload()
    page.wait_for_selector("[data-view=images] [data-image]")
    assert page.evaluate(shade) == after


def test_a_model_without_classifier_or_with_fewer_heads_in_some_layers_opens(
    visit: Visit, serving: Callable[..., str], tmp_path: Path
) -> None:
    counts = (1, 2, *[3] * (N_LAYERS - 2))
    study = write_study(tmp_path, 24, classifier=False, n_heads=counts)
    page = visit("?tab=heads&layer=0&head=0", url=serving(create_app(study, PlantedLive())))
    expect(page.locator("[data-view=grid] rect[data-head]")).to_have_count(sum(counts))
    expect(page.locator("[data-view=spread] circle[data-head]")).to_have_count(sum(counts))
    expect(page.locator(cell("L0H1"))).to_have_count(0)
    expect(page.locator("[data-view=regions][data-missing]")).to_contain_text("switched off")
    page.keyboard.press("ArrowRight")
    expect(chosen_head(page)).to_have_text("L1H0")  # layer 0 has one head only
    page.wait_for_selector("#photograph .hero svg[data-overlay=weights]")
    page.get_by_role("button", name="this image").first.click()
    page.wait_for_selector("[data-view=trend] circle[data-step='0']")


def test_the_overlay_fades_to_the_photograph_in_its_colours_and_the_link_keeps_it(visit: Visit) -> None:
    page = visit("?tab=heads&image=4&layer=2&head=1")
    picture, canvas = (page.locator(f"#photograph .hero .photograph > {each}") for each in ("img", "canvas"))
    expect(picture).to_have_css("filter", re.compile("grayscale"))
    expect(canvas).to_have_css("opacity", "1")
    page.get_by_label("overlay", exact=True).fill("40")
    expect(canvas).to_have_css("opacity", "0.4")
    again = visit(page.url.split("/", 3)[3])
    expect(again.locator("#photograph .hero .photograph > canvas")).to_have_css("opacity", "0.4")
    again.get_by_label("overlay", exact=True).fill("0")
    expect(again.locator("#photograph .hero .photograph > img")).to_have_css("filter", "none")
    expect(again.locator("#photograph .hero .photograph > canvas")).to_have_css("opacity", "0")


def test_the_list_of_images_begins_with_a_whole_row(visit: Visit) -> None:
    page = visit(f"?image={N_IMAGES - 1}")
    pane, first = page.get_by_role("listbox"), page.locator("[data-view=images] .thumb").first
    expect(page.locator(f"#image-{N_IMAGES - 1}")).to_be_in_viewport()
    rows = pane.evaluate("each => each.scrollTop") / (first.evaluate("each => each.offsetHeight") + 3)
    lowest = pane.evaluate("each => each.scrollHeight - each.clientHeight - each.scrollTop")
    assert abs(rows - round(rows)) < 0.1 or lowest < 2


@pytest.mark.parametrize("tab", TABS)
def test_charts_without_room_draw_nothing_wrong(visit: Visit, tab: str) -> None:
    page = visit(f"?tab={tab}&image=4&layer=2&head=1")
    page.wait_for_function("() => !document.querySelector('.skeleton')")
    assert drawn_without_room(page) == []
