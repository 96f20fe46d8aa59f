"""The writing side of a study: what is on disk is complete or absent, whenever the process ends.

Order makes it so. The plan is written last when a folder is begun, arrays appear whole by one rename, and a part's file
in `parts/` is written after all of its values have reached the disk. What a killed run leaves half-written is removed
or overwritten with the same bytes by the next. No times and no random names stay, so equal plans give equal folders.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from zarr.codecs import ZstdCodec
from zarr.errors import ZarrUserWarning

from vitrail.analysis import declaration, measures
from vitrail.data import Manifest
from vitrail.data.files import sentence
from vitrail.errors import DamagedStudy, StudyError
from vitrail.study.growth import comparable_plan, measures_to_renew
from vitrail.study.locking import TAKING_OVER, Access, Leases, lock_files, remove_abandoned
from vitrail.study.ownership import (
    CALIBRATION,
    UNFINISHED,
    as_bytes,
    refuse_foreign_folder,
    remove_arrays,
    remove_unfinished,
    write_atomic,
)
from vitrail.study.plan import Part, Plan, differences, refuse_other_plan
from vitrail.study.store import (
    ARRAYS,
    DERIVED,
    FROM_ALL_PARTS,
    IMAGES,
    PARTS,
    PATTERNS,
    PLAN,
    UNREADABLE,
    array_digest,
    arrays_by_part,
    missing_parts,
    part_digests,
    part_file,
    read_plan,
    zarr_options,
)

__all__ = ["StudyFolder", "plan_of"]

Arrays = Mapping[str, np.ndarray]

WRITER = {"array.write_empty_chunks": True, "codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}
"""Every chunk is written, so that an absent one is always a lost one; zarrs would leave out those of zeros."""

CALIBRATED_MEASURES = "measures"
"""Beside the statistics of collectors, which measures each of them has, as JSON."""

ARRAY_METADATA = "zarr.json"
"""What zarr names the file that makes a folder an array or a group."""


def plan_of(folder: Path) -> Plan | None:
    """The plan that a folder was begun with.

    Args:
        folder: A study, or any other folder.

    Returns:
        The plan; None where there is none.

    Raises:
        StudyError: The plan cannot be read.
    """
    return read_plan(folder) if (folder / PLAN).is_file() else None


class StudyFolder:
    """A study being written. Make one inside `write_access`.

    Args:
        folder: Where it is, or will be.
        plan: Its plan; of a folder that has one, the same or one that adds to it (`growth.merge_plans`).
        manifest: Its images.
        access: How this process may write it; alone, if nothing is said.

    Raises:
        PlanMismatch: The folder has another plan.
        StudyError: This run would add something while others are at work on the folder.
    """

    def __init__(self, folder: Path, plan: Plan, manifest: Manifest, access: Access | None = None) -> None:
        self.folder, self.plan, self.access = folder, plan, access or Access()
        self._group: zarr.Group | None = None
        existing = plan_of(folder)
        if existing is not None:
            refuse_other_plan(str(folder), existing, comparable_plan(plan, manifest, existing))
            (folder / PARTS).mkdir(exist_ok=True)  # of a study in an object store there is none before the first part
        if self.access.others:
            self._refuse_to_grow(existing)
            return
        remove_unfinished(folder)
        with self.disk_errors("the plan"):
            if existing is None:
                self._begin(manifest)
            elif differences(existing, plan) or plan.model != existing.model:  # it lies elsewhere by now
                self._grow(existing, manifest)
            elif not _holds(folder / IMAGES, manifest.to_json()):
                write_atomic(folder / IMAGES, manifest.to_json())  # the same images, which lie elsewhere by now
            self._fit_arrays()

    def _refuse_to_grow(self, existing: Plan | None) -> None:
        """Others work on the plan that the folder has: it must stay as it is."""
        if existing is None or differences(existing, self.plan):
            phrases = differences(existing, self.plan) if existing else ["the folder has no plan"]
            raise StudyError(
                f"Workers are at work on {self.folder}, and this run asks for more than they do "
                f"({'; '.join(phrases[:3])}). Wait until they have ended, or ask for the same."
            )

    def _begin(self, manifest: Manifest) -> None:
        refuse_foreign_folder(self.folder)
        (self.folder / PARTS).mkdir(exist_ok=True)
        write_atomic(self.folder / IMAGES, manifest.to_json())
        write_atomic(self.folder / PLAN, self.plan.to_json())

    def _grow(self, existing: Plan, manifest: Manifest) -> None:
        """Takes away what more images or measures make out of date, then puts the new plan in place of the old.

        Ended at any moment, the folder is a study of the old plan that lacks some of its results, or one of the new.
        """
        outdated = measures_to_renew(existing, self.plan)
        if self.plan.n_images > existing.n_images or outdated:
            for name in FROM_ALL_PARTS:
                part_file(self.folder, name).unlink(missing_ok=True)
            for model in (self.folder / PATTERNS).glob("*.safetensors"):
                model.unlink()
        if outdated:
            self._take_back(outdated)
        if self.plan.n_images > existing.n_images:
            last = existing.parts[-1]
            if last.stop - last.start < existing.part_size:
                part_file(self.folder, last.number).unlink(missing_ok=True)
            write_atomic(self.folder / IMAGES, manifest.to_json())
        if any(_is_derived(name) for name in self.plan.measures.keys() - existing.measures.keys()):
            part_file(self.folder, PATTERNS).unlink(missing_ok=True)
        write_atomic(self.folder / PLAN, self.plan.to_json())

    def _take_back(self, names: Sequence[str]) -> None:
        """Removes the values of some measures, which may have another shape in their later version."""
        (self.folder / CALIBRATION).unlink(missing_ok=True)
        for part in self.plan.parts:
            written = self._digests_on_disk(part.number)
            if written:
                self._mark(part.number, {name: digest for name, digest in written.items() if name not in names})
        for name in names:
            remove_arrays(self.folder / ARRAYS / name)

    def _remove_unfinished_upload(self) -> None:
        """Removes arrays without their group, of a worker that was ended while it uploaded the first of them."""
        is_complete = (self.folder / ARRAYS / ARRAY_METADATA).is_file() or any((self.folder / PARTS).glob("*.json"))
        if self.access.mirror is not None and not is_complete:
            remove_arrays(self.folder / ARRAYS)

    def list_arrays(self) -> None:
        """Makes the group list all of its arrays, which a worker that was ended may not have come to.

        Raises:
            DamagedStudy: The arrays cannot be read.
        """
        if self.access.leases is not None:
            with self.disk_errors("the list of arrays"):
                self._fit_arrays()

    def _fit_arrays(self) -> None:
        """Gives arrays of a study that has gained images their new length, and the group's list of them what is there.

        Arrays with shorter chunks than the plan's parts are of a study that was shorter than one part, and the map of
        the images is one chunk: these are made anew when they are written.
        """
        path = self.folder / ARRAYS
        self._remove_unfinished_upload()
        if not path.is_dir():
            return
        try:
            group = zarr.open_group(path, mode="r+", use_consolidated=False)
            names = sorted(each.parent.name for each in path.glob(f"*/{ARRAY_METADATA}"))
            arrays = {name: _array(group, name) for name in names}
            listed = json.loads((path / ARRAY_METADATA).read_bytes())["consolidated_metadata"]["metadata"]
            listed_shapes = {name: each["shape"] for name, each in listed.items()}
        except UNREADABLE as error:
            raise DamagedStudy(f"{path} cannot be read: {sentence(error)}. Restore it from a copy.") from error
        for name, array in arrays.items():
            if array.shape[0] == self.plan.n_images:
                continue
            if name in DERIVED or array.chunks[0] != self.plan.part_size:
                remove_arrays(path / name)
            else:
                array.resize((self.plan.n_images, *array.shape[1:]))
        present = [name for name in names if (path / name / ARRAY_METADATA).is_file()]
        if listed_shapes != {name: list(arrays[name].shape) for name in present}:
            _consolidate(path)

    @property
    def missing(self) -> list[Part]:
        """Parts that lack something."""
        self._refresh()
        return missing_parts(self.folder, self.plan)

    def arrays_of(self, part: Part) -> frozenset[str]:
        """The names of the arrays that are written of a part.

        Args:
            part: The part.

        Returns:
            Names; none for a part that is still to come.
        """
        return arrays_by_part(self.folder, self.plan, [part]).get(part.number, frozenset())

    def claim_parts(self) -> Iterator[Part]:
        """The parts that this process is to compute; a worker takes a lease of each, which `write_part` gives back.

        Yields:
            Missing parts in order; of a worker, without those that others compute at the moment.
        """
        leases = self.access.leases
        for part in self.missing:
            if leases is None:
                yield part
            elif missing_parts(self.folder, self.plan, [part]) and leases.acquire(_lease_name(part)):
                self._refresh()
                if missing_parts(self.folder, self.plan, [part]):
                    yield part
                else:  # written between the two looks
                    leases.release(_lease_name(part))

    def _refresh(self) -> None:
        """Looks at what other workers have completed elsewhere."""
        if self.access.mirror is not None:
            self.access.mirror.pull_parts()

    def remove_traces(self) -> None:
        """Removes what processes that were killed have left, once nothing is missing."""
        if self.missing:
            return
        remove_unfinished(self.folder)
        remove_abandoned(path for path in lock_files(self.folder) if TAKING_OVER in path.name)
        (self.access.leases or Leases(self.folder)).sweep()

    def write_part(self, part: Part, arrays: Arrays) -> None:
        """Stores arrays of one part: values first, then the file that says they are complete.

        Args:
            part: Whose they are.
            arrays: Some or all arrays of the part, by name; others that are there already stay.

        Raises:
            StudyError: The disk does not take them; the folder can then be resumed.
        """
        if self.access.lock is not None and self.access.lock.is_lost:
            raise StudyError(
                f"This process did not run for a while, and another has begun to write {self.folder}. What was written "
                "is safe; end the other, or let it finish."
            )
        with self.disk_errors(f"part {part.number}"):
            written = self._digests_on_disk(part.number)
            others = {name: digest for name, digest in written.items() if name not in arrays}
            if len(others) < len(written):  # while values are overwritten, nothing may say that they are complete
                self._mark(part.number, others)
                if self.access.mirror is not None:
                    self.access.mirror.push_changes()
            self._write(part.number, slice(part.start, part.stop), arrays, others)
        if self.access.mirror is not None:
            self.access.mirror.push(self._keys_of(part, arrays))
        if self.access.leases is not None:
            self.access.leases.release(_lease_name(part))

    def _keys_of(self, part: Part, names: Iterable[str]) -> list[str]:
        """The files of some arrays of a part, by their place in the folder, and last that which says what there is."""
        chunks = [self.folder / ARRAYS / name / "c" / str(part.number) for name in names]
        files = [each for chunk in chunks for each in _files(chunk)]
        return [each.relative_to(self.folder).as_posix() for each in (*files, part_file(self.folder, part.number))]

    def write_derived(self, arrays: Arrays) -> None:
        """Stores the arrays that need all images.

        Args:
            arrays: By name.

        Raises:
            StudyError: The disk does not take them; the folder can then be resumed.
        """
        with self.disk_errors("what is derived from all parts"):
            self._write("derived", slice(None), arrays, {})

    @property
    def derived_is_missing(self) -> bool:
        """The arrays that need all images are still to be computed."""
        return not part_file(self.folder, "derived").is_file()

    @property
    def patterns_are_missing(self) -> bool:
        """The arrays of attention patterns are still to be computed."""
        return not part_file(self.folder, PATTERNS).is_file()

    def pattern_model_file(self, kind: str) -> Path:
        """The path of the fitted model of a kind of pattern, whether it is there or not.

        Args:
            kind: "patch" or "cls".

        Returns:
            A path in the study.
        """
        return self.folder / PATTERNS / f"{kind}.safetensors"

    def write_pattern_model(self, kind: str, content: bytes) -> None:
        """Stores a fitted model whole, so that it need not be fitted again.

        Args:
            kind: "patch" or "cls".
            content: Of the file.

        Raises:
            StudyError: The disk does not take it; the folder can then be resumed.
        """
        with self.disk_errors(f"the model of {kind} patterns"):
            (self.folder / PATTERNS).mkdir(exist_ok=True)
            write_atomic(self.pattern_model_file(kind), content)

    def write_patterns(self, arrays: Arrays, about: Mapping[str, Any]) -> None:
        """Stores the arrays of attention patterns, whose sizes are known only once all images have been seen.

        Args:
            arrays: By name.
            about: Attributes of the group.

        Raises:
            StudyError: The disk does not take them; the folder can then be resumed.
        """
        with self.disk_errors("the attention patterns"):
            target = self.folder / PATTERNS / ARRAYS
            remove_arrays(target)  # of a run that was ended before it could say that they are complete
            unfinished = target.with_name(ARRAYS + UNFINISHED)
            group = zarr.create_group(unfinished, zarr_format=3, attributes=dict(about))
            for key, values in arrays.items():
                _create_array(group, key, values.shape, len(values), values.dtype)
                with zarr_options(WRITER):
                    array = _array(group, key)
                array[...] = values
            _consolidate(unfinished)
            _to_disk(unfinished)
            unfinished.rename(target)
            self._mark(PATTERNS, _digests(arrays))

    def write_calibration(self, statistics: Mapping[tuple[str, ...], Arrays]) -> None:
        """Stores the calibration statistics of all collectors, whole or not at all, with one digest.

        Args:
            statistics: Arrays by name, by the measures of each collector.

        Raises:
            StudyError: The disk does not take them; the folder can then be resumed.
        """
        names = np.frombuffer(json.dumps([*statistics]).encode(), np.uint8)
        by_number = enumerate(statistics.values())
        arrays = {f"{number}/{name}": values for number, each in by_number for name, values in each.items()}
        arrays[CALIBRATED_MEASURES] = names
        with self.disk_errors("the calibration statistics"):
            write_atomic(self.folder / CALIBRATION, save(arrays, metadata={"digest": _joint_digest(arrays)}))

    def read_calibration(self, collectors: Sequence[tuple[str, ...]]) -> list[dict[str, np.ndarray]] | None:
        """Reads the calibration statistics of all collectors.

        Args:
            collectors: The measures of each that needs some.

        Returns:
            Arrays by name, of each collector; None where there are none, or those of other collectors. Files of earlier
            versions, which do not say of which they are, count as theirs where they have as many.

        Raises:
            DamagedStudy: The file is not what was written.
        """
        path = self.folder / CALIBRATION
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                digest = (file.metadata() or {}).get("digest")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DamagedStudy(f"{path} cannot be read: {error}. Delete it and run the same command again.") from error
        if _joint_digest(arrays) != digest:
            raise DamagedStudy(f"{path} is not what was written. Delete it and run the same command again.")
        names = arrays.pop(CALIBRATED_MEASURES, None)
        statistics: list[dict[str, np.ndarray]] = [{} for _ in collectors]
        numbers = {int(key.partition("/")[0]) for key in arrays}
        is_theirs = (
            json.loads(names.tobytes()) == [[*each] for each in collectors]
            if names is not None
            else numbers == set(range(len(collectors)))
        )
        if not is_theirs:
            return None
        for key, values in sorted(arrays.items()):
            number, _, name = key.partition("/")
            statistics[int(number)][name] = values
        return statistics

    @contextmanager
    def disk_errors(self, what: str) -> Iterator[None]:
        """Says what to do where the disk does not take something.

        Args:
            what: What is written, as the message names it.

        Yields:
            Nothing.

        Raises:
            StudyError: The disk does not take it; the folder can then be resumed.
        """
        try:
            yield
        except OSError as error:
            done = len(self.plan.parts) - len(self.missing)
            raise StudyError(
                f"{what} could not be written to {self.folder}: {error.strerror or error}. {done} of "
                f"{len(self.plan.parts)} parts are complete; make room and run the same command again."
            ) from error

    def _write(self, name: int | str, rows: slice, arrays: Arrays, others: Mapping[str, str]) -> None:
        """Writes rows of arrays; `others` are the digests of what is written of the same part already."""
        group = self._arrays(arrays)
        for key, values in arrays.items():
            with zarr_options(WRITER):
                array = _array(group, key)
            assert values.shape[1:] == array.shape[1:], f"{key} has shape {values.shape}, the study {array.shape}"
            assert values.dtype == array.dtype, f"{key} is {values.dtype}, the study {array.dtype}"
            array[rows] = values
            chunk = 0 if isinstance(name, str) else name
            _to_disk(self.folder / ARRAYS / key / "c" / str(chunk))
        self._mark(name, {**others, **_digests(arrays)})

    def _digests_on_disk(self, number: int) -> dict[str, str]:
        """The digests of what is written of a part."""
        return part_digests(self.folder, number) if part_file(self.folder, number).is_file() else {}

    def _mark(self, name: int | str, digests: Mapping[str, str]) -> None:
        """Says which arrays of a part are complete."""
        if digests:
            ordered = dict(sorted(digests.items()))
            write_atomic(part_file(self.folder, name), json.dumps({"digests": ordered}, indent=1) + "\n")
        else:
            part_file(self.folder, name).unlink()

    def _arrays(self, arrays: Arrays) -> zarr.Group:
        """The group of all arrays, in which those that are to be written exist."""
        if self._lacking(arrays):
            with self.access.one_at_a_time("arrays"):
                self._remove_unfinished_upload()
                lacking = self._lacking(arrays)  # others may have made them meanwhile
                if lacking and not (self.folder / ARRAYS).is_dir():
                    self._create(lacking)
                elif lacking:
                    self._add(lacking)
        if self._group is None:
            self._group = zarr.open_group(self.folder / ARRAYS, mode="r+", use_consolidated=False)
        return self._group

    def _lacking(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Those of the arrays that do not exist."""
        path = self.folder / ARRAYS
        return {name: values for name, values in arrays.items() if not (path / name / ARRAY_METADATA).is_file()}

    def _create(self, arrays: Arrays) -> None:
        """All arrays in their full size, unfinished beside their target and moved there as one."""
        unfinished = self._new_arrays(arrays)
        _consolidate(unfinished)
        unfinished.rename(self.folder / ARRAYS)

    def _add(self, arrays: Arrays) -> None:
        """More arrays in a group that exists; each appears whole by a rename."""
        unfinished = self._new_arrays(arrays)
        for name in arrays:
            remove_arrays(self.folder / ARRAYS / name)  # what is left of one that was being removed
            (unfinished / name).rename(self.folder / ARRAYS / name)
        _consolidate(self.folder / ARRAYS)
        remove_arrays(unfinished)

    def _new_arrays(self, arrays: Arrays) -> Path:
        unfinished = self.folder / (ARRAYS + UNFINISHED)
        remove_arrays(unfinished)
        group = zarr.create_group(unfinished, zarr_format=3)
        for name, values in arrays.items():
            n_rows = self.plan.n_images if name in DERIVED else self.plan.part_size
            _create_array(group, name, (self.plan.n_images, *values.shape[1:]), n_rows, values.dtype)
        return unfinished


def _holds(file: Path, content: str) -> bool:
    """Whether a file has this content; one that is lost or cannot be read has not, and is written anew."""
    try:
        return file.read_bytes() == as_bytes(content)
    except OSError:
        return False


def _lease_name(part: Part) -> str:
    return f"{part.number:05d}"


def _is_derived(name: str) -> bool:
    """Whether a measure is one of `patterns/`, fitted to all images."""
    return name in measures() and measures()[name].derived


def _digests(arrays: Arrays) -> dict[str, str]:
    return {name: array_digest(values) for name, values in arrays.items()}


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
    measure = declaration(key)
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
    for file in _files(path):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def _files(path: Path) -> list[Path]:
    """A file itself, or every file below a folder."""
    return [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
