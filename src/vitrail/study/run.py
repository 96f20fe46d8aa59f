"""`run_study`: measures of a model over many images, part by part, into a folder that can be resumed at any moment."""

import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
import xarray as xr

from vitrail.analysis import (
    BASE,
    Calibrates,
    SamplesImages,
    analyses,
    changed_options,
    declared_options,
    is_analysis,
    is_of_other_models,
    make_collectors,
    measures_named,
    split_names,
    unavailable,
)
from vitrail.analysis import measures as all_measures
from vitrail.arguments import whole_number
from vitrail.data import MAX_PIXELS, EarlierScan, ImageEntry, ImageSource, Manifest, open_images, scan, with_masks
from vitrail.data.files import some
from vitrail.errors import DamagedStudy, DataError, PlanMismatch, Unsupported, UsageError
from vitrail.measure import Measure
from vitrail.models.open import Vit, require_vit
from vitrail.models.preprocessing import Preprocessing
from vitrail.outputs import is_address, local_path
from vitrail.stats import require_seed
from vitrail.study.batches import BatchRun, LoadedBatch, StudyRun, load_batches
from vitrail.study.engines import ENGINES, work_on_ray
from vitrail.study.growth import arrange_images, measures_to_renew, merge_plans, starts_with
from vitrail.study.locking import POLL_S, Access
from vitrail.study.object_store import open_objects
from vitrail.study.ownership import refuse_foreign_folder, store_access, worker_access, write_access
from vitrail.study.plan import BATCH_SIZE, Part, Plan
from vitrail.study.planning import make_plan
from vitrail.study.progress import Progress
from vitrail.study.reopen import save_model_arguments
from vitrail.study.store import IMAGES, arrays_by_part, open_study, read_manifest
from vitrail.study.writing import StudyFolder, plan_of
from vitrail.tap.modes import plain_modes

__all__ = ["run_study"]


MOST_IN_A_BATCH = 2**40
"""Images in a pass, at most: more is a slip, and no number that torch takes as a size."""


