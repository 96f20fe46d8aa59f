"""The collector of the patches room: what one plain pass says of interactions, layer by layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.measure import MEASURES
from vitrail.patches import field, windows
from vitrail.patches.hubs import hubs
from vitrail.patches.integral import Integral, blocks
from vitrail.patches.interaction import indicator, normalised
from vitrail.vit.ground import grounds_of_layers
from vitrail.vit.open import Vit
from vitrail.vit.tap import LayerAttention, Readers, Replay, Tap

__all__ = ["FIELD_SHARE", "Ground", "PatchCollector", "grids_of_layers", "indicators_of"]

CHUNK_BYTES = 2**22
"""About the attention maps that are held at once: few enough to stay near the core."""

GROUP_BYTES = 2**22
"""About the indicators that are measured at once: enough that the time goes into sums, not into calls."""

FIELD_SHARE = 0.5
"""The responsive field is the smallest box with this share of a patch's interactions."""


@dataclass(frozen=True, eq=False)
class Ground:
    """Where the tokens of a layer's map lie: `prefix` tokens, then the patches of `grid` (rows, columns).

    `slots`, for attention within windows: the token in each slot of each window, -1 for padding.
    """

    grid: tuple[int, int]
    prefix: int = 0
    slots: Int[Tensor, "window slot"] | None = None

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @cached_property
    def reachable(self) -> Int[Tensor, "patch"] | None:
        """How many patches each patch can attend to, where windows limit that."""
        if self.slots is None:
            return None
        real = self.slots >= 0
        counts = torch.zeros(self.n_patches, dtype=torch.int64)
        counts[self.slots[real]] = real.sum(-1, keepdim=True).expand_as(real)[real]
        return counts

    @cached_property
    def extent(self) -> Int[Tensor, "patch side"] | None:
        """The box around all that each patch can attend to, where windows limit that."""
        if self.slots is None:
            return None
        boxes = torch.zeros((self.n_patches, 4), dtype=torch.int64)
        for members in self.slots:
            tokens = members[members >= 0]
            row, column = tokens // self.grid[1], tokens % self.grid[1]
            boxes[tokens] = torch.stack([row.min(), column.min(), row.max() + 1, column.max() + 1])
        return boxes


def grids_of_layers(vit: Vit) -> tuple[dict[int, Ground], dict[int, str]]:
    """The ground of each layer whose map joins patches of one grid; and why the others have none."""
    grounds, refused = grounds_of_layers(vit)
    return {
        layer: Ground(grid, prefix, None if slots is None else slots.cpu())
        for layer, (grid, prefix, slots) in grounds.items()
    }, refused


def indicators_of(attention: LayerAttention, ground: Ground) -> Iterator[Float[Tensor, "image patch other"]]:
    """The default indicator of one layer, a group of images at a time; windows put on the grid."""
    group: list[Tensor] = []
    for matrix in _few_indicators_of(attention, ground):
        group.append(matrix)
        if sum(each.nbytes for each in group) >= GROUP_BYTES:
            yield torch.cat(group)
            group = []
    if group:
        yield torch.cat(group)


