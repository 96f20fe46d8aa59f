"""Views B and C: which heads matter, and why. The right value for a known cell, what each hears and tells."""

from pathlib import Path

import numpy as np
from numpy.testing import assert_allclose
from playwright.sync_api import expect
from served import N_IMAGES, Site, Visit, becomes, cell, held, n_selected, photograph, value

from vitrail.app.summary import summary

# --- B: heads ---


def test_b1_shows_the_value_of_every_head_for_one_image(visit: Visit, site: Site) -> None:
    page = visit("?image=3&scope=image&metric=head_loss_change")
    page.wait_for_selector(cell("L0H0"))
    expected = site.dataset.head_loss_change.values[3]
    for layer, head in np.ndindex(expected.shape):
        assert_allclose(value(page, cell(f"L{layer}H{head}")), expected[layer, head], atol=1e-6)


def test_b1_shows_the_mean_over_a_set_with_its_interval(visit: Visit, site: Site) -> None:
    page = visit("?scope=set&layer=4&head=1")
    page.wait_for_selector(cell("L4H1"))
    made = summary(site.dataset.head_probability.values).values[:, 4, 1]
    assert_allclose(value(page, cell("L4H1")), made[0], atol=1e-6)
    title = page.locator(cell("L4H1") + " title").text_content() or ""
    assert f"{made[1]:.3g}" in title
    assert f"{made[2]:.3g}" in title


def test_b1_line_starts_at_the_unpruned_model(visit: Visit, site: Site) -> None:
    page = visit("?image=3&scope=image&layer=2&head=2")
    unpruned = value(page, "[data-view=B1] circle.unpruned")
    assert_allclose(unpruned, float(site.dataset.probability[3]), atol=1e-6)
    assert_allclose(
        value(page, "[data-view=B1] circle[data-head=L2H2]"), float(site.dataset.head_probability[3, 2, 2]), atol=1e-6
    )


def test_b1_click_reaches_every_other_view(visit: Visit) -> None:
    page = visit("?layer=0&head=0&image=2&scope=image")
    page.locator(cell("L5H2")).click()
    for view in ("B2", "C2", "C3", "D2"):
        expect(page.locator(f"[data-view={view}] h3")).to_contain_text("L5H2")
    expect(page.locator("header .head")).to_have_text("L5H2")
    assert (held(page, "layer"), held(page, "head")) == ("5", "2")


def test_b1_metric_is_chosen_from_a_list_and_colours_c1(visit: Visit, site: Site) -> None:
    page = visit("?scope=image&image=1")
    page.get_by_label("Metric").select_option("attention_distance")
    page.wait_for_function("() => new URLSearchParams(location.search).get('metric') === 'attention_distance'")
    expected = float(site.dataset.attention_distance[1, 3, 0])
    becomes(page, cell("L3H0"), expected, 1e-4)
    expect(page.locator("[data-view=C1] .reading")).to_contain_text("mean attention distance")


def test_b2_bars_are_the_probability_in_each_region_mode(visit: Visit, site: Site, study: Path) -> None:
    page = visit("?image=4&layer=5&head=1&mode=3")
    page.wait_for_selector("[data-view=B2] rect[data-mode]")
    label = int(site.dataset.label[4])
    expected = np.asarray(site.live.modes(photograph(study, 4), 5, 1))[:, label]
    for mode in range(1, 7):
        assert_allclose(value(page, f"[data-view=B2] rect[data-mode='{mode}']"), expected[mode - 1], atol=1e-5)
    assert_allclose(value(page, "[data-view=B2] line[data-unpruned]", "data-unpruned"), expected[0], atol=1e-5)
    assert_allclose(expected[0], float(site.dataset.probability[4]), atol=1e-4)
    # Mode 2 prunes the whole head: what the study stored for it.
    assert_allclose(expected[1], float(site.dataset.head_probability[4, 5, 1]), atol=1e-4)


def test_b2_click_and_number_keys_choose_the_mode_for_b3(visit: Visit, site: Site, study: Path) -> None:
    page = visit("?image=4&layer=5&head=1&mode=2")
    page.wait_for_selector("[data-view=B3] g[data-class]")
    page.locator("[data-view=B2] rect.hit").nth(3).click()
    expect(page.locator("[data-view=B3] .reading")).to_contain_text("mode 4")
    modes = np.asarray(site.live.modes(photograph(study, 4), 5, 1))
    best = int(modes[0].argmax())
    group = f"[data-view=B3] g[data-class='{best}']"
    assert_allclose(value(page, group, "data-before"), modes[0, best], atol=1e-5)
    assert_allclose(value(page, group, "data-after"), modes[3, best], atol=1e-5)
    page.keyboard.press("2")
    expect(page.locator("[data-view=B3] .reading")).to_contain_text("mode 2")
    assert_allclose(value(page, group, "data-after"), modes[1, best], atol=1e-5)


