"""Work in forks of this process, which has loaded everything already, so that kills fall into the work."""

import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["ended", "in_fork", "killed_until_done", "start"]


def start(work: Callable[[], object]) -> int:
    """Does the work in a fork; the number of its process."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:  # noqa: BLE001 - printed, and the fork must not return from here
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def ended(child: int, *, wait: bool) -> bool:
    """Whether a fork has come to its end; raises if it failed by itself."""
    number, status = os.waitpid(child, 0 if wait else os.WNOHANG)
    if number and not _was_killed(status) and status != 0:
        raise SystemExit(f"a process ended by itself with status {status}")
    return bool(number)


def in_fork(work: Callable[[], object], killed_after_s: float | None = None) -> bool:
    """Whether the work came to its end; raises if it failed by itself."""

    def timed() -> None:
        if killed_after_s is not None:
            threading.Timer(killed_after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        work()

    child = start(timed)
    _, status = os.waitpid(child, 0)
    if not _was_killed(status) and status != 0:
        raise SystemExit(f"a process ended by itself with status {status}")
    return not _was_killed(status)


def killed_until_done(
    work: Callable[[Path], object], out: Path, n_kills: int, longest_s: float, chance: random.Random
) -> Iterator[Path]:
    """Runs work that goes on where it stopped, killed at random moments, until all kills have fallen.

    Args:
        work: Given a folder.
        out: Gets a folder for each time that the work came to its end in spite of the kills.
        n_kills: How many there are in all.
        longest_s: The latest moment of a kill after the start, in seconds.
        chance: Chooses the moments.

    Yields:
        Each folder, once the work in it has come to its end.
    """
    kills = number = 0
    while kills < n_kills:
        folder = out / f"killed_{number}"
        number += 1
        while not in_fork(lambda: work(folder), chance.uniform(0, longest_s) if kills < n_kills else None):  # noqa: B023
            kills += 1
        yield folder


def _was_killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
