"""The collector of the measures of patches: what one plain pass says of interactions, layer by layer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.analysis import Collector, declaration
from vitrail.grid import box_means, positions
from vitrail.models.objects import object_shares
from vitrail.models.open import Vit
from vitrail.models.token_grid import share_grids
from vitrail.patches import field, windows
from vitrail.patches.hubs import find_hubs, sink_share
from vitrail.patches.integral import Integral, blocks
from vitrail.patches.interaction import mean_between_patches, normalise_rows
from vitrail.tap.budget import budget_of
from vitrail.tap.tap import LayerAttention, Readers, Replay, Tap

__all__ = ["patch_collectors"]

CHUNK_BYTES = 2**22
"""Bound on the attention maps in memory at once on a processor: few enough to stay near the core."""

GROUP_BYTES = 2**22
"""About the indicators that a processor measures at once: enough that the time goes into sums, not into calls."""

OF_WINDOWS = frozenset({"window", "window_object_share", "tendency"})
"""Measures that need the best box of each patch."""

FIELD_SHARE = 0.5
"""Share of a patch's interactions that its responsive field holds."""


Slots = Int[Tensor, "window slot"]
"""The token in each slot of each window, -1 for padding."""


@dataclass(frozen=True, eq=False)
class _PatchGrid:
    """Where the tokens of a layer's maps lie, and what windows of the model limit each patch to.

    `calls` are the attention calls of the layer with maps on this grid, each with its slots where it attends within
    windows, else None; `step` is `Block.patch_step`. What is measured is the mean over the heads of all of them.
    """

    grid: tuple[int, int]
    n_prefix: int
    step: tuple[int, int] | None
    calls: Mapping[int, Slots | None]

    @property
    def n_patches(self) -> int:
        """Number of patches."""
        return self.grid[0] * self.grid[1]

    @cached_property
    def reachable(self) -> Int[Tensor, "patch"] | None:
        """How many patches each patch can attend to, where windows limit that."""
        if not self._windows:
            return None
        reach = torch.zeros((self.n_patches, self.n_patches), dtype=torch.bool)
        for patches in self._windows:
            reach[patches[:, None], patches] = True
        return reach.sum(-1)

    @cached_property
    def extent(self) -> Int[Tensor, "patch side"] | None:
        """The box around all that each patch can attend to, where windows limit that."""
        if not self._windows:
            return None
        boxes = torch.tensor([*self.grid, 0, 0]).repeat(self.n_patches, 1)
        row_of, column_of = positions(self.grid, torch.arange)
        for patches in self._windows:
            row, column = row_of[patches], column_of[patches]
            boxes[patches, :2] = boxes[patches, :2].minimum(torch.stack([row.min(), column.min()]))
            boxes[patches, 2:] = boxes[patches, 2:].maximum(torch.stack([row.max(), column.max()]) + 1)
        return boxes

    @cached_property
    def _windows(self) -> list[Int[Tensor, "patch"]]:
        """The patches of each window of each call; none where one of the calls has no windows."""
        if any(slots is None for slots in self.calls.values()):
            return []
        return [members[members >= 0] for slots in self.calls.values() if slots is not None for members in slots]


def _patch_grids(vit: Vit) -> dict[int, _PatchGrid]:
    """By layer the grid of its first attention call with maps between patches, and the calls on the same grid."""
    grids: dict[int, _PatchGrid] = {}
    for (layer, call), tokens in share_grids(vit)[0].items():
        known = grids.get(layer, _PatchGrid(tokens.grid, tokens.n_prefix, vit.anatomy.blocks[layer].patch_step, {}))
        if (known.grid, known.n_prefix) == (tokens.grid, tokens.n_prefix):
            slots = None if tokens.slots is None else tokens.slots.cpu()
            grids[layer] = _PatchGrid(known.grid, known.n_prefix, known.step, {**known.calls, call: slots})
    return grids


def _group(matrices: Iterable[Float[Tensor, "image patch other"]]) -> Iterator[Float[Tensor, "image patch other"]]:
    """The same matrices, as many together as are measured at once."""
    group: list[Tensor] = []
    for matrix in matrices:
        group.append(matrix)
        if sum(each.nbytes for each in group) >= budget_of(matrix.device).bytes_for(GROUP_BYTES):
            yield torch.cat(group)
            group = []
    if group:
        yield torch.cat(group)