def test_b3_shows_the_five_best_before_and_after(visit: Visit, site: Site, study: Path) -> None:
    page = visit("?image=9&layer=0&head=0&mode=2")
    page.wait_for_selector("[data-view=B3] g[data-class]")
    modes = np.asarray(site.live.modes(photograph(study, 9), 0, 0))
    shown = {
        int(group.get_attribute("data-class") or -1) for group in page.locator("[data-view=B3] g[data-class]").all()
    }
    assert shown == set(np.argsort(-modes[0])[:5]) | set(np.argsort(-modes[1])[:5])


# --- C: strength ---


def test_c1_has_a_dot_for_every_head(visit: Visit, site: Site) -> None:
    page = visit("?image=6&scope=image")
    page.wait_for_selector("[data-view=C1] circle[data-head=L0H0]")
    expected = site.dataset.strength_entropy.values[6]
    for layer, head in np.ndindex(expected.shape):
        shown = value(page, f"[data-view=C1] circle[data-head=L{layer}H{head}]")
        assert_allclose(shown, expected[layer, head], atol=1e-6)


def test_c1_click_chooses_the_head(visit: Visit) -> None:
    page = visit("?image=6&scope=image&layer=0&head=0")
    page.locator("[data-view=C1] circle[data-head=L4H2]").click(force=True)
    page.wait_for_function("() => new URLSearchParams(location.search).get('layer') === '4'")
    name = f"L4H{held(page, 'head')}"  # the nearest dot of that layer, if two lie on each other
    expect(page.locator("[data-view=B1] .chosen")).to_contain_text(name)


def test_c2_is_the_strength_over_hops_with_the_mean_of_the_set(visit: Visit, site: Site) -> None:
    page = visit("?image=6&scope=image&layer=3&head=2")
    page.wait_for_selector("[data-view=C2] circle[data-step='0']")
    expected = site.dataset.attention_strength.values[6, 3, 2]
    for hop, strength in enumerate(expected):
        assert_allclose(value(page, f"[data-view=C2] circle[data-step='{hop}']"), strength, rtol=1e-5)
    page.get_by_role("button", name="all images").click()
    mean = site.dataset.attention_strength.values[:, 3, 2].mean(axis=0)
    becomes(page, '[data-view=C2] circle[data-step="2"]', float(mean[2]), 1e-6, "value")


def test_c3_counts_every_image_in_50_bins_and_marks_this_one(visit: Visit, site: Site) -> None:
    page = visit("?image=6&layer=3&head=2")
    page.wait_for_selector("[data-view=C3] rect[data-bin]")
    values = site.dataset.strength_entropy.values[:, 3, 2]
    counts, _ = np.histogram(values, bins=50)
    shown = [int(bar.get_attribute("data-count") or -1) for bar in page.locator("[data-view=C3] rect[data-bin]").all()]
    assert len(shown) == 50
    assert sum(shown) == N_IMAGES
    assert np.abs(np.array(shown) - counts).sum() <= 4  # a value on an edge may fall on either side in float32
    assert_allclose(value(page, "[data-view=C3] line[data-here]", "data-here"), values[6], atol=1e-6)


def test_c3_bar_selects_its_images_in_a(visit: Visit) -> None:
    page = visit("?image=6&layer=3&head=2&scope=set")
    bars = page.locator("[data-view=C3] rect[data-bin]")
    expect(bars).to_have_count(50)
    counts = [int(bar.get_attribute("data-count") or 0) for bar in bars.all()]
    most = int(np.argmax(counts))
    page.locator("[data-view=C3] rect.hit").nth(most).click()
    expect(n_selected(page)).to_have_text(str(counts[most]))
    assert held(page, "brush").startswith("between:strength_entropy:L3H2:")


def test_c4_is_the_mean_over_heads_and_chooses_a_layer(visit: Visit, site: Site) -> None:
    page = visit("?image=6&scope=image&layer=1&head=1")
    page.wait_for_selector("[data-view=C4] circle[data-step='0']")
    expected = site.dataset.strength_entropy.values[6].mean(axis=1)
    for layer, mean in enumerate(expected):
        assert_allclose(value(page, f"[data-view=C4] circle[data-step='{layer}']"), mean, atol=1e-5)
    dot = page.locator("[data-view=C4] circle[data-step='5']")
    dot.scroll_into_view_if_needed()
    last = dot.bounding_box()
    assert last
    page.mouse.click(last["x"], last["y"])
    expect(page.locator("header .head")).to_have_text("L5H1")
