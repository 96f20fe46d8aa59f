"""Reading files: bytes under a cap, text, and what went wrong in a sentence."""

import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from zipfile import BadZipFile

from vitrail.errors import BadImage, DataError

__all__ = ["BROKEN_ARCHIVE", "file_bytes", "sentence", "some", "text", "too_many_bytes"]

BROKEN_ARCHIVE = (BadZipFile, EOFError, zlib.error)
"""What reading a truncated or damaged .npz raises beside what a missing or foreign file does."""


def file_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of a file that is not too large.

    Args:
        path: Where it is.
        max_bytes: Largest size; a larger file is not read.

    Returns:
        The bytes.

    Raises:
        BadImage: There is no such file, it is no regular one, it is too large, or it cannot be read.
    """
    try:
        if not os.path.isfile(path):  # unlike `Path.is_file`, no error for a name too long or a link to itself
            raise BadImage("not a regular file" if os.path.exists(path) else "there is no such file")
        size = path.stat().st_size
        if size > max_bytes:
            raise BadImage(too_many_bytes(size, max_bytes))
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"the file cannot be read: {sentence(error)}") from error


def too_many_bytes(n_bytes: int, max_bytes: int) -> str:
    """The reason against a file that is too large.

    Args:
        n_bytes: Its size.
        max_bytes: The largest size that is read.

    Returns:
        A phrase for `BadImage`.
    """
    return f"{n_bytes:,} bytes, and at most {max_bytes:,} are read; make the file smaller"


def text(path: Path) -> str:
    """The content of a text file.

    Args:
        path: Where it is.

    Returns:
        The text, without a byte order mark.

    Raises:
        DataError: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} was to be read as UTF-8 text, and cannot be: {sentence(error)}.") from error


def sentence(error: BaseException) -> str:
    """The message of an exception, without the paths and addresses that vary from machine to machine.

    Args:
        error: The exception.

    Returns:
        A phrase without a full stop; the name of the exception if it says nothing.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return re.sub(r"<[^>]*>", "the data", text).strip().rstrip(".") or type(error).__name__


def some(names: Iterable[str], n_shown: int = 5) -> str:
    """The first of many names, and how many more there are.

    Args:
        names: All of them.
        n_shown: How many are written out.

    Returns:
        `a, b, c and 12 more`.
    """
    names = list(names)
    more = f" and {len(names) - n_shown} more" if len(names) > n_shown else ""
    return ", ".join(names[:n_shown]) + more
