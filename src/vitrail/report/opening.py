"""The ends of a report: what was studied and how, what is missing, how to cite the methods."""

from collections.abc import Iterator, Sequence
from pathlib import PurePath

import numpy as np
from jaxtyping import Bool, Int

from vitrail.analysis import BASE, analyses, measures
from vitrail.data.sources import PHOTOS
from vitrail.report.parts import Part, ReportData, Section, Table, Text
from vitrail.sentence import Sentence, percent
from vitrail.stats import share_interval
from vitrail.study.plan import growing_command

__all__ = ["PER_SECTION", "accuracy", "citations", "main_findings", "studied"]

SKIPPED_SHOWN = 20

TOP = "top_probability"
"""The array whose first entry of an image is the probability of the predicted class."""

N_MISTAKES = 4
"""Mistakes that the sentence of accuracy names."""

CROPS = (
    "The images are crops of thirteen photographs, several of each, so they are no independent sample: 95 % intervals "
    "hold for such crops of these thirteen and would be wider for photographs at large. Images that ranked nothing "
    "show the same photographs as those that did."
)
"""What a report of the built-in photographs says of its intervals."""

PER_SECTION = 4
"""Findings of each section that also stand at the head."""


def main_findings(study: ReportData, sections: Sequence[Section]) -> Section:
    """The first sentences of every section, then their second ones, and so on: sections put their best first.

    Accuracy leads; where it means nothing, the reason comes last.

    Args:
        study: The study.
        sections: Those of the report.

    Returns:
        The section.
    """
    leading = [list(each.findings[:PER_SECTION]) for each in sections]
    ranked = [each[rank] for rank in range(PER_SECTION) for each in leading if rank < len(each)]
    of_accuracy = [accuracy(study)]
    parts = (of_accuracy, ranked) if study.plan.n_classes is not None and study.has_labels else (ranked, of_accuracy)
    return Section("findings", "Main findings", [sentence for part in parts for sentence in part if sentence])


def accuracy(study: ReportData) -> Sentence:
    """How often the model is right, with its worst mistakes.

    Args:
        study: The study.

    Returns:
        The sentence; it says why where accuracy means nothing.
    """
    if study.plan.n_classes is None:
        return Sentence("Accuracy is not known: the model has no classifier.")
    if not study.has_labels:
        return Sentence(f"Accuracy is not known; the label of an image is {study.plan.labels_from}.")
    predicted = study.data["prediction"].to_numpy()
    correct = study.data["label"].to_numpy() == predicted
    if len(correct) < 2:
        return Sentence(f"The model is {'right' if correct[0] else 'wrong'} about this image.", measure="prediction")
    low, high = (float(end) for end in share_interval(correct)[:2])
    interval = f"95 % interval {percent(low, 1)} to {percent(high, 1)}"
    return Sentence(
        f"The model is right about {percent(float(correct.mean()), 1)} of the {len(correct):,} images ({interval}).",
        measure="probability",
        images=[
            (int(image), f"taken for {study.class_name(int(predicted[image]))}")
            for image in _worst_mistakes(study, correct)
        ],
        caption="the mistakes that the model is surest of"
        if TOP in study.data
        else "the mistakes whose label the model held for least likely",
    )


def _worst_mistakes(study: ReportData, correct: Bool[np.ndarray, "image"]) -> Int[np.ndarray, "index"]:
    """The wrong images, those first of whose class the model was surest; in older studies least sure of their label."""
    wrong = np.flatnonzero(~correct)
    surest = study.data[TOP].to_numpy()[wrong, 0] if TOP in study.data else -study.data["probability"].to_numpy()[wrong]
    return wrong[np.argsort(-surest, kind="stable")][:N_MISTAKES]


def studied(study: ReportData) -> Section:
    """The plan, the images, what was left out and skipped.

    Args:
        study: The study.

    Returns:
        The section.
    """
    return Section("studied", "What was studied, and how", (), tuple(_facts(study)))


