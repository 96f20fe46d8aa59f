"""Tidy tables: one for each set of dimensions, a row for each cell that the model has, a column for each measure.

`image.parquet` has a row an image, `image-layer-head.parquet` one for each head of each image, and so on. Pairs and
boxes (`xy`, `side`) become columns. Layers, heads and patches count from 0 as everywhere in Vitrail.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitrail.data.lists import file_id
from vitrail.exports.source import ExportSource, import_library
from vitrail.measure import PLACES

__all__ = ["csv_names", "parquet_names", "write_csv", "write_parquet"]

CLASSES = ("label", "prediction")
"""Class ids of each image, which get a column with the class's name too."""

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes text that begins with one of these for a formula, and not if an apostrophe stands before it."""

ABOUT = ("title", "unit", "low", "high", "source", "limits", "analysis")

Columns = dict[str, Any]


DESCRIPTION = "columns.csv"


class _Table(NamedTuple):
    name: str
    dims: tuple[str, ...]
    measures: tuple[str, ...]


def parquet_names(source: ExportSource) -> list[str]:
    """The files that `write_parquet` writes of a study.

    Args:
        source: The study.

    Returns:
        Their names.
    """
    return [f"{table.name}.parquet" for table in _tables(source)]


def csv_names(source: ExportSource) -> list[str]:
    """The files that `write_csv` writes of a study.

    Args:
        source: The study.

    Returns:
        Their names.
    """
    return [*(f"{table.name}.csv" for table in _tables(source)), DESCRIPTION]


def write_parquet(source: ExportSource, folder: Path) -> str:
    """Writes each table as Parquet, with title, unit, source and limits in the metadata of each column.

    Args:
        source: The study.
        folder: A folder without files of these names.

    Returns:
        A line that reads the first table, with `{folder}` in it.

    Raises:
        MissingLibrary: pyarrow is not installed.
    """
    arrow = import_library("pyarrow", "parquet", "pip install 'vitrail[export]'")
    parquet = import_library("pyarrow.parquet", "parquet", "pip install 'vitrail[export]'")
    plan = {"vitrail": json.dumps(asdict(source.plan))}
    tables = _tables(source)
    for table in tables:
        writer = None
        for columns in _blocks(source, table):
            arrays = {name: _arrow_array(arrow, name, values) for name, values in columns.items()}
            fields = [arrow.field(name, array.type, metadata=_about(source, name)) for name, array in arrays.items()]
            schema = arrow.schema(fields, metadata=plan)
            if writer is None:
                writer = parquet.ParquetWriter(folder / f"{table.name}.parquet", schema, compression="zstd")
            writer.write_table(arrow.table(list(arrays.values()), schema=schema))
        if writer is not None:
            writer.close()
    return f"pandas.read_parquet('{{folder}}/{tables[0].name}.parquet')"


def write_csv(source: ExportSource, folder: Path) -> str:
    """Writes each table as CSV in UTF-8, and `columns.csv`, which says what each column is.

    Names that a spreadsheet would take for a formula have an apostrophe in front.

    Args:
        source: The study.
        folder: A folder without files of these names.

    Returns:
        A line that reads the first table, with `{folder}` in it.
    """
    tables = _tables(source)
    described = []
    for table in tables:
        header: list[str] = []
        with (folder / f"{table.name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            for columns in _blocks(source, table):
                if not header:
                    header = list(columns)
                    writer.writerow(header)
                writer.writerows(zip(*(_text(values) for values in columns.values()), strict=True))
        described += [(table.name, name, *_about(source, name).values()) for name in header if _about(source, name)]
    with (folder / DESCRIPTION).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("table", "column", *ABOUT), *described])
    return f"pandas.read_csv('{{folder}}/{tables[0].name}.csv')"


def _tables(source: ExportSource) -> list[_Table]:
    """The tables, that of images first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, array in source.data.data_vars.items():
        groups.setdefault(tuple(str(each) for each in array.dims if each not in PLACES), []).append(str(name))
    order = sorted(groups, key=lambda dims: (dims[:1] != ("image",), len(dims)))
    return [_Table("-".join(dims) or "study", dims, tuple(groups[dims])) for dims in order]


def _blocks(source: ExportSource, table: _Table) -> Iterator[Columns]:
    """The columns of a table, some images at a time; at once where it is not of images."""
    inner = [name for name in table.dims if name != "image"]
    cells = source.present(inner)
    places = zip(inner, np.nonzero(cells) if inner else (), strict=True)
    index = {name: _labels(source, name)[at] for name, at in places}
    if table.dims[:1] != ("image",):
        values = {name: source.data[name].to_numpy()[None] for name in table.measures}
        yield index | _measures(source, table, values, cells)
        return
    ids = source.data["image"].to_numpy()
    for rows, values in source.blocks(table.measures):
        n_images = rows.stop - rows.start
        columns: Columns = {"image": np.repeat(ids[rows], cells.sum())}
        columns |= {name: np.tile(each, n_images) for name, each in index.items()}
        columns |= _measures(source, table, values, cells)
        if not inner:
            columns |= {f"{name}_name": source.class_names(columns[name]) for name in CLASSES if name in columns}
            columns["path"] = [entry.path and file_id(Path(entry.path)) for entry in source.entries[rows]]
        yield columns


def _measures(source: ExportSource, table: _Table, values: dict[str, np.ndarray], cells: np.ndarray) -> Columns:
    """Columns of the measures; `values` lead with the image, or with one entry where there is none."""
    columns: Columns = {}
    for name in table.measures:
        dims = [str(each) for each in source.data[name].dims if each != "image"]
        wide = [each for each in dims if each in PLACES]  # the parts of one value: a column each
        order = [1 + dims.index(each) for each in [*(d for d in table.dims if d != "image"), *wide]]
        array = values[name].transpose(0, *order)
        parts = PLACES[wide[0]] if wide else ("",)
        flat = array.reshape(len(array), *cells.shape, len(parts))[:, cells].reshape(-1, len(parts))
        columns |= {f"{name}_{part}" if part else name: flat[:, at] for at, part in enumerate(parts)}
    return columns


def _labels(source: ExportSource, dimension: str) -> np.ndarray:
    """What the places of a dimension are called: the study's own coordinate, or numbers from 0."""
    if dimension in source.data.coords:
        return np.asarray(source.data[dimension].to_numpy())
    return np.arange(source.data.sizes[dimension], dtype=np.int32)


def _about(source: ExportSource, column: str) -> dict[str, str]:
    """What the study says of the measure in a column; empty for an index."""
    names = [column, *(column.removesuffix(f"_{part}") for parts in PLACES.values() for part in parts)]
    name = next((each for each in names if each in source.data.data_vars), None)
    return {} if name is None else {word: str(source.data[name].attrs.get(word, "")) for word in ABOUT}


def _arrow_array(arrow: Any, name: str, values: Any) -> Any:
    if name == "image":
        return arrow.array(values.tolist()).dictionary_encode()
    return arrow.array(values, type=arrow.string() if isinstance(values, list) else None)


def _text(values: Any) -> Sequence[Any]:
    """The shortest text that reads back as the same number; nothing where there is none."""
    if isinstance(values, list) or values.dtype.kind not in "f":
        return [_unlike_formula(each) for each in (values if isinstance(values, list) else values.tolist())]
    return list(np.where(np.isnan(values), "", values.astype(str)))


def _unlike_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
