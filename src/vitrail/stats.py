"""What a sample of images says of all images: one interval for each kind of number, comparisons among many. No torch.

Images are the sample, in the first dimension of every array; all other dimensions are computed at once. NaN in a column
means "no value for this image" and is left out of that column. Where no interval can be trusted its ends are NaN and
`Interval.reason` says why. Everything random is drawn with a seed.

Which interval, and what it was chosen against (`tests/test_stats.py` simulates the coverage):

- share of images (yes or no): Clopper-Pearson, which never covers less than it says. A bootstrap of 0 flips in 25
  images is [0, 0], and Wilson's interval covers 84 % at some small shares.
- mean of a quantity: the studentised bootstrap (bootstrap-t), which follows skew; the percentile bootstrap covers 84 to
  90 % for skewed losses. With rare values it knows its limit: where resamples may hold none of them its end is
  infinite. Then the bound for a mean in a known range is taken (`mean_bounds`), and without a range none. Of
  exponentials of normal values it covers 92 to 93 % at 25 and 60 images, 90 % at 8.
- quantile: two order statistics, exact for every distribution.

No interval but `mean_bounds` covers what the sample holds no trace of: a loss in fewer than 4 / n of all images may not
be among n of them. Whether something can be neglected is therefore asked of `upper_bound`.
"""

from collections.abc import Iterator
from typing import NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from vitrail.arguments import whole_number
from vitrail.errors import UsageError

__all__ = [
    "ALPHA",
    "MAX_SEED",
    "Interval",
    "candidates_for_largest",
    "group_p_values",
    "mean_bounds",
    "mean_interval",
    "moment_interval",
    "paired_interval",
    "quantile_interval",
    "require_seed",
    "resampled_means",
    "share_interval",
    "sign_flip_p_values",
    "simultaneous_intervals",
    "spearman",
    "tails",
    "upper_bound",
]

ALPHA = 0.05
"""Intervals miss in at most this share of samples, half of it on either side."""

MAX_SEED = 2**32 - 1
"""The largest seed that every generator takes: scikit-learn's are of 32 bits."""

FEWEST_IMAGES = 8
"""Below, the studentised bootstrap of a skewed quantity covers less than nine times in ten whatever is done."""

RESAMPLES = 2000
"""The 2.5 % ends then rest on 50 resamples each."""

MANY_IMAGES = 500
LITTLE_SKEW = 0.1
"""From so many images, and below this skewness over the root of their number, the bootstrap is replaced by the
expansion that it estimates (Hall 1992): both ends agree to a hundredth of the interval, and nothing need be drawn."""

COUNTED_FROM = 5000
"""From so many images a resample is drawn image by image and counted, a tenth of the time of a multinomial draw."""

SURELY_AHEAD = 15.0
"""Standard errors at which no resample is needed to see that one column exceeds another."""

PERMUTATIONS = 999
"""The smallest p-value is then 0.001."""

_FLIPS_AT_ONCE = 64
"""Rows of signs in memory: 25 MB with 50,000 images."""

_CELLS_AT_ONCE = 2**24
"""Numbers in one intermediate array (128 MiB): columns are taken in steps of so many."""


def require_seed(seed: SupportsIndex) -> int:
    """Refuses a seed that not every generator takes, before anything is computed.

    Args:
        seed: As the user gave it.

    Returns:
        The seed.

    Raises:
        UsageError: It is no whole number, negative, or has more than 32 bits.
    """
    seed = whole_number("The seed", seed)
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"The seed {seed} cannot be used; give a whole number from 0 to {MAX_SEED}.")
    return seed


class Interval(NamedTuple):
    """Ends of a 95 % interval, NaN where none can be trusted; `reason` says why, "" where all ends are there."""

    low: Float[np.ndarray, "*rest"]
    high: Float[np.ndarray, "*rest"]
    reason: str


