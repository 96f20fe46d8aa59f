"""Tokens of a study summed up over its images: norms, grouping by object, what predictions survive. No torch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float, Int, Shaped

from vitrail.errors import UsageError
from vitrail.grid import Grid
from vitrail.layer_summary import LayerQuantity, images_in_every_layer
from vitrail.measure import range_or_unit
from vitrail.stats import mean_interval
from vitrail.tokens.amounts import AMOUNTS, cells_that_divide
from vitrail.tokens.outliers import norm_outliers

__all__ = [
    "LayerPatches",
    "MeanCurve",
    "NormsByLayer",
    "RelevanceOverChance",
    "Robustness",
    "grouping_quantities",
    "norm_outliers_by_layer",
    "norms_of_layers",
    "patch_norms",
    "relevance_over_chance",
    "robustness",
]

REMOVED_PATCHES = ("random", "salient", "non_salient")
"""Which patches the occlusion measures take away."""

NORM_QUANTILES = (0.05, 0.5, 0.95, 1.0)
"""Of the norms of all patches of a layer: low, median, high, longest."""


class NormsByLayer(NamedTuple):
    """Lengths of tokens, layer by layer.

    Attributes:
        layers: Indices of the layers that return patches.
        low: 5 % quantile of the L2 norms of all patches of all images.
        median: Their median.
        high: Their 95 % quantile.
        longest: The longest.
        class_token: Median over images of the class token's norm, of every layer; NaN where it is not among the tokens,
            None where it never is.
        n_outliers: Patches of an image that stand out by their norm, mean over images.
    """

    layers: Int[np.ndarray, "known"]
    low: Float[np.ndarray, "known"]
    median: Float[np.ndarray, "known"]
    high: Float[np.ndarray, "known"]
    longest: Float[np.ndarray, "known"]
    class_token: Float[np.ndarray, "layer"] | None
    n_outliers: Float[np.ndarray, "known"]


class LayerPatches(NamedTuple):
    """A value for each patch that a layer returns.

    Attributes:
        values: For each image and patch: norms, or whether they stand out.
        grid: (rows, columns) on which the patches lie; None where it is not known.
    """

    values: Shaped[np.ndarray, "image patch"]
    grid: Grid | None


class _Returned(NamedTuple):
    """What is known of the tokens that a layer returns.

    Attributes:
        prefix: How many of the first are not known to be patches.
        grid: (rows, columns) on which the patches lie; None where it is not known.
        has_class_token: Whether the first is the class token.
    """

    prefix: int
    grid: Grid | None
    has_class_token: bool


class MeanCurve(NamedTuple):
    """A mean over images at several points.

    Attributes:
        name: What the curve is of.
        x: The points.
        mean: Mean over images at each point.
        low: Lower end of its 95 % interval; NaN where images are too few.
        high: Upper end of the same interval.
    """

    name: str
    x: Float[np.ndarray, "point"]
    mean: Float[np.ndarray, "point"]
    low: Float[np.ndarray, "point"]
    high: Float[np.ndarray, "point"]


class Robustness(NamedTuple):
    """What is left of the label's probability as patches are lost or displaced, and how far tokens drift.

    Attributes:
        occlusion: A curve over the share of patches lost, for each way to choose them.
        shuffle: The curve over `cells`; None where the study holds none.
        cells: Cells along a side that the image was cut into; 1 is the intact image.
        occlusion_drift: A curve over layers for each amount of random patches lost.
        shuffle_drift: A curve over layers for each number of cells.
    """

    occlusion: list[MeanCurve]
    shuffle: MeanCurve | None
    cells: list[int]
    occlusion_drift: list[MeanCurve]
    shuffle_drift: list[MeanCurve]


class RelevanceOverChance(NamedTuple):
    """What deletion and insertion say of methods of relevance on one image, against orders at random.

    Attributes:
        gains: By method, the area between insertion and deletion beyond the mean of the random orders.
        chance: For "deletion" and "insertion" the mean, lowest and highest probability of the random orders, [step].
        n_random: Random orders.
    """

    gains: dict[str, float]
    chance: dict[str, tuple[Float[np.ndarray, "step"], Float[np.ndarray, "step"], Float[np.ndarray, "step"]]]
    n_random: int


def relevance_over_chance(look: xr.Dataset, methods: Sequence[str]) -> RelevanceOverChance:
    """Compares methods of relevance with orders at random, by deletion and insertion.

    Args:
        look: One image, with `relevance_deletion` and `relevance_insertion` over `relevance_method` and `step`.
        methods: Names of the methods; all others along `relevance_method` are orders at random.

    Returns:
        The gain of each method, and what the random orders give.
    """
    curves = {way: look[f"relevance_{way}"] for way in ("deletion", "insertion")}
    area = (curves["insertion"] - curves["deletion"]).integrate("step")
    random = [name for name in area["relevance_method"].to_numpy().astype(str) if name not in methods]
    beyond = area - area.sel(relevance_method=random).mean()
    chance = {}
    for way, values in curves.items():
        of_random = values.sel(relevance_method=random).transpose("relevance_method", "step").to_numpy()
        chance[way] = (of_random.mean(0), of_random.min(0), of_random.max(0))
    gains = {method: float(beyond.sel(relevance_method=method)) for method in methods}
    return RelevanceOverChance(gains, chance, len(random))


def patch_norms(study: xr.Dataset) -> dict[int, LayerPatches]:
    """The L2 norms of patches alone, of every layer that returns patches.

    A layer returns its own tokens, or those of the next where it puts patches together on the way. One that returns the
    class token alone has no patches, and where that may be anywhere among merged tokens, none are taken for patches.

    Args:
        study: A study that holds `token_norm`, with its plan in its attributes.

    Returns:
        Norms by index of the layer.

    Raises:
        UsageError: The study holds no `token_norm`.
    """
    values = _token_norms(study)
    norms = {}
    for layer in range(values.shape[1]):
        n_tokens = _count_tokens(values, layer)
        returned = _returned(study, layer, n_tokens)
        if n_tokens > returned.prefix:
            norms[layer] = LayerPatches(values[:, layer, returned.prefix : n_tokens], returned.grid)
    return norms


def _token_norms(study: xr.Dataset) -> Float[np.ndarray, "image layer token"]:
    if "token_norm" not in study:
        raise UsageError("This study holds no token_norm; study it with --measures tokens.")
    values: Float[np.ndarray, "image layer token"] = study["token_norm"].to_numpy()
    return values


def _count_tokens(norms: Float[np.ndarray, "image layer token"], layer: int) -> int:
    """How many tokens the layer returns; the others are NaN."""
    return int(np.isfinite(norms[0, layer]).sum())


def _returned(study: xr.Dataset, layer: int, n_tokens: int) -> _Returned:
    grids, prefixes, has_class_token = (study.attrs[name] for name in ("grids", "prefixes", "class_token"))
    for grid, prefix in zip(grids[layer : layer + 2], prefixes[layer : layer + 2], strict=True):
        if grid is not None and prefix + grid[0] * grid[1] == n_tokens:
            return _Returned(prefix, (int(grid[0]), int(grid[1])), has_class_token and prefix > 0)
    if has_class_token and not prefixes[layer]:
        return _Returned(n_tokens, None, n_tokens == 1)
    return _Returned(prefixes[layer], None, has_class_token)


def norm_outliers_by_layer(study: xr.Dataset) -> dict[int, LayerPatches]:
    """Which patches stand out by their norm, for every layer that returns patches.

    Args:
        study: A study that holds `token_norm`.

    Returns:
        Flags, with the grid of the patches, by index of the layer.

    Raises:
        UsageError: The study holds no `token_norm`.
    """
    return {layer: LayerPatches(norm_outliers(norms.values), norms.grid) for layer, norms in patch_norms(study).items()}


def norms_of_layers(study: xr.Dataset) -> NormsByLayer:
    """Lengths of tokens over the layers: spread of patches, class token, outliers.

    Args:
        study: A study that holds `token_norm`.

    Returns:
        Statistics of every layer that returns patches.

    Raises:
        UsageError: The study holds no `token_norm`, or no norms of patches.
    """
    norms = {layer: each.values for layer, each in patch_norms(study).items()}
    if not norms:
        raise UsageError("This study holds token_norm, but no layer of it has patches.")
    layers = np.array(list(norms))
    low, median, high, longest = np.array([np.quantile(values, NORM_QUANTILES) for values in norms.values()]).T
    n_outliers = np.array([float(norm_outliers(values).sum(1).mean()) for values in norms.values()])
    return NormsByLayer(layers, low, median, high, longest, _class_token_norm(study), n_outliers)


def _class_token_norm(study: xr.Dataset) -> Float[np.ndarray, "layer"] | None:
    """Median over images of the class token's norm after each layer, where it is known which token that is."""
    values = _token_norms(study)
    medians = np.full(values.shape[1], np.nan)
    for layer in range(len(medians)) if study.attrs["class_token"] else ():
        if _returned(study, layer, _count_tokens(values, layer)).has_class_token:
            medians[layer] = np.median(values[:, layer, 0])
    return medians if np.isfinite(medians).any() else None


