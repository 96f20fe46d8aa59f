"""Heads and objects: which heads and layers to take for segmentation, and how far above chance they are."""

from collections.abc import Iterator

import numpy as np

from vitrail.figures.objects import example_map_grid, score_maps
from vitrail.figures.style import head_name
from vitrail.heads.object_summary import ScoreSummary, is_of_class_token, summarise_scores
from vitrail.report.parts import Drawing, Part, ReportData, Section, Table, Text, readings
from vitrail.sentence import Sentence, percent

__all__ = ["objects"]

SCORES = ("auroc", "iou", "pointing")
"""The first is what heads are ranked by: it asks most of a map."""

N_TOP = 12
"""Heads of the table."""

READING = (
    "In brackets: 95 % intervals of all rows at once. Other images: the mean against their objects, at the places where"
    " those lie."
)

Summaries = dict[str, ScoreSummary]


def objects(study: ReportData) -> Section | None:
    """Which heads find the objects of their images.

    Args:
        study: The study that is reported.

    Returns:
        The section; None where the study holds no masks or scores.
    """
    names = study.measures_of("objects")
    of_heads, of_patches, of_layers = (_summaries(study, kind) for kind in ("object", "object_patch", "object_layer"))
    if "auroc" not in of_heads:
        return None
    findings = tuple(_findings(study, of_heads, of_patches, of_layers))
    return Section(
        "objects",
        "Heads and objects",
        findings,
        lambda: _parts(study, of_heads, of_patches, of_layers, names),
    )


def _summaries(study: ReportData, prefix: str) -> Summaries:
    summaries = {score: summarise_scores(study.data, f"{prefix}_{score}") for score in SCORES}
    return {score: summary for score, summary in summaries.items() if summary is not None}


def _findings(study: ReportData, heads: Summaries, patches: Summaries, layers: Summaries) -> Iterator[str]:
    layer, head = heads["auroc"].ranked[0]
    yield Sentence(_best_head(study, heads), measure="object_auroc", layer=layer, head=head)
    if study.n_images > 1:
        yield from _against_chance(heads["auroc"])
    if "auroc" in patches:
        layer, head = patches["auroc"].ranked[0]
        yield Sentence(_best_for_patches(patches["auroc"]), measure="object_patch_auroc", layer=layer, head=head)
    if "auroc" in layers:
        (layer,) = layers["auroc"].ranked[0]
        yield Sentence(_best_layer(heads["auroc"], layers["auroc"]), measure="object_layer_auroc", layer=layer)
    yield from _other_scores(heads)


def _best_head(study: ReportData, heads: Summaries) -> str:
    summary = heads["auroc"]
    best = summary.ranked[0]
    whose = "class token" if is_of_class_token(study.data.attrs, best[0]) else "mean query"
    scores = [f"AUROC {summary.mean[best]:z.2f}{_interval(summary, best)}"]
    if "pointing" in heads:
        share = float(heads["pointing"].mean[best])
        where = (
            f"an object in {percent(share)} of them"
            if study.n_images > 1
            else f"{'an' if share > 0.5 else 'no'} object"
        )
        scores.append(f"its strongest patch lies on {where}")
    if "iou" in heads:
        scores.append(f"overlap with as many strongest patches {heads['iou'].mean[best]:z.2f}")
    images = f"of {summary.n_images:,} images" if study.n_images > 1 else "of this image"
    return f"{head_name(*best)} finds the objects {images} best, by the map of its {whose}: {'; '.join(scores)}."


def _against_chance(summary: ScoreSummary) -> Iterator[str]:
    best, n_heads = summary.ranked[0], len(summary.ranked)
    may_be = int(summary.may_be_best.sum())
    if np.isfinite(summary.low[best]):
        yield (
            f"{head_name(*best)} is the best head beyond these images, too (95 %)."
            if may_be == 1
            else f"Beyond these images {may_be} of the {n_heads} heads may be the best one (95 %)."
        )
    beyond = []
    if np.isfinite(summary.null[best]):
        excess = _excess(summary, n_heads)
        beyond.append(f"Against other images' objects {head_name(*best)} has {summary.null[best]:z.2f}{excess}.")
    if np.isfinite(summary.centre):
        above = int((summary.over_centre_low > 0).sum())
        beyond.append(
            f"A blob in the middle of the view, which knows nothing of the image, has {summary.centre:z.2f}; "
            f"{above or 'no'} head{'s are' if above > 1 else ' is'} shown to beat it."
        )
    yield from beyond


