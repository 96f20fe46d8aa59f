"""Files in a list: paths, a table of paths with labels, and the members of a tar file in the WebDataset layout."""

import csv
import json
import os
import reprlib
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from vitrail.data.decode import MAX_BYTES
from vitrail.data.files import sentence, text, too_many_bytes
from vitrail.data.images import Item
from vitrail.data.labels import NUMBER
from vitrail.errors import BadImage, DataError

__all__ = ["LABEL_COLUMNS", "file_id", "file_items", "table_items", "tar_items"]

FILE_COLUMNS = ("file", "file_name", "filename", "path", "image", "image_path")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "cls", "category", "target", "wnid")
"""What the columns of tables are called, in the order in which they are looked for."""

CLASS_SUFFIX = ".cls"
"""The member of a WebDataset sample that holds its class."""

NOT_IMAGES = (CLASS_SUFFIX, ".json", ".txt", ".npy", ".npz", ".pth", ".pyd", ".pickle", ".id", ".index")
"""Members of a WebDataset sample beside its image."""

LONGEST_CLASS_BYTES = 1000


def file_id(path: Path) -> str:
    """The id of a file: its path with forward slashes; bytes that are no UTF-8 are written as escapes.

    Args:
        path: Relative to the folder of the images.

    Returns:
        The id.
    """
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def file_items(paths: Sequence[Path], class_names: Sequence[str | None] | None = None) -> list[Item]:
    """Files as items, in their order.

    Args:
        paths: The files.
        class_names: The name of each one's class; default: of the folder that it lies in. The number of a folder that
            all share tells nothing apart: `2024/07/a.jpg` is no image of class 7.

    Returns:
        Items with ids relative to the folder that all files share.
    """
    absolute = [path.absolute() for path in paths]
    if not absolute:
        return []
    shared = Path(os.path.commonpath([path.parent for path in absolute]))
    folders = [file_id(Path(path.parent.name)) for path in absolute]
    in_classes = len({path.parent for path in absolute}) > 1 or not NUMBER.fullmatch(folders[0])
    names = class_names or (folders if in_classes else [None] * len(folders))
    return [Item(file_id(path.relative_to(shared)), name, path) for path, name in zip(absolute, names, strict=True)]


def table_items(path: Path) -> list[Item]:
    """The files that a CSV or JSON file lists, with the labels it gives them.

    Args:
        path: A CSV file with a column of files and one of labels, by their names in its first line or in this order;
            or a JSON file with an object `{file: label}`, or a list of objects with such entries. Files are relative to
            the table's folder; a label is a class name or the index of a class.

    Returns:
        Items in the order of the table.

    Raises:
        DataError: It is not such a table.
    """
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    return file_items([path.parent / file for file, _ in rows], [label for _, label in rows])


def _csv_rows(path: Path) -> list[tuple[str, str | None]]:
    try:
        lines = [(number, row) for number, row in enumerate(csv.reader(text(path).splitlines()), 1) if row]
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV: {sentence(error)}.") from error
    if not lines:
        return []
    titles = [cell.strip().lower() for cell in lines[0][1]]
    file, label = _column(titles, FILE_COLUMNS), _column(titles, LABEL_COLUMNS)
    has_titles = file is not None and label is not None
    if not has_titles:
        file, label = 0, 1
    rows: list[tuple[str, str | None]] = []
    for number, cells in lines[has_titles:]:
        if len(cells) <= max(file or 0, label or 0):
            raise DataError(f"Line {number} of {path} has {len(cells)} cells; write a file and its label.")
        rows.append((cells[file or 0].strip(), cells[label or 0].strip() or None))
    return rows


def _column(titles: Sequence[str], names: Sequence[str]) -> int | None:
    return next((titles.index(name) for name in names if name in titles), None)


def _json_rows(path: Path) -> list[tuple[str, str | None]]:
    try:
        content = json.loads(text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {sentence(error)}.") from error
    if isinstance(content, dict):
        return [(str(file), _label(path, label)) for file, label in content.items()]
    if isinstance(content, list) and all(isinstance(each, dict) for each in content):
        return [_json_row(path, each) for each in content]
    raise DataError(f"{path} is no table of labels: write an object {{file: label}}, or a list of objects.")


def _json_row(path: Path, entry: dict[str, Any]) -> tuple[str, str | None]:
    file = next((entry[name] for name in FILE_COLUMNS if name in entry), None)
    label = next((entry[name] for name in LABEL_COLUMNS if name in entry), None)
    if not isinstance(file, str):
        raise DataError(f"{path} has an entry without a file, {sorted(entry)[:5]}; call it {FILE_COLUMNS[0]!r}.")
    return file, _label(path, label)


def _label(path: Path, label: Any) -> str | None:
    if label is not None and (isinstance(label, bool) or not isinstance(label, str | int)):
        raise DataError(
            f"{path} has the label {reprlib.repr(label)}; a label is a class name or the index of a class, and a table "
            "is an object {file: label}, or a list of objects."
        )
    return None if label is None else str(label)


def tar_items(path: Path) -> list[Item]:
    """The images in a tar file, each read from it when it is needed; nothing is unpacked.

    Args:
        path: An uncompressed tar file: in the WebDataset layout, where `a.cls` has the class of `a.jpg`, or of class
            folders.

    Returns:
        Items in the order of the file, whose ids are the members' names.

    Raises:
        DataError: It cannot be read, or is compressed.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            members = [member for member in archive if member.isreg() and not member.issparse()]
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an uncompressed tar file: {sentence(error)}.") from error
    images = [member for member in members if not _name(member).endswith(NOT_IMAGES) and _name(member)[0] != "."]
    classes = dict(_classes(path, members))
    return [
        Item(member.name, classes.get(_stem(member), _folder(member)), partial(_member_bytes, path, member, MAX_BYTES))
        for member in images
    ]


def _classes(path: Path, members: Sequence[tarfile.TarInfo]) -> Iterator[tuple[str, str]]:
    for member in members:
        if _name(member).endswith(CLASS_SUFFIX):
            try:
                yield _stem(member), _member_bytes(path, member, LONGEST_CLASS_BYTES).decode().strip()
            except (BadImage, UnicodeDecodeError) as error:
                raise DataError(f"{member.name} in {path} holds no class: {sentence(error)}.") from error


def _name(member: tarfile.TarInfo) -> str:
    return PurePosixPath(member.name).name.lower()


def _stem(member: tarfile.TarInfo) -> str:
    """What the members of a sample have in common: the name up to the first dot of its last part."""
    folder, _, name = member.name.rpartition("/")
    return f"{folder}/{name.split('.')[0]}"


def _folder(member: tarfile.TarInfo) -> str | None:
    parts = [part for part in PurePosixPath(member.name).parts if part != "."]
    return parts[0] if len(parts) > 1 else None


def _member_bytes(path: Path, member: tarfile.TarInfo, max_bytes: int) -> bytes:
    if member.size > max_bytes:
        raise BadImage(too_many_bytes(member.size, max_bytes))
    try:
        with open(path, "rb") as file:
            file.seek(member.offset_data)
            return file.read(member.size)
    except OSError as error:
        raise BadImage(f"{path} cannot be read: {sentence(error)}") from error
