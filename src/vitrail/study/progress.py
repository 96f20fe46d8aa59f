"""What a person sees while a study runs: images a second and the time left."""

import sys
import threading
from collections.abc import Callable
from types import TracebackType

from rich import progress
from rich.console import Console

__all__ = ["Progress"]


LOG_INTERVAL_S = 10.0
"""Between two lines where there is no terminal: often enough to see that a study goes on, too rare to fill a log."""


class Progress:
    """Bars on the error stream; without a terminal a line every ten seconds, as bars are drawn on terminals only.

    Args:
        visible: False: nothing is written.
    """

    def __init__(self, visible: bool) -> None:
        self._log: threading.Thread | None = None
        self._stop = threading.Event()
        self._logs = visible and not sys.stderr.isatty()
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            _ImagesPerSecond(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not visible or self._logs,
        )
        self._scan: progress.TaskID | None = None
        self._study: progress.TaskID | None = None

    def __enter__(self) -> "Progress":
        self._bars.start()
        if self._logs:
            self._log = threading.Thread(target=self._write_log, name="vitrail-progress", daemon=True)
            self._log.start()
        return self

    def _write_log(self) -> None:
        while not self._stop.wait(LOG_INTERVAL_S):
            unfinished = [task for task in self._bars.tasks if not task.finished]
            for task in unfinished:
                total = "" if task.total is None else f" of {task.total:,.0f}"
                print(f"{task.description}: {task.completed:,.0f}{total}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._log is not None:
            self._log.join()
        self._bars.stop()

    def scanning(self, done: int, total: int) -> None:
        """Says how many images have been read for the list of images.

        Args:
            done: Images read.
            total: All of them.
        """
        if self._scan is None:
            self._scan = self._bars.add_task("reading", total=total)
        self._bars.update(self._scan, completed=done)

    def studying(self, done: int, total: int, what: str = "studying") -> None:
        """Begins the bar of images that `advance` moves.

        Args:
            done: Images that earlier runs have done.
            total: All of them.
            what: Description of the bar.
        """
        self._study = self._bars.add_task(what, total=total, completed=done)

    def advance(self, n_images: int) -> None:
        """Moves the bar of `studying`.

        Args:
            n_images: Images done since the last call.
        """
        assert self._study is not None
        self._bars.update(self._study, advance=n_images)

    def step(self, name: str) -> Callable[[int, int], None]:
        """Begins a bar for what comes after the images.

        Args:
            name: Description of the bar.

        Returns:
            To be called with what is done and how much there is.
        """
        bar = self._bars.add_task(name, total=None)
        return lambda done, total: self._bars.update(bar, completed=done, total=total)


class _ImagesPerSecond(progress.ProgressColumn):
    def render(self, task: progress.Task) -> str:
        speed = task.finished_speed or task.speed
        return "" if speed is None else f"{speed:.1f} images/s"
