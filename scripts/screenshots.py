"""Screenshots of every tab of the page in a real Chromium, to be looked at before the page is called done.

    python scripts/screenshots.py STUDY --out FOLDER                     every tab, size and theme
    python scripts/screenshots.py STUDY --out FOLDER --tabs heads,tokens --sizes 1280x720 --themes light
    python scripts/screenshots.py STUDY --out FOLDER --query "image=4&layer=6" --with OTHER_STUDY
    python scripts/screenshots.py STUDY --out FOLDER --files report.html look.html
    python scripts/screenshots.py STUDY --docs                           the six of the documentation, into docs/images

Serves the study as `vitrail open` does, with its model. Beside the window as it is, TAB-SIZE-THEME-whole.png has all
of the evidence, scrolled parts included. Prints how long each screen took, and every error that the page logged.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Error, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
TABS = ("findings", "heads", "patterns", "patches", "tokens", "windows", "what-if", "compare")
SIZES = ("1280x720", "1920x1080", "390x844")
THEMES = ("light", "dark")
PHONE_WIDTH = 600
WAIT_S = 300
"""A tab of a ViT-Tiny computes several live looks one after the other; two slow cores take minutes for all of them."""
REDRAWN_MS = 200
"""What a change of theme takes to draw."""
SETTLED = (
    "() => !document.querySelector('.skeleton, [aria-busy=true]') && !document.body.innerText.includes('Computing')"
)
DOCS = {
    "findings": ("", ""),
    "heads": ("cat/whole", ""),
    "patterns": ("cat/whole", ""),
    "patches": ("coffee/whole", "overlay=tendency-flow"),
    "tokens": ("coffee/whole", "overlay=token_colour"),
    "what-if": ("", "change={head}"),
}
"""By tab: the photograph that is shown, the start's own where empty, and what else the address says."""


def _answer(address: str) -> Any:
    """What the server says at an address, from JSON."""
    with urllib.request.urlopen(address) as answer:  # noqa: S310
        return json.load(answer)


@contextmanager
def served(study: Path, others: list[Path], live: bool) -> Iterator[str]:
    """`vitrail open` in a process of its own, on a free port."""
    command = [sys.executable, "-m", "vitrail", "open", str(study), "--no-browser", "--port", "0"]
    command += [word for other in others for word in ("--with", str(other))] + ([] if live else ["--no-live"])
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603
    try:
        assert process.stdout is not None
        address = next((m.group() for line in process.stdout if (m := re.search(r"http://\S+", line))), None)
        if address is None:
            raise SystemExit(f"The server ended with status {process.wait()} before it named an address.")
        while _answer(address + "api/live")["state"] == "loading":
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


def opened(browser: Browser, size: str, theme: str) -> Page:
    """An empty page of that size and theme that prints what goes wrong."""
    width, height = map(int, size.split("x"))
    phone = width < PHONE_WIDTH
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=theme, reduced_motion="reduce", has_touch=phone
    )
    context.set_default_timeout(WAIT_S * 1000)
    page = context.new_page()
    page.on("console", lambda line: print("  console:", line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: print("  error:", error))
    return page


def settle(page: Page) -> None:
    """Wait until nothing on the screen is still being computed."""
    page.wait_for_selector("#evidence > section")
    try:
        page.wait_for_function(SETTLED, timeout=WAIT_S * 1000)
    except Error:
        print("  still computing after", WAIT_S, "s")
    page.wait_for_timeout(300)


def photograph_tab(page: Page, out: Path, name: str) -> None:
    """The window as it is, then all of the evidence."""
    page.screenshot(path=out / f"{name}.png")
    for alert in page.locator("[role=alert]").all_inner_texts():
        print("  alert:", alert)
    size = page.viewport_size
    assert size is not None
    if size["width"] < PHONE_WIDTH:
        page.screenshot(path=out / f"{name}-whole.png", full_page=True)
        return
    hidden = page.evaluate(
        "(({ scrollHeight, clientHeight }) => scrollHeight - clientHeight)(document.querySelector('#evidence'))"
    )
    if hidden > 0:
        page.set_viewport_size({"width": size["width"], "height": size["height"] + hidden})
        page.wait_for_timeout(500)
        page.locator("#evidence").screenshot(path=out / f"{name}-whole.png")
        page.set_viewport_size(size)


def every_tab(browser: Browser, address: str, asked: argparse.Namespace) -> None:
    """Every tab at every size in every theme, into the folder; what a screen computed serves all of its themes."""
    themes = asked.themes.split(",")
    for size in asked.sizes.split(","):
        page = opened(browser, size, themes[0])
        for tab in asked.tabs.split(","):
            began = time.perf_counter()
            page.goto(f"{address}?tab={tab}&{asked.query}")
            settle(page)
            print(f"{tab} {size}: {time.perf_counter() - began:.1f} s", flush=True)
            for theme in themes:
                page.emulate_media(color_scheme=theme, reduced_motion="reduce")
                page.wait_for_timeout(REDRAWN_MS)
                photograph_tab(page, asked.out, f"{tab}-{size}-{theme}")
        page.context.close()


def of_files(browser: Browser, asked: argparse.Namespace) -> None:
    """Pages that are files, such as a report, at every size in every theme."""
    for file in asked.files:
        for size in asked.sizes.split(","):
            for theme in asked.themes.split(","):
                page = opened(browser, size, theme)
                page.goto(Path(file).resolve().as_uri())
                page.wait_for_timeout(1000)
                page.screenshot(path=asked.out / f"{Path(file).stem}-{size}-{theme}.png")
                page.screenshot(path=asked.out / f"{Path(file).stem}-{size}-{theme}-whole.png", full_page=True)
                page.context.close()


def for_docs(browser: Browser, address: str) -> None:
    """The six of the documentation, small enough to be committed."""
    from PIL import Image

    out = ROOT / "docs" / "images"
    ids = _answer(address + "api/images")["ids"]
    start = _answer(address + "api/study")["start"]
    head = f"L{start['layer']}H{start['head']}"
    for name, (photograph, query) in DOCS.items():
        page = opened(browser, "1280x720", "light")
        image = next((i for i, each in enumerate(ids) if photograph and each.startswith(photograph)), start["image"])
        page.goto(f"{address}?tab={name}&image={image}&{query.format(head=head)}")
        settle(page)
        if dismiss := page.query_selector("[data-hint] button"):
            dismiss.click()
        page.screenshot(path=out / "page.png")
        Image.open(out / "page.png").convert("RGB").save(out / f"{name}.webp", quality=88, method=6)
        (out / "page.png").unlink()
        page.context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, default=Path("screenshots"))
    parser.add_argument("--tabs", default=",".join(TABS))
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--themes", default=",".join(THEMES))
    parser.add_argument("--query", default="", help="What else the address says: image=4&layer=6")
    parser.add_argument("--with", dest="others", type=Path, action="append", default=[])
    parser.add_argument("--files", nargs="*", help="Reports and looks as files, instead of the study's page.")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--no-live", dest="live", action="store_false")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        if asked.files:
            of_files(browser, asked)
            return
        with served(asked.study, asked.others, asked.live) as address:
            for_docs(browser, address) if asked.docs else every_tab(browser, address, asked)
        browser.close()


if __name__ == "__main__":
    main()
