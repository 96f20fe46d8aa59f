"""Two studies of the same images: what differs, where, and in which photographs."""

from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect
from served import Visit, becomes, chosen_head, held, value

import vitrail
from synthetic_study import write_beside, write_study
from vitrail.app import create_app


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    tmp = tmp_path_factory.mktemp("two")
    study = write_study(tmp, 30)
    return study, write_beside(study, tmp / "another")


@pytest.fixture(scope="module")
def url(studies, serving) -> str:
    return serving(create_app(studies[0], others=studies[1:]))


def test_what_differs_is_said_and_drawn(visit: Visit, url: str, studies) -> None:
    page = visit("?tab=compare", url=url)
    compared = vitrail.compare(*studies)
    expect(page.locator("[data-view=what-differs] li").first).to_be_visible()
    row = compared.sel(measure="attention_distance")
    shown = value(page, "[data-view=differences] [data-compared=attention_distance]")
    assert abs(shown - float(row["mean_difference"])) < 1e-6
    drawn = value(page, "[data-view=differences] g[data-measure=attention_distance]")
    assert abs(drawn - float(row["standardised"])) < 1e-5
    last = value(page, "[data-view=compared-layers] circle.mean-dot[data-step='11']")
    assert abs(last - float(compared["attention_distance_difference"][11])) < 1e-5
    dot = page.locator("[data-view=compared-heads] circle[data-head=L3H1]")
    assert abs(float(dot.get_attribute("data-b") or "nan") - float(compared["attention_distance_head_b"][3, 1])) < 1e-5
    dot.click()
    expect(chosen_head(page)).to_have_text("L3H1")
    page.locator("[data-view=changed-images] li button").first.click()
    most = int(np.argmax(compared["change"].values))
    assert held(page, "image") == str(most)
    expected = compared["difference"].sel(measure="attention_distance").values[most]
    becomes(page, "[data-image-difference]", float(expected), name="imageDifference")
    page.get_by_label("Measure that is compared").select_option("strength_entropy")
    assert held(page, "measure") == "strength_entropy"
    expect(page.locator("[data-compared=strength_entropy]")).to_be_visible()


def test_without_another_study_the_tab_says_once_how_to_have_one(visit: Visit, studies, serving) -> None:
    page = visit("?tab=compare", url=serving(create_app(studies[0])))
    expect(page.locator("[data-missing]")).to_have_count(1)
    expect(page.locator("[data-missing] code")).to_have_text("vitrail open study --with OTHER_STUDY")
