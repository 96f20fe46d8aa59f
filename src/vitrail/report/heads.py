"""The heads of a study: which matter, for how many images, and how far they look."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xarray as xr
from jaxtyping import Float

from vitrail.data import LabelSource
from vitrail.figures import heads as figures
from vitrail.figures.pruning import pruning_curves
from vitrail.figures.style import describe_measure, head_name, number
from vitrail.heads.correction import FEWEST_EXACT, ONE_IN, estimate_agreement, exact_values, how_corrected
from vitrail.heads.exact_names import EXACT_VALUES
from vitrail.heads.head_values import IMPORTANCE_MEASURES, heads_with_strength, main_metric
from vitrail.heads.summary import LARGE_DROP, NEGLIGIBLE_DROP, head_table
from vitrail.pruning.ranking import Curves, area_table, read_curves
from vitrail.report.parts import Drawing, Part, Photographs, ReportData, Section, Table, Text, readings
from vitrail.sentence import Sentence, percent
from vitrail.stats import Interval, simultaneous_intervals, spearman

__all__ = ["curve_findings", "heads"]

N_TOP = 10
N_PHOTOGRAPHS = 8

ONE_POINT = 0.01
"""Accuracy that may be lost where heads are said to go."""

MANY_ORDERS = 20
"""Orders at random of which more would hardly narrow what chance gives."""

N_SHOWN = 4
"""Images that a sentence names."""

RANKED_BY = (
    "drop_mean",
    "head_divergence_mean",
    "head_loss_change_mean",
    "head_value_change_mean",
    "head_output_shift_mean",
    "head_token_shift_mean",
)
"""Columns of the table of heads that importance is read from, in order of preference."""

COLUMNS = (
    ("p lost", "{:+z.3f}", ("drop_mean",)),
    ("95 %", "{:+z.3f} to {:+z.3f}", ("drop_low", "drop_high")),
    ("median", "{:+z.3f}", ("drop_median",)),
    ("images that lose > 0.1", "{:z.1f} %", ("drop_share_large",)),
    ("answers that change", "{:z.1f} %", ("flip_share",)),
    ("top-1 without it", "{:z.1f} %", ("accuracy",)),
    ("95 %", "{:z.1f} to {:z.1f} %", ("accuracy_low", "accuracy_high")),
    ("divergence, bits", "{:z.4f}", ("head_divergence_mean",)),
    ("change of the value", "{:.4g}", ("head_value_change_mean",)),
    ("shift of the output, 1 - cosine", "{:z.4f}", ("head_output_shift_mean",)),
    ("reach, {unit}", "{:z.2f}", ("attention_distance_mean",)),
    ("entropy, nats", "{:z.2f}", ("strength_entropy_mean",)),
    ("to prefix tokens", "{:z.1f} %", ("prefix_share_mean",)),
)
INTERVALS = ("drop_low", "accuracy_low")


def heads(study: ReportData) -> Section | None:
    """Importance, reach and spread of every head, if the study holds any of it.

    Args:
        study: The study.

    Returns:
        The section; None where the study holds nothing for it.
    """
    names = study.measures_of("heads")
    if not names:
        return None
    table = head_table(study.data)
    curves = read_curves(study.folder) if study.folder != Path() else None
    findings = (*_findings(study, table), *(curve_findings(curves) if curves is not None else ()))
    return Section("heads", "Heads", findings, lambda: _parts(study, table, names))


# --- sentences -------------------------------------------------------------------------------------------------------


def _findings(study: ReportData, table: xr.Dataset) -> Iterator[str]:
    order = _rank_heads(table)
    if order and "drop_mean" in table:
        yield from _of_drops(study, table, order)
    elif order:
        name = next(name for name in RANKED_BY if name in table)
        measure, values = name.removesuffix("_mean"), table[name].to_numpy()
        attrs = study.data[measure].attrs
        yield Sentence(
            f"{head_name(*order[0])} matters most by {attrs['title']}: {number(float(values[order[0]]))} "
            f"{attrs['unit']} on average, where the median head has {number(float(np.nanmedian(values)))}.",
            measure=measure,
            layer=order[0][0],
            head=order[0][1],
            images=_images_that_need(study.data[measure].to_numpy(), order[0]),
            caption=f"the images with the most {attrs['title']} by {head_name(*order[0])}",
        )
        yield from _of_estimate(study)
    if "attention_distance_mean" in table:
        yield from _of_reach(table["attention_distance_mean"])


def _of_drops(study: ReportData, table: xr.Dataset, order: list[tuple[int, int]]) -> Iterator[str]:
    first, drops = order[0], table["drop_mean"].to_numpy()
    share = float(table["flip_share"][first]) if "flip_share" in table else 0.0
    if study.n_images > 1:
        average, flips = " on average", f" Of the answers {percent(share, 1)} change." * ("flip_share" in table)
    else:
        average, flips = "", " The answer changes." * (share > 0)
    intact, without = study.data["probability"].to_numpy(), _probability_without(study.data)
    lost = intact[:, None, None] - without  # NaN on images that were not swept
    swept = np.flatnonzero(~np.isnan(lost).all((1, 2)))
    together = simultaneous_intervals(lost[swept].astype(np.float64), limits=(-1.0, 1.0))
    between = _between(study, table, first, together)
    yield Sentence(
        f"Without {head_name(*first)} the label loses {float(drops[first]):z.3f} of its probability{average}{between}: "
        f"{_standing(study, table)}. The median head costs {float(np.nanmedian(drops)):z.3f}.{flips}"
        f"{_of_accuracy(study, table, first)}",
        measure="head_probability",
        layer=first[0],
        head=first[1],
        images=[
            (image, f"{intact[image]:z.2f} to {without[image, *first]:z.2f}")
            for image, _ in _images_that_need(lost, first)
        ],
        caption=f"these lose most without {head_name(*first)}; the probability with and without it",
    )
    lost = lost[swept]
    many = (np.nan_to_num(lost, nan=0.0) > LARGE_DROP).sum((1, 2))
    if study.n_images > 1:
        whose = f"the {len(swept):,} images whose heads were all pruned" if how_corrected(study.data) else "the images"
        most = [int(at) for at in np.argsort(-many, kind="stable")[:N_SHOWN] if many[at]]
        yield Sentence(
            f"Of {whose} {percent(float((many == 0).mean()))} lose no more than {LARGE_DROP} by any single head; in "
            f"the median image {int(np.median(many))} of {len(order)} heads cost more than that, in the most sensitive "
            f"one {int(many.max())}."
            if most
            else f"None of {whose} loses more than {LARGE_DROP} by any single head.",
            measure="head_probability",
            images=[(int(swept[at]), f"{many[at]} head{'' if many[at] == 1 else 's'}") for at in most],
            caption=f"these have the most heads that cost more than {LARGE_DROP}",
        )
    yield from _of_estimate(study)
    if study.n_images > 1:
        yield from _of_dispensable(study, table, len(lost), len(order), together)


def _of_estimate(study: ReportData) -> Iterator[str]:
    """How far the estimate orders heads as pruning them does: where it was measured, or what measures it."""
    importance = study.plan.options.get("importance")
    measure = next((name for name in EXACT_VALUES if name in study.data), "")
    if importance == "estimate" and measure:
        yield Sentence(
            "What heads cost is an estimate from one backward pass an image, and large losses come out too small. How "
            "far it orders heads as pruning them does was not measured: --importance corrected prunes every head on "
            f"one image in {ONE_IN} ({ONE_IN * FEWEST_EXACT} images or more), and says it here.",
            measure=measure,
        )
    agreement = estimate_agreement(study.data) if importance == "corrected" else None
    if agreement is not None and np.isfinite(agreement.correlation):
        between = (
            "no interval can be given"
            if np.isnan(agreement.low)
            else f"95 % interval {agreement.low:z.2f} to {agreement.high:z.2f}, of what as many images show"
        )
        yield Sentence(
            f"On the {agreement.n_images:,} images whose heads were all pruned, the estimate orders heads as pruning "
            f"them does with a rank correlation of {agreement.correlation:z.2f} ({between}), by the mean "
            f"{study.data[agreement.measure].attrs['title']}.",
            measure=agreement.measure,
        )


def _probability_without(data: xr.Dataset) -> Float[np.ndarray, "image layer head"]:
    """The label's probability without each head; of a study whose estimates are corrected, the exact one or NaN."""
    exact = exact_values(data, "head_probability") if how_corrected(data) else None
    return data["head_probability"].to_numpy() if exact is None else exact


