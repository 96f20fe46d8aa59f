"""`open_images`: where images come from, their ids and their order. Nothing is decoded here."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vitrail.data.datasets import dataset_items, is_saved_dataset, load_from_disk, load_from_hub, read_parquet
from vitrail.data.decode import MAX_PIXELS
from vitrail.data.files import sentence, some, text
from vitrail.data.images import ImageSource, Item, Skipped, first_reasons
from vitrail.data.labels import Labels, labels_of, read_class_names
from vitrail.data.lists import file_id, file_items, table_items, tar_items
from vitrail.errors import DataError, NoImages, UsageError
from vitrail.outputs import is_address, is_figure, output_kind

__all__ = ["BUILT_IN", "PHOTOS", "open_images"]

N_CROPS = 320
"""How many built-in crops there are where no limit asks for more."""

N_FIRST_CROPS = 65
"""How many of them come before the whole photographs: five of each, so that a short study has both."""


class Listing(NamedTuple):
    """What a source holds; `table` names the file that its labels are from, where they are not folders' names."""

    name: str | None
    items: list[Item]
    skipped: Sequence[Skipped] = ()
    table: str | None = None


PHOTOS, BUILT_IN = "photos", "vitrail:photos"
"""Names of the built-in crops: the short one, and the one that no folder has."""


def open_images(
    source: object,
    *,
    class_names: Sequence[str] | str | Path | None = None,
    n_classes: int | None = None,
    labels: bool = True,
    limit: int | None = None,
    max_pixels: int = MAX_PIXELS,
    leave_out: Sequence[str | Path] = (),
) -> ImageSource:
    """The images that `source` names, in a fixed order, with labels where names give them. Nothing is decoded yet.

    Args:
        source: A folder of images or of class folders; one image file; a `.txt` file that lists files; a `.csv` or
            `.json` file that lists files with labels; a `.parquet` file; a `.tar` file in the WebDataset layout; a
            folder written by `save_to_disk`; a sequence of files; a Hugging Face dataset or `"hf:NAME:SPLIT"`; or
            `"photos"` for the built-in crops and, after 65 of the 320, the photographs they are of
            (`"vitrail:photos"` where there is a folder of that name).
        class_names: The model's classes in order, or a file with one a line (`tench`, or `n01440764 tench, Tinca
            tinca`).
        n_classes: Number of the model's classes; it chooses timm's ImageNet table when folders are WordNet ids.
        labels: False leaves labels out whatever the folders are called.
        limit: The first so many usable images are meant.
        max_pixels: Largest image that is decoded, rows x columns.
        leave_out: Folders below the folder of images that hold none, such as its masks. What Vitrail itself wrote
            there (studies, exports, figures) is left out in any case, and named.

    Returns:
        The images, for `scan`.

    Raises:
        DataError: The source cannot be opened, or its classes match the class names only in part.
        NoImages: It is empty.
        UsageError: `source` or `limit` has no meaning, or `"photos"` is also a folder here.

    Example:
        >>> from vitrail.data import open_images
        >>> len(open_images("vitrail:photos", limit=3).items)
        3
    """
    if limit is not None and limit < 1:
        raise UsageError(f"A limit of {limit} images leaves nothing to look at; give 1 or more.")
    if max_pixels < 1:
        raise UsageError(f"At most {max_pixels} pixels leave no image; give 1 or more.")
    if isinstance(source, ImageSource):
        return source if limit is None else replace(source, limit=limit)
    if isinstance(class_names, str | Path):
        class_names = read_class_names(class_names)
    name, items, skipped, table = _list_items(source, limit, leave_out)
    if not items:
        raise NoImages(f"{name or 'The data set'} holds no images." + first_reasons(skipped))
    _refuse_duplicates(items)
    own = Labels(items, [None] * len(items), "labels were switched off", [])
    if labels:
        own = labels_of(items, class_names, n_classes, table, partly_named=name == PHOTOS)
    cap = None if max_pixels == MAX_PIXELS else max_pixels
    return ImageSource(
        name, tuple(own.items), tuple(own.labels), own.origin, (*skipped, *own.skipped), limit, max_pixels=cap
    )


def _list_items(source: object, limit: int | None, leave_out: Sequence[str | Path]) -> Listing:
    if isinstance(source, str) and source in (PHOTOS, BUILT_IN):
        if source == PHOTOS and os.path.lexists(PHOTOS):
            raise UsageError(
                f"{PHOTOS!r} names the built-in photographs, and there is a {PHOTOS} here too; write ./{PHOTOS} for "
                f"that, or {BUILT_IN} for the built-in ones."
            )
        return _from_photographs(limit)
    if isinstance(source, str) and source.startswith("hf:"):
        return Listing(source, load_from_hub(source))
    if isinstance(source, str | Path):
        _refuse_address(source)
        return _from_path(Path(os.path.expanduser(source)), leave_out)
    if hasattr(source, "features") and hasattr(source, "cast_column"):
        return Listing(None, dataset_items(source))
    if isinstance(source, Sequence) and all(isinstance(path, str | Path) for path in source):
        return Listing(None, file_items([Path(os.path.expanduser(path)) for path in source]))
    raise UsageError(
        f"Images were asked of a {type(source).__name__}. Give a folder, an image file, a text file that lists files, "
        'a sequence of paths, a Hugging Face dataset, "hf:NAME:SPLIT" or "photos".'
    )


