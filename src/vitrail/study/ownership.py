"""Whose a folder is: a study writes only to folders that it made, and deletes only files that it wrote.

A marker file is the first file of every study. A folder with the marker, or with a plan that can be read (studies from
before there was a marker), is a study; any other folder that holds something is somebody else's and is refused.
"""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vitrail.errors import StudyError
from vitrail.outputs import STUDY_MARKER, local_path
from vitrail.study.locking import (
    LEASES,
    OPENING,
    Access,
    folder_lock,
    hold_when_free,
    lock_files,
    presence,
    unwritable,
    workers,
)
from vitrail.study.object_leases import ObjectLeases
from vitrail.study.object_store import ObjectStudy
from vitrail.study.store import ARRAYS, IMAGES, PARTS, PATTERNS, PLAN, read_plan

__all__ = [
    "CALIBRATION",
    "MARKER",
    "MODEL",
    "UNFINISHED",
    "as_bytes",
    "refuse_foreign_folder",
    "remove_arrays",
    "remove_unfinished",
    "store_access",
    "worker_access",
    "write_access",
    "write_atomic",
]

MARKER = STUDY_MARKER

MODEL = "model.json"
"""How the model was opened. Apart from the plan: where a weights file lies changes no number, what is in it does."""

CALIBRATION = "survey.safetensors"
UNFINISHED = ".unfinished"

MARKER_TEXT = "Vitrail made this folder for a study and writes to it.\n"

UNFINISHED_FILES = re.compile(
    rf"(?:{re.escape(MARKER)}|{PLAN}|{IMAGES}|{MODEL}|{CALIBRATION}|{PARTS}/(?:\d{{5,}}|derived|{PATTERNS})\.json"
    rf"|{PATTERNS}/(?:patch|cls)\.safetensors){re.escape(UNFINISHED)}"
)
"""Files that a run which was killed leaves half-written, by their place in the folder."""

ARRAY_FILES = re.compile(r"(?:\w+/)?zarr\.json|(?:\w+/)?c(?:/\d+)*")
"""Files of a group of Zarr arrays, by their place in the group, or of one array by their place in the array."""

UNFINISHED_ARRAY_FILES = re.compile(
    r"(?:\w+/)?zarr\.[0-9a-f]{32}\.partial|(?:\w+/)?c(?:/\d+)*/\d+\.[0-9a-f]{32}\.partial"
)
"""What zarr leaves of an array's file when it is killed while it writes it."""


def refuse_foreign_folder(folder: Path) -> None:
    """Refuses to begin or to go on with a study in a folder that a study did not make.

    Args:
        folder: Where the study is to be.

    Raises:
        StudyError: `folder` is a file, holds anything that is not a study's, or holds results without their plan.
        UsageError: `folder` is an address such as `s3://bucket/study`.
    """
    local_path(folder)
    if folder.exists() and not folder.is_dir():
        raise StudyError(f"{folder} is a file, and a study is a folder; name another place.")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if PLAN in names:
        read_plan(folder)
    elif MARKER in names:
        _refuse_missing_plan(folder)
    else:
        _refuse_other_files(folder, names)


def _refuse_other_files(folder: Path, names: set[str]) -> None:
    others = sorted(names - {MARKER + UNFINISHED} - {path.name for path in lock_files(folder)})
    if others:
        raise StudyError(
            f"{folder} holds other files ({', '.join(others[:3])}) and no study; name a new or empty folder."
        )


def _refuse_missing_plan(folder: Path) -> None:
    """A study that has no plan yet has no results either."""
    results = [path for path in (folder / ARRAYS, folder / PATTERNS, *(folder / PARTS).glob("*.json")) if path.exists()]
    if results:
        raise StudyError(
            f"{folder} holds results ({results[0].relative_to(folder)}) and no {PLAN}, so nobody can say what they are "
            f"of. Put {PLAN} back, or name a new folder."
        )


@contextmanager
def write_access(folder: Path) -> Iterator[Access]:
    """Makes a folder a study's and holds its lock; a folder in which no study was begun is left as it was.

    Args:
        folder: The study, or the path where one will be.

    Yields:
        What says that this process writes alone; access ends with the context.

    Raises:
        StudyError: The folder is not a study's, another process writes it, or nothing can be written to it.
        UsageError: `folder` is an address such as `s3://bucket/study`.
    """
    refuse_foreign_folder(folder)
    with folder_lock(folder) as lock, _marked(folder):
        others = workers(folder)
        if others:
            raise StudyError(
                f"{others[0]} is at work on {folder} as a worker. Wait until it has ended, or join it with --worker."
            )
        yield Access(lock)


