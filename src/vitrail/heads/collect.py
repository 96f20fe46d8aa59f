"""Collectors of the measures of heads: objects that turn passes of the tap into arrays of a study.

Several collectors share one recorded plain pass (`readers`), then each may run passes of its own (`finish`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.analysis import Collector
from vitrail.errors import UsageError
from vitrail.heads.correction import FEWEST_EXACT, ONE_IN, is_swept
from vitrail.heads.estimate import ESTIMATED, estimate
from vitrail.heads.exact_names import EXACT_VALUES
from vitrail.heads.importance import LAYER_METRICS, HeadArrays, layers_without_residual, sweep
from vitrail.heads.means import MeanOutputs
from vitrail.heads.regions import Mode, mode_edits, modes_offered
from vitrail.heads.strength import Reach, count_hops, reach
from vitrail.models.open import Vit
from vitrail.models.task import Task
from vitrail.models.token_grid import TokenGrid, token_grids
from vitrail.patterns.maps import ComparableLayers, comparable_layers, read_pattern_maps
from vitrail.patterns.names import RULES
from vitrail.patterns.rules import rule_values
from vitrail.tap.anatomy import Anatomy
from vitrail.tap.maps import MapSource
from vitrail.tap.tap import LayerAttention, Readers, Replay, Tap

__all__ = ["head_collectors", "region_collectors", "rule_collectors"]

PARTS = (Mode.CROSS, Mode.PATCHES)
"""The parts of a head, in the order of the dimension `mode`."""

REACH_FIELDS = {
    "attention_strength": "strength",
    "strength_entropy": "entropy",
    "attention_distance": "distance",
    "prefix_share": "prefix_share",
}


def head_collectors(vit: Vit, names: Sequence[str], options: Mapping[str, str]) -> list[Collector]:
    """Collectors of the measures of heads.

    Args:
        vit: the model.
        names: of measures that this model has.
        options: `importance` ("exact" prunes every head in turn, "estimate" predicts the model metrics from one
            backward pass, "corrected" does so and prunes every head on one image in four; layer metrics stay exact),
            `ablation` ("mean" puts the head's mean output over the images in
            its place, not zero, for which all images are passed through once before) and `maps` ("bfloat16" computes
            attention maps in bfloat16 for the measures of distance).

    Returns:
        Collectors that share one plain pass.

    Raises:
        UsageError: an estimate is to be corrected and the measure of its exact values was not asked for.
    """
    estimated = [name for name in names if name in ESTIMATED] if options["importance"] != "exact" else []
    sampled = [name for name in names if name in EXACT_VALUES.values()]
    if options["importance"] == "corrected":
        _refuse_uncorrected(estimated, sampled)
    read = [name for name in names if name in REACH_FIELDS]
    swept = [name for name in names if name not in (*REACH_FIELDS, *estimated, *sampled)]
    result: list[Collector] = []
    if read:
        result.append(_ReachCollector(vit.anatomy, read, token_grids(vit)[0], _precision(options)))
    if swept:
        kind = _MeanSweepCollector if options["ablation"] == "mean" else _SweepCollector
        result.append(kind(vit.anatomy, swept, vit.task))
    if estimated:
        result.append(_EstimateCollector(vit.anatomy, estimated, vit.task))
    if sampled:
        result.append(_SampledSweepCollector(vit.anatomy, sampled, vit.task))
    return result


def _refuse_uncorrected(estimated: Sequence[str], sampled: Sequence[str]) -> None:
    lacking = [EXACT_VALUES[name] for name in estimated if EXACT_VALUES[name] not in sampled]
    if lacking:
        raise UsageError(
            f"Estimates are corrected by exact values, which are measures of their own: ask for {', '.join(lacking)} "
            "too, or for heads, which holds them all."
        )


def rule_collectors(vit: Vit, options: Mapping[str, str]) -> list[Collector]:
    """The collector of the numbers that patterns are named from.

    Args:
        vit: the model, some of whose layers have comparable maps.
        options: `maps`, as for `head_collectors`.

    Returns:
        One collector.
    """
    return [_RuleCollector(vit.anatomy, comparable_layers(vit), _precision(options))]


def region_collectors(vit: Vit) -> list[Collector]:
    """The collector of what parts of heads matter.

    Args:
        vit: a model with a classifier.

    Returns:
        One collector.
    """
    return [_RegionCollector(vit.anatomy, vit.task)]


def _precision(options: Mapping[str, str]) -> torch.dtype | None:
    return torch.bfloat16 if options["maps"] == "bfloat16" else None


class _ReachCollector:
    """How far heads look, read off each attention map while the plain pass makes it; `precision` as in `MapSource`."""

    replays = False

    def __init__(
        self,
        anatomy: Anatomy,
        measures: Sequence[str],
        grids: Mapping[tuple[int, int], TokenGrid],
        precision: torch.dtype | None = None,
    ) -> None:
        self.measures = tuple(measures)
        self._anatomy, self._grids, self._maps = anatomy, grids, MapSource(precision)
        self._reach: dict[tuple[int, int], Reach] = {}

    def readers(self) -> Readers:
        """Reads every attention whose map lies on a grid (`token_grids`)."""
        return Readers(attention=self._read)

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """Arrays [image, layer, head] and, for strength, [.., hop]; NaN for layers, heads, hops that are not there."""
        blocks = self._anatomy.blocks
        n_hops = max(count_hops(tokens.grid) for tokens in self._grids.values())
        shape = (len(logits), len(blocks), max(block.heads for block in blocks))
        arrays = {}
        for name in self.measures:
            array = np.full((*shape, n_hops) if name == "attention_strength" else shape, np.nan, dtype=np.float32)
            for (layer, call), tokens in self._grids.items():
                values = getattr(self._reach[layer, call], REACH_FIELDS[name]).cpu().numpy()
                array[:, layer, tokens.heads][tuple(slice(size) for size in values.shape)] = values
            arrays[name] = array
        self._reach.clear()
        return arrays

    def _read(self, attention: LayerAttention) -> None:
        tokens = self._grids.get((attention.layer, attention.call))
        if tokens is None:
            return
        if tokens.slots is not None:
            result = reach(attention.window_weights().flatten(0, 1), tokens)
        else:
            parts = [reach(weights, tokens) for weights in self._maps.parts(attention)]
            result = parts[0] if len(parts) == 1 else Reach(*map(torch.cat, zip(*parts, strict=True)))
        shares = attention.row_stochastic
        self._reach[attention.layer, attention.call] = result if shares else _strength_alone(result)


def _strength_alone(reach: Reach) -> Reach:
    """NaN for all that reads weights as shares of attention, which they are not where heads are mixed."""
    nothing = torch.full_like(reach.entropy, torch.nan)
    return Reach(reach.strength, nothing, nothing, nothing, nothing)


class _SweepCollector:
    """Exact importance by pruning; reads the plain residuals on the way so that no reference copy has to run."""

    replays = True

    def __init__(self, anatomy: Anatomy, measures: Sequence[str], task: Task) -> None:
        self.measures = tuple(measures)
        self._anatomy, self._task = anatomy, task
        self._fills: dict[tuple[int, int], Tensor] | None = None
        self._reads_tokens = any(name in LAYER_METRICS for name in measures)
        self._residuals: dict[int, Tensor] = {}
        self._without_residual: frozenset[int] | None = None

    def readers(self) -> Readers:
        """Reads each layer's tokens after attention and residual if a layer metric needs them."""
        return Readers(residual=self._store_residual) if self._reads_tokens else Readers()

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """Arrays [image, layer, head] of every measure."""
        targets = _targets(labels, logits) if self._task.n_classes is not None else None
        if self._without_residual is None:
            hidden = set(range(len(self._anatomy.blocks))) - set(self._residuals) if self._reads_tokens else set()
            self._without_residual = layers_without_residual(tap, replay, sorted(hidden))
        arrays = sweep(
            tap,
            self._anatomy,
            replay,
            logits,
            targets,
            self.measures,
            self._residuals,
            self._without_residual,
            self._fills,
            task=self._task,
        )
        self._residuals = {}
        return arrays

    def _store_residual(self, layer: int, tokens: Tensor) -> None:
        self._residuals[layer] = tokens.clone()  # some blocks go on to add to it in place


