"""What needs objects or pruning curves: tokens by object in the image's own mask, and how many heads can go."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image
from playwright.sync_api import expect
from served import Site, Visit, held, value
from test_frame import AXE, axe

from vitrail.app import create_app
from vitrail.app.static_files import built_page
from vitrail.pruning.ranking import CURVES_FILE
from vitrail.study.store import open_study, read_plan

SIDE, N_PATCHES = 8, 64
COUNTS = np.array([0, 6, 18])


def masked(folder: Path) -> tuple[Path, Path]:
    """Three photographs of two squares, and which patches they cover: rows 1 to 3, columns 1 to 3 and 5 to 6."""
    photos, masks = folder / "photos", folder / "masks"
    photos.mkdir()
    masks.mkdir()
    rng = np.random.default_rng(0)
    for image in range(3):
        cells = np.zeros((SIDE, SIDE), np.uint8)
        cells[1:4, 1:4], cells[1:4, 5:7] = 1, 2
        ids = cells.repeat(16, 0).repeat(16, 1)
        colours = np.array([[90, 90, 90], [200, 60, 40], [40, 80, 200]], np.uint8)
        noise = rng.integers(0, 30, (*ids.shape, 3), dtype=np.uint8)
        Image.fromarray(colours[ids] + noise).save(photos / f"{image}.png")
        Image.fromarray(ids).save(masks / f"{image}.png")
    return photos, masks


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory, site: Site, serving: Callable[[Any], str]) -> str:
    if not built_page():
        pytest.skip("the page is not built")
    from vitrail.study.run import run_study

    folder = tmp_path_factory.mktemp("objects")
    photos, masks = masked(folder)
    study = folder / "study"
    measures = "grouping_silhouette,token_norm"
    run_study(site.live.vit, str(photos), out=study, masks=masks, measures=measures)
    right = np.arange(4) < np.array([[4], [3], [1]])
    np.savez(
        study / CURVES_FILE,
        data_digest=np.array(read_plan(study).data_digest),
        names=np.array(["flips"]),
        counts=COUNTS,
        least=right[None],
        most=right[None, [0, 2, 2]],
        random=right[None, [0, 1, 2]],
    )
    assert np.isfinite(open_study(study).grouping_silhouette.values).all()
    return serving(create_app(study, site.live))


def test_tokens_lie_by_likeness_with_the_colour_of_their_object(visit: Visit, objects: str) -> None:
    page = visit("?tab=tokens&image=1&layer=2&token=1", url=objects)
    dots = page.locator("[data-view=by-object] svg").first.locator("circle[data-object]")
    expect(dots).to_have_count(N_PATCHES)
    owners = np.array(dots.evaluate_all("all => all.map((one) => Number(one.dataset.object))")).reshape(SIDE, SIDE)
    expected = np.zeros((SIDE, SIDE), int)
    expected[1:4, 1:4], expected[1:4, 5:7] = 1, 2
    np.testing.assert_array_equal(owners, expected)
    colours = dots.evaluate_all("all => new Set(all.map((one) => one.style.fill)).size")
    assert colours == 3
    expect(page.locator("[data-view=by-object] svg").first.locator("[data-class-token]")).to_have_count(1)
    place = page.locator("[data-view=by-object] svg").first.locator("circle[data-patch='12']")
    x, y = (float(place.get_attribute(name) or "nan") for name in ("cx", "cy"))
    page.locator("[data-view=by-object] svg").first.click(position={"x": x, "y": y})
    assert held(page, "token") == "13"
    page.get_by_role("button", name="objects over the photograph").click()
    expect(page.locator("#photograph .hero svg")).to_have_attribute("data-overlay", "tints")
    if AXE.is_file():
        assert axe(page) == []


def test_pruning_curves_are_accuracies_over_the_heads_that_went(visit: Visit, objects: str) -> None:
    page = visit("?tab=heads", url=objects)
    for name, expected in (
        ("least first", (1, 0.75, 0.25)),
        ("most first", (1, 0.25, 0.25)),
        ("random", (1, 0.75, 0.25)),
    ):
        for step, accuracy in enumerate(expected):
            at = f"[data-view=curves] circle[data-line='{name}'][data-step='{step}']"
            assert_allclose(value(page, at), accuracy)
    # A triangle of half of accuracy high, over all heads wide.
    assert_allclose(value(page, "[data-view=curves] [data-area]", "data-area"), 0.25)


def test_without_curves_the_command_that_measures_them_is_shown(visit: Visit) -> None:
    page = visit("?tab=heads")
    expect(page.locator("[data-view=curves][data-missing]")).to_contain_text(re.compile(r"vitrail curves /\S+/crops"))
