"""The windows of a trained ViT on the very view that the student sees: what its window heads are distilled from.

After Ma et al. 2022, whose student is guided by the interactions of a trained ViT; the rule (the box of a given area
that holds most interaction, `vitrail.patches.windows`) and the loss are our construction.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError
from vitrail.grid import Grid
from vitrail.models.open import PRECISIONS, Vit, open_vit
from vitrail.models.preprocessing import Preprocessing
from vitrail.patches import windows
from vitrail.patches.budget import builtin_prices
from vitrail.patches.head_windows import head_windows
from vitrail.patches.interaction import indicator
from vitrail.tap.tap import LayerAttention, Readers
from vitrail.wint.model import WindowHead, max_sides, window_heads
from vitrail.wint.recipe import Recipe

TEACHES_IN = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}

__all__ = ["Teacher", "build_teacher", "window_l1"]


class Teacher:
    """A frozen ViT and the area of its windows.

    Args:
        vit: The teacher.
        area: Percent of the grid that its windows have.
        n_layers: Layers of the student.
        n_windows: Windows a layer of the student. 1: for all heads, from the mean over heads; otherwise one a head,
            from that head alone.
        grid: Rows and columns of the student's patches.
        view: How the images are made that the teacher will be given, as it was trained is how it gets them. None: they
            are made for it.
        shared_budget: The windows of all heads and layers have that area on average, those that matter most the most;
            otherwise each has it.

    Raises:
        UsageError: The student has other layers, heads, patches or image sizes; or windows that are to share a budget
            are one for all heads.
    """

    def __init__(
        self,
        vit: Vit,
        area: int,
        n_layers: int,
        n_windows: int,
        grid: Grid,
        view: Preprocessing | None = None,
        *,
        shared_budget: bool = False,
    ) -> None:
        own_view, view = vit.preprocessing, view or vit.preprocessing
        self._vit, self._n_windows, self._grid = vit, n_windows, grid
        teacher_mean, teacher_std, student_mean, student_std = (
            torch.tensor(list(values), device=vit.device).view(3, 1, 1)
            for values in (own_view.mean, own_view.std, view.mean, view.std)
        )
        self._scale, self._shift = student_std / teacher_std, (student_mean - teacher_mean) / teacher_std
        self._area, self._n_patches = area / 100, windows.n_patches_of(area / 100, grid)
        heads = sorted(set(vit.n_heads))
        own = (vit.n_layers, vit.anatomy.grid, set(vit.n_heads) if n_windows > 1 else {n_windows})
        if own != (n_layers, grid, {n_windows}):
            raise UsageError(
                f"The teacher {vit.name} has {vit.n_layers} layers of {heads} heads on a "
                f"grid {vit.anatomy.grid}; the student has {n_layers} layers of {n_windows} windows on {grid}."
            )
        if tuple(own_view.size) != tuple(view.size):
            rows, columns = view.size
            raise UsageError(
                f"The teacher {vit.name} takes images of {own_view.size[0]} x {own_view.size[1]} px, and the student's "
                f"have {rows} x {columns}. Open the teacher at that size, or take one that was trained at it, with "
                f"patches of {rows // grid[0]} x {columns // grid[1]} px."
            )
        if shared_budget and n_windows == 1:
            raise UsageError("Windows share a budget between heads; this student has one window for all heads.")
        self._prices = builtin_prices(vit) if shared_budget else None

    @torch.no_grad()
    def sides(
        self, images: Float[Tensor, "image channel row column"]
    ) -> list[Float[Tensor, "image window patch side"]]:
        """The teacher's windows of each layer.

        Args:
            images: Views, normalised as the student's.

        Returns:
            For each layer patches left, top, right, bottom of each query, none below 0.
        """
        views = (images * self._scale + self._shift).to(PRECISIONS[self._vit.precision])
        if self._prices is not None:
            return [self._as_sides(boxes) for boxes in head_windows(self._vit, views, self._prices, self._area)]
        by_layer: dict[int, Tensor] = {}

        def read(attention: LayerAttention) -> None:
            by_layer[attention.layer] = self._best_sides(attention.weights().float(), attention.prefix)

        self._vit.tap().read(views, Readers(attention=read))
        return [by_layer[layer] for layer in sorted(by_layer)]

    def _best_sides(self, weights: Float[Tensor, "image head query key"], prefix: int) -> Tensor:
        if self._n_windows == 1:
            matrix = indicator(weights, prefix)[:, None]
        else:
            each_head = weights.flatten(0, 1).unsqueeze(1)  # a head's own map, as that of an image with one head
            matrix = indicator(each_head, prefix).unflatten(0, weights.shape[:2])
        boxes, _ = windows.best_boxes(matrix, self._grid, self._n_patches)
        return self._as_sides(boxes)

    def _as_sides(self, boxes: Int[Tensor, "image window patch side"]) -> Float[Tensor, "image window patch side"]:
        """None below 0: a student's window holds its patch; where a box is empty, that alone."""
        sides = windows.sides(boxes, self._grid).clamp(min=0).float()
        return sides * (windows.areas(boxes) > 0)[..., None]


def build_teacher(recipe: Recipe, module: nn.Module, grid: Grid, device: str) -> Teacher | None:
    """The teacher that a recipe names.

    Args:
        recipe: The training run.
        module: The student.
        grid: Its rows and columns of patches.
        device: Where the teacher is to run.

    Returns:
        None if no teacher is named, or if the student predicts no windows.

    Raises:
        UsageError: The teacher does not fit the student.
    """
    heads = [head for head in window_heads(module) if isinstance(head, WindowHead)]
    settings, data = recipe.distillation, recipe.data
    if not settings.teacher or not heads:
        return None
    # windows under one budget are bought by differences of sums, which half precision does not give
    precision = "float32" if settings.shared_budget else TEACHES_IN[recipe.run.precision]
    vit = open_vit(settings.teacher, device=device, precision=precision)
    return Teacher(
        vit,
        settings.area,
        len(heads),
        heads[0].n_windows,
        grid,
        Preprocessing((data.image_px, data.image_px), tuple(data.mean), tuple(data.std)),
        shared_budget=settings.shared_budget,
    )


def window_l1(
    predicted: Sequence[Float[Tensor, "image window patch side"]],
    target: Sequence[Float[Tensor, "image window patch side"]],
    grid: Grid,
) -> Float[Tensor, ""]:
    """How far windows are from those of a teacher.

    Args:
        predicted: Sides of each layer, patches.
        target: Those of the teacher.
        grid: Rows and columns of patches.

    Returns:
        Mean |b - b*| / (n - 1) over layers, images, windows, patches and sides: 0 the same, 1 as far as can be.
    """
    scale = max_sides(grid, predicted[0]).clamp(min=1)
    layers = [((own - other).abs() / scale).mean() for own, other in zip(predicted, target, strict=True)]
    return torch.stack(layers).mean()