def _few_indicators_of(attention: LayerAttention, ground: Ground) -> Iterator[Float[Tensor, "image patch other"]]:
    if ground.slots is None:
        for _, weights in attention.weights_in_chunks(CHUNK_BYTES):
            yield indicator(weights, ground.prefix)
        return
    inside = _inside_windows(attention, ground.slots)
    step = max(1, CHUNK_BYTES // (4 * ground.n_patches**2))
    for start in range(0, len(inside), step):
        yield _on_grid(inside[start : start + step], ground.slots, ground.n_patches)


class PatchCollector:
    """Windows, responsive fields and hubs, read off each attention map while the plain pass makes it."""

    replays = False

    def __init__(
        self, n_layers: int, measures: Sequence[str], grounds: Mapping[int, Ground], window_area: float
    ) -> None:
        self.measures = tuple(measures)
        self._n_layers, self._grounds, self._window_area = n_layers, grounds, window_area
        self._found: dict[int, dict[str, Tensor]] = {}

    def readers(self) -> Readers:
        """Reads the attention of every layer that has a ground."""
        return Readers(attention=self._read)

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """Arrays [image, layer, patch, ..]; NaN (hub: False) where there is no grid or no such patch."""
        n_patches = max(ground.n_patches for ground in self._grounds.values())
        arrays = {}
        for name in self.measures:
            inner = next(iter(self._found.values()))[name].shape[2:]
            empty = False if MEASURES[name].dtype == "bool" else np.nan
            array = np.full((len(logits), self._n_layers, n_patches, *inner), empty, dtype=MEASURES[name].dtype)
            for layer, found in self._found.items():
                array[:, layer, : found[name].shape[1]] = found[name].cpu().numpy()
            arrays[name] = array
        self._found.clear()
        return arrays

    def _read(self, attention: LayerAttention) -> None:
        ground = self._grounds.get(attention.layer)
        if attention.call != 0 or ground is None:
            return
        parts = [self._measured(matrix, ground) for matrix in indicators_of(attention, ground)]
        self._found[attention.layer] = {name: torch.cat([part[name] for part in parts]) for name in self.measures}

    def _measured(self, matrix: Float[Tensor, "image patch other"], ground: Ground) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if {"window", "tendency", "field_size"} & set(self.measures):
            found |= self._of_boxes(matrix, ground)
        if "interaction_distance" in self.measures:
            found["interaction_distance"] = field.interaction_distance(matrix, ground.grid)
        if "hub" in self.measures:
            found["hub"] = hubs(matrix, ground.reachable).found
        return found

    def _of_boxes(self, matrix: Float[Tensor, "image patch other"], ground: Ground) -> dict[str, Tensor]:
        """What boxes tell, from one integral image of each block of rows."""
        grid, rows = ground.grid, matrix.flatten(0, 1)
        n_patches = windows.n_patches_of(self._window_area, grid)
        given = None if ground.extent is None else _boxes_within(matrix, ground, n_patches).flatten(0, 1)
        place = field.positions(grid).to(rows).repeat(len(matrix), 1)
        parts: dict[str, list[Tensor]] = {name: [] for name in ("window", "tendency", "field_size")}
        for part in blocks(rows):
            sums = Integral(rows[part], grid)
            if "window" in self.measures or "tendency" in self.measures:
                boxes = sums.best_box(windows.shapes_of_area(grid, n_patches))[0] if given is None else given[part]
                parts["window"].append(boxes)
            if "tendency" in self.measures:
                parts["tendency"].append(sums.centre(boxes) - place[part])
            if "field_size" in self.measures:
                parts["field_size"].append(sums.area_holding(FIELD_SHARE, windows.ladder(grid)) / ground.n_patches)
        found = {name: torch.cat(each).unflatten(0, matrix.shape[:2]) for name, each in parts.items() if each}
        if "window" in found:
            found["window"] = windows.sides(found["window"], grid).float()
        return found


def _boxes_within(matrix: Float[Tensor, "image patch other"], ground: Ground, n_patches: int) -> windows.Boxes:
    """The best boxes where windows of the model are wider than the area; elsewhere the box around the window."""
    assert ground.extent is not None
    boxes = ground.extent.to(matrix.device).expand(len(matrix), -1, -1).clone()
    wide = windows.areas(ground.extent) > n_patches
    if wide.any():
        boxes[:, wide] = windows.best_boxes(matrix[:, wide], ground.grid, n_patches)[0]
    return boxes


def _inside_windows(
    attention: LayerAttention, slots: Int[Tensor, "window slot"]
) -> Float[Tensor, "image window slot seen"]:
    """Mean over heads of attention within windows, rows renormalised without padding slots."""
    weights = attention.window_weights()
    real = (slots >= 0).to(weights)
    inside = weights * real[:, None, None, :]
    return (inside / inside.sum(-1, keepdim=True).clamp_min(torch.finfo(inside.dtype).tiny)).mean(2)


def _on_grid(
    inside: Float[Tensor, "image window slot seen"], slots: Int[Tensor, "window slot"], n_patches: int
) -> Float[Tensor, "image patch other"]:
    """Token by token maps: zero between patches of different windows."""
    slots = slots.to(inside.device)
    window, query, key = ((slots >= 0)[:, :, None] & (slots >= 0)[:, None, :]).nonzero(as_tuple=True)
    full = inside.new_zeros((len(inside), n_patches, n_patches))
    full[:, slots[window, query], slots[window, key]] = inside[:, window, query, key]
    return normalised(full)
