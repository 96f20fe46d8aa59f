"""The windows room: the window that each patch of a WinT predicts, and whether the model's own attention agrees."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.measure import MEASURES
from vitrail.patches import windows
from vitrail.patches.interaction import indicator
from vitrail.vit.open import Vit
from vitrail.vit.tap import LayerAttention, Readers, Replay, Tap
from vitrail.wint.model import hard_mask, recorded_sides, rounded

__all__ = ["WindowCollector", "measured_sides", "overlap", "predicted_windows"]

Grid = tuple[int, int]
Sides = Float[Tensor, "image window patch side"]


class WindowCollector:
    """Compares the sides that a model predicts with windows of the same area that are measured, as the patches room
    does, in each head's attention. Two passes of its own: the sides, then the attention."""

    replays = False

    def __init__(self, vit: Vit, measures: Sequence[str]) -> None:
        self.measures = tuple(measures)
        self._vit = vit

    def readers(self) -> Readers:
        """Nothing of the common pass."""
        return Readers()

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """Arrays [image, layer, head, ..]; NaN (windows: -1) for heads that a layer lacks."""
        return self.of(replay.images)

    def of(self, images: Float[Tensor, "image channel row column"]) -> dict[str, np.ndarray]:
        """The same of any prepared images."""
        predicted, found = predicted_windows(self._vit, images), dict[int, dict[str, Tensor]]()

        def read(attention: LayerAttention) -> None:
            if attention.call == 0:
                found[attention.layer] = self._of_layer(attention, predicted[attention.layer])

        self._vit.tap().read(images, Readers(attention=read))
        arrays, n_heads = {}, max(self._vit.n_heads)
        for name in self.measures:
            whole = MEASURES[name].dtype == "int16"
            shape = (len(images), len(predicted), n_heads, *found[0][name].shape[2:])
            array = np.full(shape, -1 if whole else np.nan, dtype=MEASURES[name].dtype)
            for layer, values in found.items():
                array[:, layer, : values[name].shape[1]] = values[name].cpu().numpy()
            arrays[name] = array
        return arrays

    def _of_layer(self, attention: LayerAttention, sides: Sides) -> dict[str, Tensor]:
        grid, prefix = attention.grid, attention.prefix
        assert grid is not None, "a layer with windows has a grid"
        sides = rounded(sides).clamp(min=0).minimum(_to_border(grid).to(sides))
        masks = hard_mask(sides, grid)
        found = {"predicted_window": sides, "predicted_area": masks.float().mean((-1, -2))}
        if "predicted_overlap" in self.measures:
            found["predicted_overlap"] = _agreement(
                masks, measured_sides(attention.weights(), prefix, sides, grid), grid
            )
        if {"predicted_overlap_open", "predicted_overlap_moved"} & set(self.measures):
            measured = measured_sides(_open_weights(attention), prefix, sides, grid)
            found["predicted_overlap_open"] = _agreement(masks, measured, grid)
            found["predicted_overlap_moved"] = _agreement(masks, _moved(measured, grid), grid)
        return {name: found[name].expand(-1, attention.heads, *found[name].shape[2:]) for name in self.measures}


@torch.no_grad()
def predicted_windows(vit: Vit, images: Float[Tensor, "image channel row column"]) -> list[Sides]:
    """For each layer the sides that the model predicts, in patches, not rounded."""
    training = vit.model.training
    vit.model.eval()
    with recorded_sides(vit.model) as sides:
        vit.model(images)
    vit.model.train(training)
    return list(sides)


@torch.no_grad()
def measured_sides(weights: Float[Tensor, "image head query key"], prefix: int, predicted: Sides, grid: Grid) -> Sides:
    """Where the attention lies: for each query the box that holds most interaction, with the mean area of the predicted
    windows of its image and head; from the mean over heads where these share a window. Sides may be negative."""
    shared = predicted.shape[1] == 1
    matrix = indicator(weights if shared else weights.flatten(0, 1).unsqueeze(1), prefix)
    areas = hard_mask(predicted, grid).sum(-1).float().mean(-1).flatten().round().clamp(min=1).int()
    boxes = torch.zeros((*matrix.shape[:2], 4), dtype=torch.int64, device=matrix.device)
    for area in areas.unique().tolist():
        boxes[areas == area] = windows.best_boxes(matrix[areas == area], grid, area)[0]
    return windows.sides(boxes, grid).float().view(predicted.shape)


def overlap(
    one: Bool[Tensor, "*batch patch other"], two: Bool[Tensor, "*batch patch other"]
) -> Float[Tensor, "*batch patch"]:
    """Intersection over union of two windows of each query, 0 apart to 1 the same."""
    return (one & two).sum(-1) / (one | two).sum(-1).clamp(min=1)


def _agreement(masks: Bool[Tensor, "image window patch other"], sides: Sides, grid: Grid) -> Tensor:
    return overlap(masks, hard_mask(sides, grid)).mean(-1)


def _open_weights(attention: LayerAttention) -> Float[Tensor, "image head query key"]:
    """The layer's attention as its queries and keys would have it without the mask."""
    q, k = attention.q, attention.k
    assert q is not None, "windows are masks of scaled_dot_product_attention"
    assert k is not None
    return torch.softmax(((q[:, 0] * attention.scale) @ k[:, 0].mT).float(), -1)


def _moved(sides: Sides, grid: Grid) -> Sides:
    """The same boxes, each given to another query of its image, fixed at random."""
    order = torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(0))
    row, column = _rows(grid), _columns(grid)
    right, down = column[order] - column, row[order] - row  # where the box's old query lies, seen from the new one
    return sides[:, :, order] + torch.stack([-right, -down, right, down], -1).to(sides)


def _to_border(grid: Grid) -> Int[Tensor, "patch side"]:
    """The sides that reach the border of the grid."""
    row, column = _rows(grid), _columns(grid)
    return torch.stack([column, row, grid[1] - 1 - column, grid[0] - 1 - row], -1)


def _rows(grid: Grid) -> Int[Tensor, "patch"]:
    return torch.arange(grid[0]).repeat_interleave(grid[1])


def _columns(grid: Grid) -> Int[Tensor, "patch"]:
    return torch.arange(grid[1]).repeat(grid[0])