def mean_interval(
    values: Num[np.ndarray, "image *rest"] | Bool[np.ndarray, "image *rest"],
    *,
    limits: tuple[float, float] | None = None,
    seed: int = 0,
) -> Interval:
    """95 % interval of the mean over images by the studentised bootstrap; of booleans, that of their share.

    All columns see the same resampled images. Numbers that are only ever 0 and 1 must be given as booleans.

    Args:
        values: any unit; NaN where an image has no value.
        limits: the range that a value can have at all, in the same unit, if there is one: (-1, 1) for a change of a
            probability. It gives an honest, wide interval where the sample has too few different values.
        seed: of the resampled images.

    Returns:
        The interval, in the unit of the values. NaN for a single image; without `limits` also for fewer than 8, for
        values that are all the same, and where too few of them differ from the rest.

    Raises:
        UsageError: values outside `limits`, or infinite.
    """
    values = np.asarray(values)
    if values.dtype.kind == "b":
        return share_interval(values)
    columns, shape = _columns(values)
    _check_limits(columns, limits)
    low, high = np.full((2, columns.shape[1]), np.nan)
    for which, some in _without_nan(columns):
        low[which], high[which] = _bootstrap_t(some, seed)
        doubtful = which[~np.isfinite(low[which] + high[which])]
        low[doubtful], high[doubtful] = np.nan, np.nan
        if limits is not None and len(doubtful) and len(some) > 1:
            bounds = _dirichlet_bounds(some[:, np.isin(which, doubtful)], limits, ALPHA / 2, seed)
            low[doubtful], high[doubtful] = bounds
    if limits is not None:
        low, high = np.clip(low, *limits), np.clip(high, *limits)
    return Interval(low.reshape(shape), high.reshape(shape), _reason(columns, low))


def share_interval(values: Num[np.ndarray, "image *rest"] | Bool[np.ndarray, "image *rest"]) -> Interval:
    """95 % interval of a share of images (Clopper and Pearson 1934): 0 of 8 is 0 to 0.37.

    Args:
        values: whether each image has the property.

    Returns:
        The interval, 0 .. 1; NaN for a single image.

    Raises:
        UsageError: values other than booleans, 0 and 1.
    """
    from scipy.special import betaincinv

    columns, shape = _columns(values)
    if not np.isin(columns, (0, 1)).all():
        raise UsageError("The interval of a share was asked for; the values are not all 0 or 1. Use mean_interval.")
    n_images, count = len(columns), columns.sum(0)
    low, high = np.zeros(len(count)), np.ones(len(count))
    some, not_all = count > 0, count < n_images
    low[some] = betaincinv(count[some], n_images - count[some] + 1, ALPHA / 2)
    high[not_all] = betaincinv(count[not_all] + 1, n_images - count[not_all], 1 - ALPHA / 2)
    if n_images < 2:
        low[:], high[:] = np.nan, np.nan
    return Interval(low.reshape(shape), high.reshape(shape), _reason(columns, low))


def quantile_interval(
    values: Num[np.ndarray, "image *rest"], quantile: float, *, limits: tuple[float, float] | None = None
) -> Interval:
    """95 % interval of a quantile over images: two of the values, exact for every distribution.

    Of n independent values the number below the quantile is binomial, so the k-th smallest lies above it in a share of
    samples that does not depend on the distribution (Conover, Practical Nonparametric Statistics, 1999, section 3.2).

    Args:
        values: any unit; NaN where an image has no value.
        quantile: which one, 0 .. 1; 0.5 is the median.
        limits: the range that a value can have, in the same unit, if there is one.

    Returns:
        The interval, in the unit of the values. Where n images bound the quantile on one side only (the 5 % quantile
        below 72 images, the median below 6) the other end is that of `limits`; without them both are NaN.

    Raises:
        UsageError: a quantile outside 0 .. 1; values outside `limits`, or infinite.
    """
    if not 0 < quantile < 1:
        raise UsageError(f"The interval of quantile {quantile} was asked for; a quantile lies between 0 and 1.")
    columns, shape = _columns(values)
    _check_limits(columns, limits)
    low, high = np.full((2, columns.shape[1]), np.nan)
    for which, some in _without_nan(columns):
        n_images = len(some)
        if n_images < 2:
            continue
        ordered = np.sort(some, axis=0)
        below = _binomial_quantile(ALPHA / 2, n_images, quantile)  # the largest k with P(fewer than k below) <= 2.5 %
        above = _binomial_quantile(1 - ALPHA / 2, n_images, quantile) + 1
        if limits is not None:
            ordered = np.concatenate([np.full_like(some[:1], limits[0]), ordered, np.full_like(some[:1], limits[1])])
            low[which], high[which] = ordered[below], ordered[min(above, n_images + 1)]
        elif below >= 1 and above <= n_images:
            low[which], high[which] = ordered[below - 1], ordered[above - 1]
    reason, (_, n_images) = _reason(columns, low), _without_interval(columns, low)
    if n_images > 1:
        reason = f"too few images ({n_images}) for the {100 * quantile:.0f} % quantile"
    return Interval(low.reshape(shape), high.reshape(shape), reason)


