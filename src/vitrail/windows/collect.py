"""Predicted windows in a study: what each patch of a WinT predicts, and whether the model's own attention agrees."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.analysis import declaration
from vitrail.grid import Grid, positions
from vitrail.models.open import Vit
from vitrail.patches import windows
from vitrail.patches.interaction import indicator
from vitrail.tap.clone import clone_sharing
from vitrail.tap.modes import autocast_off
from vitrail.tap.tap import LayerAttention, Readers, Replay, Tap
from vitrail.wint.model import hard_mask, record_sides, round_sides

__all__ = ["WindowCollector", "measure_sides", "overlap", "predict_windows"]

Sides = Float[Tensor, "image window patch side"]


class WindowCollector:
    """Compares the sides that a model predicts with windows of the same area that are measured, as those of a ViT
    are, in each head's attention. Two passes of its own: the sides, then the attention."""

    replays = False

    def __init__(self, vit: Vit, measures: Sequence[str]) -> None:
        self.measures = tuple(measures)
        self._vit = vit

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
            logits: Not used.
            labels: Not used.

        Returns:
            Arrays [image, layer, head, ..]; NaN (windows: -1) for heads that a layer lacks.
        """
        return self.of(replay.images)

    def of(self, images: Float[Tensor, "image channel row column"]) -> dict[str, np.ndarray]:
        """Measures prepared images.

        Args:
            images: As the model is given them.

        Returns:
            Arrays [image, layer, head, ..]; NaN (windows: -1) for heads that a layer lacks.
        """
        predicted, by_layer = predict_windows(self._vit, images), dict[int, dict[str, Tensor]]()

        def read(attention: LayerAttention) -> None:
            if attention.call == 0:
                by_layer[attention.layer] = self._of_layer(attention, predicted[attention.layer])

        self._vit.tap().read(images, Readers(attention=read))
        arrays, n_heads = {}, max(self._vit.n_heads)
        for name in self.measures:
            dtype = declaration(name).dtype
            shape = (len(images), len(predicted), n_heads, *by_layer[0][name].shape[2:])
            array = np.full(shape, -1 if dtype == "int16" else np.nan, dtype=dtype)
            for layer, values in by_layer.items():
                array[:, layer, : values[name].shape[1]] = values[name].cpu().numpy()
            arrays[name] = array
        return arrays

    def _of_layer(self, attention: LayerAttention, sides: Sides) -> dict[str, Tensor]:
        grid, prefix = attention.grid, attention.prefix
        assert grid is not None, "a layer with windows has a grid"
        sides = round_sides(sides).clamp(min=0).minimum(_to_border(grid).to(sides))
        masks = hard_mask(sides, grid)
        values = {"predicted_window": sides, "predicted_area": masks.float().mean((-1, -2))}
        if "predicted_overlap" in self.measures:
            values["predicted_overlap"] = _agreement(
                masks, measure_sides(attention.weights(), prefix, sides, grid), grid
            )
        if {"predicted_overlap_open", "predicted_overlap_moved"} & set(self.measures):
            measured = measure_sides(_open_weights(attention), prefix, sides, grid)
            values["predicted_overlap_open"] = _agreement(masks, measured, grid)
            values["predicted_overlap_moved"] = _agreement(masks, _permute_queries(measured, grid), grid)
        return {name: values[name].expand(-1, attention.heads, *values[name].shape[2:]) for name in self.measures}


@torch.no_grad()
def predict_windows(vit: Vit, images: Float[Tensor, "image channel row column"]) -> list[Sides]:
    """Predicts the windows of prepared images.

    Args:
        vit: A WinT.
        images: As the model is given them.

    Returns:
        For each layer patches left, top, right, bottom of each query, not rounded.
    """
    model = clone_sharing(vit.model)
    with record_sides(model) as sides, autocast_off():
        model(images)
    return list(sides)


@torch.no_grad()
def measure_sides(weights: Float[Tensor, "image head query key"], prefix: int, predicted: Sides, grid: Grid) -> Sides:
    """Finds where attention lies: for each query the box that holds most interaction.

    Args:
        weights: Attention of one layer.
        prefix: Number of prefix tokens.
        predicted: Predicted sides; a box has the mean area of those of its image and head, and is found in the mean
            over heads where these share a window.
        grid: Rows and columns of patches.

    Returns:
        Patches left, top, right, bottom of each query; negative where the box does not hold the query, 0 where the
        query interacts with no other patch.
    """
    shared = predicted.shape[1] == 1
    matrix = indicator(weights if shared else weights.flatten(0, 1).unsqueeze(1), prefix)
    areas = hard_mask(predicted, grid).sum(-1).float().mean(-1).flatten().round().clamp(min=1).int()
    boxes = torch.zeros((*matrix.shape[:2], 4), dtype=torch.int64, device=matrix.device)
    for area in areas.unique().tolist():
        boxes[areas == area] = windows.best_boxes(matrix[areas == area], grid, area)[0]
    sides = windows.sides(boxes, grid).float() * (windows.areas(boxes) > 0)[..., None]
    return sides.view(predicted.shape)


def overlap(
    one: Bool[Tensor, "*batch patch other"], two: Bool[Tensor, "*batch patch other"]
) -> Float[Tensor, "*batch patch"]:
    """Compares two windows of each query.

    Args:
        one: Which patches lie in the first.
        two: Which lie in the second.

    Returns:
        Intersection over union, 0 apart to 1 the same.
    """
    return (one & two).sum(-1) / (one | two).sum(-1).clamp(min=1)


def _agreement(masks: Bool[Tensor, "image window patch other"], sides: Sides, grid: Grid) -> Tensor:
    return overlap(masks, hard_mask(sides, grid)).mean(-1)


def _open_weights(attention: LayerAttention) -> Float[Tensor, "image head query key"]:
    """The layer's attention as its queries and keys would have it without the mask."""
    q, k = attention.q, attention.k
    assert q is not None, "windows are masks of scaled_dot_product_attention"
    assert k is not None
    return torch.softmax(((q[:, 0] * attention.scale) @ k[:, 0].mT).float(), -1)


def _permute_queries(sides: Sides, grid: Grid) -> Sides:
    """The same boxes, each given to another query of its image, fixed at random."""
    order = torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(0))
    row, column = positions(grid, torch.arange)
    right, down = column[order] - column, row[order] - row  # where the box's old query lies, seen from the new one
    return sides[:, :, order] + torch.stack([-right, -down, right, down], -1).to(sides)


def _to_border(grid: Grid) -> Int[Tensor, "patch side"]:
    """The sides that reach the border of the grid."""
    row, column = positions(grid, torch.arange)
    return torch.stack([column, row, grid[1] - 1 - column, grid[0] - 1 - row], -1)