class _MeanSweepCollector(_SweepCollector):
    """Exact importance with a pruned head's mean output over the data set in its place; sees all images before."""

    def __init__(self, anatomy: Anatomy, measures: Sequence[str], task: Task) -> None:
        super().__init__(anatomy, measures, task)
        self._means = MeanOutputs(anatomy)

    def calibrate(self, tap: Tap, images: Float[Tensor, "image channel row column"], n_images: int) -> None:
        """One batch of the data set, of which the first `n_images` count."""
        self._means.add(tap, images, n_images)

    def calibration_statistics(self) -> dict[str, np.ndarray]:
        """The mean outputs of all heads."""
        return self._means.arrays()

    def load_calibration(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on with statistics computed before."""
        self._fills = MeanOutputs.by_call(arrays)

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """As `SweepCollector.finish`."""
        assert self._fills is not None, "the data set was not calibrated"
        return super().finish(tap, replay, logits, labels)


class _EstimateCollector:
    """Estimated importance: one forward and one backward pass for all heads."""

    replays = False

    def __init__(self, anatomy: Anatomy, measures: Sequence[str], task: Task) -> None:
        self.measures = tuple(measures)
        self._anatomy, self._task = anatomy, task

    def readers(self) -> Readers:
        """Needs nothing of the plain pass but its logits and its first block's input."""
        return Readers()

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """Arrays [image, layer, head] of every measure."""
        return estimate(tap, self._anatomy, replay, logits, _targets(labels, logits), self.measures, self._task)


class _SampledSweepCollector:
    """Exact importance on one image in four (`is_swept`); outside a study, where images have no place, on all."""

    replays = False

    def __init__(self, anatomy: Anatomy, measures: Sequence[str], task: Task) -> None:
        self.measures = tuple(measures)
        self._anatomy, self._task = anatomy, task
        self._swept = tuple(name for name, exact in EXACT_VALUES.items() if exact in measures)
        self._places: Sequence[int] | None = None

    def take_places(self, places: Sequence[int]) -> None:
        """The places of the coming batch."""
        self._places = places

    def refuse_few(self, n_images: int) -> None:
        """Refuses a study with fewer swept images than an interval needs."""
        n_swept = sum(map(is_swept, range(n_images)))
        if n_swept < FEWEST_EXACT:
            raise UsageError(
                f"Estimates are corrected by {FEWEST_EXACT} images or more on which every head is pruned, one image in "
                f"{ONE_IN}; of {n_images} images that is {n_swept}. Give {ONE_IN * FEWEST_EXACT} images or more, or "
                'take --importance exact (in Python options={"importance": "exact"}), which prunes every head on all.'
            )

    def readers(self) -> Readers:
        """Needs nothing of the plain pass but its images: those that are swept have a plain pass of their own."""
        return Readers()

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """Arrays [image, layer, head] of every measure; NaN on images that are not swept."""
        places = self._places
        rows = list(range(len(logits))) if places is None else [at for at, each in enumerate(places) if is_swept(each)]
        found = HeadArrays(self.measures, len(logits), [block.heads for block in self._anatomy.blocks]).arrays
        together = -(-len(logits) // ONE_IN)  # always so many: another number of images gives other last digits
        for start in range(0, len(rows), together):
            some = rows[start : start + together]
            filled = some + some[-1:] * (together - len(some))
            again, plain = tap.record(replay.images[filled])
            targets = _targets(labels[filled], plain)
            arrays = sweep(tap, self._anatomy, again, plain, targets, self._swept, {}, task=self._task)
            for name in self._swept:
                found[EXACT_VALUES[name]][some] = arrays[name][: len(some)]
        return found


class _RuleCollector:
    """The numbers that patterns are named from, read off each attention map; `precision` as in `MapSource`."""

    measures: tuple[str, ...] = ("pattern_rule",)
    replays = False

    def __init__(self, anatomy: Anatomy, layers: ComparableLayers, precision: torch.dtype | None = None) -> None:
        self._anatomy, self._layers, self._maps = anatomy, layers, MapSource(precision)
        self._values: dict[tuple[int, int], list[np.ndarray]] = {}

    def readers(self) -> Readers:
        """Reads every attention that has patterns."""
        return Readers(attention=self._read)

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """[image, layer, head, rule]; NaN for layers without patterns and heads that are not there."""
        blocks = self._anatomy.blocks
        shape = (len(logits), len(blocks), max(block.heads for block in blocks), len(RULES))
        array = np.full(shape, np.nan, dtype=np.float32)
        for (layer, call), pieces in self._values.items():
            array[:, layer, blocks[layer].calls[call].layer_heads] = np.concatenate(pieces)
        self._values.clear()
        return {"pattern_rule": array}

    def _read(self, attention: LayerAttention) -> None:
        for maps in read_pattern_maps(attention, self._layers, self._maps):
            values = rule_values(maps.block, self._layers.grid, maps.class_mass)
            self._values.setdefault((attention.layer, attention.call), []).append(values.cpu().numpy())


class _RegionCollector:
    """The label's probability without the class part of a head (mode 3) and without its patch part (mode 4)."""

    measures: tuple[str, ...] = ("head_region_probability",)
    replays = True

    def __init__(self, anatomy: Anatomy, task: Task) -> None:
        self._anatomy, self._task = anatomy, task

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
            for head in range(block.heads):
                if Mode.CROSS not in modes_offered(self._anatomy, layer, head):
                    continue
                edits = mode_edits(self._anatomy, layer, head, PARTS)
                rows = tap.run_from(layer, replay, edits=edits, copies=len(PARTS)).reshape(len(PARTS), *logits.shape)
                probability = self._task.label_log_probability(rows, targets.expand(len(PARTS), -1)).exp()
                array[:, layer, head] = probability.T.float().cpu().numpy()
        return {"head_region_probability": array}


def _targets(labels: Int[np.ndarray, "image"], logits: Tensor) -> Int[Tensor, "image"]:
    return torch.as_tensor(labels, dtype=torch.int64, device=logits.device)