def _binomial_quantile(probability: float, n_images: int, share: float) -> int:
    """The smallest count that at least `probability` of samples do not exceed; importing scipy.stats takes a second."""
    from scipy.special import bdtr, bdtrik

    count = max(0, int(np.ceil(bdtrik(probability, n_images, share))))
    return count - 1 if count > 0 and bdtr(count - 1, n_images, share) >= probability else count


def paired_interval(
    one: Num[np.ndarray, "image *rest"] | Bool[np.ndarray, "image *rest"],
    other: Num[np.ndarray, "other *rest"] | Bool[np.ndarray, "other *rest"],
    *,
    limits: tuple[float, float] | None = None,
    seed: int = 0,
) -> Interval:
    """95 % interval of the mean difference, one - other, of the same images.

    Args:
        one, other: the same images in the same order, in one unit; booleans count as 0 and 1.
        limits: the range of a single difference; (-1, 1) where both are shares or probabilities.
        seed: of the resampled images.

    Returns:
        As `mean_interval`. Of booleans the range is known.

    Raises:
        UsageError: arrays of different shapes; values outside `limits`.
    """
    if np.shape(one) != np.shape(other):
        raise UsageError(
            f"Paired differences need the same images; found shapes {np.shape(one)} and {np.shape(other)}."
        )
    if np.asarray(one).dtype.kind == np.asarray(other).dtype.kind == "b":
        limits = (-1.0, 1.0)
    return mean_interval(np.asarray(one, np.float64) - np.asarray(other, np.float64), limits=limits, seed=seed)


def moment_interval(
    mean: Float[np.ndarray, "*rest"], variance: Float[np.ndarray, "*rest"], skewness: Float[np.ndarray, "*rest"], n: int
) -> Interval:
    """95 % interval of a mean from moments alone, for sums over more images than fit in memory.

    Args:
        mean, variance, skewness: over the images, variance in the squared unit of the mean, skewness without a unit.
        n: number of images.

    Returns:
        The interval, in the unit of the mean; NaN for fewer than 500 images or where the skewness over the root of
        their number exceeds 0.1: there the images themselves are needed.
    """
    low, high = _skew_corrected(mean, variance, skewness, n)
    trusted = (np.abs(skewness) <= LITTLE_SKEW * np.sqrt(n)) & (n >= MANY_IMAGES)
    low, high = np.where(trusted, low, np.nan), np.where(trusted, high, np.nan)
    return Interval(low, high, "" if trusted.all() else f"too few images for values so skewed ({n:,})")


