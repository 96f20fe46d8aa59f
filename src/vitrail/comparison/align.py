"""One measure of two studies on common cells: heads of a layer and patches are averaged, layers joined by depth."""

from dataclasses import dataclass, replace

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from vitrail.analysis import measures
from vitrail.comparison.pairs import Pair, StudySide
from vitrail.errors import UsageError
from vitrail.grid import patch_sides
from vitrail.heads.exact_names import EXACT_VALUES
from vitrail.layer_summary import is_in_patches
from vitrail.measure import Measure

__all__ = ["AlignedMeasure", "align", "alike_measures", "common_depths", "comparable_measures", "mean_of_present"]

AVERAGED = ("head", "patch", "token")
"""Dimensions whose members of two models need not correspond."""

SIDE = "share of the image's side"
"""Unit of lengths where patches are not all alike."""

OF_THE_GRID = frozenset({"strength_entropy"})
"""Measures whose numbers depend on how fine the grid is, beside those by hop: the highest entropy is the logarithm of
the number of hops."""

MOST_PROPORTIONS = 1.1
"""Views whose proportions differ by more than this factor have no side in common."""

BLOCK_BYTES = 64 * 2**20
"""Read at a time: measures of every patch are too large to hold."""


@dataclass(frozen=True, eq=False)
class AlignedMeasure:
    """A measure of the paired images in both studies.

    Attributes:
        measure: Its declaration, with the unit of the values here.
        dims: What remains beside the image: "layer", and dimensions of fixed meaning such as "hop".
        a, b: The values, [image, *dims] in float64; NaN where an image has none.
        by_head: The same [image layer head] of both, where both models have the same heads and the measure is of heads.
    """

    measure: Measure
    dims: tuple[str, ...]
    a: Float[np.ndarray, "image *cells"]
    b: Float[np.ndarray, "image *cells"]
    by_head: tuple[Float[np.ndarray, "image layer head"], Float[np.ndarray, "image layer head"]] | None

    @property
    def limits(self) -> tuple[float, float] | None:
        """The range that a difference can have at all, if there is one."""
        is_flag = self.measure.dtype == "bool"
        value_range = (0.0, 1.0) if is_flag else self.measure.value_range
        return None if value_range is None else (value_range[0] - value_range[1], value_range[1] - value_range[0])


def comparable_measures(pair: Pair, names: list[str] | None = None) -> tuple[list[Measure], dict[str, str]]:
    """The measures that both studies hold and that mean the same in both.

    Args:
        pair: Two studies.
        names: Of measures that are asked for; None for all.

    Returns:
        The measures, and the reason by name of each that only one study holds or that cannot be compared.

    Raises:
        UsageError: A measure that is asked for cannot be compared, or there is none at all.
    """
    candidates = _quantities(pair)
    reasons = {measure.name: reason for measure in candidates if (reason := _why_not(pair, measure))}
    usable = [measure for measure in candidates if measure.name not in reasons]
    if names is not None:
        _refuse_missing(names, reasons, {measure.name for measure in candidates})
        usable = [measure for measure in usable if measure.name in names]
    if not usable:
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UsageError(
            f"{pair.a.folder} and {pair.b.folder} hold no measure that can be compared. {said or 'Measure both'}."
        )
    return usable, reasons


def alike_measures(pair: Pair) -> list[str]:
    """The measures whose numbers mean the same in both studies, so that they can be drawn side by side.

    Args:
        pair: Two studies.

    Returns:
        Names of `comparable_measures`, and of those that have no mean to compare, such as the sides of a box.
    """
    return [measure.name for measure in _quantities(pair) if not _why_unlike(pair, measure)]


def _quantities(pair: Pair) -> list[Measure]:
    """The measures of images that one of the studies holds or both."""
    stored = {str(name) for side in (pair.a, pair.b) for name in side.data.data_vars}
    return [
        measure
        for measure in measures().values()
        if measure.is_quantity and measure.dims[0] == "image" and measure.name in stored
    ]


