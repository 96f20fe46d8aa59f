"""One batch of a study: images loaded ahead in a thread, one recorded pass, and what the collectors make of it."""

import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from PIL import Image
from torch import Tensor

from vitrail.analysis import (
    BASE,
    Calibrates,
    Collector,
    SamplesImages,
    TakesMasks,
    declaration,
    declared_options,
    make_collectors,
    measures,
)
from vitrail.contract.outlook import reason_of_chance
from vitrail.data import ImageEntry, ImageSource, Manifest, ids_of, load_image, load_mask
from vitrail.errors import ModelError
from vitrail.models.objects import in_view, object_shares
from vitrail.models.open import Vit
from vitrail.models.task import Task
from vitrail.models.token_grid import pad_patches
from vitrail.study.plan import N_TOP, THUMBNAIL_PX, Plan
from vitrail.study.progress import Progress
from vitrail.study.writing import StudyFolder
from vitrail.tap.budget import budget_of, halve
from vitrail.tap.tap import Readers

__all__ = ["BatchRun", "LoadedBatch", "StudyRun", "load_batches", "view_with_mask"]

Arrays = dict[str, np.ndarray]

CPU_MEMORY = "DefaultCPUAllocator"
"""In torch's message where the memory of this computer does not suffice, which is a plain `RuntimeError`."""

DEVICE_ERRORS = ("CUDA error", "HIP error")
"""How torch's messages begin when a device has failed or is gone."""


@dataclass(frozen=True, eq=False)
class StudyRun:
    """A study that is being computed, as `Analysis.derive` receives it.

    Attributes:
        vit: The model.
        source: What loads the images.
        manifest: The images, in order.
        folder: What writes the study.
        progress: What is said meanwhile.
    """

    vit: Vit
    source: ImageSource
    manifest: Manifest
    folder: StudyFolder
    progress: Progress


@dataclass(frozen=True)
class LoadedBatch:
    """Images of a batch, ready for the model.

    Attributes:
        entries: What the manifest says of them.
        prepared: What goes into the model.
        thumbnails: What the model sees, small; uint8.
        masks: Instance ids as the model sees the image; None where it has no mask.
    """

    entries: Sequence[ImageEntry]
    prepared: Float[Tensor, "image channel row column"]
    thumbnails: UInt8[np.ndarray, "image thumb_row thumb_column colour"]
    masks: Sequence[Int64[np.ndarray, "_ _"] | None]


