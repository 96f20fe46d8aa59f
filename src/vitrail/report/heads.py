"""The heads of a study: which matter, for how many images, and how far they look."""

from collections.abc import Iterator

import numpy as np
import xarray as xr
from jaxtyping import Float

from vitrail.figures import heads as figures
from vitrail.figures.layers import heads_by_layer
from vitrail.figures.style import head_name, number
from vitrail.figures.values import MAIN, head_values, main_metric
from vitrail.heads.summary import LARGE_DROP, head_table, spearman
from vitrail.report.parts import Drawing, Part, Photographs, Section, Studied, Table, percent, readings

__all__ = ["heads"]

N_TOP = 10
N_PHOTOGRAPHS = 8

RANKED_BY = ("drop_mean", "head_divergence_mean", "head_loss_change_mean", "head_token_shift_mean")
"""Columns of the table of heads that importance is read from, in order of preference."""

COLUMNS = (
    ("p lost", "{:+.3f}", ("drop_mean",)),
    ("95 %", "{:+.3f} to {:+.3f}", ("drop_low", "drop_high")),
    ("median", "{:+.3f}", ("drop_median",)),
    ("images that lose > 0.1", "{:.1f} %", ("drop_share_large",)),
    ("answers that change", "{:.1f} %", ("flip_share",)),
    ("top-1 without it", "{:.1f} %", ("accuracy",)),
    ("95 %", "{:.1f} to {:.1f} %", ("accuracy_low", "accuracy_high")),
    ("divergence, bits", "{:.4f}", ("head_divergence_mean",)),
    ("reach, patches", "{:.2f}", ("attention_distance_mean",)),
    ("entropy, nats", "{:.2f}", ("strength_entropy_mean",)),
    ("to prefix tokens", "{:.1f} %", ("prefix_share_mean",)),
)
INTERVALS = ("drop_low", "accuracy_low")


def heads(study: Studied) -> Section | None:
    """Importance, reach and spread of every head, if the study holds any of it."""
    held = study.held("heads")
    if not held:
        return None
    table = head_table(study.data)
    return Section("heads", "Heads", tuple(_findings(study, table)), tuple(_parts(study, table, held)))


# --- sentences -------------------------------------------------------------------------------------------------------


def _findings(study: Studied, table: xr.Dataset) -> Iterator[str]:
    order = _ranked(table)
    if order and "drop_mean" in table:
        yield from _of_drops(study, table, order)
    elif order:
        name = next(name for name in RANKED_BY if name in table)
        measure, values = name.removesuffix("_mean"), table[name].to_numpy()
        attrs = study.data[measure].attrs
        yield (
            f"{head_name(*order[0])} matters most by {attrs['title']}: {number(float(values[order[0]]))} "
            f"{attrs['unit']} on average, where the median head has {number(float(np.nanmedian(values)))}."
        )
    if "attention_distance_mean" in table:
        yield from _of_reach(table["attention_distance_mean"].to_numpy())


def _of_drops(study: Studied, table: xr.Dataset, order: list[tuple[int, int]]) -> Iterator[str]:
    first, drops = order[0], table["drop_mean"].to_numpy()
    between = _between(study, table, "drop", first)
    flips = (
        f", and {percent(float(table['flip_share'][first]), 1)} of the answers change" if "flip_share" in table else ""
    )
    yield (
        f"Without {head_name(*first)}, the most important head, the label loses {float(drops[first]):.3f} of its "
        f"probability on average{between}{flips}; the median head costs {float(np.nanmedian(drops)):.3f}."
    )
    lost = study.data["probability"].to_numpy()[:, None, None] - study.data["head_probability"].to_numpy()
    many = (np.nan_to_num(lost, nan=0.0) > LARGE_DROP).sum((1, 2))
    if study.n_images > 1:
        yield (
            f"{percent(float((many == 0).mean()))} of the images lose no more than {LARGE_DROP} by any single head; in "
            f"the median image {int(np.median(many))} of {len(order)} heads cost more than that, in the most sensitive "
            f"one {int(many.max())}."
        )
        low, high = table["drop_low"].to_numpy(), table["drop_high"].to_numpy()
        idle = int(((low <= 0) & (high >= 0)).sum())
        better = int((high < 0).sum())
        yield (
            f"For {idle} of {len(order)} heads the interval of the mean loss holds zero: on average each alone can go."
            if idle
            else "No head can go for nothing: the interval of the mean loss holds zero for none."
        )
        if better:
            yield f"Without {better} of the heads the label gets likelier on average, beyond its interval."


def _of_reach(distance: Float[np.ndarray, "layer head"]) -> Iterator[str]:
    means = [(layer, float(np.nanmean(row))) for layer, row in enumerate(distance) if np.isfinite(row).any()]
    if len(means) < 2:
        return
    known = np.argwhere(np.isfinite(distance))
    agreed = spearman(known[:, 0].astype(float), distance[tuple(known.T)])
    (first, near), (last, far) = means[0], means[-1]
    told = "" if np.isnan(agreed) else f" (rank correlation of layer and reach over all heads: {agreed:.2f})"
    yield f"Heads of L{first} look {near:.1f} patches far on average, those of L{last} {far:.1f}{told}."
    row = distance[first][np.isfinite(distance[first])]
    if len(row) > 1:
        yield f"Within L{first} they range from {row.min():.1f} to {row.max():.1f} patches."