def _images_that_need(cost: Float[np.ndarray, "image layer head"], head: tuple[int, int]) -> list[tuple[int, str]]:
    """The images that a head costs most, each with the number."""
    values = cost[:, *head]
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:N_SHOWN]
    return [(int(image), number(float(values[image]))) for image in order]


def _of_accuracy(study: ReportData, table: xr.Dataset, first: tuple[int, int]) -> str:
    """Which head's removal costs the most right answers, where that is another one."""
    own_answers = study.plan.labels == LabelSource.PREDICTED
    if "accuracy" not in table or own_answers or study.n_images < 2:
        return ""
    without = np.where(np.isnan(table["drop_mean"].to_numpy()), np.nan, table["accuracy"].to_numpy())
    worst = tuple(int(at) for at in np.unravel_index(np.nanargmin(without), without.shape))
    if worst == first or not without[worst] < without[first]:
        return ""
    return (
        f" Accuracy falls most without {head_name(*worst)}, to {percent(without[worst], 1)}; without "
        f"{head_name(*first)} it is {percent(without[first], 1)}."
    )


def _standing(study: ReportData, table: xr.Dataset) -> str:
    """Whether the first head costs most beyond the images of this study, too."""
    candidates = int(np.nansum(table["drop_may_be_largest"].to_numpy()))
    if study.n_images < 2 or candidates == 0:
        return "no head costs this image more"
    if candidates == 1:
        return "more than any other head, and not by the chance of this sample (95 %)"
    return f"no head costs more on these images; on others any of {candidates} heads may cost most (95 %)"


