"""What a trained model is worth: accuracy, the area of its windows, how they agree with a teacher's and with the
windows that its own attention shows, and its speed."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vitrail.errors import DataError, UsageError
from vitrail.vit.open import Vit
from vitrail.wint.batches import Images
from vitrail.wint.collect import WindowCollector, overlap, predicted_windows
from vitrail.wint.model import hard_mask, window_heads
from vitrail.wint.teacher import Teacher

__all__ = ["Evaluation", "evaluate"]

OF_LAYERS = {
    "area": "predicted_area", "overlap_own": "predicted_overlap", "overlap_open": "predicted_overlap_open",
    "overlap_chance": "predicted_overlap_moved",
}  # fmt: skip
"""Numbers of an evaluation that are measures of the windows room."""


@dataclass(frozen=True)
class Evaluation:
    """Numbers over all images; those by layer are empty for a model without windows.

    accuracy: share of right answers. area: mean share of the grid within a window. overlap_teacher: mean intersection
    over union with the teacher's windows; overlap_own: with the windows measured in the model's own attention, boxes of
    the predicted mean area, which its mask all but forces; overlap_open: with those that its queries and keys would
    have without the mask; overlap_chance: with the latter moved to other queries at random.
    """

    n_images: int
    accuracy: float
    images_per_s: float
    area: tuple[float, ...] = ()
    overlap_teacher: tuple[float, ...] = ()
    overlap_own: tuple[float, ...] = ()
    overlap_open: tuple[float, ...] = ()
    overlap_chance: tuple[float, ...] = ()


def evaluate(
    vit: Vit,
    images: Images,
    *,
    teacher: Vit | None = None,
    teacher_area: int = 25,
    batch_size: int = 50,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates an opened model on labelled images.

    Raises `DataError` if the images have other classes than the model, `UsageError` for a teacher that does not fit.
    """
    if vit.n_classes != len(images.class_names):
        raise DataError(
            f"{images.name} has {len(images.class_names)} classes, and {vit.name} tells {vit.n_classes} apart."
        )
    heads, grid = window_heads(vit.model), vit.anatomy.grid
    guide = None
    if teacher is not None:
        if not heads or grid is None:
            raise UsageError(f"{vit.name} predicts no windows that could be compared with a teacher's.")
        shown = vit.preprocessing
        guide = Teacher(teacher, teacher_area, len(heads), heads[0].n_windows, grid, shown.mean, shown.std)
    right, spent, sums = 0, 0.0, dict[str, np.ndarray]()
    reader = WindowCollector(vit, tuple(OF_LAYERS.values()))
    for start in range(0, len(images), batch_size):
        some = range(start, min(start + batch_size, len(images)))
        pixels = vit.prepare([images.image(index) for index in some])
        began = time.perf_counter()
        logits = vit.logits(pixels)
        spent += time.perf_counter() - began
        right += int((logits.argmax(1).cpu() == images.labels[some.start : some.stop]).sum())
        if heads and grid is not None:
            found = {name: values.mean(2) for name, values in reader.of(pixels).items()}
            if guide is not None:
                pairs = zip(predicted_windows(vit, pixels), guide.sides(pixels), strict=True)
                found["teacher"] = np.stack([_overlap(own, other, grid) for own, other in pairs], 1)
            for name, values in found.items():
                sums[name] = sums.get(name, 0) + values.sum(0, dtype=np.float64)
        if progress is not None:
            progress(some.stop, len(images))
    layers = {
        field: tuple((sums[name] / len(images)).tolist())
        for field, name in {**OF_LAYERS, "overlap_teacher": "teacher"}.items()
        if name in sums
    }
    return Evaluation(len(images), right / len(images), len(images) / spent, **layers)


def _overlap(one: Tensor, two: Tensor, grid: tuple[int, int]) -> np.ndarray:
    return overlap(hard_mask(one, grid), hard_mask(two, grid)).mean((1, 2)).cpu().numpy()
