"""Ranking heads, and how good a ranking is: cumulative pruning curves and the areas between them. No torch.

Heads are ranked on one half of the images (calibration) and pruned one after the other on the other half (test). A
ranking that knows which heads matter keeps the accuracy long when it prunes the least important first, and loses it at
once when it prunes the most important first; orders at random lie between.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int
from scipy.special import stdtrit

from vitrail.data.files import BROKEN_ARCHIVE
from vitrail.data.labels import LabelSource
from vitrail.errors import DamagedStudy, UsageError
from vitrail.heads.correction import correct_mean, exact_values
from vitrail.heads.summary import present_heads
from vitrail.stats import ALPHA, mean_interval, require_seed
from vitrail.study.store import read_plan

__all__ = [
    "CURVES_FILE",
    "Area",
    "Curves",
    "Halves",
    "area_table",
    "as_heads",
    "halves",
    "orders",
    "parse_heads",
    "random_orders",
    "read_curves",
    "scores",
]

CURVES_FILE = "pruning-curves.npz"
"""The file in a study's folder that holds its pruning curves."""

Order = list[tuple[int, int]]
"""Heads (layer, head) in the order in which they are pruned."""

_AS_THEY_ARE = (
    "head_divergence",
    "head_loss_change",
    "head_value_change",
    "head_output_shift",
    "head_cls_shift",
    "head_token_shift",
    "head_cls_shift_l2",
    "head_token_shift_l2",
)


class Halves(NamedTuple):
    """Positions of images: those that choose, and those that nothing was chosen on."""

    calibration: Int[np.ndarray, "image"]
    test: Int[np.ndarray, "image"]


