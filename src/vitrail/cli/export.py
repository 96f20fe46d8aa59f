"""`vitrail export`: a finished study in the formats of other tools, or as a page of one file."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vitrail.cli.entry import app
from vitrail.cli.options import Device, StudiedModel, Study, Weights, is_number, require_study, split_option
from vitrail.errors import UsageError

__all__ = ["write_page"]


class ExportFormat(StrEnum):
    """Names of `vitrail.exports.FORMATS`, which cannot be imported here: reading a study needs xarray and zarr."""

    parquet = "parquet"
    csv = "csv"
    netcdf = "netcdf"
    embedding_atlas = "embedding-atlas"
    fiftyone = "fiftyone"


@app.command()
def export(
    study: Study,
    to: Annotated[ExportFormat | None, typer.Option("--to", help="The format; see docs/how-to/export.md.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Default: exports/FORMAT in the study.", metavar="DIR")
    ] = None,
    measures: Annotated[
        str | None, typer.Option(help="Analyses or measures to write, comma-separated. Default: all.")
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="Write the page as one file that opens without a server.", metavar="FILE.html or DIR"),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Images that go into the page with attention: 0,5,17. Default: 12 of them.")
    ] = None,
    others: Annotated[
        list[Path] | None, typer.Option("--with", help="Another study of the same images, compared on the page.")
    ] = None,
    live: Annotated[bool, typer.Option(help="Open the model, for the attention of these images.")] = True,
    model: StudiedModel = None,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Write a study as tables, netCDF, for Embedding Atlas or FiftyOne; or as a page of one file (--page)."""
    if page is not None:
        if to is not None:
            raise UsageError("Give --page or --to, not both.")
        _refuse_options("--to", {"--out": out, "--measures": measures})
        write_page(study, page, images, others or (), model, weights, device, live=live)
        return
    from vitrail.exports import export_study

    if to is None:
        raise UsageError(f"Say what to write with --to: {', '.join(ExportFormat)}; or the page, with --page FILE.html.")
    of_page = {"--images": images, "--with": others, "--no-live": not live, "--model": model, "--weights": weights}
    _refuse_options("--page", of_page)
    folder, opens = export_study(study, to.value, out, measures=split_option("--measures", measures))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    typer.echo(f"{folder}  ({size / 1e6:.1f} MB)\nOpen it:  {opens}")


def _refuse_options(owner: str, values: Mapping[str, object]) -> None:
    """Refuses options that would be ignored without a word."""
    ignored = [name for name, value in values.items() if value]
    if ignored:
        raise UsageError(f"{', '.join(ignored)} has a meaning with {owner} only; leave it out, or give {owner}.")


def write_page(
    study: Path,
    page: Path,
    images: str | None,
    others: Any,
    model: str | None,
    weights: str | None,
    device: str,
    *,
    live: bool,
) -> None:
    """Writes the page of a study as one file, and says where it is.

    Args:
        study: The study.
        page: The file, or a folder for it.
        images: Images as `0,5,17`; None chooses.
        others: Studies to compare with.
        model: Where the model is, if not where it was.
        weights: Where the model's weights are, if not where they were.
        device: Where the model runs.
        live: Whether the model is opened.
    """
    from vitrail.app.export import export_page
    from vitrail.cli.page import open_live_model
    from vitrail.errors import VitrailError

    for other in others:
        require_study(other)
    live_model = None
    if live:
        try:
            live_model = open_live_model(study, model, weights, device)
        except VitrailError:
            typer.secho("Attention is left out.", err=True)  # why has been said
    target = export_page(study, page, live_model, images=_parse_images(images), others=others)
    typer.echo(f"{target}  ({target.stat().st_size / 1e6:.1f} MB)")


def _parse_images(text: str | None) -> list[int] | None:
    if text is None:
        return None
    numbers = [part.strip() for part in text.split(",")]
    if not all(map(is_number, numbers)):
        raise UsageError(f"--images {text!r} has no meaning; write positions in the study, as 0,5,17.")
    return [int(number) for number in numbers]
