"""View A, which images are worth looking at, and H, an image of one's own."""

import io
import re

import numpy as np
from PIL import Image
from playwright.sync_api import expect
from served import N_IMAGES, Site, Visit, becomes, cell, held, n_selected

# --- A: images ---


def test_a_counts_the_images_and_names_the_study(visit: Visit, site: Site) -> None:
    page = visit()
    expect(n_selected(page)).to_have_text(str(N_IMAGES))
    expect(page.locator("h1")).to_have_text("vitrail:photos")
    right = float((site.dataset.prediction == site.dataset.label).mean())
    expect(page.locator("header .about")).to_contain_text(f"top-1 {100 * right:.1f} %")


def test_a_click_in_the_grid_chooses_the_image_everywhere(visit: Visit, site: Site) -> None:
    page = visit("?scope=image&layer=1&head=1&image=0")
    page.locator("[data-view=A] button[data-image='5']").click()
    expect(page.locator("[data-view=A] circle.chosen")).to_have_attribute("data-image", "5")
    assert held(page, "image") == "5"
    expected = float(site.dataset.head_probability[5, 1, 1])
    expect(page.locator(cell("L1H1"))).to_have_attribute("data-value", re.compile(re.escape(f"{expected:.5f}"[:6])))
    label = int(site.dataset.label[5])
    expect(page.locator("header .now")).to_contain_text(site.dataset.attrs["class_names"][label])


def test_a_filter_selects_the_wrong_images_and_views_b_and_c_follow(visit: Visit, site: Site) -> None:
    page = visit("?scope=set&layer=2&head=0")
    wrong = np.flatnonzero((site.dataset.prediction != site.dataset.label).values)
    assert 0 < len(wrong) < N_IMAGES
    page.get_by_role("button", name="wrong", exact=True).click()
    expect(n_selected(page)).to_have_text(str(len(wrong)))
    expected = site.dataset.head_probability.values[wrong].mean(axis=0)
    becomes(page, cell("L2H0"), float(expected[2, 0]), 1e-5)
    assert held(page, "brush") == "wrong"
    page.keyboard.press("Escape")
    expect(n_selected(page)).to_have_text(str(N_IMAGES))


def test_a_filter_finds_images_that_a_head_matters_for(visit: Visit, site: Site) -> None:
    drop = site.dataset.probability.values - site.dataset.head_probability.values[:, 1, 1]
    page = visit("?brush=drop:L1H1:0.05")
    expect(n_selected(page)).to_have_text(str(int((drop > 0.05).sum())))
    expect(page.get_by_label("selection", exact=True)).to_contain_text("without L1H1, p falls by > 0.05")


def test_a_stroke_around_dots_selects_them_and_comes_back_from_the_link(visit: Visit) -> None:
    page = visit()
    box = page.locator("[data-view=A] svg[role=img]").first.bounding_box()
    assert box
    left, top, right, bottom = box["x"] + 1, box["y"] + 1, box["x"] + box["width"] / 2, box["y"] + box["height"] - 1
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom), (left, top + 9)):
        page.mouse.move(x, y, steps=6)
    page.mouse.up()
    page.wait_for_function(f"() => +document.querySelector('[data-view=A] [aria-live] b').textContent < {N_IMAGES}")
    chosen = int(n_selected(page).inner_text())
    assert 0 < chosen < N_IMAGES
    assert held(page, "brush").startswith("lasso:")
    again = visit(page.url.split("/", 3)[3])
    expect(n_selected(again)).to_have_text(str(chosen))


def test_a_search_by_label_and_by_id(visit: Visit, site: Site) -> None:
    page = visit()
    page.keyboard.press("/")
    search = page.get_by_label("Search images by label or id")
    expect(search).to_be_focused()
    names = site.dataset.attrs["class_names"]
    page.keyboard.type("cof")
    coffee = int((site.dataset.label == names.index("coffee")).sum())
    by_id = sum("cof" in str(name) for name in site.dataset.image.values)
    expect(n_selected(page)).to_have_text(str(max(coffee, by_id)))
    page.keyboard.press("Enter")
    assert int(site.dataset.label[int(held(page, "image"))]) == names.index("coffee")
    expect(search).to_have_value("cof")  # the field made the change and keeps it


def test_a_orders_the_grid_by_what_the_head_does(visit: Visit, site: Site) -> None:
    page = visit("?layer=1&head=1")
    page.get_by_label("order of the images").select_option("low")
    least = int(np.argmin(site.dataset.head_probability.values[:, 1, 1]))
    page.wait_for_function(
        "least => document.querySelector('[data-view=A] .grid button').dataset.image === String(least)", arg=least
    )


def test_a_draws_a_dot_where_the_map_has_an_image(visit: Visit, site: Site) -> None:
    page = visit("?image=7&colour=label")
    ring = page.locator("[data-view=A] circle.chosen")
    canvas = page.locator("[data-view=A] canvas")
    shade = canvas.evaluate(
        """(canvas, at) => {
            const [x, y] = at.map((part) => Math.round(part * devicePixelRatio));
            return Array.from(canvas.getContext("2d").getImageData(x, y, 1, 1).data);
        }""",
        [float(ring.get_attribute("cx") or 0), float(ring.get_attribute("cy") or 0)],
    )
    assert shade[3] > 0


# --- H: own image ---


def png(size: tuple[int, int] = (96, 80)) -> bytes:
    rng = np.random.default_rng(5)
    held = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(held, "PNG")
    return held.getvalue()


def test_h_own_image_is_computed_live_and_placed_on_the_map(visit: Visit, site: Site) -> None:
    page = visit("?layer=1&head=1&scope=set")
    page.get_by_label("Your own image").set_input_files({"name": "mine.png", "mimeType": "image/png", "buffer": png()})
    expect(page.locator("header .now")).to_contain_text("your image", timeout=20_000)
    assert re.fullmatch("u[0-9a-f]{16}", held(page, "image"))
    expect(page.locator("[data-view=A] circle.chosen")).to_have_count(1)
    looked = site.live.look(Image.open(io.BytesIO(png())).convert("RGB"))
    expected = float(np.asarray(looked["head_probability"])[1, 1])
    becomes(page, cell("L1H1"), expected, 1e-4)
    entropy = np.asarray(looked["strength_entropy"])[1, 1]
    becomes(page, "[data-view=C3] line[data-here]", float(entropy), 1e-3, "here")
    page.wait_for_selector("[data-map=looks] rect[data-weight]")


def test_h_dropping_a_file_looks_at_it(visit: Visit) -> None:
    page = visit()
    page.evaluate(
        """bytes => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "mine.png", { type: "image/png" }));
            window.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        list(png()),
    )
    expect(page.locator("header .now")).to_contain_text("your image", timeout=20_000)


def test_h_a_file_that_is_no_image_gets_a_sentence_and_the_page_goes_on(visit: Visit) -> None:
    page = visit(allow_errors=True)
    page.get_by_label("Your own image").set_input_files(
        {"name": "mine.png", "mimeType": "image/png", "buffer": b"not an image"}
    )
    expect(page.get_by_role("alert")).to_contain_text("not an image")
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("alert")).to_have_count(0)
    assert held(page, "image") == "0"
