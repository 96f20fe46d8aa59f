"""What training minimises: a weighted sum of objectives, each logged by its name.

A new objective is a class here with `name`, `reads_sides`, `weight` and `loss`, listed in `build_objectives`, and its
keys in `recipe.py`. The loop, the tables and TensorBoard follow.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.grid import Grid, n_patches
from vitrail.wint.recipe import Distillation, Recipe
from vitrail.wint.teacher import Teacher, build_teacher, window_l1

__all__ = ["CrossEntropy", "Objective", "TrainingBatch", "WindowArea", "WindowDistillation", "build_objectives"]


@dataclass(frozen=True)
class TrainingBatch:
    """What an objective may look at in one step.

    images: as the model was given them, [image channel row column]. labels: class numbers [image], or under mixup
    probabilities [image class]. logits: [image class]. sides: the predicted windows of each layer, [image window patch
    side] in patches; empty where no objective reads them.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    sides: tuple[Tensor, ...] = ()


@runtime_checkable
class Objective(Protocol):
    """One term of the loss."""

    @property
    def name(self) -> str:
        """Its column in the tables."""
        ...

    @property
    def reads_sides(self) -> bool:
        """Whether it needs the windows that the model predicts."""
        ...

    def weight(self, progress: float) -> float:
        """Weighs the loss.

        Args:
            progress: The share of training that is over, 0 to 1.

        Returns:
            Its factor; at 0 the loss is not computed.
        """
        ...

    def loss(self, batch: TrainingBatch) -> Float[Tensor, ""]:
        """Computes the loss.

        Args:
            batch: What the step was given and what the model made of it.

        Returns:
            The mean over the batch, unweighted, with gradients.
        """
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Of the classes; labels of mixup are smoothed already."""

    label_smoothing: float
    name: str = "cross_entropy"
    reads_sides: bool = False

    def weight(self, progress: float) -> float:
        """Weighs the loss the same throughout.

        Args:
            progress: The share of training that is over, 0 to 1.

        Returns:
            1.
        """
        return 1.0

    def loss(self, batch: TrainingBatch) -> Float[Tensor, ""]:
        """Compares logits with labels.

        Args:
            batch: What the step was given and what the model made of it.

        Returns:
            The mean over images, in nats.
        """
        smoothing = self.label_smoothing if batch.labels.ndim == 1 else 0.0
        return F.cross_entropy(batch.logits.float(), batch.labels, label_smoothing=smoothing)


@dataclass(frozen=True)
class WindowDistillation:
    """Predicted windows are drawn towards those of a frozen teacher on the same view."""

    teacher: Teacher
    settings: Distillation
    grid: Grid
    name: str = "window_l1"
    reads_sides: bool = True

    def weight(self, progress: float) -> float:
        """Grows from 0 over the warm-up, until the teacher's time is over.

        Args:
            progress: The share of training that is over, 0 to 1.

        Returns:
            0 from the share `until` on.
        """
        settings = self.settings
        if progress >= settings.until:
            return 0.0
        return settings.weight * min(1.0, progress / settings.warmup_share if settings.warmup_share else 1.0)

    def loss(self, batch: TrainingBatch) -> Float[Tensor, ""]:
        """Compares the windows with the teacher's on the part of the batch that it is shown.

        Args:
            batch: What the step was given and what the model made of it.

        Returns:
            The mean |b - b*| / (n - 1).
        """
        images = batch.images[: max(1, round(self.settings.batch_share * len(batch.images)))]
        targets = self.teacher.sides(images)
        if self.settings.shuffled:
            targets = [layer.roll(1, 0) for layer in targets]
        return window_l1([layer[: len(images)] for layer in batch.sides], targets, self.grid)


@dataclass(frozen=True)
class WindowArea:
    """Small windows, which block-sparse attention computes faster."""

    area_weight: float
    grid: Grid
    name: str = "window_area"
    reads_sides: bool = True

    def weight(self, progress: float) -> float:
        """Weighs the loss the same throughout.

        Args:
            progress: The share of training that is over, 0 to 1.

        Returns:
            The recipe's `area_weight`.
        """
        return self.area_weight

    def loss(self, batch: TrainingBatch) -> Float[Tensor, ""]:
        """Averages the area of all windows, not cut at the border.

        Args:
            batch: What the step was given and what the model made of it.

        Returns:
            A share of the grid.
        """
        means = []
        for sides in batch.sides:
            left, top, right, bottom = sides.unbind(-1)
            means.append(((left + right + 1) * (top + bottom + 1)).mean())
        total: Tensor = sum(means[1:], means[0])
        return total / (len(means) * n_patches(self.grid))


def build_objectives(recipe: Recipe, module: nn.Module, grid: Grid, device: str) -> tuple[Objective, ...]:
    """The objectives that a recipe asks for.

    Args:
        recipe: The training run.
        module: The model to be trained.
        grid: Its rows and columns of patches.
        device: Where the teacher is to run.

    Returns:
        Cross-entropy first.

    Raises:
        UsageError: The teacher does not fit the model.
    """
    objectives: list[Objective] = [CrossEntropy(recipe.run.label_smoothing)]
    teacher = build_teacher(recipe, module, grid, device)
    if teacher is not None:
        objectives.append(WindowDistillation(teacher, recipe.distillation, grid))
    if recipe.windows.area_weight and recipe.model.windows == "predicted":
        objectives.append(WindowArea(recipe.windows.area_weight, grid))
    return tuple(objectives)
