"""A study in an object store: `s3://bucket/study`, and whatever else obstore opens. No torch here.

Each worker has a copy of the study in a local folder of its own, writes there as it would write any study, and uploads
what is complete: values first, then the object that says so, as on a disk. What others have written is downloaded
before every look at what is missing. Bytes are those of a study in a folder.
"""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from vitrail.errors import MissingLibrary, StudyError, UsageError
from vitrail.outputs import address as full_address
from vitrail.study.store import IMAGES, PARTS, PLAN

__all__ = ["ObjectStudy", "open_objects"]

OBJECTS = re.compile(
    r"\.vitrail-study|(?:study|images|model)\.json|survey\.safetensors|parts/\w+\.json|patterns/\w+\.safetensors"
    r"|(?:patterns/)?arrays\.zarr/(?:\w+/)?(?:zarr\.json|c(?:/\d+)*)"
)
"""Keys of a study. Nothing else is downloaded or uploaded, so no key leads out of the local folder."""

VALUES = re.compile(r"(?:patterns/)?arrays\.zarr/\w+/c(?:/\d+)*")
"""Keys of the values of arrays: a worker needs none of others until all are there."""

SCHEMES = frozenset({"s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "memory"})
"""Stores that can be written to with conditions. obstore opens web addresses and `file://` as well: the one cannot be
written to, the other is a local folder by another name."""

TIMEOUT_S = 30
"""For one answer of the store."""

RETRIES, RETRY_S = 10, 120
"""A store that does not answer is asked again so often, at growing intervals, for so long at most."""

_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
"""Local copies, removed when the process ends: datasets read from them lazily."""

_STORES: dict[str, Any] = {}
"""Stores that live in this process (`memory://`), which would be empty if they were opened again."""


def open_objects(address: str | Path) -> "ObjectStudy":
    """Connects to the objects of a study.

    Credentials, region and endpoint are those of the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ..).

    Args:
        address: Such as `s3://bucket/study`.

    Returns:
        The study, with nothing downloaded yet.

    Raises:
        MissingLibrary: obstore is not installed.
        UsageError: It is no address of a store that obstore knows.
    """
    words = full_address(address)
    if words.partition(":")[0].lower() not in SCHEMES:
        raise UsageError(f"{words} is no object store; give s3://BUCKET/STUDY or a local folder.")
    try:
        from obstore.exceptions import BaseError
        from obstore.store import MemoryStore, from_url
    except ModuleNotFoundError as error:
        raise MissingLibrary(
            f"{words} is an address of an object store, and obstore is not installed here: pip install 'vitrail[s3]', "
            "or name a local folder.",
            name="obstore",
        ) from error
    if words.startswith("memory:"):
        return ObjectStudy(words, _STORES.setdefault(words, MemoryStore()))
    allow_http = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    try:
        store = from_url(
            words,
            client_options={"timeout": f"{TIMEOUT_S}s", "allow_http": allow_http},
            retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_S)},
        )
    except (BaseError, ValueError) as error:
        raise UsageError(
            f"{words} is no object store that can be written to ({_first_line(error)}); give s3://BUCKET/STUDY or a "
            "local folder."
        ) from error
    return ObjectStudy(words, store)


