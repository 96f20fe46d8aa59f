"""The writing side of a study: what is on disk is complete or absent, whenever the process ends.

Order makes it so. The plan is written last when a folder is begun, arrays appear whole by one rename, and a part's file
in `parts/` is written after all of its values have reached the disk. What a killed run leaves half-written is removed
or overwritten with the same bytes by the next. No times and no random names stay, so equal plans give equal folders.
"""

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from zarr.codecs import ZstdCodec
from zarr.errors import ZarrUserWarning

from vitrail.data import Manifest
from vitrail.errors import DamagedStudy, StudyError
from vitrail.study.plan import Part, Plan, refuse_other_plan
from vitrail.study.store import (
    ARRAYS,
    DERIVED,
    IMAGES,
    PARTS,
    PATTERNS,
    PLAN,
    array_digest,
    declared,
    missing_parts,
    part_file,
    read_plan,
)

__all__ = ["StudyFolder", "locked", "plan_of", "refuse_foreign_folder", "write_whole"]

LOCK = ".lock"
UNFINISHED = ".unfinished"
SURVEY = "survey.safetensors"
OURS = {PLAN, IMAGES, ARRAYS, PARTS, PATTERNS, LOCK, SURVEY}

Arrays = Mapping[str, np.ndarray]


def refuse_foreign_folder(folder: Path) -> None:
    """Raises `StudyError` if `folder` is a file, or holds anything that a study does not."""
    if folder.exists() and not folder.is_dir():
        raise StudyError(f"{folder} is a file, and a study is a folder; name another place.")
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(name for name in held - OURS if not name.endswith(UNFINISHED))
    if PLAN not in held and others:
        raise StudyError(
            f"{folder} holds other files ({', '.join(others[:3])}) and no study; name a new or empty folder."
        )


