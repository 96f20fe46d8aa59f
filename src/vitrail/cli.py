"""The `vitrail` command. Each command imports what it needs when it runs, so `vitrail --help` is quick."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrail.errors import UsageError, VitrailError

if TYPE_CHECKING:
    import xarray as xr

    from vitrail.vit.open import Vit

__all__ = ["app", "main"]

app = typer.Typer(
    name="vitrail",
    help="See through vision transformers: which heads matter, how far they reach, and for which images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


class Precision(StrEnum):
    """Number formats a model can run in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Importance(StrEnum):
    """How the importance of heads is found."""

    exact = "exact"
    estimate = "estimate"


class Ablation(StrEnum):
    """What stands in the place of a pruned head."""

    zero = "zero"
    mean = "mean"


class Maps(StrEnum):
    """The number format attention maps are made in while they are read."""

    model = "model"
    bfloat16 = "bfloat16"


class Format(StrEnum):
    """Formats of figures."""

    png = "png"
    svg = "svg"
    pdf = "pdf"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm:NAME, hf:NAME, tv:NAME, openclip:NAME/TAG, a folder with config.json, or vitrail:photos.",
    ),
]
Weights = Annotated[
    str | None, typer.Option(help="A safetensors file, or 'random'. Default: the library's own.", metavar="FILE")
]
ImageSize = Annotated[str | None, typer.Option(help="Pixels, one number or ROWSxCOLUMNS.", metavar="SIZE")]
Classes = Annotated[int | None, typer.Option(help="Number of classes; 0 for no classifier.", min=0)]
ClassNames = Annotated[Path | None, typer.Option(help="A file with one class name a line.", metavar="FILE")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
PrecisionOption = Annotated[Precision, typer.Option(help="Number format the model runs in.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.", metavar="DIR")]
Study = Annotated[Path, typer.Argument(metavar="STUDY", help="A folder written by `vitrail study`.")]
Formats = Annotated[list[Format], typer.Option("--format", "-f", help="May be given several times.")]


@app.command()
def check(
    model: Model,
    weights: Weights = None,
    image_size: ImageSize = None,
    classes: Classes = None,
    device: Device = "cpu",
    precision: PrecisionOption = Precision.float32,
) -> None:
    """Print a model's anatomy and check that what Vitrail says of it can be trusted."""
    from vitrail.vit.check import check_vit

    report = check_vit(_opened(model, weights, image_size, classes, device, precision))
    typer.echo(report.text())
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def study(
    model: Model,
    images: Annotated[
        str, typer.Argument(metavar="IMAGES", help="A folder, a text file of paths, one image, hf:DATASET, or photos.")
    ],
    out: Out,
    measures: Annotated[
        str,
        typer.Option(help="Rooms (heads, patterns, regions, patches, neurons, windows) or measures, comma-separated."),
    ] = "heads",
    masks: Annotated[
        Path | None, typer.Option(help="Folder of PNGs with instance ids, named like the images.", metavar="DIR")
    ] = None,
    importance: Annotated[
        Importance, typer.Option(help="Prune every head in turn, or estimate all from one backward pass.")
    ] = Importance.exact,
    ablation: Annotated[
        Ablation, typer.Option(help="What a pruned head gives: zero, or its mean output over the images.")
    ] = Ablation.zero,
    maps: Annotated[Maps, typer.Option(help="Number format of attention maps while they are read.")] = Maps.model,
    weights: Weights = None,
    class_names: ClassNames = None,
    image_size: ImageSize = None,
    classes: Classes = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N images.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Images a pass; part of the plan.", min=1)] = 16,
    precision: PrecisionOption = Precision.float32,
    seed: Annotated[int, typer.Option(help="Of the map of images.")] = 0,
    device: Device = "cpu",
    verify: Annotated[bool, typer.Option("--verify", help="Afterwards, read every part back and compare.")] = False,
    figures: Annotated[bool, typer.Option(help="Afterwards, draw the figures into DIR/figures.")] = True,
) -> None:
    """Measure a model over a folder of photographs. Stop it whenever you like: the same command goes on."""
    from vitrail.study.run import run_study

    vit = _opened(model, weights, image_size, classes, device, precision, class_names)
    typer.echo(repr(vit))
    dataset = run_study(
        vit, images, out=out, measures=measures, limit=limit, masks=masks, batch_size=batch_size, seed=seed,
        options=_other_than_default(importance=importance, ablation=ablation, maps=maps), progress=True,
    )  # fmt: skip
    if verify:
        _verify(out)
    _summarise(dataset, out)
    if figures:
        _draw(dataset, out / "figures", [Format.png])
    typer.echo(f"\nLook at it:  vitrail open {out}")


@app.command()
def verify(
    study: Study,
    repair: Annotated[bool, typer.Option(help="Remove damaged parts, for `vitrail study` to make again.")] = False,
) -> None:
    """Read every part of a study back and compare it with what was written."""
    _verify(study, repair=repair)


@app.command()
def figures(
    study: Study, out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR")] = None,
    formats: Formats = [Format.png],  # noqa: B006 - typer copies it
) -> None:  # fmt: skip
    """Draw the figures of a study, as PNG, SVG or PDF."""
    from vitrail.study.store import open_study

    _draw(open_study(study), out or study / "figures", formats)


@app.command()
def report(
    study: Study,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Default: report.html in the study's folder.", metavar="FILE")
    ] = None,
) -> None:
    """Write a study as one HTML file that opens offline: findings, figures, tables, plan, and how to cite."""
    from vitrail.report import write_report

    target = write_report(study, out, progress=True)
    typer.echo(f"{target}  ({target.stat().st_size / 1e6:.1f} MB)")


