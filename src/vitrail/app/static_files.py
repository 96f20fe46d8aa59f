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
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html; charset=utf-8"}


@dataclass(frozen=True)
class StaticFile:
    """One file of the page; `lasting` where its name changes with its content."""

    content: bytes
    media_type: str
    lasting: bool


def built_page(folder: Path = STATIC) -> dict[str, StaticFile]:
    """Every file of the built page under the path it is asked by; empty if it has not been built."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
            kind = TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            name = "/" + path.relative_to(folder).as_posix()
            found[name] = StaticFile(path.read_bytes(), kind, name.startswith("/assets/"))
    return found
