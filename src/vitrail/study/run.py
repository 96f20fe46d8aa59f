"""`run_study`: measures of a model over many images, part by part, into a folder that can be resumed at any moment."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from vitrail.data import ImageSource, Manifest, open_images, scan, with_masks
from vitrail.errors import DataError, Unsupported, UsageError
from vitrail.measure import ROOMS, Measure, measures_named
from vitrail.study import rooms
from vitrail.study.batches import BatchRun, Loaded, loaded_batches
from vitrail.study.derived import image_xy
from vitrail.study.patterns import derive_patterns
from vitrail.study.plan import Part, Plan
from vitrail.study.planning import make_plan
from vitrail.study.progress import Progress
from vitrail.study.reopen import remember
from vitrail.study.store import open_study
from vitrail.study.writing import StudyFolder, locked, plan_of, refuse_foreign_folder
from vitrail.vit.open import Vit

__all__ = ["run_study"]


def run_study(
    vit: Vit,
    images: object,
    *,
    out: str | Path,
    measures: str | Sequence[str] = "heads",
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
    masks: str | Path | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Studies `measures` of `vit` over `images` (what `open_images` takes) and returns the study that `out` then holds.

    Goes on where an earlier run under the same plan ended, however it ended. The batch size is part of the plan, and
    the last batch is padded to it, so that no number depends on how many images follow. `options` are those of the
    rooms (`rooms.options_of_rooms`); `seed` is of the map of images. `masks` is a folder of
    PNGs of instance ids, named like the images, for measures that need objects. `progress` shows images a second and
    the time left.

    Raises `PlanMismatch` if `out` was begun with another plan, `StudyError` if it is no study, another process is
    writing it or the disk is full; `DataError` if images cannot be used or have changed since the study began;
    `Unsupported` if the model lacks what a measure asked for by name needs; `UsageError` for arguments without meaning.
    """
    folder = Path(out)
    if batch_size < 1:
        raise UsageError(f"A batch of {batch_size} images cannot be run; give 1 or more.")
    options = {**(options or {}), **({"masks": "given"} if masks is not None else {})}
    chosen, left_out = _chosen(vit, measures, options)
    refuse_foreign_folder(folder)
    source = open_images(images, class_names=vit.class_names, n_classes=vit.n_classes, limit=limit)
    with Progress(progress) as shown, locked(folder):
        manifest = scan(source, progress=shown.scanning)
        manifest = with_masks(manifest, masks) if masks is not None else manifest
        _refuse_unknown_labels(manifest, vit)
        plan = make_plan(
            vit, manifest, chosen, left_out=left_out, options=options,
            batch_size=batch_size, seed=seed, threads=torch.get_num_threads(),
        )  # fmt: skip
        held = plan_of(folder)
        plan = replace(plan, threads=held.threads) if held else plan
        study = StudyFolder(folder, plan, manifest)
        remember(folder, vit)
        with _threads(plan.threads), _resumable(study):
            _run_parts(vit, source, manifest, study, shown)
            _derive(study)
            derive_patterns(vit, source, manifest, study, shown)
    return open_study(folder)


def _chosen(
    vit: Vit, measures: str | Sequence[str], options: Mapping[str, str]
) -> tuple[list[Measure], dict[str, str]]:
    """The measures to compute, and those that this model does not have, with reasons."""
    asked = measures_named(measures)
    left_out = rooms.skipped(vit, [each.name for each in asked], options)
    if vit.n_classes is None:
        base = [each.name for each in asked if each.room == "base" and "classifier" in each.needs]
        left_out |= dict.fromkeys(base, "the model has no classifier, its output is a feature vector")
    by_name = measures.split(",") if isinstance(measures, str) else measures
    refused = [
        f"{name}: {left_out[name]}" for name in map(str.strip, by_name) if name in left_out and name not in ROOMS
    ]
    chosen = [each for each in asked if each.name not in left_out]
    if refused or all(each.room == "base" for each in chosen):
        told = refused or [f"{name}: {reason}" for name, reason in left_out.items()]
        raise Unsupported(f"{vit.name} cannot give what was asked for:\n  " + "\n  ".join(told))
    return chosen, left_out


def _refuse_unknown_labels(manifest: Manifest, vit: Vit) -> None:
    """A source that was opened for another model may carry labels that this one does not have."""
    highest = max((entry for entry in manifest.images), key=lambda entry: -1 if entry.label is None else entry.label)
    if highest.label is not None and vit.n_classes is not None and highest.label >= vit.n_classes:
        raise DataError(
            f"Image {highest.id} has label {highest.label}, and {vit.name} has {vit.n_classes} classes; open the "
            "images with this model's class names."
        )


def _run_parts(vit: Vit, source: ImageSource, manifest: Manifest, study: StudyFolder, shown: Progress) -> None:
    missing = study.missing
    if not missing:
        return
    run = BatchRun(vit, study.plan)
    size = study.plan.batch_size
    _survey(vit, source, manifest, study, run, shown)
    batches = [manifest.images[at : min(at + size, part.stop)] for part in missing for at in _starts(part, size)]
    shown.studying(study.plan.n_images - sum(len(batch) for batch in batches), study.plan.n_images)
    with loaded_batches(vit, source, batches) as loaded:
        for part in missing:
            study.write_part(part, _part_arrays(run, part, study.plan, loaded, shown))


def _survey(
    vit: Vit, source: ImageSource, manifest: Manifest, study: StudyFolder, run: BatchRun, shown: Progress
) -> None:
    """What collectors need to have seen of all images; made once, and kept for later runs of the same study."""
    if not run.surveys:
        return
    if not study.is_surveyed:
        size = study.plan.batch_size
        batches = [manifest.images[start : start + size] for start in range(0, study.plan.n_images, size)]
        shown.studying(0, study.plan.n_images, "surveying")
        with loaded_batches(vit, source, batches) as loaded:
            for batch in loaded:
                run.survey(batch)
                shown.advance(len(batch.entries))
        study.write_survey([collector.surveyed() for collector in run.surveys])
    for collector, arrays in zip(run.surveys, study.read_survey(), strict=True):
        collector.take_survey(arrays)


def _starts(part: Part, batch_size: int) -> range:
    return range(part.start, part.stop, batch_size)


def _part_arrays(
    run: BatchRun, part: Part, plan: Plan, loaded: Iterator[Loaded], shown: Progress
) -> dict[str, np.ndarray]:
    pieces: list[dict[str, np.ndarray]] = []
    for _ in _starts(part, plan.batch_size):
        batch = next(loaded)
        pieces.append(run(batch))
        shown.advance(len(batch.entries))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _derive(study: StudyFolder) -> None:
    if study.derived_is_missing and "head_probability" in study.plan.measures:
        table = open_study(study.folder)["head_probability"].values
        study.write_derived({"image_xy": image_xy(table, study.plan.seed)})


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