def _of_dispensable(
    study: ReportData, table: xr.Dataset, n_images: int, n_heads: int, together: Interval
) -> Iterator[str]:
    """Which heads can be shown to cost next to nothing, each by itself, and which to cost or give something, all heads
    at once."""
    bound = table["drop_bound"].to_numpy()
    idle = int((bound < NEGLIGIBLE_DROP).sum())
    if idle:
        yield Sentence(
            f"{idle} of {n_heads} heads can go, one at a time: {'each' if idle > 1 else 'it'} costs less than "
            f"{NEGLIGIBLE_DROP} of probability on average, by itself at 95 % whatever the distribution of the losses "
            "(of heads that cost just that much, one in twenty is named by chance).",
            measure="head_probability",
        )
    else:
        n_studied = ONE_IN if how_corrected(study.data) else 1  # for each image whose heads are all pruned
        yield Sentence(
            f"Which heads cost next to nothing on average cannot be told from {n_images:,} images: at best that a head "
            f"costs less than {float(np.nanmin(bound)):z.2f} (by itself at 95 %, whatever the distribution). To "
            f"tell {NEGLIGIBLE_DROP} takes about {int(np.ceil(3 / NEGLIGIBLE_DROP)) * n_studied:,} images or more.",
            measure="head_probability",
        )
    costly, better = int((together.low > 0).sum()), int((together.high < 0).sum())
    yield Sentence(
        f"A loss is shown for {costly or 'none'} of the {n_heads} heads (95 % intervals, corrected for all heads at "
        "once).",
        measure="head_probability",
    )
    if better:
        yield Sentence(
            f"Without {better} of the heads the label gets likelier, by the same intervals.", measure="head_probability"
        )


def _of_reach(reach: xr.DataArray) -> Iterator[str]:
    distance, unit = reach.to_numpy(), reach.attrs["unit"]
    means = [(layer, float(np.nanmean(row))) for layer, row in enumerate(distance) if np.isfinite(row).any()]
    if len(means) < 2:
        return
    heads_with_distance = np.argwhere(np.isfinite(distance))
    layers = heads_with_distance[:, 0].astype(float)
    correlation = spearman(layers, distance[tuple(heads_with_distance.T)])
    (first, near), (last, far) = means[0], means[-1]
    agreement = ""
    if not np.isnan(correlation):
        agreement = f" (rank correlation of layer and reach over all heads: {correlation:z.2f})"
    yield Sentence(
        f"Heads of L{first} look {near:z.1f} {unit} far on average, those of L{last} {far:z.1f}{agreement}.",
        measure="attention_distance",
        layer=last,
    )
    row = distance[first][np.isfinite(distance[first])]
    if len(row) > 1:
        yield Sentence(
            f"Within L{first} they range from {row.min():z.1f} to {row.max():z.1f} {unit}.",
            measure="attention_distance",
            layer=first,
            head=int(np.nanargmin(distance[first])),
        )


