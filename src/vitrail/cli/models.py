"""Commands about a model: `check` it, `look` at single images, `artefacts`, `matches`, `prune` its heads, `curves`."""

import itertools
import json
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from vitrail.cli.entry import app
from vitrail.cli.options import (
    Device,
    Format,
    Formats,
    Json,
    ModelOptions,
    Out,
    Prototype,
    StudiedModel,
    Study,
    Weights,
    analysis_names,
    decode,
    embedding_of_folder,
    is_number,
    seed_option,
    split_option,
    with_file_name,
    with_model_options,
)
from vitrail.cli.studies import print_lines
from vitrail.errors import UsageError
from vitrail.sentence import percent


@app.command()
@with_model_options
def check(model: ModelOptions, as_json: Json = False) -> None:
    """Print a model's anatomy, check that what Vitrail says of it can be trusted, and say what a study will hold."""
    from vitrail.contract.check import check_vit
    from vitrail.contract.outlook import study_outlook

    vit = model.open()
    report, outlook = check_vit(vit), study_outlook(vit)
    if as_json:
        record = {"ok": report.ok and outlook.ok, **asdict(report), "study": asdict(outlook)}
        typer.echo(json.dumps(record))
    else:
        typer.echo(f"{report.text()}\n\n{outlook.text()}")
    if not (report.ok and outlook.ok):
        raise typer.Exit(1)


@app.command()
@with_model_options
def look(
    model: ModelOptions,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="One or more image files.")],
    out: Out = Path("look"),
    measures: Annotated[
        str | None,
        typer.Option(help=f"Analyses to show: {', '.join(analysis_names())}, comma-separated. Default: all."),
    ] = None,
    patch: Annotated[
        str | None,
        typer.Option(help="The patch to look at; default: the one the answer rests on.", metavar="ROW,COLUMN"),
    ] = None,
    channel: Annotated[int | None, typer.Option(help="The neuron to look at.", min=0)] = None,
    mask: Annotated[
        Path | None, typer.Option(help="A PNG of instance ids, for t-SNE by object; with one image.", metavar="FILE")
    ] = None,
    prototype: Prototype = None,
    save: Annotated[bool, typer.Option("--save", help="Also write every array, as DIR/IMAGE/look.zarr.")] = False,
    formats: Formats = [Format.png],  # noqa: B006 - typer copies it
) -> None:
    """Show what a model does with single images: findings, and figures of its heads, patches, tokens and neurons."""
    from rich.console import Console
    from rich.markup import escape

    from vitrail.data import read_mask
    from vitrail.data.channels import require_channels
    from vitrail.figures.style import refuse_formats
    from vitrail.figures.whole import draw_all, save_figures
    from vitrail.one_image import look as look_at
    from vitrail.one_image import missing_by_reason, save_look
    from vitrail.outputs import local_folder
    from vitrail.report import findings_of, write_look

    refuse_formats([each.value for each in formats])
    asked = split_option("--measures", measures)
    folders = [local_folder(out / stem) for stem in _folder_names(images)]
    if mask is not None and len(images) > 1:
        raise UsageError(f"--mask {mask} is of one image, and {len(images)} were given; look at them one by one.")
    ids = None if mask is None else read_mask(mask)
    for path in images:
        decode(path)  # one that cannot be read is named before a model is opened; a hundred do not fit in memory
    vit = model.open()
    for path in images:  # what this model cannot be shown is named before the first is looked at, too
        with with_file_name(path):
            require_channels(image := decode(path), vit.n_channels)
            vit.view(image)
    mean = None if prototype is None else embedding_of_folder(vit, prototype)
    for path, folder in zip(images, folders, strict=True):
        image = decode(path)
        with Console(stderr=True).status(escape(path.name)) as status:

            def step(doing: str, name: str = path.name, spinner: Any = status) -> None:
                spinner.update(escape(f"{name}: {doing}"))

            dataset = look_at(
                vit,
                image,
                name=path.name,
                measures=asked,
                mask=ids,
                patch=_parse_patch(patch),
                channel=channel,
                prototype=mean,
                progress=step,
            )
            step("drawing")
            drawn = list(draw_all(dataset, one_image=True))
            files = save_figures(drawn, folder, [each.value for each in formats])
            step("writing the page")
            page = write_look(dataset, folder / "look.html", drawn)
        for reason, names in missing_by_reason(dataset, by_name=measures is not None).items():
            typer.secho(f"left out: {', '.join(names)}: {reason}", err=True)
        for sentence in findings_of(dataset):
            typer.echo(sentence)
        for file in files:
            typer.echo(file)
        if save:
            typer.echo(save_look(dataset, folder / "look.zarr"))
        typer.echo(f"\nLook at it:  {page}")


