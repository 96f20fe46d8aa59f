"""Why a head is important: everything that a study knows of each head in one table, and as sentences. No torch.

The question of Li et al. 2023, answered from measures of this study alone; what it lacks is said, with the command that
adds it.
"""

from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from vitrail.data import LabelSource
from vitrail.errors import UsageError
from vitrail.heads.correction import correct_mean, exact_part, exact_values, how_corrected
from vitrail.heads.exact_names import EXACT_VALUES
from vitrail.heads.head_values import hops_of_layers
from vitrail.heads.summary import LARGE_DROP, pruning_table
from vitrail.layer_summary import in_first_patches
from vitrail.patterns.names import RULES
from vitrail.patterns.tables import all_patterns, pattern_of_head
from vitrail.sentence import Sentence, percent
from vitrail.stats import mean_interval

__all__ = ["extreme_images", "missing", "why_sentences", "why_table"]

METRICS = {
    "drop": "drop of the label's probability",
    "head_divergence": "divergence of the predictions",
    "head_loss_change": "change of the loss",
    "head_value_change": "change of the value",
    "head_output_shift": "shift of the output",
    "head_cls_shift": "shift of the class token",
    "head_token_shift": "shift of all tokens",
}
"""Importance by every metric, high where the head matters, the one that ranks heads first."""

MEANS = (*METRICS, "strength_entropy", "attention_distance")
"""Whose mean over images the table holds."""

N_IMAGES = 3
"""Images that are named for a head: those where it matters most, and least."""

NEITHER_PART = 0.005
"""A drop of the label's probability below this is called none: it rounds to 0.00."""

BOTH_PARTS = 0.5
"""Both parts of a head matter if the smaller drop is above this share of the larger."""

SAME_MAP, OTHER_MAP = 0.2, 0.8
"""Below the one image dependence, a head's map is called nearly the same for all images, above the other another map
for each: the outer fifths of a scale from 0 to 1."""

SOURCES = {
    "heads": ("drop", "strength_entropy", "attention_distance"),
    "regions": ("head_region_probability",),
    "patterns": ("pattern_rule", "image_dependence"),
}
"""What each word of `--measures` gives this table."""

WORDS = {
    "drop": "what pruning the head does to the label",
    "strength_entropy": "how its attention spreads over distance",
    "attention_distance": "how far it looks",
    "head_region_probability": "which part of the head carries its importance over all images",
    "pattern_rule": "the name of its pattern",
    "image_dependence": "how much its map depends on the image",
}


def why_table(study: xr.Dataset) -> xr.Dataset:
    """A row per (layer, head) with what explains it. Intervals are in `vitrail.heads.summary.head_table`.

    Args:
        study: An opened study.

    Returns:
        Arrays [layer head]; NaN, or "" for words, where a layer lacks the head:

        - `NAME_mean` over images of every metric of importance, of entropy and of distance, in the unit of the measure;
          estimates are corrected and lengths converted as in `head_table`; `drop` is the probability that the label
          loses by pruning;
        - `rank` by the first of drop, divergence, .., token shift that the study holds, 1 the most
          important (`attrs["ranked_by"]`);
        - `drop_class_part`, `drop_patch_part`: mean probability that the label loses without that part (region modes 3,
          4);
        - `strength_entropy_percentile`: share of the other heads, in percent, whose mean entropy is lower; in a
          hierarchy of those whose layers have as many hops (`attrs["among"]`); NaN where there is no other;
        - `pattern` and `pattern_rule_held`: name and rule; `pattern_share`: images whose map takes that name by itself;
          `rule_...` the numbers behind them; `image_dependence`.

    Raises:
        UsageError: The study has no images.
    """
    if study.sizes.get("image", 0) == 0:
        raise UsageError("A table of heads was asked for; the study holds no images. Run `vitrail study` first.")
    table = xr.Dataset(attrs={"n_images": study.sizes["image"]})
    for name in MEANS:
        if _is_known(study, name):
            table[f"{name}_mean"] = _on_heads(_mean(study, name))
    if "attention_distance_mean" in table:
        unit = in_first_patches(study["attention_distance"][:0], study.attrs.get("grids")).attrs.get("unit", "patches")
        table["attention_distance_mean"].attrs["unit"] = str(unit)
    metric = _ranking_metric(study)
    if metric is not None:
        values = table[f"{metric}_mean"].to_numpy()
        table["rank"] = _on_heads(_ranks(values))
        table.attrs["ranked_by"] = METRICS[metric]
    if {"head_region_probability", "probability"} <= set(study):
        drop = study["probability"].to_numpy()[:, None, None, None] - study["head_region_probability"].to_numpy()
        for at, part in enumerate(("class", "patch")):
            table[f"drop_{part}_part"] = _on_heads(drop[..., at].mean(0, dtype=np.float64))
    if "strength_entropy_mean" in table:
        _add_entropy_percentiles(table, hops_of_layers(study))
    if "pattern_rule" in study:
        _add_patterns(table, study)
    return table