def _facts(study: ReportData) -> Iterator[Part]:
    plan, manifest = study.plan, study.manifest
    sizes = sorted({tuple(grid) if grid else None for grid in plan.grids}, key=str)
    grids = ", ".join(f"{grid[0]} x {grid[1]} patches" if grid else "no grid" for grid in sizes)
    heads = f"{plan.n_heads[0]}" if len(set(plan.n_heads)) == 1 else f"{min(plan.n_heads)} to {max(plan.n_heads)}"
    view = plan.preprocessing
    source = PurePath(manifest.source).name if manifest.source else "handed over in memory"
    yield Table(
        "",
        ("", ""),
        [
            ["model", plan.model],
            ["weights", ", ".join(filter(None, [plan.weights_from, f"sha256 {plan.weight_digest[:16]}"]))],
            [
                "shape",
                f"{plan.n_layers} layers of {heads} heads, {grids}, {'a' if plan.class_token else 'no'} class token",
            ],
            [
                "input",
                f"{view['size'][0]} x {view['size'][1]} pixels, {view['interpolation']}, "
                f"mean {_numbers(view['mean'])}, deviation {_numbers(view['std'])}",
            ],
            ["task", _task(study)],
            ["preprocessing from", view.get("source", "not recorded")],
            ["images", f"{plan.n_images:,} ({source}), digest {plan.data_digest[:16]}"],
            ["labels", plan.labels_from],
            ["masks", "instance ids for grouping and salience" if manifest.masks_from else "none"],
            [
                "precision",
                f"{plan.precision} on {plan.device}, {plan.threads} thread{'s' if plan.threads != 1 else ''}",
            ],
            ["batch size, seed", f"{plan.batch_size}, {plan.seed}"],
            ["options", ", ".join(f"{name}: {value}" for name, value in plan.options.items()) or "the defaults"],
            ["versions", ", ".join(f"{name} {version}" for name, version in plan.versions.items())],
        ],
        words=(0, 1),
    )
    for note in plan.notes:
        yield Text(note)
    if manifest.source == PHOTOS:
        yield Text(CROPS)
    to_come = study.data.attrs.get("missing_measures", [])
    if to_come:
        yield Text(f"Begun and not complete, so left out here: {', '.join(to_come)}.")
    if plan.left_out:
        reasons = dict.fromkeys(plan.left_out.values())
        rows = [[", ".join(name for name in plan.left_out if plan.left_out[name] == why), why] for why in reasons]
        yield Table("Measures left out", ("measures", "reason"), rows, words=(0, 1))
    if manifest.skipped:
        listed = manifest.skipped[:SKIPPED_SHOWN]
        more = len(manifest.skipped) - len(listed)
        yield Table(
            f"Files that were skipped ({len(manifest.skipped):,})",
            ("file", "reason"),
            [[each.id, each.reason] for each in listed],
            f"And {more:,} more, all in the study's images.json." if more else "",
            words=(0, 1),
        )
    declared = measures()  # a plan may name measures of packages that are not installed here
    missing = [
        name
        for name in _of_any_vit(with_masks=False)
        if not study.measures_of(name) and not set(to_come) & set(analyses()[name].measure_names)
    ]
    if missing:
        yield Text(
            f"This study holds nothing of {' and '.join(missing)}. The same images and options add it to this folder:"
        )
        yield Text(growing_command(study.plan, ["IMAGES"], missing, study.folder.resolve().name), code=True)
    elif any(name in declared and "masks" in declared[name].needs for name in plan.left_out):
        yield Text("Measures of objects need masks of each image, as PNGs of instance ids named like the images:")
        yield Text(
            growing_command(study.plan, ["IMAGES", "--masks", "FOLDER"], _of_any_vit(with_masks=True), "NEW_FOLDER"),
            code=True,
        )


def _task(study: ReportData) -> str:
    plan = study.plan
    words = f"{plan.task}, {plan.n_classes:,} of them" if plan.n_classes is not None else plan.task
    output = f"; output {plan.output!r}" if plan.output is not None else ""
    return f"{words}{output}{f'; target: {plan.target}' if plan.target is not None else ''}"


def _of_any_vit(with_masks: bool) -> list[str]:
    """Analyses that any model has; without masks those that measure something then, too."""
    return [
        name
        for name, analysis in analyses().items()
        if name != BASE
        and not analysis.only_for
        and (with_masks or any("masks" not in each.needs for each in analysis.measures))
    ]


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def citations(study: ReportData) -> Section:
    """The papers that the methods come from, and how to remake the report.

    Args:
        study: The study.

    Returns:
        The section.
    """
    by_paper: dict[str, list[str]] = {}
    for name, analysis in analyses().items():
        if analysis.paper and study.measures_of(name):
            by_paper.setdefault(analysis.paper, []).append(name)
    rows = [[", ".join(names), paper] for paper, names in by_paper.items()]
    return Section(
        "cite",
        "How to cite the methods",
        (),
        (
            Text(
                "Measures follow these papers; what is our own construction is called so beside each measure. Please "
                "cite the papers of the measures you use, and Vitrail "
                f"{study.plan.versions.get('vitrail', '')} as the software."
            ),
            Table("", ("", ""), rows, words=(0, 1)),
            Text(
                "Every number here is read from the study, which any tool that reads Zarr can open. The report is made "
                "again by:"
            ),
            Text("vitrail report STUDY --out report.html", code=True),
        ),
    )