@app.command()
def look(
    model: Model,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="One or more image files.")],
    out: Out = Path("look"),
    rooms: Annotated[str, typer.Option(help="What to draw, comma-separated.")] = "heads,patches,windows,neurons",
    patch: Annotated[
        str | None,
        typer.Option(help="The patch to look at; default: the one the answer rests on.", metavar="ROW,COLUMN"),
    ] = None,
    channel: Annotated[int | None, typer.Option(help="The neuron to look at.", min=0)] = None,
    mask: Annotated[
        Path | None, typer.Option(help="A PNG of instance ids, for t-SNE by object; with one image.", metavar="FILE")
    ] = None,
    weights: Weights = None,
    class_names: ClassNames = None,
    image_size: ImageSize = None,
    classes: Classes = None,
    device: Device = "cpu",
    precision: PrecisionOption = Precision.float32,
    formats: Formats = [Format.png],  # noqa: B006 - typer copies it
) -> None:
    """Draw what a model does with single images: its heads, its patches, its tokens and neurons."""
    from rich.console import Console

    from vitrail.data import decode_image, read_mask
    from vitrail.live import look_figures

    if mask is not None and len(images) > 1:
        raise UsageError(f"--mask {mask} is of one image, and {len(images)} were given; look at them one by one.")
    ids = None if mask is None else read_mask(mask)
    decoded = [(path, decode_image(path)) for path in images]
    vit = _opened(model, weights, image_size, classes, device, precision, class_names)
    for path, image in decoded:
        with Console(stderr=True).status(path.name) as status:

            def step(doing: str, name: str = path.name, shown: Any = status) -> None:
                shown.update(f"{name}: {doing}")

            made = look_figures(
                vit, image, out / path.stem, [each.value for each in formats], path.name,
                of_rooms=[room.strip() for room in rooms.split(",")], mask=ids, patch=_place(patch), channel=channel,
                step=step, left_out=lambda reason: typer.secho(f"left out: {reason}", err=True),
            )  # fmt: skip
        for file in made:
            typer.echo(file)