def why_sentences(study: xr.Dataset, layer: int, head: int, *, table: xr.Dataset | None = None) -> list[Sentence]:
    """What makes a head important, or not, with its numbers; then what this study cannot say.

    Args:
        study: An opened study.
        layer: Index of the layer.
        head: Index of the head.
        table: `why_table(study)`, where it was computed before.

    Returns:
        Sentences, each with the measures that it is read from; the last ones are those of `missing`, with the commands
        that add what is not known.

    Raises:
        UsageError: The study has no such head, or no images.
    """
    table = why_table(study) if table is None else table
    _require(study, table, layer, head)
    row = table.isel(layer=layer, head=head, missing_dims="ignore")  # a study may hold nothing of single heads
    sentences = [
        *_importance(study, row, layer, head),
        *_other_metrics(table, layer, head),
        *_parts(study, row, layer, head),
        *_spread(row),
        *_pattern(study, row, layer, head),
        *_images(study, row, layer, head),
    ]
    return [*sentences, *(Sentence(text) for text in missing(study).values())]


def extreme_images(
    study: xr.Dataset, layer: int, head: int, *, n_images: int = N_IMAGES
) -> tuple[Int[np.ndarray, "place"], Int[np.ndarray, "place"]]:
    """The images where a head matters most and least, by the metric that ranks heads.

    Args:
        study: An opened study.
        layer: Index of the layer.
        head: Index of the head.
        n_images: How many of each.

    Returns:
        Positions in the study of images that have a value, an exact one where estimates are corrected, the most extreme
        first; empty where the study ranks no heads or lacks the head. In a small study an image may be among both.
    """
    metric = _ranking_metric(study)
    none = np.array([], np.int64)
    if metric is None:
        return none, none
    exact = exact_values(study, metric) if how_corrected(study) else None
    if exact is not None:
        values = exact[:, layer, head]
    else:
        names = [metric] if metric != "drop" else ["probability", "head_probability"]
        study[names].load()  # a chunk of the store holds all heads
        values = _values(study[names].isel(layer=layer, head=head, missing_dims="ignore"), metric)
    order = np.argsort(values, kind="stable")[: np.count_nonzero(~np.isnan(values))]  # those without one come last
    return order[::-1][:n_images], order[:n_images]


def missing(study: xr.Dataset) -> dict[str, str]:
    """What the table lacks of a study.

    Args:
        study: An opened study.

    Returns:
        A sentence for each word of `--measures` that would add it.
    """
    available = set(map(str, study)) | ({"drop"} if {"probability", "head_probability"} <= set(study) else set())
    left_out = study.attrs.get("left_out", {})
    sentences = {}
    for word, names in SOURCES.items():
        lacks = [name for name in names if name not in available]
        why = next((left_out[name] for name in lacks if name in left_out), None)
        if name_of := [WORDS[name] for name in lacks]:
            rest = (
                f"the model cannot give it: {why}"
                if why
                else f"`vitrail study ... --measures {_measures_with(available, word)}` adds it"
            )
            sentences[word] = f"This study does not hold {' and '.join(name_of)}; {rest}."
    return sentences


def _measures_with(available: set[str], word: str) -> str:
    """What the study was asked for, as far as one sees, and the word that is new."""
    words = [each for each, names in SOURCES.items() if available & set(names) or each == word]
    return ",".join(words)


# --- the table -------------------------------------------------------------------------------------------------------


def _ranking_metric(study: xr.Dataset) -> str | None:
    return next((metric for metric in METRICS if _is_known(study, metric)), None)


def _is_known(study: xr.Dataset, metric: str) -> bool:
    return metric in study or (metric == "drop" and {"probability", "head_probability"} <= set(study))


def _values(study: xr.Dataset, metric: str) -> Float[np.ndarray, "image ..."]:
    if metric != "drop":
        return in_first_patches(study[metric], study.attrs.get("grids")).to_numpy()
    pruned = study["head_probability"].to_numpy()
    before = study["probability"].to_numpy().astype(np.float64)
    return np.asarray(before.reshape(-1, *[1] * (pruned.ndim - 1)) - pruned)