def mean_bounds(values: Num[np.ndarray, "image *rest"], limits: tuple[float, float], *, seed: int = 0) -> Interval:
    """95 % bounds of a mean that hold for every distribution within a known range, whatever the sample holds.

    Gaffke's bounds: random weights (Dirichlet) on the values and on one more, the end of the range. Of yes and no they
    are those of Clopper and Pearson. Source: Learned-Miller and Thomas, A new confidence interval for the mean of a
    bounded random variable, 2019. That they hold is proved for some distributions and contradicted by none.

    Args:
        values: any unit; NaN where an image has no value.
        limits: the range that a value can have at all.
        seed: of the random weights.

    Returns:
        The bounds, in the unit of the values; wide: with n images each lies beyond the mean by at least 3.7 / n of the
        way from the mean to that end of the range. NaN for a single image.

    Raises:
        UsageError: values outside `limits`, or infinite.
    """
    columns, shape = _columns(values)
    _check_limits(columns, limits)
    low, high = np.full((2, columns.shape[1]), np.nan)
    for which, some in _without_nan(columns):
        if len(some) > 1:
            low[which], high[which] = _dirichlet_bounds(some, limits, ALPHA / 2, seed)
    return Interval(low.reshape(shape), high.reshape(shape), _reason(columns, low))


def upper_bound(
    values: Num[np.ndarray, "image *rest"], limits: tuple[float, float], *, seed: int = 0
) -> Float[np.ndarray, "*rest"]:
    """What the mean exceeds in at most 5 % of samples, for every distribution within a known range (one-sided).

    It answers "can this be neglected?": an interval that holds zero does not, as it may only be wide. With n images
    that lose nothing it is 3 / n of the largest loss that is possible.

    Args:
        values: any unit; NaN where an image has no value.
        limits: the range that a value can have at all.
        seed: of the random weights.

    Returns:
        The bound, in the unit of the values; NaN for columns without any.

    Raises:
        UsageError: values outside `limits`, or infinite.
    """
    columns, shape = _columns(values)
    _check_limits(columns, limits)
    bound = np.full(columns.shape[1], np.nan)
    for which, some in _without_nan(columns):
        if len(some):
            bound[which] = _dirichlet_bounds(some, limits, ALPHA, seed)[1]
    return np.asarray(bound.reshape(shape))


def simultaneous_intervals(
    values: Num[np.ndarray, "image *rest"], *, limits: tuple[float, float] | None = None, seed: int = 0
) -> Interval:
    """Intervals of many means that hold all at once in 95 % of samples (max-t, studentised bootstrap).

    For statements that pick columns by what they show: "these heads matter". Correlated columns cost little.

    Args:
        values: any unit. Columns with NaN, or without an interval of their own, have none here.
        limits: the range that a value can have; intervals end there.
        seed: of the resampled images.

    Returns:
        The intervals, in the unit of the values, wider than those of `mean_interval`.

    Raises:
        UsageError: values outside `limits`, or infinite.
    """
    columns, shape = _columns(values)
    _check_limits(columns, limits)
    low, high = np.full((2, columns.shape[1]), np.nan)
    alone = np.isfinite(np.stack(_bootstrap_t(columns, seed))).all(0)
    if alone.any():
        some = columns[:, alone]
        largest, smallest = np.full(RESAMPLES, -np.inf), np.full(RESAMPLES, np.inf)
        for _, t in _studentised(some, seed):
            largest, smallest = np.maximum(largest, t.max(1)), np.minimum(smallest, t.min(1))
        ends = tails(smallest, ALPHA / 2)[0], tails(largest, ALPHA / 2)[1]
        if np.isfinite(ends).all():
            mean, error = some.mean(0), some.std(0) / np.sqrt(len(some))
            low[alone], high[alone] = mean - ends[1] * error, mean - ends[0] * error
    if limits is not None:
        low, high = np.clip(low, *limits), np.clip(high, *limits)
    return Interval(low.reshape(shape), high.reshape(shape), _reason(columns, low, needs_all=True))