def _between(study: ReportData, table: xr.Dataset, first: tuple[int, int], together: Interval) -> str:
    """The interval of the head that costs most; of all heads at once where others may cost as much: it was picked."""
    if study.n_images < 2:
        return ""
    low, high, of_whom = float(table["drop_low"][first]), float(table["drop_high"][first]), ""
    if np.nansum(table["drop_may_be_largest"].to_numpy()) > 1:
        if "corrected" in table.attrs or np.isnan(together.low[first] + together.high[first]):
            of_whom = " of this head alone"
        else:
            low, high, of_whom = float(together.low[first]), float(together.high[first]), " of all heads at once"
    if np.isnan(low + high):
        return " (too few images for an interval)"
    corrected = f", {table.attrs['corrected']}" if "corrected" in table.attrs else ""
    return f" (95 % interval{of_whom} {low:z.3f} to {high:z.3f}{corrected})"


def _rank_heads(table: xr.Dataset) -> list[tuple[int, int]]:
    """Heads from the most important down; empty where the study holds no importance."""
    name = next((name for name in RANKED_BY if name in table), None)
    if name is None:
        return []
    values = table[name].to_numpy()
    heads = [(int(layer), int(head)) for layer, head in np.argwhere(~np.isnan(values))]
    return sorted(heads, key=lambda pair: -values[pair])


def curve_findings(curves: Curves) -> list[Sentence]:
    """What pruning curves say: how many heads can go, and which ranking knows it.

    Args:
        curves: Of the study.

    Returns:
        Sentences with numbers.
    """
    areas, counts = area_table(curves), curves.counts
    best, area = next(iter(areas.items()))
    accuracy = curves.accuracy("least", best)
    n_images, n_orders = curves.least[best].shape[1], len(curves.random)
    keeps = accuracy >= accuracy[0] - ONE_POINT - 1e-9  # shares of images are not exact in binary
    n_spared = int(counts[-1] if keeps.all() else counts[int((~keeps).argmax()) - 1])
    several = f", the best of {len(areas)} rankings on these images" if len(areas) > 1 else ""
    between, low, high = area.between
    interval = f" (95 % interval over images {low:z.2f} to {high:z.2f})" if np.isfinite(low + high) else ""
    sentences = [
        Sentence(
            f"Of {int(counts[-1])} heads {n_spared} can go together for at most one point of "
            f"{curves.labels.correctness} on these images, least important first by {best}{several}: "
            f"{percent(float(accuracy[0]))} with all, {n_images:,} images that ranked nothing."
        ),
    ]
    text = (
        f"By {best} the area between pruning the least and the most important first is {between:z.2f}{interval}; 0 is "
        "the mean of rankings that know nothing"
    )
    over, low, high = area.over_random
    if np.isnan(area.chance + low + high):
        return [*sentences, Sentence(f"{text}.")]
    of_them = f"the best of {len(areas)} of them" if len(areas) > 1 else "one of them"
    if between - float(np.hypot(between - area.between[1], area.chance)) > 0:
        known = "is shown"
    else:
        known = "is not shown" + "; more orders at random may tell (--random-orders)" * (n_orders < MANY_ORDERS)
    sentences.append(
        Sentence(
            f"{text}, and {of_them} may reach {area.chance:.2f} (95 %, by {n_orders} orders at random): that {best} "
            f"knows which heads matter {known}."
        )
    )
    keeps_more = "keeps" if low > 0 and area.beaten == 1 else "is not shown to keep"
    n_beaten = round(area.beaten * n_orders)
    sentences.append(
        Sentence(
            f"With its least important heads pruned first it {keeps_more} more than an order at random does: "
            f"{over:+z.3f} on average ({low:+z.3f} to {high:+z.3f} over images and orders, 95 %), beating {n_beaten} "
            f"of {n_orders}."
        )
    )
    return sentences


# --- tables and pictures ---------------------------------------------------------------------------------------------