@app.command(name="open")
def open_(
    study: Study,
    host: Annotated[str, typer.Option(help="Off loopback, a random token goes into the address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8765,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    live: Annotated[bool, typer.Option(help="Keep the model at hand for single images.")] = True,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Open a study as linked views in the browser."""
    from vitrail.app.server import serve

    model = _live(study, weights, device) if live else None
    serve(study, model, host=host, port=port, open_browser=browser, announce=_announce)


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
    weights: Weights = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of the two halves of the images.")] = 0,
) -> None:
    """Remove heads of a studied model for good: a smaller model, its parameters, speed and accuracy."""
    from rich.console import Console

    from vitrail.heads.ranking import parse_heads
    from vitrail.study.pruning import prune_study
    from vitrail.study.table import pruning_summary

    done = prune_study(
        study, out, heads=parse_heads(heads) if heads is not None else None, keep_accuracy=keep_accuracy,
        ranking=ranking, weights=weights, device=device, seed=seed, progress=True,
    )  # fmt: skip
    for item in pruning_summary(done):
        Console().print(item)


@app.command()
def demo(
    out: Out = Path("vitrail-demo"),
    limit: Annotated[int, typer.Option(help="How many held-out crops to study.", min=1)] = 320,
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8765,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    serve: Annotated[bool, typer.Option(help="Serve the page when the study is done.")] = True,
) -> None:
    """Study the small model that comes with Vitrail on built-in photographs, and open the page. Needs no download."""
    from vitrail.study.run import run_study
    from vitrail.vit.open import open_vit

    vit = open_vit("vitrail:photos")
    typer.echo(repr(vit))
    dataset = run_study(vit, "photos", out=out, limit=limit, progress=True)
    _summarise(dataset, out)
    if serve:
        from vitrail.app.server import serve as serve_page
        from vitrail.live import Live

        serve_page(out, Live(vit), port=port, open_browser=browser, announce=_announce)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A recipe: a TOML file; see docs/wint.md.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Default: runs/ and the recipe's name.", metavar="DIR")
    ] = None,
) -> None:
    """Train a WinT from a recipe. Stop it whenever you like: the same command goes on, to the same weights."""
    from vitrail.wint.recipe import read_recipe
    from vitrail.wint.train import train as train_recipe

    recipe = read_recipe(config)
    folder = out or Path("runs") / config.stem
    typer.echo(f"{recipe.title}\nexpected: {recipe.expected}\ncost: {recipe.cost}")
    with _bars() as progress:
        results = train_recipe(recipe, folder, progress=progress)
    typer.echo(f"accuracy {results.accuracy:.4f}; the models are {folder / 'best'} and {folder / 'last'}")