def _between(study: Studied, table: xr.Dataset, name: str, head: tuple[int, int]) -> str:
    if study.n_images < 2:
        return ""
    low, high = (float(table[f"{name}_{end}"][head]) for end in ("low", "high"))
    return f" (95 % interval {low:.3f} to {high:.3f})"


def _ranked(table: xr.Dataset) -> list[tuple[int, int]]:
    """Heads from the most important down; empty where the study holds no importance."""
    name = next((name for name in RANKED_BY if name in table), None)
    if name is None:
        return []
    values = table[name].to_numpy()
    known = [(int(layer), int(head)) for layer, head in np.argwhere(~np.isnan(values))]
    return sorted(known, key=lambda pair: -values[pair])


# --- tables and pictures ---------------------------------------------------------------------------------------------


def _parts(study: Studied, table: xr.Dataset, held: list[str]) -> Iterator[Part]:
    data, metric, order = study.data, main_metric(study.data), _ranked(table)
    if metric is not None:
        yield Drawing(figures.importance_map(data, metric))
        yield Drawing(figures.importance_line(data, metric))
    if order:
        yield Table(
            "The heads that matter most", ("head", *(title for title, _, _ in _columns(study, table))),
            _rows(study, table, order[:N_TOP]), _told(study),
        )  # fmt: skip
    yield from _needing(study, order)
    if "strength_entropy" in held:
        yield Drawing(figures.entropy_by_layer(data))
    if "attention_distance" in held:
        yield Drawing(heads_by_layer(data, "attention_distance", "How far heads look"))
    if "prefix_share" in held and any(study.plan.prefixes):
        yield Drawing(heads_by_layer(data, "prefix_share", "What goes to prefix tokens"))
    if "attention_strength" in held:
        known = ~np.isnan(data["attention_strength"].to_numpy()).all((0, 3))
        chosen = next((pair for pair in order or map(tuple, np.argwhere(known).tolist()) if known[pair]), None)
        if chosen is not None:
            yield Drawing(figures.strength_over_hops(data, *chosen))
    everything = order or [(int(layer), int(head)) for layer, head in _all_heads(table)]
    yield Table(
        f"All {len(everything)} heads", ("head", *(title for title, _, _ in _columns(study, table))),
        _rows(study, table, sorted(everything)), folded=True,
    )  # fmt: skip
    yield readings(study, held)


def _needing(study: Studied, order: list[tuple[int, int]]) -> Iterator[Part]:
    """The images that lose most without the most important head."""
    if not order or not {"thumbnail", "head_probability", "probability"} <= set(study.data) or study.n_images < 2:
        return
    head = order[0]
    whole, without = study.data["probability"].to_numpy(), study.data["head_probability"].to_numpy()[:, *head]
    chosen = np.argsort(without - whole, kind="stable")[:N_PHOTOGRAPHS]
    labels = study.data["label"].to_numpy()
    yield Photographs(
        f"The images that need {head_name(*head)} most",
        [study.data["thumbnail"][int(at)].to_numpy() for at in chosen],
        [f"{study.class_name(int(labels[at]))}: {whole[at]:.2f} to {without[at]:.2f}" for at in chosen],
        "Probability of the label, with every head and without this one.",
    )


def _columns(study: Studied, table: xr.Dataset) -> list[tuple[str, str, tuple[str, ...]]]:
    """Those that this study has numbers for; intervals only over several images, top-1 only with labels."""
    return [
        (title, form, names)
        for title, form, names in COLUMNS
        if set(names) <= set(map(str, table))
        and (study.n_images > 1 or names[0] not in INTERVALS)
        and (study.has_labels or not names[0].startswith("accuracy"))
    ]


def _rows(study: Studied, table: xr.Dataset, chosen: list[tuple[int, int]]) -> list[list[str]]:
    columns = [(form, [table[name].to_numpy() for name in names]) for _, form, names in _columns(study, table)]
    return [
        [head_name(*head), *(_cell(form, [float(values[head]) for values in held]) for form, held in columns)]
        for head in chosen
    ]


def _cell(form: str, values: list[float]) -> str:
    scale = 100 if "%" in form else 1
    return "none" if any(np.isnan(value) for value in values) else form.format(*(scale * value for value in values))


def _all_heads(table: xr.Dataset) -> list[list[int]]:
    known = [~np.isnan(table[name].to_numpy()) for name in table if str(name).endswith("_mean")]
    shape = (table.sizes["layer"], table.sizes["head"])
    there: list[list[int]] = np.argwhere(np.any(known, axis=0) if known else np.ones(shape, dtype=bool)).tolist()
    return there


def _told(study: Studied) -> str:
    shown = main_metric(study.data)
    if shown is None or shown not in MAIN:
        return ""
    *_, source = head_values(study.data, shown).reading()
    lost = (
        "p lost: the label's probability with every head less that without this one."
        if shown == "head_probability"
        else ""
    )
    interval = "Intervals: 95 %, bootstrap over images." if study.n_images > 1 else ""
    return " ".join(filter(None, (lost, interval, source)))
