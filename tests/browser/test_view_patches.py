"""The tab of patches: what the study says of the chosen patch, and what the answer rests on."""

import numpy as np
from numpy.testing import assert_allclose
from playwright.sync_api import expect
from served import Site, Visit, becomes, held, photograph, value

CHOSEN, N_PREFIX = 19, 1
LINK = f"?tab=patches&image=4&layer=2&token={N_PREFIX + CHOSEN}"


def test_reach_is_of_the_chosen_patch_beside_the_same_place_in_all_images(visit: Visit, site: Site) -> None:
    page = visit(LINK)
    page.wait_for_selector("[data-view=field] circle[data-step]")
    page.get_by_label("Reach as").select_option("interaction_distance")
    assert held(page, "measure") == "interaction_distance"
    distance = site.dataset.interaction_distance.values
    expect(page.locator("[data-view=field] .reading")).to_contain_text("mean distance of interactions")
    page.wait_for_function(
        "wanted => Math.abs(document.querySelector(\"[data-view=field] circle[data-line='this patch']\")"
        ".dataset.value - wanted) < 1e-4",
        arg=float(distance[4, 0, CHOSEN]),
    )
    for layer in range(distance.shape[1]):
        at = f"[data-view=field] circle[data-step='{layer}']"
        assert_allclose(value(page, f"{at}[data-line='this patch']"), distance[4, layer, CHOSEN], rtol=1e-5)
        assert_allclose(value(page, f"{at}[data-line='all patches']"), distance[4, layer].mean(), rtol=1e-5)
        assert_allclose(value(page, f"{at}[data-line='other images']"), distance[:, layer, CHOSEN].mean(), rtol=1e-4)
    page.locator("[data-view=field]").get_by_role("button", name="over the photograph").click()
    assert held(page, "overlay") == "interaction_distance"


def test_pull_is_the_tendency_of_each_layer_and_chooses_layers(visit: Visit, site: Site) -> None:
    page = visit(LINK)
    page.wait_for_selector("[data-view=pull] g[data-layer]")
    for layer, length in enumerate(np.hypot(*site.dataset.tendency.values[4, :, CHOSEN].T)):
        assert_allclose(value(page, f"[data-view=pull] g[data-layer='{layer}']"), length, rtol=1e-5)
    page.locator("[data-view=pull] g[data-layer='5'] rect.hit").click()
    assert held(page, "layer") == "5"
    page.locator("[data-view=pull]").get_by_role("button", name="as a flow").click()
    expect(page.locator("#photograph .hero svg")).to_have_attribute("data-overlay", "tints")
    longest = np.hypot(*site.dataset.tendency.values[4, 5].T).max()
    assert_allclose(value(page, "#photograph [data-wheel]", "data-wheel"), longest, rtol=1e-5)


def test_windows_of_all_patches_are_summed_over_the_photograph(visit: Visit, site: Site) -> None:
    page = visit(f"{LINK}&overlay=window-sum")
    page.wait_for_selector("#photograph .hero svg[data-overlay=weights]")
    sides = site.dataset.window.values[4, 2]
    rows, columns = site.dataset.attrs["grids"][2]
    held_by = np.zeros(len(sides))
    for patch, (left, top, right, bottom) in enumerate(sides):
        row, column = divmod(patch, columns)
        for at in range(rows * columns):
            y, x = divmod(at, columns)
            high = min(y + 0.5, row + bottom + 0.5) - max(y - 0.5, row - top - 0.5)
            wide = min(x + 0.5, column + right + 0.5) - max(x - 0.5, column - left - 0.5)
            held_by[at] += max(0, high) * max(0, wide)
    becomes(page, "#photograph [data-scale] .here", held_by[CHOSEN] / len(sides))
    assert_allclose(value(page, "#photograph [data-top]", "data-top"), held_by.max() / len(sides), rtol=1e-5)


def test_hubs_and_sinks_are_shares_of_all_images_or_of_this_one(visit: Visit, site: Site) -> None:
    page = visit(f"{LINK}&scope=set")
    page.wait_for_selector("[data-view=hubs] circle[data-step]")
    last = "[data-view=hubs] circle[data-step='5']"
    assert_allclose(value(page, f"{last}[data-line='are hubs']"), site.dataset.hub.values[:, 5].mean(), atol=1e-5)
    assert_allclose(
        value(page, f"{last}[data-line='taken by sinks']"), site.dataset.sink_share.values[:, 5].mean(), 1e-4
    )
    page.locator("[data-view=hubs]").get_by_role("button", name="this image").click()
    expect(page.locator("[data-view=hubs] .reading")).to_contain_text("This image")
    page.wait_for_function(
        "wanted => Math.abs(document.querySelector(\"[data-view=hubs] circle[data-step='5'][data-line='are sinks']\")"
        ".dataset.value - wanted) < 1e-5",
        arg=float(site.dataset.sink.values[4, 5].mean()),
    )


def test_what_the_answer_rests_on_is_the_relevance_of_the_look_with_its_curves(visit: Visit, site: Site, study) -> None:
    page = visit(LINK)
    page.wait_for_selector("[data-view=rests] circle[data-step]")
    parts = site.live.parts("tokens").names
    looked = [
        site.live.look_part(photograph(study, 4), "tokens", next(part for part in parts if name in part), None)
        for name in ("relevance", "relevance_deletion")
    ]
    scores = looked[0].relevance.sel(relevance_method="gradient").values
    best = int(scores.argmax())
    assert_allclose(value(page, f"[data-view=rests] button[data-patch='{best}']"), scores[best], rtol=1e-4)
    methods = list(looked[0].relevance_method.values)
    gone = looked[1].relevance_deletion.values
    at = "[data-view=rests] circle[data-step='3']"
    assert_allclose(value(page, f"{at}[data-line=gradient]"), gone[methods.index("gradient"), 3], atol=1e-5)
    random = [row for row, name in enumerate(methods) if name.startswith("random")]
    assert_allclose(value(page, f"{at}[data-line=random]"), gone[random, 3].mean(), atol=1e-5)
    page.locator("[data-view=rests]").get_by_role("button", name="insertion").click()
    came = looked[1].relevance_insertion.values[methods.index("rollout"), 3]
    page.wait_for_function(
        "wanted => Math.abs(document.querySelector(\"[data-view=rests] circle[data-step='3'][data-line=rollout]\")"
        ".dataset.value - wanted) < 1e-5",
        arg=float(came),
    )
    expect(page.locator("[data-view=lost][data-missing]")).to_contain_text("--measures tokens")
