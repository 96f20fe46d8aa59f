"""What a trained model is worth: accuracy, the area of its windows, how they agree with a teacher's and with the
windows that its own attention shows, and its speed."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitrail.data.files import some
from vitrail.data.labels import classes_of_names
from vitrail.errors import BadImage, DataError, NoImages, UsageError
from vitrail.models.open import Vit
from vitrail.tap.clone import clone_sharing
from vitrail.windows.collect import WindowCollector, overlap, predict_windows
from vitrail.wint.batches import Images
from vitrail.wint.model import hard_mask, window_heads
from vitrail.wint.sparse import window_mode
from vitrail.wint.teacher import Teacher

__all__ = ["Evaluation", "evaluate"]

MEASURES_BY_LAYER = {
    "area": "predicted_area",
    "overlap_own": "predicted_overlap",
    "overlap_open": "predicted_overlap_open",
    "overlap_chance": "predicted_overlap_moved",
}
"""Numbers of an evaluation that are measures of a study."""


@dataclass(frozen=True)
class Evaluation:
    """Numbers over all images that can be read; those by layer are empty for a model without windows.

    skipped: images that cannot be read, and why.
    accuracy: share of correct predictions. images_per_s: by the clock, from prepared images to answers on the CPU,
    without the first pass. area: mean share of the grid within a window. overlap_teacher: mean intersection over union
    with the teacher's windows; overlap_own: with the windows measured in the model's own attention, boxes of the
    predicted mean area, which its mask all but forces; overlap_open: with those that its queries and keys would have
    without the mask; overlap_chance: with the latter moved to other queries at random.
    """

    n_images: int
    accuracy: float
    images_per_s: float
    skipped: tuple[str, ...] = ()
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
    windows: str = "model",
    batch_size: int = 50,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates an opened model on labelled images.

    Args:
        vit: The model.
        images: Labelled images of the model's classes, found by their names where both have names.
        teacher: A model of the same layers, heads and grid, with whose windows the predicted ones are compared.
        teacher_area: Percent of the grid that the teacher's windows have.
        windows: How the model attends while its answers are counted and timed: "model", as it was trained; "hard",
            sides rounded; "sparse", the same through block-sparse attention; "tiles", block-sparse with windows that
            the queries of a block share.
        batch_size: Images at a time.
        progress: Called with the images done and their number.

    Returns:
        Numbers over all images.

    Raises:
        DataError: The images have other classes than the model, in number or by name.
        NoImages: None of them can be read.
        UsageError: The teacher does not fit, or the model has no windows to harden.
    """
    labels = _labels_of_model(vit, images)
    heads, grid = window_heads(vit.model), vit.anatomy.grid
    guide = None
    if teacher is not None:
        if not heads or grid is None:
            raise UsageError(f"{vit.name} predicts no windows that could be compared with a teacher's.")
        guide = Teacher(teacher, teacher_area, len(heads), heads[0].n_windows, grid, vit.preprocessing)
    n_images, n_correct, seconds, sums, skipped = 0, 0, 0.0, dict[str, np.ndarray](), list[str]()
    model = clone_sharing(vit.model)  # its windows are changed: neither the user's modules nor `vit` may keep that
    sizes_run: set[int] = set()

    @torch.no_grad()
    def answer(pixels: Tensor) -> Tensor:
        with window_mode(model, windows):
            return vit.read_output(model(pixels)).cpu()  # waits for the device

    reader = WindowCollector(vit, tuple(MEASURES_BY_LAYER.values()))
    for start in range(0, len(images), batch_size):
        batch = range(start, min(start + batch_size, len(images)))
        views = {}
        for index in batch:
            try:
                views[index] = vit.view(images.image(index))
            except BadImage as error:
                skipped.append(str(error))
        if not views:
            continue
        n_images += len(views)
        pixels = vit.prepare_views(list(views.values()))
        if len(views) not in sizes_run:  # compiles, or chooses kernels, for this size of a batch
            answer(pixels)
            sizes_run.add(len(views))
        start_time = time.perf_counter()
        logits = answer(pixels)
        seconds += time.perf_counter() - start_time
        n_correct += int((logits.argmax(1) == labels[list(views)]).sum())
        if heads and grid is not None:
            by_layer = {name: values.mean(2) for name, values in reader.of(pixels).items()}
            if guide is not None:
                pairs = zip(predict_windows(vit, pixels), guide.sides(pixels), strict=True)
                by_layer["teacher"] = np.stack([_overlap(predicted, target, grid) for predicted, target in pairs], 1)
            for name, values in by_layer.items():
                sums[name] = sums.get(name, 0) + values.sum(0, dtype=np.float64)
        if progress is not None:
            progress(batch.stop, len(images))
    if not n_images:
        raise NoImages(f"None of the {len(images):,} images can be read: {skipped[0]}.")
    layers = {
        field: tuple((sums[name] / n_images).tolist())
        for field, name in {**MEASURES_BY_LAYER, "overlap_teacher": "teacher"}.items()
        if name in sums
    }
    return Evaluation(n_images, n_correct / n_images, n_images / seconds, tuple(skipped), **layers)


def _labels_of_model(vit: Vit, images: Images) -> Tensor:
    """The classes of images as the model numbers them: data sets of the same classes may have them in another order."""
    names = images.class_names
    if vit.n_classes != len(names):
        raise DataError(f"{images.name} has {len(names)} classes, and {vit.name} tells {vit.n_classes} apart.")
    if vit.class_names is None or vit.class_names == names:
        return images.labels
    classes = classes_of_names(names, vit.class_names, vit.n_classes)
    numbers = [min(each) for each in classes.values() if len(each) == 1]
    if sorted(numbers) != list(range(len(names))):
        unclear = [name for name, each in classes.items() if len(each) != 1] or list(names)
        raise DataError(
            f"Classes of {images.name} are no classes of {vit.name} by their names: {some(unclear)}. If they are the "
            "same by other names, give these in the model's order: --class-names FILE (class_names=)."
        )
    return torch.tensor(numbers)[images.labels]


def _overlap(one: Tensor, two: Tensor, grid: tuple[int, int]) -> np.ndarray:
    return overlap(hard_mask(one, grid), hard_mask(two, grid)).mean((1, 2)).cpu().numpy()
