"""What a section of the report is made of. Strings are plain text here; `page` alone makes HTML of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int, UInt8

from vitrail.analysis import analyses
from vitrail.data import ImageEntry, LabelSource, Manifest, class_title
from vitrail.measure import range_or_unit
from vitrail.study.plan import Plan
from vitrail.study.store import open_study, read_manifest, read_plan

__all__ = [
    "Drawing",
    "Part",
    "Photographs",
    "Picture",
    "Points",
    "ReportData",
    "Section",
    "Table",
    "Text",
    "readings",
]

SAMPLED = 2_000
"""Images that measures of every patch are read for: a study of 50,000 holds gigabytes of them."""


@dataclass(frozen=True, eq=False)
class ReportData:
    """A finished study, as sections read it."""

    folder: Path
    data: xr.Dataset
    plan: Plan
    manifest: Manifest

    @classmethod
    def of(cls, folder: str | Path) -> "ReportData":
        """Opens a finished study for its report.

        Args:
            folder: The study.

        Returns:
            Its arrays, plan and list of images.

        Raises:
            StudyError: The folder is no study, or not a finished one.
        """
        folder = Path(folder)
        return cls(folder, open_study(folder), read_plan(folder), read_manifest(folder))

    @classmethod
    def of_look(cls, look: xr.Dataset) -> "ReportData":
        """One image as `vitrail.look` gives it, as a study of one.

        Args:
            look: the dataset; its attributes hold the plan.

        Returns:
            What sections read; without a folder.
        """
        names = {each.name for each in fields(Plan)}
        plan = Plan(**{name: value for name, value in look.attrs.items() if name in names})
        entry = ImageEntry(str(look["image"].to_numpy()[0]), None, None, 0, plan.data_digest)
        return cls(Path(), look, plan, Manifest(None, plan.labels_from, (entry,), ()))

    @property
    def n_images(self) -> int:
        return int(self.data.sizes["image"])

    @cached_property
    def sample(self) -> xr.Dataset:
        """At most 2,000 of the images, evenly spaced: for measures that have a value for each patch."""
        return self.data.isel(image=self.sample_positions)

    @cached_property
    def sample_positions(self) -> Int[np.ndarray, "index"]:
        """Positions in the study of the images of `sample`."""
        return np.unique(np.linspace(0, self.n_images - 1, min(self.n_images, SAMPLED)).round()).astype(np.int64)

    @property
    def sample_words(self) -> str:
        """Whose numbers those of the sample are."""
        n_sampled = int(self.sample.sizes["image"])
        return "" if n_sampled == self.n_images else f"Of {n_sampled:,} images, evenly spaced over the study."

    @property
    def has_labels(self) -> bool:
        """The labels are the data set's, so that accuracy means something."""
        return self.plan.labels == LabelSource.GIVEN and self.plan.n_classes is not None

    def thumbnail(self, image: int) -> UInt8[np.ndarray, "row column channel"] | None:
        """The small picture of an image.

        Args:
            image: Position in the study.

        Returns:
            Its pixels; None where the study was made without.
        """
        if "thumbnail" not in self.data:
            return None
        return np.asarray(self.data["thumbnail"].isel(image=image).values)

    def class_name(self, number: int) -> str:
        """A class by its first name, or its number.

        Args:
            number: Index of the class.

        Returns:
            A name, or the index as text.
        """
        names = self.plan.class_names
        return class_title(names[number]) if names is not None and 0 <= number < len(names) else f"class {number}"

    def measures_of(self, analysis: str) -> list[str]:
        """The measures of an analysis that the study holds.

        Args:
            analysis: Name of the analysis.

        Returns:
            Names of measures.
        """
        return [name for name in analyses()[analysis].measure_names if name in self.data]


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` sets it as it stands, in one width."""

    text: str
    code: bool = False


@dataclass(frozen=True, eq=False)
class Picture:
    """A small picture in a cell of a table, with the words that stand for it."""

    pixels: UInt8[np.ndarray, "row column channel"]
    words: str


@dataclass(frozen=True)
class Points:
    """Sentences under a heading, each with the photographs that it names."""

    caption: str
    sentences: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of text or small pictures under their titles; `folded`: shown when asked for; `words`: columns of words."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Picture]]
    reading: str = ""
    folded: bool = False
    words: Sequence[int] = (0,)


@dataclass(frozen=True, eq=False)
class Drawing:
    """A matplotlib figure; its title and the line under it become text of the page."""

    figure: Any
    reading: str = ""


@dataclass(frozen=True, eq=False)
class Photographs:
    """Small pictures in a row, each with a line under it."""

    caption: str
    pictures: Sequence[UInt8[np.ndarray, "row column channel"]]
    lines: Sequence[str]
    reading: str = ""


Part = Text | Points | Table | Drawing | Photographs


@dataclass(frozen=True, eq=False)
class Section:
    """One section of the report.

    Attributes:
        key: its anchor.
        title: its heading.
        findings: sentences with numbers, the first of which also stand at the head of the report.
        parts: what it shows, or a function that makes it: drawing is slow, and whoever wants sentences alone is spared.
    """

    key: str
    title: str
    findings: Sequence[str]
    parts: Iterable[Part] | Callable[[], Iterable[Part]] = field(default_factory=tuple)

    def all_parts(self) -> tuple[Part, ...]:
        """What the section shows.

        Returns:
            Text, tables, drawings and photographs, in order.
        """
        return tuple(self.parts() if callable(self.parts) else self.parts)


def readings(study: ReportData, names: Sequence[str]) -> Table:
    """How to read the measures of a section, as they are declared.

    Args:
        study: The study.
        names: Of measures.

    Returns:
        A table with a row for each measure.
    """
    rows = []
    for name in names:
        attrs = study.data[name].attrs
        words = [str(attrs.get(key, "")) for key in ("title", "unit", "low", "high", "source", "limits")]
        rows.append([name, words[0], range_or_unit(words[1]), *words[2:]])
    return Table(
        "How to read these numbers, and where they come from",
        ("measure", "what it is", "unit", "low means", "high means", "source", "what it cannot tell"),
        rows,
        folded=True,
        words=range(7),
    )
