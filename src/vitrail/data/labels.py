"""Labels from names: class folders looked up in the class names of a model, or in timm's ImageNet tables."""

import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from vitrail.data.files import some, text
from vitrail.data.images import Item, Skipped
from vitrail.errors import DataError

__all__ = ["LabelSource", "Labels", "class_title", "classes_of_names", "labels_of", "read_class_names"]


class LabelSource(StrEnum):
    """Whose the labels of a study's images are."""

    GIVEN = "given"
    """The data set's, so that accuracy means something."""

    PREDICTED = "predicted"
    """The model's own top-1 predictions, as the images have none."""

    NONE = "none"
    """Nobody's: the images have none and the model has no classes."""

    @property
    def correctness(self) -> str:
        """What the share of answers that equal the labels is."""
        return "agreement with the model's own answers" if self == LabelSource.PREDICTED else "accuracy"

    @classmethod
    def of_sentence(cls, labels_from: str) -> "LabelSource":
        """The labels of a plan from before they had a field, read off its sentence.

        Args:
            labels_from: The sentence.

        Returns:
            Whose they are.
        """
        if labels_from.startswith("the model's own"):
            return cls.PREDICTED
        return cls.NONE if labels_from.startswith("no labels") else cls.GIVEN


WNID = re.compile(r"n[0-9]{8}")
NUMBER = re.compile(r"[0-9]{1,9}")

SYNSETS = {
    1000: "imagenet_synsets.txt",
    11221: "imagenet21k_miil_synsets.txt",
    11821: "imagenet12k_synsets.txt",
    21841: "imagenet22k_synsets.txt",
    21842: "imagenet22k_ms_synsets.txt",
    21843: "imagenet21k_goog_synsets.txt",
}
"""timm's ImageNet tables by their number of classes, WordNet ids in the order of the classes."""


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """The class names in a file, one a line: `tench`, `n01440764 tench, Tinca tinca` or `n01440764, tench`.

    Args:
        path: A text file.

    Returns:
        The lines, in the model's order.

    Raises:
        DataError: The file cannot be read, is empty, or has an empty line between others.
    """
    lines = [line.strip() for line in text(Path(path)).rstrip().splitlines()]
    if not lines:
        raise DataError(f"{path} was to hold one class name a line, and is empty.")
    if "" in lines:
        raise DataError(f"Line {lines.index('') + 1} of {path} is empty, so the classes after it would be off by one.")
    return tuple(lines)


def class_title(name: str) -> str:
    """The part of a class name that fits beside a picture: `n01440764 tench, Tinca tinca` -> `tench`.

    Args:
        name: A line of class names.

    Returns:
        The first of its words or names.
    """
    _, words = _split(name)
    return (_pieces(words) or [name])[0]


def _split(name: str) -> tuple[str | None, str]:
    """WordNet id and words of a line of class names."""
    wnid = WNID.match(name)
    return (wnid[0], name[wnid.end() :].strip(" ,")) if wnid else (None, name)


def _pieces(words: str) -> list[str]:
    return [piece.strip() for piece in words.split(",") if piece.strip()]


Index = dict[str, set[int]]


def _indices(class_names: Sequence[str] | None, n_classes: int | None) -> tuple[Index, Index]:
    """Classes by what names them fully (the line, its words, its WordNet id), and by single ones of several names."""
    full: Index = {}
    single: Index = {}
    for label, name in enumerate(class_names or ()):
        wnid, words = _split(name)
        for alias in (name, words, wnid or name):
            full.setdefault(_plain(alias), set()).add(label)
        for piece in _pieces(words):
            single.setdefault(_plain(piece), set()).add(label)
    if not any(WNID.fullmatch(alias) for alias in full):
        for label, wnid in enumerate(_synsets(n_classes or len(class_names or ()))):
            full.setdefault(wnid, set()).add(label)
    return full, single


def _plain(name: str) -> str:
    composed = unicodedata.normalize("NFC", name.casefold())  # a Mac writes an accent apart from its letter
    return " ".join(composed.replace("_", " ").split())


