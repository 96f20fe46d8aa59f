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
    """A head's cell in the heat map of B1."""
    return f"[data-view=B1] rect[data-head={head}]"


def n_selected(page: Page) -> Any:
    """Where view A says how many images are selected."""
    return page.locator("[data-view=A] [aria-live] b")


def photograph(study: Path, image: int) -> Image.Image:
    manifest = read_manifest(study)
    return stored_image(manifest, manifest.images[image])
