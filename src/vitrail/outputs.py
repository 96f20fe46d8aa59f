"""Where results are written: places on this computer, and files that Vitrail wrote itself or that are new.

Vitrail overwrites its own files and nobody else's: each kind of file carries a sign by which it is known again.
"""

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

from vitrail.errors import UsageError

__all__ = ["address", "is_address", "local_path", "refuse_foreign_file", "remove_unfinished", "write_atomically"]

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Two letters or more, since one is a drive of Windows; one slash, since `Path` joins two."""


def is_address(path: object) -> bool:
    """Whether a path is an address such as `s3://bucket/study` and not a place on this computer.

    Args:
        path: As the user wrote it.

    Returns:
        True for an address.
    """
    return isinstance(path, str | Path) and ADDRESS.match(str(path)) is not None


def address(path: str | Path) -> str:
    """An address as it is written, of which a `Path` has joined two slashes.

    Args:
        path: An address.

    Returns:
        Such as "s3://bucket/study", without a slash at its end.
    """
    return re.sub(r":/+", "://", str(path), count=1).rstrip("/")


def local_path(path: str | Path) -> Path:
    """The path that results are written to.

    Args:
        path: As the user wrote it.

    Returns:
        The path.

    Raises:
        UsageError: It is an address such as `s3://bucket/study`, which would become a folder of that name.
    """
    if is_address(path):
        raise UsageError(
            f"{path} is an address, and this is written to local folders only (object stores take studies); name a "
            "folder and copy it there."
        )
    return Path(path)


def refuse_foreign_file(path: Path, sign: bytes) -> None:
    """Refuses to overwrite a file that Vitrail did not write.

    Args:
        path: Where a file is going to be written.
        sign: Bytes that are in every file of this kind which Vitrail writes.

    Raises:
        UsageError: There is a file without the sign, or it cannot be read; an empty one may be overwritten.
    """
    if not path.exists():
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path} is there and cannot be read ({error.strerror}), so it is not overwritten; name another place."
        ) from error
    if content and sign not in content:
        raise UsageError(f"{path} was not written by Vitrail and is not overwritten; move it, or name another place.")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that a reader, or a killed run, finds the old one or the new one.

    Args:
        path: The file.
        write: Writes all of it to the path that it is called with, beside the file.

    Raises:
        OSError: The disk does not take it; the old file is still there.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def remove_unfinished(folder: Path, names: Collection[str]) -> None:
    """Removes what `write_atomically` was writing when its process was killed.

    Args:
        folder: Where it wrote; nobody writes there now.
        names: Of the files that it writes there.
    """
    for path in folder.glob(".*.*"):
        name, _, process = path.name[1:].rpartition(".")
        if name in names and process.isdigit():
            path.unlink()
