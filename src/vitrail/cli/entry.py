"""The `vitrail` command: its options that belong to no command, and how it ends.

It ends with 0 where all went well; 1 where a model, image or study cannot be used, or a check or verification failed;
2 where the command line itself has no meaning; 130 after Ctrl-C, and what was done is kept. A traceback is a bug.
"""

import errno
import io
import logging
import sys
from typing import Annotated

import typer

import vitrail
from vitrail.errors import UsageError, VitrailError, explain_missing_library

__all__ = ["app", "main"]

OF_THE_SYSTEM = {
    **dict.fromkeys(
        (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EROFS,
            errno.EACCES,
            errno.EPERM,
            errno.EIO,
            errno.ENAMETOOLONG,
        ),
        "This computer refused it. Make room or name another place, and run the same command again: what was finished "
        "is kept.",
    ),
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
        "A file is where a folder has to be, or a folder where a file has to be; name another place.",
    ),
}
"""Errors of a disk that is full, read-only, broken, somebody else's or holds something else: none of them is a bug."""

HUB_REQUESTS = "huggingface_hub.utils._http"
"""The logger that says of each failed request, twice and in raw words, that it is sent again."""

app = typer.Typer(
    name="vitrail",
    help="See through vision transformers: which heads matter, how far they reach, and for which images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(requested: bool) -> bool:
    if requested:
        typer.echo(f"vitrail {vitrail.__version__}")
        raise typer.Exit
    return requested


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


class _OneLineOfRetries(logging.Filter):
    """Says once that requests are repeated, and nothing of a logger that says it again and again."""

    def __init__(self) -> None:
        super().__init__()
        self._is_first = True

    def filter(self, record: logging.LogRecord) -> bool:
        """What logging asks of each line.

        Args:
            record: The line.

        Returns:
            False: ours stands for it.
        """
        if self._is_first:
            typer.echo("The Hugging Face Hub does not answer; asking again, for half a minute at most.", err=True)
        self._is_first = False
        return False


def _is_not_of_open_clip(record: logging.LogRecord) -> bool:
    """open_clip repeats on the root logger what it raises."""
    return "open_clip" not in record.pathname


def main() -> None:
    """The console script: what Vitrail says on purpose is printed as a sentence, a bug as a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are no UTF-8, as stderr has them
    logging.getLogger(HUB_REQUESTS).addFilter(_OneLineOfRetries())
    logging.getLogger().addFilter(_is_not_of_open_clip)
    try:
        app()
    except VitrailError as error:
        typer.secho(f"vitrail: {error}", err=True, fg="red")
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except OSError as error:
        if error.errno not in OF_THE_SYSTEM:
            raise
        path = f"{error.filename}: " if error.filename else ""
        typer.secho(f"vitrail: {path}{error.strerror}. {OF_THE_SYSTEM[error.errno]}", err=True, fg="red")
        sys.exit(1)
    except ModuleNotFoundError as error:
        sentence = explain_missing_library(error)
        if sentence is None:
            raise
        typer.secho(f"vitrail: {sentence}", err=True, fg="red")
        sys.exit(1)
    except SystemExit as ended:
        stop = getattr(ended.__context__, "__cause__", None)
        if isinstance(stop, KeyboardInterrupt):  # typer makes an exit of it, and says nothing
            _say_how_far(stop)
        raise
    except KeyboardInterrupt as stop:  # outside a command
        _say_how_far(stop)
        sys.exit(130)


def _say_how_far(stop: KeyboardInterrupt) -> None:
    """Says how far it came and what goes on from there, as those who were interrupted noted it."""
    notes = " ".join(getattr(stop, "__notes__", ()))
    typer.secho(f"\nStopped. {notes}".rstrip(), err=True)
