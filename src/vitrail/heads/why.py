"""Why a head is important: everything that a study knows of each head in one table, and as sentences. No torch.

The question of Li et al. 2023, answered from measures of this study alone; what it lacks is said, with the command that
adds it.
"""

from collections.abc import Iterator

import numpy as np
import xarray as xr
from jaxtyping import Float

from vitrail.errors import UsageError
from vitrail.heads.pattern_names import RULES
from vitrail.heads.pattern_tables import head_pattern, head_patterns
from vitrail.heads.summary import head_table

__all__ = ["missing", "why_sentences", "why_table"]

METRICS = {
    "drop": "drop of the label's probability",
    "head_divergence": "divergence of the predictions",
    "head_loss_change": "change of the loss",
    "head_cls_shift": "shift of the class token",
    "head_token_shift": "shift of all tokens",
}
"""Importance by every metric, high where the head matters, the one that ranks heads first."""

N_IMAGES = 3

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
    "head_region_probability": "which part of the head carries its importance",
    "pattern_rule": "the name of its pattern",
    "image_dependence": "how much its map depends on the image",
}


def why_table(study: xr.Dataset, *, seed: int = 0) -> xr.Dataset:
    """A row per (layer, head) with all that the study holds of it; NaN, or "" for words, where a layer lacks the head.

    - all of `head_table`; `rank` by the first of drop, divergence, .., token shift that is there, 1 the most important
      (`attrs["ranked_by"]`);
    - `drop_class_part`, `drop_patch_part`: mean probability that the label loses without that part (region modes 3, 4);
    - `strength_entropy_percentile`: share of the other heads, in percent, whose mean entropy is lower;
    - `pattern` and `pattern_rule_held`: name and rule; `pattern_share`: images whose map takes that name by itself;
      `rule_...` the numbers behind them; `image_dependence`;
    - `most`, `least` [layer head place]: the images where it matters most and least, as positions, by the same metric.

    Raises `UsageError` for a study without images.
    """
    table = head_table(study, seed=seed)
    metric = _ranked_by(table)
    if metric is not None:
        values = table[f"{metric}_mean"].to_numpy()
        table["rank"] = _on_heads(_ranks(values))
        table.attrs["ranked_by"] = METRICS[metric]
        table["most"], table["least"] = _extreme_images(_per_image(study, metric))
    if {"head_region_probability", "probability"} <= set(study):
        drop = study["probability"].to_numpy()[:, None, None, None] - study["head_region_probability"].to_numpy()
        for at, part in enumerate(("class", "patch")):
            table[f"drop_{part}_part"] = _on_heads(drop[..., at].mean(0, dtype=np.float64))
    if "strength_entropy_mean" in table:
        table["strength_entropy_percentile"] = _on_heads(_percentiles(table["strength_entropy_mean"].to_numpy()))
    if "pattern_rule" in study:
        _add_patterns(table, study)
    return table


def why_sentences(study: xr.Dataset, layer: int, head: int, *, table: xr.Dataset | None = None) -> list[str]:
    """What makes a head important, or not, with its numbers; then what this study cannot say, with the command that
    adds it. `table` is `why_table(study)` where it is at hand.

    Raises `UsageError` for a head that is not there.
    """
    table = why_table(study) if table is None else table
    _require(study, table, layer, head)
    row = table.isel(layer=layer, head=head)
    told = [
        *_importance(study, row, f"L{layer}H{head}"),
        *_other_metrics(table, layer, head),
        *_parts(study, row),
        *_spread(row),
        *_pattern(study, row, layer, head),
        *_images(study, row, layer, head),
    ]
    return told + list(missing(study).values())


def missing(study: xr.Dataset) -> dict[str, str]:
    """What the table lacks of a study, as a sentence for each word of `--measures` that would add it."""
    held = set(map(str, study)) | ({"drop"} if {"probability", "head_probability"} <= set(study) else set())
    left_out = study.attrs.get("left_out", {})
    found = {}
    for word, names in SOURCES.items():
        lacks = [name for name in names if name not in held]
        why = next((left_out[name] for name in lacks if name in left_out), None)
        if name_of := [WORDS[name] for name in lacks]:
            rest = (
                f"the model cannot give it: {why}"
                if why
                else f"`vitrail study ... --measures {_asked(held, word)}` adds it"
            )
            found[word] = f"Not known is {' and '.join(name_of)}; {rest}."
    return found


