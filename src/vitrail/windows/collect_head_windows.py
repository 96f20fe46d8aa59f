"""Windows of heads in a study: their areas under one budget, and what the prediction becomes under them."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.heads.importance import model_metrics
from vitrail.models.open import Vit
from vitrail.patches import windows
from vitrail.patches.budget import boxes_of_levels, builtin_prices
from vitrail.patches.head_windows import common_grid, head_windows, window_edits
from vitrail.tap.attention import LayerAttention, Readers
from vitrail.tap.budget import budget_of
from vitrail.tap.tap import Replay, Tap

__all__ = ["HeadWindowCollector"]

CHOICE_BYTES = 2**27
"""Boxes that are weighed together on a processor: those of five images of a ViT-Tiny at 224 px."""

BYTES_OF_BOX = 64
"""Of a box and what is computed of it: sides, size, costs and the price of each, until one of them is chosen."""

N_SHAPES = 50
"""Boxes that are offered to each query of each head, about (`vitrail.patches.budget.boxes_of_shapes`)."""

METRICS = {"divergence": "head_divergence", "flip": "head_flip", "output_shift": "head_output_shift"}
"""Ends of measure names, and what `model_metrics` calls the same."""

Boxes = list[Int[Tensor, "image _ patch side"]]
"""Of each layer; layers may have different numbers of heads."""


class HeadWindowCollector:
    """Chooses the windows of each batch and runs it under them. Passes of its own.

    Args:
        vit: The model; all layers have one grid.
        measures: Names of its measures.
        area: Mean area of windows, share of the grid.
    """

    replays = False

    def __init__(self, vit: Vit, measures: Sequence[str], area: float) -> None:
        self.measures = tuple(measures)
        self._vit, self._area = vit, area
        self._prices: Tensor | None = None

    def readers(self) -> Readers:
        """Reads nothing of the common pass.

        Returns:
            No readers.
        """
        return Readers()

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """Measures a batch of a study.

        Args:
            tap: Not used.
            replay: Holds the images.
            logits: Output of the plain pass.
            labels: Class of each image.

        Returns:
            Arrays [image, layer, head] and [image]; NaN for heads that a layer lacks.
        """
        if self._prices is None:
            self._prices = builtin_prices(self._vit)
        grid, _ = common_grid(self._vit)
        per_image = BYTES_OF_BOX * N_SHAPES * grid[0] * grid[1] * sum(self._vit.n_heads)
        step = max(1, budget_of(logits.device).bytes_for(CHOICE_BYTES) // per_image)
        parts = [
            self._measure(replay.images[start : start + step], logits[start : start + step])
            for start in range(0, len(logits), step)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.measures}

    def _measure(
        self, images: Float[Tensor, "image channel row column"], logits: Float[Tensor, "image class"]
    ) -> dict[str, np.ndarray]:
        assert self._prices is not None
        boxes = head_windows(self._vit, images, self._prices, self._area)
        effects = {f"head_window_{end}": value for end, value in self._effects(images, logits, boxes).items()}
        if any(name.endswith("_equal") for name in self.measures):
            of_equal = self._effects(images, logits, self._equal_windows(images))
            effects |= {f"head_window_{end}_equal": value for end, value in of_equal.items()}
        arrays = {name: value.cpu().numpy() for name, value in effects.items() if name in self.measures}
        if "head_window_area" in self.measures:
            n_patches = boxes[0].shape[2]
            areas = np.full((len(images), len(boxes), max(self._vit.n_heads)), np.nan, np.float32)
            for layer, each in enumerate(boxes):
                areas[:, layer, : each.shape[1]] = (windows.areas(each).float().mean(-1) / n_patches).cpu().numpy()
            arrays["head_window_area"] = areas
        return arrays

    def _effects(
        self, images: Float[Tensor, "image channel row column"], plain: Float[Tensor, "image class"], boxes: Boxes
    ) -> dict[str, Float[Tensor, "image"]]:
        with torch.no_grad():
            output = self._vit.tap().read(images, edits=window_edits(self._vit, boxes))
        is_classifier = self._vit.task.n_classes is not None
        metrics = model_metrics(plain, output[None], plain.argmax(-1) if is_classifier else None, self._vit.task)
        return {end: metrics[name][0] for end, name in METRICS.items() if name in metrics}

    def _equal_windows(self, images: Float[Tensor, "image channel row column"]) -> Boxes:
        """Of each head and patch the box of the budget's area that holds most of its attention."""
        grid, prefix = common_grid(self._vit)
        boxes: Boxes = []

        def read(attention: LayerAttention) -> None:
            boxes.append(boxes_of_levels(attention.weights(), prefix, grid, (self._area,))[..., 1, :])

        with torch.no_grad():
            self._vit.tap().read(images, Readers(attention=read))
        return boxes
