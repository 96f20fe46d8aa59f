"""The tab of patterns: every head by name, the numbers behind it, and its whole map."""

import numpy as np
from numpy.testing import assert_allclose
from playwright.sync_api import expect
from served import Site, Visit, chosen_head, held, photograph, value

from vitrail.patterns.names import RULES, name_pattern
from vitrail.patterns.tables import all_patterns

GRID = (8, 8)


def test_every_head_is_named_and_choosing_one_says_why(visit: Visit, site: Site) -> None:
    page = visit("?tab=patterns&image=4&layer=2&head=0&scope=set")
    page.wait_for_selector("[data-view=classes] rect[data-head]")
    named = all_patterns(site.dataset)
    for name in {each.naming.name for each in named}:
        n = sum(each.naming.name == name for each in named)
        assert value(page, f"[data-view=classes] li[data-pattern='{name}']") == n
    chosen = next(each for each in named if (each.layer, each.head) == (4, 2))
    page.locator("[data-view=classes] rect[data-head=L4H2]").click()
    expect(chosen_head(page)).to_have_text("L4H2")
    expect(page.locator("[data-view=classes] [data-here]")).to_contain_text(chosen.naming.rule)
    mean = float(site.dataset.pattern_rule.values[:, 4, 2, RULES.index("local")].mean())
    page.wait_for_function(
        "wanted => Math.abs(document.querySelector(\"[data-view=rules] [data-bar='within 2 patches']\").dataset.value"
        " - wanted) < 1e-5",
        arg=mean,
    )
    page.locator("[data-view=classes]").get_by_role("button", name="this image").click()
    one = name_pattern(site.dataset.pattern_rule.values[4, 4, 2], GRID)
    expect(page.locator("[data-view=classes] [data-here]")).to_contain_text(one.rule)


def test_the_whole_map_is_the_attention_of_the_chosen_head_and_chooses_a_token(visit: Visit, site: Site, study) -> None:
    page = visit("?tab=patterns&image=4&layer=3&head=1&token=20")
    page.wait_for_selector("[data-view=map] canvas")
    weights = np.sort(np.asarray(site.live.attention(photograph(study, 4), 3))[1].ravel())[::-1]
    strongest = weights[: len(weights) // 100].sum() / 65
    assert_allclose(value(page, "[data-view=map] [data-share]", "data-share"), strongest, rtol=1e-4)
    drawn = page.locator("[data-view=map] [role=img]")
    box = drawn.bounding_box()
    assert box
    n_places = 66  # the class token is drawn twice
    drawn.click(position={"x": box["width"] * 0.5, "y": box["height"] * (31 + 1 + 0.5) / n_places})
    assert held(page, "token") == "31"


def test_links_are_the_strongest_cells_and_follow_the_threshold_and_the_token(visit: Visit, site: Site, study) -> None:
    page = visit("?tab=patterns&image=4&layer=3&head=1&token=20")
    links = page.locator("[data-view=links] svg[data-links]")
    expect(links).to_have_attribute("data-links", str(65 * 65 // 100))
    weights = np.asarray(site.live.attention(photograph(study, 4), 3))[1]
    strong = np.zeros(weights.size, bool)
    strong[np.argsort(weights.ravel())[-(65 * 65 // 100) :]] = True
    query, key = np.divmod(np.flatnonzero(strong), 65)
    own = ((query == 20) | (key == 20)).sum()
    expect(page.locator("[data-view=links] path.own")).to_have_attribute("data-own", str(own))
    page.locator("[data-view=links] input[type=range]").fill("100")
    expect(links).to_have_attribute("data-links", str(65 * 65 * 5 // 100))
    assert held(page, "threshold") == "0.05"
    drawn = links.bounding_box()
    assert drawn
    links.click(position={"x": drawn["width"] - 9, "y": drawn["height"] / 2})
    assert held(page, "token") == "64"


def test_groups_of_maps_say_what_adds_them(visit: Visit) -> None:
    page = visit("?tab=patterns")
    missing = page.locator("[data-missing]")
    expect(missing).to_have_count(2)
    expect(missing.first).to_contain_text("--measures patterns")
    expect(missing.last).to_contain_text("The command under")