def _asked(held: set[str], word: str) -> str:
    """What the study was asked for, as far as one sees, and the word that is new."""
    words = [each for each, names in SOURCES.items() if held & set(names) or each == word]
    return ",".join(words)


# --- the table -------------------------------------------------------------------------------------------------------


def _ranked_by(table: xr.Dataset) -> str | None:
    return next((metric for metric in METRICS if f"{metric}_mean" in table), None)


def _per_image(study: xr.Dataset, metric: str) -> Float[np.ndarray, "image layer head"]:
    if metric != "drop":
        return study[metric].to_numpy().astype(np.float64)
    return study["probability"].to_numpy()[:, None, None] - study["head_probability"].to_numpy().astype(np.float64)


def _ranks(values: Float[np.ndarray, "layer head"]) -> Float[np.ndarray, "layer head"]:
    """1 for the largest; ties go to the earlier layer."""
    flat = values.ravel()
    ranks = np.full(flat.shape, np.nan)
    order = [at for at in np.argsort(-flat, kind="stable") if not np.isnan(flat[at])]
    ranks[order] = np.arange(1, len(order) + 1)
    return ranks.reshape(values.shape)


def _percentiles(values: Float[np.ndarray, "layer head"]) -> Float[np.ndarray, "layer head"]:
    known = values[~np.isnan(values)]
    lower = (known[None] < values.ravel()[:, None]).sum(1) / max(1, len(known) - 1) * 100
    return np.where(np.isnan(values), np.nan, lower.reshape(values.shape))


def _extreme_images(values: Float[np.ndarray, "image layer head"]) -> tuple[xr.DataArray, xr.DataArray]:
    """Positions of the images with the highest and the lowest values; -1 for heads that are not there."""
    n_shown = min(N_IMAGES, len(values))
    absent = np.isnan(values).any(0)
    order = np.argsort(values, axis=0, kind="stable")
    found = []
    for places in (order[::-1][:n_shown], order[:n_shown]):
        at = np.where(absent, -1, places)
        found.append(xr.DataArray(np.moveaxis(at, 0, -1), dims=("layer", "head", "place")))
    return found[0], found[1]


def _add_patterns(table: xr.Dataset, study: xr.Dataset) -> None:
    shape = (study.sizes["layer"], study.sizes["head"])
    words = {name: np.full(shape, "", dtype=object) for name in ("pattern", "pattern_rule_held")}
    numbers = {name: np.full(shape, np.nan) for name in ("pattern_share", *(f"rule_{rule}" for rule in RULES))}
    for pattern in head_patterns(study):
        at = pattern.layer, pattern.head
        words["pattern"][at], words["pattern_rule_held"][at] = pattern.named.label, pattern.named.rule
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


def _importance(study: xr.Dataset, row: xr.Dataset, name: str) -> Iterator[str]:
    if "rank" not in row or np.isnan(row["rank"]):
        return
    n_images, n_heads = study.sizes["image"], sum(study.attrs.get("n_heads", [0]))
    place = f"{name} is {_ordinal(int(row['rank']))}" + (f" of {n_heads} heads" if n_heads else "")
    if "drop_mean" not in row:
        yield f"{place} by {row.attrs['ranked_by']}."
        return
    before = float(study["probability"].mean())
    drop = float(row["drop_mean"])
    moved = "loses" if drop >= 0 else "gains"
    if n_images == 1:
        yield f"{place}: without it the label {moved} {abs(drop):.3f} of its probability {before:.3f} in this image."
        return
    yield (
        f"{place}: without it the label {moved} {abs(drop):.3f} of its probability {before:.3f} on average (95 % "
        f"interval of the drop {float(row['drop_low']):.3f} to {float(row['drop_high']):.3f}), and more than 0.1 in "
        f"{float(row['drop_share_large']):.1%} of {n_images:,} images."
    )
    flips = f"The prediction changes in {float(row['flip_share']):.1%} of them" if "flip_share" in row else ""
    own = str(study.attrs.get("labels_from", "")).startswith("the model's own")
    if "accuracy" in row and not own:
        fall = (
            f"accuracy goes from {row.attrs['accuracy']:.1%} to {float(row['accuracy']):.1%} "
            f"({float(row['accuracy_low']):.1%} to {float(row['accuracy_high']):.1%})"
        )
        flips = f"{flips}, {fall}" if flips else fall[0].upper() + fall[1:]
    if flips:
        yield flips + "."


