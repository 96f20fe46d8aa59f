"""What was found, and why a head matters: the report's own sentences, each with the way to what it speaks of."""

from playwright.sync_api import expect
from served import N_IMAGES, Site, Visit, chosen_head, held

from vitrail.heads.why import why_sentences
from vitrail.report import findings_of


def texts(page, where: str) -> list[str]:
    sentences = page.locator(f"{where} [data-sentence]")
    expect(sentences.first).to_be_visible()
    return sentences.all_inner_texts()


def test_the_page_opens_on_the_sentences_of_the_report(visit: Visit, site: Site) -> None:
    page = visit()
    page.wait_for_selector("[data-findings=heads] li")
    expect(page.locator("[data-view=findings] .skeleton")).to_have_count(0)
    shown = " ".join(texts(page, "[data-view=findings]"))
    for sentence in findings_of(site.dataset):
        assert sentence.replace("`", "") in shown


def test_photographs_below_a_sentence_say_why_these_and_each_its_number(visit: Visit, site: Site) -> None:
    page = visit()
    sentence = next(each for each in findings_of(site.dataset) if getattr(each, "images", ()) and "Without L" in each)
    shown = page.locator("[data-findings=heads] li").filter(has_text=str(sentence))
    assert "lose most" in sentence.caption
    expect(shown.locator("figcaption")).to_have_text(sentence.caption)
    assert shown.locator(".pictures span").all_inner_texts() == [words for _, words in sentence.images]


def test_why_a_head_matters_says_whose_images_it_speaks_of(visit: Visit, site: Site) -> None:
    page = visit("?tab=heads&layer=2&head=0")
    scope = page.locator("[data-why-scope]")
    expect(scope).to_have_text(f"Over all {N_IMAGES} images of the study.")
    page.get_by_role("button", name="needs L2H0").click()
    lost = (site.dataset.probability.values[:, None, None] - site.dataset.head_probability.values)[:, 2, 0]
    needs = lost[lost > 0.1]
    expect(scope).to_contain_text(
        f"In the {len(needs)} selected images the label loses {needs.mean():.3g} of probability without it"
    )
    page.locator("[data-view=grid] rect[data-head=L1H1]").click()  # another head, the same selection
    other = (site.dataset.probability.values[:, None, None] - site.dataset.head_probability.values)[lost > 0.1, 1, 1]
    expect(scope).to_contain_text(f"{'gains' if other.mean() < 0 else 'loses'} {abs(other.mean()):.3g} of probability")
    expect(page.get_by_role("button", name="Take out: needs L2H0 (loses > 0.1)")).to_be_visible()


def test_a_sentence_of_a_head_has_a_small_chart_of_all_heads_and_the_hint_never_returns(
    visit: Visit, site: Site
) -> None:
    page = visit()
    lost = (site.dataset.probability.values[:, None, None] - site.dataset.head_probability.values).mean(0)
    chart = page.locator("[data-findings=heads] [data-mini=head_probability]").first
    expect(chart.locator("rect")).to_have_count(lost.size)
    assert abs(float(chart.get_attribute("data-value") or "nan") - lost.max()) < 1e-5
    page.get_by_role("button", name="Got it").click()
    expect(page.locator("[data-hint]")).to_have_count(0)
    page.reload()
    page.wait_for_selector("[data-findings=heads] li")
    expect(page.locator("[data-hint]")).to_have_count(0)


def test_a_sentence_leads_to_the_head_that_it_speaks_of(visit: Visit, site: Site) -> None:
    page = visit("?tab=findings&layer=5&head=2")
    lost = site.dataset.probability.values[:, None, None] - site.dataset.head_probability.values
    layer, head = divmod(int(lost.mean(0).argmax()), lost.shape[2])
    page.locator("[data-findings=heads]").get_by_role("button", name=f"show L{layer}H{head}").first.click()
    expect(chosen_head(page)).to_have_text(f"L{layer}H{head}")
    assert held(page, "tab") == "heads"
    page.go_back()
    assert held(page, "tab") == "findings"