def _excess(summary: ScoreSummary, n_heads: int) -> str:
    """How many heads are shown to tell their image's objects from others'; empty where images are too few."""
    if np.isnan(summary.excess_low).all():
        return ""
    above, below = int((summary.excess_low > 0).sum()), int((summary.excess_high < 0).sum())
    avoid = f", and {below} to find them less, looking at the background" if below else ""
    return (
        f"; {above or 'none'} of the {n_heads} heads {'are' if above > 1 else 'is'} shown to find the objects of the "
        f"image itself better than those{avoid} (all heads at once, 95 %)"
    )


def _best_for_patches(summary: ScoreSummary) -> str:
    best = summary.ranked[0]
    has_null = np.isfinite(summary.null[best])
    null = f", and {summary.null[best]:z.2f} at the same places of other images" if has_null else ""
    return (
        f"Asked by a patch of an object, {head_name(*best)} finds the rest of that object best: AUROC "
        f"{summary.mean[best]:z.2f}{_interval(summary, best)}{null}."
    )


def _best_layer(heads: ScoreSummary, layers: ScoreSummary) -> str:
    (layer,) = layers.ranked[0]
    return (
        f"Of the means over heads that of L{layer} is best: AUROC {layers.mean[layer]:z.2f}"
        f"{_interval(layers, (layer,))}, where the best single head has {heads.mean[heads.ranked[0]]:z.2f}."
    )


def _other_scores(heads: Summaries) -> Iterator[str]:
    by_auroc = heads["auroc"].ranked[0]
    others = {
        words: heads[score].ranked[0]
        for score, words in (("iou", "overlap"), ("pointing", "the strongest patch"))
        if score in heads and heads[score].mean[by_auroc] < heads[score].mean[heads[score].ranked[0]]
    }
    if others:
        named = " and ".join(f"by {words} {head_name(*head)}" for words, head in others.items())
        yield f"Another score has another best head: {named}."


def _interval(summary: ScoreSummary, row: tuple[int, ...]) -> str:
    low, high = float(summary.low[row]), float(summary.high[row])
    return f" (95 % interval {low:z.2f} to {high:z.2f})" if np.isfinite(low + high) else ""


# --- tables and pictures ---------------------------------------------------------------------------------------------


def _parts(
    study: ReportData, heads: Summaries, patches: Summaries, layers: Summaries, names: list[str]
) -> Iterator[Part]:
    if heads["auroc"].reason and study.n_images > 1:
        which = "No intervals" if np.isnan(heads["auroc"].low).all() else "Some heads have no interval"
        yield Text(f"{which}: {heads['auroc'].reason}.")
    yield Drawing(score_maps(study.data))
    examples = example_map_grid(study.data)
    if examples is not None:
        yield Drawing(examples)
    reading = "" if study.n_images < 2 else READING
    yield _table("The heads that find objects best", heads, heads["auroc"].ranked[:N_TOP], reading)
    if "auroc" in patches:
        order = patches["auroc"].ranked[:N_TOP]
        yield _table("The heads that find the rest of an object best", patches, order, reading)
    if "auroc" in layers:
        yield _table("Layers: the mean over heads", layers, layers["auroc"].ranked, reading, folded=True)
    everything = sorted(heads["auroc"].ranked)
    yield _table(f"All {len(everything)} heads", heads, everything, reading, folded=True)
    yield readings(study, names)


def _table(
    caption: str, summaries: Summaries, order: list[tuple[int, ...]], reading: str, folded: bool = False
) -> Table:
    titles = {"auroc": "AUROC", "iou": "overlap (IoU)", "pointing": "strongest patch on the object"}
    columns = [title for score in summaries for title in (titles[score], "other images")]
    rows = [
        [_name(row), *(cell for summary in summaries.values() for cell in (_cell(summary, row), _null(summary, row)))]
        for row in order
    ]
    return Table(caption, ("layer" if len(order[0]) == 1 else "head", *columns), rows, reading, folded=folded)


def _name(row: tuple[int, ...]) -> str:
    return f"L{row[0]}" if len(row) == 1 else head_name(*row)


def _cell(summary: ScoreSummary, row: tuple[int, ...]) -> str:
    low, high = float(summary.low[row]), float(summary.high[row])
    between = f" ({low:z.2f} to {high:z.2f})" if np.isfinite(low + high) else ""
    return f"{summary.mean[row]:z.2f}{between}"


def _null(summary: ScoreSummary, row: tuple[int, ...]) -> str:
    return f"{summary.null[row]:z.2f}" if np.isfinite(summary.null[row]) else "none"
