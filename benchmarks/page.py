"""How fast the page is on a large stored study: 50,000 images x 144 heads, in a real browser.

    python benchmarks/page.py            writes the study (about 1 GB) under the temporary folder, once
    python benchmarks/page.py --images 5000
    python benchmarks/page.py --study STUDY --photo PHOTO.jpg
                                         tabs, the pointer and an own image, on a study of your own with its model

First useful paint: from the navigation until dots, heat map of heads and thumbnails are drawn. A click: from
the event until the last change of the page that follows from it. There is no live model. A tab: from the click until
its views stand and were painted; numbers that the model computes for them come later. The pointer: from its move over a
patch until the overlay of that patch is drawn. An own image: from the choice of the file until its first overlay.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from synthetic_study import CLASSES, measures_of, plan_of
from vitrail.analysis import declaration
from vitrail.app import create_app
from vitrail.data import ImageEntry, Manifest
from vitrail.study.writing import StudyFolder

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
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

USEFUL = """() => document.querySelector("[data-view=images] canvas")
    && document.querySelectorAll("[data-view=grid] rect[data-head]").length > 100
    && [...document.querySelectorAll("[data-view=images] img")]
        .filter(img => img.complete && img.naturalWidth).length > 5"""


def write_large_study(folder: Path, n_images: int) -> Path:
    """A study of planted values, through the same writer as a real one."""
    labels = np.arange(n_images) % len(CLASSES)
    entries = [ImageEntry(f"{i:06d}.png", None, int(label), 1, "0" * 64) for i, label in enumerate(labels)]
    manifest = Manifest(None, "planted", tuple(entries), ())
    planted = measures_of(labels[:1], 0, N_LAYERS, N_HEADS, N_HOPS)
    plan = plan_of(
        n_images,
        manifest.digest,
        n_layers=N_LAYERS,
        n_heads=[N_HEADS] * N_LAYERS,
        part_size=PART,
        batch_size=PART,
        measures={name: declaration(name).version for name in planted},
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


def serving(folder: Path, live: Any = None) -> tuple[uvicorn.Server, str, float]:
    """The server in a thread, its address, and the seconds until it had read ahead what the first screen shows."""
    began = time.perf_counter()
    app = create_app(folder, live)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    for thread in threading.enumerate():
        if thread.name == "vitrail-warm-up":
            thread.join()
    port = server.servers[0].sockets[0].getsockname()[1]
    return server, f"http://127.0.0.1:{port}/", time.perf_counter() - began


def first_paint(page: Page, url: str) -> float:
    """Seconds from the navigation to the first screen that can be used."""
    page.goto(url + "?tab=heads", wait_until="commit")
    page.wait_for_function(USEFUL, polling="raf", timeout=120_000)
    return page.evaluate("performance.now()") / 1000


def clicks(page: Page, times: int) -> dict[str, list[float]]:
    """Milliseconds of each kind of click, `times` of each, on places not asked for before."""
    rng = np.random.default_rng(1)
    heads = rng.permutation(N_LAYERS * N_HEADS)
    kinds: dict[str, list[float]] = {"head": [], "image": [], "one image / all": [], "filter “wrong”": []}
    page.evaluate("document.querySelector('.group[aria-label=\"Heads of\"] button:nth-child(2)').click()")
    page.wait_for_timeout(600)
    for i in range(times):
        layer, head = divmod(int(heads[i]), N_HEADS)
        kinds["head"].append(page.evaluate(CLICK, [f"[data-view=grid] rect[data-head=L{layer}H{head}]", 0.5, 0.5]))
        thumbs = page.locator("[data-view=images] [role=option]").count()
        kinds["image"].append(
            page.evaluate(CLICK, [f"[data-view=images] [role=option]:nth-child({2 + i % (thumbs - 2)})", 0.5, 0.5])
        )
    for i in range(times):
        nth = 1 if i % 2 == 0 else 2
        scope = f'.group[aria-label="Heads of"] button:nth-child({nth})'
        kinds["one image / all"].append(page.evaluate(CLICK, [scope, 0.5, 0.5]))
    for _ in range(times):
        kinds["filter “wrong”"].append(page.evaluate(CLICK, ["[data-view=images] .filters > button", 0.5, 0.5]))
    return kinds


TAB = """async (tab) => {
    const began = performance.now();
    document.querySelector(`[data-tab=${tab}]`).click();
    const frame = () => new Promise((done) => requestAnimationFrame(done));
    while (document.querySelector(`[data-tab=${tab}]`).getAttribute("aria-selected") !== "true"
        || !document.querySelector("#evidence > section")) await frame();
    await frame();
    await frame();
    return performance.now() - began;
}"""

HOVER = """async (n) => {
    const photo = document.querySelector("#photograph .hero svg");
    const box = photo.getBoundingClientRect();
    const said = () => document.querySelector("#photograph [data-scale] [aria-live]").dataset.value;
    const times = [];
    for (let i = 0; i < n; i++) {
        const [x, y] = [(i * 0.37) % 1, (i * 0.53) % 1];
        const place = { clientX: box.left + box.width * x, clientY: box.top + box.height * y };
        const before = said();
        const began = performance.now();
        photo.dispatchEvent(new PointerEvent("pointermove", { ...place, bubbles: true, pointerType: "mouse" }));
        await Promise.resolve();
        await Promise.resolve();
        photo.getBoundingClientRect();
        if (said() !== before) times.push(performance.now() - began);
        await new Promise((done) => requestAnimationFrame(done));
    }
    return times;
}"""

TABS = ("heads", "patterns", "patches", "tokens", "windows", "what-if", "findings")
N_HOVERS = 60
OVERLAY = "#photograph .hero svg[data-overlay=weights]"


def row(what: str, times: list[float], goal: str) -> str:
    """A row of the table, of milliseconds."""
    return f"| {what} | {statistics.median(times):.0f} ms | {max(times):.0f} ms | {goal} |"


def with_model(browser: Browser, study: Path, photo: Path, times: int) -> list[str]:
    """Rows of the table that need a study with its model."""
    from vitrail.live import LiveModel
    from vitrail.study.reopen import reopen

    server, url, _ = serving(study, LiveModel(reopen(study)))
    page = browser.new_context(viewport={"width": 1280, "height": 720}).new_page()
    page.set_default_timeout(300_000)
    page.goto(url + "?tab=heads")
    page.wait_for_selector(OVERLAY)
    switches: list[float] = []
    for _ in range(times):
        for tab in TABS:
            switches.append(page.evaluate(TAB, tab))
            page.wait_for_timeout(400)
    page.goto(url + "?tab=heads&scope=image")
    page.wait_for_selector(OVERLAY)
    page.wait_for_function("() => !document.querySelector('.skeleton, [aria-busy=true]')")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    hovers = page.evaluate(HOVER, N_HOVERS)
    requests = len(asked)
    overlays, wholes = [], []
    for _ in range(3):
        page.goto(url + "?tab=heads&scope=image")
        page.wait_for_selector(OVERLAY)
        page.wait_for_function("() => !document.querySelector('.skeleton, [aria-busy=true]')")
        began = time.perf_counter()
        with page.expect_response(lambda answer: "/api/live/attention/u" in answer.url):
            page.set_input_files("input[type=file]", photo)
        page.wait_for_selector(OVERLAY)
        overlays.append((time.perf_counter() - began) * 1000)
        page.wait_for_function("() => !document.querySelector('.skeleton, [aria-busy=true]')")
        wholes.append((time.perf_counter() - began) * 1000)
    server.should_exit = True
    return [
        row("another tab", switches, "200 ms"),
        row(f"pointer on another patch ({requests} requests in {len(hovers)} moves)", hovers, "16 ms, no request"),
        row("own image: first overlay", overlays, "1 s"),
        row("own image: everything on the tab of heads", wholes, ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path)
    parser.add_argument("--photo", type=Path)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--times", type=int, default=10)
    asked = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if asked.study:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
            rows = with_model(browser, asked.study, asked.photo, asked.times)
            browser.close()
        print("| a study with its model | median | slowest | target |", "|---|---|---|---|", *rows, sep="\n")
        return
    folder = Path(tempfile.gettempdir()) / f"vitrail-page-{asked.images}"
    if not (folder / "parts" / "derived.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        write_large_study(folder, asked.images)
    server, url, ready = serving(folder)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
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
        print(f"| click: {kind} | {statistics.median(times):.0f} ms | {max(times):.0f} ms | 100 ms, slowest 200 |")


if __name__ == "__main__":
    main()
