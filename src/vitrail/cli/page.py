"""Commands that serve the page: `open` a study or some photographs, and the `demo`."""

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrail.cli.entry import app
from vitrail.cli.options import (
    Device,
    Out,
    Prototype,
    StudiedModel,
    Weights,
    decode,
    embedding_of_folder,
    require_study,
)
from vitrail.cli.studies import print_summary
from vitrail.errors import UsageError, VitrailError, explain_missing_library

if TYPE_CHECKING:
    from vitrail.models.open import Vit

__all__ = ["open_live_model", "study_photographs"]

DEMO_IMAGES = 78
"""65 crops and the 13 photographs they are of: all analyses of them take under a minute of one processor."""

DEMO_MEASURES = "heads,patterns,patches,tokens"
"""What the page has views of, of any model."""

OF_PHOTOGRAPHS = "heads,patches,tokens"
"""What photographs without a study are measured by."""

MOST_AT_ONCE = 16
"""Photographs in a pass: the default of `vitrail study`."""


@app.command(name="open")
def open_(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY", help="A folder written by `vitrail study`; before photographs, a model as `look` takes it."
        ),
    ],
    photographs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PHOTO...]", help="Photographs to look at without a study: `open MODEL photo.jpg`."),
    ] = None,
    host: Annotated[str, typer.Option(help="Off loopback, a random token goes into the address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8765,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    live: Annotated[bool, typer.Option(help="Keep the model at hand for single images.")] = True,
    others: Annotated[
        list[Path] | None,
        typer.Option("--with", help="Another study of the same images, to compare with.", metavar="STUDY"),
    ] = None,
    measures: Annotated[
        str | None,
        typer.Option(
            help=f"Of photographs without a study: what is measured, as in `vitrail study`. Default: {OF_PHOTOGRAPHS}."
        ),
    ] = None,
    prototype: Prototype = None,
    model: StudiedModel = None,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Open a study, or a model and some photographs, as linked views in the browser."""
    if prototype is not None and not live:
        raise UsageError("--prototype is for the live model, which --no-live leaves out; give one of the two.")
    if photographs:
        if model is not None:
            raise UsageError(f"Before photographs {study!r} is the model itself; --model is for a study.")
        if others:
            raise UsageError("--with compares studies, and these are photographs; leave it out, or open a study.")
        from vitrail.app.server import serve
        from vitrail.live import LiveModel
        from vitrail.models.open import open_vit

        for path in photographs:
            decode(path)  # a study would skip a file that cannot be read and go on without it
        vit = open_vit(study, weights=weights, device=device)
        typer.echo(repr(vit))
        mean = None if prototype is None else embedding_of_folder(vit, prototype)
        with tempfile.TemporaryDirectory(prefix="vitrail-") as folder:
            path = study_photographs(vit, photographs, Path(folder), measures or OF_PHOTOGRAPHS)
            live_model = LiveModel(vit, mean) if live else None
            serve(path, live_model, host=host, port=port, open_browser=browser, announce=_announce)
        return
    if measures is not None:
        raise UsageError(
            "--measures is for photographs without a study; a study gains measures by `vitrail study MODEL IMAGES "
            f"--measures {measures} --out {shlex.quote(study)}`."
        )
    path, beside = require_study(Path(study)), [require_study(other) for other in others or ()]
    from vitrail.app.server import serve

    def open_model() -> Any:
        return open_live_model(path, model, weights, device, prototype)

    model_or_none = open_model if live else None
    serve(path, model_or_none, host=host, port=port, open_browser=browser, announce=_announce, others=beside)


def study_photographs(vit: "Vit", photographs: Sequence[Path], folder: Path, measures: str) -> Path:
    """A study of some photographs, so that the page has every view of them.

    Args:
        vit: The model.
        photographs: Files.
        folder: An empty folder, which the study is written into.
        measures: As in `run_study`.

    Returns:
        The folder of the study.
    """
    from vitrail.data import open_images
    from vitrail.study.run import run_study

    source = open_images(photographs, class_names=vit.class_names, n_classes=vit.n_classes, labels=False)
    out = folder / "photographs"
    run_study(vit, source, out=out, measures=measures, batch_size=min(len(photographs), MOST_AT_ONCE), progress=True)
    return out


@app.command()
def demo(
    out: Out = Path("vitrail-demo"),
    limit: Annotated[
        int,
        typer.Option(help="Images: 65 held-out crops, the 13 photographs, then further crops; 333 are all.", min=1),
    ] = DEMO_IMAGES,
    measures: Annotated[
        str, typer.Option(help="What is measured, as in `vitrail study`; heads alone take a tenth of the time.")
    ] = DEMO_MEASURES,
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8765,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    serve: Annotated[bool, typer.Option(help="Serve the page when the study is done.")] = True,
) -> None:
    """Study the small model that comes with Vitrail on built-in photographs, and open the page. Needs no download."""
    from vitrail.models.open import open_vit
    from vitrail.study.run import run_study

    vit = open_vit("vitrail:photos")
    typer.echo(repr(vit))
    dataset = run_study(vit, "vitrail:photos", out=out, measures=measures, limit=limit, progress=True)
    print_summary(dataset, out)
    if serve:
        from vitrail.app.server import serve as serve_page
        from vitrail.live import LiveModel

        serve_page(out, LiveModel(vit), port=port, open_browser=browser, announce=_announce)


def open_live_model(
    study: Path, model: str | None, weights: str | None, device: str, prototype: str | None = None
) -> Any:
    """The study's model behind the page; where it cannot be opened, a line says why the page goes on without it.

    Args:
        study: The study.
        model: Where the model is, if not where it was.
        weights: Where the weights are, if not where they were.
        device: Where the model runs.
        prototype: Images whose mean embedding patches are compared with; None: none.

    Returns:
        A `vitrail.live.LiveModel`.

    Raises:
        VitrailError: It cannot be opened.
    """
    try:
        from vitrail.live import LiveModel
        from vitrail.study.reopen import reopen

        vit = reopen(study, model=model, weights=weights, device=device)
        return LiveModel(vit, None if prototype is None else embedding_of_folder(vit, prototype))
    except ModuleNotFoundError as error:
        sentence = explain_missing_library(error)
        if sentence is None:
            raise
        typer.secho(f"The page goes on without the live model: {sentence}", err=True)
        raise sentence from error
    except VitrailError as error:
        typer.secho(f"The page goes on without the live model: {error}", err=True)
        raise


def _announce(address: str) -> None:
    typer.echo(f"Vitrail is at {address}   (Ctrl-C stops it)")
