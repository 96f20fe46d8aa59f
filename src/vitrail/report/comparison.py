"""Two studies compared, as one HTML file of the same parts as a report."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from vitrail.comparison import compare, open_pair
from vitrail.comparison.findings import ALPHA, comparison_findings, measures_by_effect
from vitrail.comparison.pairs import Pair
from vitrail.figures import comparison as figures
from vitrail.figures.style import number
from vitrail.heads.head_values import IMPORTANCE_MEASURES
from vitrail.measure import range_or_unit
from vitrail.report.page import page
from vitrail.report.parts import Drawing, Part, Photographs, ReportData, Section, Table, Text
from vitrail.report.sections import SIGN, write_page

__all__ = ["write_comparison"]

N_PHOTOGRAPHS = 10
"""Images that changed most: two rows of the page."""


def write_comparison(
    a: str | Path,
    b: str | Path,
    out: str | Path | None = None,
    *,
    measures: str | Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[Path, xr.Dataset]:
    """Compares two studies and writes what differs as one HTML file.

    Args:
        a: Folder of the first study.
        b: Folder of the second; differences are b less a.
        out: The file; None: `compared-with-B.html` in the first study's folder.
        measures: Names of measures; None for all that both hold.
        seed: As `vitrail.compare`.

    Returns:
        The file, and the comparison.

    Raises:
        StudyError: One of them is no finished study.
        UsageError: They cannot be compared, or the file cannot be written.
    """
    pair = open_pair(a, b)
    compared = compare(a, b, measures=measures, seed=seed)
    target = Path(a) / f"compared-with-{pair.b.folder.resolve().name}.html" if out is None else out
    title = f"{compared.attrs['name_a']} and {compared.attrs['name_b']}"
    lead = (
        f"{SIGN.decode()} beside another: the same {compared.attrs['n_compared']:,} images in "
        f"{compared.attrs['study_a']} and {compared.attrs['study_b']}, differences are the second less the first."
    )
    sections = [section for section in _sections(pair, compared) if section is not None]
    return write_page(target, lambda: page(title, lead, sections, ReportData.of(a).thumbnail)), compared


def _sections(pair: Pair, compared: xr.Dataset) -> Iterator[Section | None]:
    yield Section("findings", "What differs", comparison_findings(compared))
    yield Section("measures", "Every measure", (), lambda: _measures(compared))
    yield Section("layers", "By layer", (), lambda: _layers(compared))
    yield _heads(compared)
    yield _images(pair, compared)
    yield Section("compared", "What was compared, and how", (), lambda: _facts(pair, compared))


def _measures(compared: xr.Dataset) -> Iterator[Part]:
    yield Drawing(figures.measures_that_differ(compared))
    columns = ("measure", compared.attrs["name_a"], compared.attrs["name_b"], "difference", "95 %", "p", "unit")
    rows = []
    for name in measures_by_effect(compared):
        row = compared.sel(measure=name)
        low, high = float(row["low"]), float(row["high"])
        unit = str(row["unit"].item())
        rows.append(
            [
                str(row["title"].item()),
                number(float(row["mean_a"])),
                number(float(row["mean_b"])),
                f"{float(row['mean_difference']):+.3g}",
                compared.attrs["no_interval"][name] if np.isnan(low + high) else f"{low:+.3g} to {high:+.3g}",
                f"{float(row['p']):.3f}",
                "share" if unit == "bool" else range_or_unit(unit),
            ]
        )
    yield Table(
        "Means over images, layers and heads",
        columns,
        rows,
        "Intervals: 95 % of each mean difference alone. p: random signs, corrected for all measures.",
        words=(0, 6),
    )


def _layers(compared: xr.Dataset) -> Iterator[Part]:
    drawing = figures.layers_side_by_side(compared)
    if drawing is None:
        yield Text("None of the measures has a value by layer.")
    else:
        yield Drawing(drawing)


def _heads(compared: xr.Dataset) -> Section | None:
    """Head by head, where heads of the same index are the same heads."""
    correspondence = compared.attrs["heads_correspond"]
    if correspondence is None or correspondence["p"] >= ALPHA:
        return None
    names = [name for name in (*IMPORTANCE_MEASURES, "attention_distance") if f"{name}_head_difference" in compared]
    if not names:
        return None
    return Section(
        "heads", "By head", (), lambda: [Drawing(figures.heads_against_heads(compared, name)) for name in names[:2]]
    )


def _images(pair: Pair, compared: xr.Dataset) -> Section | None:
    change = compared["change"].to_numpy()
    order = [int(at) for at in np.argsort(-np.nan_to_num(change, nan=-1.0), kind="stable")[:N_PHOTOGRAPHS]]
    if len(change) < 2:
        return None
    lines = [_words_of_image(compared, at) for at in order]
    caption = "The images that changed most"
    reading = (
        "By all measures together: the root mean square over measures of how far the image moved, in that of all "
        "images; 1 is an average image."
    )
    if "thumbnail" not in pair.a.data:
        rows = [[str(compared["image"].values[at]), line] for at, line in zip(order, lines, strict=True)]
        return Section("images", caption, (), (Table("", ("image", "change"), rows, reading, words=(0, 1)),))
    pictures = [np.asarray(pair.a.data["thumbnail"][int(pair.a.rows[at])].values) for at in order]
    return Section("images", caption, (), (Photographs("", pictures, lines, reading),))


def _words_of_image(compared: xr.Dataset, at: int) -> str:
    words = f"{float(compared['change'][at]):.1f} times"
    if "probability" in compared["measure"].values:
        difference = float(compared["difference"].sel(measure="probability")[at])
        words += "" if np.isnan(difference) else f"; label {difference:+.2f}"
    if "same_prediction" in compared and not bool(compared["same_prediction"][at]):
        words += "; another prediction"
    return words


def _facts(pair: Pair, compared: xr.Dataset) -> Iterator[Part]:
    attrs = compared.attrs
    rows = [
        [word, *(str(value) for value in values)]
        for word, values in (
            ("model", (attrs["model_a"], attrs["model_b"])),
            ("study", (attrs["study_a"], attrs["study_b"])),
            ("weights", tuple(f"sha256 {side.plan.weight_digest[:16]}" for side in (pair.a, pair.b))),
            ("layers and heads", tuple(_shape(side.plan.n_heads) for side in (pair.a, pair.b))),
            ("input", tuple(" x ".join(map(str, side.plan.preprocessing["size"])) for side in (pair.a, pair.b))),
            ("images", tuple(f"{side.plan.n_images:,}" for side in (pair.a, pair.b))),
        )
    ]
    yield Table("", ("", attrs["name_a"], attrs["name_b"]), rows, words=(0, 1, 2))
    thinned = "" if attrs["n_shared"] == attrs["n_compared"] else f", of which {attrs['n_compared']:,} were compared"
    yield Text(f"{attrs['n_shared']:,} images are in both studies{thinned}: their files have the same content.")
    if attrs["labels"]:
        yield Text(attrs["labels"])
    if attrs["left_out"]:
        names_by_reason: dict[str, list[str]] = {}
        for name, reason in attrs["left_out"].items():
            names_by_reason.setdefault(reason, []).append(name)
        left_out = [[", ".join(names), reason] for reason, names in names_by_reason.items()]
        yield Table("Measures left out", ("measures", "reason"), left_out, words=(0, 1), folded=True)
    yield Text("The comparison is made again by:")
    yield Text("vitrail compare STUDY_A STUDY_B --out compared.html", code=True)


def _shape(n_heads: Sequence[int]) -> str:
    heads = str(n_heads[0]) if len(set(n_heads)) == 1 else f"{min(n_heads)} to {max(n_heads)}"
    return f"{len(n_heads)} x {heads}"
