"""Heads by class: which heads the images of each class need, and whether more than other images do."""

from collections.abc import Sequence

import numpy as np

from vitrail.data import LabelSource, class_title
from vitrail.figures.style import head_name
from vitrail.heads.classes import ClassHeads, HeadDrop, heads_by_class
from vitrail.heads.correction import exact_part, how_corrected
from vitrail.report.parts import ReportData, Section, Table
from vitrail.sentence import Sentence

__all__ = ["classes"]

MANY_CLASSES = 15
"""The table of more classes is folded: it would hide the rest of the report."""

READING = (
    "p lost: the label's probability with every head less that without this one, mean over the images of the class; "
    "95 % intervals of each head alone. A star marks a head whose excess over all other images would be rarer than "
    "5 % by chance in any head of any class (permutations, corrected for all heads and classes); such heads have a row "
    "also where three others matter more."
)


def classes(study: ReportData) -> Section | None:
    """Builds the section of heads by class.

    Args:
        study: a finished study.

    Returns:
        One sentence on how many classes have heads of their own, and a table with three heads of each class that has
        several images, and its own heads beyond these; None for a study without probabilities per head, with a single
        class, or with one image of each.
    """
    if not {"probability", "head_probability", "label"} <= set(study.data):
        return None
    every_class = heads_by_class(study.data)
    by_class = [each for each in every_class if each.n_images > 1]
    if len(every_class) < 2 or not by_class:
        return None
    n_single = len(every_class) - len(by_class)
    table = Table(
        "The heads that matter most for each class",
        ("class", "images", "head", "p lost", "95 %", "elsewhere", "p value"),
        [row for each in by_class for row in _rows(each)],
        READING + _note(study, n_single),
        folded=len(by_class) > MANY_CLASSES,
        words=(0, 2),
    )
    return Section("classes", "Heads by class", (_finding(by_class),), (table,))


def _finding(by_class: Sequence[ClassHeads]) -> str:
    own = [(each, head) for each in by_class for head in each.own]
    if not own:
        return Sentence(
            f"No head is shown to matter more for one of the {len(by_class)} classes with several images than for the "
            "other images (corrected for all heads and classes, at 95 %).",
            measure="head_probability",
        )
    best, head = max(own, key=lambda pair: pair[1].drop - pair[1].elsewhere)
    n_own = len({each.label for each, _ in own})
    return Sentence(
        f"{n_own} of {len(by_class)} classes with several images need a head more than other images do (corrected for "
        f"all heads and classes, at 95 %); the largest excess is that of {class_title(best.name)}, which loses "
        f"{head.drop:z.3f} of probability without {head_name(head.layer, head.head)}, the other images "
        f"{head.elsewhere:z.3f}.",
        measure="head_probability",
        layer=head.layer,
        head=head.head,
    )


def _rows(each: ClassHeads) -> list[list[str]]:
    return [
        [
            class_title(each.name),
            f"{each.n_images:,}",
            head_name(head.layer, head.head) + (" *" if head.is_own else ""),
            f"{head.drop:+z.3f}",
            _interval(each, head),
            f"{head.elsewhere:+z.3f}",
            "none" if np.isnan(head.p_value) else f"{head.p_value:z.3f}",
        ]
        for head in (*each.heads, *(head for head in each.own if head not in each.heads))
    ]


def _interval(each: ClassHeads, head: HeadDrop) -> str:
    if np.isnan(head.low + head.high):
        return f"too few images ({each.n_images})"
    return f"{head.low:+z.3f} to {head.high:+z.3f}"


def _note(study: ReportData, n_single: int) -> str:
    """What else keeps the numbers from meaning more."""
    single = f" Left out: {n_single} classes with one image." if n_single else ""
    if how_corrected(study.data):
        single = f" Of the {exact_part(study.data).sizes['image']:,} images whose heads were all pruned.{single}"
    if study.plan.labels == LabelSource.PREDICTED:
        return f"{single} The images have no labels: classes are the model's own predictions."
    return single