@app.command()
@with_model_options
def artefacts(
    model: ModelOptions,
    images: Annotated[str, typer.Argument(help="A folder of images, or photos for the built-in ones.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The figure, as PNG, SVG or PDF.", metavar="FILE")] = Path(
        "artefacts.png"
    ),
    limit: Annotated[
        int,
        typer.Option(
            help="Images at most: changed models are tried on the second half, neurons and heads looked for on 16 of "
            "the first at most.",
            min=2,
        ),
    ] = 64,
    neurons: Annotated[
        int, typer.Option(help="Neurons that are switched off and that registers listen to.", min=1)
    ] = 8,
    heads: Annotated[int, typer.Option(help="Heads that are switched off, at most.", min=1)] = 3,
    registers: Annotated[int, typer.Option(help="Registers.", min=1)] = 1,
    masks: Annotated[
        Path | None,
        typer.Option(
            help="Folder of PNGs with instance ids, named like the images: tokens are grouped by object. Default: "
            "without objects.",
            metavar="DIR",
        ),
    ] = None,
    seed: Annotated[int, seed_option("Of the other neurons and heads that they are compared with.")] = 0,
) -> None:
    """Tokens of outlying length: which neurons and heads write them, what is left without these, what registers do."""
    from rich.console import Console

    from vitrail.data import open_images, scan, with_masks
    from vitrail.figures.artefacts import artefact_trial
    from vitrail.figures.style import figure_path, save
    from vitrail.study.batches import view_with_mask
    from vitrail.tokens.artefact_findings import artefact_findings
    from vitrail.tokens.artefact_trial import try_registers

    out = figure_path(out)
    vit = model.open()
    source = open_images(images, limit=limit, labels=False, leave_out=[] if masks is None else [masks])
    with Console(stderr=True).status("reading images") as status:
        manifest = scan(source, lambda done, total: status.update(f"reading images: {done} of {total}"))
        if masks is not None:
            manifest = with_masks(manifest, masks)
        views, ids = zip(*(view_with_mask(vit, source, entry) for entry in manifest.images), strict=True)
        status.update(f"looking for neurons and heads on {len(views)} images")
        trial = try_registers(
            vit,
            views,
            neurons,
            registers,
            seed,
            n_heads=heads,
            masks=None if masks is None else ids,
            progress=lambda what, done, total: status.update(f"{what}: {done} of {total} images"),
        )
        file = save(artefact_trial(trial), out)
    for sentence in artefact_findings(trial):
        typer.echo(sentence)
    for name, form in (("neuron", "L{} neuron {}"), ("head", "L{}H{}")):
        columns = (trial[f"{name}_{each}"].to_numpy() for each in ("layer", "index", "share"))
        for layer, index, share in zip(*columns, strict=True):
            typer.echo(f"{form.format(layer, index)}: {percent(share, 1)} of the length")
    typer.echo(file)