def candidates_for_largest(values: Num[np.ndarray, "image *rest"], *, seed: int = 0) -> Bool[np.ndarray, "*rest"]:
    """Columns whose mean may be the largest of all: the true largest is among them in 95 % of samples.

    A column is out where another one exceeds it by more than the largest difference that resampled images show (max-t
    over paired differences; multiple comparisons with the best, Hsu 1981). Only where one is left is it *the* largest.

    Args:
        values: in one unit; columns with NaN are no candidates.
        seed: of the resampled images.

    Returns:
        True for candidates. All of them for fewer than 8 images, which cannot tell.
    """
    from scipy.special import ndtr, stdtrit

    columns, shape = _columns(values)
    present = np.isfinite(columns).all(0)
    candidates = present.copy()
    some = columns[:, present]
    n_images = len(some)
    if n_images < FEWEST_IMAGES or some.shape[1] < 2:
        return np.asarray(candidates.reshape(shape))
    mean = some.mean(0)
    centred = some - mean
    # Resampled means vary less than means of new images, by this factor.
    shifts = resampled_means(centred, seed) * np.sqrt(n_images / (n_images - 1))
    covariance = centred.T @ centred / (n_images * (n_images - 1))
    spread = np.diag(covariance)
    kept = np.ones(len(mean), dtype=bool)
    for at in range(len(mean)):
        error = np.sqrt(np.maximum(spread + spread[at] - 2 * covariance[at], 0))
        moving = error > 1e-9 * np.sqrt(spread.max())
        if (~moving & (mean > mean[at])).any():  # ahead by the same in every image: without any doubt
            kept[at] = False
        elif moving.any():
            ahead = (mean - mean[at])[moving] / error[moving]
            if ahead.max() <= 0 or ahead.max() > SURELY_AHEAD:
                kept[at] = ahead.max() <= 0
                continue
            by_chance = ((shifts[:, moving] - shifts[:, at, None]) / error[moving]).max(1)
            # The error is of a sample too: Student's t where resamples with a fixed error give the normal.
            limit = stdtrit(n_images - 1, ndtr(np.quantile(by_chance, 1 - ALPHA)))
            kept[at] = ahead.max() <= limit
    candidates[present] = kept
    return np.asarray(candidates.reshape(shape))


def group_p_values(
    values: Float[np.ndarray, "image *rest"], groups: Int[np.ndarray, "member"], *, seed: int = 0
) -> Float[np.ndarray, "group *rest"]:
    """How surprising it is that a group's mean exceeds that of all other images, corrected for all groups and columns.

    Images are dealt to the groups at random, again and again, and the largest standardised excess of any group and
    column is noted (Westfall and Young 1993). If groups do not matter, the smallest p-value of all is below 0.05 in 5 %
    of studies, for every distribution and number of images.

    Args:
        values: any unit; columns with NaN, or of equal numbers, have no p-value.
        groups: the group of each image, as numbers.
        seed: of the random dealing.

    Returns:
        Corrected p-values, 0.001 .. 1, groups in ascending order; NaN for groups of one image or of all.

    Raises:
        UsageError: another number of groups than images.
    """
    from scipy.sparse import csc_array

    columns, shape = _columns(values)
    if len(groups) != len(columns):
        raise UsageError(f"Each image needs its group; found {len(columns)} images and {len(groups)} groups.")
    _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    n_images, mean, spread = len(columns), columns.mean(0), columns.std(0)
    p_values = np.full((len(sizes), columns.shape[1]), np.nan)
    tested = (sizes > 1) & (sizes < n_images)
    varies = np.isfinite(spread) & _vary(mean, spread)
    if tested.any() and varies.any():
        standard = np.ascontiguousarray((columns[:, varies] - mean[varies]) / spread[varies])
        scale = (np.sqrt(n_images / (sizes * np.maximum(n_images - sizes, 1))))[:, None]

        ones, ends = np.ones(n_images), np.arange(n_images + 1)

        def excess(member: Int[np.ndarray, "image"]) -> Float[np.ndarray, "group column"]:
            # sum of the group, over its standard deviation when n_images are dealt without replacement
            groups = csc_array((ones, member, ends), shape=(len(sizes), n_images))
            return np.asarray((groups @ standard * scale)[tested])

        observed = excess(member)
        reached = np.ones_like(observed)
        places, dealt = np.sort(member), np.empty_like(member)
        rng = np.random.default_rng(require_seed(seed))
        for _ in range(PERMUTATIONS):
            dealt[rng.permutation(n_images)] = places
            reached += excess(dealt).max() >= observed
        p_values[np.ix_(tested, varies)] = reached / (PERMUTATIONS + 1)
    return np.asarray(p_values.reshape(len(sizes), *shape))


