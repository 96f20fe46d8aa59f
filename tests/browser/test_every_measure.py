"""Every stored measure of every registered analysis is reachable on the page, and draws."""

import pytest
from numpy.testing import assert_allclose
from playwright.sync_api import expect
from served import Site, Visit, held, value

from vitrail.analysis import analyses

TABS = ("findings", "heads", "patterns", "patches", "tokens")


def test_the_tabs_together_offer_every_stored_measure_once(visit: Visit, site: Site) -> None:
    page = visit()
    offered: list[str] = []
    for key, tab in enumerate(TABS, start=1):
        page.keyboard.press(str(key))
        page.wait_for_selector(f"#evidence[aria-labelledby=tab-{TABS[key - 1]}][aria-busy=false] > section")
        if page.locator(f"[data-view=every-{tab}]").count():
            choice = page.locator(f"[data-view=every-{tab}]").get_by_label("Measure", exact=True)
            names = choice.locator("option").evaluate_all("all => all.map((one) => one.value)")
            for name in names:
                choice.select_option(name)
                page.wait_for_selector(f"[data-measure={name}] [data-value]")
                expect(page.locator(f"[data-view=every-{tab}] [role=alert]")).to_have_count(0)
            offered += names
    declared = [name for analysis in analyses().values() for name in analysis.measure_names]
    assert sorted(offered) == sorted(name for name in declared if name in site.dataset.data_vars)


def test_a_measure_with_more_dimensions_has_a_slider_for_each(visit: Visit, site: Site) -> None:
    page = visit("?tab=heads&image=3&scope=image&measure=attention_strength")
    page.get_by_label("hop of the measure").fill("2")
    shown = value(page, "[data-view=every-heads] rect[data-head=L3H1]")
    assert_allclose(shown, site.dataset.attention_strength.values[3, 3, 1, 2], rtol=1e-5)


def test_a_measure_of_patches_is_a_line_over_layers_and_goes_over_the_photograph(visit: Visit, site: Site) -> None:
    page = visit("?tab=patches&image=4&layer=2&measure=field_size")
    page.wait_for_selector("[data-measure=field_size] circle[data-step]")
    for layer, mean in enumerate(site.dataset.field_size.values[4].mean(axis=1)):
        assert_allclose(value(page, f"[data-measure=field_size] circle[data-step='{layer}']"), mean, rtol=1e-5)
    page.get_by_role("button", name="draw it over the photograph").click()
    assert held(page, "overlay") == "field_size"
    expect(page.locator("#photograph .hero svg")).to_have_attribute("data-overlay", "weights")


@pytest.mark.parametrize("tab", ["tokens"])
def test_a_tab_whose_measures_are_missing_says_what_adds_them(visit: Visit, tab: str) -> None:
    page = visit(f"?tab={tab}")
    expect(page.locator("#evidence [data-missing]").first).to_contain_text(f"--measures {tab}")
