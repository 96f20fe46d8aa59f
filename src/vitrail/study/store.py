"""The reading side of a study: a folder with a plan, a list of images and named arrays. No torch here.

study.json        the plan
images.json       the images in order, and the files that were skipped, with reasons
arrays.zarr/      one array per measure, first dimension `image`, chunked along it by part
parts/00012.json  part 12 is complete; the digest of each of its arrays
parts/derived.json  the same of the arrays that need all images
patterns/           the fitted models of attention patterns, and arrays.zarr with what they say of every head
parts/patterns.json  the same of these arrays
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
import zarr

from vitrail.data import Manifest
from vitrail.errors import DamagedStudy, StudyError
from vitrail.measure import MEASURES, Measure
from vitrail.study.plan import Part, Plan

__all__ = [
    "ARRAYS",
    "DERIVED",
    "IMAGES",
    "PARTS",
    "PATTERNS",
    "PLAN",
    "array_digest",
    "declared",
    "missing_parts",
    "open_study",
    "part_file",
    "read_manifest",
    "read_plan",
    "verify",
]

PLAN, IMAGES, ARRAYS, PARTS = "study.json", "images.json", "arrays.zarr", "parts"

THUMBNAIL_PX = 64
N_TOP = 5

ACCOMPANYING = {
    measure.name: measure
    for measure in (
        Measure(
            "thumbnail", "thumbnail", ("image", "row", "column", "channel"), "8-bit RGB", "", "",
            f"what the model sees, resized to at most {THUMBNAIL_PX} px", "For looking at only.", "base", dtype="uint8",
        ),
        Measure(
            "top_class", f"the {N_TOP} most probable classes", ("image", "class"), "class", "", "",
            "order of the logits, nothing pruned", "Ties go to the first class.", "base",
            frozenset({"classifier"}), "int32",
        ),
        Measure(
            "top_probability", f"probabilities of the {N_TOP} most probable classes", ("image", "class"), "1", "", "",
            "softmax of the logits, nothing pruned", "Softmax probabilities are seldom calibrated.", "base",
            frozenset({"classifier"}),
        ),
        Measure(
            "image_xy", "map of the images", ("image", "xy"), "layout units", "", "",
            "t-SNE of each image's head_probability over all heads (below 5 images: principal components)",
            "Near means alike; distances between far groups and sizes of groups mean nothing.", "base",
            frozenset({"classifier"}),
        ),
        Measure(
            "patch_cluster_map", "mean map of a cluster", ("cluster", "query", "key"), "mean attention weight", "", "",
            "mean over all heads in the cluster, on the common grid of patches", "A mean: no head need look like it.",
            "patterns", frozenset({"grid"}),
        ),
        Measure(
            "cls_cluster_map", "mean class row and column of a cluster", ("cls_cluster", "cell"),
            "mean attention weight", "", "", "mean over all heads in the cluster: what the class token gives to each "
            "token, then what each other token gives to it", "A mean: no head need look like it.", "patterns",
            frozenset({"grid", "class_token"}),
        ),
    )
}  # fmt: skip
"""Arrays beside the measures: the store writes them of itself."""

DERIVED = ("image_xy",)
"""Arrays that need all images, computed after the last part."""


PATTERNS = "patterns"
"""The folder of the fitted patterns, and the name of their part."""


FROM_ALL_PARTS = ("derived", PATTERNS)
"""Parts that are made of all others."""


def declared(name: str) -> Measure:
    """The declaration of any array of a study."""
    return MEASURES[name] if name in MEASURES else ACCOMPANYING[name]


def open_study(path: str | Path, *, partial: bool = False) -> xr.Dataset:
    """The study as a dataset, read lazily: arrays with title, unit, low, high, source, limits; the plan in `attrs`.

    The coordinate `image` holds the ids. `partial=True` opens a study that is not finished, without the images that are
    still missing; `attrs["missing_images"]` counts them. Raises `StudyError` if the folder is no study or not finished.
    """
    folder = Path(path)
    plan = read_plan(folder)
    missing = missing_parts(folder, plan)
    if missing and not partial:
        raise StudyError(_unfinished(folder, plan, missing) + " Or open what is there with partial=True.")
    if len(missing) == len(plan.parts):
        raise StudyError(_unfinished(folder, plan, missing))
    ids = [entry.id for entry in read_manifest(folder).images]
    if len(ids) != plan.n_images:
        raise DamagedStudy(f"{folder / IMAGES} lists {len(ids)} images, and the plan has {plan.n_images}.")
    dataset = _arrays(folder / ARRAYS).assign_coords(image=np.asarray(ids, dtype=np.str_))
    about = {}
    if not missing and part_file(folder, PATTERNS).is_file():
        patterns = _arrays(folder / PATTERNS / ARRAYS)
        about, dataset = {PATTERNS: patterns.attrs}, dataset.assign(patterns.data_vars)
    n_missing = sum(part.stop - part.start for part in missing)
    if missing:
        there = np.concatenate([np.arange(part.start, part.stop) for part in plan.parts if part not in missing])
        dataset = dataset.drop_vars(DERIVED, errors="ignore").isel(image=there)
    return dataset.assign_attrs({**json.loads(plan.to_json()), "missing_images": n_missing, **about})


def _unfinished(folder: Path, plan: Plan, missing: Sequence[Part]) -> str:
    done = len(plan.parts) - len(missing)
    return f"{folder} has {done} of {len(plan.parts)} parts; run the same `vitrail study` command again to finish it."


def _arrays(path: Path) -> xr.Dataset:
    try:
        found: xr.Dataset = xr.open_zarr(path, chunks=None, consolidated=True)
    except (OSError, ValueError, KeyError) as error:
        raise DamagedStudy(f"{path} cannot be opened: {error}. {_redo(path)}") from error
    return found


def _redo(path: Path) -> str:
    """What to delete so that these arrays are made again."""
    of_patterns = path.parent.name == PATTERNS
    mark = part_file(path.parents[1], PATTERNS) if of_patterns else path.parent / PARTS
    return f"Delete {path} and {mark} and run the same `vitrail study` command again."


def read_plan(path: str | Path) -> Plan:
    """The plan of a study. Raises `StudyError` if the folder is no study."""
    file = Path(path) / PLAN
    if not file.is_file():
        raise StudyError(
            f"{path} is not a study: it has no {PLAN}. A study is made by `vitrail study MODEL IMAGES --out`."
        )
    return Plan.from_json(file.read_text(encoding="utf-8"))


def read_manifest(path: str | Path) -> Manifest:
    """The images of a study, in order, and what was skipped. Raises `DamagedStudy` if the list cannot be read."""
    file = Path(path) / IMAGES
    try:
        return Manifest.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedStudy(f"{file}, the list of the study's images, cannot be read: {error!r}.") from error


def part_file(folder: Path, name: int | str) -> Path:
    """Where the completion of a part is written, `name` being its number or "derived"."""
    return folder / PARTS / (f"{name:05d}.json" if isinstance(name, int) else f"{name}.json")


def missing_parts(folder: Path, plan: Plan) -> list[Part]:
    """The parts that are not complete."""
    return [part for part in plan.parts if not part_file(folder, part.number).is_file()]


def array_digest(values: np.ndarray) -> str:
    """Of dtype, shape and every value; NaNs count by their bits."""
    header = f"{values.dtype.str} {values.shape} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(values).tobytes()).hexdigest()


def verify(path: str | Path, *, repair: bool = False) -> int:
    """Reads every complete part back and compares it with the digests written beside it; the number of parts read.

    Raises `DamagedStudy` that names the damaged parts. With `repair` they are marked as missing instead, so that the
    same `vitrail study` command computes them again; the number is then of the sound parts. Raises `StudyError` if the
    folder is no study.
    """
    folder = Path(path)
    plan = read_plan(folder)
    _verify_images(folder, plan)
    complete = [part for part in plan.parts if part_file(folder, part.number).is_file()]
    ranges: dict[int | str, slice] = {part.number: slice(part.start, part.stop) for part in complete}
    ranges |= {name: slice(None) for name in FROM_ALL_PARTS if part_file(folder, name).is_file()}
    damaged = {name: reason for name, rows in ranges.items() if (reason := _damage(folder, name, rows))}
    if damaged and not repair:
        told = "\n  ".join(f"{part_file(folder, name)}: {reason}" for name, reason in damaged.items())
        raise DamagedStudy(
            f"{len(damaged)} of {len(ranges)} parts do not read back as they were written:\n  {told}\n"
            "Delete these files (`--repair` does it) and run the same `vitrail study` command again."
        )
    for name in damaged:
        part_file(folder, name).unlink()
    for name in FROM_ALL_PARTS if damaged else ():
        part_file(folder, name).unlink(missing_ok=True)
    return len(complete) - sum(name not in FROM_ALL_PARTS for name in damaged)


def _verify_images(folder: Path, plan: Plan) -> None:
    manifest = read_manifest(folder)
    if manifest.digest != plan.data_digest:
        raise DamagedStudy(f"{folder / IMAGES} is not the list that the study was begun with; restore it from a copy.")


def _damage(folder: Path, name: int | str, rows: slice) -> str | None:
    """What is wrong with a part, or None."""
    try:
        digests = json.loads(part_file(folder, name).read_text(encoding="utf-8"))["digests"]
        path = folder / PATTERNS / ARRAYS if name == PATTERNS else folder / ARRAYS
        group = zarr.open_group(path, mode="r", use_consolidated=False)
        wrong = list(_wrong_arrays(group, digests, rows))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # what zarr and its codecs raise
        return f"cannot be read: {error}"
    return f"other values in {', '.join(wrong)}" if wrong else None


def _wrong_arrays(group: zarr.Group, digests: Mapping[str, str], rows: slice) -> Iterator[str]:
    for name, digest in digests.items():
        array = group[name]
        if not isinstance(array, zarr.Array) or array_digest(np.asarray(array[rows])) != digest:
            yield name
