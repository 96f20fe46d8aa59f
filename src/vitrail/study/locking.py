"""Who writes what of a study: leases, on every system and on folders that several machines share.

A lease is a file that names its holder (process, machine), which touches it every few seconds. It is free again as soon
as its process has ended, or, if that ran on another machine, once nobody has touched it for `LEASE_S` by the observer's
own clock: clocks of machines are never compared, and no file system needs to have locks. So whoever meets a lease of
another machine looks at it until its holder touches it, or for so long.

A process that was stopped for longer and goes on may find its lease taken. Nothing is lost then: the study is written
in whole files, and two processes that compute one part write the same bytes.
"""

import errno
import socket
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from filelock import SoftFileLease, Timeout

from vitrail.errors import StudyError

__all__ = [
    "LEASES",
    "LEASE_S",
    "LOCK",
    "OPENING",
    "POLL_S",
    "Access",
    "Lease",
    "Leases",
    "folder_lock",
    "hold_when_free",
    "lock_files",
    "presence",
    "remove_abandoned",
    "say_looking",
    "unwritable",
    "workers",
]

LOCK = ".lock"
"""Held by a process that writes a study alone, and by a worker while it joins."""

OPENING = ".lock-opening"
"""Held by a worker while it joins, so that several which start together come one after the other."""

LEASES = "leases"
"""The folder of the leases of workers."""

LEASE_S = 30.0
"""How long a lease outlives its last touch: longer than a busy file server lets a process wait."""

CUT_SHORT_S = 2.0
"""How long a lease that names nobody, as of a process that ended while it wrote its name, is left alone."""

POLL_S = 0.2
"""Between two looks at a lease that somebody else holds."""

TAKING_OVER = ".break."
"""In the name of a file that filelock puts beside a lease while it takes it from a process that has ended."""

MAX_LOCK_BYTES = 1024
"""Bytes of a lease's file at most."""


class Lease:
    """The right to write something, held by one process at a time.

    Args:
        path: The file that stands for it; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = SoftFileLease(path, lease_duration=LEASE_S, thread_local=False)
        self._look: tuple[tuple[int, int], float] | None = None
        self._is_touched = False

    def acquire(self) -> bool:
        """Takes the lease if it is free.

        Returns:
            Whether this process holds it now.

        Raises:
            OSError: Nothing can be written there.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self._observe()
            return False
        self._look, self._is_touched = None, False
        return True

    def release(self) -> None:
        """Gives the lease back."""
        self._lock.release(force=True)

    @property
    def holder(self) -> str:
        """Who holds it, in words; empty where the file does not say."""
        owner = self._lock.owner
        return "" if owner is None else f"Process {owner.pid} on {owner.hostname}"

    @property
    def is_held(self) -> bool:
        """Whether this process took it and has not given it back."""
        return self._lock.is_locked

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken it, because this one did not run for longer than `LEASE_S`."""
        return self._lock.compromise is not None

    @property
    def is_unclear(self) -> bool:
        """Whether its holder, on another machine or without a name, may have ended: nobody has touched it yet."""
        owner = self._lock.owner
        if self._look is None or self._is_touched or (owner is not None and owner.hostname == socket.gethostname()):
            return False
        return time.monotonic() - self._look[1] < LEASE_S + CUT_SHORT_S

    def _observe(self) -> None:
        """Notes whether somebody touches it, and removes an empty file that stays as it is.

        The writer of such a file ended between making it and writing its name.
        """
        with suppress(OSError):
            status = self.path.stat()
            mark, now = (status.st_ino, status.st_mtime_ns), time.monotonic()
            if self._look is None or self._look[0] != mark:
                self._is_touched = self._look is not None
                self._look = mark, now
            elif status.st_size == 0 and now - self._look[1] >= CUT_SHORT_S:
                self.path.unlink()


class Leases:
    """The leases of one worker on the parts of a study.

    Args:
        folder: The study.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / LEASES
        self._by_name: dict[str, Lease] = {}

    def acquire(self, name: str) -> bool:
        """Takes a lease if it is free.

        Args:
            name: What it is for.

        Returns:
            Whether this process holds it now.
        """
        if name not in self._by_name:  # an object that looks again remembers since when nobody has touched the file
            self._by_name[name] = Lease(self._folder / name)
        try:
            self._folder.mkdir(exist_ok=True)
            return self._by_name[name].acquire()
        except OSError as error:
            raise unwritable(self._folder, error) from error

    def release(self, name: str) -> None:
        """Gives a lease back.

        Args:
            name: What it is for.
        """
        self._by_name.pop(name).release()

    def sweep(self) -> None:
        """Removes leases that processes which were killed have left."""
        remove_abandoned(path for path in sorted(self._folder.glob("*")) if not self._holds(path.name))
        self._remove_folder()

    def _holds(self, name: str) -> bool:
        return name in self._by_name and self._by_name[name].is_held

    def release_all(self) -> None:
        """Gives every lease back."""
        for name in list(self._by_name):
            if self._holds(name):
                self.release(name)
        self._remove_folder()

    def _remove_folder(self) -> None:
        with suppress(OSError):  # some are still held
            self._folder.rmdir()


@runtime_checkable
class WorkerLeases(Protocol):
    """The leases of a worker, wherever they are: `Leases` or `object_leases.ObjectLeases`."""

    def acquire(self, name: str) -> bool: ...

    def release(self, name: str) -> None: ...

    def sweep(self) -> None: ...


@contextmanager
def hold_when_free(leases: WorkerLeases, name: str) -> Iterator[None]:
    """Holds a lease as soon as it is free.

    Args:
        leases: Of the worker.
        name: What the lease is for.

    Yields:
        Nothing; the lease ends with the context.
    """
    while not leases.acquire(name):
        time.sleep(POLL_S)
    try:
        yield
    finally:
        leases.release(name)