@plain_modes()
def run_study(
    vit: Vit,
    images: object,
    *,
    out: str | Path,
    measures: str | Sequence[str] = "heads",
    limit: SupportsIndex | None = None,
    batch_size: SupportsIndex = BATCH_SIZE,
    seed: SupportsIndex = 0,
    options: Mapping[str, str] | None = None,
    masks: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: bool = False,
    worker: bool = False,
    allow_mixed: bool = False,
    part_images: SupportsIndex | None = None,
    engine: str = "local",
    n_workers: int = 1,
) -> xr.Dataset:
    """Measures a model over images and writes the study to a folder; goes on where an earlier run of it ended.

    No number depends on how many images follow: the batch size is part of the plan, and the last batch is padded to it.
    So a finished study grows: a run with other measures, a higher limit or more images adds what the folder lacks, and
    the arrays are then those of a study that was made at once. Images that are added come after those that are there.

    Args:
        vit: The model.
        images: Anything that `open_images` takes: a folder, a list of files, a dataset, `"photos"`.
        out: The folder of the study: new or empty, or a study that this run goes on with or adds to. Or its address in
            an object store, `s3://bucket/study` (with the extra `s3`), where every run is one of several workers.
        measures: Names of analyses or measures, comma-separated or in a sequence.
        limit: The first so many usable images.
        batch_size: Images in a pass.
        seed: Of the map of images.
        options: Of the analyses, by name (`vitrail.analysis.all_options`).
        masks: A folder of PNGs of instance ids, named like the images, for measures that need objects.
        max_pixels: Largest image that is decoded, rows x columns; larger ones are skipped and named.
        progress: Shows images a second and the time left.
        worker: Shares the work with other workers on the same folder, on this machine or others: each computes the
            parts that nobody else does, and returns when all are done. The bytes are those of one process.
        allow_mixed: Goes on with a study that was begun on another kind of device; numbers then agree up to rounding.
        part_images: About how many images make a part: what an interruption costs, and what a worker takes at a time
            (64 if nothing is said).
        engine: "local", or "ray", which starts workers on the machines of a cluster (with the extra `ray`).
        n_workers: How many workers the engine starts.

    Returns:
        The study, read lazily, as `open_study` returns it.

    Raises:
        PlanMismatch: `out` was begun with another plan, which differs in more than what a study can gain.
        StudyError: `out` is no study, another process is writing it, the disk is full, or a worker asks for more than
            those that are at work.
        DataError: Images cannot be used, or have changed since the study began.
        ModelError: The model answers the same images differently each time, or with NaN.
        Unsupported: The model lacks what a measure that was asked for by name needs.
        UsageError: An argument has no meaning, or a sample of so few images would say nothing.

    Example:
        >>> import vitrail
        >>> vit = vitrail.open_vit("vitrail:photos")
        >>> study = vitrail.run_study(vit, "vitrail:photos", out="study", limit=64)  # doctest: +SKIP
    """
    require_vit(vit)
    batch_size, seed = whole_number("batch_size", batch_size), require_seed(seed)
    limit = None if limit is None else whole_number("limit", limit)
    part_images = None if part_images is None else whole_number("part_images", part_images)
    if batch_size < 1:
        raise UsageError(f"A batch of {batch_size} images cannot be run; give 1 or more.")
    if batch_size > MOST_IN_A_BATCH:
        raise UsageError(f"A batch of {batch_size} images fits no machine; give {MOST_IN_A_BATCH:,} or fewer.")
    if part_images is not None and part_images < 1:
        raise UsageError(f"A part of {part_images} images cannot be made; give 1 or more.")
    if engine not in ENGINES:
        raise UsageError(f"There is no engine {engine!r}; choose from {', '.join(ENGINES)}.")
    if engine == "ray":
        arguments = {
            "out": out,
            "measures": measures,
            "limit": limit,
            "batch_size": batch_size,
            "seed": seed,
            "options": options,
            "masks": masks,
            "max_pixels": max_pixels,
            "allow_mixed": allow_mixed,
            "part_images": part_images,
        }
        work_on_ray(vit, images, n_workers, arguments)
        return open_study(out)
    if n_workers != 1:
        raise UsageError(
            f"{n_workers} workers were asked for, which only an engine starts: give --engine ray. Without it run the "
            "same command several times with --worker."
        )
    objects = open_objects(out) if is_address(out) else None
    folder = local_path(out) if objects is None else objects.folder
    options = changed_options({**(options or {}), **({"masks": "given"} if masks is not None else {})})
    selected, left_out = _select_measures(vit, measures, options)
    refuse_foreign_folder(folder)
    source = open_images(
        images,
        class_names=vit.class_names,
        n_classes=vit.n_classes,
        limit=limit,
        max_pixels=max_pixels,
        leave_out=[each for each in (folder, masks) if each is not None],
    )
    request = _Request(selected, left_out, options, batch_size, part_images, seed, masks, allow_mixed)
    with nullcontext() if objects is None else objects.errors(), Progress(progress) as bars, ExitStack() as held:
        if objects is not None:
            access: _Access = partial(store_access, objects, held)
        else:
            access = partial(worker_access, folder, held) if worker else partial(_alone, folder, held)
        study, manifest = _open_folder(vit, source, folder, request, bars, access)
        with _threads(study.plan.threads), _resumable(study):
            _run_parts(vit, source, manifest, study, bars)
            with study.access.one_at_a_time("derived"):
                if objects is not None:
                    objects.pull(values=True)
                study.list_arrays()
                _derive(StudyRun(vit, source, manifest, study, bars))
                study.remove_traces()
    return open_study(folder)


@dataclass(frozen=True)
class _Request:
    """What a run asks for, checked."""

    measures: Sequence[Measure]
    left_out: Mapping[str, str]
    options: Mapping[str, str]
    batch_size: int
    part_images: int | None
    seed: int
    masks: str | Path | None
    allow_mixed: bool


_Access = Callable[[], AbstractContextManager[Access]]
"""Gives the right to write a study; what it holds while the study is opened ends with the context."""


@contextmanager
def _alone(folder: Path, held: ExitStack) -> Iterator[Access]:
    """The right to write a folder that nobody else has until `held` is closed."""
    yield held.enter_context(write_access(folder))


def _open_folder(
    vit: Vit, source: ImageSource, folder: Path, request: _Request, bars: Progress, access_of_folder: _Access
) -> tuple[StudyFolder, Manifest]:
    """The folder, begun, gone on with, grown or joined."""
    with access_of_folder() as access:
        existing = plan_of(folder)
        manifest = _scan(vit, source, folder, request, bars)
        if existing is not None and not starts_with(manifest, existing):
            read = {each.id for each in manifest.images} | {each.id for each in manifest.skipped}
            unread = {item.id for item in source.items} - read if source.limit is not None else set()
            manifest = arrange_images(existing, read_manifest(folder), manifest, unread)
        plan = _plan(vit, manifest, request, existing)
        if existing is not None:
            _refuse_undeclared(folder, existing, plan)
        study = StudyFolder(folder, plan, manifest, access)
        if not access.others:
            with study.disk_errors("how the model was opened"):
                save_model_arguments(folder, vit)
    return study, manifest


