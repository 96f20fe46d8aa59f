"""Two studies of the same images: what differs, where, and in which photographs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose
from playwright.sync_api import Route, expect
from served import Visit, becomes, chosen_head, held, value

import vitrail
from synthetic_study import GRID, N_LAYERS, photograph, write_beside, write_study
from vitrail import open_study, open_vit, run_study
from vitrail.app import create_app
from vitrail.study.store import read_manifest, read_plan
from vitrail.study.writing import StudyFolder


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
    expect(page.locator("[data-missing] code")).to_have_text(f"vitrail open {studies[0]} --with OTHER_STUDY")


def test_one_photograph_is_shown_with_the_same_overlay_from_both_in_one_scale(
    visit: Visit, serving, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(12):
        photograph(number, 0).save(tmp_path / "photos" / f"{number}.png")
    folders = []
    for seed, patch in enumerate((8, 16)):
        torch.manual_seed(seed)
        shape = {"img_size": 64, "patch_size": patch, "depth": 2 + 2 * seed, "embed_dim": 24, "num_heads": 2}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **shape).eval()
        vit = open_vit(model, mean=(0.5,) * 3, std=(0.5,) * 3)
        folders.append(tmp_path / f"study{seed}")
        run_study(vit, tmp_path / "photos", out=folders[-1], measures="token_norm,probability", batch_size=4)
    page = visit("?tab=compare&image=5&layer=1", url=serving(create_app(folders[0], others=folders[1:])))
    view = page.locator("[data-view=same-photograph]")
    page.wait_for_selector("[data-view=same-photograph] figure svg[data-overlay=weights]")
    expect(view.locator("figure")).to_have_count(2)
    expect(view.get_by_label("Overlay of both")).to_have_value("token_norm")
    norms = [open_study(folder)["token_norm"].sel(image="5.png").values for folder in folders]
    patches = [norms[0][1, 1:], norms[1][3, 1:]]  # the last layer of both: 2 and 4 layers
    assert [view.locator("figure").nth(side).get_attribute("data-layer") for side in (0, 1)] == ["1", "3"]
    floor, top = (
        float(view.locator(f"[data-{end}]").get_attribute(f"data-{end}") or "nan") for end in ("floor", "top")
    )
    assert_allclose([floor, top], [min(map(np.min, patches)), max(map(np.max, patches))], rtol=1e-5)
    read = "e => [...e.getContext('2d').getImageData(0, 0, e.width, e.height).data].filter((_, i) => i % 4 == 3)"
    for side, values in enumerate(patches):
        opacity = np.array(view.locator("figure canvas").nth(side).evaluate(read))
        assert_allclose(opacity / 255, 0.7 * (values - floor) / (top - floor), atol=0.006)


def test_a_chart_has_the_name_of_what_it_draws_until_the_numbers_of_the_next_measure_come(
    visit: Visit, url: str
) -> None:
    page = visit("?tab=compare&measure=attention_distance", url=url)
    views = [page.locator(f"[data-view={name}]") for name in ("compared-layers", "compared-heads")]
    for view in views:
        expect(view.locator("svg.chart").first).to_contain_text("mean attention distance")
    stalled: list[Route] = []
    page.route("**/api/compare/0/strength_entropy*", lambda route: stalled.append(route))
    page.get_by_label("Measure that is compared").select_option("strength_entropy")
    expect(page.locator("[data-compared=strength_entropy]")).to_be_visible()
    for view in views:
        expect(view.locator("svg.chart").first).to_contain_text("mean attention distance")
    page.wait_for_function("() => document.querySelectorAll('.view[aria-busy=true]').length >= 2")
    for route in stalled:
        route.continue_()
    for view in views:
        expect(view.locator("svg.chart").first).to_contain_text("entropy")


def test_numbers_of_both_studies_on_their_way_are_waited_for_without_a_word(
    visit: Visit, serving, tmp_path: Path
) -> None:
    study = write_study(tmp_path, 12)
    with_patches = []
    for folder, source in ((tmp_path / "a", study), (tmp_path / "b", write_beside(study, tmp_path / "another"))):
        with_patches.append(with_lengths(source, folder))
    stalled: list[Route] = []
    page = visit("?tab=heads&image=3", url=serving(create_app(with_patches[0], others=with_patches[1:])))
    page.route("**/api/compare/0/image/3/interaction_distance", lambda route: stalled.append(route))
    page.get_by_role("tab", name="Compare").click()
    view = page.locator("[data-view=same-photograph]")
    expect(view.get_by_label("Overlay of both")).to_have_value("interaction_distance")
    expect(view.get_by_role("status", name="waiting")).to_be_visible()
    expect(view).not_to_contain_text("Only a photograph of the study")
    for route in stalled:
        route.continue_()
    expect(view.locator("figure svg[data-overlay=weights]")).to_have_count(2)


def test_a_pointer_that_rests_points_at_nothing_once_another_grid_is_drawn_below_it(
    visit: Visit, serving, tmp_path: Path
) -> None:
    fine, coarse = [GRID, GRID], [GRID // 2, GRID // 2]
    study = with_lengths(write_study(tmp_path, 6), tmp_path / "tall", grids=[fine] * 6 + [coarse] * 6)
    page = visit("?tab=heads&image=3&layer=5&overlay=interaction_distance&token=1", url=serving(create_app(study)))
    lengths = open_study(study)["interaction_distance"].values[3]
    here = "#photograph [data-scale] .here"
    becomes(page, here, lengths[5, 0])
    photo = page.locator("#photograph .hero svg").first
    box = photo.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.99 * box["width"], box["y"] + 0.99 * box["height"])
    becomes(page, here, lengths[5, -1])
    page.keyboard.press("ArrowDown")
    expect(chosen_head(page)).to_have_text("L6H0")
    becomes(page, here, 2 * lengths[6, 0])  # in patches of L0
    expect(page.locator("#photograph [data-scale]")).to_contain_text("patches of L0")


def with_lengths(study: Path, folder: Path, **changes: object) -> Path:
    """The same study with a length of each patch."""
    data, plan, manifest = open_study(study), replace(read_plan(study), **changes), read_manifest(study)
    folder.mkdir()
    writing = StudyFolder(folder, plan, manifest)
    for part in writing.missing:
        rows = slice(part.start, part.stop)
        arrays = {str(name): data[name].values[rows] for name in data.data_vars if name != "image_xy"}
        lengths = np.random.default_rng(0).random((part.stop - part.start, N_LAYERS, GRID**2))
        writing.write_part(part, arrays | {"interaction_distance": lengths.astype(np.float32)})
    writing.write_derived({"image_xy": data["image_xy"].values})
    return folder
