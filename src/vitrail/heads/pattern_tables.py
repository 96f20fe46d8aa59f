"""What a study says of patterns, in tables: the pattern of each head, and of each cluster. No torch."""

from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from vitrail.errors import UsageError
from vitrail.heads.pattern_names import NAMES, Named, common_grid, pattern_name, pattern_names, typical

__all__ = ["Cluster", "HeadPattern", "clusters", "head_pattern", "head_patterns", "pattern_grid"]


@dataclass(frozen=True)
class HeadPattern:
    """The pattern of a head over all images: named from its `typical` numbers. `share` is how many of the images'
    maps take that name by themselves, `others` the names that the rest take, the commonest first.
    `image_dependence` is None where the study does not hold it."""

    layer: int
    head: int
    named: Named
    values: Float[np.ndarray, "rule"]
    share: float
    others: tuple[tuple[str, float], ...]
    image_dependence: float | None


@dataclass(frozen=True)
class Cluster:
    """A cluster of patch patterns: how many maps are in it, its name, and the heads most of it comes from, each with
    the share of that head's maps that are here. `values` are its members' typical numbers."""

    number: int
    size: int
    named: Named
    values: Float[np.ndarray, "rule"]
    heads: tuple[tuple[int, int, float], ...]


def pattern_grid(study: xr.Dataset) -> tuple[int, int]:
    """Rows and columns of the grid that patterns are read on.

    Raises `UsageError` where the study holds none.
    """
    if "pattern_rule" not in study:
        raise UsageError("Patterns were asked for; this study holds none. Study it with --measures patterns.")
    told = study.attrs.get("patterns", {}).get("grid")
    rows, columns = told or common_grid([grid for grid in study.attrs["grids"] if grid])
    return int(rows), int(columns)


def head_pattern(study: xr.Dataset, layer: int, head: int) -> HeadPattern:
    """The pattern of one head. Raises `UsageError` where the study holds none, and for a head that is not there."""
    grid = pattern_grid(study)
    if not (0 <= layer < study.sizes["layer"] and 0 <= head < study.sizes["head"]):
        raise UsageError(
            f"L{layer}H{head} was asked for; the study has layers 0 to {study.sizes['layer'] - 1} with heads 0 to "
            f"{study.sizes['head'] - 1}."
        )
    values = study["pattern_rule"].isel(layer=layer, head=head).to_numpy()
    dependence = float(study["image_dependence"][layer, head]) if "image_dependence" in study else None
    return _of_head(values, grid, layer, head, None if dependence is None or np.isnan(dependence) else dependence)


def head_patterns(study: xr.Dataset) -> list[HeadPattern]:
    """The pattern of every head that has one, in order of layers. Raises `UsageError` where the study holds none."""
    grid, values = pattern_grid(study), study["pattern_rule"].to_numpy()
    held = "image_dependence" in study
    dependence = study["image_dependence"].to_numpy() if held else np.full(values.shape[1:3], np.nan)
    return [
        _of_head(
            values[:, layer, head], grid, layer, head,
            None if np.isnan(dependence[layer, head]) else float(dependence[layer, head]),
        )
        for layer, head in np.ndindex(*values.shape[1:3])
        if not np.isnan(values[:, layer, head, 0]).all()
    ]  # fmt: skip


def _of_head(
    values: Float[np.ndarray, "image rule"], grid: tuple[int, int], layer: int, head: int, dependence: float | None
) -> HeadPattern:
    typically = typical(values)
    named = pattern_name(typically, grid)
    each = pattern_names(values, grid)
    counts = np.bincount(each[each >= 0], minlength=len(NAMES)) / max(1, int((each >= 0).sum()))
    own = float(counts[NAMES.index(named.name)]) if named.name in NAMES else float("nan")
    others = [(NAMES[at], float(counts[at])) for at in np.argsort(-counts, kind="stable") if counts[at] > 0]
    rest = tuple(pair for pair in others if pair[0] != named.name)
    return HeadPattern(layer, head, named, typically, own, rest, dependence)


def clusters(study: xr.Dataset, n_heads: int = 3) -> list[Cluster]:
    """The clusters of patch patterns in order of number, with the `n_heads` heads that most lie in each.

    Raises `UsageError` where the study holds none.
    """
    grid = pattern_grid(study)
    if "pattern_patch_cluster" not in study:
        raise UsageError(
            "Clusters of patterns were asked for; this study holds none. Study it with --measures patterns."
        )
    cluster, values = study["pattern_patch_cluster"].to_numpy(), study["pattern_rule"].to_numpy()
    found = []
    for number in range(int(cluster.max(initial=-1)) + 1):
        inside = cluster == number
        numbers = typical(values[inside])
        found.append(
            Cluster(number, int(inside.sum()), pattern_name(numbers, grid), numbers, _main_heads(inside, n_heads))
        )
    return found


def _main_heads(inside: np.ndarray, n_heads: int) -> tuple[tuple[int, int, float], ...]:
    share: Float[np.ndarray, "layer head"] = inside.mean(0)
    order: Int[np.ndarray, "n"] = np.argsort(-share.ravel(), kind="stable")[:n_heads]
    pairs = [np.unravel_index(at, share.shape) for at in order if share.ravel()[at] > 0]
    return tuple((int(layer), int(head), float(share[layer, head])) for layer, head in pairs)
