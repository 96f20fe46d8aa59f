"""The tab of heads: the right value for a known cell, and what each view hears and tells."""

import csv
import io
import re
from pathlib import Path

import numpy as np
from numpy.testing import assert_allclose
from PIL import Image
from playwright.sync_api import expect
from served import N_IMAGES, Site, Visit, becomes, cell, chosen_head, held, n_selected, photograph, value

from vitrail.app.summary import summarise


def losses(site: Site) -> np.ndarray:
    return site.dataset.probability.values[:, None, None] - site.dataset.head_probability.values


def test_the_grid_shows_what_one_image_loses_without_each_head(visit: Visit, site: Site) -> None:
    page = visit("?tab=heads&image=3&scope=image")
    page.wait_for_selector(cell("L0H0"))
    expected = losses(site)[3]
    for layer, head in np.ndindex(expected.shape):
        assert_allclose(value(page, cell(f"L{layer}H{head}")), expected[layer, head], atol=1e-6)


def test_the_grid_shows_the_mean_over_images_faint_where_the_interval_holds_zero(visit: Visit, site: Site) -> None:
    page = visit("?tab=heads&layer=4&head=1")
    page.wait_for_selector(cell("L4H1"))
    statistics = summarise(losses(site).astype(np.float32), limits=(-1.0, 1.0)).values
    mean, low, high = statistics[:3]
    for layer, head in np.ndindex(mean.shape):
        shown = page.locator(cell(f"L{layer}H{head}"))
        assert_allclose(float(shown.get_attribute("data-value") or 0), mean[layer, head], atol=1e-6)
        holds_zero = not (low[layer, head] > 0 or high[layer, head] < 0)
        assert shown.get_attribute("data-uncertain") == str(holds_zero).lower()
        stem = page.locator(f"[data-view=certainty] circle[data-head=L{layer}H{head}]")
        assert_allclose(float(stem.get_attribute("data-low") or 0), low[layer, head], atol=1e-6)
        assert_allclose(float(stem.get_attribute("data-high") or 0), high[layer, head], atol=1e-6)
    sure = int((low > 0).sum())
    expect(page.locator("[data-view=certainty] .reading")).to_contain_text(
        f"{sure} of {mean.size} heads cost something"
    )


def test_small_maps_are_the_attention_of_the_class_token(visit: Visit, site: Site, study: Path) -> None:
    page = visit("?tab=heads&image=4&scope=image&own=yes")
    page.wait_for_selector("[data-view=grid] image")
    weights = np.asarray(site.live.attention(photograph(study, 4), 2))[1, 0, 1:]
    alpha = page.evaluate(
        """async () => {
            const cells = [...document.querySelectorAll("[data-view=grid] g.cell")];
            const found = cells.find((cell) => cell.querySelector("[data-head=L2H1]"));
            const picture = new Image();
            picture.src = found.querySelector("image").getAttribute("href");
            await picture.decode();
            const canvas = new OffscreenCanvas(8, 8);
            const context = canvas.getContext("2d");
            context.drawImage(picture, 0, 0);
            return Array.from(context.getImageData(0, 0, 8, 8).data).filter((_, i) => i % 4 === 3);
        }"""
    )
    assert int(np.argmax(alpha)) == int(np.argmax(weights))
    shares = weights / weights.sum()  # what falls on patches, so that the class token's own share leaves none pale
    assert ((np.array(alpha) > 0) == (shares > 1 / 64 + 2e-4)).mean() > 0.95
    page.get_by_role("button", name="numbers").click()
    expect(page.locator("[data-view=grid] image")).to_have_count(0)


def test_a_head_chosen_in_any_view_is_chosen_everywhere(visit: Visit) -> None:
    page = visit("?tab=heads&layer=0&head=0&image=2")
    page.locator(cell("L5H2")).click()
    expect(chosen_head(page)).to_have_text("L5H2")
    expect(page.locator("[data-view=certainty] .here-text")).to_contain_text("L5H2")
    expect(page.locator("[data-view=regions] svg.chart").first).to_have_attribute("aria-label", re.compile("L5H2"))
    page.locator("[data-view=spread] circle[data-head=L4H2]").click(force=True)
    page.wait_for_function("() => new URLSearchParams(location.search).get('layer') === '4'")
    page.get_by_label("Layer", exact=True).select_option("1")
    assert held(page, "layer") == "1"


def test_a_measure_is_chosen_from_those_of_heads_and_colours_the_spread(visit: Visit, site: Site) -> None:
    page = visit("?tab=heads&scope=image&image=1")
    choice = page.get_by_label("Measure of heads")
    choice.select_option("attention_distance")
    becomes(page, cell("L3H0"), float(site.dataset.attention_distance[1, 3, 0]), 1e-4)
    expect(page.locator("[data-view=spread] .reading")).to_contain_text("mean attention distance")
    offered = choice.locator("option").evaluate_all("all => all.map((one) => one.value)")
    assert "head_prediction" not in offered
    assert {"head_probability", "strength_entropy", "prefix_share"} <= set(offered)


