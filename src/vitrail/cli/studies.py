"""Commands about a study: make it, verify it, draw it, report it."""

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitrail.cli.entry import app
from vitrail.cli.options import (
    Format,
    Formats,
    Json,
    ModelOptions,
    Out,
    Quiet,
    Study,
    analysis_names,
    require_study,
    seed_option,
    with_analysis_options,
    with_model_options,
)
from vitrail.errors import UsageError
from vitrail.outputs import address, is_address, local_folder

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import RenderableType

__all__ = ["print_lines", "print_summary"]

FIGURES = "figures"
"""Where the figures of a study are drawn, in its folder."""


@app.command()
@with_model_options
@with_analysis_options
def study(
    model: ModelOptions,
    images: Annotated[
        str, typer.Argument(metavar="IMAGES", help="A folder, a text file of paths, one image, hf:DATASET, or photos.")
    ],
    out: Out,
    measures: Annotated[
        str,
        typer.Option(help=f"Analyses ({', '.join(analysis_names())}) or measures, comma-separated."),
    ] = "heads",
    masks: Annotated[
        Path | None, typer.Option(help="Folder of PNGs with instance ids, named like the images.", metavar="DIR")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N images.", min=1)] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Largest image that is decoded, rows x columns.", min=1, metavar="N")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images a pass; part of the plan.", min=1)] = 16,
    seed: Annotated[int, seed_option("Of the map of images.")] = 0,
    worker: Annotated[
        bool, typer.Option("--worker", help="Share the work with other workers on DIR, here or on other machines.")
    ] = False,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Go on with a study that was begun on another kind of device.")
    ] = False,
    part_images: Annotated[
        int | None, typer.Option(help="Images in a part, about: what a worker takes at a time.", min=1, metavar="N")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: actors of a Ray cluster share the work.")] = "local",
    workers: Annotated[int, typer.Option(help="How many actors, with --engine ray.", min=1)] = 1,
    verify: Annotated[bool, typer.Option("--verify", help="Afterwards, read every part back and compare.")] = False,
    figures: Annotated[bool, typer.Option(help="Afterwards, draw the figures into DIR/figures.")] = True,
    as_json: Json = False,
    quiet: Quiet = False,
    **options: str,
) -> None:
    """Measure a model over a folder of photographs. Stop it whenever you like: the same command goes on."""
    from vitrail.data.decode import MAX_PIXELS
    from vitrail.figures.whole import draw_figures
    from vitrail.study.run import run_study

    speaks = not (as_json or quiet)
    if verify and is_address(out):
        raise UsageError(
            f"{address(out)} was to be verified, which reads a folder; copy the study to one, then verify it."
        )
    draws = figures and not worker and not is_address(out)  # of several workers, each would draw them
    if draws and not out.is_file():
        local_folder(out / FIGURES)
    vit = model.open()
    if speaks:
        typer.echo(repr(vit))
    dataset = run_study(
        vit,
        images,
        out=out,
        measures=measures,
        limit=limit,
        max_pixels=max_pixels or MAX_PIXELS,
        masks=masks,
        batch_size=batch_size,
        seed=seed,
        options=options,
        progress=not quiet,
        worker=worker,
        allow_mixed=allow_mixed,
        part_images=part_images,
        engine=engine,
        n_workers=workers,
    )
    if verify:
        _verify(out, speaks=speaks)
    drawn = draw_figures(dataset, out / FIGURES) if draws else None  # before a reader of the summary may close the pipe
    if speaks:
        print_summary(dataset, out)
    if speaks and drawn is not None:
        _print_drawn(drawn, out / FIGURES)
    if speaks and is_address(out):
        typer.echo(f"\nRead it:  vitrail.open_study({address(out)!r})")
    elif speaks:
        typer.echo(f"\nLook at it:  vitrail open {shlex.quote(str(out))}")
    if as_json:
        from vitrail.study.table import study_record

        typer.echo(json.dumps(study_record(dataset, out)))


@app.command()
def verify(
    study: Study,
    repair: Annotated[bool, typer.Option(help="Remove damaged parts, for `vitrail study` to make again.")] = False,
) -> None:
    """Read every part of a study back and compare it with what was written."""
    _verify(study, repair=repair)


@app.command()
def figures(
    study: Study,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR")] = None,
    formats: Formats = [Format.png],  # noqa: B006 - typer copies it
) -> None:
    """Draw the figures of a study, as PNG, SVG or PDF."""
    from vitrail.figures.whole import draw_figures
    from vitrail.study.store import open_study

    folder = out or study / FIGURES
    _print_drawn(draw_figures(open_study(study), folder, [each.value for each in formats]), folder)


@app.command()
def report(
    study: Study,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Default: report.html in the study's folder.", metavar="FILE")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as one JSON object, and write no file.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write a study as one HTML file that opens offline: findings, figures, tables, plan, and how to cite."""
    from vitrail.report import study_findings, write_report

    if as_json:
        if out is not None:
            raise UsageError(f"--json writes no file, and --out names {out}; leave one of the two out.")
        typer.echo(json.dumps({"study": str(study), "findings": study_findings(study)}))
        return
    target = write_report(study, out, progress=not quiet)
    if not quiet:
        typer.echo(f"{target}  ({target.stat().st_size / 1e6:.1f} MB)")


@app.command()
def compare(
    study_a: Annotated[Path, typer.Argument(metavar="STUDY_A", help="A finished study.", callback=require_study)],
    study_b: Annotated[
        Path, typer.Argument(metavar="STUDY_B", help="Another of the same images.", callback=require_study)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Default: compared-with-B.html in the folder of A.", metavar="FILE"),
    ] = None,
    measures: Annotated[
        str | None, typer.Option(help="Measures, comma-separated. Default: all that both studies hold.")
    ] = None,
    seed: Annotated[int, seed_option("Of resampled images and random signs.")] = 0,
) -> None:
    """Compare two studies of the same images: what differs, with intervals, and the images that changed most."""
    from vitrail.comparison.findings import comparison_findings
    from vitrail.report.comparison import write_comparison

    target, compared = write_comparison(study_a, study_b, out, measures=measures, seed=seed)
    for sentence in comparison_findings(compared):
        typer.echo(sentence)
    typer.echo(f"\n{target}  ({target.stat().st_size / 1e6:.1f} MB)")


def _verify(study: Path, *, repair: bool = False, speaks: bool = True) -> None:
    from vitrail.study.store import verify as verify_parts

    n_parts = verify_parts(study, repair=repair)
    if speaks:
        typer.echo(f"{n_parts} parts read back as they were written.")


def _print_drawn(files: Sequence[Path], folder: Path) -> None:
    if files:
        typer.echo(f"{len(files)} figures in {folder}")
    else:
        typer.echo("No figures: this study holds nothing that is drawn over a whole data set.")


def print_summary(dataset: "xr.Dataset", folder: Path) -> None:
    """Prints a study in a few lines: accuracy, and the heads that matter most.

    Args:
        dataset: The study, as `open_study` reads it.
        folder: The study's folder.
    """
    from vitrail.study.table import study_summary

    print_lines(study_summary(dataset, folder))


def print_lines(lines: Iterable["RenderableType"]) -> None:
    """Prints sentences and tables; a sentence is never broken, so that a path in it can be copied.

    Args:
        lines: What is printed.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for line in lines:
        console.print(line, soft_wrap=isinstance(line, str | Text))
