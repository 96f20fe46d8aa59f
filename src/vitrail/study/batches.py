"""One batch of a study: images loaded ahead in a thread, one recorded pass, and what the collectors make of it."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from PIL import Image
from torch import Tensor

from vitrail.data import ImageEntry, ImageSource, load_image, load_mask
from vitrail.errors import DataError, ModelError
from vitrail.measure import MEASURES
from vitrail.study import rooms
from vitrail.study.plan import Plan
from vitrail.study.store import N_TOP, THUMBNAIL_PX, declared
from vitrail.vit.open import Vit
from vitrail.vit.tap import Readers

__all__ = ["BatchRun", "Loaded", "loaded_batches"]

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Loaded:
    """Images of a batch, ready for the model."""

    entries: Sequence[ImageEntry]
    prepared: Float[Tensor, "image channel row column"]
    thumbnails: UInt8[np.ndarray, "image thumb_row thumb_column channel"]
    masks: Sequence[Int64[np.ndarray, "_ _"] | None]


@contextmanager
def loaded_batches(
    vit: Vit, source: ImageSource, batches: Sequence[Sequence[ImageEntry]]
) -> Iterator[Iterator[Loaded]]:
    """The batches in order, each decoded in a thread while the one before it is studied."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        yield _one_ahead(vit, source, batches, thread)


def _one_ahead(
    vit: Vit, source: ImageSource, batches: Sequence[Sequence[ImageEntry]], thread: ThreadPoolExecutor
) -> Iterator[Loaded]:
    coming = thread.submit(_load, vit, source, batches[0])
    for following in batches[1:]:
        loaded = coming.result()
        coming = thread.submit(_load, vit, source, following)
        yield loaded
    yield coming.result()


def _load(vit: Vit, source: ImageSource, entries: Sequence[ImageEntry]) -> Loaded:
    images = [load_image(source, entry) for entry in entries]
    thumbnails = np.stack([_thumbnail(vit.view(image)) for image in images])
    masks = [_mask(entry, image) for entry, image in zip(entries, images, strict=True)]
    return Loaded(entries, vit.prepare(images), thumbnails, masks)


def _mask(entry: ImageEntry, image: Image.Image) -> Int64[np.ndarray, "_ _"] | None:
    mask = load_mask(entry)
    if mask is not None and mask.shape != (image.height, image.width):
        raise DataError(
            f"The mask of {entry.id} has {mask.shape[1]} x {mask.shape[0]} pixels and the image {image.width} x "
            f"{image.height}; a mask is as large as its image."
        )
    return mask


def _thumbnail(view: Image.Image) -> UInt8[np.ndarray, "row column channel"]:
    small = view.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return np.asarray(small, dtype=np.uint8)


class BatchRun:
    """Runs batches of one study through its model; call it with one batch after the other."""

    def __init__(self, vit: Vit, plan: Plan) -> None:
        self._vit, self._plan, self._tap = vit, plan, vit.tap()
        self._collectors = rooms.collectors(vit, tuple(plan.measures), plan.options)
        self._readers = Readers.joined([collector.readers() for collector in self._collectors])
        base = {name for name in plan.measures if MEASURES[name].room == "base"}
        self._computed = base | {name for collector in self._collectors for name in collector.measures}
        wanted = {name for name in plan.measures if not MEASURES[name].derived}
        assert self._computed == wanted, f"no collector for {wanted - self._computed}"

    def __call__(self, batch: Loaded) -> Arrays:
        """All arrays of the batch, checked. Raises `ModelError` if the model's answer is not finite."""
        n_images = len(batch.entries)
        self._hand_out_masks(batch.masks)
        keep = any(collector.replays for collector in self._collectors)
        images = _padded(batch.prepared, self._plan.batch_size)
        replay, logits = self._tap.record(images, self._readers, keep=keep)
        _refuse_not_finite(batch.entries, logits[:n_images])
        with_classes = self._vit.n_classes is not None
        labels = _labels(batch.entries, logits, with_classes)
        arrays = _answers(logits, labels) if with_classes else {"label": labels.astype(np.int32)}
        for collector in self._collectors:
            arrays |= collector.finish(self._tap, replay, logits, labels)
        arrays = {name: values[:n_images] for name, values in arrays.items()} | {"thumbnail": batch.thumbnails}
        for name, values in arrays.items():
            self._check(name, values, n_images)
        return arrays

    @property
    def surveys(self) -> list[rooms.Surveys]:
        """The collectors that see all images before the first is measured."""
        return [collector for collector in self._collectors if isinstance(collector, rooms.Surveys)]

    def survey(self, batch: Loaded) -> None:
        """Shows one batch to those collectors."""
        images = _padded(batch.prepared, self._plan.batch_size)
        for collector in self.surveys:
            collector.survey(self._tap, images, len(batch.entries))

    def _hand_out_masks(self, masks: Sequence[Int64[np.ndarray, "_ _"] | None]) -> None:
        padded = [*masks, *[masks[-1]] * (self._plan.batch_size - len(masks))]
        for collector in self._collectors:
            if isinstance(collector, rooms.TakesMasks):
                collector.take_masks(padded)

    def _check(self, name: str, values: np.ndarray, n_images: int) -> None:
        """What a collector returns is what its measure declares."""
        measure = declared(name)
        sizes = {"image": n_images, "layer": self._plan.n_layers, "head": max(self._plan.n_heads)}
        expected = tuple(sizes.get(dim, size) for dim, size in zip(measure.dims, values.shape, strict=False))
        assert len(values.shape) == len(measure.dims), f"{name} has shape {values.shape}, declared {measure.dims}"
        assert values.shape == expected, f"{name} has shape {values.shape} for {measure.dims}, not {expected}"
        assert values.dtype == measure.dtype, f"{name} is {values.dtype}, declared {measure.dtype}"


def _padded(
    images: Float[Tensor, "image channel row column"], batch_size: int
) -> Float[Tensor, "batch channel row column"]:
    """The last image repeated up to the batch size, because another batch size gives other last digits."""
    missing = batch_size - len(images)
    return torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]) if missing else images


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
    given = [entry.label if entry.label is not None else top for entry, top in zip(padded, own, strict=True)]
    return np.asarray(given, dtype=np.int64)


def _answers(logits: Float[Tensor, "batch class"], labels: Int64[np.ndarray, "batch"]) -> Arrays:
    probabilities: Float32[np.ndarray, "batch class"] = logits.detach().float().softmax(dim=-1).cpu().numpy()
    best = np.argsort(-logits.detach().float().cpu().numpy(), axis=-1, kind="stable")[:, :N_TOP]
    return {
        "label": labels.astype(np.int32),
        "prediction": best[:, 0].astype(np.int32),
        "probability": np.take_along_axis(probabilities, labels[:, None], axis=-1)[:, 0],
        "top_class": best.astype(np.int32),
        "top_probability": np.take_along_axis(probabilities, best, axis=-1),
    }