def _synsets(n_classes: int) -> list[str]:
    """timm's table for so many classes, or nothing. Read as a file, since importing timm would import torch."""
    spec = importlib.util.find_spec("timm")
    if n_classes not in SYNSETS or spec is None or not spec.submodule_search_locations:
        return []
    table = Path(spec.submodule_search_locations[0], "data", "_info", SYNSETS[n_classes])
    return text(table).split() if table.is_file() else []


def classes_of_names(names: Sequence[str], class_names: Sequence[str] | None, n_classes: int | None) -> Index:
    """Looks names up in the class names of a model and in timm's ImageNet tables.

    Args:
        names: Of class folders, or in a table.
        class_names: Those of the model, in order.
        n_classes: Number of the model's classes.

    Returns:
        For each name the classes that it may mean; none where it is no class.
    """
    full, single = _indices(class_names, n_classes)
    return {name: full.get(_plain(name)) or single.get(_plain(name), set()) for name in names}


class Labels(NamedTuple):
    """Items with their labels (None for all where there are none), where those came from, and what was left out."""

    items: list[Item]
    labels: list[int | None]
    origin: str
    skipped: list[Skipped]


def labels_of(
    items: list[Item],
    class_names: Sequence[str] | None,
    n_classes: int | None,
    table: str | None = None,
    partly_named: bool = False,
) -> Labels:
    """The labels that the names of class folders, or a table of labels, give to images.

    Names are looked up in the class names and in timm's ImageNet tables; where none is found there and all are numbers
    of classes, they are taken as such. Files beside class folders are left out: they alone would have no label.

    Args:
        items: The images, each with the name of its class.
        class_names: Those of the model, in order.
        n_classes: Number of the model's classes.
        table: Name of the table that the names are from; None for class folders.
        partly_named: The names are no claim of the user's, so that names of which only some are classes give no labels.

    Returns:
        The labels, or the reason why there are none.

    Raises:
        DataError: Only some of the names are classes, one means several, or none in a table is a class.
    """
    names = list(dict.fromkeys(item.class_name for item in items if item.class_name is not None))
    if not names:
        return _no_labels(items, "the images do not lie in class folders")
    classes = classes_of_names(names, class_names, n_classes)
    origin = f"the names in {table}" if table else "the names of the class folders"
    if not any(classes.values()) and (numbers := _class_numbers(names, n_classes or len(class_names or ()))):
        classes = {name: {number} for name, number in zip(names, numbers, strict=True)}
        origin = f"the numbers {'in ' + table if table else 'of the class folders'}, taken as indices of the classes"
    if not any(classes.values()):
        if not class_names and not _synsets(n_classes or 0):
            return _no_labels(items, "there are no class names to look the folders up in")
        if table:
            raise DataError(f"None of the labels in {table} is a class of the model: {some(names)}.")
        return _no_labels(items, f"none of the folder names is a class of the model: {some(names)}")
    if partly_named and not all(classes.values()):
        return _no_labels(items, "only some of the names are classes of the model")
    _refuse_unclear(classes, table)
    labelled = [item for item in items if item.class_name is not None]
    beside = "it belongs to no class, and others do"
    strays = [Skipped(item.id, beside) for item in items if item.class_name is None]
    return Labels(labelled, [min(classes[str(item.class_name)]) for item in labelled], origin, strays)


def _no_labels(items: list[Item], reason: str) -> Labels:
    return Labels(items, [None] * len(items), reason, [])


def _class_numbers(names: Sequence[str], n_classes: int) -> list[int]:
    """The names as indices of classes, or nothing where one of them is none."""
    numbers = [int(name) for name in names if NUMBER.fullmatch(name)]
    return numbers if len(numbers) == len(names) and max(numbers) < n_classes else []


def _refuse_unclear(classes: dict[str, set[int]], table: str | None) -> None:
    missing = [name for name, labels in classes.items() if not labels]
    what = f"labels in {table}" if table else "class folders"
    if missing:
        raise DataError(
            f"{len(classes) - len(missing)} of {len(classes)} {what} match the class names; these do not: "
            f"{some(missing)}. Rename them, give the right class names, or switch labels off."
        )
    ambiguous = [f"{name} = classes {sorted(labels)}" for name, labels in classes.items() if len(labels) > 1]
    if ambiguous:
        raise DataError(
            f"Some {'labels' if table else 'folder names'} mean more than one class: {some(ambiguous)}. Use WordNet "
            "ids or full names."
        )