def _parts(study: ReportData, table: xr.Dataset, names: list[str]) -> Iterator[Part]:
    data, metric, order = study.data, main_metric(study.data), _rank_heads(table)
    if metric is not None:
        yield Drawing(figures.importance_map(data, metric))
        yield Drawing(figures.importance_line(data, metric))
    if order:
        yield Table(
            "The heads that matter most",
            ("head", *(title for title, _, _ in _columns(study, table))),
            _rows(study, table, order[:N_TOP]),
            _table_explanation(study),
        )
    yield from _most_sensitive_images(study, order)
    curves = read_curves(study.folder) if study.folder != Path() else None
    if curves is not None:
        yield Drawing(pruning_curves(curves))
    elif order and study.folder != Path() and study.plan.n_classes is not None:
        yield Text("How many of them can go together? Pruning curves say it, and come into this report by:")
        yield Text("vitrail curves STUDY", code=True)
    if "strength_entropy" in names:
        yield Drawing(figures.entropy_by_layer(data))
    if "attention_distance" in names:
        yield Drawing(figures.heads_by_layer(data, "attention_distance", "How far heads look"))
    if "prefix_share" in names and any(study.plan.prefixes):
        yield Drawing(figures.heads_by_layer(data, "prefix_share", "What goes to prefix tokens"))
    if "attention_strength" in names:
        with_strength = heads_with_strength(data, order or None)
        if with_strength:
            yield Drawing(figures.strength_over_hops(data, *with_strength[0]))
    everything = order or [(int(layer), int(head)) for layer, head in _all_heads(table)]
    yield Table(
        f"All {len(everything)} heads",
        ("head", *(title for title, _, _ in _columns(study, table))),
        _rows(study, table, sorted(everything)),
        folded=True,
    )
    yield readings(study, names)


def _most_sensitive_images(study: ReportData, order: list[tuple[int, int]]) -> Iterator[Part]:
    """The images that lose most without the most important head."""
    if not order or not {"thumbnail", "head_probability", "probability"} <= set(study.data) or study.n_images < 2:
        return
    head = order[0]
    intact, without = study.data["probability"].to_numpy(), _probability_without(study.data)[:, *head]
    chosen = np.argsort(without - intact, kind="stable")[:N_PHOTOGRAPHS]
    labels = study.data["label"].to_numpy()
    yield Photographs(
        f"The images that need {head_name(*head)} most",
        [study.data["thumbnail"][int(at)].to_numpy() for at in chosen],
        [f"{study.class_name(int(labels[at]))}: {intact[at]:z.2f} to {without[at]:z.2f}" for at in chosen],
        "Probability of the label, with every head and without this one.",
    )


def _columns(study: ReportData, table: xr.Dataset) -> list[tuple[str, str, tuple[str, ...]]]:
    """Those that this study has numbers for; intervals only over several images, top-1 only with labels."""
    return [
        (title.format(**table[names[0]].attrs), form, names)
        for title, form, names in COLUMNS
        if set(names) <= set(map(str, table))
        and (study.n_images > 1 or names[0] not in INTERVALS)
        and (study.has_labels or not names[0].startswith("accuracy"))
    ]


def _rows(study: ReportData, table: xr.Dataset, chosen: list[tuple[int, int]]) -> list[list[str]]:
    columns = [(form, [table[name].to_numpy() for name in names]) for _, form, names in _columns(study, table)]
    return [
        [head_name(*head), *(_cell(form, [float(values[head]) for values in arrays]) for form, arrays in columns)]
        for head in chosen
    ]


def _cell(form: str, values: list[float]) -> str:
    scale = 100 if "%" in form else 1
    return "none" if any(np.isnan(value) for value in values) else form.format(*(scale * value for value in values))


def _all_heads(table: xr.Dataset) -> list[list[int]]:
    finite = [~np.isnan(table[name].to_numpy()) for name in table if str(name).endswith("_mean")]
    shape = (table.sizes["layer"], table.sizes["head"])
    present = np.any(finite, axis=0) if finite else np.ones(shape, dtype=bool)
    heads: list[list[int]] = np.argwhere(present).tolist()
    return heads


def _table_explanation(study: ReportData) -> str:
    metric = main_metric(study.data)
    if metric is None or metric not in IMPORTANCE_MEASURES:
        return ""
    *_, source = describe_measure(study.data[metric].attrs)
    lost = (
        "p lost: the label's probability with every head less that without this one."
        if metric == "head_probability"
        else ""
    )
    interval = "Intervals: 95 %, over images, of each head alone." if study.n_images > 1 else ""
    words = how_corrected(study.data)
    corrected = f"Estimated on all images and {words}, of which all but means are." if words else ""
    return " ".join(filter(None, (lost, interval, corrected, source)))
