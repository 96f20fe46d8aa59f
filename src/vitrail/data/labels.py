"""Labels from names: class folders looked up in the class names of a model, or in timm's ImageNet tables."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from vitrail.data.files import some, text
from vitrail.data.images import Item, Skipped
from vitrail.errors import DataError

__all__ = ["class_title", "labels_of", "read_class_names"]

WNID = re.compile(r"n[0-9]{8}")

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
    """One class a line, in the model's order: `tench`, `n01440764 tench, Tinca tinca` or `n01440764, tench`.

    Raises `DataError` if the file cannot be read, is empty, or has an empty line between others.
    """
    lines = [line.strip() for line in text(Path(path)).rstrip().splitlines()]
    if not lines:
        raise DataError(f"{path} was to hold one class name a line, and is empty.")
    if "" in lines:
        raise DataError(f"Line {lines.index('') + 1} of {path} is empty, so the classes after it would be off by one.")
    return tuple(lines)


def class_title(name: str) -> str:
    """The part of a class name that fits beside a picture: `n01440764 tench, Tinca tinca` -> `tench`."""
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
    return " ".join(name.replace("_", " ").casefold().split())


def _synsets(n_classes: int) -> list[str]:
    """timm's table for so many classes, or nothing. Read as a file, since importing timm would import torch."""
    spec = importlib.util.find_spec("timm")
    if n_classes not in SYNSETS or spec is None or not spec.submodule_search_locations:
        return []
    table = Path(spec.submodule_search_locations[0], "data", "_info", SYNSETS[n_classes])
    return text(table).split() if table.is_file() else []


def labels_of(
    items: list[Item], class_names: Sequence[str] | None, n_classes: int | None
) -> tuple[list[Item], list[int | None], str, list[Skipped]]:
    """The items to keep, their labels (or None for all), where labels came from or why there are none, and the rest.

    Files that lie beside class folders are left out: they would be the only images without a label.
    """
    names = list(dict.fromkeys(item.class_name for item in items if item.class_name is not None))
    if not names:
        return items, [None] * len(items), "the images do not lie in class folders", []
    full, single = _indices(class_names, n_classes)
    if not full:
        return items, [None] * len(items), "there are no class names to look the folders up in", []
    found = {name: full.get(_plain(name)) or single.get(_plain(name), set()) for name in names}
    if not any(found.values()):
        return items, [None] * len(items), f"none of the folder names is a class of the model: {some(names)}", []
    _refuse_unclear(found)
    kept = [item for item in items if item.class_name is not None]
    beside = "it belongs to no class, and others do"
    strays = [Skipped(item.id, beside) for item in items if item.class_name is None]
    labels: list[int | None] = [min(found[str(item.class_name)]) for item in kept]
    return kept, labels, "the names of the class folders", strays


def _refuse_unclear(found: dict[str, set[int]]) -> None:
    missing = [name for name, classes in found.items() if not classes]
    if missing:
        raise DataError(
            f"{len(found) - len(missing)} of {len(found)} class folders match the class names; these do not: "
            f"{some(missing)}. Rename them, give the right class names, or switch labels off."
        )
    ambiguous = [f"{name} = classes {sorted(classes)}" for name, classes in found.items() if len(classes) > 1]
    if ambiguous:
        raise DataError(
            f"Some folder names mean more than one class: {some(ambiguous)}. Use WordNet ids or full names."
        )
