"""Commands of the window-free transformer: `train` a WinT, `evaluate` it."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vitrail.cli.entry import app
from vitrail.cli.options import ModelOptions, progress_bars, with_model_options


class WindowMode(StrEnum):
    """How a WinT attends within its windows."""

    model = "model"
    hard = "hard"
    sparse = "sparse"
    tiles = "tiles"


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

    recipe = read_recipe(config, lambda note: typer.echo(note, err=True))
    folder = out or Path("runs") / config.stem
    typer.echo(f"{recipe.title}\nexpected: {recipe.expected}\ncost: {recipe.cost}")
    with progress_bars() as progress:
        results = train_recipe(recipe, folder, progress=progress)
    typer.echo(f"accuracy {results.accuracy:.4f}; the models are {folder / 'best'} and {folder / 'last'}")


@app.command()
@with_model_options
def evaluate(
    model: ModelOptions,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A packed .npz, class folders, or hf:NAME:SPLIT.")],
    teacher: Annotated[str | None, typer.Option(help="Compare its windows with this model's.", metavar="MODEL")] = None,
    teacher_area: Annotated[int, typer.Option(help="Percent of the grid of a teacher's window.", min=1, max=100)] = 25,
    limit: Annotated[int | None, typer.Option(help="A fixed random N of the images.", min=1)] = None,
    windows: Annotated[
        WindowMode,
        typer.Option(
            help="model: as trained. sparse: the same, computed in blocks. hard: sides rounded; tiles: these, shared "
            "by the queries of a block. sparse and tiles are fast on a GPU, at many tokens."
        ),
    ] = WindowMode.model,
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
) -> None:
    """Accuracy, area of windows by layer, agreement with a teacher and with measured windows, speed."""
    from vitrail.data.files import some
    from vitrail.models.open import open_vit
    from vitrail.windows.evaluate import evaluate as evaluate_vit
    from vitrail.wint.batches import read_images

    vit = model.open()
    guide = open_vit(teacher, device=model.device, precision=model.precision) if teacher else None
    with progress_bars() as progress:
        results = evaluate_vit(
            vit,
            read_images(data).subset(limit),
            teacher=guide,
            teacher_area=teacher_area,
            windows=windows.value,
            batch_size=batch_size,
            progress=lambda done, total: progress("evaluating", done, total, ""),
        )
    if results.skipped:
        typer.echo(f"left out: {some(results.skipped)}", err=True)
    typer.echo(f"{results.n_images:,} images, accuracy {results.accuracy:.4f}, {results.images_per_s:.0f} images/s")
    _print_windows(results)


def _print_windows(results: Any) -> None:
    if not results.area:
        typer.echo("This model has no windows of its own.")
        return
    typer.echo(
        "Overlap of the windows (intersection over union) with those measured in the model's own attention, with"
    )
    typer.echo("those its queries would have without the windows, with the latter moved at random, with the teacher's:")
    typer.echo("layer   area   measured   open   moved   teacher")
    for layer, area in enumerate(results.area):
        teacher = f"{results.overlap_teacher[layer]:.2f}" if results.overlap_teacher else "-"
        own, free, moved = (each[layer] for each in (results.overlap_own, results.overlap_open, results.overlap_chance))
        typer.echo(f"L{layer:<5} {area:5.1%} {own:10.2f} {free:6.2f} {moved:7.2f} {teacher:>9}")
