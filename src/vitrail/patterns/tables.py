"""What a study says of patterns, in tables: the pattern of each head, and of each cluster. No torch."""

from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from vitrail.errors import UsageError
from vitrail.patterns.names import NAMES, PatternName, common_grid, name_pattern, pattern_indices, typical_values

__all__ = ["Cluster", "HeadPattern", "all_patterns", "pattern_clusters", "pattern_grid", "pattern_of_head"]


@dataclass(frozen=True)
class HeadPattern:
    """The pattern of a head over all images.

    Attributes:
        layer: Index of the layer.
        head: Index of the head.
        naming: The name that its typical numbers take.
        values: Those numbers, in the order of `RULES`.
        share: Share of the images whose map takes that name by itself, 0 to 1; NaN for the name "none".
        others: The names that the other images take, each with its share, the commonest first.
        image_dependence: 0 (the same map for all images) to 1; None where the study does not hold it.
    """

    layer: int
    head: int
    naming: PatternName
    values: Float[np.ndarray, "rule"]
    share: float
    others: tuple[tuple[str, float], ...]
    image_dependence: float | None


@dataclass(frozen=True)
class Cluster:
    """A cluster of patch patterns.

    Attributes:
        number: Of the cluster, 0 for the largest.
        size: Maps in it.
        naming: The name that its members' typical numbers take.
        values: Those numbers, in the order of `RULES`.
        heads: (layer, head, share of that head's maps that are here) of the heads with most of their maps in it.
    """

    number: int
    size: int
    naming: PatternName
    values: Float[np.ndarray, "rule"]
    heads: tuple[tuple[int, int, float], ...]


def pattern_grid(study: xr.Dataset) -> tuple[int, int]:
    """The grid that patterns are read on.

    Args:
        study: An opened study.

    Returns:
        Rows and columns of patches.

    Raises:
        UsageError: The study holds no patterns.
    """
    if "pattern_rule" not in study:
        raise UsageError("Patterns were asked for; this study holds none. Study it with --measures patterns.")
    stored = study.attrs.get("patterns", {}).get("grid")
    rows, columns = stored or common_grid([grid for grid in study.attrs["grids"] if grid])
    return int(rows), int(columns)


def pattern_of_head(study: xr.Dataset, layer: int, head: int) -> HeadPattern:
    """The pattern of one head.

    Args:
        study: An opened study.
        layer: Index of the layer.
        head: Index of the head.

    Returns:
        The pattern; its name is "none" for a head that its layer lacks.

    Raises:
        UsageError: The study holds no patterns, or has no such layer or head.
    """
    grid = pattern_grid(study)
    if not (0 <= layer < study.sizes["layer"] and 0 <= head < study.sizes["head"]):
        raise UsageError(
            f"L{layer}H{head} was asked for; the study has layers 0 to {study.sizes['layer'] - 1} with heads 0 to "
            f"{study.sizes['head'] - 1}."
        )
    values = study["pattern_rule"].isel(layer=layer, head=head).to_numpy()
    dependence = float(study["image_dependence"][layer, head]) if "image_dependence" in study else float("nan")
    return _summarise_head(values, grid, layer, head, dependence)


def all_patterns(study: xr.Dataset) -> list[HeadPattern]:
    """The pattern of every head that has one.

    Args:
        study: An opened study.

    Returns:
        Patterns in order of layers.

    Raises:
        UsageError: The study holds no patterns.
    """
    grid, values = pattern_grid(study), study["pattern_rule"].to_numpy()
    shape = values.shape[1:3]
    dependence = study["image_dependence"].to_numpy() if "image_dependence" in study else np.full(shape, np.nan)
    return [
        _summarise_head(values[:, layer, head], grid, layer, head, float(dependence[layer, head]))
        for layer, head in np.ndindex(*shape)
        if not np.isnan(values[:, layer, head, 0]).all()
    ]


def _summarise_head(
    values: Float[np.ndarray, "image rule"], grid: tuple[int, int], layer: int, head: int, dependence: float
) -> HeadPattern:
    typical = typical_values(values)
    naming = name_pattern(typical, grid)
    each = pattern_indices(values, grid)
    counts = np.bincount(each[each >= 0], minlength=len(NAMES)) / max(1, int((each >= 0).sum()))
    own = float(counts[NAMES.index(naming.name)]) if naming.name in NAMES else float("nan")
    others = [(NAMES[at], float(counts[at])) for at in np.argsort(-counts, kind="stable") if counts[at] > 0]
    rest = tuple(pair for pair in others if pair[0] != naming.name)
    return HeadPattern(layer, head, naming, typical, own, rest, None if np.isnan(dependence) else dependence)


def pattern_clusters(study: xr.Dataset, n_heads: int = 3) -> list[Cluster]:
    """The clusters of patch patterns.

    Args:
        study: An opened study.
        n_heads: Heads to name for each cluster.

    Returns:
        Clusters in order of their numbers.

    Raises:
        UsageError: The study holds no patterns, or no clusters of them.
    """
    grid = pattern_grid(study)
    if "pattern_patch_cluster" not in study:
        raise UsageError(
            "Clusters of patterns were asked for; this study holds none. Study it with --measures patterns."
        )
    cluster, values = study["pattern_patch_cluster"].to_numpy(), study["pattern_rule"].to_numpy()
    clusters = []
    for number in range(int(cluster.max(initial=-1)) + 1):
        inside = cluster == number
        numbers = typical_values(values[inside])
        clusters.append(
            Cluster(number, int(inside.sum()), name_pattern(numbers, grid), numbers, _main_heads(inside, n_heads))
        )
    return clusters


def _main_heads(inside: np.ndarray, n_heads: int) -> tuple[tuple[int, int, float], ...]:
    share: Float[np.ndarray, "layer head"] = inside.mean(0)
    order: Int[np.ndarray, "n"] = np.argsort(-share.ravel(), kind="stable")[:n_heads]
    pairs = [np.unravel_index(at, share.shape) for at in order if share.ravel()[at] > 0]
    return tuple((int(layer), int(head), float(share[layer, head])) for layer, head in pairs)