class ObjectStudy:
    """The objects of a study and a local copy of some of them.

    Args:
        address: Of the study, for messages.
        store: Of obstore, whose keys are places in the study.

    Attributes:
        folder: The local copy.
    """

    def __init__(self, address: str, store: Any) -> None:
        directory = tempfile.TemporaryDirectory(prefix="vitrail-study-")
        _FOLDERS.append(directory)
        self.address, self.store, self.folder = address, store, Path(directory.name) / "study"
        self.folder.mkdir()
        self._tags: dict[str, str] = {}
        self._files: dict[str, tuple[int, int]] = {}

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Says what is wrong with the store, and names the study where a message names its local copy.

        Yields:
            Nothing.

        Raises:
            StudyError: The store does not answer, or refuses.
        """
        from obstore.exceptions import BaseError

        try:
            yield
        except BaseError as error:
            raise StudyError(
                f"The object store of {self.address} does not do what was asked of it: {_first_line(error)}. What was "
                "written is safe; when it answers, run the same command again."
            ) from error
        except StudyError as error:
            if str(self.folder) not in str(error):
                raise
            raise type(error)(str(error).replace(str(self.folder), self.address)) from error

    @property
    def names(self) -> set[str]:
        """The first parts of all keys."""
        listed = self.store.list_with_delimiter()
        return {str(each["path"]) for each in listed["objects"]} | {
            str(each).rstrip("/") for each in listed["common_prefixes"]
        }

    def pull_parts(self) -> None:
        """Downloads what others have said to be complete since the last look."""
        self._pull(f"{PARTS}/")

    def pull(self, *, values: bool = False) -> None:
        """Downloads what is not in the local copy, or has changed.

        What says that something is complete comes first, so that the copy has all that it speaks of.

        Args:
            values: Also the values of arrays, without which a study can be written and not read.
        """
        self.pull_parts()
        self._pull("", values=values, parts=False)

    def _pull(self, prefix: str, *, values: bool = False, parts: bool = True) -> None:
        present = set()
        for page in self.store.list(prefix or None):
            for each in page:
                key = str(each["path"])
                if not OBJECTS.fullmatch(key):
                    continue
                present.add(key)
                is_here = (self.folder / key).is_file()
                wanted = (values or not VALUES.fullmatch(key)) and (parts or not key.startswith(f"{PARTS}/"))
                if wanted and not (is_here and self._tags.get(key) == each["e_tag"]):
                    self._download(key)
        for key in [key for key in self._tags if key.startswith(prefix) and key not in present]:
            (self.folder / key).unlink(missing_ok=True)
            self._forget(key)

    def _download(self, key: str) -> None:
        try:
            answer = self.store.get(key)
            content = bytes(answer.bytes())
        except FileNotFoundError:  # removed since it was listed
            return
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        modified = answer.meta["last_modified"].timestamp()
        os.utime(path, (modified, modified))  # images that are older than the list of images are not read again
        self._remember(key, answer.meta["e_tag"])

    def push(self, keys: Iterable[str]) -> None:
        """Uploads files of the local copy.

        Args:
            keys: In this order.
        """
        for key in keys:
            done = self.store.put(key, (self.folder / key).read_bytes(), use_multipart=False)
            self._remember(key, done["e_tag"])

    def push_changes(self) -> None:
        """Brings the store to what the local copy has become since both were the same.

        What says that something is complete goes first where it is removed, and last where it is written.
        """
        gone = [key for key in self._files if not (self.folder / key).is_file()]
        for key in sorted(gone, key=lambda each: not each.startswith(f"{PARTS}/")):
            self._remove(key)
        files = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        changed = [key for key in files if OBJECTS.fullmatch(key) and self._files.get(key) != _mark(self.folder / key)]
        self.push(sorted(changed, key=_order))

    def _remove(self, key: str) -> None:
        self.store.delete(key)
        self._forget(key)
        head, _, name = key.rpartition("/")
        if name == "zarr.json":  # of an array that is to be made anew: its values go with it
            values = [each["path"] for page in self.store.list(f"{head}/c") for each in page]
            for value in values:
                self.store.delete(value)
                self._forget(value)

    def _remember(self, key: str, tag: str) -> None:
        self._tags[key], self._files[key] = tag, _mark(self.folder / key)

    def _forget(self, key: str) -> None:
        self._tags.pop(key, None)
        self._files.pop(key, None)


def _order(key: str) -> tuple[int, int, str]:
    """Values, then what describes them, the group of arrays after its arrays, then what says that they are complete,
    then what begins a study."""
    if VALUES.fullmatch(key):
        return 0, 0, key
    last = (IMAGES, f"{PARTS}/", PLAN)
    return next((2 + number for number, each in enumerate(last) if key.startswith(each)), 1), -key.count("/"), key


def _mark(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
