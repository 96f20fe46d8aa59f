"""Ranking heads, and how good a ranking is: cumulative pruning curves and the areas between them. No torch.

Heads are ranked on one half of the images (calibration) and pruned one after the other on the other half (test). A
ranking that knows which heads matter keeps the accuracy long when it prunes the least important first, and loses it at
once when it prunes the most important first; orders at random lie between.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from vitrail.errors import UsageError
from vitrail.heads.summary import bootstrap_interval, present_heads

__all__ = ["Area", "Curves", "Halves", "area_table", "halves", "orders", "parse_heads", "random_orders", "scores"]

Order = list[tuple[int, int]]
"""Heads (layer, head) in the order in which they are pruned."""

_AS_THEY_ARE = (
    "head_divergence", "head_loss_change", "head_cls_shift", "head_token_shift", "head_cls_shift_l2",
    "head_token_shift_l2",
)  # fmt: skip


class Halves(NamedTuple):
    """Positions of images: those that choose, and those that nothing was chosen on."""

    calibration: Int[np.ndarray, "image"]
    test: Int[np.ndarray, "image"]


def halves(n_images: int, seed: int = 0) -> Halves:
    """Two halves drawn at random, each in order; an odd image goes to the test half.

    Raises `UsageError` for fewer than 2 images.
    """
    if n_images < 2:
        raise UsageError(
            f"Heads are ranked on one half of the images and tried on the other; this study has {n_images}. "
            "Study at least 2 images, some hundreds for numbers that mean something."
        )
    drawn = np.random.default_rng(seed).permutation(n_images)
    return Halves(np.sort(drawn[: n_images // 2]), np.sort(drawn[n_images // 2 :]))


def scores(study: xr.Dataset, images: Int[np.ndarray, "image"] | None = None) -> dict[str, Float[np.ndarray, "l h"]]:
    """Every ranking that the study holds numbers for, [layer head], high = important, NaN where there is no head.

    - `probability`: mean drop of the label's probability; `divergence`, `loss`, `class token`, `tokens` and the two in
      L2: means of the measures; `flips`: share of images whose prediction changes;
    - `accuracy`: accuracy lost; `large drops`: share of images that lose more than 0.1 of probability.

    `images`: positions to rank on, None for all. Raises `UsageError` for a study without measures of importance.
    """
    part = study if images is None else study.isel(image=np.asarray(images))
    there = present_heads(part)
    found: dict[str, np.ndarray] = {}
    if {"probability", "head_probability"} <= set(part):
        drop = part["probability"].to_numpy()[:, None, None] - part["head_probability"].to_numpy().astype(np.float64)
        found["probability"] = drop.mean(0)
    for name in _AS_THEY_ARE:
        if name in part and not np.isnan(part[name].to_numpy()).all():
            found[NAMES[name]] = part[name].to_numpy().astype(np.float64).mean(0)
    if "head_flip" in part:
        found["flips"] = part["head_flip"].to_numpy().mean(0)
    if {"label", "prediction", "head_prediction"} <= set(part):
        label = part["label"].to_numpy()
        right = (part["prediction"].to_numpy() == label)[:, None, None]
        found["accuracy"] = (right.astype(float) - (part["head_prediction"].to_numpy() == label[:, None, None])).mean(0)
    if not found:
        raise UsageError("Heads were to be ranked; this study holds no measure of importance. Use --measures heads.")
    return {name: np.where(there, values, np.nan) for name, values in found.items()}


NAMES = {
    "head_divergence": "divergence",
    "head_loss_change": "loss",
    "head_cls_shift": "class token",
    "head_token_shift": "tokens",
    "head_cls_shift_l2": "class token, L2",
    "head_token_shift_l2": "tokens, L2",
}
"""What rankings are called."""


def parse_heads(text: str) -> Order:
    """ "L0H4,L3H1" -> [(0, 4), (3, 1)]. Raises `UsageError` for anything else, and for a head named twice."""
    found: Order = []
    for word in text.replace(" ", ",").split(","):
        named = re.fullmatch(r"[Ll]([0-9]+)[Hh]([0-9]+)", word)
        if word and not named:
            raise UsageError(f"{word!r} names no head. Write heads as L0H4,L3H1: layer and head, counted from 0.")
        if named:
            found.append((int(named[1]), int(named[2])))
    if not found or len(set(found)) < len(found):
        raise UsageError(f"{text!r} names {'no head' if not found else 'a head twice'}. Write heads as L0H4,L3H1.")
    return found


def orders(ranking: Float[np.ndarray, "layer head"]) -> Order:
    """Heads from the least to the most important; ties in the order of layers and heads; without those that are NaN."""
    known = np.argwhere(~np.isnan(ranking))
    order = np.argsort(ranking[tuple(known.T)], kind="stable")
    return [(int(layer), int(head)) for layer, head in known[order]]


def random_orders(heads: Sequence[tuple[int, int]], n_orders: int = 20, seed: int = 0) -> list[Order]:
    """So many orders at random of the same heads."""
    rng = np.random.default_rng(seed)
    return [[heads[at] for at in rng.permutation(len(heads))] for _ in range(n_orders)]


@dataclass(frozen=True)
class Curves:
    """Which test images are answered rightly after pruning the first `counts` heads of each order.

    `least` and `most` are by the name of the ranking: least or most important heads first. `random` holds orders at
    random, on the first of the test images if on fewer than the others.
    """

    counts: Int[np.ndarray, "k"]
    least: Mapping[str, Bool[np.ndarray, "k image"]]
    most: Mapping[str, Bool[np.ndarray, "k image"]]
    random: Bool[np.ndarray, "order k some"]


class Area(NamedTuple):
    """Areas under one ranking's curves, as mean accuracy over all numbers of pruned heads (0 .. 1), each with a 95 %
    interval (value, low, high).

    least, most: least and most important first. between: their difference, 0 for a ranking that knows nothing.
    over_random: least first over the mean of the random orders, on the images that both saw; images and orders are
    resampled together. beaten: share of the random orders that lie under it.
    """

    least: tuple[float, float, float]
    most: tuple[float, float, float]
    between: tuple[float, float, float]
    over_random: tuple[float, float, float]
    under_random: tuple[float, float, float]
    beaten: float


def area_table(curves: Curves, *, seed: int = 0, resamples: int = 2000) -> dict[str, Area]:
    """The areas of every ranking, that with the largest area between its curves first.

    Bootstrap over test images, 95 % percentile; `Area` says what is resampled.
    """
    random = _areas(curves.random, curves.counts)
    found: dict[str, Area] = {}
    for name in curves.least:
        least, most = _areas(curves.least[name], curves.counts), _areas(curves.most[name], curves.counts)
        some = random.shape[1]
        found[name] = Area(
            _with_interval(least, seed, resamples),
            _with_interval(most, seed, resamples),
            _with_interval(least - most, seed, resamples),
            _against_random(least[:some], random, seed, resamples),
            _against_random(most[:some], random, seed, resamples),
            float((random.mean(1) < least[:some].mean()).mean()),
        )
    return dict(sorted(found.items(), key=lambda item: -item[1].between[0]))


def _areas(right: Bool[np.ndarray, "*lead k image"], counts: Int[np.ndarray, "k"]) -> Float[np.ndarray, "*lead image"]:
    """Per image: the trapezoid under its curve of right (1) and wrong (0), over the share of heads pruned."""
    share = counts / counts[-1]
    steps = np.diff(share)[:, None]
    values = right.astype(np.float64)
    return np.asarray((steps * (values[..., 1:, :] + values[..., :-1, :]) / 2).sum(-2))


def _with_interval(values: Float[np.ndarray, "image"], seed: int, resamples: int) -> tuple[float, float, float]:
    low, high = bootstrap_interval(values[:, None], seed, resamples)
    return float(values.mean()), float(low[0]), float(high[0])


def _against_random(
    area: Float[np.ndarray, "image"], random: Float[np.ndarray, "order image"], seed: int, resamples: int
) -> tuple[float, float, float]:
    rng = np.random.default_rng(seed)
    n_orders, n_images = random.shape
    images = rng.multinomial(n_images, np.full(n_images, 1 / n_images), size=resamples) / n_images
    drawn = rng.multinomial(n_orders, np.full(n_orders, 1 / n_orders), size=resamples) / n_orders
    means = images @ area - ((images @ random.T) * drawn).sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(area.mean() - random.mean()), float(low), float(high)
