"""Collectors of the heads room: objects that turn passes of the tap into arrays of a study.

Several collectors share one recorded plain pass (`readers`), then each may run passes of its own (`finish`).
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.heads.estimate import estimate
from vitrail.heads.importance import silent_layers, sweep
from vitrail.heads.maps import MapSource
from vitrail.heads.metrics import label_log_probability
from vitrail.heads.pattern_maps import PatternGround, read_pictures
from vitrail.heads.pattern_names import RULES
from vitrail.heads.pattern_rules import rule_values
from vitrail.heads.regions import Mode, mode_edit, modes_offered
from vitrail.heads.strength import Layout, Reach, reach
from vitrail.vit.anatomy import Anatomy
from vitrail.vit.ground import grounds_of_layers
from vitrail.vit.open import Vit
from vitrail.vit.tap import LayerAttention, Readers, Replay, Tap

__all__ = [
    "Collector",
    "EstimateCollector",
    "ReachCollector",
    "RegionCollector",
    "RuleCollector",
    "SweepCollector",
    "layouts_on_grid",
]

PARTS = (Mode.CROSS, Mode.PATCHES)
"""The parts of a head, in the order of the dimension `mode`."""

REACH_FIELDS = {
    "attention_strength": "strength",
    "strength_entropy": "entropy",
    "attention_distance": "distance",
    "prefix_share": "prefix_share",
}


def layouts_on_grid(vit: Vit) -> tuple[dict[int, Layout], dict[int, str]]:
    """Where the tokens of each layer's map lie, for layers that join patches of one grid; and why the others do not."""
    grounds, refused = grounds_of_layers(vit)
    layouts = {
        layer: Layout(grid, prefix, None if slots is None else tuple(map(tuple, slots.tolist())))
        for layer, (grid, prefix, slots) in grounds.items()
    }
    return layouts, refused


class Collector(Protocol):
    """Computes some measures of a batch of images; used for one batch after the other."""

    measures: tuple[str, ...]
    replays: bool
    """Whether `finish` runs from the middle of the plain pass, so that its tokens must be kept."""

    def readers(self) -> Readers:
        """What to read in the plain pass."""

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """The batch's arrays, by measure name; they lead with the image dimension."""


class ReachCollector:
    """How far heads look, read off each attention map while the plain pass makes it; `precision` as in `MapSource`."""

    replays = False

    def __init__(
        self,
        anatomy: Anatomy,
        measures: Sequence[str],
        layouts: Mapping[int, Layout],
        precision: torch.dtype | None = None,
    ) -> None:
        self.measures = tuple(measures)
        self._anatomy, self._layouts, self._maps = anatomy, layouts, MapSource(precision)
        self._found: dict[int, Reach] = {}

    def readers(self) -> Readers:
        """Reads the attention of every layer whose map lies on a grid (`layouts_on_grid`)."""
        return Readers(attention=self._read)

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """Arrays [image, layer, head] and, for strength, [.., hop]; NaN for layers, heads, hops that are not there."""
        blocks = self._anatomy.blocks
        n_hops = max(layout.n_hops for layout in self._layouts.values())
        shape = (len(logits), len(blocks), max(block.heads for block in blocks))
        arrays = {}
        for name in self.measures:
            array = np.full((*shape, n_hops) if name == "attention_strength" else shape, np.nan, dtype=np.float32)
            for layer in self._layouts:
                values = getattr(self._found[layer], REACH_FIELDS[name]).cpu().numpy()
                array[:, layer][tuple(slice(size) for size in values.shape)] = values
            arrays[name] = array
        self._found.clear()
        return arrays

    def _read(self, attention: LayerAttention) -> None:
        if attention.call != 0 or attention.layer not in self._layouts:
            return
        layout = self._layouts[attention.layer]
        if layout.windows is not None:
            found = reach(attention.window_weights().flatten(0, 1), layout)
        else:
            parts = [reach(weights, layout) for weights in self._maps.parts(attention)]
            found = parts[0] if len(parts) == 1 else Reach(*map(torch.cat, zip(*parts, strict=True)))
        self._found[attention.layer] = found