@contextmanager
def load_batches(
    vit: Vit, source: ImageSource, batches: Iterable[Sequence[ImageEntry]]
) -> Iterator[Iterator[LoadedBatch]]:
    """The batches in order, each decoded in a thread while the one before it is studied.

    Args:
        vit: Whose preprocessing prepares them.
        source: What the entries are of.
        batches: Entries of each batch; asked for one batch ahead.

    Yields:
        The batches.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        yield _one_ahead(vit, source, batches, thread)


def _one_ahead(
    vit: Vit, source: ImageSource, batches: Iterable[Sequence[ImageEntry]], thread: ThreadPoolExecutor
) -> Iterator[LoadedBatch]:
    coming: Future[LoadedBatch] | None = None
    for entries in batches:
        loaded = None if coming is None else coming.result()
        coming = thread.submit(_load, vit, source, entries)
        if loaded is not None:
            yield loaded
    if coming is not None:
        yield coming.result()


def _load(vit: Vit, source: ImageSource, entries: Sequence[ImageEntry]) -> LoadedBatch:
    views, masks = zip(*(view_with_mask(vit, source, entry) for entry in entries), strict=True)
    thumbnails = np.stack([_thumbnail(view) for view in views])
    return LoadedBatch(entries, vit.prepare_views(views), thumbnails, masks)


def view_with_mask(
    vit: Vit, source: ImageSource, entry: ImageEntry
) -> tuple[Image.Image, Int64[np.ndarray, "row column"] | None]:
    """What the model sees of a photograph, which may take 240 MB itself and is gone before the next is decoded.

    Args:
        vit: The model.
        source: Where the photograph lies.
        entry: The photograph; it knows its mask if `vitrail.data.with_masks` made the manifest.

    Returns:
        The view, and the instance ids of its pixels; None where the photograph has no mask.

    Raises:
        DataError: The mask has changed, or is not as large as the photograph.
    """
    image = load_image(source, entry)
    return vit.view(image), _mask_in_view(entry, image, vit)


def _mask_in_view(entry: ImageEntry, image: Image.Image, vit: Vit) -> Int64[np.ndarray, "_ _"] | None:
    mask = load_mask(entry)
    if mask is None:
        return None
    # its size again: an earlier version's list does not have the sides of images
    return in_view(ids_of(mask, image.size, f"The mask {entry.mask}"), vit.preprocessing)


def _thumbnail(view: Image.Image) -> UInt8[np.ndarray, "row column channel"]:
    small = view.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return np.asarray(small, dtype=np.uint8)


class BatchRun:
    """Runs batches of one study through its model; call it with one batch after the other.

    Args:
        vit: The model.
        plan: Of the study; every measure in it that an analysis here declares is the business of one collector.
    """

    def __init__(self, vit: Vit, plan: Plan) -> None:
        self._vit, self._plan, self._tap = vit, plan, vit.tap()
        declared = measures()
        self._names = [name for name in plan.measures if name in declared]
        self._options = declared_options(plan.options)
        self._collectors = make_collectors(vit, self._names, self._options)
        self._calibration: Sequence[Mapping[str, np.ndarray]] = ()
        self._first_block = vit.anatomy.blocks[0]
        self._base = frozenset(name for name in self._names if declared[name].analysis == BASE)
        computed = self._base.union(*(collector.measures for collector in self._collectors))
        expected_names = {name for name in self._names if not declared[name].derived}
        assert computed == expected_names, f"no collector for {expected_names - computed}"

    def __call__(self, batch: LoadedBatch, existing: Container[str] = (), *, place: int = 0) -> Arrays:
        """Measures one batch.

        Args:
            batch: Its images.
            existing: Names of arrays that need not be computed. A collector that gives any other array gives all of
                its own, so that every array has the bytes that it has where all are computed together.
            place: In the study, of the first of its images.

        Returns:
            Arrays by name, checked against their declarations.

        Raises:
            ModelError: The model's answer is not finite, the device's memory does not take the smallest chunks, or the
                device is gone.
        """
        while True:
            try:
                with self._memory_errors():
                    return self._measure(batch, existing, place)
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            except RuntimeError as error:
                if not str(error).startswith(DEVICE_ERRORS):
                    raise
                raise ModelError(
                    f"{self._vit.device} does not answer any more ({str(error).splitlines()[0]}). What was written is "
                    "safe: run the same command again, there or on another device of the same kind."
                ) from error
            self._shrink_chunks(reason)  # after the exception, whose frames keep tensors alive

    def _shrink_chunks(self, reason: str) -> None:
        """Halves the chunks of the device and begins the batch anew, with collectors that have seen nothing of it."""
        n_halvings = budget_of(self._vit.device).n_halvings
        if not halve(self._vit.device):
            raise ModelError(
                f"The memory of {self._vit.device} does not take a batch of {self._plan.batch_size} images, however "
                f"small the chunks ({reason}). Give a smaller --batch-size and, as it is part of the plan, another "
                "folder."
            )
        if n_halvings == 0:
            warnings.warn(
                f"The memory of {self._vit.device} did not suffice ({reason}); the batch is computed again in smaller "
                "chunks.",
                RuntimeWarning,
                stacklevel=3,
            )
        if torch.device(self._vit.device).type == "cuda":
            torch.cuda.empty_cache()
        self._collectors = make_collectors(self._vit, self._names, self._options)
        self.load_calibration(self._calibration)

    def load_calibration(self, statistics: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Hands the statistics of all images to the collectors that need them.

        Args:
            statistics: Arrays by name, of each such collector.
        """
        self._calibration = statistics
        for collector, arrays in zip(self.calibrating, statistics, strict=True):
            collector.load_calibration(arrays)

    def _measure(self, batch: LoadedBatch, existing: Container[str], place: int) -> Arrays:
        n_images = len(batch.entries)
        collectors = [each for each in self._collectors if any(name not in existing for name in each.measures)]
        self._hand_out_masks(collectors, batch.masks)
        for collector in collectors:
            if isinstance(collector, SamplesImages):
                collector.take_places(range(place, place + n_images))
        keep = any(collector.replays for collector in collectors)
        images = self._pad(batch.prepared)
        readers = Readers.join([collector.readers() for collector in collectors])
        replay, logits = self._tap.record(images, readers, keep=keep)
        _refuse_not_finite(batch.entries, logits[:n_images])
        labels = _labels(batch.entries, logits, self._vit.n_classes is not None)
        arrays: Arrays = {}
        for collector in collectors:
            arrays |= collector.finish(self._tap, replay, logits, labels)
        if any(name not in existing for name in self._base):
            arrays |= self._prediction_arrays(logits, labels) | {"thumbnail": batch.thumbnails}
            first = self._first_block
            if self._plan.options.get("masks") == "given" and first.grid is not None:
                arrays["object_share"] = object_shares(batch.masks, first.grid, first.patch_step)
        arrays = {name: values[:n_images] for name, values in pad_patches(self._vit, arrays).items()}
        for name, values in arrays.items():
            self._check(name, values, n_images)
        return arrays

    def _prediction_arrays(self, logits: Float[Tensor, "batch class"], labels: Int64[np.ndarray, "batch"]) -> Arrays:
        """What the model says of each image."""
        with_classes = self._vit.n_classes is not None
        arrays = (
            _prediction_arrays(self._vit.task, logits, labels) if with_classes else {"label": labels.astype(np.int32)}
        )
        if self._vit.task.has_value:
            arrays["value"] = self._vit.task.value(logits.detach()).cpu().numpy()
        return arrays

    def refuse_chance(self, batch: LoadedBatch) -> None:
        """Refuses a model that answers the same images differently each time.

        Args:
            batch: Any images of the study.

        Raises:
            ModelError: Two passes over them differ.
        """
        reason = reason_of_chance(self._tap, self._pad(batch.prepared))
        if reason:
            raise ModelError(f"{self._vit.name} {reason}")

    @property
    def calibrating(self) -> list[Calibrates]:
        """The collectors that see all images before the first is measured."""
        return [collector for collector in self._collectors if isinstance(collector, Calibrates)]

    def calibrate(self, batch: LoadedBatch) -> None:
        """Hands one batch to the collectors that see all images before the first is measured.

        Args:
            batch: Its images.
        """
        images = self._pad(batch.prepared)
        for collector in self.calibrating:
            collector.calibrate(self._tap, images, len(batch.entries))

    def _pad(self, images: Float[Tensor, "image channel row column"]) -> Float[Tensor, "batch channel row column"]:
        """The last image repeated up to the batch size, because another batch size gives other last digits."""
        missing = self._plan.batch_size - len(images)
        with self._memory_errors():
            return torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]) if missing else images

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        """Says what to do where the memory of this computer does not suffice, of which no chunk can be made smaller."""
        try:
            yield
        except RuntimeError as error:
            if CPU_MEMORY not in str(error):
                raise
            raise ModelError(
                f"The memory of this computer does not take a batch of {self._plan.batch_size} images. Give a smaller "
                "--batch-size and, as it is part of the plan, another folder."
            ) from error

    def _hand_out_masks(
        self, collectors: Sequence[Collector], masks: Sequence[Int64[np.ndarray, "_ _"] | None]
    ) -> None:
        padded = [*masks, *[masks[-1]] * (self._plan.batch_size - len(masks))]
        for collector in collectors:
            if isinstance(collector, TakesMasks):
                collector.take_masks(padded)

    def _check(self, name: str, values: np.ndarray, n_images: int) -> None:
        """What a collector returns is what its measure declares."""
        measure = declaration(name)
        sizes = {"image": n_images, "layer": self._plan.n_layers, "head": max(self._plan.n_heads)}
        expected = tuple(sizes.get(dim, size) for dim, size in zip(measure.dims, values.shape, strict=False))
        assert len(values.shape) == len(measure.dims), f"{name} has shape {values.shape}, declared {measure.dims}"
        assert values.shape == expected, f"{name} has shape {values.shape} for {measure.dims}, not {expected}"
        assert values.dtype == measure.dtype, f"{name} is {values.dtype}, declared {measure.dtype}"