def _scan(vit: Vit, source: ImageSource, folder: Path, request: _Request, bars: Progress) -> Manifest:
    preprocessing = vit.preprocessing.as_dict()
    manifest = scan(source, bars.scanning, preprocessing, _earlier_scan(folder, preprocessing))
    manifest = with_masks(manifest, request.masks) if request.masks is not None else manifest
    _refuse_unknown_labels(manifest, vit)
    return manifest


def _earlier_scan(folder: Path, preprocessing: Mapping[str, Any]) -> EarlierScan | None:
    """The scan that a study began with, if it has one of the same preprocessing that can be read."""
    plan = plan_of(folder)
    if plan is None or Preprocessing.from_dict(plan.preprocessing).as_dict() != preprocessing:
        return None
    try:
        return EarlierScan(read_manifest(folder), (folder / IMAGES).stat().st_mtime)
    except (DamagedStudy, OSError):
        return None  # every image is read again, and the list is then written anew


def _plan(vit: Vit, manifest: Manifest, request: _Request, existing: Plan | None) -> Plan:
    """The plan of a new study, or of one that has gained what is asked for."""
    declared = all_measures()
    earlier = [declared[name] for name in (existing.measures if existing else ()) if name in declared]
    plan = make_plan(
        vit,
        manifest,
        tuple({each.name: each for each in (*request.measures, *earlier)}.values()),
        left_out=request.left_out,
        options=request.options,
        batch_size=request.batch_size,
        part_images=request.part_images,
        seed=request.seed,
        threads=torch.get_num_threads(),
    )
    if existing is None:
        _refuse_few_images(vit, plan)
        return plan
    if request.allow_mixed:
        plan = replace(plan, device=existing.device, device_name=existing.device_name)
    names = [measure.name for measure in request.measures]
    plan = merge_plans(existing, plan, names)
    outdated = [name for name in measures_to_renew(existing, plan) if name not in names]
    if outdated:
        raise PlanMismatch(
            f"measures: the folder has an earlier version of {some(outdated, 3)}. Ask for it in --measures to have it "
            "measured anew for all images, or name another folder to begin anew."
        )
    _refuse_other_calibration(vit, existing, plan)
    if plan.measures != existing.measures:
        _refuse_few_images(vit, plan)
    return plan


def _select_measures(
    vit: Vit, measures: str | Sequence[str], options: Mapping[str, str]
) -> tuple[list[Measure], dict[str, str]]:
    """The measures to compute, and those that this model does not have, with reasons."""
    if not split_names(measures):
        raise UsageError("No measure was named; give analyses or measures, such as heads.")
    candidates = measures_named(measures)
    left_out = unavailable(vit, [each.name for each in candidates], options)
    by_name = [name for name in split_names(measures) if name in left_out and not is_analysis(name)]
    refused = [f"{name}: {left_out[name]}" for name in by_name]
    selected = [each for each in candidates if each.name not in left_out]
    left_out = {name: reason for name, reason in left_out.items() if name in by_name or not is_of_other_models(name)}
    if refused or all(each.analysis == BASE for each in selected):
        reasons = refused or [f"{name}: {reason}" for name, reason in left_out.items()]
        if not reasons:
            raise UsageError(f"Every study has {measures}; name what else is to be measured, such as heads.")
        raise Unsupported(f"{vit.name} cannot give what was asked for:\n  " + "\n  ".join(reasons))
    return selected, left_out


def _refuse_other_calibration(vit: Vit, existing: Plan, plan: Plan) -> None:
    """Refuses more images where the numbers of each image depend on all images."""
    if plan.n_images == existing.n_images:
        return
    declared = [name for name in existing.measures if name in all_measures()]
    collectors = make_collectors(vit, declared, declared_options(existing.options))
    names = [name for each in collectors if isinstance(each, Calibrates) for name in each.measures]
    if names:
        raise PlanMismatch(
            f"number of images: the folder has {existing.n_images}, this run {plan.n_images}; {some(names, 3)} are "
            "measured against means over all images of the study, so it cannot gain any. Name another folder to begin "
            "anew."
        )


def _refuse_undeclared(folder: Path, existing: Plan, plan: Plan) -> None:
    """Refuses to measure images of a study whose earlier images all have what nothing installed here can give.

    What only some of them have was not completed, and goes on missing.
    """
    names = [name for name in existing.measures if name not in all_measures()]
    written = list(arrays_by_part(folder, existing).values())
    is_complete = plan.n_images == existing.n_images and len(written) == len(existing.parts)
    lacking = [name for name in names if all(name in part for part in written)]
    if lacking and not is_complete:
        raise UsageError(
            f"{folder} holds {some(lacking, 3)}, which no analysis here declares, so images that lack it cannot be "
            "measured. Install or register the analysis that gives it."
        )


