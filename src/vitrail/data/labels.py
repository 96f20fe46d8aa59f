"""Labels from names: class folders looked up in the class names of a model, or in timm's ImageNet tables."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from vitrail.data.files import some, text
from vitrail.data.images import Item, Skipped
from vitrail.errors import DataError

__all__ = ["class_title", "labels_of", "read_class_names", "without_strays"]

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
    return _aliases(name)[0]


def _aliases(name: str) -> list[str]:
    """Every name that a line of class names gives to its class, the plain first one leading."""
    wnid = WNID.match(name)
    words = name[wnid.end() :] if wnid else name
    pieces = [piece.strip() for piece in words.split(",") if piece.strip()]
    whole = [words.strip(" ,"), name]
    return [piece for piece in (*pieces, *whole, *([wnid[0]] if wnid else [])) if piece]


def _class_index(class_names: Sequence[str] | None, n_classes: int | None) -> dict[str, set[int]]:
    index: dict[str, set[int]] = {}
    for label, name in enumerate(class_names or ()):
        for alias in _aliases(name):
            index.setdefault(_plain(alias), set()).add(label)
    if not any(WNID.fullmatch(alias) for alias in index):
        for label, wnid in enumerate(_synsets(n_classes or len(class_names or ()))):
            index.setdefault(wnid, set()).add(label)
    return index


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _synsets(n_classes: int) -> list[str]:
    """timm's table for so many classes, or nothing. Read as a file, since importing timm would import torch."""
    spec = importlib.util.find_spec("timm")
    if n_classes not in SYNSETS or spec is None or not spec.submodule_search_locations:
        return []
    table = Path(spec.submodule_search_locations[0], "data", "_info", SYNSETS[n_classes])
    return text(table).split() if table.is_file() else []


def without_strays(items: list[Item]) -> tuple[list[Item], list[Skipped]]:
    """Leaves out files that lie beside class folders: they would be the only images without a label."""
    strays = {item.id for item in items if item.class_name is None}
    if len(strays) == len(items):
        return items, []
    reason = "it lies beside the class folders, so it has no label"
    return [item for item in items if item.id not in strays], [Skipped(id_, reason) for id_ in sorted(strays)]


def labels_of(
    items: list[Item], class_names: Sequence[str] | None, n_classes: int | None
) -> tuple[list[int] | None, str]:
    """A label for every item and where it came from, or None and why there are none."""
    names = list(dict.fromkeys(item.class_name for item in items))
    if None in names:
        return None, "the images do not lie in class folders"
    index = _class_index(class_names, n_classes)
    if not index:
        return None, "there are no class names to look the folders up in"
    found = {name: index.get(_plain(str(name)), set()) for name in names}
    missing = [str(name) for name, classes in found.items() if not classes]
    if len(missing) == len(names):
        return None, f"none of the folder names is a class of the model: {some(missing)}"
    if missing:
        raise DataError(
            f"{len(names) - len(missing)} of {len(names)} class folders match the class names; these do not: "
            f"{some(missing)}. Rename them, give the right class names, or switch labels off."
        )
    ambiguous = [f"{name} = classes {sorted(classes)}" for name, classes in found.items() if len(classes) > 1]
    if ambiguous:
        raise DataError(
            f"Some folder names mean more than one class: {some(ambiguous)}. Use WordNet ids or full names."
        )
    return [min(found[item.class_name]) for item in items], "the names of the class folders"