def test_regions_are_the_probability_in_each_mode_with_the_classes_before_and_after(
    visit: Visit, site: Site, study: Path
) -> None:
    page = visit("?tab=heads&image=4&layer=5&head=1&mode=3")
    page.wait_for_selector("[data-view=regions] rect[data-mode]")
    label = int(site.dataset.label[4])
    modes = np.asarray(site.live.modes(photograph(study, 4), 5, 1))
    for mode in range(1, 7):
        assert_allclose(value(page, f"[data-view=regions] rect[data-mode='{mode}']"), modes[mode - 1, label], atol=1e-5)
    assert_allclose(modes[1, label], float(site.dataset.head_probability[4, 5, 1]), atol=1e-4)
    page.locator("[data-view=regions] rect.hit").nth(3).click()
    assert held(page, "mode") == "4"
    best = int(modes[0].argmax())
    group = f"[data-view=regions] g[data-class='{best}']"
    assert_allclose(value(page, group, "data-before"), modes[0, best], atol=1e-5)
    assert_allclose(value(page, group, "data-after"), modes[3, best], atol=1e-5)
    shown = page.locator("[data-view=regions] g[data-class]").evaluate_all(
        "all => all.map((one) => +one.dataset.class)"
    )
    assert set(shown) == set(np.argsort(-modes[0])[:5]) | set(np.argsort(-modes[3])[:5])


def test_reach_and_spread_and_trend_show_this_image_or_the_mean_of_the_set(visit: Visit, site: Site) -> None:
    page = visit("?tab=heads&image=6&scope=image&layer=3&head=2")
    page.wait_for_selector("[data-view=reach] circle[data-step='0']")
    strength, entropy = site.dataset.attention_strength.values, site.dataset.strength_entropy.values
    for hop, expected in enumerate(strength[6, 3, 2]):
        assert_allclose(value(page, f"[data-view=reach] circle[data-step='{hop}']"), expected, rtol=1e-5)
    even = value(page, "[data-view=reach] line[data-reference]", "data-reference")
    assert_allclose(even, 1 / (1 + site.dataset.sizes["patch"]))
    dots = [float(dot.get_attribute("cy") or 0) for dot in page.locator("[data-view=reach] circle[data-step]").all()]
    logs = np.log(strength[6, 3, 2])  # a logarithmic axis: heights are a line of the logarithms
    assert_allclose(dots, np.polyval(np.polyfit(logs, dots, 1), logs), atol=0.01)
    for layer, head in np.ndindex(entropy.shape[1:]):
        shown = value(page, f"[data-view=spread] circle[data-head=L{layer}H{head}]")
        assert_allclose(shown, entropy[6, layer, head], atol=1e-6)
    for layer, mean in enumerate(entropy[6].mean(axis=1)):
        assert_allclose(value(page, f"[data-view=trend] circle[data-step='{layer}']"), mean, atol=1e-5)
    page.get_by_role("button", name="all images").first.click()
    becomes(page, '[data-view=reach] circle[data-step="2"]', float(strength[:, 3, 2].mean(axis=0)[2]), 1e-6)


def test_the_distribution_counts_every_image_and_a_bar_selects_its_images(visit: Visit, site: Site) -> None:
    page = visit("?tab=heads&image=6&layer=3&head=2")
    bars = page.locator("[data-view=distribution] rect[data-bin]")
    expect(bars).to_have_count(50)
    values = site.dataset.strength_entropy.values[:, 3, 2]
    counts = [int(bar.get_attribute("data-count") or -1) for bar in bars.all()]
    assert sum(counts) == N_IMAGES
    assert np.abs(np.array(counts) - np.histogram(values, bins=50)[0]).sum() <= 4  # an edge falls on either side
    assert_allclose(value(page, "[data-view=distribution] line[data-here]", "data-here"), values[6], atol=1e-6)
    most = int(np.argmax(counts))
    page.locator("[data-view=distribution] rect.hit").nth(most).click()
    expect(n_selected(page)).to_have_text(str(counts[most]))
    assert held(page, "brush").startswith("between:strength_entropy:L3H2:")


def test_views_export_svg_png_and_csv_of_what_is_seen(visit: Visit, site: Site) -> None:
    page = visit("?tab=heads&image=3&scope=image&layer=1&head=1")
    page.wait_for_selector("[data-view=grid] image")
    page.wait_for_function("() => !document.querySelector('.skeleton')")
    for view in ("grid", "certainty", "regions", "reach", "spread", "distribution", "trend", "every-heads"):
        files = {}
        page.locator(f"[data-view={view}] summary").click()
        for kind in ("SVG", "PNG", "CSV"):
            if kind != "SVG":
                page.locator(f"[data-view={view}] summary").click()
            with page.expect_download() as download:
                page.locator(f"[data-view={view}]").get_by_role("button", name=kind).click()
            assert download.value.suggested_filename == f"vitrail-{view}.{kind.lower()}"
            files[kind] = Path(download.value.path()).read_bytes()
        assert files["SVG"].startswith(b"<svg")
        assert b"light-dark" not in files["SVG"]
        picture = Image.open(io.BytesIO(files["PNG"])).convert("RGB")
        assert picture.width > 300
        assert len(picture.getcolors(2**24) or []) > 8, f"{view} exports an empty picture"
        rows = list(csv.DictReader(io.StringIO(files["CSV"].decode())))
        assert len(rows) >= 5
        if view == "grid":
            assert rows[4]["head"] == "L1H1"
            assert_allclose(float(rows[4]["head_probability_lost"]), losses(site)[3, 1, 1], atol=1e-6)