def _other_metrics(table: xr.Dataset, layer: int, head: int) -> Iterator[str]:
    told = []
    for metric, words in METRICS.items():
        if f"{metric}_mean" not in table or words == table.attrs["ranked_by"]:
            continue
        values = table[f"{metric}_mean"].to_numpy()
        rank = _ranks(values)[layer, head]
        if not np.isnan(rank):
            told.append(f"{_ordinal(int(rank))} by {words} ({values[layer, head]:.3g})")
    if told:
        yield f"It is {', '.join(told)}."


def _parts(study: xr.Dataset, row: xr.Dataset) -> Iterator[str]:
    if "drop_class_part" not in row or np.isnan(row["drop_class_part"]):
        return
    by_class, by_patch = float(row["drop_class_part"]), float(row["drop_patch_part"])
    numbers = (
        f"without class rows and columns the label loses {by_class:.3f}, without attention between patches "
        f"{by_patch:.3f}"
    )
    larger, smaller = max(by_class, by_patch), min(by_class, by_patch)
    if larger < 0.005:
        yield f"Neither part of it matters alone: {numbers}."
    elif smaller > larger / 2:
        yield f"Both of its parts matter: {numbers}."
    else:
        yield f"Its {'class' if by_class > by_patch else 'patch'} part carries it: {numbers}."


def _spread(row: xr.Dataset) -> Iterator[str]:
    told = []
    if "strength_entropy_mean" in row and not np.isnan(row["strength_entropy_mean"]):
        told.append(
            f"the entropy of its attention over distance is {float(row['strength_entropy_mean']):.2f} nats, above "
            f"{float(row['strength_entropy_percentile']):.0f} % of the other heads"
        )
    if "attention_distance_mean" in row and not np.isnan(row["attention_distance_mean"]):
        told.append(f"it looks {float(row['attention_distance_mean']):.1f} patches far on average")
    if told:
        text = " and ".join(told)
        yield text[0].upper() + text[1:] + "."


def _pattern(study: xr.Dataset, row: xr.Dataset, layer: int, head: int) -> Iterator[str]:
    if "pattern" not in row or not str(row["pattern"].item()):
        return
    pattern = head_pattern(study, layer, head)
    n_images = study.sizes["image"]
    stable = f", as for {pattern.share:.0%} of the images by themselves" if n_images > 1 else ""
    other = f" (else mostly {pattern.others[0][0]})" if stable and pattern.others else ""
    yield f"Its pattern is {pattern.named.label}: {pattern.named.rule}{stable}{other}."
    if pattern.image_dependence is not None:
        degree = "nearly the same map for all images" if pattern.image_dependence < 0.2 else (
            "another map for every image" if pattern.image_dependence > 0.8 else "a map that partly follows the image"
        )  # fmt: skip
        yield f"Its image dependence is {pattern.image_dependence:.2f}: {degree}."


def _images(study: xr.Dataset, row: xr.Dataset, layer: int, head: int) -> Iterator[str]:
    if "most" not in row or study.sizes["image"] < 2 or int(row["most"][0]) < 0 or "drop_mean" not in row:
        return
    ids = study["image"].to_numpy().astype(str)
    before = study["probability"].to_numpy()
    after = study["head_probability"].isel(layer=layer, head=head).to_numpy()

    def named(place: xr.DataArray) -> str:
        at = int(place)
        return f"{ids[at]} (probability {before[at]:.2f} to {after[at]:.2f})"

    most = ", ".join(named(place) for place in row["most"])
    yield f"It matters most for {most}, and least for {named(row['least'][0])}."


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
