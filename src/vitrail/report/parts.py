"""What a section of the report is made of. Strings are plain text here; `page` alone makes HTML of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int, UInt8

from vitrail.data import Manifest, class_title
from vitrail.measure import ROOMS
from vitrail.study.plan import Plan
from vitrail.study.store import open_study, read_manifest, read_plan

__all__ = ["Drawing", "Part", "Photographs", "Section", "Studied", "Table", "Text", "percent", "readings"]

SAMPLED = 2_000
"""Images that measures of every patch are read for: a study of 50,000 holds gigabytes of them."""


@dataclass(frozen=True, eq=False)
class Studied:
    """A finished study, as sections read it."""

    folder: Path
    data: xr.Dataset
    plan: Plan
    manifest: Manifest

    @classmethod
    def of(cls, folder: str | Path) -> "Studied":
        """Raises `StudyError` if the folder is no study, or not a finished one."""
        folder = Path(folder)
        return cls(folder, open_study(folder), read_plan(folder), read_manifest(folder))

    @property
    def n_images(self) -> int:
        return int(self.data.sizes["image"])

    @cached_property
    def sample(self) -> xr.Dataset:
        """At most 2,000 of the images, evenly spaced: for measures that have a value for each patch."""
        at: Int[np.ndarray, "chosen"] = np.unique(
            np.linspace(0, self.n_images - 1, min(self.n_images, SAMPLED)).round()
        )
        return self.data.isel(image=at.astype(np.int64))

    @property
    def sample_words(self) -> str:
        """Whose numbers those of the sample are."""
        n_sampled = int(self.sample.sizes["image"])
        return "" if n_sampled == self.n_images else f"Of {n_sampled:,} images, evenly spaced over the study."

    @property
    def has_labels(self) -> bool:
        """The labels are the data set's, so that accuracy means something."""
        named = not self.plan.labels_from.startswith(("the model's own", "no labels"))
        return named and self.plan.n_classes is not None

    def class_name(self, number: int) -> str:
        """A class by its first name, or its number."""
        names = self.plan.class_names
        return class_title(names[number]) if names is not None and 0 <= number < len(names) else f"class {number}"

    def held(self, room: str) -> list[str]:
        """The measures of a room that the study holds."""
        return [name for name in ROOMS[room] if name in self.data]


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` sets it as it stands, in one width."""

    text: str
    code: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text under their titles. With `folded`, shown when asked for; `words` says which columns hold words."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
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


Part = Text | Table | Drawing | Photographs


@dataclass(frozen=True, eq=False)
class Section:
    """One section: `findings` are sentences with numbers, the first of which also stand at the head of the report."""

    key: str
    title: str
    findings: Sequence[str]
    parts: Sequence[Part] = field(default_factory=tuple)


def percent(share: float, digits: int = 0) -> str:
    """A share of 1 as text."""
    return f"{100 * share:.{digits}f} %"


def readings(study: Studied, names: Sequence[str]) -> Table:
    """How to read the measures of a section, as they are declared."""
    rows = []
    for name in names:
        attrs = study.data[name].attrs
        told = [str(attrs.get(key, "")) for key in ("title", "unit", "low", "high", "source", "limits")]
        rows.append([name, told[0], "0 to 1" if told[1] == "1" else told[1], *told[2:]])
    return Table(
        "How to read these numbers, and where they come from",
        ("measure", "what it is", "unit", "low means", "high means", "source", "what it cannot tell"),
        rows,
        folded=True,
        words=range(7),
    )