def _refuse_missing(names: list[str], reasons: dict[str, str], candidates: set[str]) -> None:
    for name in names:
        if name in reasons:
            raise UsageError(f"{name} was to be compared: {reasons[name]}.")
        if name not in candidates:
            raise UsageError(f"{name} was to be compared; the studies hold: {', '.join(sorted(candidates))}.")


def _why_not(pair: Pair, measure: Measure) -> str:
    if reason := _why_unlike(pair, measure):
        return reason
    if measure.several_kinds:
        return f"its numbers along {measure.several_kinds!r} are of several kinds, which have no mean in common"
    return ""


def _why_unlike(pair: Pair, measure: Measure) -> str:
    name = measure.name
    for side in (pair.a, pair.b):
        if name not in side.data:
            return f"{side.folder.name} does not hold it"
    if name in EXACT_VALUES and "corrected" in (pair.a.option("importance"), pair.b.option("importance")):
        return f"its values are estimates; {EXACT_VALUES[name]} has the images with exact ones"
    versions = [side.plan.measures.get(name) for side in (pair.a, pair.b)]
    if versions[0] != versions[1]:
        return f"it was computed by versions {versions[0]} and {versions[1]} of its definition"
    for choice in measure.depends_on or ():
        if choice == "label":
            if pair.label_reason:
                return pair.label_reason
        elif pair.a.option(choice) != pair.b.option(choice):
            return f"the studies differ in the option {choice} ({pair.a.option(choice)} and {pair.b.option(choice)})"
    if reason := _why_not_across_grids(pair, measure):
        return reason
    sizes = [dict(side.data[name].sizes) for side in (pair.a, pair.b)]
    for dimension in measure.dims[1:]:
        fixed = dimension not in ("layer", *AVERAGED)
        if fixed and sizes[0][dimension] != sizes[1][dimension]:
            return (
                f"it has {sizes[0][dimension]} and {sizes[1][dimension]} values along {dimension!r}, as the grids of "
                "the two models differ"
            )
    return ""


def _why_not_across_grids(pair: Pair, measure: Measure) -> str:
    """Whether numbers of a grid would be compared with those of a finer one as if they were the same."""
    a, b, same = pair.a.plan.grids, pair.b.plan.grids, pair.same_layers
    alike = same is not None and [a[layer] for layer in same.a] == [b[layer] for layer in same.b]
    known = [[grid for grid in grids if grid is not None] for grids in (a, b)]
    if alike or _has_one_grid(pair) or not all(known):
        return ""
    first = [grids[0] for grids in known]
    if is_in_patches(measure.unit):
        proportions = [rows / columns for rows, columns in first]
        if "layer" in measure.dims and max(proportions) <= MOST_PROPORTIONS * min(proportions):
            return ""
        return "it is counted in patches, and the two models see images of other proportions"
    if measure.name in OF_THE_GRID or "hop" in measure.dims:
        words = " and ".join(f"{rows} x {columns}" for rows, columns in first)
        return f"its numbers depend on the grid of patches, and those of the two models differ ({words})"
    return ""


def _has_one_grid(pair: Pair) -> bool:
    """All layers of both models that have a grid have the same."""
    return len({tuple(grid) for side in (pair.a, pair.b) for grid in side.plan.grids if grid is not None}) < 2


def align(pair: Pair, measure: Measure) -> AlignedMeasure:
    """Reads one measure of both studies onto common cells.

    Args:
        pair: Two studies.
        measure: One of `comparable_measures`.

    Returns:
        Its values of the paired images, of the blocks that have attention in both models. Where the models have other
        numbers of blocks, values are taken at the depths of the one with fewer layers, linearly between layers. Lengths
        in patches are shares of the image's side where not all layers of both have one grid.
    """
    keep = measure.dims == ("image", "layer", "head") and pair.same_heads
    full = [_read(side, measure, reduce=not keep) for side in (pair.a, pair.b)]
    if "label" in (measure.depends_on or ()):
        for values in full:
            values[~pair.same_label()] = np.nan
    if is_in_patches(measure.unit) and "layer" in measure.dims and not _has_one_grid(pair):
        measure = replace(measure, unit=measure.unit.replace("patches", SIDE, 1))
        full = [_in_sides(side, values) for side, values in zip((pair.a, pair.b), full, strict=True)]
    by_head = (full[0], full[1]) if keep else None
    cells = [mean_of_present(values, (2,)) for values in full] if keep else full
    dims = tuple(dimension for dimension in measure.dims[1:] if dimension not in AVERAGED)
    if "layer" in dims:
        at = 1 + dims.index("layer")
        if (same := pair.same_layers) is not None:
            cells = [np.take(values, layers, at) for layers, values in zip((same.a, same.b), cells, strict=True)]
        else:
            own, common = (pair.a.plan.depths, pair.b.plan.depths), common_depths(pair)
            cells = [_at_depths(values, at, depths, common) for depths, values in zip(own, cells, strict=True)]
    return AlignedMeasure(measure, dims, cells[0], cells[1], by_head)