class SweepCollector:
    """Exact importance by pruning; reads the plain residuals on the way so that no spare copy has to run."""

    replays = True

    def __init__(self, anatomy: Anatomy, measures: Sequence[str], has_classes: bool) -> None:
        self.measures = tuple(measures)
        self._anatomy, self._has_classes = anatomy, has_classes
        self._reads_tokens = any("shift" in name for name in measures)
        self._residuals: dict[int, Tensor] = {}
        self._silent: frozenset[int] | None = None

    def readers(self) -> Readers:
        """Reads each layer's tokens after attention and residual if a layer metric needs them."""
        return Readers(residual=self._keep) if self._reads_tokens else Readers()

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """Arrays [image, layer, head] of every measure."""
        targets = _targets(labels, logits) if self._has_classes else None
        if self._silent is None:
            hidden = set(range(len(self._anatomy.blocks))) - set(self._residuals) if self._reads_tokens else set()
            self._silent = silent_layers(tap, replay, sorted(hidden))
        arrays = sweep(tap, self._anatomy, replay, logits, targets, self.measures, self._residuals, self._silent)
        self._residuals = {}
        return arrays

    def _keep(self, layer: int, tokens: Tensor) -> None:
        self._residuals[layer] = tokens.clone()  # some blocks go on to add to it in place


class EstimateCollector:
    """Estimated importance: one forward and one backward pass for all heads."""

    replays = False

    def __init__(self, anatomy: Anatomy, measures: Sequence[str]) -> None:
        self.measures = tuple(measures)
        self._anatomy = anatomy

    def readers(self) -> Readers:
        """Needs nothing of the plain pass but its logits and its first block's input."""
        return Readers()

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """Arrays [image, layer, head] of every measure."""
        return estimate(tap, self._anatomy, replay, logits, _targets(labels, logits), self.measures)


class RuleCollector:
    """The numbers that patterns are named from, read off each attention map; `precision` as in `MapSource`."""

    measures: tuple[str, ...] = ("pattern_rule",)
    replays = False

    def __init__(self, anatomy: Anatomy, ground: PatternGround, precision: torch.dtype | None = None) -> None:
        self._anatomy, self._ground, self._maps = anatomy, ground, MapSource(precision)
        self._found: dict[int, list[np.ndarray]] = {}

    def readers(self) -> Readers:
        """Reads the attention of every layer that has patterns."""
        return Readers(attention=self._read)

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """[image, layer, head, rule]; NaN for layers without patterns and heads that are not there."""
        blocks = self._anatomy.blocks
        shape = (len(logits), len(blocks), max(block.heads for block in blocks), len(RULES))
        array = np.full(shape, np.nan, dtype=np.float32)
        for layer, pieces in self._found.items():
            array[:, layer, : self._anatomy.blocks[layer].heads] = np.concatenate(pieces)
        self._found.clear()
        return {"pattern_rule": array}

    def _read(self, attention: LayerAttention) -> None:
        for pictures in read_pictures(attention, self._ground, self._maps):
            values = rule_values(pictures.block, self._ground.grid, pictures.class_mass)
            self._found.setdefault(attention.layer, []).append(values.cpu().numpy())


class RegionCollector:
    """The label's probability without the class part of a head (mode 3) and without its patch part (mode 4)."""

    measures: tuple[str, ...] = ("head_region_probability",)
    replays = True

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy

    def readers(self) -> Readers:
        """Needs nothing of the plain pass but where to run from."""
        return Readers()

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """[image, layer, head, mode]; NaN for heads that are not there and layers without a class token's map."""
        blocks, targets = self._anatomy.blocks, _targets(labels, logits)
        array = np.full((len(logits), len(blocks), max(b.heads for b in blocks), len(PARTS)), np.nan, np.float32)
        for layer, block in enumerate(blocks):
            if Mode.CROSS not in modes_offered(self._anatomy, layer):
                continue
            for head in range(block.heads):
                edits = [mode_edit(self._anatomy, layer, head, mode, copy) for copy, mode in enumerate(PARTS)]
                rows = tap.run_from(layer, replay, edits=edits, copies=len(edits)).reshape(len(edits), *logits.shape)
                found = label_log_probability(rows, targets.expand(len(edits), -1)).exp()
                array[:, layer, head] = found.T.float().cpu().numpy()
        return {"head_region_probability": array}


def _targets(labels: Int[np.ndarray, "image"], logits: Tensor) -> Int[Tensor, "image"]:
    return torch.as_tensor(labels, dtype=torch.int64, device=logits.device)
