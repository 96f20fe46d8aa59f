"""The windows of a trained ViT on the very view that the student sees: what guides its window heads.

After Ma et al. 2022, whose student is guided by the interactions of a trained ViT; the rule (the box of a given area
that holds most interaction, `vitrail.patches.windows`) and the loss are our construction.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.errors import UsageError
from vitrail.patches import windows
from vitrail.patches.interaction import indicator
from vitrail.vit.open import Vit
from vitrail.vit.tap import LayerAttention, Readers
from vitrail.wint.model import longest
from vitrail.wint.recipe import Teaching

HALF = (0.5, 0.5, 0.5)

__all__ = ["Teacher", "disagreement", "guidance"]


class Teacher:
    """A frozen ViT and the area of its windows.

    `n_windows`: 1 for windows that all heads of a layer share, from the mean over heads; otherwise one a head, from
    that head alone. `mean`, `std`: how the images are normalised that the teacher will be shown; they are given to it
    as it was trained. Raises `UsageError` if the student has other layers, heads or patches.
    """

    def __init__(
        self,
        vit: Vit,
        area: int,
        n_layers: int,
        n_windows: int,
        grid: tuple[int, int],
        mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
    ) -> None:
        self._vit, self._n_windows, self._grid = vit, n_windows, grid
        own_mean, own_std, its_mean, its_std = (
            torch.tensor(list(each), device=vit.device).view(3, 1, 1)
            for each in (vit.preprocessing.mean, vit.preprocessing.std, mean, std)
        )
        self._scale, self._shift = its_std / own_std, (its_mean - own_mean) / own_std
        self._n_patches = windows.n_patches_of(area / 100, grid)
        heads = sorted(set(vit.n_heads))
        found = (vit.n_layers, vit.anatomy.grid, set(vit.n_heads) if n_windows > 1 else {n_windows})
        if found != (n_layers, grid, {n_windows}):
            raise UsageError(
                f"The teacher {vit.name} has {vit.n_layers} layers of {heads} heads on a "
                f"grid {vit.anatomy.grid}; the student has {n_layers} layers of {n_windows} windows on {grid}."
            )

    @torch.no_grad()
    def sides(
        self, images: Float[Tensor, "image channel row column"]
    ) -> list[Float[Tensor, "image window patch side"]]:
        """For each layer the teacher's windows: patches left, top, right, bottom, none below 0."""
        found: dict[int, Tensor] = {}

        def read(attention: LayerAttention) -> None:
            found[attention.layer] = self._sides(attention.weights(), attention.prefix)

        self._vit.tap().read(images * self._scale + self._shift, Readers(attention=read))
        return [found[layer] for layer in sorted(found)]

    def _sides(self, weights: Float[Tensor, "image head query key"], prefix: int) -> Tensor:
        if self._n_windows == 1:
            matrix = indicator(weights, prefix)[:, None]
        else:
            matrix = torch.stack(
                [indicator(weights[:, head : head + 1], prefix) for head in range(weights.shape[1])], 1
            )
        boxes, _ = windows.best_boxes(matrix, self._grid, self._n_patches)
        return windows.sides(boxes, self._grid).clamp(min=0).float()


def disagreement(
    predicted: Sequence[Float[Tensor, "image window patch side"]],
    taught: Sequence[Float[Tensor, "image window patch side"]],
    grid: tuple[int, int],
) -> Float[Tensor, ""]:
    """Mean |b - b*| / (n - 1) over layers, images, windows, patches and sides: 0 the same, 1 as far as can be."""
    scale = longest(grid, predicted[0]).clamp(min=1)
    layers = [((own - other).abs() / scale).mean() for own, other in zip(predicted, taught, strict=True)]
    return torch.stack(layers).mean()


def guidance(teaching: Teaching, done: float) -> float:
    """The weight of the teacher's term when the share `done` of training is over."""
    if not teaching.folder or done >= teaching.until:
        return 0.0
    return teaching.weight * min(1.0, done / teaching.from_share if teaching.from_share else 1.0)
