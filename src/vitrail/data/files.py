"""Reading files: bytes under a cap, text, and what went wrong in a sentence."""

import re
from collections.abc import Iterable
from pathlib import Path

from vitrail.errors import BadImage, DataError

__all__ = ["file_bytes", "sentence", "some", "text", "too_many_bytes"]


def file_bytes(path: Path, max_bytes: int) -> bytes:
    try:
        if not path.is_file():
            raise BadImage("there is no such file" if not path.exists() else "not a regular file")
        size = path.stat().st_size
        if size > max_bytes:
            raise BadImage(too_many_bytes(size, max_bytes))
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"the file cannot be read: {sentence(error)}") from error


def too_many_bytes(n_bytes: int, max_bytes: int) -> str:
    return f"{n_bytes:,} bytes, and at most {max_bytes:,} are read; make the file smaller"


def text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} was to be read as UTF-8 text, and cannot be: {sentence(error)}.") from error


def sentence(error: BaseException) -> str:
    """What an exception says, without the paths and addresses that vary from machine to machine."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return re.sub(r"<[^>]*>", "the data", text).strip().rstrip(".") or type(error).__name__


def some(names: Iterable[str], n_shown: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - n_shown} more" if len(names) > n_shown else ""
    return ", ".join(names[:n_shown]) + more
