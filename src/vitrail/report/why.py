"""Why the heads that matter matter: what a study knows of a head, in sentences and as a row of a table."""

from collections.abc import Iterator

import numpy as np
import xarray as xr
from jaxtyping import Float

from vitrail.figures.style import head_name
from vitrail.heads.why import missing, why_sentences, why_table
from vitrail.report.parts import Part, Section, Studied, Table, Text, readings

__all__ = ["why"]

N_TOLD = 5

RANKED_BY = ("rank", "drop_class_part")
"""What orders the heads: all of a head's importance, else that of its class rows and columns."""

COLUMNS = (
    ("rank", "{:.0f}", "rank"),
    ("p lost without its class part", "{:+.3f}", "drop_class_part"),
    ("without its patch part", "{:+.3f}", "drop_patch_part"),
    ("entropy, percentile", "{:.0f}", "strength_entropy_percentile"),
    ("reach, patches", "{:.1f}", "attention_distance_mean"),
    ("image dependence", "{:.2f}", "image_dependence"),
)
WORDS = (("pattern", "pattern"), ("because", "pattern_rule_held"))


def why(study: Studied) -> Section | None:
    """The heads that matter most, each explained, if the study holds any importance or that of regions."""
    table = why_table(study.data)
    by = next((name for name in RANKED_BY if name in table), None)
    if by is None:
        return None
    order = _ranked(table[by].to_numpy() * (1 if by == "rank" else -1))
    told = [(head_name(*at), _sentences(study.data, table, *at)) for at in order[:N_TOLD]]
    return Section("why", "Why these heads", (), tuple(_parts(study, table, order, told)))


def _ranked(values: Float[np.ndarray, "layer head"]) -> list[tuple[int, int]]:
    """Heads that are there, the lowest value first."""
    known = [(int(layer), int(head)) for layer, head in np.argwhere(~np.isnan(values))]
    return sorted(known, key=lambda at: values[at])


def _sentences(data: xr.Dataset, table: xr.Dataset, layer: int, head: int) -> str:
    """Without what the study lacks, which is said once for all heads."""
    told = why_sentences(data, layer, head, table=table)
    return " ".join(told[: len(told) - len(missing(data))])


def _parts(
    study: Studied, table: xr.Dataset, order: list[tuple[int, int]], told: list[tuple[str, str]]
) -> Iterator[Part]:
    yield Table(
        f"The {len(told)} heads that matter most", ("head", "what the study says of it"), told,
        f"Ranked by {table.attrs.get('ranked_by', 'what the label loses without their class part')}.", words=(0, 1),
    )  # fmt: skip
    numbers = [column for column in COLUMNS if column[2] in table]
    words = [column for column in WORDS if column[1] in table]
    yield Table(
        f"All {len(order)} heads",
        ("head", *(title for title, _, _ in numbers), *(title for title, _ in words), *_image_titles(table)),
        [_row(study.data, table, at, numbers, words) for at in sorted(order)],
        folded=True, words=(0, *range(len(numbers) + 1, len(numbers) + len(words) + 3)),
    )  # fmt: skip
    for sentence in missing(study.data).values():
        yield Text(sentence)
    if held := study.held("regions"):
        yield readings(study, held)


def _image_titles(table: xr.Dataset) -> tuple[str, ...]:
    return ("matters most for", "least for") if "most" in table else ()


def _row(
    data: xr.Dataset,
    table: xr.Dataset,
    at: tuple[int, int],
    numbers: list[tuple[str, str, str]],
    words: list[tuple[str, str]],
) -> list[str]:
    values = [(form, float(table[name].to_numpy()[at])) for _, form, name in numbers]
    ids = data["image"].to_numpy().astype(str)
    images = [str(ids[table[name].to_numpy()[at][0]]) for name in ("most", "least")] if "most" in table else []
    return [
        head_name(*at),
        *("none" if np.isnan(value) else form.format(value) for form, value in values),
        *(str(table[name].to_numpy()[at]) for _, name in words),
        *images,
    ]