def grouping_quantities(study: xr.Dataset) -> list[LayerQuantity]:
    """Every grouping score of a study, of the images with a score in every layer that has any.

    Args:
        study: Any study.

    Returns:
        A quantity for each score that some image has; none without masks.
    """
    quantities = []
    for name in (str(name) for name in study.data_vars if str(name).startswith("grouping_")):
        values = study[name].to_numpy().astype(np.float64)
        values = values[images_in_every_layer(values)]
        if len(values):
            attrs = study[name].attrs
            unit = range_or_unit(str(attrs.get("unit", "")))
            quantities.append(LayerQuantity(str(attrs.get("title", name)), unit, values))
    return quantities


def robustness(study: xr.Dataset) -> Robustness:
    """What survives lost and displaced patches, as curves with intervals over images.

    Args:
        study: A study with measures of occlusion or shuffling.

    Returns:
        The curves that the study holds numbers for; each curve of probabilities begins at the intact image.

    Raises:
        UsageError: The study holds neither occlusion nor shuffling.
    """
    names = {str(name) for name in study.data_vars if str(name).startswith(("occlusion_", "shuffle_"))}
    if not names:
        raise UsageError("This study holds no occlusion or shuffling; study it with --measures tokens.")
    intact = study["probability"].to_numpy()[:, None]
    grid = study.attrs["grids"][0]
    cells = [1, *cells_that_divide((int(grid[0]), int(grid[1])))]
    amounts = (0.0, *AMOUNTS)

    def from_intact(measure: str, name: str, x: Float[np.ndarray, "point"]) -> MeanCurve:
        return _mean_curve(name, x, np.concatenate([intact, study[measure].to_numpy()], axis=1))

    return Robustness(
        occlusion=[
            from_intact(f"occlusion_{name}", name.replace("_", "-"), np.array(amounts))
            for name in REMOVED_PATCHES
            if f"occlusion_{name}" in names
        ],
        shuffle=from_intact("shuffle_probability", "shuffled", np.arange(len(cells), dtype=np.float64))
        if "shuffle_probability" in names
        else None,
        cells=cells,
        occlusion_drift=_drift(study, "occlusion_drift", [f"{100 * amount:.0f} % lost" for amount in AMOUNTS]),
        shuffle_drift=_drift(study, "shuffle_drift", [f"{n} x {n}" for n in cells[1:]]),
    )


def _mean_curve(name: str, x: Float[np.ndarray, "point"], values: Float[np.ndarray, "image point"]) -> MeanCurve:
    """The mean over images at each point, with its 95 % interval.

    Args:
        name: What the curve is of.
        x: The points.
        values: One row per image.

    Returns:
        The curve; without an interval (NaN) where images are too few.
    """
    columns = values.astype(np.float64)
    low, high, _ = mean_interval(columns)
    return MeanCurve(name, np.asarray(x, dtype=np.float64), columns.mean(0), low, high)


def _drift(study: xr.Dataset, name: str, lines: list[str]) -> list[MeanCurve]:
    """A curve over layers for each of `lines`, the last dimension of the measure; none where it is not measured."""
    if name not in study:
        return []
    values = study[name].to_numpy()
    layers = np.arange(values.shape[1], dtype=np.float64)
    return [_mean_curve(words, layers, values[:, :, at]) for at, words in enumerate(lines)]