def sign_flip_p_values(differences: Num[np.ndarray, "image *rest"], *, seed: int = 0) -> Float[np.ndarray, "*rest"]:
    """How surprising paired differences are where there is none, corrected for all columns.

    If the two sides differ by nothing but chance, a difference may as well have the other sign. The signs of the images
    are flipped at random, the same ones in all columns, and the largest standardised mean of any column is noted
    (Westfall and Young 1993). Under that null the smallest p-value of all is below 0.05 in at most 5 % of studies, for
    every distribution that is symmetric about 0 and every number of images.

    Args:
        differences: one side less the other, in any unit; NaN where an image has none.
        seed: of the signs.

    Returns:
        Corrected p-values, 0.001 .. 1; 1 for columns that are 0 everywhere, NaN for columns without values.

    Raises:
        UsageError: there is no image.
    """
    columns, shape = _columns(differences)
    absent = np.isnan(columns).all(0)
    values = np.where(np.isnan(columns), 0.0, columns)
    # the sum of squares is the same whatever the signs, so this orders columns as Student's t does
    length = np.sqrt((values**2).sum(0))
    values = np.divide(values, length, out=np.zeros_like(values), where=length > 0)
    observed = np.abs(values.sum(0))
    reached = np.ones_like(observed)
    rng = np.random.default_rng(require_seed(seed))
    for start in range(0, PERMUTATIONS, _FLIPS_AT_ONCE):
        n_flips = min(_FLIPS_AT_ONCE, PERMUTATIONS - start)
        signs = rng.integers(0, 2, size=(n_flips, len(values)), dtype=np.int8) * 2.0 - 1.0
        largest = np.abs(signs @ values).max(1, initial=0.0)
        reached += (largest[:, None] >= observed - 1e-12).sum(0)  # the same signs again, in another order of sums
    p_values = np.where(absent, np.nan, reached / (PERMUTATIONS + 1))
    return np.asarray(p_values.reshape(shape))


def spearman(a: Num[np.ndarray, "n"], b: Num[np.ndarray, "other"]) -> float:
    """Spearman's rank correlation of paired numbers; ties share their mean rank.

    Args:
        a, b: any units.

    Returns:
        -1 (opposite order) .. 1 (the same order); NaN where either side is constant or there are fewer than two pairs,
        as no order exists then.

    Raises:
        UsageError: NaN in either (leave those pairs out and say how many), or different lengths.
    """
    if np.shape(a) != np.shape(b):
        raise UsageError(f"A rank correlation needs pairs; found {len(a)} and {len(b)} numbers.")
    missing = int((np.isnan(a) | np.isnan(b)).sum())
    if missing:
        raise UsageError(
            f"A rank correlation of {len(a)} pairs was asked for; {missing} of them hold NaN, which has no rank. Leave "
            "those pairs out."
        )
    if len(a) < 2:
        return float("nan")
    ranks = [rank - rank.mean() for rank in (_ranks(a), _ranks(b))]
    scale = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / scale if scale else float("nan")


# --- the methods ------------------------------------------------------------------------------------------------------


def _bootstrap_t(
    columns: Float[np.ndarray, "image column"], seed: int
) -> tuple[Float[np.ndarray, "column"], Float[np.ndarray, "column"]]:
    """Both ends; not finite where the resamples do not bound them, NaN for too few images."""
    n_images, n_columns = columns.shape
    low, high = np.full((2, n_columns), np.nan)
    if n_images < FEWEST_IMAGES:
        return low, high
    mean, spread = columns.mean(0), columns.std(0)
    error = spread / np.sqrt(n_images)
    skewness = _skewness(columns, mean, spread)
    drawn = ~((n_images >= MANY_IMAGES) & (np.abs(skewness) <= LITTLE_SKEW * np.sqrt(n_images)))
    low[:], high[:] = _skew_corrected(mean, spread**2, skewness, n_images)
    places = np.flatnonzero(drawn)
    for start, t in _studentised(columns[:, places], seed):
        which = places[start : start + t.shape[1]]
        lower, upper = tails(t, ALPHA / 2)
        with np.errstate(invalid="ignore"):  # infinity times no spread: no interval
            low[which], high[which] = mean[which] - upper * error[which], mean[which] - lower * error[which]
    nothing = ~_vary(mean, spread)
    low[nothing], high[nothing] = np.nan, np.nan
    return low, high