@runtime_checkable
class Mirror(Protocol):
    """A study elsewhere, of which a worker has a local copy: `object_store.ObjectStudy`."""

    def pull(self, *, values: bool = False) -> None: ...

    def pull_parts(self) -> None: ...

    def push(self, keys: Iterable[str]) -> None: ...

    def push_changes(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Access:
    """How a process may write a study.

    Attributes:
        lock: Its lock, of a process that writes alone.
        leases: Its leases, of a worker.
        others: Whether other workers were at work when it joined.
        mirror: Where the study is, if not in the folder that is written.
    """

    lock: Lease | None = None
    leases: WorkerLeases | None = None
    others: bool = False
    mirror: Mirror | None = None

    @contextmanager
    def one_at_a_time(self, name: str) -> Iterator[None]:
        """Does what must not be done by two workers at once.

        Args:
            name: What it is.

        Yields:
            Nothing; others may go on when the context ends.
        """
        with nullcontext() if self.leases is None else hold_when_free(self.leases, name):
            if self.mirror is not None:
                self.mirror.pull()
            yield
            if self.mirror is not None:
                self.mirror.push_changes()


@contextmanager
def folder_lock(folder: Path, name: str = LOCK, *, wait: bool = False) -> Iterator[Lease]:
    """Holds a lock of a study's folder, which is made if it is missing and removed again if it stays empty.

    Args:
        folder: The study, or the place where one will be.
        name: Which lock.
        wait: Wait while another process holds it.

    Yields:
        The lock.

    Raises:
        StudyError: Another process holds the lock (it is named), or nothing can be written there. Of a process on
            another machine this is said once it has touched the lock.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lease(folder / name)
        while wait and not lock.acquire():
            time.sleep(POLL_S)
        if not wait and _held([lock], folder):
            holder = lock.holder or "A process"
            raise StudyError(f"{holder} is writing {folder}; wait until it has ended, or end it.")
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield lock
    finally:
        lock.release()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def presence(folder: Path) -> Iterator[Leases]:
    """Lets others see that a worker is at work in a folder, until it ends.

    Args:
        folder: The study.

    Yields:
        The leases of this worker.
    """
    leases, number = Leases(folder), 0
    while not leases.acquire(f"worker-{number:04d}"):
        number += 1
    try:
        yield leases
    finally:
        leases.release_all()


def workers(folder: Path) -> list[str]:
    """Names the workers that are at work on a study.

    Args:
        folder: The study.

    Returns:
        A few words for each; empty where nobody is at work.
    """
    leases = [Lease(path) for path in sorted((folder / LEASES).glob("worker-*"))]
    return [lease.holder or "A process" for lease in _held_by_others(leases, folder)]


def _held_by_others(leases: Sequence[Lease], folder: Path) -> list[Lease]:
    """Those of the leases that somebody holds; files of the others are removed."""
    try:
        with suppress(FileNotFoundError):  # their folder was removed meanwhile, as nobody is at work any more
            return _held(leases, folder)
        return []
    finally:
        for lease in leases:
            if lease.is_held:
                lease.release()


def _held(leases: Sequence[Lease], folder: Path) -> list[Lease]:
    """Those of the leases that somebody holds, as soon as that is clear of one of them; this process takes the others.

    A process that has ended on this machine is told at once, one on another machine by its lease that nobody touches.
    """
    held = [lease for lease in leases if not lease.acquire()]
    if held and held[0].holder and all(lease.is_unclear for lease in held):
        say_looking(held[0].holder, folder)
    while held and all(lease.is_unclear for lease in held):
        time.sleep(POLL_S)
        held = [lease for lease in held if not lease.acquire()]
    return held


def say_looking(holder: str, place: object) -> None:
    """Says why a process waits that has met the lease of another machine.

    Args:
        holder: Who that is, in words.
        place: The study.
    """
    warnings.warn(
        f"{holder} was at work on {place}. Looking for up to {LEASE_S:.0f} s whether it still is.",
        RuntimeWarning,
        stacklevel=2,
    )


def lock_files(folder: Path) -> list[Path]:
    """The locks in a folder, and what processes have left there that were killed while they took one over.

    Args:
        folder: A study, or a place where one was to begin.

    Returns:
        Their paths.
    """
    paths = [path for name in (LOCK, OPENING) for path in (folder / name, *folder.glob(f"{name}{TAKING_OVER}*"))]
    return [path for path in paths if _is_lock_file(path)]


def remove_abandoned(paths: Iterable[Path]) -> None:
    """Removes files of leases whose processes have ended; looks for a while at those of which that is not clear.

    Where somebody else is still at work, what is not clear then is left to them.

    Args:
        paths: Of the files.
    """
    leases = [Lease(path) for path in paths if path.exists()]
    if leases:
        _held_by_others(leases, leases[0].path.parent)


def unwritable(folder: Path, error: OSError) -> StudyError:
    """What to say where nothing can be written.

    Args:
        folder: A study, or the place where one was to begin.
        error: What the system says.

    Returns:
        The error to raise.
    """
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "make room and run the same command again" if is_full else "name another place"
    return StudyError(f"Nothing can be written to {folder}: {error.strerror or error}; {advice}.")


def _is_lock_file(path: Path) -> bool:
    """Whether a file can be the lock of a process: it names one, or holds a number, as locks once did, or nothing."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_LOCK_BYTES:
        return False
    content = path.read_bytes().strip()
    return not content or content.isdigit() or content.startswith(b"filelock/")
