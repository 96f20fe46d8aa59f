"""One number per head, taken out of a study: of one image, or the mean over images with its interval. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from vitrail.analysis import measures
from vitrail.errors import UsageError
from vitrail.heads.correction import correct_mean, exact_values, how_corrected
from vitrail.heads.exact_names import EXACT_VALUES
from vitrail.heads.summary import value_limits
from vitrail.layer_summary import finite_mean, images_with_values, in_first_patches
from vitrail.selection import ImageChoice, describe_choice, image_id, image_position
from vitrail.stats import mean_interval, share_interval

__all__ = [
    "IMPORTANCE_MEASURES",
    "HeadStrength",
    "HeadValues",
    "head_strength",
    "head_values",
    "heads_with_strength",
    "hops_of_layers",
    "importance_metrics",
    "main_metric",
]

NOT_IMPORTANCE = frozenset({"head_value", *EXACT_VALUES.values()})
"""A model's value with a head pruned says how much the head matters only as its change, `head_value_change`; exact
values of a sample go into the means of the measures that they correct."""

LOW_MATTERS = frozenset({"head_probability"})
"""Measures whose low values mark the important heads; of the others it is the high ones."""

IMPORTANCE_MEASURES = (
    "head_probability",
    "head_divergence",
    "head_loss_change",
    "head_value_change",
    "head_output_shift",
    "head_token_shift",
)
"""What importance is read from, in order of preference."""

N_NAMED = 3
"""Heads that a figure names: more labels would cover each other."""

MIN_SHARE_OF_FIRST = 0.25
"""A head is named only if it lies at least this share as far from the median head as the most important one."""

CENTRAL_90 = (0.05, 0.95)
"""Quantiles between which nine images in ten lie."""

NEAR_HOPS = 2
"""Hops 0 and 1: the patch itself and its eight neighbours."""


@dataclass(frozen=True)
class HeadValues:
    """One number per head, with what a figure needs beside it.

    Attributes:
        metric: Name of the measure.
        values: Value of each head, [layer head]; NaN where a layer has no such head.
        low: Lower end of the 95 % interval of the mean over images, NaN where too few; None for one image.
        high: Upper end of the same interval.
        spread: 5 % and 95 % quantiles over images, [bound layer head], over the exact ones where the mean is corrected
            by them; None for a single image.
        unpruned: The value with no head pruned; None where that means nothing.
        description: Whose numbers these are, such as "mean over 320 images".
        one_image: The values are of a single image.
        attrs: Attributes of the measure: title, unit, low, high, source, limits.
    """

    metric: str
    values: Float[np.ndarray, "layer head"]
    low: Float[np.ndarray, "layer head"] | None
    high: Float[np.ndarray, "layer head"] | None
    spread: Float[np.ndarray, "bound layer head"] | None
    unpruned: float | None
    description: str
    one_image: bool
    attrs: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Title of the measure."""
        return str(self.attrs.get("title", self.metric))

    @property
    def unit(self) -> str:
        """Unit of the values: a flag of one image is 0 or 1, its mean a share of images."""
        unit = str(self.attrs.get("unit", ""))
        return unit if unit != "bool" else "0 or 1" if self.one_image else "share of images"

    @cached_property
    def heads(self) -> Int[np.ndarray, "n_heads pair"]:
        """(layer, head) of every head that is present, in order of layers."""
        return np.argwhere(~np.isnan(self.values))

    @cached_property
    def median(self) -> float:
        """Median over heads; NaN without heads."""
        return float(np.median(self.values[~np.isnan(self.values)])) if len(self.heads) else float("nan")

    @cached_property
    def layer_means(self) -> Float[np.ndarray, "layer"]:
        """Mean over the heads of each layer; NaN for a layer without heads."""
        present = ~np.isnan(self.values)
        sums = np.where(present, self.values, 0).sum(1)
        return np.where(present.any(1), sums / np.maximum(present.sum(1), 1), np.nan)

    @cached_property
    def ranked(self) -> list[tuple[int, int]]:
        """Heads from the most to the least important; ties in order of layers."""
        flat = np.array([self.values[layer, head] for layer, head in self.heads])
        order = np.argsort(flat if self.metric in LOW_MATTERS else -flat, kind="stable")
        return [(int(layer), int(head)) for layer, head in self.heads[order]]

    @property
    def outstanding(self) -> list[tuple[int, int]]:
        """At most three of the most important heads: those that lie far from the median head."""
        distances = [abs(float(self.values[pair]) - self.median) for pair in self.ranked[:N_NAMED]]
        return [
            pair
            for pair, distance in zip(self.ranked, distances, strict=False)
            if distance >= MIN_SHARE_OF_FIRST * distances[0]
        ]


