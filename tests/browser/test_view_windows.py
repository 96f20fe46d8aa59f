"""The tab of windows, on planted windows: areas by head and what they cost, boxes of a patch, and their overlap."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from playwright.sync_api import expect
from served import Site, Visit, chosen_head, drawn_without_room, held, value
from test_frame import AXE, axe

from synthetic_study import GRID, N_HEADS, N_LAYERS, PlantedLive, windows_of, write_study
from vitrail.app import create_app
from vitrail.app.static_files import built_page

ROW, COLUMN = 1, 5


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, serving: Callable[[Any], str]) -> str:
    if not built_page():
        pytest.skip("the page is not built")
    folder: Path = tmp_path_factory.mktemp("windows")
    return serving(create_app(write_study(folder, 12, windows=True), PlantedLive()))


def test_areas_of_all_heads_with_what_they_cost_and_boxes_of_the_chosen_patch(visit: Visit, address: str) -> None:
    token = 1 + ROW * GRID + COLUMN
    page = visit(f"?tab=windows&image=3&layer=2&head=0&token={token}&scope=set", url=address)
    page.wait_for_selector("[data-view=areas] rect[data-head]")
    for layer, head in np.ndindex(N_LAYERS, N_HEADS):
        shown = value(page, f"[data-view=areas] rect[data-head=L{layer}H{head}]")
        assert_allclose(shown, (layer + 1) * (head + 1) / 100, rtol=1e-5)
    assert value(page, "[data-view=areas] [data-cost=head_window_flip]") == 0
    assert value(page, "[data-view=areas] [data-cost=head_window_flip_equal]") == 1
    assert_allclose(value(page, "[data-view=areas] [data-cost=head_window_divergence]"), 0.02, rtol=1e-5)
    for head in range(N_HEADS):
        rows, columns = min(ROW, head + 1) + head + 2, 2 * (head + 1) + 1
        shown = value(page, f"[data-view=boxes] rect[data-head=L2H{head}]")
        assert_allclose(shown, rows * columns / GRID**2, rtol=1e-5)
    overlap = windows_of(1)["predicted_overlap_open"][0].mean(axis=1)
    for layer in range(N_LAYERS):
        shown = value(page, f"[data-view=overlap] circle[data-line='open attention'][data-step='{layer}']")
        assert_allclose(shown, overlap[layer], rtol=1e-5)
    page.locator("[data-view=boxes] rect.hit").nth(2).click()
    expect(chosen_head(page)).to_have_text("L2H2")
    page.get_by_label("Drawn over the photograph").select_option("predicted_window")
    expect(page.locator("#photograph .hero rect[data-box]")).to_have_attribute("data-box", f"3,{ROW},3,3")
    assert held(page, "overlay") == "predicted_window"
    if AXE.is_file():
        assert axe(page) == []


def test_any_other_model_is_told_what_the_tab_would_show(visit: Visit, site: Site) -> None:
    page = visit("?tab=windows")
    expect(page.locator("[data-view=areas][data-missing]")).to_contain_text("--measures head_windows")
    expect(page.locator("[data-view=boxes][data-missing]")).to_contain_text("Only a WinT has it")


def test_windows_without_room_draw_nothing_wrong(visit: Visit, address: str) -> None:
    page = visit("?tab=windows&image=3&layer=2&head=0", url=address)
    page.wait_for_selector("[data-view=boxes] rect[data-head]")
    assert drawn_without_room(page) == []
