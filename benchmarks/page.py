"""How fast the page is on a large stored study: 50,000 images x 144 heads, in a real browser.

    python benchmarks/page.py            writes the study (about 1 GB) under the temporary folder, once
    python benchmarks/page.py --images 5000

First useful paint: from the navigation until dots, heat map of heads and thumbnails are drawn. A click: from
the event until the last change of the page that follows from it. There is no live model. Targets: 1.5 s and 100 ms.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import uvicorn
from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from synthetic_study import CLASSES, measures_of, plan_of
from vitrail.app import create_app
from vitrail.data import ImageEntry, Manifest
from vitrail.study.writing import StudyFolder

N_LAYERS, N_HEADS, N_HOPS, PART = 12, 12, 14, 64

CLICK = """async ([selector, x, y]) => {
    const element = document.querySelector(selector);
    const box = element.getBoundingClientRect();
    const place = { clientX: box.left + box.width * x, clientY: box.top + box.height * y, bubbles: true, button: 0 };
    const busy = () => window.pending > 0;
    const quiet = () => new Promise((done) => {
        let last = performance.now();
        const watch = new MutationObserver(() => (last = performance.now()));
        watch.observe(document.body, { subtree: true, childList: true, attributes: true, characterData: true });
        const check = () => {
            if (busy()) last = performance.now();
            if (performance.now() - last > 250) { watch.disconnect(); done(last); } else requestAnimationFrame(check);
        };
        requestAnimationFrame(check);
    });
    const began = performance.now();
    element.dispatchEvent(new MouseEvent("click", place));
    const changed = await quiet();
    return changed - began;
}"""

PENDING = """
    window.pending = 0;
    const ask = window.fetch;
    window.fetch = (...given) => {
        window.pending++;
        return ask(...given).finally(() => window.pending--);
    };
"""

USEFUL = """() => document.querySelector("[data-view=A] canvas")
    && document.querySelectorAll("[data-view=B1] rect[data-head]").length > 100
    && [...document.querySelectorAll("[data-view=A] img")].filter(img => img.complete && img.naturalWidth).length > 5"""


def write_large_study(folder: Path, n_images: int) -> Path:
    """A study of planted values, through the same writer as a real one."""
    labels = np.arange(n_images) % len(CLASSES)
    entries = [ImageEntry(f"{i:06d}.png", None, int(label), 1, "0" * 64) for i, label in enumerate(labels)]
    manifest = Manifest(None, "planted", tuple(entries), ())
    plan = plan_of(
        n_images, manifest.digest, n_layers=N_LAYERS, n_heads=[N_HEADS] * N_LAYERS, part_size=PART, batch_size=PART
    )
    folder.mkdir(parents=True)
    writing = StudyFolder(folder, plan, manifest)
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 230, (len(CLASSES), 1, 1, 3))
    for part in writing.missing:
        chosen = labels[part.start : part.stop]
        measured = measures_of(chosen, part.start, N_LAYERS, N_HEADS, N_HOPS)
        noise = rng.integers(-20, 20, (len(chosen), 8, 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
        measured["thumbnail"] = np.clip(colours[chosen] + noise, 0, 255).astype(np.uint8)
        writing.write_part(part, measured)
    angle = 2 * np.pi * labels / len(CLASSES)
    xy = np.stack([np.cos(angle), np.sin(angle)], axis=1) * 12 + rng.normal(0, 2.6, (n_images, 2))
    writing.write_derived({"image_xy": xy.astype(np.float32)})
    return folder


def serving(folder: Path) -> tuple[uvicorn.Server, str, float]:
    """The server in a thread, its address, and the seconds until it had read ahead what the first screen shows."""
    began = time.perf_counter()
    app = create_app(folder)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    for thread in threading.enumerate():
        if thread.name == "vitrail-warm":
            thread.join()
    port = server.servers[0].sockets[0].getsockname()[1]
    return server, f"http://127.0.0.1:{port}/", time.perf_counter() - began


def first_paint(page: Page, url: str) -> float:
    """Seconds from the navigation to the first screen that can be used."""
    page.goto(url, wait_until="commit")
    page.wait_for_function(USEFUL, polling="raf")
    return page.evaluate("performance.now()") / 1000


def clicks(page: Page, times: int) -> dict[str, list[float]]:
    """Milliseconds of each kind of click, `times` of each, on places not asked for before."""
    rng = np.random.default_rng(1)
    heads = rng.permutation(N_LAYERS * N_HEADS)
    kinds: dict[str, list[float]] = {"head (B1)": [], "image (A)": [], "one image / all": [], "filter “wrong”": []}
    page.evaluate("document.querySelector('.group[aria-label=\"Heads shown for\"] button').click()")
    page.wait_for_timeout(600)
    for i in range(times):
        layer, head = divmod(int(heads[i]), N_HEADS)
        kinds["head (B1)"].append(page.evaluate(CLICK, [f"[data-view=B1] rect[data-head=L{layer}H{head}]", 0.5, 0.5]))
        thumbs = page.locator("[data-view=A] button[data-image]").count()
        kinds["image (A)"].append(
            page.evaluate(CLICK, [f"[data-view=A] .grid button:nth-child({2 + i % (thumbs - 2)})", 0.5, 0.5])
        )
    for i in range(times):
        nth = 2 if i % 2 == 0 else 1
        scope = f'.group[aria-label="Heads shown for"] button:nth-child({nth})'
        kinds["one image / all"].append(page.evaluate(CLICK, [scope, 0.5, 0.5]))
    for _ in range(times):
        kinds["filter “wrong”"].append(page.evaluate(CLICK, ["[data-view=A] .filters > button", 0.5, 0.5]))
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--times", type=int, default=10)
    asked = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / f"vitrail-page-{asked.images}"
    if not (folder / "parts" / "derived.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        write_large_study(folder, asked.images)
    server, url, ready = serving(folder)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        paints = []
        for _ in range(5):
            page = browser.new_context(viewport={"width": 1280, "height": 720}).new_page()
            page.add_init_script(PENDING)
            paints.append(first_paint(page, url))
        page.wait_for_timeout(1500)
        kinds = clicks(page, asked.times)
        browser.close()
    server.should_exit = True
    print(f"| {asked.images:,} images x {N_LAYERS * N_HEADS} heads | median | slowest | target |")
    print("|---|---|---|---|")
    print(f"| server ready, read ahead | {ready:.1f} s | | |")
    paint = f"{statistics.median(paints):.2f} s | {max(paints):.2f} s"
    print(f"| first useful paint (new browser profile, 5 times) | {paint} | 1.5 s |")
    for kind, times in kinds.items():
        print(f"| click: {kind} | {statistics.median(times):.0f} ms | {max(times):.0f} ms | 100 ms |")


if __name__ == "__main__":
    main()
