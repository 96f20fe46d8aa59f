"""What a person sees while a study runs: images a second and the time left."""

from collections.abc import Callable
from types import TracebackType

from rich import progress
from rich.console import Console

__all__ = ["Progress"]


class Progress:
    """Bars on the terminal's error stream, or nothing at all."""

    def __init__(self, shown: bool) -> None:
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            _ImagesPerSecond(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._scan: progress.TaskID | None = None
        self._study: progress.TaskID | None = None

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def scanning(self, done: int, total: int) -> None:
        """So many images have been looked at."""
        if self._scan is None:
            self._scan = self._bars.add_task("reading", total=total)
        self._bars.update(self._scan, completed=done)

    def studying(self, done: int, total: int, what: str = "studying") -> None:
        """The study begins with so many images done in earlier runs."""
        self._study = self._bars.add_task(what, total=total, completed=done)

    def advance(self, n_images: int) -> None:
        """So many more are done."""
        assert self._study is not None
        self._bars.update(self._study, advance=n_images)

    def step(self, name: str) -> Callable[[int, int], None]:
        """A bar for what comes after the images, told (done, of)."""
        bar = self._bars.add_task(name, total=None)
        return lambda done, total: self._bars.update(bar, completed=done, total=total)


class _ImagesPerSecond(progress.ProgressColumn):
    def render(self, task: progress.Task) -> str:
        speed = task.finished_speed or task.speed
        return "" if speed is None else f"{speed:.1f} images/s"
