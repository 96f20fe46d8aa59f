"""Options that several commands share: how a model is opened, the options of all analyses, studies, output, formats."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrail.analysis import BASE, Option, all_options, analyses, split_names
from vitrail.errors import BadImage, StudyError, UsageError
from vitrail.outputs import STUDY_PLAN
from vitrail.stats import MAX_SEED

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from vitrail.models.open import Vit

__all__ = [
    "Device",
    "Format",
    "Formats",
    "Json",
    "ModelOptions",
    "Out",
    "Prototype",
    "Quiet",
    "Study",
    "Weights",
    "analysis_names",
    "decode",
    "embedding_of_folder",
    "is_number",
    "progress_bars",
    "require_study",
    "seed_option",
    "split_option",
    "with_analysis_options",
    "with_file_name",
    "with_model_options",
]


class Precision(StrEnum):
    """Number formats a model can run in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Format(StrEnum):
    """Formats of figures."""

    png = "png"
    svg = "svg"
    pdf = "pdf"


def is_number(text: str) -> bool:
    """Whether a text is a whole number from 0 on that can count anything here: Python reads no number of 5,000 digits.

    Args:
        text: Part of an option.

    Returns:
        True for a number below a billion.
    """
    return text.isdecimal() and len(text) < 10


def split_option(option: str, names: str | None) -> list[str] | None:
    """The names in an option; one that names nothing is a slip, and is not taken for the default.

    Args:
        option: What it is called.
        names: Comma-separated; None where the option was left out.

    Returns:
        The names, or None.

    Raises:
        UsageError: There are none.
    """
    if names is None:
        return None
    listed = split_names(names)
    if not listed:
        raise UsageError(f"{option} {names!r} names nothing; give names, comma-separated, or leave it out.")
    return listed


def require_study(folder: Path) -> Path:
    """Refuses a folder that is no study before a command imports what it needs, which takes seconds.

    Args:
        folder: What was given.

    Returns:
        The folder.

    Raises:
        StudyError: It is no study.
    """
    if not (folder / STUDY_PLAN).is_file():
        raise StudyError(
            f"{folder} is not a study: it has no {STUDY_PLAN}. A study is made by `vitrail study MODEL IMAGES --out`; "
            "`vitrail open MODEL photo.jpg` looks at photographs without one."
        )
    return folder


def seed_option(of: str) -> Any:
    """The option `--seed` of a command, which refuses what not every generator takes.

    Args:
        of: What is drawn with it.

    Returns:
        The option.
    """
    return typer.Option(help=of, min=0, max=MAX_SEED)


def decode(path: Path) -> "Image.Image":
    """The photograph in a file.

    Args:
        path: The file.

    Returns:
        The photograph.

    Raises:
        BadImage: It is none that can be read; the refusal names the file, for several may have been given.
    """
    from vitrail.data import decode_image

    with with_file_name(path):
        return decode_image(path)


@contextmanager
def with_file_name(path: Path) -> "Iterator[None]":
    """Puts the name of a file before what is wrong with its image, for several may have been given.

    Args:
        path: The file.

    Returns:
        A context in which refusals of images begin with the name of the file.
    """
    try:
        yield
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from error


def embedding_of_folder(vit: "Vit", images: str) -> "np.ndarray":
    """The mean embedding of a folder's images, which patches are compared with; says on stderr how far it is.

    Args:
        vit: The model.
        images: What `vitrail.open_images` takes.

    Returns:
        A prototype [feature], as `vitrail.tokens.label_free.mean_embedding` makes it.

    Raises:
        VitrailError: There is no image that can be read, or the model has no tokens on a grid.
    """
    from rich.console import Console

    from vitrail.data import load_image, open_images, scan
    from vitrail.tokens.label_free import mean_embedding, require_final_tokens

    require_final_tokens(vit)
    source = open_images(images, labels=False)
    with Console(stderr=True).status("reading the prototype's images") as status:
        entries = scan(source).images
        photographs = (load_image(source, entry) for entry in entries)
        return mean_embedding(
            vit, photographs, progress=lambda n: status.update(f"the prototype: {n} of {len(entries)} images")
        )


