"""Where results are written: places on this computer, and files that Vitrail wrote itself or that are new.

Vitrail overwrites its own files and nobody else's: each kind of file carries a sign by which it is known again.
"""

import json
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from vitrail.errors import UsageError

__all__ = [
    "EXPORT_SIGN",
    "FIGURE_SIGN",
    "INDEX_MARKER",
    "STUDY_MARKER",
    "STUDY_PLAN",
    "address",
    "export_listing",
    "is_address",
    "is_figure",
    "local_file",
    "local_folder",
    "local_path",
    "output_kind",
    "refuse_foreign_file",
    "remove_unfinished",
    "write_atomically",
]

STUDY_MARKER, STUDY_PLAN = ".vitrail-study", "study.json"
"""Files of every study; the oldest have no marker."""

EXPORT_SIGN = "export.json"
"""The file of an export that says what it is."""

INDEX_MARKER = "token-index.json"
"""The file of an index of tokens that says what it is."""

FIGURE_SIGN = b"Software\x00vitrail"
"""In every figure that is a PNG, before its pixels."""

SIGN_BYTES = 1024
"""The beginning of a figure, which has its sign."""

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


def local_file(path: str | Path) -> Path:
    """The file that results are written to, asked before there are any.

    Args:
        path: As the user wrote it; there may be none yet.

    Returns:
        The path.

    Raises:
        UsageError: It lies below a file, or is no path on this computer.
    """
    path = local_path(path)
    above = next((each for each in path.parents if os.path.lexists(each)), None)
    if above is not None and not os.path.isdir(above):
        raise UsageError(f"{path} cannot be written: {above} is no folder; name another place.")
    return path


def local_folder(path: str | Path) -> Path:
    """The folder that results are written to.

    Args:
        path: As the user wrote it; there may be none yet.

    Returns:
        The path.

    Raises:
        UsageError: A file is there or above it, or it is no path on this computer.
    """
    path = local_file(path)
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UsageError(f"{path} is no folder, and one was to be written there; name another place.")
    return path


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


def export_listing(folder: Path) -> dict[str, Any] | None:
    """What `vitrail export` says of a folder that it wrote.

    Args:
        folder: Any folder.

    Returns:
        The content of its `export.json`; None where that is of another program.

    Raises:
        OSError: There is none, or it cannot be read.
        ValueError: It is no JSON.
    """
    try:
        content = json.loads((folder / EXPORT_SIGN).read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    is_own = isinstance(content, dict) and {"vitrail", "format", "files"} <= content.keys()
    return content if is_own else None


def output_kind(folder: Path, names: Collection[str]) -> str | None:
    """What of Vitrail's a folder is, so that no image of a user's is in it.

    Args:
        folder: Any folder.
        names: Of the files in it.

    Returns:
        Words such as "a study"; None for a folder that is not Vitrail's.
    """
    if STUDY_MARKER in names or {STUDY_PLAN, "images.json", "parts"} <= set(names):
        return "a study"
    if INDEX_MARKER in names:
        return "an index of tokens"
    if "zarr.json" in names:
        return "arrays"
    try:
        return "an export of Vitrail's" if EXPORT_SIGN in names and export_listing(folder) is not None else None
    except (OSError, ValueError):
        return None  # of another program, or damaged: what is in it is told file by file


def is_figure(path: Path) -> bool:
    """Whether a file is a figure that Vitrail drew.

    Args:
        path: A file.

    Returns:
        True for a PNG with Vitrail's sign; False for one that cannot be read, which is told when it is.
    """
    if path.suffix.lower() != ".png":
        return False
    try:
        with path.open("rb") as file:
            return FIGURE_SIGN in file.read(SIGN_BYTES)
    except OSError:
        return False


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
