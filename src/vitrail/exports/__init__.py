"""A finished study in the formats of other tools: tables, netCDF, and data sets for Embedding Atlas and FiftyOne.

An export is a folder with `export.json`, which says what it is and lists its files; another export replaces these files
and no others. No torch.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vitrail import __version__
from vitrail.data.files import sentence
from vitrail.errors import StudyError, UsageError
from vitrail.exports.atlas import write_atlas
from vitrail.exports.fiftyone import write_fiftyone
from vitrail.exports.netcdf import write_netcdf
from vitrail.exports.source import ExportSource, open_source
from vitrail.exports.tables import write_csv, write_parquet
from vitrail.outputs import local_path

__all__ = ["FORMATS", "Format", "export_study"]

SIGN = "export.json"


class Format(NamedTuple):
    """One format.

    Attributes:
        write: Writes the study's measures into a new folder and returns how the tool opens it.
        help: What comes out, in a few words.
    """

    write: Callable[[ExportSource, Path], str]
    help: str


FORMATS: Mapping[str, Format] = {
    "parquet": Format(write_parquet, "one tidy table for each set of dimensions, for pandas, Polars, DuckDB, R"),
    "csv": Format(write_csv, "the same tables as text"),
    "netcdf": Format(write_netcdf, "all arrays in one netCDF-4 file, for xarray, R, Julia, Panoply"),
    "embedding-atlas": Format(write_atlas, "the map of images with their numbers, for Embedding Atlas"),
    "fiftyone": Format(write_fiftyone, "photographs with labels, predictions and heat maps, for FiftyOne"),
}


def export_study(
    study: str | Path, to: str, out: str | Path | None = None, *, measures: str | Sequence[str] | None = None
) -> tuple[Path, str]:
    """Writes a finished study in another tool's format.

    Args:
        study: Folder of the study.
        to: A name of `FORMATS`.
        out: Folder to write; default: `exports/FORMAT` in the study.
        measures: Measures or analyses to write, as names or as `--measures` takes them; default: all.

    Returns:
        The folder, and a line that opens it in the tool.

    Raises:
        UsageError: The format or a measure is unknown, or the folder holds something else.
        MissingLibrary: The format needs a library that is not installed.
        StudyError: The folder is no finished study, or the export cannot be written.

    Example:
        >>> import vitrail
        >>> folder, how = vitrail.export_study("study", "parquet")  # doctest: +SKIP
    """
    if to not in FORMATS:
        raise UsageError(f"There is no export to {to!r}; choose from {', '.join(FORMATS)}.")
    source = open_source(study, measures)
    folder = local_path(out if out is not None else Path(study) / "exports" / to)
    _refuse_foreign_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_own_files(folder)
        foreign = _files_in(folder)
        _write_sign(source, to, folder, files=[], is_complete=False)
        try:
            opens = FORMATS[to].write(source, folder)
        finally:
            own = sorted(_files_in(folder) - foreign - {SIGN})
            _write_sign(source, to, folder, files=own, is_complete=False)
        _write_sign(source, to, folder, files=own, is_complete=True)
    except OSError as error:
        raise StudyError(f"The export {folder} cannot be written: {sentence(error)}.") from error
    return folder, opens.format(folder=folder.as_posix())


def _files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def _remove_own_files(folder: Path) -> None:
    """Removes what the export before wrote here, as its sign lists it; whatever else lies here stays."""
    sign = folder / SIGN
    if not sign.is_file():
        return
    try:
        names = json.loads(sign.read_text(encoding="utf-8")).get("files", [])
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{sign} is damaged, so what the export wrote is not known; name another folder.") from error
    present = _files_in(folder)
    for name in names if isinstance(names, list) else []:
        if name in present:  # as this folder lists it, so no name leads out of it
            (folder / name).unlink()


def _refuse_foreign_folder(folder: Path) -> None:
    """Refuses to replace what is no export."""
    if folder.exists() and not (folder / SIGN).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} was not written by `vitrail export` (it has no {SIGN}) and is not overwritten; name another "
            "folder with --out."
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
    (folder / SIGN).write_text(json.dumps(sign, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
