"""The tab of tokens: the numbers of the live look and of the study, and what choosing a patch changes."""

import numpy as np
from numpy.testing import assert_allclose
from playwright.sync_api import expect
from served import Site, Visit, at_patch, held, photograph, value

from vitrail.builtin.tokens import TOKENS

CHOSEN, N_PREFIX, SIDE = 19, 1, 8


def test_likeness_is_that_of_the_look_and_follows_the_chosen_patch(visit: Visit, site: Site, study) -> None:
    page = visit(f"?tab=tokens&image=4&layer=2&token={N_PREFIX + CHOSEN}")
    page.wait_for_selector("[data-view=alike] circle[data-step]")
    part = next(names for names in site.live.parts("tokens").names if "token_similarity" in names)
    cosines = site.live.look_part(photograph(study, 4), "tokens", part, CHOSEN).token_similarity.values
    others = np.delete(np.arange(SIDE**2), CHOSEN)
    row, column = np.divmod(np.arange(SIDE**2), SIDE)
    hops = np.maximum(np.abs(row - CHOSEN // SIDE), np.abs(column - CHOSEN % SIDE))
    for layer in range(len(cosines)):
        at = f"[data-view=alike] circle[data-step='{layer}']"
        assert_allclose(value(page, f"{at}[data-line='most alike']"), cosines[layer, others].max(), atol=1e-5)
        assert_allclose(value(page, f"{at}[data-line='around it']"), cosines[layer, hops == 1].mean(), atol=1e-5)
        assert_allclose(value(page, f"{at}[data-line='all others']"), cosines[layer, others].mean(), atol=1e-5)
    expect(page.locator("#photograph .hero svg")).to_have_attribute("data-overlay", "weights")
    assert_allclose(at_patch(page, 30), cosines[2, 30], rtol=1e-4)
    best = others[cosines[2, others].argmax()]
    page.locator(f"[data-view=alike] button[data-patch='{best}']").click()
    assert held(page, "token") == str(N_PREFIX + best)


def test_lengths_are_of_the_chosen_patch_beside_the_others_and_layers_are_chosen(visit: Visit, site: Site) -> None:
    page = visit(f"?tab=tokens&image=4&layer=2&token={N_PREFIX + CHOSEN}")
    page.wait_for_selector("[data-view=length] circle[data-step]")
    norms = site.dataset.token_norm.values[4]
    for layer in range(len(norms)):
        at = f"[data-view=length] circle[data-step='{layer}']"
        assert_allclose(value(page, f"{at}[data-line='chosen patch']"), norms[layer, N_PREFIX + CHOSEN], rtol=1e-5)
        assert_allclose(value(page, f"{at}[data-line='middle patch']"), np.median(norms[layer, N_PREFIX:]), rtol=1e-5)
        assert_allclose(value(page, f"{at}[data-line='class token']"), norms[layer, 0], rtol=1e-5)
    page.locator("#photograph").get_by_role("button", name="Layer 5").click()
    assert held(page, "layer") == "5"


def test_a_filter_chosen_is_the_neuron_that_is_followed(visit: Visit, site: Site, study) -> None:
    page = visit(f"?tab=tokens&image=4&layer=2&token={N_PREFIX + CHOSEN}")
    page.wait_for_selector("[data-view=filters] button[data-filter]")
    part = next(names for names in site.live.parts("tokens").names if "filter_auroc" in names)
    scores = site.live.look_part(photograph(study, 4), "tokens", part, None).filter_auroc.values
    best = int(scores.argmax())
    assert_allclose(value(page, f"[data-view=filters] button[data-filter='{best}']"), scores[best], atol=1e-5)
    worst = int(page.locator("[data-view=filters] button[data-filter]").last.get_attribute("data-filter") or -1)
    assert worst == np.argsort(-scores, kind="stable")[-1]
    page.locator(f"[data-view=filters] button[data-filter='{worst}']").click()
    assert held(page, "channel") == str(worst)
    page.wait_for_selector(f"[data-view=neuron] [data-neuron='{worst}']")
    expect(page.locator("[data-view=neuron] .reading")).to_contain_text(f"Neuron {worst} at row 2, column 3")
    part = next(names for names in site.live.parts("tokens").names if "neuron_view" in names)
    seen = site.live.look_part(photograph(study, 4), "tokens", part, CHOSEN, worst)
    for at, level in enumerate(seen.view_level.values):
        shown = value(page, f"[data-view=neuron] figure[data-level='{level}']")
        assert_allclose(shown, seen.neuron_view_agreement.values[at], atol=1e-5)


def test_what_the_study_does_not_hold_says_what_adds_it(visit: Visit) -> None:
    page = visit("?tab=tokens")
    expect(page.locator("[data-view=grouping][data-missing]")).to_contain_text(f"--measures {TOKENS.name}")
    expect(page.locator("[data-view=shuffle][data-missing]")).to_contain_text("The command under")


def test_the_photographs_that_excite_a_neuron_are_those_of_the_selection_and_open_where_it_peaks(
    visit: Visit, site: Site
) -> None:
    neuron = 7
    page = visit(f"?tab=tokens&image=4&layer=2&channel={neuron}")
    pictures = page.locator("[data-view=excited] button[data-excited]")
    page.wait_for_selector("[data-view=excited] button[data-excited]")
    peaks, patches = site.dataset.neuron_peak.values[:, neuron], site.dataset.neuron_peak_patch.values[:, neuron]
    strongest = np.argsort(-peaks, kind="stable")
    assert [int(each.get_attribute("data-excited") or -1) for each in pictures.all()] == strongest[:8].tolist()
    first = f"[data-view=excited] button[data-excited='{strongest[0]}']"
    assert_allclose(value(page, first), peaks[strongest[0]], rtol=1e-5)
    page.locator(first).click()
    assert held(page, "image") == str(strongest[0])
    assert held(page, "token") == str(N_PREFIX + patches[strongest[0]])
    page.get_by_role("button", name="wrong", exact=True).click()
    wrong = (site.dataset.prediction != site.dataset.label).values
    best = next(image for image in strongest if wrong[image])
    expect(pictures.first).to_have_attribute("data-excited", str(best))
