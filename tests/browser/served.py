"""What the browser tests share: the served study, and reading numbers off the page."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr
from PIL import Image
from playwright.sync_api import Page, expect

from vitrail.data import stored_image
from vitrail.study.store import read_manifest

N_IMAGES = 64
PATIENCE_MS = 60_000
"""For a machine that does much else; the benchmark, not these tests, says how fast the page is."""

Visit = Callable[..., Page]


@dataclass(frozen=True)
class Site:
    """A study served on this machine, and the same study and model at hand to compare with."""

    url: str
    dataset: xr.Dataset
    live: Any


def value(page: Page, selector: str, name: str = "data-value") -> float:
    """The number that the one element there carries."""
    found = page.locator(selector)
    expect(found).to_have_count(1)
    text = found.get_attribute(name)
    assert text is not None
    return float(text)


def becomes(page: Page, selector: str, expected: float, within: float = 1e-5, name: str = "value") -> None:
    """Waits until the element carries the number."""
    page.wait_for_function(
        "([selector, name, expected, within]) => "
        "Math.abs(document.querySelector(selector)?.dataset[name] - expected) < within",
        arg=[selector, name, float(expected), within],
    )


def held(page: Page, key: str) -> str:
    """What the address says."""
    return page.evaluate("key => new URLSearchParams(location.search).get(key)", key) or ""


def cell(head: str) -> str:
    """A head's cell in the grid of heads."""
    return f"[data-view=grid] rect[data-head={head}]"


def n_selected(page: Page) -> Any:
    """Where the column of images says how many images are selected."""
    return page.locator("[data-view=images] [data-selected]")


def chosen_head(page: Page) -> Any:
    """Where the page names the chosen head."""
    return page.locator("#photograph [data-head]")


def at_patch(page: Page, patch: int, grid: tuple[int, int] = (8, 8)) -> float:
    """Points at a patch of the photograph; the overlay's value there, as it is printed under it."""
    photo = page.locator("#photograph .hero svg")
    photo.scroll_into_view_if_needed()
    box = photo.bounding_box()
    assert box
    row, column = divmod(patch, grid[1])
    page.mouse.move(
        box["x"] + box["width"] * (column + 0.5) / grid[1], box["y"] + box["height"] * (row + 0.5) / grid[0]
    )
    reading = page.locator("#photograph [data-scale] [aria-live]")
    expect(reading).to_contain_text(f"row {row}, column {column}")
    return float(reading.get_attribute("data-value") or "nan")


def photograph(study: Path, image: int) -> Image.Image:
    manifest = read_manifest(study)
    return stored_image(manifest, manifest.images[image])


def drawn_without_room(page: Page) -> list[str]:
    """Shapes of negative size, after every chart was told that it is 0 wide; the page's errors are looked at after."""
    page.locator("#evidence").evaluate("each => { each.style.display = 'none' }")
    page.wait_for_function("() => document.querySelector('#evidence').clientWidth === 0")
    page.wait_for_timeout(400)
    wrong = 'all => all.map((each) => each.outerHTML).filter((text) => /(width|height| r)="(-|NaN)/.test(text))'
    return page.locator("#evidence rect, #evidence circle").evaluate_all(wrong)
