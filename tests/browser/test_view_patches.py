"""Views D2 and D5: which patches a head joins."""

from pathlib import Path

import numpy as np
from numpy.testing import assert_allclose
from playwright.sync_api import expect
from served import Site, Visit, becomes, held, photograph, value

# --- D: patches ---


def test_d2_shows_where_a_patch_looks_and_who_looks_at_it(visit: Visit, site: Site, study: Path) -> None:
    page = visit("?image=4&layer=2&head=1&token=20")
    page.wait_for_selector("[data-map=looks] rect[data-weight]")
    weights = np.asarray(site.live.attention(photograph(study, 4), 2))[1]
    for patch in (0, 19, 40, 63):
        assert_allclose(
            value(page, f"[data-map=looks] rect[data-patch='{patch}']", "data-weight"),
            weights[20, 1 + patch],
            rtol=1e-4,
        )
        assert_allclose(
            value(page, f"[data-map=seen] rect[data-patch='{patch}']", "data-weight"), weights[1 + patch, 20], rtol=1e-4
        )
    expect(page.locator("[data-map=looks] [data-query]")).to_have_attribute("data-query", "19")


def test_d2_click_and_arrow_keys_move_the_query_patch(visit: Visit) -> None:
    page = visit("?image=4&layer=2&head=1&token=20")
    page.locator("[data-map=looks] rect[data-patch='10']").click()
    assert held(page, "token") == "11"
    photograph = page.locator("[data-map=looks] svg")
    photograph.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(page.locator("[data-map=seen] [data-query]")).to_have_attribute("data-query", str(10 + 8 + 1))
    assert (held(page, "layer"), held(page, "head")) == ("2", "1")  # the heads' arrows rest meanwhile


def test_d2_takes_the_class_token_as_query(visit: Visit, site: Site, study: Path) -> None:
    page = visit("?image=4&layer=5&head=0&token=20")
    page.get_by_role("button", name="class token").click()
    weights = np.asarray(site.live.attention(photograph(study, 4), 5))[0]
    becomes(page, '[data-map=looks] rect[data-patch="30"]', float(weights[0, 31]), 1e-5, "weight")
    assert held(page, "token") == "0"
    expect(page.locator("[data-map=looks] [data-query]")).to_have_count(0)


def test_d5_keeps_exactly_the_share_of_cells_that_the_threshold_says(visit: Visit, site: Site, study: Path) -> None:
    page = visit("?image=4&layer=2&head=1&token=20&threshold=0.1")
    page.wait_for_selector("[data-view=D5] rect[data-bin]")
    weights = np.asarray(site.live.attention(photograph(study, 4), 2))[1]
    n = int(0.1 * weights.size)
    expect(page.locator("[data-view=D5] .reading")).to_contain_text(f"{n} cells are kept")
    cut = np.sort(weights.ravel())[-n]
    shown = page.locator("[data-map=looks] rect.strong").count()
    assert shown == int((weights[20, 1:] >= cut).sum())
    bars = page.locator("[data-view=D5] rect[data-bin]").all()
    assert sum(int(bar.get_attribute("data-count") or 0) for bar in bars) == weights.size


def test_d5_click_and_slider_set_the_threshold_of_d2(visit: Visit) -> None:
    page = visit("?image=4&layer=2&head=1&token=20")
    page.wait_for_selector("[data-view=D5] rect[data-bin]")
    page.locator("[data-view=D5] rect.hit").nth(5).click(force=True)
    assert float(held(page, "threshold")) > 0.5
    few = page.locator("[data-map=looks] rect.strong").count()
    page.get_by_label("strongest").focus()
    page.keyboard.press("Home")
    page.wait_for_function("() => +new URLSearchParams(location.search).get('threshold') === 0.0001")
    assert page.locator("[data-map=looks] rect.strong").count() < few
