"""`open_images`: where images come from, their ids and their order. Nothing is decoded here."""

import importlib
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vitrail.data.decode import MAX_BYTES
from vitrail.data.files import file_bytes, sentence, some, text, too_many_bytes
from vitrail.data.images import ImageSource, Item, Skipped, first_reasons
from vitrail.data.labels import labels_of, read_class_names
from vitrail.errors import BadImage, DataError, NoImages, UsageError

__all__ = ["open_images"]

N_CROPS = 320
"""How many of the built-in crops `photos` stands for when no limit is given."""


def open_images(
    source: object,
    *,
    class_names: Sequence[str] | str | Path | None = None,
    n_classes: int | None = None,
    labels: bool = True,
    limit: int | None = None,
) -> ImageSource:
    """The images that `source` names, in a fixed order, with labels where class names give them. Decodes nothing.

    `source`: a folder of images or of class folders, a text file that lists files, one image file, a sequence of files,
    a Hugging Face dataset or `"hf:NAME:SPLIT"`, or `"photos"` for the built-in crops. `class_names`: the model's
    classes in order, or a file with one a line (`tench`, or `n01440764 tench, Tinca tinca`); `n_classes` chooses timm's
    ImageNet table when folders are WordNet ids. `labels=False` leaves labels out whatever the folders are called.

    Raises `DataError` if the source cannot be opened or its class folders match the class names only in part,
    `NoImages` if it is empty.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"A limit of {limit} images leaves nothing to look at; give 1 or more.")
    if isinstance(source, ImageSource):
        return source if limit is None else replace(source, limit=limit)
    if isinstance(class_names, str | Path):
        class_names = read_class_names(class_names)
    name, items, skipped = _listed(source, limit)
    if not items:
        raise NoImages(f"{name or 'The data set'} holds no images." + first_reasons(skipped))
    _refuse_duplicates(items)
    found: list[int | None] = [None] * len(items)
    origin, beside = "labels were switched off", list[Skipped]()
    if labels:
        items, found, origin, beside = labels_of(items, class_names, n_classes)
    return ImageSource(name, tuple(items), tuple(found), origin, (*skipped, *beside), limit)


Listing = tuple[str | None, list[Item], list[Skipped]]


def _listed(source: object, limit: int | None) -> Listing:
    if isinstance(source, str) and source == "photos":
        return _from_crops(limit or N_CROPS)
    if isinstance(source, str) and source.startswith("hf:"):
        return _from_hub(source)
    if isinstance(source, str | Path):
        return _from_path(Path(source).expanduser())
    if hasattr(source, "features") and hasattr(source, "cast_column"):
        return None, _from_dataset(source), []
    if isinstance(source, Sequence) and all(isinstance(path, str | Path) for path in source):
        return None, _from_files([Path(path).expanduser() for path in source]), []
    raise UsageError(
        f"Images were asked of a {type(source).__name__}. Give a folder, an image file, a text file that lists files, "
        'a sequence of paths, a Hugging Face dataset, "hf:NAME:SPLIT" or "photos".'
    )


def _from_path(path: Path) -> Listing:
    name = str(path.absolute())
    if path.is_dir():
        items, skipped = _from_folder(path.absolute())
        return name, items, skipped
    if not path.is_file():
        raise DataError(f"There is no file or folder {path}. (The built-in photographs are called 'photos'.)")
    if path.suffix == ".txt":
        lines = (line.strip() for line in text(path).splitlines())
        listed = [path.parent / line for line in lines if line and not line.startswith("#")]
        return name, _from_files(listed), []
    return name, _from_files([path]), []


def _from_folder(root: Path) -> tuple[list[Item], list[Skipped]]:
    items: list[Item] = []
    skipped: list[Skipped] = []
    for path, problem in _walk(root, frozenset()):
        relative = path.relative_to(root)
        if problem is not None:
            skipped.append(Skipped(_id(relative), problem))
        else:
            folder = _id(Path(relative.parts[0])) if len(relative.parts) > 1 else None
            items.append(Item(_id(relative), folder, path))
    return sorted(items, key=lambda item: natural_key(item.id)), sorted(skipped, key=lambda each: natural_key(each.id))


def _walk(folder: Path, above: frozenset[str]) -> Iterator[tuple[Path, str | None]]:
    """Every file below `folder` and what is wrong with it; links are followed, hidden names are not."""
    here = os.path.realpath(folder)
    if here in above:
        yield folder, "a link back to a folder that holds it"
        return
    try:
        inside = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield folder, f"the folder cannot be listed: {sentence(error)}"
        return
    for entry in inside:
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        if entry.is_dir():
            yield from _walk(path, above | {here})
        else:
            yield path, _not_a_file(path)


def _not_a_file(path: Path) -> str | None:
    if path.is_file():
        return None
    return "a link that leads nowhere" if path.is_symlink() else "not a regular file"


def _id(path: Path) -> str:
    """Forward slashes; bytes that are no UTF-8 (possible in file names) are written as escapes."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def natural_key(text: str) -> tuple[list[int | str], str]:
    """Sorts runs of ASCII digits as numbers and everything else by code point; equal keys fall back to the text."""
    pieces = re.split(r"([0-9]+)", text)  # text, digits, text, ...: equal places hold equal types
    return [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)], text