def common_depths(pair: Pair) -> Float[np.ndarray, "layer"]:
    """Where the layers of a comparison lie between input and output.

    Args:
        pair: Two studies.

    Returns:
        The middle of each block that has attention in both models, 0 to 1; where the models have other numbers of
        blocks, those of the one with fewer layers.
    """
    same = pair.same_layers
    fewer = min((pair.a.plan, pair.b.plan), key=lambda plan: plan.n_layers)
    return np.array(fewer.depths if same is None else same.depths)


def _in_sides(
    side: StudySide, values: Float[np.ndarray, "image layer *rest"]
) -> Float[np.ndarray, "image layer *rest"]:
    """Lengths in patches as shares of the image's side."""
    return np.asarray(values * patch_sides(side.plan.grids).reshape(-1, *[1] * (values.ndim - 2)))


def _read(side: StudySide, measure: Measure, *, reduce: bool) -> Float[np.ndarray, "image *cells"]:
    """The rows of the pair; means over heads, patches and tokens where the measure has them."""
    array = side.data[measure.name]
    axes = tuple(axis for axis, name in enumerate(measure.dims) if name in AVERAGED) if reduce else ()
    step = max(1, int(BLOCK_BYTES / max(1, array.nbytes / array.sizes["image"])))
    blocks = [
        _block(side, array.isel(image=slice(start, start + step)), axes)
        for start in range(0, array.sizes["image"], step)
    ]
    values: Float[np.ndarray, "image *cells"] = np.concatenate(blocks)[side.rows]
    return values


def _block(side: StudySide, block: xr.DataArray, axes: tuple[int, ...]) -> Float[np.ndarray, "image *cells"]:
    values = np.asarray(block.values, dtype=np.float64)
    if "layer" in block.dims and block.dtype.kind in "bui":  # padding of such measures looks like a value
        n_patches = [grid[0] * grid[1] if grid else 0 for grid in side.plan.grids]
        for dimension, counts in (("head", side.plan.n_heads), ("patch", n_patches)):
            if dimension in block.dims:
                present = np.arange(block.sizes[dimension]) < np.asarray(counts)[:, None]
                order = [block.dims.index(name) for name in ("layer", dimension)]
                shape = [size if axis in order else 1 for axis, size in enumerate(values.shape)]
                values = np.where(present.reshape(shape), values, np.nan)
    return mean_of_present(values, axes) if axes else values


def mean_of_present(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The mean over what is there.

    Args:
        values: Numbers, NaN where there is none.
        axes: Which axes go.

    Returns:
        Means; NaN where nothing is there.
    """
    is_present = ~np.isnan(values)
    count = is_present.sum(axes)
    total = np.where(is_present, values, 0.0).sum(axes)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _at_depths(
    values: Float[np.ndarray, "image *cells"], axis: int, own: list[float], depths: Float[np.ndarray, "depth"]
) -> np.ndarray:
    """Linear between the middles of layers; the outermost layers stand for what lies beyond their middle."""
    n_layers = len(own)
    position: Float[np.ndarray, "depth"] = np.interp(depths, own, np.arange(n_layers))
    below: Int[np.ndarray, "depth"] = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, n_layers - 1)
    shape = [1] * values.ndim
    shape[axis] = len(depths)
    share = (position - below).reshape(shape)
    lower, upper = np.take(values, below, axis), np.take(values, above, axis)
    return np.where(share > 0, lower + share * (upper - lower), lower)
