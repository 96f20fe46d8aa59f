"""A real Chromium against the real server on a real study of the small model that comes with Vitrail."""

import importlib
import os
import pkgutil
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from served import N_IMAGES, PATIENCE_MS, Site

import vitrail
from vitrail.app import create_app
from vitrail.app.static_files import built_page
from vitrail.study.store import open_study

MEASURES = "heads,patches,token_norm,pattern_rule,neuron_peak,neuron_peak_patch"
"""What is quick to measure; views of the rest have the planted study."""

QUIET = ("background-networking", "component-update", "sync")
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", *(f"--disable-{part}" for part in QUIET)]


def chromium() -> str:
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not found or not Path(found).exists():
        pytest.skip("no Chromium here: set CHROMIUM to one")
    return found


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from vitrail.models.open import open_vit
    from vitrail.study.run import run_study

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("page") / "crops"
    run_study(open_vit("vitrail:photos"), "photos", out=folder, limit=N_IMAGES, batch_size=16, measures=MEASURES)
    return folder


@pytest.fixture(scope="session")
def serving() -> Iterator[Callable[..., str]]:
    """Serves an application in a thread until the session ends; answers its address.

    All modules are imported first: the shape checks parse each one, and Python 3.11 fails where two threads parse at
    once (gh-106905), as the server's threads would at the first questions.
    """
    for module in pkgutil.walk_packages(vitrail.__path__, "vitrail."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    servers: list[tuple[uvicorn.Server, threading.Thread, socket.socket]] = []

    def start(app: Any) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        servers.append((server, thread, listening))
        while not server.started:
            time.sleep(0.02)
        return f"http://127.0.0.1:{listening.getsockname()[1]}/"

    yield start
    for server, thread, listening in servers:
        server.should_exit = True
        thread.join(10)
        listening.close()


@pytest.fixture(scope="session")
def site(study: Path, serving: Callable[..., str]) -> Site:
    if not built_page():
        pytest.skip("the page is not built: install the package, or run `npm ci` and `npm run build` in web/")
    from vitrail.live import LiveModel
    from vitrail.models.open import open_vit

    live = LiveModel(open_vit("vitrail:photos"))
    return Site(serving(create_app(study, live)), open_study(study), live)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    sync_api.expect.set_options(timeout=PATIENCE_MS / 3)
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        yield started
        started.close()


def console_error(message: Any) -> str:
    """What the page wrote to its console, and the address that it concerns."""
    return f"{message.text} ({message.location['url']})"


@pytest.fixture
def visit(browser: Any, site: Site) -> Iterator[Callable[..., Any]]:
    """Opens the page at a deep link. Afterwards: no console error, and no request left this machine."""
    contexts, said, asked = [], [], []

    def opened(query: str = "", *, allow_errors: bool = False, url: str | None = None, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 720}, **options})
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        if not allow_errors:
            page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((url or site.url) + query)
        page.wait_for_selector("[data-view=images] [data-image]")
        page.wait_for_selector("#evidence > section")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    local = ("http://127.0.0.1:", "data:", "blob:")
    assert [address for address in asked if not address.startswith(local)] == []
