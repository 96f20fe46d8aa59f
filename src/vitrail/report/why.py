"""Why the heads that matter matter: what a study knows of a head, in sentences and as a row of a table."""

from collections.abc import Iterator

import numpy as np
import xarray as xr
from jaxtyping import Float

from vitrail.figures.style import head_name
from vitrail.heads.why import extreme_images, missing, why_sentences, why_table
from vitrail.report.parts import Part, Picture, Points, ReportData, Section, Table, Text, readings
from vitrail.sentence import Sentence

__all__ = ["why"]

N_EXPLAINED = 5

RANKED_BY = ("rank", "drop_class_part")
"""What orders the heads: all of a head's importance, else that of its class rows and columns."""

COLUMNS = (
    ("rank", "{:.0f}", "rank"),
    ("p lost without its class part", "{:+.3f}", "drop_class_part"),
    ("without its patch part", "{:+.3f}", "drop_patch_part"),
    ("entropy, percentile", "{:.0f}", "strength_entropy_percentile"),
    ("reach, {unit}", "{:.1f}", "attention_distance_mean"),
    ("image dependence", "{:.2f}", "image_dependence"),
)
IMAGES = ("matters most for", "least for")
WORDS = (("pattern", "pattern"), ("because", "pattern_rule_held"))


def why(study: ReportData) -> Section | None:
    """The heads that matter most, each explained, if the study holds any importance or that of regions.

    Args:
        study: The study.

    Returns:
        The section; None where the study holds nothing for it.
    """
    table = why_table(study.data)
    by = next((name for name in RANKED_BY if name in table), None)
    if by is None:
        return None
    order = _rank_heads(table[by].to_numpy() * (1 if by == "rank" else -1))
    explanations = [(head_name(*at), _sentences(study.data, table, *at)) for at in order[:N_EXPLAINED]]
    return Section("why", "Why these heads", (), lambda: _parts(study, table, order, explanations))


def _rank_heads(values: Float[np.ndarray, "layer head"]) -> list[tuple[int, int]]:
    """Heads that are there, the lowest value first."""
    heads = [(int(layer), int(head)) for layer, head in np.argwhere(~np.isnan(values))]
    return sorted(heads, key=lambda at: values[at])


def _sentences(data: xr.Dataset, table: xr.Dataset, layer: int, head: int) -> list[Sentence]:
    """Without what the study lacks, which is said once for all heads."""
    sentences = why_sentences(data, layer, head, table=table)
    return sentences[: len(sentences) - len(missing(data))]


def _parts(
    study: ReportData, table: xr.Dataset, order: list[tuple[int, int]], explanations: list[tuple[str, list[Sentence]]]
) -> Iterator[Part]:
    ranked_by = table.attrs.get("ranked_by", "what the label loses without their class part")
    yield Text(f"The {len(explanations)} heads that matter most, ranked by {ranked_by}:")
    for name, sentences in explanations:
        yield Points(name, sentences)
    numbers = [column for column in COLUMNS if column[2] in table]
    headings = [title.format(**table[name].attrs) for title, _, name in numbers]
    words = [column for column in WORDS if column[1] in table]
    titles = IMAGES if "rank" in table else ()
    yield Table(
        f"All {len(order)} heads",
        ("head", *headings, *(title for title, _ in words), *titles),
        [_row(study, table, at, numbers, words) for at in sorted(order)],
        folded=True,
        words=(0, *range(len(numbers) + 1, len(numbers) + len(words) + 3)),
    )
    for sentence in missing(study.data).values():
        yield Text(sentence)
    if names := study.measures_of("regions"):
        yield readings(study, names)


def _row(
    study: ReportData,
    table: xr.Dataset,
    at: tuple[int, int],
    numbers: list[tuple[str, str, str]],
    words: list[tuple[str, str]],
) -> list[str | Picture]:
    values = [(form, float(table[name].to_numpy()[at])) for _, form, name in numbers]
    most, least = extreme_images(study.data, *at, n_images=1)
    return [
        head_name(*at),
        *("none" if np.isnan(value) else form.format(value) for form, value in values),
        *(str(table[name].to_numpy()[at]) for _, name in words),
        *(_picture(study, int(position)) for position in (*most, *least)),
    ]


def _picture(study: ReportData, image: int) -> str | Picture:
    """The photograph; its name where the study has no small pictures."""
    name = str(study.data["image"].to_numpy()[image])
    pixels = study.thumbnail(image)
    return name if pixels is None else Picture(pixels, name)