@dataclass(frozen=True)
class HeadStrength:
    """Attention strength of one head over hops.

    Attributes:
        n_images: Images that the mean is over.
        mean: Mean over images, [hop], without the hops that the layer lacks.
        spread: 5 % and 95 % quantiles over images, [bound hop]; None for a study of one image.
        of_image: The chosen image's own values, [hop]; None where none was chosen of several.
        uniform: Strength of even attention to all tokens, 1 / tokens; None where the layer's tokens are not known.
        near_share: Share of the summed mean strength at hops 0 and 1; NaN where the sum is 0.
    """

    n_images: int
    mean: Float[np.ndarray, "hop"]
    spread: Float[np.ndarray, "bound hop"] | None
    of_image: Float[np.ndarray, "hop"] | None
    uniform: float | None
    near_share: float


def head_values(study: xr.Dataset, metric: str, image: ImageChoice = None) -> HeadValues:
    """A measure per (image, layer, head), of one image or as the mean over images.

    Args:
        study: A study as `open_study` gives it.
        metric: Name of a measure with the dimensions image, layer, head.
        image: A position or an id; None takes the mean over images.

    Returns:
        The values with interval, spread and attributes; lengths as `in_first_patches` gives them. A study of one image
        gives that image's.

    Raises:
        UsageError: The study does not hold the measure per head, has no such image, or no images at all.
    """
    per_head = [str(name) for name, array in study.data_vars.items() if array.dims == ("image", "layer", "head")]
    if metric not in per_head:
        raise UsageError(
            f"A figure of {metric!r} was asked for; this study holds, per head: {', '.join(per_head) or 'nothing'}."
        )
    array = in_first_patches(study[metric], study.attrs.get("grids"))
    numbers = array.to_numpy().astype(np.float64)
    numbers[:, ~_present_heads(study, numbers)] = np.nan
    n_images = len(numbers)
    if n_images == 0:
        raise UsageError(f"A figure of {metric!r} was asked for; the study holds no images. Run `vitrail study` first.")
    if image is not None or n_images == 1:
        at = image_position(study, 0 if image is None else image)
        unpruned, description = _value_unpruned(study, metric, np.array([at])), f"image {image_id(study, at)}"
        return HeadValues(metric, numbers[at], None, None, None, unpruned, description, True, array.attrs)
    measured = images_with_values(numbers)
    numbers = numbers[measured]
    unpruned, description = _value_unpruned(study, metric, measured), describe_choice(study, None)
    exact = exact_values(study, metric)
    exact = None if exact is None else exact[measured]
    corrected = None if exact is None else correct_mean(numbers, exact)
    if exact is not None and corrected is not None:
        *_, spread = _statistics(exact[~np.isnan(exact).all((1, 2))], metric, False)
        description = f"{description}, {how_corrected(study)}"
        return HeadValues(metric, *corrected, spread, unpruned, description, False, array.attrs)
    low, high, spread = _statistics(numbers, metric, array.dtype.kind == "b")
    if len(numbers) < n_images:
        description = f"mean over {len(numbers):,} of {n_images:,} images"
    mean = finite_mean(np.moveaxis(numbers, 0, -1))
    return HeadValues(metric, mean, low, high, spread, unpruned, description, False, array.attrs)


def importance_metrics(study: xr.Dataset | None = None) -> list[str]:
    """Measures of importance, those that speak of the model's prediction first.

    Args:
        study: Only what this study holds; None: every measure that is declared.

    Returns:
        Names of measures.
    """
    declared = [
        name
        for name, measure in measures().items()
        if measure.analysis == "heads"
        and name.startswith("head_")
        and name not in NOT_IMPORTANCE
        and measure.dims == ("image", "layer", "head")
        and measure.unit != "class"
    ]
    names = declared if study is None else [name for name in declared if name in study]
    return sorted(names, key=lambda name: (name not in IMPORTANCE_MEASURES, declared.index(name)))


def main_metric(study: xr.Dataset) -> str | None:
    """The measure that importance is read from in this study.

    Args:
        study: A study as `open_study` gives it.

    Returns:
        Its name; None where the study holds no measure of importance.
    """
    preferred = next((name for name in IMPORTANCE_MEASURES if name in study), None)
    return preferred or next(iter(importance_metrics(study)), None)


def _rank_heads(study: xr.Dataset) -> list[tuple[int, int]]:
    """Heads from the most to the least important; in order of layers where the study holds no importance.

    Args:
        study: A study as `open_study` gives it.

    Returns:
        (layer, head) of each head.
    """
    metric = main_metric(study)
    if metric is not None:
        return head_values(study, metric).ranked
    return [(layer, head) for layer in range(study.sizes["layer"]) for head in range(study.sizes["head"])]


def hops_of_layers(study: xr.Dataset) -> Int[np.ndarray, "layer"]:
    """How many hop distances each layer has: the longer side of its grid; 0 where it has no grid.

    Args:
        study: A study with the dimension `layer`.

    Returns:
        A count per layer.
    """
    n_layers = study.sizes["layer"]
    grids = study.attrs.get("grids")
    if grids is not None and len(grids) == n_layers:
        return np.array([max(grid) if grid else 0 for grid in grids])
    if "attention_strength" in study:
        finite = ~np.isnan(study["attention_strength"].to_numpy()).all(axis=(0, 2))
        return np.asarray(finite.sum(-1))
    return np.zeros(n_layers, dtype=np.int64)