def _studentised(columns: Float[np.ndarray, "image column"], seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first column, [resample column]): how far each resampled mean lies off, in its own standard errors."""
    n_images = len(columns)
    step = max(1, _CELLS_AT_ONCE // max(RESAMPLES, n_images) // 2)
    for start in range(0, columns.shape[1], step):
        centred = columns[:, start : start + step] - columns[:, start : start + step].mean(0)
        shift, square = np.split(resampled_means(np.concatenate([centred, centred**2], axis=1), seed), 2, axis=1)
        variance = square - shift**2
        flat = variance <= 1e-12 * (centred**2).mean(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = shift / np.sqrt(np.where(flat, 0, variance) / n_images)
        yield start, np.where(flat, np.copysign(np.inf, shift), t)


def tails(values: Float[np.ndarray, "resample *rest"], tail: float) -> tuple[np.ndarray, np.ndarray]:
    """The values that cut off a share at either end; never between two, as one of them may be infinite.

    Args:
        values: resampled statistics.
        tail: the share cut off at each end, 0 .. 0.5.

    Returns:
        Lower and upper ends, in the unit of the values.
    """
    cut = max(int(tail * len(values)), 1)
    parted = np.partition(values, (cut - 1, len(values) - cut), axis=0)
    return np.asarray(parted[cut - 1]), np.asarray(parted[len(values) - cut])


def _skew_corrected(
    mean: np.ndarray, variance: np.ndarray, skewness: np.ndarray, n_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """First-order Edgeworth expansion of the studentised mean (Hall, The Bootstrap and Edgeworth Expansion, 1992)."""
    from scipy.special import stdtrit

    z = float(stdtrit(max(n_images - 1, 1), 1 - ALPHA / 2))
    tilt = skewness * (2 * z**2 + 1) / (6 * np.sqrt(n_images))
    error = np.sqrt(variance / max(n_images - 1, 1))
    return mean - (z - tilt) * error, mean + (z + tilt) * error


def _dirichlet_bounds(
    columns: Float[np.ndarray, "image column"], limits: tuple[float, float], tail: float, seed: int
) -> tuple[Float[np.ndarray, "column"], Float[np.ndarray, "column"]]:
    """Gaffke's bounds, each missed with probability `tail`."""
    n_images = len(columns)
    rng = np.random.default_rng(require_seed(seed))
    inner, last = np.empty((RESAMPLES, columns.shape[1])), np.empty((RESAMPLES, 1))
    step = max(1, _CELLS_AT_ONCE // n_images)
    for start in range(0, RESAMPLES, step):
        part = slice(start, start + step)
        weights = rng.exponential(size=(min(step, RESAMPLES - start), n_images + 1))
        weights /= weights.sum(1, keepdims=True)
        inner[part], last[part] = weights[:, :-1] @ columns, weights[:, -1:]
    return tails(inner + last * limits[0], tail)[0], tails(inner + last * limits[1], tail)[1]


def resampled_means(columns: Float[np.ndarray, "image column"], seed: int) -> Float[np.ndarray, "resample column"]:
    """Means of 2,000 bootstrap resamples; all columns see the same resampled images.

    Args:
        columns: any unit, free of NaN.
        seed: of the resampled images.

    Returns:
        A mean per resample and column, in the unit of the column.
    """
    rng = np.random.default_rng(require_seed(seed))
    n_images = len(columns)
    means = np.empty((RESAMPLES, columns.shape[1]))
    step = max(1, _CELLS_AT_ONCE // n_images)
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        if n_images < COUNTED_FROM:
            times = rng.multinomial(n_images, np.full(n_images, 1 / n_images), size=size)
        else:
            drawn = (rng.integers(0, n_images, n_images) for _ in range(size))
            times = np.stack([np.bincount(indices, minlength=n_images) for indices in drawn])
        means[start : start + step] = times.astype(np.float64) @ columns / n_images
    return means


def _vary(mean: np.ndarray, spread: np.ndarray) -> Bool[np.ndarray, "column"]:
    """Which columns hold different numbers: rounding of equal numbers is no spread."""
    return np.asarray(spread > 1e-12 * np.abs(mean))


def _skewness(columns: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> Float[np.ndarray, "column"]:
    with np.errstate(invalid="ignore", divide="ignore"):
        centred = columns - mean
        return np.asarray((centred * centred * centred).mean(0) / spread**3)  # ** 3 takes ten times as long


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse])


# --- columns ----------------------------------------------------------------------------------------------------------


def _columns(values: np.ndarray) -> tuple[Float[np.ndarray, "image column"], tuple[int, ...]]:
    values = np.asarray(values)
    if values.ndim == 0 or len(values) == 0:
        raise UsageError("An interval over images was asked for; there is no image.")
    n_columns = int(np.prod(values.shape[1:]))
    return values.reshape(len(values), n_columns).astype(np.float64), values.shape[1:]


def _without_nan(columns: Float[np.ndarray, "image column"]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (columns' positions, their values) with the same images left in, so that each group is free of NaN."""
    present = ~np.isnan(columns)
    if present.all():
        yield np.arange(columns.shape[1]), columns
        return
    patterns, member = np.unique(present, axis=1, return_inverse=True)
    for at in range(patterns.shape[1]):
        which = np.flatnonzero(member.ravel() == at)
        yield which, columns[np.ix_(patterns[:, at], which)]


def _check_limits(columns: np.ndarray, limits: tuple[float, float] | None) -> None:
    if np.isinf(columns).any():
        raise UsageError("An interval was asked for; some values are infinite. Leave those images out and say so.")
    if limits is None or np.isnan(columns).all():
        return
    # Differences of probabilities in float32 overshoot by rounding.
    slack = 1e-6 * (limits[1] - limits[0])
    least, most = float(np.nanmin(columns)), float(np.nanmax(columns))
    if least < limits[0] - slack or most > limits[1] + slack:
        raise UsageError(f"Values were said to lie in {limits[0]} to {limits[1]}; found {least:.4g} to {most:.4g}.")


def _reason(columns: np.ndarray, low: np.ndarray, *, needs_all: bool = False) -> str:
    """Why columns with values have no interval, and how many where others have one; `needs_all`: of all images."""
    lacking, n_images = _without_interval(columns, low)
    if not lacking.any():
        return ""
    spread = np.nanstd(columns[:, lacking], axis=0)
    if n_images < 2:
        why = "a single image says nothing of others"
    elif n_images < FEWEST_IMAGES:
        why = f"too few images ({n_images}; {FEWEST_IMAGES} are needed)"
    elif needs_all and n_images < len(columns):
        why = f"{len(columns) - n_images} of {len(columns)} images without a value"
    elif not _vary(np.nanmean(columns[:, lacking], axis=0), spread).any():
        why = f"the same value in all images ({n_images})"
    else:
        why = f"too few images ({n_images}) with values that differ from the rest"
    n_columns = int((~np.isnan(columns).all(0)).sum())
    return why if lacking.sum() == n_columns else f"{why}, for {lacking.sum()} of {n_columns} columns"


def _without_interval(columns: np.ndarray, low: np.ndarray) -> tuple[Bool[np.ndarray, "column"], int]:
    """Columns that have values and no interval, and the images with a value, of that which has most."""
    n_present = (~np.isnan(columns)).sum(0)
    lacking = np.isnan(low) & (n_present > 0)
    return lacking, int(n_present[lacking].max(initial=0))