@app.command()
def evaluate(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A trained model, or any MODEL.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="A packed .npz, class folders, or hf:NAME:SPLIT.")],
    teacher: Annotated[str | None, typer.Option(help="Compare its windows with this model's.", metavar="MODEL")] = None,
    teacher_area: Annotated[int, typer.Option(help="Percent of the grid of a teacher's window.", min=1, max=100)] = 25,
    limit: Annotated[int | None, typer.Option(help="A fixed random N of the images.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
    device: Device = "cpu",
    precision: PrecisionOption = Precision.float32,
) -> None:
    """Accuracy, area of windows by layer, agreement with a teacher and with measured windows, speed."""
    from vitrail.vit.open import open_vit
    from vitrail.wint.batches import read_images
    from vitrail.wint.evaluate import evaluate as evaluate_vit

    vit = open_vit(folder, device=device, precision=precision.value)
    guide = open_vit(teacher, device=device, precision=precision.value) if teacher else None
    with _bars() as progress:
        found = evaluate_vit(
            vit, read_images(data).some(limit), teacher=guide, teacher_area=teacher_area, batch_size=batch_size,
            progress=lambda done, total: progress("evaluating", done, total, ""),
        )  # fmt: skip
    typer.echo(f"{found.n_images:,} images, accuracy {found.accuracy:.4f}, {found.images_per_s:.0f} images/s")
    _print_windows(found)


def main() -> None:
    """The console script: what Vitrail says on purpose is printed as a sentence, a bug as a traceback."""
    try:
        app()
    except VitrailError as error:
        typer.secho(f"vitrail: {error}", err=True, fg="red")
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt as stop:
        notes = " ".join(getattr(stop, "__notes__", ()))
        typer.secho(f"\nStopped. {notes}".rstrip(), err=True)
        sys.exit(130)


# --- shared by the commands ------------------------------------------------------------------------------------------


def _opened(
    model: str, weights: str | None, image_size: str | None, classes: int | None, device: str, precision: Precision,
    class_names: Path | None = None,
) -> "Vit":  # fmt: skip
    from vitrail.data import read_class_names
    from vitrail.vit.open import open_vit

    names = read_class_names(class_names) if class_names else None
    return open_vit(
        model, image_size=_size(image_size), weights=weights, device=device, precision=precision.value,
        n_classes=classes, class_names=names,
    )  # fmt: skip


def _other_than_default(importance: Importance, ablation: Ablation, maps: Maps) -> dict[str, str]:
    """The options of the rooms as a plan holds them: the default is not named."""
    chosen = {"importance": importance.value, "ablation": ablation.value, "maps": maps.value}
    defaults = (Importance.exact, Ablation.zero, Maps.model)
    return {name: value for name, value in chosen.items() if value not in defaults}


def _size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UsageError(f"--image-size {text!r} has no meaning; write one number of pixels, or ROWSxCOLUMNS.")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _place(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = [part.strip() for part in text.split(",")]
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise UsageError(f"--patch {text!r} has no meaning; write ROW,COLUMN, counted from 0.")
    return int(numbers[0]), int(numbers[1])


def _live(study: Path, weights: str | None, device: str) -> Any:
    """The study's model behind the page, or None with a line that says why the page opens without it."""
    from vitrail.study.reopen import reopen

    try:
        vit = reopen(study, weights=weights, device=device)
    except VitrailError as error:
        typer.secho(f"Opening without the live model: {error}", err=True)
        return None
    from vitrail.live import Live

    return Live(vit)


def _verify(study: Path, *, repair: bool = False) -> None:
    from vitrail.study.store import verify as verify_parts

    typer.echo(f"{verify_parts(study, repair=repair)} parts read back as they were written.")


def _draw(dataset: "xr.Dataset", folder: Path, formats: Sequence[Format]) -> None:
    from vitrail.figures.whole import figures_of

    made = figures_of(dataset, folder, tuple(each.value for each in formats))
    if made:
        typer.echo(f"{len(made)} figures in {folder}")
    else:
        typer.echo("No figures: this study holds nothing that is drawn over a whole data set.")


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int, str], None]]:
    """What a long command shows: a bar for each thing it does."""
    from rich import progress
    from rich.console import Console

    columns = progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn()
    with progress.Progress(*columns, progress.TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int, word: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total, description=f"{what} {word}".rstrip())

        yield show


def _print_windows(found: Any) -> None:
    if not found.area:
        typer.echo("This model has no windows of its own.")
        return
    typer.echo(
        "Overlap of the windows (intersection over union) with those measured in the model's own attention, with"
    )
    typer.echo("those its queries would have without the windows, with the latter moved at random, with the teacher's:")
    typer.echo("layer   area   measured   open   moved   teacher")
    for layer, area in enumerate(found.area):
        taught = f"{found.overlap_teacher[layer]:.2f}" if found.overlap_teacher else "-"
        own, free, moved = (each[layer] for each in (found.overlap_own, found.overlap_open, found.overlap_chance))
        typer.echo(f"L{layer:<5} {area:5.1%} {own:10.2f} {free:6.2f} {moved:7.2f} {taught:>9}")


def _announce(address: str) -> None:
    typer.echo(f"Vitrail is at {address}   (Ctrl-C stops it)")


def _summarise(dataset: "xr.Dataset", folder: Path) -> None:
    """The study in a few lines: accuracy, and the heads that matter most."""
    from rich.console import Console

    from vitrail.study.table import summary

    console: Any = Console()
    printed: Callable[..., None] = console.print
    for item in summary(dataset, folder):
        printed(item)


if __name__ == "__main__":
    main()
