"""The reading side of a study: a folder with a plan, a list of images and named arrays. No torch here.

study.json        the plan
images.json       the images in order, and the files that were skipped, with reasons
arrays.zarr/      one array per measure, first dimension `image`, chunked along it by part
parts/00012.json  what there is of part 12; the digest of each of its arrays
parts/derived.json  the same of the arrays that need all images
patterns/           the fitted models of attention patterns, and arrays.zarr with what they say of every head
parts/patterns.json  the same of these arrays
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import xarray as xr
import zarr
from xarray.backends import BackendArray
from xarray.core import indexing
from zarr.registry import register_pipeline

from vitrail.analysis import measures, places
from vitrail.data import Manifest
from vitrail.data.files import sentence, some
from vitrail.dataset import MeasureDataset
from vitrail.errors import DamagedStudy, StudyError, UsageError
from vitrail.outputs import STUDY_PLAN, is_address
from vitrail.study.plan import Part, Plan

__all__ = [
    "ARRAYS",
    "DERIVED",
    "FROM_ALL_PARTS",
    "IMAGES",
    "PARTS",
    "PATTERNS",
    "PLAN",
    "UNREADABLE",
    "array_digest",
    "arrays_by_part",
    "missing_parts",
    "open_study",
    "part_digests",
    "part_file",
    "read_manifest",
    "read_plan",
    "study_folder",
    "verify",
    "zarr_options",
]

PLAN, IMAGES, ARRAYS, PARTS = STUDY_PLAN, "images.json", "arrays.zarr", "parts"

DERIVED = ("image_xy",)
"""Arrays that need all images, computed after the last part."""


PATTERNS = "patterns"
"""The folder of the fitted patterns, and the name of their part."""


UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError)
"""What zarr, xarray and their codecs raise on files that are not what they seem."""

DERIVED_PART = "derived"

FROM_ALL_PARTS = (DERIVED_PART, PATTERNS)
"""Parts that are made of all others."""


def study_folder(study: str | Path | xr.Dataset) -> str | Path:
    """The folder of a study that is given as its folder or as `open_study` gives it.

    Args:
        study: Either.

    Returns:
        The folder, or the address that was given.

    Raises:
        UsageError: A dataset is of no study, or of a part of one.
    """
    if not isinstance(study, xr.Dataset):
        return study
    if "source" not in study.encoding:
        raise UsageError("These numbers were not read from a study; give its folder, or what open_study gives.")
    if study.sizes.get("image") != study.attrs.get("n_images", 0) - study.attrs.get("missing_images", 0):
        raise UsageError(
            "A part of a study was given, and this is of a whole study: give its folder, or what open_study gives."
        )
    folder: str = study.encoding["source"]
    return folder


def open_study(path: str | Path, *, partial: bool = False) -> xr.Dataset:
    """Opens a study as a dataset that is read lazily.

    Args:
        path: The folder of the study, or its address in an object store, from which all of it is downloaded.
        partial: Opens a study of which images are still to come, without these, and says nothing.

    Returns:
        Arrays with title, unit, low, high, source and limits in their attributes; the coordinate `image` holds the ids,
        others say what places along a dimension are called (`rule`, `side`, ..) or stand for (`amount`, ..); `attrs`
        holds the plan, `missing_images` (a count) and `missing_measures`: the names of those that are being added and
        that not every image has, which are left out with a warning.

    Raises:
        StudyError: The folder is no study, or images are still to come and `partial` is False.
        DamagedStudy: Something that was written is lost or cannot be read.

    Example:
        >>> import vitrail
        >>> study = vitrail.open_study("study")  # doctest: +SKIP
        >>> study["head_probability"].mean("image")  # doctest: +SKIP
        >>> study["pattern_rule"].sel(rule="sink")  # doctest: +SKIP
    """
    if is_address(path):
        from vitrail.study.object_store import open_objects

        objects = open_objects(path)
        with objects.errors():
            objects.pull(values=True)
            return open_study(objects.folder, partial=partial)
    folder = Path(path)
    plan = read_plan(folder)
    listed = arrays_by_part(folder, plan)
    parts = [part for part in plan.parts if part.number in listed]
    is_whole = len(parts) == len(plan.parts)
    if not is_whole and not partial:
        raise StudyError(_not_finished_message(folder, plan, parts) + " Or open what is there with partial=True.")
    names = frozenset.intersection(*listed.values()) if listed else frozenset()
    if not names:
        raise StudyError(_not_finished_message(folder, plan, parts))
    ids = [entry.id for entry in read_manifest(folder).images][: plan.n_images]
    if len(ids) != plan.n_images:
        raise DamagedStudy(f"{folder / IMAGES} lists {len(ids)} images, and the plan has {plan.n_images}.")
    dataset = _arrays(folder / ARRAYS, part_digests(folder, parts[0].number))
    dataset = dataset.drop_vars([name for name in dataset.variables if name not in names and name not in DERIVED])
    has_derived, has_patterns = (is_whole and part_file(folder, name).is_file() for name in FROM_ALL_PARTS)
    if not has_derived:  # still to come, or damaged and taken back by `verify --repair`
        dataset = dataset.drop_vars(DERIVED, errors="ignore")
    lost = _missing_chunks(folder, dataset, parts)
    about = {}
    if has_patterns:
        patterns = _arrays(folder / PATTERNS / ARRAYS, part_digests(folder, PATTERNS))
        lost |= _missing_pattern_chunks(folder, patterns)
        about, dataset = {PATTERNS: patterns.attrs}, dataset.assign(patterns.data_vars)
    if lost:
        raise DamagedStudy(_missing_chunks_message(folder, lost))
    dataset = _select_images(folder, dataset, ids, None if is_whole else parts)
    to_come = sorted(_measures_under_way(plan, listed, derived=not has_patterns) - names)
    if to_come and not partial:
        warnings.warn(
            f"{folder} does not hold {some(to_come, 3)} of every image yet, so it opens without. The `vitrail study` "
            "command that asked for them adds them.",
            RuntimeWarning,
            stacklevel=2,
        )
    left = {"missing_images": plan.n_images - dataset.sizes["image"], "missing_measures": to_come}
    attributes = {**asdict(plan), **left, **about}
    dataset = dataset.assign_coords(places(dataset, attributes))
    study = MeasureDataset(dataset.data_vars, dataset.coords, attributes)
    study.encoding["source"] = str(folder.resolve())  # as xarray's own readers note it; `vitrail.show` reads it
    return study


def _select_images(folder: Path, dataset: xr.Dataset, ids: Sequence[str], parts: Sequence[Part] | None) -> xr.Dataset:
    """The images of some parts, or all, with their ids."""
    n_rows = len(ids) if parts is None else parts[-1].stop
    if dataset.sizes.get("image", 0) < n_rows:
        raise DamagedStudy(
            f"{folder / ARRAYS} has room for {dataset.sizes.get('image', 0)} images, and {n_rows} were written. "
            "Restore the folder from a copy."
        )
    if parts is not None:
        rows = np.concatenate([np.arange(part.start, part.stop) for part in parts])
        ids, dataset = [ids[row] for row in rows], dataset.isel(image=rows)
    return dataset.assign_coords(image=np.asarray(ids, dtype=np.str_))


def _missing_chunks(folder: Path, arrays: xr.Dataset, parts: Sequence[Part]) -> dict[int | str, list[str]]:
    """Arrays of which a complete part has no chunk on disk, by part. zarr reads such chunks as the fill value."""
    lost: dict[int | str, list[str]] = {}
    numbers = {part.number: part.number for part in parts}
    for name, array in arrays.data_vars.items():
        chunks: Mapping[Any, int] = {DERIVED_PART: 0} if name in DERIVED else numbers
        for part in _parts_without_chunk(folder / ARRAYS, str(name), array.shape, chunks):
            lost.setdefault(part, []).append(str(name))
    return lost


def _missing_pattern_chunks(folder: Path, arrays: xr.Dataset) -> dict[int | str, list[str]]:
    group, shapes = folder / PATTERNS / ARRAYS, {str(name): array.shape for name, array in arrays.data_vars.items()}
    names = [name for name, shape in shapes.items() if _parts_without_chunk(group, name, shape, {PATTERNS: 0})]
    return {PATTERNS: names} if names else {}


def _parts_without_chunk(group: Path, name: str, shape: Sequence[int], chunks: Mapping[Any, int]) -> list[Any]:
    """The parts whose chunk of an array is missing or empty; chunks divide the first dimension only."""
    if 0 in shape:
        return []
    start, end = f"{group}/{name}/c/", "/0" * (len(shape) - 1)
    return [part for part, chunk in chunks.items() if _size(f"{start}{chunk}{end}") == 0]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _missing_chunks_message(folder: Path, lost: Mapping[int | str, Sequence[str]]) -> str:
    parts = [f"part {part} ({some(names, 3)})" for part, names in lost.items()]
    return (
        f"{folder} has lost values that were written: those of {some(parts, 4)}. Restore the folder from a copy, or "
        f"run `vitrail verify {folder} --repair` and then the same `vitrail study` command again, which computes them "
        "anew."
    )


def _not_finished_message(folder: Path, plan: Plan, parts: Sequence[Part]) -> str:
    return (
        f"{folder} has {len(parts)} of {len(plan.parts)} parts; run the same `vitrail study` command again to finish "
        "it."
    )


def part_digests(folder: Path, name: int | str) -> dict[str, str]:
    """The digest of each array that is written of a part.

    Args:
        folder: The study.
        name: Number of the part, "derived" or "patterns".

    Returns:
        Digests by name of the array.

    Raises:
        DamagedStudy: The file of the part cannot be read.
    """
    file = part_file(folder, name)
    try:
        return {str(array): str(digest) for array, digest in json.loads(file.read_bytes())["digests"].items()}
    except UNREADABLE as error:
        raise DamagedStudy(
            f"{file} cannot be read: {sentence(error)}. Delete it and run the same `vitrail study` command again."
        ) from error


def _arrays(path: Path, names: Iterable[str]) -> xr.Dataset:
    """The group of arrays at `path`, in which `names` are."""
    try:
        arrays = _opened(path)
    except UNREADABLE as error:
        raise DamagedStudy(f"{path} cannot be opened: {sentence(error)}. {_redo(path)}") from error
    lacking = [name for name in names if name not in arrays]
    if lacking:
        raise DamagedStudy(f"{path} has lost its arrays {some(lacking)}. {_redo(path)}")
    return arrays.assign({name: _read_lazily(path, str(name), array) for name, array in arrays.variables.items()})


def _opened(path: Path) -> xr.Dataset:
    # without a cache of their own, as `_read_lazily` has one
    with zarr_options(_reader(path)):
        return xr.open_dataset(path, engine="zarr", chunks=None, cache=False, consolidated=True)


@contextmanager
def zarr_options(options: Mapping[str, Any]) -> Iterator[None]:
    """Options of zarr while arrays are opened, which keep them.

    They are those of the whole process: without the lock, threads that set and restore them at the same time leave
    each other's behind, and a study would be written by the reader's way, which leaves chunks of zeros out.

    Args:
        options: As `zarr.config.set` takes them.

    Yields:
        None.

    Example:
        >>> with zarr_options({"array.write_empty_chunks": True}):
        ...     array = zarr.open_group("study/arrays.zarr")["label"]
    """
    with _options_lock, zarr.config.set(dict(options)):
        yield


def _reader(path: Path) -> dict[str, str]:
    """The options of zarr with which many small chunks are read in a tenth of the time, where zarrs is installed.

    It takes no paths that are no UTF-8.
    """
    if _forked or find_spec("zarrs") is None or not _is_utf_8(path):
        return {}
    from zarrs import ZarrsCodecPipeline

    register_pipeline(ZarrsCodecPipeline)  # its first versions do not tell zarr by themselves
    return {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}


def _is_utf_8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


_forked = False
"""Whether this process is a fork: there the threads of zarrs are missing, and it would wait for them for ever."""

_options_lock = RLock()


def _remember_fork() -> None:
    global _forked, _options_lock
    _forked, _options_lock = True, RLock()  # a thread that stayed behind may have held the other


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember_fork)


def _read_lazily(path: Path, name: str, array: xr.Variable) -> xr.Variable:
    """The array, read when it is needed and then cached; what cannot be read then is a `StudyError`."""
    lazy = indexing.LazilyIndexedArray(_StoredArray(path, name, array))
    cached = indexing.MemoryCachedArray(lazy)  # type: ignore[no-untyped-call]
    return xr.Variable(array.dims, cached, array.attrs, array.encoding)


class _StoredArray(BackendArray):
    def __init__(self, path: Path, name: str, array: xr.Variable) -> None:
        self.shape, self.dtype = array.shape, array.dtype
        self._path, self._name, self._array = path, name, array
        self._study = path.parents[1] if path.parent.name == PATTERNS else path.parent
        self._plan_mark = _mark(self._study / PLAN)
        self._forked = _forked

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        self._refuse_lost_chunks(key)
        try:
            if _forked and not self._forked:  # opened before the fork, with threads that stayed there
                self._array, self._forked = _opened(self._path)[self._name].variable, True
            values = np.asarray(self._array[key].values)
        except UNREADABLE as error:
            raise self._error(sentence(error)) from error
        self._refuse_lost_chunks(key)  # of a study that grew while they were read
        return values

    def _refuse_lost_chunks(self, key: tuple[Any, ...]) -> None:
        """zarr reads a chunk that is not there, of a study that was moved or grows, as the fill value."""
        if not self.shape:
            return
        length = (self._array.encoding.get("chunks") or self.shape)[0]
        chunks = {str(number): number for number in _chunks_of(key[0], self.shape[0], length)}
        lost = _parts_without_chunk(self._path, self._name, self.shape, chunks)
        if lost:
            raise self._error(f"chunk {some(lost, 3)} is missing")

    def _error(self, reason: str) -> StudyError:
        mark = _mark(self._study / PLAN)
        if mark is None:
            return StudyError(
                f"Values of {self._name} cannot be read, since {self._study} is no longer there. Put it back, or open "
                "the study where it is now."
            )
        if mark != self._plan_mark:
            return StudyError(f"{self._study} has changed since it was opened; open it again.")
        return DamagedStudy(
            f"Values of {self._name} in {self._path} cannot be read: {reason}. Restore the folder from a copy, or run "
            f"`vitrail verify {self._study} --repair` and then the same `vitrail study` command again, which computes "
            "them anew."
        )


def _mark(file: Path) -> tuple[int, int, int] | None:
    """What changes when a file is replaced; None where there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _chunks_of(rows: Any, n_rows: int, length: int) -> list[int]:
    """The chunks, along the first dimension, that hold these rows: an index, a slice or an array of indices."""
    if isinstance(rows, slice):
        rows = np.arange(*rows.indices(n_rows))
    numbers: list[int] = np.unique(np.asarray(rows) % max(n_rows, 1) // max(length, 1)).tolist()
    return numbers


def _redo(path: Path) -> str:
    """What to delete so that these arrays are made again."""
    of_patterns = path.parent.name == PATTERNS
    mark = part_file(path.parents[1], PATTERNS) if of_patterns else path.parent / PARTS
    return f"Delete {path} and {mark} and run the same `vitrail study` command again."


def read_plan(path: str | Path) -> Plan:
    """The plan of a study.

    Args:
        path: The folder of the study.

    Returns:
        The plan.

    Raises:
        StudyError: The folder is no study.
        DamagedStudy: The plan cannot be read.
    """
    file = Path(path) / PLAN
    if not file.is_file():
        raise StudyError(
            f"{path} is not a study: it has no {PLAN}. A study is made by `vitrail study MODEL IMAGES --out`."
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedStudy(f"{file}, the plan of the study, cannot be read: {sentence(error)}.") from error
    return Plan.from_json(text)


def read_manifest(path: str | Path) -> Manifest:
    """The images of a study, in order, and what was skipped.

    Args:
        path: The folder of the study.

    Returns:
        The manifest.

    Raises:
        DamagedStudy: The list of images cannot be read.
    """
    file = Path(path) / IMAGES
    try:
        stat = file.stat()
        return _read_manifest(file, stat.st_mtime_ns, stat.st_size, stat.st_ino)
    except UNREADABLE as error:  # RuntimeError: JSON that is nested too deep
        raise DamagedStudy(
            f"{file}, the list of the study's images, cannot be read: {sentence(error)}. Restore it from a copy."
        ) from error


@lru_cache(maxsize=1)  # whoever opens a study reads its list more than once, and a million images take seconds
def _read_manifest(file: Path, *_version: int) -> Manifest:
    return Manifest.from_json(file.read_text(encoding="utf-8"))


def part_file(folder: Path, name: int | str) -> Path:
    """The path of the file that says what is complete of a part.

    Args:
        folder: The study.
        name: Number of the part, "derived" or "patterns".

    Returns:
        A path in the study, whether the file is there or not.
    """
    return folder / PARTS / (f"{name:05d}.json" if isinstance(name, int) else f"{name}.json")


def missing_parts(folder: Path, plan: Plan, parts: Sequence[Part] | None = None) -> list[Part]:
    """The parts that lack an array of the plan.

    Args:
        folder: The study.
        plan: Its plan.
        parts: Some of its parts; None: all.

    Returns:
        Parts, in order.
    """
    parts = plan.parts if parts is None else parts
    listed, expected = arrays_by_part(folder, plan, parts), _measures_of_images(plan)
    return [part for part in parts if part.number not in listed or not expected <= listed[part.number]]


def arrays_by_part(folder: Path, plan: Plan, parts: Sequence[Part] | None = None) -> dict[int, frozenset[str]]:
    """The names of the arrays that are written of each part.

    A file of a part that cannot be read counts as listing all that the plan asks for, and what other parts have: that
    it is damaged is found when the part is read, and it is not measured again without a word.

    Args:
        folder: The study.
        plan: Its plan.
        parts: Some of its parts; None: all.

    Returns:
        Names by number of the part; without parts that have none.
    """
    listed: dict[int, frozenset[str]] = {}
    unreadable = []
    for part in plan.parts if parts is None else parts:
        try:
            content = json.loads(part_file(folder, part.number).read_bytes())
            listed[part.number] = frozenset(map(str, content["digests"]))
        except FileNotFoundError:
            continue
        except UNREADABLE:
            unreadable.append(part.number)
    anything = frozenset(plan.measures).union(*listed.values())
    return dict(sorted({**listed, **dict.fromkeys(unreadable, anything)}.items()))


def _measures_of_images(plan: Plan) -> frozenset[str]:
    """Measures that every part is to have. What no installed package declares cannot be measured here."""
    declared = measures()
    return frozenset(name for name in plan.measures if name in declared and not declared[name].derived)


def _measures_under_way(plan: Plan, listed: Mapping[int, frozenset[str]], *, derived: bool) -> frozenset[str]:
    """Measures of the plan that have been begun, of those that need all images only where `derived`.

    Of what is not installed here nothing but a part that has it says whether it is of each image.
    """
    of_all_images = (name for name in plan.measures if derived and name in measures() and measures()[name].derived)
    anywhere = frozenset().union(*listed.values()) & plan.measures.keys()
    return _measures_of_images(plan).union(anywhere, of_all_images)


def array_digest(values: np.ndarray) -> str:
    """Digest of dtype, shape and every value; NaNs count by their bits.

    Args:
        values: An array.

    Returns:
        SHA-256 as hex.
    """
    header = f"{values.dtype.str} {values.shape} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(values).tobytes()).hexdigest()


def verify(path: str | Path, *, repair: bool = False) -> int:
    """Reads every complete part back and compares it with the digests written beside it.

    Args:
        path: The folder of the study.
        repair: Marks damaged parts as missing, so that the same `vitrail study` command computes them again, instead of
            raising.

    Returns:
        Number of sound parts.

    Raises:
        DamagedStudy: Some parts are damaged; the message names them. Or the list of images is another.
        StudyError: The folder is no study.
    """
    folder = Path(path)
    plan = read_plan(folder)
    _verify_images(folder, plan)
    written = [part for part in plan.parts if part_file(folder, part.number).is_file()]
    ranges: dict[int | str, slice] = {part.number: slice(part.start, part.stop) for part in written}
    ranges |= {name: slice(None) for name in FROM_ALL_PARTS if part_file(folder, name).is_file()}
    _verify_metadata(folder, ranges)
    damaged = {name: reason for name, rows in ranges.items() if (reason := _damage(folder, name, rows))}
    if damaged and not repair:
        reasons = "\n  ".join(f"{part_file(folder, name)}: {reason}" for name, reason in damaged.items())
        raise DamagedStudy(
            f"{len(damaged)} of {len(ranges)} parts do not read back as they were written:\n  {reasons}\n"
            "Delete these files (`--repair` does it) and run the same `vitrail study` command again."
        )
    for name in damaged:
        part_file(folder, name).unlink()
    for name in FROM_ALL_PARTS if damaged else ():
        part_file(folder, name).unlink(missing_ok=True)
    return len(written) - sum(name not in FROM_ALL_PARTS for name in damaged)


def _verify_images(folder: Path, plan: Plan) -> None:
    manifest = read_manifest(folder)
    studied = replace(manifest, images=manifest.images[: plan.n_images])  # more where a run that adds some was ended
    if studied.digest != plan.data_digest:
        raise DamagedStudy(f"{folder / IMAGES} is not the list that the study was begun with; restore it from a copy.")


def _verify_metadata(folder: Path, names: Iterable[int | str]) -> None:
    if any(name != PATTERNS for name in names):
        _arrays(folder / ARRAYS, ())
    if PATTERNS in names:
        _arrays(folder / PATTERNS / ARRAYS, ())


def _damage(folder: Path, name: int | str, rows: slice) -> str | None:
    """What is wrong with a part, or None."""
    try:
        digests = part_digests(folder, name)
        path = folder / PATTERNS / ARRAYS if name == PATTERNS else folder / ARRAYS
        group = zarr.open_group(path, mode="r", use_consolidated=False)
        lost = _arrays_without_chunk(group, path, digests, name if isinstance(name, int) else 0)
        wrong = list(_wrong_arrays(group, digests, rows)) if not lost else []
    except (*UNREADABLE, DamagedStudy) as error:
        return f"cannot be read: {sentence(error)}"
    if lost:
        return f"lost values of {', '.join(lost)}"
    return f"other values in {', '.join(wrong)}" if wrong else None


def _arrays_without_chunk(group: zarr.Group, path: Path, names: Iterable[str], chunk: int) -> list[str]:
    return [name for name in names if _parts_without_chunk(path, name, _array(group, name).shape, {name: chunk})]


def _wrong_arrays(group: zarr.Group, digests: Mapping[str, str], rows: slice) -> Iterator[str]:
    for name, digest in digests.items():
        if array_digest(np.asarray(_array(group, name)[rows])) != digest:
            yield name


def _array(group: zarr.Group, name: str) -> "zarr.Array[Any]":
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise TypeError(f"{name} is no array")
    return array