Weights = Annotated[
    str | None,
    typer.Option(
        help="Safetensors or a checkpoint (.pth, .pt, .ckpt, .bin); FILE:KEY for one of several models in it; or "
        "'random'. Default: the library's own.",
        metavar="FILE",
    ),
]
StudiedModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Where the study's model is now, if not where it was: a folder, or FILE.py:FUNCTION of a model of your "
        "own, which runs that file. Its weights must be those that were studied.",
        metavar="MODEL",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.", metavar="DIR")]
Prototype = Annotated[
    str | None,
    typer.Option(
        help="Images of one kind: patches are compared with their mean embedding too (prototype_similarity).",
        metavar="FOLDER",
    ),
]
Study = Annotated[
    Path, typer.Argument(metavar="STUDY", help="A folder written by `vitrail study`.", callback=require_study)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for a machine, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Formats = Annotated[list[Format], typer.Option("--format", "-f", help="May be given several times.")]


_MODEL: Any = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm:NAME, hf:NAME, tv:NAME, openclip:NAME/TAG, FILE.py:FUNCTION (run here; returns the module), a "
        "folder with config.json, or vitrail:photos.",
    ),
]

_MODEL_OPTIONS: Mapping[str, tuple[Any, Any]] = {
    "weights": (Weights, None),
    "class_names": (
        Annotated[Path | None, typer.Option(help="A file with one class name a line.", metavar="FILE")],
        None,
    ),
    "image_size": (
        Annotated[str | None, typer.Option(help="Pixels, one number or ROWSxCOLUMNS.", metavar="SIZE")],
        None,
    ),
    "task": (
        Annotated[
            str | None,
            typer.Option(
                help="What the output means, if the model does not say: classes, labels, regression, embedding, none.",
                metavar="TASK",
            ),
        ],
        None,
    ),
    "output": (
        Annotated[
            str | None, typer.Option(help="Which of several outputs: its name, or its index from 0.", metavar="NAME")
        ],
        None,
    ),
    "prompts": (
        Annotated[
            Path | None,
            typer.Option(
                help="A prompt a line, or CLASS<tab>PROMPT: makes a whole CLIP or SigLIP model a classifier.",
                metavar="FILE",
            ),
        ],
        None,
    ),
    "classes": (Annotated[int | None, typer.Option(help="Number of classes; 0 for no classifier.", min=0)], None),
    "mean": (
        Annotated[
            str | None,
            typer.Option(help="Of the preprocessing, on values 0..1, in place of the model's own.", metavar="R,G,B"),
        ],
        None,
    ),
    "std": (
        Annotated[
            str | None,
            typer.Option(help="Of the preprocessing, on values 0..1, in place of the model's own.", metavar="R,G,B"),
        ],
        None,
    ),
    "interpolation": (
        Annotated[
            str | None,
            typer.Option(help="bilinear, bicubic, lanczos, nearest; in place of the model's own.", metavar="NAME"),
        ],
        None,
    ),
    "crop": (
        Annotated[
            str | None,
            typer.Option(help="center, squash or border, a share such as 0.875, or squash:0.875.", metavar="CROP"),
        ],
        None,
    ),
    "device": (Device, "cpu"),
    "precision": (Annotated[Precision, typer.Option(help="Number format the model runs in.")], Precision.float32),
}
"""What every command that opens a model can be told about it: the annotation and default of each option."""


