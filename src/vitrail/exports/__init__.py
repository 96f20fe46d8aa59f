"""A finished study in the formats of other tools: tables, netCDF, and data sets for Embedding Atlas and FiftyOne.

An export is a folder with `export.json`, which says what it is and lists its files; another export replaces these files
and no others, and is refused where it would write over one of somebody else's. No torch.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import xarray as xr

from vitrail import __version__
from vitrail.data.files import sentence, some
from vitrail.errors import StudyError, UsageError
from vitrail.exports import atlas, fiftyone, netcdf
from vitrail.exports.atlas import write_atlas
from vitrail.exports.fiftyone import write_fiftyone
from vitrail.exports.netcdf import write_netcdf
from vitrail.exports.source import ExportSource, open_source
from vitrail.exports.tables import csv_names, parquet_names, write_csv, write_parquet
from vitrail.outputs import EXPORT_SIGN as SIGN
from vitrail.outputs import export_listing, local_folder
from vitrail.study.store import study_folder

__all__ = ["FORMATS", "Format", "export_study"]


class Format(NamedTuple):
    """One format.

    Attributes:
        write: Writes the study's measures into a folder and returns how the tool opens it.
        names: The files and folders that it makes there.
        help: What comes out, in a few words.
    """

    write: Callable[[ExportSource, Path], str]
    names: Callable[[ExportSource], Collection[str]]
    help: str


FORMATS: Mapping[str, Format] = {
    "parquet": Format(
        write_parquet, parquet_names, "one tidy table for each set of dimensions, for pandas, Polars, DuckDB, R"
    ),
    "csv": Format(write_csv, csv_names, "the same tables as text"),
    "netcdf": Format(
        write_netcdf, lambda _: (netcdf.FILE,), "all arrays in one netCDF-4 file, for xarray, R, Julia, Panoply"
    ),
    "embedding-atlas": Format(
        write_atlas, lambda _: (atlas.FILE,), "the map of images with their numbers, for Embedding Atlas"
    ),
    "fiftyone": Format(
        write_fiftyone,
        lambda _: (fiftyone.DATASET, fiftyone.PICTURES),
        "photographs with labels, predictions, heat maps, for FiftyOne",
    ),
}


def export_study(
    study: str | Path | xr.Dataset,
    to: str,
    out: str | Path | None = None,
    *,
    measures: str | Sequence[str] | None = None,
) -> tuple[Path, str]:
    """Writes a finished study in another tool's format.

    Args:
        study: Folder of the study, or the study as `open_study` gives it.
        to: A name of `FORMATS`.
        out: Folder to write; default: `exports/FORMAT` in the study.
        measures: Measures or analyses to write, as names or as `--measures` takes them; default: all.

    Returns:
        The folder, and a line that opens it in the tool.

    Raises:
        UsageError: The format or a measure is unknown, or the folder holds something else, or a file of somebody else's
            under a name that the export writes.
        MissingLibrary: The format needs a library that is not installed.
        StudyError: The folder is no finished study, or the export cannot be written.

    Example:
        >>> import vitrail
        >>> folder, how = vitrail.export_study("study", "parquet")  # doctest: +SKIP
    """
    if to not in FORMATS:
        raise UsageError(f"There is no export to {to!r}; choose from {', '.join(FORMATS)}.")
    study = study_folder(study)
    source = open_source(study, measures)
    folder = local_folder(out if out is not None else Path(study) / "exports" / to)
    try:
        own, names = _own_files(folder), FORMATS[to].names(source)
        foreign = _files_in(folder) - own - {SIGN}
        _refuse_foreign_files(folder, foreign, names)
        folder.mkdir(parents=True, exist_ok=True)
        for name in own:
            (folder / name).unlink()
        _write_sign(source, to, folder, files=sorted(names), is_complete=False)
        try:
            opens = FORMATS[to].write(source, folder)
        finally:
            written = sorted(_files_in(folder) - foreign - {SIGN})
            _write_sign(source, to, folder, files=written, is_complete=False)
        _write_sign(source, to, folder, files=written, is_complete=True)
    except OSError as error:
        raise StudyError(f"The export {folder} cannot be written: {sentence(error)}.") from error
    return folder, opens.format(folder=folder.as_posix())


def _files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def _own_files(folder: Path) -> set[str]:
    """What the export before wrote here, as its sign lists it; a folder that is no export is refused."""
    sign = folder / SIGN
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return set()
    if not sign.is_file():
        raise UsageError(_foreign_folder_message(folder, f"it has no {SIGN}"))
    try:
        content = export_listing(folder)
    except ValueError as error:
        raise UsageError(f"{sign} is damaged, so what the export wrote is not known; name another folder.") from error
    if content is None:
        raise UsageError(_foreign_folder_message(folder, f"its {SIGN} is of another program"))
    listed = set(map(str, content["files"])) if isinstance(content["files"], list) else set()
    # names as the folder lists them, so none leads out of it; an export that was killed lists folders
    return {name for name in _files_in(folder) if name in listed or name.split("/")[0] in listed}


def _foreign_folder_message(folder: Path, reason: str) -> str:
    return f"{folder} was not written by `vitrail export` ({reason}) and is not overwritten; name another with --out."


def _refuse_foreign_files(folder: Path, foreign: Collection[str], names: Collection[str]) -> None:
    """Refuses to write over what somebody else put beside the files of an export."""
    at_stake = sorted(name for name in foreign if name.split("/")[0] in names)
    if at_stake:
        raise UsageError(
            f"{folder} holds {some(at_stake, 3)}, which `vitrail export` did not write and would overwrite; move it, "
            "or name another folder with --out."
        )


def _write_sign(source: ExportSource, to: str, folder: Path, *, files: Sequence[str], is_complete: bool) -> None:
    """Says what the folder is, for a reader and for the next export."""
    sign = {
        "vitrail": __version__,
        "format": to,
        "complete": is_complete,
        "files": list(files),
        "model": source.plan.model,
        "images": source.plan.n_images,
        "data_digest": source.plan.data_digest,
        "measures": sorted(map(str, source.data.data_vars)),
        "left_out": source.left_out,
    }
    (folder / SIGN).write_text(json.dumps(sign, indent=1) + "\n", encoding="utf-8")