def _mean(study: xr.Dataset, metric: str) -> Float[np.ndarray, "layer head"]:
    """Over the images that have a number, corrected where it is estimated; NaN where none has."""
    values, exact = _values(study, metric), exact_values(study, metric)
    corrected = None if exact is None else correct_mean(values, exact)
    if corrected is not None:
        return corrected.mean
    total, n_present = values.sum(0, dtype=np.float64), np.full(values.shape[1:], len(values))
    lacking = np.isnan(total)
    if lacking.any():
        total[lacking] = np.nansum(values[:, lacking], 0, dtype=np.float64)
        n_present[lacking] = (~np.isnan(values[:, lacking])).sum(0)
    return np.where(n_present > 0, total / np.maximum(n_present, 1), np.nan)


def _ranks(values: Float[np.ndarray, "layer head"]) -> Float[np.ndarray, "layer head"]:
    """1 for the largest; ties go to the earlier layer."""
    flat = values.ravel()
    ranks = np.full(flat.shape, np.nan)
    order = [at for at in np.argsort(-flat, kind="stable") if not np.isnan(flat[at])]
    ranks[order] = np.arange(1, len(order) + 1)
    return ranks.reshape(values.shape)


def _percentiles(values: Float[np.ndarray, "layer head"]) -> Float[np.ndarray, "layer head"]:
    present = values[~np.isnan(values)]
    if len(present) < 2:
        return np.full(values.shape, np.nan)  # of a head without others
    lower = (present[None] < values.ravel()[:, None]).sum(1) / (len(present) - 1) * 100
    return np.where(np.isnan(values), np.nan, lower.reshape(values.shape))


def _add_entropy_percentiles(table: xr.Dataset, hops: Int[np.ndarray, "layer"]) -> None:
    """Among the heads of layers with as many hops: their logarithm is the highest entropy that there can be."""
    entropies = table["strength_entropy_mean"].to_numpy()
    percentiles = np.full_like(entropies, np.nan)
    several = len({int(each) for each in hops if each}) > 1
    for alike in [hops == each for each in set(hops.tolist())] if several else [slice(None)]:
        percentiles[alike] = _percentiles(entropies[alike])
    table["strength_entropy_percentile"] = _on_heads(percentiles)
    table["strength_entropy_percentile"].attrs["among"] = "heads on grids as fine" if several else "heads"


def _add_patterns(table: xr.Dataset, study: xr.Dataset) -> None:
    shape = (study.sizes["layer"], study.sizes["head"])
    words = {name: np.full(shape, "", dtype=object) for name in ("pattern", "pattern_rule_held")}
    numbers = {name: np.full(shape, np.nan) for name in ("pattern_share", *(f"rule_{rule}" for rule in RULES))}
    for pattern in all_patterns(study):
        at = pattern.layer, pattern.head
        words["pattern"][at], words["pattern_rule_held"][at] = pattern.naming.label, pattern.naming.rule
        numbers["pattern_share"][at] = pattern.share
        for rule, value in zip(RULES, pattern.values, strict=True):
            numbers[f"rule_{rule}"][at] = value
    for name, values in (*words.items(), *numbers.items()):
        table[name] = xr.DataArray(values if name in numbers else values.astype(np.str_), dims=("layer", "head"))
    if "image_dependence" in study:
        table["image_dependence"] = study["image_dependence"].reset_coords(drop=True)


def _on_heads(values: Float[np.ndarray, "layer head"]) -> xr.DataArray:
    return xr.DataArray(values, dims=("layer", "head"))


# --- the sentences ---------------------------------------------------------------------------------------------------


def _require(study: xr.Dataset, table: xr.Dataset, layer: int, head: int) -> None:
    n_heads = study.attrs.get("n_heads", [table.sizes.get("head", 0)] * table.sizes.get("layer", 0))
    if not (0 <= layer < len(n_heads) and 0 <= head < n_heads[layer]):
        raise UsageError(
            f"L{layer}H{head} was asked for; the study has layers 0 to {len(n_heads) - 1} with "
            f"{max(n_heads, default=0)} heads at most."
        )