@app.command()
@with_model_options
def matches(
    model: ModelOptions,
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="The photograph whose patch is meant.")],
    images: Annotated[str, typer.Argument(help="Where to search: a folder, or photos for the built-in ones.")],
    patch: Annotated[str, typer.Option(help="The patch, counted from 0 on the layer's grid.", metavar="ROW,COLUMN")],
    layer: Annotated[int | None, typer.Option(help="After which layer; default: the last with patches.", min=0)] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The figure, as PNG, SVG or PDF.", metavar="FILE")] = Path(
        "matches.png"
    ),
    limit: Annotated[int | None, typer.Option(help="Images to search, at most.", min=1)] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            help="A folder that keeps the images' tokens, so that the next search runs the model over new ones alone.",
            metavar="DIR",
        ),
    ] = None,
) -> None:
    """Find the patches of other images whose tokens are most like one of a photograph."""
    from rich.console import Console

    from vitrail.data import open_images, scan
    from vitrail.figures.matches import patch_matches
    from vitrail.figures.style import figure_path, save
    from vitrail.tokens.matches import match_findings, match_patches
    from vitrail.tokens.token_index import indexed_scan

    place, image, out = _parse_patch(patch), decode(photo), figure_path(out)
    assert place is not None
    vit = model.open()
    with with_file_name(photo):
        vit.view(image)
    source = open_images(images, limit=limit, labels=False)
    with Console(stderr=True).status("reading images") as status:

        def reading(n: int, total: int) -> None:
            status.update(f"reading images: {n} of {total}")

        with nullcontext(scan(source, reading)) if index is None else indexed_scan(index, source, reading) as manifest:
            search = match_patches(
                vit,
                image,
                source,
                manifest,
                place,
                layer=layer,
                index=index,
                progress=lambda n, total: status.update(f"searching: {n} of {total}"),
            )
        file = save(patch_matches(search), out)
    for sentence in match_findings(search):
        typer.echo(sentence)
    typer.echo(file)


@app.command()
def prune(
    study: Study,
    out: Out,
    heads: Annotated[str | None, typer.Option(help="Heads to remove, as L0H4,L3H1.", metavar="HEADS")] = None,
    keep_accuracy: Annotated[
        float | None, typer.Option(help="Remove as many as leave this share of the accuracy, such as 0.99.")
    ] = None,
    ranking: Annotated[
        str | None, typer.Option(help="What heads are ranked by; default: flips, the best in our curves.")
    ] = None,
    model: StudiedModel = None,
    weights: Weights = None,
    device: Device = "cpu",
    seed: Annotated[int, seed_option("Of the two halves of the images.")] = 0,
) -> None:
    """Remove heads of a studied model for good: a smaller model, its parameters, speed and accuracy."""
    from vitrail.pruning.prune import prune_study
    from vitrail.pruning.ranking import parse_heads
    from vitrail.study.table import pruning_summary

    if heads is not None and ranking is not None:
        raise UsageError("--heads says which heads go, and --ranking would rank them; give one of the two.")
    done = prune_study(
        study,
        out,
        heads=parse_heads(heads) if heads is not None else None,
        keep_accuracy=keep_accuracy,
        ranking=ranking,
        model=model,
        weights=weights,
        device=device,
        seed=seed,
        progress=True,
    )
    print_lines(pruning_summary(done))


@app.command()
def curves(
    study: Study,
    test: Annotated[
        int, typer.Option(help="Images that are asked, at most: of the half that ranks nothing.", min=1)
    ] = 200,
    random_orders: Annotated[int, typer.Option(help="Orders at random beside the rankings.", min=1)] = 5,
    model: StudiedModel = None,
    weights: Weights = None,
    device: Device = "cpu",
    seed: Annotated[int, seed_option("Of the two halves of the images.")] = 0,
) -> None:
    """Prune heads one after the other by rankings of a study: how many can go, and how much the best ranking knows."""
    from vitrail.pruning.curves import measure_curves
    from vitrail.report.heads import curve_findings

    measured = measure_curves(
        study,
        n_test=test,
        n_random=random_orders,
        model=model,
        weights=weights,
        device=device,
        seed=seed,
        progress=True,
    )
    for sentence in curve_findings(measured):
        typer.echo(sentence)
    typer.echo(f"The report draws them: vitrail report {shlex.quote(str(study))}")


def _folder_names(images: Sequence[Path]) -> list[str]:
    """A folder for each image: its name without suffix, with a number where an earlier one has that name."""
    names: list[str] = []
    for path in images:
        numbered = (f"{path.stem}-{number}" for number in itertools.count(2))
        names.append(next(name for name in itertools.chain([path.stem], numbered) if name not in names))
    return names


def _parse_patch(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = [part.strip() for part in text.split(",")]
    if len(numbers) != 2 or not all(map(is_number, numbers)):
        raise UsageError(f"--patch {text!r} has no meaning; write ROW,COLUMN, counted from 0.")
    return int(numbers[0]), int(numbers[1])
