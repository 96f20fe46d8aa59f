"""The built page, read into memory once: a request picks from this list and never reaches the disk."""

import mimetypes
from dataclasses import dataclass
from pathlib import Path

__all__ = ["NOT_BUILT", "StaticFile", "built_page"]

STATIC = Path(__file__).parent / "static"

NOT_BUILT = (
    "The page is not built. Install the package (`pip install .` builds it with the Node it brings along), "
    "or run `npm ci` and `npm run build` in `web/`."
)
MEDIA_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".html": "text/html; charset=utf-8",
}
"""Types that the page depends on, whatever this machine's own table of types says."""


@dataclass(frozen=True)
class StaticFile:
    """One file of the page; `immutable` where its name changes with its content."""

    content: bytes
    media_type: str
    immutable: bool


def built_page(folder: Path = STATIC) -> dict[str, StaticFile]:
    """Read every file of the built page.

    Args:
        folder: Where the page was built.

    Returns:
        The files by the path of their request, such as "/index.html"; empty if the page is not built.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
            media_type = MEDIA_TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0]
            name = "/" + path.relative_to(folder).as_posix()
            files[name] = StaticFile(
                path.read_bytes(), media_type or "application/octet-stream", name.startswith("/assets/")
            )
    return files
