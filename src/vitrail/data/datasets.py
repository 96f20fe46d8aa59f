"""Rows of datasets: of the Hugging Face hub, folders of `save_to_disk`, Parquet files, objects in memory."""

import importlib
import importlib.util
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from vitrail.data.decode import MAX_BYTES
from vitrail.data.files import file_bytes, sentence, too_many_bytes
from vitrail.data.images import Item
from vitrail.data.lists import LABEL_COLUMNS
from vitrail.errors import BadImage, DataError

__all__ = ["dataset_items", "is_saved_dataset", "load_from_disk", "load_from_hub", "read_parquet"]

STATE, SPLITS = "state.json", "dataset_dict.json"
"""Files by which a saved dataset, and several splits of one, are known."""


def load_from_hub(source: str) -> list[Item]:
    """The rows of a dataset on the Hugging Face hub.

    Args:
        source: `hf:NAME` or `hf:NAME:SPLIT`.

    Returns:
        An item a row.

    Raises:
        DataError: The library is not installed, the dataset cannot be loaded or has several splits, or has no images.
    """
    name, _, split = source.removeprefix("hf:").partition(":")
    datasets = _library(source)
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
    return dataset_items(loaded)


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the datasets library.

    Args:
        folder: A folder.

    Returns:
        True for a dataset, and for several splits of one.
    """
    return any(os.path.isfile(folder / name) for name in (STATE, SPLITS))


def load_from_disk(folder: Path) -> list[Item]:
    """The rows of a dataset that was written by `save_to_disk`.

    Args:
        folder: Of one dataset.

    Returns:
        An item a row.

    Raises:
        DataError: The library is not installed, the folder cannot be read or holds several splits, or has no images.
    """
    datasets = _library(str(folder))
    if os.path.isfile(folder / SPLITS):
        splits = sorted(path.parent.name for path in folder.glob(f"*/{STATE}"))
        raise DataError(f"{folder} has the splits {', '.join(splits)}; name the folder of one of them.")
    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder}, a saved dataset, cannot be read: {sentence(error)}.") from error
    return dataset_items(dataset)


def read_parquet(path: Path) -> list[Item]:
    """The rows of a Parquet file, which is read into memory.

    Args:
        path: The file.

    Returns:
        An item a row.

    Raises:
        DataError: The library is not installed, the file cannot be read, or it has no column of images.
    """
    datasets = _library(str(path))
    try:
        table = importlib.import_module("pyarrow.parquet").read_table(path)
        dataset = datasets.Dataset(importlib.import_module("datasets.table").InMemoryTable(table))
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {sentence(error)}.") from error
    return dataset_items(dataset)


def _library(source: str) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{source} needs the library that reads it: pip install 'vitrail[data]'.")
    return importlib.import_module("datasets")


def dataset_items(dataset: Any) -> list[Item]:
    """The rows of a Hugging Face dataset; duck-typed, so that the library is not needed for other sources.

    Args:
        dataset: With a column of images: of the type `Image`, or encoded bytes, alone or beside a path.

    Returns:
        An item a row, with the name of its class where there is a `ClassLabel` or a column called `label`.

    Raises:
        DataError: The dataset is streamed, or has no column of images.
    """
    if not hasattr(dataset, "__len__"):
        raise DataError("A streamed dataset has no fixed order to come back to; load it without streaming=True.")
    features = dataset.features or {}
    column = next((name for name, feature in features.items() if _holds_images(feature)), None)
    if column is None:
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
        raise DataError(f"The dataset has no image column; its columns are {kinds}.")
    image = type(features[column]) if type(features[column]).__name__ == "Image" else _library("It").Image
    encoded = dataset.cast_column(column, image(decode=False)).with_format(None)
    names = _class_column(dataset)
    return [Item(f"{row:07d}", names[row], partial(_row_bytes, encoded, column, row)) for row in range(len(dataset))]


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return {"bytes", "path"} <= set(feature)
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _class_column(dataset: Any) -> list[str | None]:
    kinds = {name: type(feature).__name__ for name, feature in dataset.features.items()}
    column = next((name for name, kind in kinds.items() if kind == "ClassLabel"), None)
    if column is not None:
        words = dataset.features[column].names
        # -1 and None are how datasets mark a row whose label is withheld
        return [
            words[value] if value is not None and value >= 0 else None for value in dataset.with_format(None)[column]
        ]
    column = next((name for name in LABEL_COLUMNS if name in kinds), None)
    if column is None or not re.fullmatch(r"u?int\d+|(large_)?string", str(dataset.features[column].dtype)):
        return [None] * len(dataset)
    return [None if value in (None, -1) else str(value) for value in dataset.with_format(None)[column]]


def _row_bytes(encoded: Any, column: str, row: int) -> bytes:
    cell = encoded[row][column]
    if cell is None:
        raise BadImage(f"Row {row} of the dataset holds no image.")
    content = cell["bytes"] if cell["bytes"] is not None else file_bytes(Path(cell["path"]), MAX_BYTES)
    if len(content) > MAX_BYTES:
        raise BadImage(too_many_bytes(len(content), MAX_BYTES))
    return content