def _refuse_address(source: str | Path) -> None:
    if is_address(source):
        raise DataError(
            f"{source} is an address, and images are read from local files, folders and archives or from the Hugging "
            "Face hub (hf:NAME); copy them here, or mount the store as a folder."
        )


def _from_path(path: Path, leave_out: Sequence[str | Path]) -> Listing:
    path = path.absolute()
    name = str(path)
    if os.path.isdir(path):
        if is_saved_dataset(path):
            return Listing(name, load_from_disk(path))
        return Listing(name, *_from_folder(path, leave_out))
    if not os.path.isfile(path):
        raise DataError(f"There is no file or folder {path}. (The built-in photographs are called {PHOTOS!r}.)")
    match path.suffix.lower():
        case ".txt":
            lines = (line.strip() for line in text(path).splitlines())
            return Listing(name, file_items([path.parent / line for line in lines if line and line[0] != "#"]))
        case ".csv" | ".json":
            return Listing(name, table_items(path), table=file_id(Path(path.name)))
        case ".tar":
            return Listing(name, tar_items(path))
        case ".parquet":
            return Listing(name, read_parquet(path))
    return Listing(name, file_items([path]))


def _from_folder(root: Path, leave_out: Sequence[str | Path]) -> tuple[list[Item], list[Skipped]]:
    items: list[Item] = []
    skipped: list[Skipped] = []
    for path, problem in _walk(root, leave_out):
        relative = path.relative_to(root)
        if problem is not None:
            skipped.append(Skipped(file_id(relative), problem))
        else:
            folder = file_id(Path(relative.parts[0])) if len(relative.parts) > 1 else None
            items.append(Item(file_id(relative), folder, path))
    return sorted(items, key=lambda item: natural_key(item.id)), sorted(skipped, key=lambda each: natural_key(each.id))


def _walk(root: Path, leave_out: Sequence[str | Path]) -> Iterator[tuple[Path, str | None]]:
    """Every file below `root` and what is wrong with it; hidden names and some folders are left out.

    Each folder is read once, by its own name rather than by a link to it: links are followed last. Folders that link to
    each other would otherwise be read once for each order of them. No recursion, as folders may be thousands deep.
    """
    left_out = [os.path.expanduser(each) for each in leave_out]
    others = {_identity(each) for each in left_out if os.path.isdir(each)} - {_identity(root)}
    read: set[tuple[int, int]] = set()
    folders: list[Path] = [root]
    links: list[Path] = []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            identity = _identity(folder)
            inside = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            yield folder, f"the folder cannot be listed: {sentence(error)}"
            continue
        if identity in others:
            continue
        if identity in read:
            yield folder, "a link to a folder that is read already"
            continue
        read.add(identity)
        kind = None if folder == root else output_kind(folder, {entry.name for entry in inside})
        if kind is not None:
            yield folder, f"{kind}, and no folder of images"
            continue
        for entry in inside:
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False) or os.path.isdir(path):
                (links if entry.is_symlink() else folders).append(path)
            else:
                yield path, _not_an_image(path)


def _identity(folder: str | Path) -> tuple[int, int]:
    """What tells a folder from others, by whatever path."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _not_an_image(path: Path) -> str | None:
    if os.path.isfile(path):  # unlike `Path.is_file`, no error for a path that is too long or a link to itself
        return "a figure that Vitrail drew" if is_figure(path) else None
    return "a link that leads nowhere" if os.path.islink(path) else "not a regular file"


def natural_key(text: str) -> tuple[list[int | str], str]:
    """Sorts runs of ASCII digits as numbers and everything else by code point; equal keys fall back to the text."""
    pieces = re.split(r"([0-9]+)", text)  # text, digits, text, ...: equal positions hold equal types
    return [int(piece) if position % 2 else piece for position, piece in enumerate(pieces)], text


def _from_photographs(limit: int | None) -> Listing:
    """Some held-out crops, the whole photographs, then further crops as far as the limit goes."""
    from vitrail.data import photographs  # loads scikit-image's photographs: only when they are asked for

    items = [
        Item(crop.id, photographs.CLASS_NAMES[crop.label], partial(_same, crop.image))
        for crop in photographs.held_out_crops(limit or N_CROPS)
    ]
    if limit is None or limit > N_FIRST_CROPS:
        wholes = photographs.photographs().items()
        items[N_FIRST_CROPS:N_FIRST_CROPS] = [
            Item(f"{name}/whole", name, partial(_same, whole)) for name, whole in wholes
        ]
    return Listing(PHOTOS, items)


def _same(image: Image.Image) -> Image.Image:
    return image


def _refuse_duplicates(items: list[Item]) -> None:
    twice = [id_ for id_, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise DataError(f"The same image is listed more than once: {some(twice)}. Ids must be unique; list it once.")