def _refuse_not_finite(entries: Sequence[ImageEntry], logits: Float[Tensor, "image class"]) -> None:
    finite = logits.isfinite().all(dim=-1).tolist()
    bad = [entry.id for entry, good in zip(entries, finite, strict=True) if not good]
    if bad:
        raise ModelError(
            f"The model's answer is not finite (NaN or infinite) for {len(bad)} of {len(entries)} images: "
            f"{', '.join(bad[:5])}. Check the weights, or try float32 if another precision was asked for."
        )


def _labels(entries: Sequence[ImageEntry], logits: Tensor, with_classes: bool) -> Int64[np.ndarray, "batch"]:
    """The data set's labels, the model's own top-1 where there are none, -1 where it has no classes either.

    Padded like the images: by repeating the last.
    """
    own = logits.argmax(dim=-1).cpu().numpy() if with_classes else np.full(len(logits), -1)
    padded = [*entries, *[entries[-1]] * (len(logits) - len(entries))]
    labels = [entry.label if entry.label is not None else top for entry, top in zip(padded, own, strict=True)]
    return np.asarray(labels, dtype=np.int64)


def _prediction_arrays(task: Task, logits: Float[Tensor, "batch class"], labels: Int64[np.ndarray, "batch"]) -> Arrays:
    probabilities: Float32[np.ndarray, "batch class"] = task.probabilities(logits).cpu().numpy()
    best = np.argsort(-logits.detach().float().cpu().numpy(), axis=-1, kind="stable")[:, :N_TOP]
    return {
        "label": labels.astype(np.int32),
        "prediction": best[:, 0].astype(np.int32),
        "probability": np.take_along_axis(probabilities, labels[:, None], axis=-1)[:, 0],
        "top_class": best.astype(np.int32),
        "top_probability": np.take_along_axis(probabilities, best, axis=-1),
    }