def halves(n_images: int, seed: int = 0) -> Halves:
    """Draws two halves of the images at random, each in order; an odd image goes to the test half.

    Args:
        n_images: Images of the study.
        seed: Of the draw.

    Returns:
        Positions of the images of each half.

    Raises:
        UsageError: Fewer than 2 images, or the seed is out of range.
    """
    if n_images < 2:
        raise UsageError(
            f"Heads are ranked on one half of the images and tried on the other; this study has {n_images}. "
            "Study at least 2 images, some hundreds for numbers that mean something."
        )
    drawn = np.random.default_rng(require_seed(seed)).permutation(n_images)
    return Halves(np.sort(drawn[: n_images // 2]), np.sort(drawn[n_images // 2 :]))


def scores(study: xr.Dataset, images: Int[np.ndarray, "image"] | None = None) -> dict[str, Float[np.ndarray, "l h"]]:
    """Every ranking that the study holds numbers for.

    - `probability`: mean drop of the label's probability; `divergence`, `loss`, `value`, `output`, `class token`,
      `tokens` and the two in L2: means of the measures; `flips`: share of images whose prediction changes;
    - `accuracy`: accuracy lost.

    Args:
        study: An opened study.
        images: Positions of the images to rank on; None: all.

    Returns:
        Scores by ranking, high for important heads; NaN for heads that a layer does not have.

    Raises:
        UsageError: The study holds no measure of importance.
    """
    part = study if images is None else study.isel(image=np.asarray(images))
    present = present_heads(part)
    rankings: dict[str, np.ndarray] = {}
    if {"probability", "head_probability"} <= set(part):
        drop = part["probability"].to_numpy()[:, None, None] - part["head_probability"].to_numpy().astype(np.float64)
        rankings["probability"] = _mean(drop, part, "drop")
    for name in _AS_THEY_ARE:
        if name in part and not np.isnan(part[name].to_numpy()).all():
            rankings[NAMES[name]] = _mean(part[name].to_numpy().astype(np.float64), part, name)
    if "head_flip" in part:
        rankings["flips"] = part["head_flip"].to_numpy().mean(0)
    if {"label", "prediction", "head_prediction"} <= set(part):
        label = part["label"].to_numpy()
        correct = (part["prediction"].to_numpy() == label)[:, None, None]
        rankings["accuracy"] = (
            correct.astype(float) - (part["head_prediction"].to_numpy() == label[:, None, None])
        ).mean(0)
    if not rankings:
        raise UsageError("Heads were to be ranked; this study holds no measure of importance. Use --measures heads.")
    return {name: np.where(present, values, np.nan) for name, values in rankings.items()}


def _mean(values: Float[np.ndarray, "image l h"], part: xr.Dataset, name: str) -> Float[np.ndarray, "l h"]:
    """Over images; of an estimate, corrected by its exact values where there are enough."""
    corrected = correct_mean(values, exact_values(part, name))
    return values.mean(0) if corrected is None else corrected.mean


NAMES = {
    "head_divergence": "divergence",
    "head_loss_change": "loss",
    "head_value_change": "value",
    "head_output_shift": "output",
    "head_cls_shift": "class token",
    "head_token_shift": "tokens",
    "head_cls_shift_l2": "class token, L2",
    "head_token_shift_l2": "tokens, L2",
}
"""What rankings are called."""


def parse_heads(text: str) -> Order:
    """Reads names of heads: "L0H4,L3H1" is [(0, 4), (3, 1)].

    Args:
        text: Names, separated by commas or spaces.

    Returns:
        (layer, head) of each, in their order.

    Raises:
        UsageError: A word is no head, a head is named twice, or there is none.
    """
    heads: Order = []
    for word in text.replace(" ", ",").split(","):
        match = re.fullmatch(r"[Ll]([0-9]+)[Hh]([0-9]+)", word)
        if word and not match:
            raise UsageError(f"{word!r} names no head. Write heads as L0H4,L3H1: layer and head, counted from 0.")
        if match:
            heads.append((int(match[1]), int(match[2])))
    if not heads or len(set(heads)) < len(heads):
        raise UsageError(f"{text!r} names {'no head' if not heads else 'a head twice'}. Write heads as L0H4,L3H1.")
    return heads


def as_heads(heads: str | Iterable[Any]) -> Order:
    """Heads as they were given: names, pairs, or an array of pairs.

    Args:
        heads: "L0H4,L3H1", or (layer, head) of each.

    Returns:
        (layer, head) of each, in their order.

    Raises:
        UsageError: It is no heads, or a head is named twice.
    """
    if isinstance(heads, str):
        return parse_heads(heads)
    pairs: Order = []
    try:
        for pair in heads:
            layer, head = map(index, pair)
            pairs.append((layer, head))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{heads!r} names no heads. Give pairs, [(0, 4), (3, 1)], or names, 'L0H4,L3H1'.") from error
    if len(set(pairs)) < len(pairs):
        raise UsageError(f"{pairs} names a head twice.")
    return pairs


def orders(ranking: Float[np.ndarray, "layer head"]) -> Order:
    """Heads from the least to the most important; ties in the order of layers and heads.

    Args:
        ranking: A score for each head; NaN for heads that a layer does not have, which are left out.

    Returns:
        (layer, head) of each.
    """
    present = np.argwhere(~np.isnan(ranking))
    order = np.argsort(ranking[tuple(present.T)], kind="stable")
    return [(int(layer), int(head)) for layer, head in present[order]]


def random_orders(heads: Sequence[tuple[int, int]], n_orders: int = 20, seed: int = 0) -> list[Order]:
    """Orders at random of the same heads.

    Args:
        heads: (layer, head) of each.
        n_orders: How many orders.
        seed: Of the orders.

    Returns:
        The orders.
    """
    rng = np.random.default_rng(seed)
    return [[heads[at] for at in rng.permutation(len(heads))] for _ in range(n_orders)]


@dataclass(frozen=True)
class Curves:
    """Which test images are answered rightly after pruning the first `counts` heads of each order.

    `least` and `most` are by the name of the ranking: least or most important heads first. `random` holds orders at
    random, on the first of the test images if on fewer than the others. `labels`: whose they are.
    """

    counts: Int[np.ndarray, "k"]
    least: Mapping[str, Bool[np.ndarray, "k image"]]
    most: Mapping[str, Bool[np.ndarray, "k image"]]
    random: Bool[np.ndarray, "order k some"]
    labels: LabelSource = LabelSource.GIVEN

    def accuracy(self, first: Literal["least", "most"], name: str) -> Float[np.ndarray, "k"]:
        """Accuracy over the number of heads pruned by one ranking.

        Args:
            first: Whether its least or its most important heads are pruned first.
            name: Name of the ranking.

        Returns:
            Shares of the test images that are answered correctly, 0 to 1.
        """
        accuracy: Float[np.ndarray, "k"] = getattr(self, first)[name].mean(-1)
        return accuracy

    def random_accuracy(self) -> "RandomAccuracy":
        """Accuracy over the number of heads pruned in orders at random.

        Returns:
            Its range and mean over the orders.
        """
        accuracy: Float[np.ndarray, "order k"] = self.random.mean(-1)
        return RandomAccuracy(accuracy.min(0), accuracy.mean(0), accuracy.max(0))


def read_curves(study: str | Path) -> Curves | None:
    """The pruning curves that `vitrail.pruning.curves.measure_curves` wrote into a study.

    Args:
        study: The folder of the study.

    Returns:
        The curves; None where there are none, or the study has other images by now.

    Raises:
        DamagedStudy: The file cannot be read.
    """
    file = Path(study) / CURVES_FILE
    if not file.is_file():
        return None
    try:
        with file.open("rb") as content, np.load(content, allow_pickle=False) as arrays:
            plan = read_plan(Path(study))
            if str(arrays["data_digest"]) != plan.data_digest:
                return None
            names = [str(name) for name in arrays["names"]]
            least, most = (dict(zip(names, arrays[end], strict=True)) for end in ("least", "most"))
            return Curves(arrays["counts"], least, most, arrays["random"], LabelSource(plan.labels))
    except (OSError, ValueError, KeyError, *BROKEN_ARCHIVE) as error:
        raise DamagedStudy(f"{file} is damaged ({error}); make it again: vitrail curves {study}.") from error


class RandomAccuracy(NamedTuple):
    """Accuracy with heads pruned in orders at random: its range and mean over the orders, 0 to 1."""

    lowest: Float[np.ndarray, "k"]
    mean: Float[np.ndarray, "k"]
    highest: Float[np.ndarray, "k"]


class Area(NamedTuple):
    """Areas under one ranking's curves, as mean accuracy over all numbers of pruned heads (0 .. 1), each with a 95 %
    interval (value, low, high).

    least, most: least and most important first. between: their difference; its interval is over images alone.
    chance: how far from 0 the `between` of an order at random may lie, the furthest of as many orders as there are
    rankings; NaN for a single random order. Only beyond it a ranking is shown to know something: 0 is the mean of
    rankings that know nothing. over_random, under_random: least and most important first over the mean of the random
    orders, on the images that both saw; the interval is over images and over one more order at random, again of as many
    as there are rankings. beaten: share of the random orders whose area lies under `least`.
    """

    least: tuple[float, float, float]
    most: tuple[float, float, float]
    between: tuple[float, float, float]
    over_random: tuple[float, float, float]
    under_random: tuple[float, float, float]
    beaten: float
    chance: float


def area_table(curves: Curves, *, seed: int = 0) -> dict[str, Area]:
    """The areas under the pruning curves of every ranking.

    Args:
        curves: Of a study's test images.
        seed: Of the resampled images.

    Returns:
        Areas by ranking, with intervals over test images (`vitrail.stats.mean_interval`); that with the largest area
        between its curves first. It is the best of them on these images: what chance gives the best is in `chance` and
        in the intervals against random orders.
    """
    random = _areas(curves.random, curves.counts)
    spread = _spread_of_orders(random.mean(1), len(curves.least))
    one_more = spread * np.sqrt(1 + 1 / len(random))  # from the mean of the others, which is of a sample too
    areas: dict[str, Area] = {}
    for name in curves.least:
        least, most = _areas(curves.least[name], curves.counts), _areas(curves.most[name], curves.counts)
        some = random.shape[1]
        areas[name] = Area(
            _with_interval(least, (0.0, 1.0), seed),
            _with_interval(most, (0.0, 1.0), seed),
            _with_interval(least - most, (-1.0, 1.0), seed),
            _against_random(least[:some], random, one_more, seed),
            _against_random(most[:some], random, one_more, seed),
            float((random.mean(1) < least[:some].mean()).mean()),
            float(np.minimum(2 * spread, 1.0)),  # no area is larger; the spread of two or three orders may be
        )
    return dict(sorted(areas.items(), key=lambda item: -item[1].between[0]))


def _areas(right: Bool[np.ndarray, "*lead k image"], counts: Int[np.ndarray, "k"]) -> Float[np.ndarray, "*lead image"]:
    """Per image: the trapezoid under its curve of right (1) and wrong (0), over the share of heads pruned."""
    share = counts / counts[-1]
    steps = np.diff(share)[:, None]
    values = right.astype(np.float64)
    return np.asarray((steps * (values[..., 1:, :] + values[..., :-1, :]) / 2).sum(-2))


def _spread_of_orders(areas: Float[np.ndarray, "order"], n_rankings: int) -> float:
    """How far one order at random lies from the mean of all, at 95 %, the furthest of `n_rankings` of them.

    An order backwards is an order at random as well, so areas forwards and backwards have one standard deviation, and
    their difference, of mean 0, has twice that at most: nearly so, as an order that is good is bad backwards.
    """
    if len(areas) < 2:
        return float("nan")  # one order says nothing of others
    return float(stdtrit(len(areas) - 1, 1 - ALPHA / 2 / n_rankings) * areas.std(ddof=1))


def _with_interval(
    values: Float[np.ndarray, "image"], limits: tuple[float, float], seed: int
) -> tuple[float, float, float]:
    low, high, _ = mean_interval(values, limits=limits, seed=seed)
    return float(values.mean()), float(low), float(high)


def _against_random(
    area: Float[np.ndarray, "image"], random: Float[np.ndarray, "order image"], reach: float, seed: int
) -> tuple[float, float, float]:
    """Area over the mean of the random orders, its interval over images widened by what one order varies."""
    value, low, high = _with_interval(area - random.mean(0), (-1.0, 1.0), seed)
    ends = value - np.hypot(value - low, reach), value + np.hypot(high - value, reach)
    low, high = np.clip(ends, -1.0, 1.0)
    return value, float(low), float(high)