@contextmanager
def worker_access(folder: Path, held: ExitStack) -> Iterator[Access]:
    """Makes a folder a study's and joins those who work on it; nobody else joins meanwhile.

    Args:
        folder: The study, or the place where one will be.
        held: What keeps this worker's place among them until it ends.

    Yields:
        What says that this process is one of several.

    Raises:
        StudyError: The folder is not a study's, a process writes it alone, or nothing can be written to it.
        UsageError: `folder` is an address such as `s3://bucket/study`.
    """
    refuse_foreign_folder(folder)
    with folder_lock(folder, OPENING, wait=True), folder_lock(folder), _marked(folder):
        others = bool(workers(folder))
        yield Access(leases=held.enter_context(presence(folder)), others=others)


@contextmanager
def store_access(study: ObjectStudy, held: ExitStack) -> Iterator[Access]:
    """Joins those who work on a study in an object store; nobody else joins meanwhile.

    Args:
        study: The study, or the address where one will be.
        held: What keeps this worker's place among them until it ends.

    Yields:
        What says that this process is one of several.

    Raises:
        StudyError: There are other objects and no study.
    """
    others = study.names - {LEASES}
    if others and not others & {PLAN, MARKER}:
        raise StudyError(
            f"{study.address} holds other objects ({', '.join(sorted(others)[:3])}) and no study; name another place."
        )
    leases = ObjectLeases(study)
    held.callback(leases.release_all)
    with hold_when_free(leases, "opening"):
        study.pull()
        has_company, number = leases.others(), 0
        while not leases.acquire(f"worker-{number:04d}"):
            number += 1
        with _marked(study.folder):
            yield Access(leases=leases, others=has_company, mirror=study)
        study.push_changes()


@contextmanager
def _marked(folder: Path) -> Iterator[None]:
    """Puts the marker into a folder, and takes it away again if no study was begun there."""
    refuse_foreign_folder(folder)  # again, now that nobody else begins a study here
    try:
        if not (folder / PLAN).is_file() and not (folder / MARKER).is_file():
            _write_marker(folder)
        yield
    finally:
        if not any((folder / name).exists() for name in (PLAN, IMAGES, PARTS)):
            (folder / MARKER).unlink(missing_ok=True)


def _write_marker(folder: Path) -> None:
    try:
        write_atomic(folder / MARKER, MARKER_TEXT)
    except OSError as error:
        raise unwritable(folder, error) from error


def as_bytes(text: str) -> bytes:
    """Text as `write_atomic` writes it.

    Args:
        text: Any; bytes of a file's name that are no UTF-8 become escapes, which JSON reads back.

    Returns:
        UTF-8.
    """
    return text.encode("utf-8", "backslashreplace")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file such that it has all of the content or is as it was before, whenever the process ends.

    Args:
        path: The file.
        content: All of it; text is written by `as_bytes`.

    Raises:
        OSError: The disk does not take it.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    with open(unfinished, "wb") as file:
        file.write(as_bytes(content) if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    if os.name == "nt":  # folders cannot be opened there, and need not be flushed
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_unfinished(folder: Path) -> None:
    """Removes what a run that was killed has left half-written in a study, and nothing else.

    Args:
        folder: The study.

    Raises:
        StudyError: There are files that a study does not write among half-written arrays.
    """
    for part in (folder, folder / PARTS, folder / PATTERNS):
        for path in part.glob(f"*{UNFINISHED}"):
            if UNFINISHED_FILES.fullmatch(path.relative_to(folder).as_posix()) and path.is_file():
                path.unlink()
    for group in (folder / ARRAYS, folder / PATTERNS / ARRAYS):
        remove_arrays(group.with_name(ARRAYS + UNFINISHED))
        for path in group.rglob("*.partial"):
            if UNFINISHED_ARRAY_FILES.fullmatch(path.relative_to(group).as_posix()) and path.is_file():
                path.unlink()


def remove_arrays(group: Path) -> None:
    """Removes a group of Zarr arrays, or one array, from a study, if it is there.

    Args:
        group: The folder of the group or array.

    Raises:
        StudyError: It holds files that are not of Zarr arrays; nothing was removed then.
    """
    if not group.exists():
        return
    folders: list[Path] = []
    files: list[Path] = []
    for above, below, names in os.walk(group):
        folders.append(Path(above))
        files += [
            Path(above) / name for name in [*names, *(name for name in below if (Path(above) / name).is_symlink())]
        ]
    for file in files:
        relative = file.relative_to(group).as_posix()
        is_array_file = ARRAY_FILES.fullmatch(relative) or UNFINISHED_ARRAY_FILES.fullmatch(relative)
        if file.is_symlink() or not is_array_file:
            raise StudyError(
                f"{group} is to be written anew and holds a file that Vitrail did not write ({relative}); move it away."
            )
    for file in files:
        file.unlink()
    for folder in reversed(folders):
        folder.rmdir()