def _refuse_few_images(vit: Vit, plan: Plan) -> None:
    """Refuses a study of which a collector would measure too small a sample."""
    names = [name for name in plan.measures if name in all_measures()]
    for collector in make_collectors(vit, names, declared_options(plan.options)):
        if isinstance(collector, SamplesImages):
            collector.refuse_few(plan.n_images)


def _refuse_unknown_labels(manifest: Manifest, vit: Vit) -> None:
    """A source that was opened for another model may carry labels that this one does not have."""
    highest = max((entry for entry in manifest.images), key=lambda entry: -1 if entry.label is None else entry.label)
    if highest.label is not None and vit.n_classes is not None and highest.label >= vit.n_classes:
        raise DataError(
            f"Image {highest.id} has label {highest.label}, and {vit.name} has {vit.n_classes} classes; open the "
            "images with this model's class names."
        )


def _run_parts(vit: Vit, source: ImageSource, manifest: Manifest, study: StudyFolder, bars: Progress) -> None:
    """Computes what is missing; a worker goes on until nothing is, as another one may end before its part is done."""
    missing = study.missing
    if not missing:
        return
    run = BatchRun(vit, study.plan)
    size = study.plan.batch_size
    with load_batches(vit, source, [manifest.images[:size]]) as loaded:
        run.refuse_chance(next(loaded))
    with study.access.one_at_a_time("calibration"):
        _calibrate(vit, source, manifest, study, run, bars)
    bars.studying(study.plan.n_images - sum(part.stop - part.start for part in missing), study.plan.n_images)
    while missing:
        n_parts = _compute_parts(vit, source, manifest, study, run, bars)
        missing = study.missing
        if missing and n_parts == 0:
            time.sleep(POLL_S)


def _compute_parts(
    vit: Vit, source: ImageSource, manifest: Manifest, study: StudyFolder, run: BatchRun, bars: Progress
) -> int:
    """Computes every part that can be claimed; their number."""
    claimed: deque[Part] = deque()
    size, n_parts = study.plan.batch_size, 0

    def batches() -> Iterator[Sequence[ImageEntry]]:
        for part in study.claim_parts():
            claimed.append(part)
            for start in range(part.start, part.stop, size):
                yield manifest.images[start : min(start + size, part.stop)]

    with load_batches(vit, source, batches()) as loaded:
        for first in loaded:
            part = claimed.popleft()
            n_batches = -(-(part.stop - part.start) // size)
            study.write_part(
                part,
                _part_arrays(run, part, study.arrays_of(part), chain([first], islice(loaded, n_batches - 1)), bars),
            )
            n_parts += 1
    return n_parts


def _part_arrays(
    run: BatchRun, part: Part, existing: Container[str], batches: Iterable[LoadedBatch], bars: Progress
) -> dict[str, np.ndarray]:
    pieces: list[dict[str, np.ndarray]] = []
    place = part.start
    for batch in batches:
        pieces.append(run(batch, existing, place=place))
        place += len(batch.entries)
        bars.advance(len(batch.entries))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _calibrate(
    vit: Vit, source: ImageSource, manifest: Manifest, study: StudyFolder, run: BatchRun, bars: Progress
) -> None:
    """What collectors need to have seen of all images; made once, and kept for later runs of the same study."""
    if not run.calibrating:
        return
    collectors = [collector.measures for collector in run.calibrating]
    statistics = study.read_calibration(collectors)
    if statistics is None:
        size = study.plan.batch_size
        batches = [manifest.images[start : start + size] for start in range(0, study.plan.n_images, size)]
        bars.studying(0, study.plan.n_images, "calibrating")
        with load_batches(vit, source, batches) as loaded:
            for batch in loaded:
                run.calibrate(batch)
                bars.advance(len(batch.entries))
        study.write_calibration({each.measures: each.calibration_statistics() for each in run.calibrating})
        statistics = study.read_calibration(collectors)
    assert statistics is not None
    run.load_calibration(statistics)


def _derive(run: StudyRun) -> None:
    """What needs all images, of every analysis that has a measure in the plan."""
    for analysis in analyses().values():
        if analysis.derive is not None and set(analysis.measure_names) & set(run.folder.plan.measures):
            analysis.derive(run)


@contextmanager
def _threads(n_threads: int) -> Iterator[None]:
    """torch with so many threads: sums over threads depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _resumable(study: StudyFolder) -> Iterator[None]:
    """Tells whoever interrupts what is safe."""
    try:
        yield
    except KeyboardInterrupt as stop:
        n_parts = len(study.plan.parts)
        done = n_parts - len(study.missing)
        stop.add_note(f"{done} of {n_parts} parts are in {study.folder}; the same command goes on from there.")
        raise
