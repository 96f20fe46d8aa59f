"""Heads off, patches painted over, windows moved: the answer of the model, its drift and what to run elsewhere."""

import re

from playwright.sync_api import Page, Route, expect
from served import N_IMAGES, Site, Visit, chosen_head, held, photograph, value

IMAGE = 7


def answered(page: Page, n_steps: int) -> None:
    expect(page.locator("[data-view=answer] tbody tr")).to_have_count(n_steps)


def test_a_head_is_switched_off_and_the_answer_is_that_of_the_library(visit: Visit, site: Site, study) -> None:
    page = visit(f"?tab=what-if&image={IMAGE}&layer=1&head=0")
    expect(page.locator("[data-view=answer]")).to_contain_text("the answer comes here")
    page.locator("[data-view=change] rect[data-head=L2H1]").click()
    expect(chosen_head(page)).to_have_text("L2H1")
    answered(page, 2)
    changed = site.live.what_if(photograph(study, IMAGE), heads_off="L2H1")
    after = value(page, '[data-view=answer] [data-step="L2H1 off"] >> nth=0')
    assert abs(after - float(changed["probability"][-1])) < 1e-5
    drift = value(page, "[data-view=drift] circle[data-step='3']")
    assert abs(drift - float(changed["token_drift"][-1, 3].mean())) < 1e-5
    expect(page.locator("[data-use]")).to_have_text(
        re.compile(r"^vitrail prune /\S+/crops --heads L2H1 --out NEW_FOLDER$")
    )
    lost = site.dataset.probability.values - site.dataset.head_probability.values[:, 2, 1]
    expect(page.locator("[data-study]")).to_contain_text(f"loses {lost.mean():.3f}")
    expect(page.locator("[data-view=change] [data-off=L2H1]")).to_have_text("off")
    expect(page.locator("[data-view=change] [data-answer]")).to_contain_text("This image:")
    expect(page.locator("[data-costs-of]")).to_contain_text(f"mean over all {N_IMAGES} images")
    # a second head adds a step; a change is taken back by its own button; the back button brings it again
    page.locator("[data-view=change] rect[data-head=L3H0]").click()
    answered(page, 3)
    page.get_by_role("button", name="Take back: L2H1 off").click()
    answered(page, 2)
    assert held(page, "change") == "L3H0"


def test_patches_are_painted_on_the_photograph(visit: Visit, site: Site, study) -> None:
    page = visit(f"?tab=what-if&image={IMAGE}&change=black")
    photo = page.locator("#photograph .hero svg")
    expect(photo).to_have_attribute("data-overlay", "weights")
    box = photo.bounding_box()
    assert box

    def over(row: int, column: int) -> None:
        page.mouse.move(box["x"] + box["width"] * (column + 0.5) / 8, box["y"] + box["height"] * (row + 0.5) / 8)

    over(2, 1)
    page.mouse.down()
    over(2, 2)
    over(2, 3)
    page.mouse.up()
    expect(page.locator("#photograph .hero [data-cover]")).to_have_count(3)
    answered(page, 2)
    changed = site.live.what_if(photograph(study, IMAGE), patches=[17, 18, 19], how="black")
    row = page.locator("[data-view=answer] tbody tr").last.locator("[data-value]").first
    assert abs(float(row.get_attribute("data-value") or "nan") - float(changed["probability"][-1])) < 1e-5
    expect(page.locator("[data-use]")).to_contain_text("patches=[17, 18, 19], how='black'")
    over(2, 2)  # a stroke that begins on a changed patch changes it back
    page.mouse.down()
    page.mouse.up()
    expect(page.locator("#photograph .hero [data-cover]")).to_have_count(2)


def test_the_side_of_a_window_is_dragged_on_the_photograph(visit: Visit, site: Site, study) -> None:
    patch, n_prefix = 3 * 8 + 3, 1
    link = f"?tab=what-if&image={IMAGE}&layer=2&head=0&token={n_prefix + patch}"
    page = visit(f"{link}&change=window:L2H0:all:2,2,2,2")
    expect(page.locator("[data-window]")).to_have_attribute("data-window", "2,2,2,2")
    answered(page, 2)
    photo = page.locator("#photograph .hero").bounding_box()
    handle = page.locator("[data-handle=right]").bounding_box()
    assert photo
    assert handle
    middle = (handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    assert abs(middle[0] - (photo["x"] + photo["width"] * 6 / 8)) < 1.5  # behind column 5, two right of column 3
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(photo["x"] + photo["width"] * 8 / 8, middle[1], steps=4)
    page.mouse.up()
    expect(page.locator("[data-window]")).to_have_attribute("data-window", "2,2,4,2")
    assert held(page, "change") == "window:L2H0:all:2,2,4,2"
    expect(page.locator("[data-view=change] .sides input").nth(2)).to_have_value("4")
    changed = site.live.what_if(photograph(study, IMAGE), windows=[(2, (2, 2, 4, 2), 0)])
    page.wait_for_function(
        "expected => Math.abs([...document.querySelectorAll('[data-view=answer] tbody tr')].at(-1)"
        "?.querySelector('[data-value]')?.dataset.value - expected) < 1e-5",
        arg=float(changed["probability"][-1]),
    )
    expect(page.locator("#photograph .hero [data-cover]")).to_have_count(0)  # a handle paints no patches


def test_what_is_awaited_can_be_cancelled_and_asked_again(visit: Visit) -> None:
    page = visit(f"?tab=what-if&image={IMAGE}&layer=2&head=0")
    stalled: list[Route] = []
    page.route("**/api/what_if", lambda route: stalled.append(route))
    page.locator("[data-view=change] rect[data-head=L2H1]").click()
    view = page.locator("[data-view=answer]")
    expect(view.get_by_role("button", name="cancel", exact=True)).to_be_visible()
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/api/what_if")):
        page.locator("#evidence button.cancel").evaluate_all("all => all.forEach((one) => one.click())")
    expect(view.locator("[role=status]")).to_contain_text("Cancelled.")
    page.unroute("**/api/what_if")
    view.get_by_role("button", name="Ask again").click()
    answered(page, 2)
    expect(view.locator("[role=status]")).to_have_count(0)
    assert stalled


def test_a_link_brings_back_the_change_and_names_what_is_gone(visit: Visit) -> None:
    page = visit("?tab=what-if&layer=2&head=0&change=L2H0:4~window:L1H0:all:1,1,1,1~L99H0")
    expect(page.locator("[data-view=change] [role=alert]")).to_contain_text("L99H0")
    answered(page, 3)
    expect(page.locator("[data-use]")).to_contain_text("windows=")
    # the pointer asks nothing: the map under the change is there for every patch
    expect(page.locator("select.overlay")).to_have_value("changed-looks")
    page.locator("select.overlay").select_option("changed-tokens")
    expect(page.locator("#photograph [data-floor]")).to_have_attribute("data-floor", "0")


def test_without_a_model_the_tab_says_so_once(visit: Visit, study, serving) -> None:
    from vitrail.app import create_app

    page = visit("?tab=what-if", url=serving(create_app(study)))
    expect(page.locator("[data-missing]")).to_have_count(1)