def _importance(study: xr.Dataset, row: xr.Dataset, layer: int, head: int) -> Iterator[Sentence]:
    if "rank" not in row or np.isnan(row["rank"]):
        return
    n_images, n_heads = study.sizes["image"], sum(study.attrs.get("n_heads", [0]))
    rank = f"L{layer}H{head} is {_ordinal(int(row['rank']))}" + (f" of {n_heads} heads" if n_heads else "")
    if "drop_mean" not in row:
        yield Sentence(f"{rank} by {row.attrs['ranked_by']}.", measure=_measure_of(row.attrs["ranked_by"]))
        return
    before = float(study["probability"].mean())
    drop = float(row["drop_mean"])
    moved = "loses" if drop >= 0 else "gains"
    if n_images == 1:
        yield Sentence(
            f"{rank}: without it the label {moved} {abs(drop):z.3f} of its probability {before:z.3f} in this image.",
            measure="head_probability",
        )
        return
    pruned = pruning_table(study, layer, head)
    corrected = f", {words}" if (words := how_corrected(study)) else ""
    yield Sentence(
        f"{rank}: without it the label {moved} {abs(drop):z.3f} of its probability {before:z.3f} on average "
        f"({_interval(pruned, 'drop', '{:z.3f}'.format, ' of the loss')}{corrected}), and more than {LARGE_DROP:g} in "
        f"{percent(float(pruned['drop_share_large']), 1)} of {exact_part(study).sizes['image']:,} images.",
        measure="head_probability",
    )
    flips = (
        f"The prediction changes in {percent(float(pruned['flip_share']), 1)} of them" if "flip_share" in pruned else ""
    )
    own = study.attrs.get("labels") == LabelSource.PREDICTED
    if "accuracy" in pruned and not own:
        fall = (
            f"accuracy goes from {_tenths(pruned.attrs['accuracy'])} to {_tenths(float(pruned['accuracy']))} "
            f"({_interval(pruned, 'accuracy', _tenths)})"
        )
        flips = f"{flips}, {fall}" if flips else fall[0].upper() + fall[1:]
    if flips:
        yield Sentence(flips + ".", measure="head_flip" if "head_flip" in study else "head_prediction")


def _measure_of(words: str) -> str:
    """The measure that one of the metrics is read from."""
    metric = next(name for name, each in METRICS.items() if each == words)
    return "head_probability" if metric == "drop" else metric


def _interval(row: xr.Dataset, name: str, form: Callable[[float], str], of_what: str = "") -> str:
    """The 95 % interval of a number of the table in words; without one, the reason."""
    low, high = float(row[f"{name}_low"]), float(row[f"{name}_high"])
    if np.isnan(low) or np.isnan(high):
        return f"no 95 % interval: {row.attrs.get('no_interval', 'too few images')}"
    return f"95 % interval{of_what} {form(low)} to {form(high)}"


def _tenths(share: float) -> str:
    return percent(share, 1)


def _other_metrics(table: xr.Dataset, layer: int, head: int) -> Iterator[Sentence]:
    ranks = dict[str, str]()
    for metric, words in METRICS.items():
        if f"{metric}_mean" not in table or words == table.attrs["ranked_by"]:
            continue
        values = table[f"{metric}_mean"].to_numpy()
        rank = _ranks(values)[layer, head]
        if not np.isnan(rank):
            ranks[f"{_ordinal(int(rank))} by {words} ({values[layer, head]:.3g})"] = _measure_of(words)
    if ranks:
        yield Sentence(
            f"By other measures of importance it is {', '.join(ranks)}.",
            measure=next(iter(ranks.values())),
            evidence=ranks.items(),
        )


def _parts(study: xr.Dataset, row: xr.Dataset, layer: int, head: int) -> Iterator[Sentence]:
    if "drop_class_part" not in row or np.isnan(row["drop_class_part"]):
        return
    by_class, by_patch = float(row["drop_class_part"]), float(row["drop_patch_part"])
    numbers = (
        f"without class rows and columns the label loses {by_class:z.3f}, without attention between patches "
        f"{by_patch:z.3f}"
    )
    yield Sentence(
        f"{_verdict_on_parts(study, by_class, by_patch, layer, head)}: {numbers}.", measure="head_region_probability"
    )


def _verdict_on_parts(study: xr.Dataset, by_class: float, by_patch: float, layer: int, head: int) -> str:
    """Which part carries a head: only what 95 % intervals of the drops and of their paired difference show."""
    n_images = study.sizes["image"]
    larger, smaller = max(by_class, by_patch), min(by_class, by_patch)
    if larger < NEITHER_PART:
        return f"Neither part of it matters alone in {'these images' if n_images > 1 else 'this image'}"
    alike, part = smaller > BOTH_PARTS * larger, "class" if by_class > by_patch else "patch"
    if n_images == 1:
        return "Both of its parts matter" if alike else f"Its {part} part carries it"
    drops = study["probability"].to_numpy()[:, None] - study["head_region_probability"].to_numpy()[:, layer, head]
    columns = np.column_stack([drops, drops[:, 0] - drops[:, 1]])
    low, high, _ = mean_interval(columns, limits=(-1.0, 1.0))
    if alike and (low[:2] > 0).all():
        return "Both of its parts matter"
    if low[2] > 0 or high[2] < 0:
        return f"Its {part} part {'matters more' if alike else 'carries it'}"
    return "Which of its parts matters more is not shown (95 %)"