def head_strength(study: xr.Dataset, layer: int, head: int, image: ImageChoice = None) -> HeadStrength:
    """Attention strength of one head over hops: mean, spread over images, and one image.

    Args:
        study: A study that holds `attention_strength`.
        layer: Index of the layer.
        head: Index of the head.
        image: An image to give beside the mean; None: none.

    Returns:
        Mean attention weight per neighbour at each hop that the layer has.

    Raises:
        UsageError: The study holds no strength, or has no such head or image.
    """
    values = _strengths(study, layer, head)
    several = len(values) > 1
    position = None if image is None and several else image_position(study, 0 if image is None else image)
    mean = values.mean(0)
    total = float(mean.sum())
    return HeadStrength(
        n_images=len(values),
        mean=mean,
        spread=np.quantile(values, CENTRAL_90, axis=0) if several else None,
        of_image=None if position is None else values[position],
        uniform=_uniform_weight(study, layer),
        near_share=float(mean[:NEAR_HOPS].sum()) / total if total > 0 else float("nan"),
    )


def heads_with_strength(study: xr.Dataset, heads: list[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
    """Heads that have an attention strength: those of layers with a grid.

    Args:
        study: A study, with `attention_strength` or without.
        heads: (layer, head) to choose from, in this order; None: all heads in the order of importance.

    Returns:
        Those of `heads` that have a strength; none where the study holds none.
    """
    if "attention_strength" not in study:
        return []
    present = ~np.isnan(study["attention_strength"].to_numpy()).all(axis=(0, 3))
    return [(layer, head) for layer, head in (_rank_heads(study) if heads is None else heads) if present[layer, head]]


def _strengths(study: xr.Dataset, layer: int, head: int) -> Float[np.ndarray, "image hop"]:
    """Attention strength of one head, without the hops that its layer does not have."""
    if "attention_strength" not in study:
        raise UsageError(
            "Strength over hops was asked for; this study does not hold attention_strength. "
            "Study it with --measures heads (the model needs a grid of patches)."
        )
    array = study["attention_strength"]
    if not (0 <= layer < array.sizes["layer"] and 0 <= head < array.sizes["head"]):
        raise UsageError(
            f"L{layer}H{head} was asked for; the study has layers 0 to {array.sizes['layer'] - 1} "
            f"with heads 0 to {array.sizes['head'] - 1}."
        )
    numbers = array.isel(layer=layer, head=head).to_numpy().astype(np.float64)
    finite = ~np.isnan(numbers).all(0)
    if not finite.any():
        raise UsageError(f"L{layer}H{head} has no attention strength: the head is not there, or its layer has no grid.")
    return np.asarray(numbers[:, finite])


def _uniform_weight(study: xr.Dataset, layer: int) -> float | None:
    """1 / number of tokens, where the study says the layer's grid."""
    grids, prefixes = study.attrs.get("grids"), study.attrs.get("prefixes")
    if not grids or not prefixes or not grids[layer]:
        return None
    return float(1.0 / (grids[layer][0] * grids[layer][1] + prefixes[layer]))


def _present_heads(study: xr.Dataset, numbers: Float[np.ndarray, "image layer head"]) -> Bool[np.ndarray, "layer head"]:
    """Which heads there are; bool measures are padded with 0, which does not tell."""
    present: Bool[np.ndarray, "layer head"] = ~np.isnan(numbers).all(0)
    n_heads = study.attrs.get("n_heads")
    if n_heads is not None and len(n_heads) == len(present):
        return np.asarray(present & (np.arange(present.shape[1]) < np.array(n_heads)[:, None]))
    reference = next((name for name in IMPORTANCE_MEASURES if name in study), None)
    return present if reference is None else present & ~np.isnan(study[reference].to_numpy()).all(0)


def _statistics(
    numbers: Float[np.ndarray, "image layer head"], metric: str, is_share: bool
) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"], Float[np.ndarray, "bound layer head"]]:
    """Interval of the mean and spread over images, NaN where there is no head."""
    present = ~np.isnan(numbers).all(0)
    interval, spread = np.full((2, *present.shape), np.nan), np.full((2, *present.shape), np.nan)
    if present.any():
        values = numbers[:, present]
        ends = share_interval(values) if is_share else mean_interval(values, limits=value_limits(metric))
        interval[:, present] = ends.low, ends.high
        spread[:, present] = np.quantile(numbers[:, present], CENTRAL_90, axis=0)
    return interval[0], interval[1], spread


def _value_unpruned(study: xr.Dataset, metric: str, images: np.ndarray) -> float | None:
    """The measure of these images with nothing pruned: the plain probability or value; 0 for what measures a change."""
    declared = measures().get(metric)
    baseline = declared.baseline if declared is not None else ""
    if baseline:
        if baseline not in study:
            return None
        return float(study[baseline].to_numpy()[images].astype(np.float64).mean())
    return 0.0 if metric.startswith("head_") else None