def test_why_a_head_matters_is_said_of_the_chosen_head(visit: Visit, site: Site) -> None:
    page = visit("?tab=heads&layer=2&head=1")
    page.wait_for_selector("[data-view=why] li")
    assert texts(page, "[data-view=why]") == [each.replace("`", "") for each in why_sentences(site.dataset, 2, 1)]


def test_three_clicks_lead_from_the_first_screen_to_what_happens_without_the_head_that_matters_most(
    visit: Visit, site: Site
) -> None:
    page = visit()
    lost = site.dataset.probability.values[:, None, None] - site.dataset.head_probability.values
    layer, head = divmod(int(lost.mean(0).argmax()), lost.shape[2])
    name = f"L{layer}H{head}"
    sentence = page.locator("[data-findings=heads] li").first
    expect(sentence).to_contain_text(f"Without {name}")
    sentence.locator(".pictures button").first.click()
    expect(chosen_head(page)).to_have_text(name)
    assert held(page, "image") == str(int(lost[:, layer, head].argmax()))
    page.wait_for_selector("#photograph .hero svg[data-overlay=weights]")
    page.get_by_role("button", name=f"what happens here without {name}").click()
    assert (held(page, "tab"), held(page, "change")) == ("what-if", name)
    plain, without = (
        site.dataset[each].values[int(held(page, "image"))] for each in ("probability", "head_probability")
    )
    headline = page.locator("[data-view=change]")
    expect(headline).to_contain_text(f"{float(plain):.3f} \u2192")
    expect(page.locator("[data-view=answer]")).to_contain_text(f"\u2192 {float(without[layer, head]):.3f}")
    page.get_by_role("button", name=f"Take back: {name} off").click()
    page.get_by_role("button", name=f"switch {name} off").click()
    assert held(page, "change") == name


def test_a_sentence_of_no_layer_leads_to_the_view_made_for_it_and_back_to_where_one_left(visit: Visit) -> None:
    page = visit()
    page.set_viewport_size({"width": 1200, "height": 420})
    expect(page.locator("[data-view=findings] .skeleton")).to_have_count(0)
    sentence = page.locator("[data-findings=patches] li").filter(has_text="They are hubs")
    page.wait_for_function(  # what comes late above a sentence moves it: until it stands
        """sentence => {
            const before = sentence.getBoundingClientRect().top;
            sentence.scrollIntoView({ block: "center" });
            const moved = Math.abs(sentence.getBoundingClientRect().top - before);
            return document.querySelector("#evidence").scrollTop > 100 && moved < 1;
        }""",
        arg=sentence.element_handle(),
    )
    left = page.evaluate("document.querySelector('#evidence').scrollTop")
    sentence.get_by_role("button", name="show in Patches").click()
    expect(page.get_by_role("tab", name="Patches")).to_have_attribute("aria-selected", "true")
    expect(page.locator("[data-view=hubs]")).to_be_in_viewport()
    page.go_back()
    expect(sentence).to_be_visible()
    page.wait_for_function("left => Math.abs(document.querySelector('#evidence').scrollTop - left) < 2", arg=left)


def test_a_sentence_of_patterns_leads_to_their_view(visit: Visit) -> None:
    page = visit()
    sentence = page.locator("[data-findings=patterns] li").filter(has_text="heads are named")
    sentence.get_by_role("button", name="show in Patterns").click()
    expect(page.get_by_role("tab", name="Patterns")).to_have_attribute("aria-selected", "true")
    expect(page.locator("[data-view=classes], [data-view=rules]").first).to_be_in_viewport()


def test_the_line_beside_a_sentence_has_the_number_that_the_sentence_gives(visit: Visit) -> None:
    page = visit()
    sentence = page.locator("[data-findings=patches] li").filter(has_text="of the windows do not hold the patch")
    drawn = float(sentence.locator("[data-mini]").get_attribute("data-value"))
    assert f"{100 * drawn:.0f} % of the windows" in sentence.inner_text()