class ModelOptions:
    """A model as the command line names it, opened when the command has refused what can be refused without it.

    Args:
        name: The MODEL argument.
        values: The options of `_MODEL_OPTIONS` by name.
    """

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name = name
        self.device: str = values["device"]
        self.precision: str = values["precision"].value
        self._values = values

    def open(self) -> "Vit":
        """Opens the model; says on stderr where its weights came from, if they were named.

        Returns:
            The model, ready to be tapped.

        Raises:
            UsageError: an option has no meaning.
            VitrailError: the model cannot be opened.
        """
        from vitrail.data import read_class_names
        from vitrail.models.open import open_vit

        values = self._values
        vit = open_vit(
            self.name,
            image_size=_parse_size(values["image_size"]),
            weights=values["weights"],
            device=self.device,
            precision=self.precision,
            n_classes=values["classes"],
            class_names=read_class_names(values["class_names"]) if values["class_names"] else None,
            mean=_parse_per_channel("--mean", values["mean"]),
            std=_parse_per_channel("--std", values["std"]),
            interpolation=values["interpolation"],
            crop=values["crop"],
            task=values["task"],
            output=_parse_output(values["output"]),
            prompts=values["prompts"],
        )
        if values["weights"] not in (None, "random"):
            typer.echo(f"Weights: {vit.weights_source}", err=True)
        return vit


def with_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the argument MODEL and every option of how it is opened to a command.

    Args:
        command: Takes a `ModelOptions` as its first parameter, and its own parameters after it.

    Returns:
        The command for typer, with MODEL first and the options of the model after the command's own.
    """
    signature = inspect.signature(command)
    first, *own = signature.parameters.values()
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _MODEL_OPTIONS.items()
    ]

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        values = {name: given.pop(name) for name in _MODEL_OPTIONS}
        command(ModelOptions(given.pop(first.name), values), **given)

    return _with_signature(wrapper, signature, [first.replace(annotation=_MODEL), *own, *added])


def with_analysis_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds every option of every registered analysis to a command.

    Args:
        command: Receives the options' values as `**options`.

    Returns:
        The command for typer, with the options after its own.
    """
    signature = inspect.signature(command)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [_parameter(option) for option in all_options().values() if not option.hidden]
    names = {parameter.name for parameter in added}

    @functools.wraps(command)
    def wrapper(*args: Any, **given: Any) -> None:
        values = {name: getattr(value, "value", value) if name in names else value for name, value in given.items()}
        command(*args, **values)

    return _with_signature(wrapper, signature, [*own, *added])


def _with_signature(
    wrapper: Callable[..., None], signature: inspect.Signature, parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    """`wrapper` with the parameters that typer is to read."""
    keyword_only = [each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    others = [each for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    wrapper.__signature__ = signature.replace(parameters=[*others, *keyword_only])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": None}
    return wrapper


def _parameter(option: Option) -> inspect.Parameter:
    words: Any = StrEnum(option.name, {choice: choice for choice in option.choices})  # type: ignore[misc]
    annotation = Annotated[words, typer.Option(help=option.help)]
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=words(option.default), annotation=annotation
    )


def analysis_names() -> list[str]:
    """Returns the analyses that can be asked for by name.

    Returns:
        Names in the order of declaration.
    """
    return [name for name in analyses() if name != BASE]


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int, str], None]]:
    """Shows a bar for each thing that a long command does.

    Yields:
        A function that takes what is done, how much of it, of how much, and a word for the end of the line.
    """
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


def _parse_per_channel(option: str, text: str | None) -> float | list[float] | None:
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{option} {text!r} has no meaning; write one number, or one per channel: 0.485,0.456,0.406."
        ) from error
    return values[0] if len(values) == 1 else values


def _parse_output(text: str | None) -> str | int | None:
    """A whole number is an index, anything else a name."""
    return int(text) if text is not None and is_number(text) else text


def _parse_size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if not 1 <= len(sides) <= 2 or not all(is_number(side) and int(side) > 0 for side in sides):
        raise UsageError(f"--image-size {text!r} has no meaning; write one number of pixels, or ROWSxCOLUMNS.")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
