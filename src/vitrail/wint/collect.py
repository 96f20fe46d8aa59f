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
from vitrail.wint.model import hard_mask

__all__ = ["WindowCollector", "measured_sides", "overlap", "sides_of_mask"]

Grid = tuple[int, int]
Sides = Float[Tensor, "image window patch side"]


class WindowCollector:
    """Reads predicted windows off the mask of each attention call of the plain pass, and compares them with windows of
    the same area that are measured, as the patches room does, in each head's attention."""

    replays = False

    def __init__(self, vit: Vit, measures: Sequence[str]) -> None:
        self.measures = tuple(measures)
        self._n_layers, self._n_heads = vit.n_layers, max(vit.n_heads)
        self._found: dict[int, dict[str, Tensor]] = {}

    def readers(self) -> Readers:
        """Reads the attention of every layer."""
        return Readers(attention=self._read)

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """Arrays [image, layer, head, ..]; NaN (windows: -1) where a layer has no grid."""
        return self.collected()

    def collected(self) -> dict[str, np.ndarray]:
        """The arrays of the pass that was read, once."""
        arrays = {}
        for name in self.measures:
            first = next(iter(self._found.values()))[name]
            whole = MEASURES[name].dtype == "int16"
            shape = (len(first), self._n_layers, self._n_heads, *first.shape[2:])
            array = np.full(shape, -1 if whole else np.nan, dtype=MEASURES[name].dtype)
            for layer, found in self._found.items():
                array[:, layer, : found[name].shape[1]] = found[name].cpu().numpy()
            arrays[name] = array
        self._found.clear()
        return arrays

    def _read(self, attention: LayerAttention) -> None:
        if attention.call != 0 or attention.grid is None:
            return
        weights, grid, prefix = attention.weights(), attention.grid, attention.prefix
        predicted = sides_of_mask(attention.mask, len(weights), grid)
        masks = hard_mask(predicted, grid)
        found = {"predicted_window": predicted, "predicted_area": masks.float().mean((-1, -2))}
        if "predicted_overlap" in self.measures:
            found["predicted_overlap"] = _agreement(masks, measured_sides(weights, prefix, predicted, grid), grid)
        if {"predicted_overlap_open", "predicted_overlap_moved"} & set(self.measures):
            measured = measured_sides(_open_weights(attention), prefix, predicted, grid)
            found["predicted_overlap_open"] = _agreement(masks, measured, grid)
            found["predicted_overlap_moved"] = _agreement(masks, _moved(measured, grid), grid)
        self._found[attention.layer] = {
            name: found[name].expand(-1, attention.heads, *found[name].shape[2:]) for name in self.measures
        }


def sides_of_mask(mask: Tensor | None, n_images: int, grid: Grid) -> Sides:
    """The windows that a mask of attention leaves open between patches, as sides, cut at the grid's border.

    `mask`: additive or bool, broadcastable to [image head query key], patches last among queries and keys; None: open.
    """
    n_patches = grid[0] * grid[1]
    if mask is None:
        seen = torch.ones((1, 1, n_patches, n_patches), dtype=torch.bool)
    else:
        seen = mask[..., -n_patches:, -n_patches:]
        seen = (seen if seen.dtype == torch.bool else seen > -torch.inf).expand(-1, -1, n_patches, -1)
    cells = seen.unflatten(-1, grid)
    reached = []
    for axis, own in ((-1, _columns(grid)), (-2, _rows(grid))):
        held = cells.any(-1 if axis == -2 else -2).float()
        first, last = held.argmax(-1), held.shape[-1] - 1 - held.flip(-1).argmax(-1)
        reached.append((own.to(first.device) - first, last - own.to(first.device)))
    (left, right), (top, bottom) = reached
    sides = torch.stack([left, top, right, bottom], -1).float()
    return sides.expand(n_images, -1, -1, -1)


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


def _rows(grid: Grid) -> Int[Tensor, "patch"]:
    return torch.arange(grid[0]).repeat_interleave(grid[1])


def _columns(grid: Grid) -> Int[Tensor, "patch"]:
    return torch.arange(grid[1]).repeat(grid[0])
