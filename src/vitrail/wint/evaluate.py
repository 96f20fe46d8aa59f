"""What a trained model is worth: accuracy, the area of its windows, how they agree with a teacher's and with the
windows that its own attention shows, and its speed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitrail.errors import DataError, UsageError
from vitrail.patches import windows
from vitrail.patches.interaction import indicator
from vitrail.vit.open import Vit
from vitrail.vit.tap import LayerAttention, Readers
from vitrail.wint.batches import Images
from vitrail.wint.model import hard_mask, recorded_sides, window_heads
from vitrail.wint.teacher import Teacher

__all__ = ["Evaluation", "evaluate", "measured_windows", "overlap", "predicted_windows"]

Sides = Sequence[Float[Tensor, "image window patch side"]]


@dataclass(frozen=True)
class Evaluation:
    """Numbers over all images; those by layer are empty for a model without windows.

    accuracy: share of right answers. area: mean share of the grid within a window. overlap_teacher: mean intersection
    over union with the teacher's windows; overlap_own: the same with the windows measured in the model's own attention,
    boxes of the predicted mean area; overlap_chance: with those windows moved to other queries at random.
    """

    n_images: int
    accuracy: float
    images_per_s: float
    area: tuple[float, ...] = ()
    overlap_teacher: tuple[float, ...] = ()
    overlap_own: tuple[float, ...] = ()
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
    right, spent, totals = 0, 0.0, _Totals()
    for start in range(0, len(images), batch_size):
        some = range(start, min(start + batch_size, len(images)))
        pixels = vit.prepare([images.image(index) for index in some])
        began = time.perf_counter()
        logits = vit.logits(pixels)
        spent += time.perf_counter() - began
        right += int((logits.argmax(1).cpu() == images.labels[some.start : some.stop]).sum())
        if heads and grid is not None:
            predicted = predicted_windows(vit, pixels)
            measured = measured_windows(vit, pixels, predicted, grid)
            totals.add("area", [hard_mask(layer, grid).float().mean() for layer in predicted], len(some))
            totals.add("own", _overlaps(predicted, measured, grid), len(some))
            totals.add("chance", _overlaps(predicted, _moved(measured, grid), grid), len(some))
            if guide is not None:
                totals.add("teacher", _overlaps(predicted, guide.sides(pixels), grid), len(some))
        if progress is not None:
            progress(some.stop, len(images))
    return Evaluation(
        len(images), right / len(images), len(images) / spent, totals.mean("area", len(images)),
        totals.mean("teacher", len(images)), totals.mean("own", len(images)), totals.mean("chance", len(images)),
    )  # fmt: skip


@torch.no_grad()
def predicted_windows(vit: Vit, images: Float[Tensor, "image channel row column"]) -> list[Tensor]:
    """For each layer the sides that the model predicts, [image window patch side]."""
    training = vit.model.training
    vit.model.eval()
    with recorded_sides(vit.model) as sides:
        vit.model(images)
    vit.model.train(training)
    return list(sides)


@torch.no_grad()
def measured_windows(
    vit: Vit, images: Float[Tensor, "image channel row column"], predicted: Sides, grid: tuple[int, int]
) -> list[Tensor]:
    """For each layer the boxes that hold most of the model's own interactions, of the predicted mean area.

    Measured as the patches room does; one box a head where the model predicts one a head. Sides may be negative.
    """
    found: dict[int, Tensor] = {}

    def read(attention: LayerAttention) -> None:
        own = predicted[attention.layer]
        n_patches = max(1, round(float(hard_mask(own, grid).float().sum(-1).mean())))
        weights = attention.weights()
        groups = weights.unsqueeze(2).unbind(1) if own.shape[1] > 1 else (weights,)
        matrix = torch.stack([indicator(group, attention.prefix) for group in groups], 1)
        found[attention.layer] = windows.sides(windows.best_boxes(matrix, grid, n_patches)[0], grid).float()

    vit.tap().read(images, Readers(attention=read))
    return [found[layer] for layer in sorted(found)]


def overlap(
    one: Bool[Tensor, "*batch patch other"], two: Bool[Tensor, "*batch patch other"]
) -> Float[Tensor, "*batch patch"]:
    """Intersection over union of two windows of each query, 0 apart to 1 the same."""
    return (one & two).sum(-1) / (one | two).sum(-1).clamp(min=1)


def _overlaps(one: Sides, two: Sides, grid: tuple[int, int]) -> list[Tensor]:
    pairs = zip(one, two, strict=True)
    return [overlap(hard_mask(own, grid), hard_mask(other, grid)).mean() for own, other in pairs]


def _moved(sides: Sides, grid: tuple[int, int]) -> list[Tensor]:
    """The same boxes, each given to another query of its image, fixed at random."""
    order = torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(0))
    place = torch.stack([order % grid[1], order // grid[1]], -1)
    own = torch.arange(len(order))
    shift = place - torch.stack([own % grid[1], own // grid[1]], -1)  # how far right and down the box's old query lies
    away = torch.cat([-shift, shift], -1)
    return [layer[:, :, order] + away.to(layer) for layer in sides]


class _Totals:
    """Sums by layer, weighted by images."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, layers: Sequence[Tensor], n_images: int) -> None:
        before = self._sums.get(name, [0.0] * len(layers))
        self._sums[name] = [total + float(layer) * n_images for total, layer in zip(before, layers, strict=True)]

    def mean(self, name: str, n_images: int) -> tuple[float, ...]:
        return tuple(total / n_images for total in self._sums.get(name, ()))