def _means_between_patches(
    attention: LayerAttention, tokens: _PatchGrid
) -> Iterator[Float[Tensor, "image patch other"]]:
    """The mean over heads of attention between patches, a few images at a time; windows put on the grid."""
    slots = tokens.calls[attention.call]
    chunk_bytes = budget_of(attention.v.device).bytes_for(CHUNK_BYTES)
    if slots is None:
        for _, weights in attention.weights_in_chunks(chunk_bytes):
            yield mean_between_patches(weights, tokens.n_prefix)
        return
    inside = _window_attention(attention, slots)
    step = max(1, chunk_bytes // (4 * tokens.n_patches**2))
    for start in range(0, len(inside), step):
        yield _scatter_to_grid(inside[start : start + step], slots, tokens.n_patches)


def patch_collectors(vit: Vit, names: Sequence[str], options: Mapping[str, str]) -> list[Collector]:
    """The collector of the measures of patches.

    Args:
        vit: the model, some of whose layers join patches of one grid.
        names: of measures that this model has.
        options: `window_area`, in percent of the grid.

    Returns:
        One collector.
    """
    return [_PatchCollector(vit.n_layers, names, _patch_grids(vit), int(options["window_area"]) / 100)]


class _PatchCollector:
    """Windows, responsive fields and hubs, read off each attention map while the plain pass makes it."""

    replays = False

    def __init__(
        self, n_layers: int, measures: Sequence[str], grids: Mapping[int, _PatchGrid], window_area: float
    ) -> None:
        self.measures = tuple(measures)
        self._n_layers, self._grids, self._window_area = n_layers, grids, window_area
        self._arrays: dict[int, dict[str, Tensor]] = {}
        self._sum: Tensor | None = None
        """Over the calls of the running layer so far, mean between patches times heads."""
        self._masks: Sequence[Int[np.ndarray, "_ _"] | None] = ()

    def take_masks(self, masks: Sequence[Int[np.ndarray, "_ _"] | None]) -> None:
        """Instance ids of the coming batch, as the model sees it."""
        self._masks = masks

    def readers(self) -> Readers:
        """Reads the attention of every layer whose map joins the patches of one grid."""
        return Readers(attention=self._read)

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """Arrays [image, layer, patch, ..]; NaN (hub and sink: False) where there is no grid or no such patch."""
        n_patches = max(tokens.n_patches for tokens in self._grids.values())
        arrays = {}
        for name in self.measures:
            inner = next(iter(self._arrays.values()))[name].shape[2:]
            empty = False if declaration(name).dtype == "bool" else np.nan
            patches = (n_patches,) if "patch" in declaration(name).dims else ()
            array = np.full((len(logits), self._n_layers, *patches, *inner), empty, dtype=declaration(name).dtype)
            for layer, values in self._arrays.items():
                rows = array[:, layer, : values[name].shape[1]] if patches else array[:, layer]
                rows[...] = values[name].cpu().numpy()
            arrays[name] = array
        self._arrays.clear()
        return arrays

    def _read(self, attention: LayerAttention) -> None:
        tokens = self._grids.get(attention.layer)
        if tokens is None or attention.call not in tokens.calls:
            return
        means: Iterable[Tensor] = _means_between_patches(attention, tokens)
        if len(tokens.calls) > 1:
            self._sum = torch.cat(list(means)) * attention.heads + (0 if self._sum is None else self._sum)
            if attention.call != max(tokens.calls):
                return
            means, self._sum = [self._sum], None  # rows are normalised, so the number of heads does not matter
        parts: list[dict[str, Tensor]] = []
        start = 0
        for matrix in _group(normalise_rows(mean) for mean in means):
            parts.append(self._measure(matrix, tokens, slice(start, start + len(matrix))))
            start += len(matrix)
        self._arrays[attention.layer] = {name: torch.cat([part[name] for part in parts]) for name in self.measures}

    def _measure(
        self, matrix: Float[Tensor, "image patch other"], tokens: _PatchGrid, images: slice
    ) -> dict[str, Tensor]:
        arrays: dict[str, Tensor] = {}
        if {*OF_WINDOWS, "field_size"} & set(self.measures):
            arrays |= self._measure_boxes(matrix, tokens, images)
        if "interaction_distance" in self.measures:
            arrays["interaction_distance"] = field.interaction_distance(matrix, tokens.grid)
        if "strongest_share" in self.measures:
            arrays["strongest_share"] = field.strongest_share(matrix, FIELD_SHARE)
        if {"hub", "sink", "sink_share"} & set(self.measures):
            of_layer = find_hubs(matrix, tokens.reachable)
            arrays |= {"hub": of_layer.hubs, "sink": of_layer.sinks, "sink_share": sink_share(matrix, of_layer.sinks)}
        return arrays

    def _measure_boxes(
        self, matrix: Float[Tensor, "image patch other"], tokens: _PatchGrid, images: slice
    ) -> dict[str, Tensor]:
        """What boxes tell, from one integral image of each block of rows."""
        grid, rows = tokens.grid, matrix.flatten(0, 1)
        n_patches = windows.n_patches_of(self._window_area, grid)
        fixed = None if tokens.extent is None else _boxes_in_windows(matrix, tokens, n_patches).flatten(0, 1)
        xy = field.xy_positions(grid).to(rows).repeat(len(matrix), 1)
        parts: dict[str, list[Tensor]] = {name: [] for name in ("window", "tendency", "field_size")}
        for part in blocks(rows):
            sums = Integral(rows[part], grid)
            if OF_WINDOWS & set(self.measures):
                boxes = sums.best_box(windows.shapes_of_area(grid, n_patches))[0] if fixed is None else fixed[part]
                parts["window"].append(boxes)
            if "tendency" in self.measures:
                parts["tendency"].append(sums.centre(boxes) - xy[part])
            if "field_size" in self.measures:
                parts["field_size"].append(sums.smallest_areas(FIELD_SHARE) / tokens.n_patches)
        arrays = {name: torch.cat(each).unflatten(0, matrix.shape[:2]) for name, each in parts.items() if each}
        if "window_object_share" in self.measures:
            covered = object_shares(self._masks[images], grid, tokens.step)
            shares = box_means(covered[:, None], arrays["window"].cpu().numpy()[:, None], grid)[:, 0]
            arrays["window_object_share"] = torch.from_numpy(shares)
        if "window" in arrays:
            has_window = windows.areas(arrays["window"]) > 0
            sides = windows.sides(arrays["window"], grid).float()
            arrays["window"] = torch.where(has_window[..., None], sides, torch.nan)
        return arrays


def _boxes_in_windows(matrix: Float[Tensor, "image patch other"], tokens: _PatchGrid, n_patches: int) -> windows.Boxes:
    """The best boxes where windows of the model are wider than the area; elsewhere the box around the window."""
    assert tokens.extent is not None
    boxes = tokens.extent.to(matrix.device).expand(len(matrix), -1, -1).clone()
    wide = windows.areas(tokens.extent) > n_patches
    if wide.any():
        boxes[:, wide] = windows.best_boxes(matrix[:, wide], tokens.grid, n_patches)[0]
    return boxes


def _window_attention(attention: LayerAttention, slots: Slots) -> Float[Tensor, "image window slot seen"]:
    """Mean over heads of attention within windows, rows renormalised without padding slots."""
    weights = attention.window_weights()
    real = (slots >= 0).to(weights)
    inside = weights * real[:, None, None, :]
    return (inside / inside.sum(-1, keepdim=True).clamp_min(torch.finfo(inside.dtype).tiny)).mean(2)


def _scatter_to_grid(
    inside: Float[Tensor, "image window slot seen"], slots: Slots, n_patches: int
) -> Float[Tensor, "image patch other"]:
    """Patch by patch maps: zero between patches of different windows."""
    slots = slots.to(inside.device)
    window, query, key = ((slots >= 0)[:, :, None] & (slots >= 0)[:, None, :]).nonzero(as_tuple=True)
    full = inside.new_zeros((len(inside), n_patches, n_patches))
    full[:, slots[window, query], slots[window, key]] = inside[:, window, query, key]
    return full