def _from_files(paths: list[Path]) -> list[Item]:
    absolute = [path.absolute() for path in paths]
    if not absolute:
        return []
    shared = Path(os.path.commonpath([path.parent for path in absolute]))
    return [Item(_id(path.relative_to(shared)), _id(Path(path.parent.name)), path) for path in absolute]


def _from_crops(n_crops: int) -> Listing:
    from vitrail import photos  # loads scikit-image's photographs: only when they are asked for

    items = [
        Item(crop.id, photos.CLASS_NAMES[crop.label], partial(_same, crop.image))
        for crop in photos.held_out_crops(n_crops)
    ]
    return "photos", items, []


def _same(image: Image.Image) -> Image.Image:
    return image


def _from_hub(source: str) -> Listing:
    name, _, split = source.removeprefix("hf:").partition(":")
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{source} needs the library that reads it: pip install 'vitrail[data]'.")
    datasets = importlib.import_module("datasets")
    try:
        loaded = datasets.load_dataset(name, split=split or None)
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, no such split, gated
        raise DataError(f"{source} cannot be loaded: {sentence(error)}.") from error
    if isinstance(loaded, dict):
        if len(loaded) > 1:
            raise DataError(
                f"{source} has the splits {', '.join(loaded)}; name one, as in hf:{name}:{next(iter(loaded))}."
            )
        loaded = next(iter(loaded.values()))
    return source, _from_dataset(loaded), []


def _from_dataset(dataset: Any) -> list[Item]:
    """Rows of a Hugging Face dataset; duck-typed, so that the library is not needed to look at other sources."""
    if not hasattr(dataset, "__len__"):
        raise DataError("A streamed dataset has no fixed order to come back to; load it without streaming=True.")
    kinds = {column: type(feature).__name__ for column, feature in (dataset.features or {}).items()}
    columns = [column for column, kind in kinds.items() if kind == "Image"]
    if not columns:
        raise DataError(f"The dataset has no image column; its columns are {kinds}.")
    encoded = dataset.cast_column(columns[0], type(dataset.features[columns[0]])(decode=False)).with_format(None)
    classes = next((column for column, kind in kinds.items() if kind == "ClassLabel"), None)
    names = _class_column(dataset, classes) if classes else [None] * len(dataset)
    return [
        Item(f"{row:07d}", names[row], partial(_encoded_row, encoded, columns[0], row)) for row in range(len(dataset))
    ]


def _class_column(dataset: Any, column: str) -> list[str | None]:
    words = dataset.features[column].names
    # -1 and None are how datasets mark a row whose label is withheld
    return [words[value] if value is not None and value >= 0 else None for value in dataset.with_format(None)[column]]


def _encoded_row(encoded: Any, column: str, row: int) -> bytes:
    cell = encoded[row][column]
    if cell is None:
        raise BadImage(f"Row {row} of the dataset holds no image.")
    content = cell["bytes"] if cell["bytes"] is not None else file_bytes(Path(cell["path"]), MAX_BYTES)
    if len(content) > MAX_BYTES:
        raise BadImage(too_many_bytes(len(content), MAX_BYTES))
    return content


def _refuse_duplicates(items: list[Item]) -> None:
    twice = [id_ for id_, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise DataError(f"The same image is listed more than once: {some(twice)}. Ids must be unique; list it once.")