def _spread(row: xr.Dataset) -> Iterator[Sentence]:
    clauses = dict[str, str]()
    if "strength_entropy_mean" in row and not np.isnan(row["strength_entropy_mean"]):
        percentile = row["strength_entropy_percentile"]
        among = "" if np.isnan(percentile) else f", {_wider_than(float(percentile), percentile.attrs['among'])}"
        clauses["strength_entropy"] = (
            f"the spread of its attention over distances is {float(row['strength_entropy_mean']):.2f} nats of entropy"
            f"{among}"
        )
    if "attention_distance_mean" in row and not np.isnan(row["attention_distance_mean"]):
        distance = row["attention_distance_mean"]
        clauses["attention_distance"] = f"it looks {float(distance):z.1f} {distance.attrs['unit']} far on average"
    if clauses:
        text = ", and ".join(clauses.values())
        yield Sentence(
            text[0].upper() + text[1:] + ".",
            measure=next(iter(clauses)),
            evidence=[(clause, name) for name, clause in list(clauses.items())[1:]],
        )


def _wider_than(percentile: float, among: str = "heads") -> str:
    if percentile in (0, 100):
        return f"the widest of all {among}" if percentile else f"the narrowest of all {among}"
    return f"wider than that of {min(max(percentile, 1), 99):.0f} % of the other {among}"


def _pattern(study: xr.Dataset, row: xr.Dataset, layer: int, head: int) -> Iterator[Sentence]:
    if "pattern" not in row or not str(row["pattern"].item()):
        return
    pattern = pattern_of_head(study, layer, head)
    n_images = study.sizes["image"]
    stable = (
        f"; {percent(pattern.share)} of the images have this pattern when taken alone"
        if n_images > 1 and not np.isnan(pattern.share)
        else ""
    )
    other = f", most others {pattern.others[0][0]}" if stable and pattern.others else ""
    yield Sentence(
        f"Its pattern is {pattern.naming.label}: {pattern.naming.rule}{stable}{other}.", measure="pattern_rule"
    )
    if pattern.image_dependence is not None:
        yield Sentence(
            f"How much its map depends on the image: {pattern.image_dependence:z.2f} of 1, "
            f"{_degree(pattern.image_dependence)}.",
            measure="image_dependence",
        )


def _degree(image_dependence: float) -> str:
    if image_dependence < SAME_MAP:
        return "nearly the same map for all images"
    return "another map for every image" if image_dependence > OTHER_MAP else "a map that partly follows the image"


def _images(study: xr.Dataset, row: xr.Dataset, layer: int, head: int) -> Iterator[Sentence]:
    most, least = extreme_images(study, layer, head)
    if study.sizes["image"] < 2 or not len(most) or "drop_mean" not in row:
        return
    ids = study.indexes["image"]
    before = study["probability"].to_numpy()
    exact = EXACT_VALUES["head_probability"] if how_corrected(study) else "head_probability"
    after = study[exact].isel(layer=layer, head=head).to_numpy()

    def describe(at: int) -> str:
        return f"{_short_name(str(ids[at]))} (probability {before[at]:z.2f} to {after[at]:z.2f})"

    most = most[~np.isin(most, least[:1])]  # of two or three images that with the least is not among the most
    if not len(most):
        return
    positions = [int(at) for at in (*most, least[0])]
    words = [f"{before[at]:z.2f} to {after[at]:z.2f}" for at in positions]
    yield Sentence(
        f"It matters most for {', '.join(map(describe, positions[:-1]))}, and "
        f"{_least(float(after[positions[-1]] - before[positions[-1]]), describe(positions[-1]))}.",
        measure="head_probability",
        images=zip(positions, [*words[:-1], f"least: {words[-1]}"], strict=True),
        caption=f"the probability with L{layer}H{head} and without it",
    )


def _least(gain: float, described: str) -> str:
    """Of the image that needs the head least, which may be better without it."""
    return f"without it the label gains in {described}" if gain > NEITHER_PART else f"least for {described}"


def _short_name(image: str) -> str:
    """Of an image in a sentence, whose picture stands below: a file's name without folders and ending."""
    path = PurePosixPath(image)
    return path.stem if path.suffix else image


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