def plan_of(folder: Path) -> Plan | None:
    """The plan that the folder was begun with, if it was."""
    return read_plan(folder) if (folder / PLAN).is_file() else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process writes a study. The lock falls with its process, however that ends.

    Raises `StudyError` that names the process which holds it.
    """
    is_new = not folder.exists()
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="ascii")  # noqa: SIM115 - closed below
    except OSError as error:
        raise StudyError(f"Nothing can be written to {folder}: {error.strerror}; name another place.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "(just starting)"
            raise StudyError(f"Process {holder} is writing {folder}; wait until it has ended, or end it.") from error
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise StudyError(f"Another process has just finished with {folder}; run the command again.")
        file.truncate(0)  # the number of a process that was killed
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink()  # while it is still locked, so that nobody else's lock is removed
            if is_new and not any(folder.iterdir()):
                folder.rmdir()


class StudyFolder:
    """A study being written. Make one inside `locked`."""

    def __init__(self, folder: Path, plan: Plan, manifest: Manifest) -> None:
        """Goes on with what is there, or begins it. Raises `PlanMismatch` if the folder has another plan."""
        self.folder, self.plan = folder, plan
        _remove_unfinished(folder)
        self._group: zarr.Group | None = None
        held = plan_of(folder)
        if held is not None:
            refuse_other_plan(str(folder), held, plan)
        with self._disk_errors("the plan"):
            if held is None:
                self._begin(manifest)
            elif (folder / IMAGES).read_text(encoding="utf-8") != manifest.to_json():
                write_whole(folder / IMAGES, manifest.to_json())  # the same images, which lie elsewhere by now

    def _begin(self, manifest: Manifest) -> None:
        for name in (ARRAYS, PARTS, PATTERNS):
            if (self.folder / name).exists():
                shutil.rmtree(self.folder / name)
        (self.folder / PARTS).mkdir()
        write_whole(self.folder / IMAGES, manifest.to_json())
        write_whole(self.folder / PLAN, self.plan.to_json())

    @property
    def missing(self) -> list[Part]:
        """Parts still to be computed."""
        return missing_parts(self.folder, self.plan)

    def write_part(self, part: Part, arrays: Arrays) -> None:
        """Stores one part whole: values first, then the file that says it is complete.

        Raises `StudyError` if the disk does not take it; the folder can then be resumed.
        """
        with self._disk_errors(f"part {part.number}"):
            self._write(part.number, slice(part.start, part.stop), arrays)

    def write_derived(self, arrays: Arrays) -> None:
        """Stores the arrays that need all images."""
        with self._disk_errors("what is derived from all parts"):
            self._write("derived", slice(None), arrays)

    @property
    def derived_is_missing(self) -> bool:
        """The arrays that need all images are still to be computed."""
        return not part_file(self.folder, "derived").is_file()

    @property
    def patterns_are_missing(self) -> bool:
        """The arrays of attention patterns are still to be computed."""
        return not part_file(self.folder, PATTERNS).is_file()

    def pattern_model(self, kind: str) -> Path:
        """Where the fitted model of a kind of pattern lies, or will."""
        return self.folder / PATTERNS / f"{kind}.safetensors"

    def write_pattern_model(self, kind: str, content: bytes) -> None:
        """Stores a fitted model whole, so that it need not be fitted again."""
        with self._disk_errors(f"the model of {kind} patterns"):
            (self.folder / PATTERNS).mkdir(exist_ok=True)
            write_whole(self.pattern_model(kind), content)

    def write_patterns(self, arrays: Arrays, about: Mapping[str, Any]) -> None:
        """Stores the arrays of attention patterns, whose sizes are known only now; `about` becomes their attributes."""
        with self._disk_errors("the attention patterns"):
            place = self.folder / PATTERNS / ARRAYS
            if place.exists():
                shutil.rmtree(place)  # of a run that was ended before it could say that they are complete
            made = place.with_name(ARRAYS + UNFINISHED)
            group = zarr.create_group(made, zarr_format=3, attributes=dict(about))
            for key, values in arrays.items():
                _create_array(group, key, values.shape, len(values), values.dtype)
                with zarr.config.set({"array.write_empty_chunks": True}):
                    array = _array(group, key)
                array[...] = values
            _consolidate(made)
            _to_disk(made)
            made.rename(place)
            self._mark(PATTERNS, arrays)

    @property
    def is_surveyed(self) -> bool:
        """What collectors need to have seen of all images is there."""
        return (self.folder / SURVEY).is_file()

    def write_survey(self, found: Sequence[Arrays]) -> None:
        """Stores what each surveying collector found, whole or not at all, with one digest of all of it."""
        arrays = {f"{number}/{name}": values for number, each in enumerate(found) for name, values in each.items()}
        with self._disk_errors("the survey of all images"):
            write_whole(self.folder / SURVEY, save(arrays, metadata={"digest": _joint_digest(arrays)}))

    def read_survey(self) -> list[dict[str, np.ndarray]]:
        """The same back, one of each collector. Raises `DamagedStudy` if it is not what was written."""
        path = self.folder / SURVEY
        try:
            with safe_open(path, framework="numpy") as file:
                digest = (file.metadata() or {}).get("digest")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DamagedStudy(f"{path} cannot be read: {error}. Delete it and run the same command again.") from error
        if _joint_digest(arrays) != digest:
            raise DamagedStudy(f"{path} is not what was written. Delete it and run the same command again.")
        found: list[dict[str, np.ndarray]] = []
        for key, values in sorted(arrays.items()):
            number, _, name = key.partition("/")
            found += [{}] * (int(number) == len(found))
            found[int(number)][name] = values
        return found

    @contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            done = len(self.plan.parts) - len(self.missing)
            raise StudyError(
                f"{what} could not be written to {self.folder}: {error.strerror or error}. {done} of "
                f"{len(self.plan.parts)} parts are complete; make room and run the same command again."
            ) from error

    def _write(self, name: int | str, rows: slice, arrays: Arrays) -> None:
        group = self._arrays(arrays)
        for key, values in arrays.items():
            with zarr.config.set({"array.write_empty_chunks": True}):  # so that an absent chunk is always a lost one
                array = _array(group, key)
            assert values.shape[1:] == array.shape[1:], f"{key} has shape {values.shape}, the study {array.shape}"
            assert values.dtype == array.dtype, f"{key} is {values.dtype}, the study {array.dtype}"
            array[rows] = values
            chunk = 0 if isinstance(name, str) else name
            _to_disk(self.folder / ARRAYS / key / "c" / str(chunk))
        self._mark(name, arrays)

    def _mark(self, name: int | str, arrays: Arrays) -> None:
        """Says that a part is complete."""
        digests = {key: array_digest(values) for key, values in arrays.items()}
        write_whole(part_file(self.folder, name), json.dumps({"digests": digests}, indent=1) + "\n")

    def _arrays(self, arrays: Arrays) -> zarr.Group:
        if self._group is None:
            if not (self.folder / ARRAYS).is_dir():
                self._create(arrays)
            self._group = zarr.open_group(self.folder / ARRAYS, mode="r+", use_consolidated=False)
        return self._group

    def _create(self, arrays: Arrays) -> None:
        """All arrays in their full size, made beside their place and moved there as one."""
        made = self.folder / (ARRAYS + UNFINISHED)
        group = zarr.create_group(made, zarr_format=3)
        for key, values in arrays.items():
            _create_array(group, key, (self.plan.n_images, *values.shape[1:]), self.plan.part_size, values.dtype)
        if "head_probability" in arrays:
            for key in DERIVED:
                _create_array(group, key, (self.plan.n_images, 2), self.plan.n_images, np.dtype("float32"))
        _consolidate(made)
        made.rename(self.folder / ARRAYS)


def _consolidate(path: Path) -> None:
    with warnings.catch_warnings():
        # Readers that do not know consolidated metadata lose nothing: the arrays' own files are there too.
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(path)


def _array(group: zarr.Group, key: str) -> zarr.Array[Any]:
    array = group[key]
    assert isinstance(array, zarr.Array)
    return array


def _create_array(group: zarr.Group, key: str, shape: tuple[int, ...], part_size: int, dtype: np.dtype) -> None:
    measure = declared(key)
    empty: Any = {"f": np.nan, "i": -1}.get(dtype.kind, 0)
    attributes: dict[str, Any] = {**measure.attributes()}
    group.create_array(
        key,
        shape=shape,
        chunks=(min(part_size, shape[0]), *shape[1:]),
        dtype=dtype,
        fill_value=dtype.type(empty),
        compressors=ZstdCodec(level=3, checksum=True),
        dimension_names=measure.dims,
        attributes=attributes,
    )


def _joint_digest(arrays: Arrays) -> str:
    """One digest of several arrays: safetensors writes several entries in an order that changes from run to run."""
    lines = "".join(f"{name} {array_digest(values)}\n" for name, values in sorted(arrays.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _to_disk(path: Path) -> None:
    """Waits until a chunk, or every file below a folder of chunks, has reached the disk."""
    for file in [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def write_whole(path: Path, content: str | bytes) -> None:
    """The file has all of the content or is as it was before."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with open(unfinished, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove_unfinished(folder: Path) -> None:
    for path in [*folder.rglob(f"*{UNFINISHED}"), *folder.rglob("*.partial")]:  # .partial: zarr's own, of single chunks
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
